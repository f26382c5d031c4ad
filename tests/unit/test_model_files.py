"""What model files name, leave open and remember: state, texts, optional inputs, open ranks and sizes, signatures."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies
from onnx import TensorProto, helper

from runtimes import onnx_external, registry
from runtimes.contract import InputInvalid, LoadOptions, ModelInvalid
from tests.serving import onnx_models, tflite_models
from tests.serving.onnx_models import save, value


def load(path, **extra):
    return registry.for_file(path).load(path, LoadOptions(extra=extra))


ONE = {"counter": np.float32([1]), "recurrent": np.float32([[1]])}


@pytest.mark.parametrize(("build", "begin"), [("counter", 5), ("recurrent", 0)])
def test_a_request_sees_the_state_of_its_own_sequence_only(tmp_path, build, begin):
    """Whether it is kept in resources that a subgraph begins, or in variable tensors."""
    model = load(getattr(tflite_models, build)(tmp_path / "m.tflite"))
    feeds = {"x": ONE[build]}
    assert model.stateful
    first, second = model.sequence(), model.sequence()
    found = [float(who.run(feeds)[0].item()) for who in (model, first, model, first, second, model, first)]
    assert [value - begin for value in found] == [1, 1, 1, 2, 1, 1, 3]


def test_a_sequence_may_go_through_several_signatures(tmp_path):
    model = load(tflite_models.stages(tmp_path / "m.tflite"))
    look = {"look/y": np.float32([0])}
    sequence = model.sequence()
    found = [
        sequence.run({"x": np.float32([3])}), sequence.run(look, ["look/seen"]), sequence.run({"x": np.float32([4])}),
        sequence.run(look, ["look/seen"]), model.run(look, ["look/seen"]),
    ]  # fmt: skip
    assert [value.item() for (value,) in found] == [3, 3, 7, 7, 0]


TEXTS = [b"hello", b"", b"a\0b\0", "é".encode(), b"\xff\xfe", b"long " * 5000]


@pytest.mark.parametrize(("before", "after"), [([], []), ([], [1]), ([1], []), ([1], [1, 1])])
def test_texts_of_any_rank_come_out_of_tflite_as_they_went_in(tmp_path, before, after):
    model = load(tflite_models.reshaped(tmp_path / "m.tflite", tflite_models.TEXT, before, after))
    for text in TEXTS:
        array = np.empty(before, np.object_)
        array[...] = text
        (result,) = model.run({"x": array})
        assert (result.shape, result.dtype, result.item()) == (tuple(after), np.object_, text)


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (0,)])
def test_texts_of_any_rank_come_out_of_onnx_as_they_went_in(tmp_path, shape):
    model = load(onnx_models.identity(tmp_path / "m.onnx", TensorProto.STRING, [None] * len(shape)))
    array = np.empty(shape, np.object_)
    array[...] = "é\0".encode()
    (result,) = model.run({"x": array})
    assert (result.shape, result.tolist()) == (shape, array.tolist())


def test_numbers_without_dimensions_are_arrays_too(tmp_path):
    model = load(tflite_models.reshaped(tmp_path / "m.tflite", tflite_models.FLOAT, [1], []))
    (result,) = model.run({"x": np.float32([3])})
    assert (type(result), result.shape, result.item()) == (np.ndarray, (), 3)


def test_an_initializer_that_may_be_overridden_is_an_optional_input(tmp_path):
    path = onnx_models.scale_by_default(tmp_path / "m.onnx", 2.0)
    model = load(path)
    assert [(spec.name, spec.optional) for spec in model.inputs] == [("x", False), ("k", True)]
    x = np.float32([1, 2])
    assert model.run({"x": x})[0].tolist() == [2, 4]
    assert model.run({"x": x, "k": np.float32([10])})[0].tolist() == [10, 20]
    with pytest.raises(InputInvalid, match="input 'k' has datatype FP64, expected FP32"):
        model.run({"x": x, "k": np.zeros(1)})
    assert [spec.optional for spec in load(onnx_models.scale_by_default(tmp_path / "old.onnx", 2.0, ir_version=3)).inputs] == [
        False
    ]


@pytest.mark.parametrize("shape", [(), (3,), (2, 1, 2)])
def test_an_input_of_unknown_rank_takes_any(tmp_path, shape):
    array = np.ones(shape, np.float32)
    model = load(onnx_models.identity(tmp_path / "m.onnx", TensorProto.FLOAT, None))
    assert [(spec.any_rank, spec.shape) for spec in (*model.inputs, *model.outputs)] == [(True, (-1,))] * 2
    assert model.run({"x": array})[0].shape == shape
    scalar = load(onnx_models.identity(tmp_path / "scalar.onnx", TensorProto.FLOAT, []))
    assert (scalar.inputs[0].any_rank, scalar.inputs[0].shape) == (False, ())


def test_an_input_of_unknown_rank_takes_any_in_tflite(tmp_path):
    path = tflite_models.reshaped(tmp_path / "m.tflite", tflite_models.FLOAT, [], [-1], has_rank=False)
    model = load(path)
    assert (model.inputs[0].any_rank, model.inputs[0].shape) == (True, (-1,))
    for shape in [(), (3,), (2, 2)]:
        array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
        assert model.run({"x": array})[0].tolist() == array.ravel().tolist()


def test_an_output_that_is_listed_twice_is_one(tmp_path):
    outputs = [value("y", TensorProto.FLOAT, [2])] * 2
    path = save(tmp_path / "m.onnx", [helper.make_node("Relu", ["x"], ["y"])], [value("x", TensorProto.FLOAT, [2])], outputs)
    for model in (load(path), load(tflite_models.twice(tmp_path / "m.tflite"))):
        assert [len(model.inputs), len(model.outputs), len(model.run({"x": np.float32([1, 2])}))] == [1, 1, 1]


def test_sizes_that_only_the_shape_signature_frees(tmp_path):
    """The file's own shape is too small for the model."""
    model = load(tflite_models.windows(tmp_path / "m.tflite"))
    assert model.inputs[0].shape == (-1, -1)
    for size in (4, 8, 400, 4):
        x = np.arange(size, dtype=np.float32).reshape(1, size)
        assert np.array_equal(model.run({"x": x})[0], x.reshape(-1, 4))
    with pytest.raises(InputInvalid, match="the engine refused inputs of these shapes"):
        model.run({"x": np.zeros((1, 3), np.float32)})
    assert model.run({"x": np.zeros((1, 4), np.float32)})[0].shape == (1, 4)


