"""Every model of the collection, over the real socket, gives what was recorded for it."""

import json

import numpy as np
import pytest

from agent.client import Client, InputRejected
from tests.conftest import SHARED_MODELS
from tests.serving.server import Server, request

pytestmark = pytest.mark.shared

MANIFEST = SHARED_MODELS / "manifest.json"
MODELS = json.loads(MANIFEST.read_text())["models"] if MANIFEST.is_file() else []
DATATYPES = {"uint8": "UINT8", "int8": "INT8", "int32": "INT32", "int64": "INT64", "float": "FP32", "float32": "FP32"}

# The largest difference seen under other kernels of the same engines, in raw output units.
TOLERANCES = {
    "mobilenet_v1_025-tflite-u8": 4, "mobilenet_v1_025-onnx-qdq": 5, "mobilenet_v1_075-tflite-u8": 13,
    "mobilenet_v1_075-onnx-qdq": 2, "silero_vad-onnx-fp32": 1.91e-6, "silero_vad-onnx-int8-qdq": 1.91e-6,
}  # fmt: skip
FLOAT_TOLERANCE = 2.4e-7
QDQ_TOLERANCE = 0.00393
BATCH_TOLERANCE = 2e-6  # of whole test sets: vectors of another width are added in another order

# Recorded one after the other on one interpreter: the recurrent state of the first samples is in the answers to the last two.
# Without a sequence these two agree with a fresh interpreter to the bit instead; within one, with what was recorded.
CARRIED_STATE = {("mnist_lstm-tflite-i8", "sample3"), ("mnist_lstm-tflite-i8", "sample4")}
STATEFUL = [entry for entry in MODELS if entry["id"] == "mnist_lstm-tflite-i8"]


def tolerance(entry):
    if entry["id"] in TOLERANCES:
        return TOLERANCES[entry["id"]]
    return QDQ_TOLERANCE if "int8-qdq" in entry["id"] else FLOAT_TOLERANCE


def name_of(entry):
    return entry["id"].replace("/", "-")


