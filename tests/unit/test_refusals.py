"""Files that are no models, or not ones that an engine here can serve: what is said of each names what it is and what to do."""

import gzip
import io
import json
import pickle
import subprocess
import tarfile
import zipfile
import zlib

import numpy as np
import pytest
from onnx import TensorProto, helper

from runtimes import registry
from runtimes.contract import InputInvalid, LoadOptions, ModelInvalid
from runtimes.file_kinds import what_folder, what_it_is
from runtimes.messages import plain, without_paths
from tests.serving import onnx_models, tflite_models
from tests.serving.onnx_models import value

FLOAT, INT64, TEXT = TensorProto.FLOAT, TensorProto.INT64, TensorProto.STRING


def load(path, **options):
    return registry.for_file(path).load(path, LoadOptions(**options))


# -- what is no model -------------------------------------------------------------------------------------------------------------


def zipped(*names):
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as archive:
        for name in names:
            archive.writestr(name, "x")
    return memory.getvalue()


def tarred(name):
    memory = io.BytesIO()
    with tarfile.open(fileobj=memory, mode="w") as archive:
        archive.addfile(tarfile.TarInfo(name))
    return memory.getvalue()


SAFETENSORS = json.dumps({"w": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}).encode()
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
NO_MODELS = [
    (LFS, "a Git LFS pointer, not the file itself: fetch it with `git lfs pull`"),
    (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "a web page (HTML)"),
    (b"<HTML><HEAD><TITLE>404</TITLE>", "a web page (HTML)"),
    (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "XML: the download went to a message"),
    (b'{"error": "Repository not found"}', "JSON, not a model"),
    (zipped("digits/model.onnx", "README"), "an archive (zip): unpack it and give the model in it, digits/model.onnx"),
    (zipped("archive/data.pkl", "archive/version"), "a PyTorch file: convert it with torch.onnx.export"),
    (zipped("config.json", "metadata.json", "model.weights.h5"), "a Keras model (.keras)"),
    (zipped("a.npy", "b.npy"), "NumPy arrays (.npz), not a model"),
    (zipped("a")[:40], "an archive (zip, damaged or cut off)"),
    (gzip.compress(b"x"), "an archive (gzip)"),
    (tarred("model.onnx"), "an archive (tar)"),
    (pickle.dumps({"w": [1.0]}), "a Python pickle"),
    (b"\x89HDF\r\n\x1a\n" + bytes(100), "a Keras model (HDF5)"),
    (len(SAFETENSORS).to_bytes(8, "little") + SAFETENSORS, "a safetensors file"),
    (b"GGUF" + bytes(100), "a GGUF file"),
    (zlib.compress(pickle.dumps([1])), "compressed (zlib), as joblib writes pickles"),
    (b"ftrt" + bytes(100), "an engine that TensorRT has built"),
    (b"\x08\x01\x12\x90\x03\x12\x05serve\n\x06graph", "a TensorFlow SavedModel"),
    (b"\x7fELF" + bytes(60), "a program or library"),
]


@pytest.mark.parametrize("suffix", [".onnx", ".tflite"])
@pytest.mark.parametrize(("content", "words"), NO_MODELS, ids=[words[:24] for _, words in NO_MODELS])
def test_what_is_no_model_is_called_what_it_is(tmp_path, content, words, suffix):
    path = tmp_path / f"digits{suffix}"
    path.write_bytes(content)
    with pytest.raises(ModelInvalid) as refused:
        load(path)
    assert str(refused.value).startswith(f"digits{suffix} is {words}")


def test_a_model_of_the_other_kind_is_called_so(tmp_path):
    onnx_models.scale(tmp_path / "a.tflite", 2.0)
    with pytest.raises(ModelInvalid, match=r"a\.tflite is an ONNX model: its variant's runtime is onnx"):
        load(tmp_path / "a.tflite")
    tflite_models.coder(tmp_path / "a.onnx")
    with pytest.raises(ModelInvalid, match=r"a\.onnx is a TFLite model: its variant's runtime is tflite"):
        load(tmp_path / "a.onnx")


def test_files_with_names_of_other_frameworks_are_called_what_they_are(tmp_path):
    (tmp_path / "net.pt").write_bytes(zipped("archive/data.pkl"))
    with pytest.raises(ModelInvalid, match=r"net\.pt is a PyTorch file: convert it with torch\.onnx\.export"):
        registry.for_file(tmp_path / "net.pt")
    assert what_folder(tmp_path) is None
    (tmp_path / "saved_model.pb").write_bytes(b"\x08\x01")
    assert what_folder(tmp_path) == what_it_is(tmp_path / "saved_model.pb")
    assert "a TensorFlow SavedModel" in what_folder(tmp_path)


def test_models_are_not_taken_for_something_else(tmp_path):
    for path in (onnx_models.scale(tmp_path / "a.onnx", 2.0), tflite_models.coder(tmp_path / "a.tflite")):
        assert what_it_is(path) is None
    (tmp_path / "b").write_bytes(b"\x80\x02\x00\x00TFL3")
    assert what_it_is(tmp_path / "b") is None