def names(specs):
    return [spec.name for spec in specs]


def test_every_signature_of_a_file_can_be_run(tmp_path):
    model = load(tflite_models.coder(tmp_path / "m.tflite"))
    encode, decode = model.signatures
    assert (encode.name, decode.name) == ("encode", "decode")
    assert [names(model.inputs), names(model.outputs)] == [["encode_x:0"], ["Call:0"]]
    assert encode.inputs == {"x": model.inputs[0]}
    rows = np.ones((3, 2), np.float32)
    assert model.run({encode.inputs["x"].name: rows})[0].tolist() == (rows * 2).tolist()
    given = {decode.inputs["a"].name: np.float32([3, 2, 1]), decode.inputs["b"].name: np.float32([1, 1, 1])}
    difference, total = model.run(given, [decode.outputs[name].name for name in ("difference", "sum")])
    assert (total.tolist(), difference.tolist()) == ([4, 3, 2], [2, 1, 0])
    with pytest.raises(InputInvalid, match="has shape"):
        model.run({**given, decode.inputs["a"].name: np.zeros(4, np.float32)}, [decode.outputs["sum"].name])


@pytest.mark.parametrize(("extra", "default"), [({}, True), ({"signature": "decode"}, False)])
def test_the_default_signature_need_not_be_the_first(tmp_path, extra, default):
    model = load(tflite_models.coder(tmp_path / "m.tflite", default=default), **extra)
    assert [sorted(names(model.inputs)), names(model.outputs)] == [["decode_a:0", "decode_b:0"], ["Call_1:0", "Call_1:1"]]
    feeds = {"decode_a:0": np.float32([3, 2, 1]), "decode_b:0": np.float32([1, 1, 1])}
    assert [array.tolist() for array in model.run(feeds)] == [[4, 3, 2], [2, 1, 0]]


def test_a_signature_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(
        ModelInvalid, match=r"option signature='train': m.tflite has no such signature \(it has: 'encode', 'decode'\)"
    ):
        load(tflite_models.coder(tmp_path / "m.tflite"), signature="train")


@pytest.mark.parametrize(
    ("given", "signed", "expected"),
    [
        (("", "", "same", "same"), True, ["a", "b", "sum", "difference"]),
        (("x", "x", None, None), True, ["a", "b", "sum", "difference"]),
        (("", "", "same", "same"), False, ["input_0", "input_1", "output_0", "output_1"]),
        (("p", "", "output_1", ""), False, ["p", "input_1", "output_1", "output_1_"]),
    ],
)
def test_tensors_without_names_of_their_own(tmp_path, given, signed, expected):
    model = load(tflite_models.nameless(tmp_path / "m.tflite", given, signed=signed))
    assert names((*model.inputs, *model.outputs)) == expected
    feeds = dict(zip(expected[:2], (np.float32([3, 4]), np.float32([1, 1])), strict=True))
    assert [array.tolist() for array in model.run(feeds)] == [[4, 5], [2, 3]]


@pytest.mark.parametrize("kind", [tflite_models.FLOAT, tflite_models.TEXT])
def test_an_output_that_nothing_writes_is_refused(tmp_path, kind):
    with pytest.raises(ModelInvalid, match="nothing in the model writes its output 'nothing'"):
        load(tflite_models.unwritten(tmp_path / "m.tflite", kind))