@pytest.fixture(scope="module")
def server(shared_models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("all")
    files = [f"{name_of(entry)}={shared_models / entry['file']}" for entry in MODELS]
    made = Server(folder, "run", *files, *(shared_models / "negative").iterdir(), "--socket", folder / "s.sock").start()
    yield made
    assert made.stop() == 0


def arrays(path, prefix):
    with np.load(path) as found:
        return [found[f"{prefix}{n}"] for n in range(len(found.files))]


def alone(path, feed):
    """What the engine itself says, asked once, by an interpreter that never saw anything else."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path), num_threads=1)
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], feed)
    interpreter.invoke()
    return interpreter.get_tensor(interpreter.get_output_details()[0]["index"]).copy()


def as_json(client, entry, feeds, **parameters):
    inputs = [
        {"name": spec["name"], "datatype": spec["datatype"], "shape": feed.shape, "data": feed.tolist()}
        for spec, feed in zip(entry["inputs"], feeds, strict=True)
    ]
    status, headers, body = client.request(
        "POST", f"/v2/models/{entry['name']}/infer", {"inputs": inputs, "parameters": parameters}
    )
    assert status == 200, body
    assert headers["content-type"] == "application/json"
    return {out["name"]: (out["datatype"], out["shape"], out["data"]) for out in json.loads(body)["outputs"]}


@pytest.mark.parametrize("entry", MODELS, ids=name_of)
def test_every_case_over_the_socket(server, shared_models, entry):
    with Client(server.socket) as client:
        metadata = client.metadata(name_of(entry))
        assert [t["name"] for t in metadata["inputs"]] == [t["name"] for t in entry["inputs"]]
        assert [t["name"] for t in metadata["outputs"]] == [t["name"] for t in entry["outputs"]]
        for got, recorded in zip(metadata["inputs"] + metadata["outputs"], entry["inputs"] + entry["outputs"], strict=True):
            assert got["datatype"] == DATATYPES[recorded["dtype"].removeprefix("tensor(").rstrip(")")]
            expected = {"scale": recorded["scale"], "zero_point": recorded["zero_point"]} if "scale" in recorded else None
            assert got.get("parameters", {}).get("quantization") == expected
        for case in entry["cases"]:
            feeds = arrays(shared_models / case["in_npz"], "in")
            expected = arrays(shared_models / case["out_npz"], "out")
            given = {t["name"]: feed for t, feed in zip(metadata["inputs"], feeds, strict=True)}
            binary = client.infer(metadata["name"], given)
            texts = as_json(client, metadata, feeds)
            for spec, want in zip(metadata["outputs"], expected, strict=True):
                got = binary[spec["name"]]
                assert (got.dtype, got.shape) == (want.dtype, want.shape)
                datatype, shape, data = texts[spec["name"]]
                assert (datatype, tuple(shape)) == (spec["datatype"], want.shape)
                assert np.array_equal(np.array(data, want.dtype).reshape(want.shape), got), "JSON and binary differ"
                if (entry["id"], case["name"]) in CARRIED_STATE:
                    assert np.array_equal(got, alone(shared_models / entry["file"], feeds[0]))
                else:
                    assert np.abs(got.astype(np.float64) - want.astype(np.float64)).max(initial=0) <= tolerance(entry)
            if "top3" in case:
                assert int(binary[metadata["outputs"][0]["name"]].argmax()) == case["top3"][0][0]


def in_binary(server, metadata, feed, **parameters):
    tensor = metadata["inputs"][0]
    given = {"name": tensor["name"], "datatype": tensor["datatype"], "shape": feed.shape}
    head = json.dumps({
        "inputs": [{**given, "parameters": {"binary_data_size": feed.nbytes}}],
        "parameters": {**parameters, "binary_data_output": True},
    }).encode()  # fmt: skip
    path = f"/v2/models/{metadata['name']}/infer"
    content = request("POST", path, head + feed.tobytes(), Inference_Header_Content_Length=len(head))
    status, headers, body = server.raw(content)
    assert status == 200, body
    return np.frombuffer(body[int(headers["inference-header-content-length"]) :], feed.dtype)


@pytest.mark.parametrize("entry", STATEFUL, ids=name_of)
def test_a_stateful_models_cases_within_one_sequence_give_exactly_what_was_recorded(server, shared_models, entry):
    with Client(server.socket) as client:
        metadata = client.metadata(name_of(entry))
        for number, case in enumerate(entry["cases"]):
            feed = arrays(shared_models / case["in_npz"], "in")[0]
            want = arrays(shared_models / case["out_npz"], "out")[0]
            step = {"sequence_start": number == 0, "sequence_end": case is entry["cases"][-1]}
            binary = in_binary(server, metadata, feed, sequence_id="binary", **step)
            (_, shape, data) = as_json(client, metadata, [feed], sequence_id=7, **step)[metadata["outputs"][0]["name"]]
            assert np.array_equal(binary.reshape(want.shape), want)
            assert np.array_equal(np.array(data, want.dtype).reshape(shape), want)


@pytest.mark.parametrize("entry", [e for e in MODELS if "testset" in e], ids=name_of)
def test_a_whole_test_set_in_one_batch(server, shared_models, entry):
    testset = entry["testset"]
    with np.load(shared_models / testset["out_npz"]) as found:
        expected = found[found.files[0]]
    with np.load(shared_models / testset["dataset"]) as found:
        images, labels = found["image_u8"] * found["scale"], found["label"]
    with Client(server.socket) as client:
        metadata = client.metadata(name_of(entry))
        tensor = metadata["inputs"][0]
        feed = images.reshape(len(images), *tensor["shape"][1:]).astype(np.float32)
        if tensor["datatype"] == "INT8":
            quantization = tensor["parameters"]["quantization"]
            feed = np.round(feed / quantization["scale"]) + quantization["zero_point"]
            feed = np.clip(feed, -128, 127).astype(np.int8)
        got = client.infer(metadata["name"], feed)[metadata["outputs"][0]["name"]]
    assert np.abs(got.astype(np.float64) - expected.astype(np.float64)).max() <= max(tolerance(entry), BATCH_TOLERANCE)
    assert int((got.argmax(axis=1) == labels).sum()) == testset["correct"]


def test_models_that_cannot_be_loaded_say_why_and_leave_the_rest(server):
    with Client(server.socket) as client:
        states = {m["name"]: m for m in client.models()}
        assert states["person_detect"]["state"] == "UNAVAILABLE"
        assert "quantized_dimension" in states["person_detect"]["reason"]
        assert "SignalWindow" in states["audio_preprocessor_int8"]["reason"]
        assert sum(m["state"] == "READY" for m in states.values()) == len(MODELS)
        assert client.ready()
        assert not client.ready("person_detect")


def test_a_size_the_engine_refuses_is_the_callers_fault(server):
    with Client(server.socket) as client, pytest.raises(InputRejected, match="engine refused"):
        client.infer(
            "silero_vad-onnx-fp32",
            {
                "input": np.zeros((1, 3), np.float32),
                "state": np.zeros((2, 1, 128), np.float32),
                "sr": np.array(16000, np.int64),
            },
        )