# -- what an engine here cannot serve -----------------------------------------------------------------------------------------------


def onnx(path, nodes, inputs, outputs, opset=17, domains=()):
    graph = helper.make_graph(nodes, "g", inputs, outputs)
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    path.write_bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())
    return path


def of_type(kind):
    """A model that only casts an input of this type."""
    return [helper.make_node("Cast", ["x"], ["y"], to=FLOAT)], [value("x", kind, ["n"])], [value("y", FLOAT, ["n"])], 21


MAPS = helper.make_sequence_type_proto(
    helper.make_map_type_proto(INT64, helper.make_tensor_type_proto(FLOAT, [])),
)
SEQUENCE = helper.make_sequence_type_proto(helper.make_tensor_type_proto(FLOAT, None))
OPTIONAL = helper.make_optional_type_proto(helper.make_tensor_type_proto(FLOAT, ["n"]))
ZIPS = helper.make_node("ZipMap", ["p"], ["probs"], domain="ai.onnx.ml", classlabels_int64s=[0, 1])
CLASSIFIES = helper.make_node(
    "LinearClassifier", ["x"], ["label", "p"], domain="ai.onnx.ml", coefficients=[1.0, 2.0, 3.0, 4.0], intercepts=[0.0, 0.0],
    classlabels_ints=[0, 1],
)  # fmt: skip
X, Y = [value("x", FLOAT, ["n"])], [value("y", FLOAT, ["n"])]
ONNX = [
    (([ZIPS], [value("p", FLOAT, ["n", 2])], [helper.make_value_info("probs", MAPS)], 17, ["ai.onnx.ml"]), "options={'zipmap': False}"),
    (([helper.make_node("A", ["x"], ["h"], domain="ai.onnx.contrib"), helper.make_node("B", ["h"], ["y"], domain="ai.onnx.contrib")],
      X, Y, 17, ["ai.onnx.contrib"]), "ai.onnx.contrib (A, B), which come with onnxruntime-extensions: put that library"),
    (([helper.make_node("Mine", ["x"], ["y"], domain="com.example")], X, Y, 17, ["com.example"]), "com.example (Mine), which come with a library of"),
    (([helper.make_node("Future", ["x"], ["y"])], X, Y), "has operator Future, which onnxruntime"),
    (([helper.make_node("Relu", ["x"], ["y"])], X, Y, 99), "is of opset 99 of ai.onnx; onnxruntime"),
    (([helper.make_node("StringNormalizer", ["x"], ["y"], case_change_action="LOWER", locale="xx_YY.UTF-8")],
      [value("x", TEXT, ["n"])], [value("y", TEXT, ["m"])]), "needs the locale xx_YY.UTF-8 (StringNormalizer), which this machine has not: generate"),
    (of_type(TensorProto.FLOAT8E4M3FN), "float8e4m3fn), which cannot cross the socket: let the model take and give FP16"),
    (of_type(TensorProto.INT4), "tensor(int4), which cannot cross the socket: let the model take"),
    (([helper.make_node("SequenceAt", ["s", "i"], ["y"])], [helper.make_value_info("s", SEQUENCE), value("i", INT64, [])], [value("y", FLOAT, None)]),
     "stack them (ConcatFromSequence)"),
    (([helper.make_node("OptionalGetElement", ["s"], ["y"])], [helper.make_value_info("s", OPTIONAL)], Y, 18), "export the model with plain tensors"),
    (([helper.make_node("Transpose", ["x"], ["y"], perm=[5])], X, Y), "can load: Node () Op (Transpose)"),
]  # fmt: skip


@pytest.mark.parametrize(("graph", "words"), ONNX, ids=[words[:30] for _, words in ONNX])
def test_an_onnx_model_that_cannot_be_served(tmp_path, graph, words):
    path = onnx(tmp_path / "m.onnx", *graph)
    with pytest.raises(ModelInvalid) as refused:
        load(path)
    assert words in str(refused.value)
    assert not any(said in str(refused.value) for said in ("[ONNXRuntimeError]", str(tmp_path), ".cc:", ".h:", "onnxruntime::"))


def test_outputs_that_are_no_tensors_are_left_out_and_told(tmp_path):
    """As scikit-learn's classifiers have them: the labels are served, the maps of probabilities are not."""
    outputs = [value("label", INT64, ["n"]), helper.make_value_info("probs", MAPS)]
    model = load(onnx(tmp_path / "m.onnx", [CLASSIFIES, ZIPS], [value("x", FLOAT, ["n", 2])], outputs, 17, ["ai.onnx.ml"]))
    assert [spec.name for spec in model.outputs] == ["label"]
    assert [array.tolist() for array in model.run({"x": np.float32([[1, 0], [0, 9]])})] == [[1, 1]]
    assert "output 'probs' has type seq(map(int64,tensor(float)))" in model.placement.fallback
    assert "{'zipmap': False}" in model.placement.fallback