# -- models that are several files ---------------------------------------------------------------------------------------------

X = np.float32([[1, 2]])


def stored(path, folder):
    """Its files under other names in one folder, as a store has them: (the model, its data)."""
    folder.mkdir()
    data = {}
    for number, location in enumerate(onnx_external.locations(path)):
        data[location] = folder / f"{number:064x}"
        data[location].write_bytes((path.parent / location).read_bytes())
    model = folder / ("f" * 64)
    model.write_bytes(path.read_bytes())
    return model, data


def test_a_model_of_several_files_is_loaded_from_beside_it(tmp_path):
    path = onnx_models.scattered(tmp_path / "m" / "m.onnx", (1, 2, 4))
    assert set(onnx_external.locations(path)) == set(onnx_models.SCATTERED)
    assert load(path).run({"x": X})[0].tolist() == [[7, 14]]


@pytest.mark.parametrize("apart", [False, True], ids=["in one folder", "in several"])
def test_its_files_may_have_any_names_where_it_is_told_them(tmp_path, apart):
    model, data = stored(onnx_models.scattered(tmp_path / "m" / "m.onnx", (1, 2, 4)), tmp_path / "blobs")
    if apart:
        (tmp_path / "elsewhere").mkdir()
        data["weights.bin"] = data["weights.bin"].rename(tmp_path / "elsewhere" / "w")
    loaded = registry.find("onnx").load(model, LoadOptions(data=data))
    assert loaded.run({"x": X})[0].tolist() == [[7, 14]]
    assert [spec.name for spec in loaded.inputs] == ["x"]


def test_a_file_that_it_was_not_told_of_is_not_looked_for(tmp_path):
    path = onnx_models.scattered(tmp_path / "m" / "m.onnx", (1, 2, 4))
    data = {location: path.parent / location for location in onnx_models.SCATTERED[1:]}
    with pytest.raises(ModelInvalid, match=r"keeps weights in 'weights.bin', which its variant does not list as data"):
        registry.find("onnx").load(path, LoadOptions(data=data))


ELSEWHERE = "which is outside of its folder"
HOSTILE = [
    ("../secret", ELSEWHERE), ("/etc/passwd", ELSEWHERE), ("sub/../../secret", ELSEWHERE), ("", ELSEWHERE), (".", ELSEWHERE),
    ("sub\\..\\secret", ELSEWHERE), ("link.bin", "a link out of its folder"), ("none.bin", "which is not there"),
    ("*/_ORT_MEM_ADDR_/*", "which is not there"), ("sub", "which is not there"),
]  # fmt: skip


def hostile(folder, location):
    (folder / "m" / "sub").mkdir(parents=True)
    (folder / "secret").write_bytes(bytes(200))
    path = onnx_models.scattered(folder / "m" / "model.onnx", (1, 2, 4), ("weights.bin", location or "", "sub/body.bin"))
    (folder / "m" / "none.bin").unlink(missing_ok=True)
    if location == "link.bin":
        (folder / "m" / location).unlink()
        (folder / "m" / location).symlink_to(folder / "secret")
    return path


@pytest.mark.parametrize(("location", "words"), HOSTILE)
def test_weights_are_not_read_from_where_no_file_of_a_model_is(tmp_path, location, words):
    path = hostile(tmp_path, location)
    with pytest.raises(ModelInvalid, match=words):
        load(path)
    with pytest.raises(ModelInvalid, match=r"outside of its folder|does not list as data"):
        registry.find("onnx").load(path, LoadOptions(data={"weights.bin": path, "sub/body.bin": path}))


def test_a_cache_of_links_is_loaded(tmp_path):
    """As Hugging Face's: names that are links to files side by side in another folder."""
    model, data = stored(onnx_models.scattered(tmp_path / "m" / "m.onnx", (1, 2, 4)), tmp_path / "blobs")
    for location, file in {"model.onnx": model, **data}.items():
        link = tmp_path / "snapshot" / location
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file)
    assert load(tmp_path / "snapshot" / "model.onnx").run({"x": X})[0].tolist() == [[7, 14]]


@settings(max_examples=60, deadline=None)
@given(strategies.integers(0, 3000), strategies.integers(0, 255))
def test_a_damaged_model_of_several_files_is_read_or_not_understood(at, byte):
    """No exception but ModelInvalid leaves the reader, whatever byte is wrong."""
    with tempfile.TemporaryDirectory() as folder:
        path = onnx_models.scattered(Path(folder) / "m.onnx", (1, 2, 4))
        data = bytearray(path.read_bytes())
        data[at % len(data)] = byte
        path.write_bytes(data)
        try:
            found = onnx_external.all_beside(path)
            if found:
                onnx_external.assembled(path, found)
        except ModelInvalid:
            pass