CUSTOM = [
    ("edgetpu-custom-op", "Google's Edge TPU"),
    ("ethos-u", "Arm's Ethos-U"),
    ("FlexErf", "supported_ops=[TFLITE_BUILTINS]"),
    ("Mine", "custom, which this engine does not have"),
]


@pytest.mark.parametrize(("name", "words"), CUSTOM)
def test_a_tflite_model_with_operators_for_something_else(tmp_path, name, words):
    with pytest.raises(ModelInvalid) as refused:
        load(tflite_models.custom(tmp_path / "m.tflite", name))
    assert f"m.tflite has operators {name} (" in str(refused.value)
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("RESOURCE", "is a RESOURCE, which lives inside the engine, so that nobody can give it"),
        ("VARIANT", "is a VARIANT, which lives inside"), ("BFLOAT16", "has type BFLOAT16"), ("COMPLEX64", "has type complex64"),
    ],
)  # fmt: skip
def test_a_tflite_model_with_inputs_that_nobody_can_give(tmp_path, kind, words):
    with pytest.raises(ModelInvalid, match=words):
        load(tflite_models.reshaped(tmp_path / "m.tflite", getattr(tflite_models.KIND, kind), [2], [2]))


def test_numbers_of_four_bits_stay_within_them(tmp_path):
    model = load(tflite_models.reshaped(tmp_path / "m.tflite", tflite_models.KIND.INT4, [2], [2]))
    assert model.run({"x": np.int8([-8, 7])})[0].tolist() == [-8, 7]
    for values in ([-9, 0], [0, 8], [127, -128]):
        with pytest.raises(InputInvalid, match="input 'x' has values of 4 bits or fewer: they must be from -8 to 7"):
            model.run({"x": np.int8(values)})


# -- libraries of operators ---------------------------------------------------------------------------------------------------------

REGISTERS = """
#include <stdio.h>
#include <stdlib.h>
void *RegisterCustomOps(void *options, const void *api) {
    FILE *mark = fopen(getenv("MARK"), "w");
    if (mark) fclose(mark);
    return 0;
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("library")
    (folder / "ops.c").write_text(REGISTERS)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", folder / "ops", folder / "ops.c"], check=True, timeout=60)
    return folder / "ops"


def test_a_library_is_loaded_with_the_model(tmp_path, library, monkeypatch):
    monkeypatch.setenv("MARK", str(tmp_path / "mark"))
    path = onnx_models.scale(tmp_path / "m.onnx", 2.0)
    assert load(path).run({"x": np.ones((1, 4), np.float32)})[0][0, 0] == 2
    assert not (tmp_path / "mark").exists()
    assert load(path, libraries=(library,)).run({"x": np.ones((1, 4), np.float32)})[0][0, 0] == 2
    assert (tmp_path / "mark").exists()


def test_a_library_that_is_none_is_named(tmp_path):
    (tmp_path / "ops.so").write_bytes(b"none")
    with pytest.raises(ModelInvalid, match=r"^library ops\.so cannot be loaded into onnxruntime .* here: "):
        load(onnx_models.scale(tmp_path / "m.onnx", 2.0), libraries=(tmp_path / "ops.so",))
    with pytest.raises(ModelInvalid, match="the TFLite engine takes none"):
        load(tflite_models.coder(tmp_path / "m.tflite"), libraries=(tmp_path / "ops.so",))


# -- words --------------------------------------------------------------------------------------------------------------------------

SRC = "/onnxruntime_src/onnxruntime/core"
ENGINE = [
    ("[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : Non-zero status code returned while running Gather node. Name:'/e/G' Status Message: idx=3 is out",
     "Gather '/e/G': idx=3 is out"),
    ((f"[ONNXRuntimeError] : 1 : FAIL : Exception during initialization: {SRC}/a/b.cc:31 onnxruntime::I::I(const onnx::T&, std::map<int, bool>, bool) "
     "[with T = float] !path.empty() was false. it must not be"), "it must not be"),
    (f"{SRC}/a/b.h:46 void onnxruntime::u::V(const std::unordered_map<int, bool>&, int) const::<lambda()> It only *guarantees* support", "It only *guarantees* support"),
    ("tensorflow/lite/kernels/reshape.cc:92 n != m (6 != 4)Node number 0 (RESHAPE) failed to prepare.", "n != m (6 != 4)Node number 0 (RESHAPE) failed to prepare."),
    ("Load model from /var/lib/a model/x.onnx failed:Protobuf parsing failed.", "Protobuf parsing failed."),
    ("two\nlines", "two lines"), ("x" * 500, "x" * 399 + "…"),
]  # fmt: skip


@pytest.mark.parametrize(("said", "words"), ENGINE)
def test_what_engines_say_is_told_in_plain_words(said, words):
    assert plain(said) == words


def test_paths_of_the_machine_are_not_told_and_names_of_tensors_are(tmp_path):
    text = f"cannot read {tmp_path}/m.onnx: '/encoder/conv1/Conv_output_0' is missing, see https://example.org/a/b"
    assert without_paths(text) == "cannot read m.onnx: '/encoder/conv1/Conv_output_0' is missing, see https://example.org/a/b"
