"""What a model's file names and leaves open, over real sockets: signatures, optional inputs, any rank, state. In the server and isolated."""

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tritonclient.grpc as triton
from onnx import TensorProto
from tritonclient.utils import InferenceServerException

from agent.client import Client, InputRejected
from tests.serving import onnx_models, tflite_models
from tests.serving.server import DEADLINE_S, Server, request

ROWS = np.float32([[1, 2], [3, 4]])
A, B = np.float32([5, 5, 5]), np.float32([1, 2, 3])


@pytest.fixture(scope="module", params=["in the server", "isolated"])
def server(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("signatures")
    models = folder / "models"
    models.mkdir()
    tflite_models.coder(models / "coder.tflite")
    tflite_models.counter(models / "counter.tflite")
    tflite_models.stages(models / "stages.tflite")
    tflite_models.nameless(models / "nameless.tflite")
    tflite_models.windows(models / "windows.tflite")
    tflite_models.reshaped(models / "text.tflite", tflite_models.TEXT, [], [1])
    onnx_models.scale_by_default(models / "optional.onnx", 2.0)
    onnx_models.identity(models / "any.onnx", TensorProto.FLOAT, None)
    isolated = [word for path in models.iterdir() for word in ("--isolate", path.stem) if request.param == "isolated"]
    made = Server(folder, "run", models, "--socket", folder / "s.sock", "--grpc-socket", folder / "g.sock", *isolated).start()
    yield made
    assert made.stop() == 0


@pytest.fixture
def client(server):
    with Client(server.socket) as made:
        yield made


def post(client, path, body, status=200):
    got, _, text = client.request("POST", path, body)
    assert got == status, text
    return json.loads(text)


def tensor(name, array):
    return {"name": name, "datatype": "FP32", "shape": array.shape, "data": array.ravel().tolist()}


def infer(client, model, inputs, *, status=200, outputs=(), **parameters):
    document = {
        "inputs": [tensor(*item) for item in inputs.items()],
        "outputs": [{"name": name} for name in outputs],
        "parameters": parameters,
    }
    found = post(client, f"/v2/models/{model}/infer", document, status)
    return found["error"] if status != 200 else {o["name"]: o["data"] for o in found["outputs"]}


DECODED = {"sum": [6, 7, 8], "difference": [4, 3, 2]}


@pytest.mark.parametrize(
    ("inputs", "asked", "expected"),
    [
        ({"encode_x:0": ROWS}, {}, {"Call:0": [2, 4, 6, 8]}),
        ({"x": ROWS}, {}, {"Call:0": [2, 4, 6, 8]}),
        ({"x": ROWS}, {"outputs": ["y"]}, {"y": [2, 4, 6, 8]}),
        ({"x": ROWS}, {"outputs": ["y", "Call:0"]}, {"y": [2, 4, 6, 8], "Call:0": [2, 4, 6, 8]}),
        ({"x": ROWS}, {"signature_name": "encode"}, {"y": [2, 4, 6, 8]}),
        ({"encode_x:0": ROWS}, {"signature_name": "encode"}, {"y": [2, 4, 6, 8]}),
        ({"a": A, "b": B}, {"signature_name": "decode"}, DECODED),
        ({"b": B, "a": A}, {"signature_name": "decode", "outputs": ["sum"]}, {"sum": [6, 7, 8]}),
    ],
)
def test_a_request_uses_the_names_of_the_signature_it_names(client, inputs, asked, expected):
    assert infer(client, "coder", inputs, **asked) == expected


@pytest.mark.parametrize(
    ("inputs", "asked", "text"),
    [
        ({"x": ROWS}, {"signature_name": "train"}, "signature 'train' is not one of model 'coder'; it has 'encode', 'decode'"),
        ({"x": ROWS}, {"signature_name": 7}, "parameter 'signature_name' is 7; expected a string"),
        ({"x": ROWS}, {"signature_name": "decode"}, "unexpected inference input 'x' for model 'coder'; it takes 'b', 'a'"),
        ({"a": A}, {"signature_name": "decode"}, "expected 2 inputs but got 1 inputs for model 'coder': 'b' is missing"),
        ({"a": A, "b": B[:2]}, {"signature_name": "decode"}, "unexpected shape for input 'b' for model 'coder'"),
        ({"a": A, "b": B}, {"signature_name": "decode", "outputs": ["y"]}, "it is not one of 'sum', 'difference'"),
        ({"a": A, "b": B}, {}, "unexpected inference input 'a' for model 'coder'; it takes 'encode_x:0'"),
        ({"x": ROWS, "encode_x:0": ROWS}, {}, "input 'encode_x:0' is given twice"),
    ],
)
def test_names_of_another_signature_are_refused(client, inputs, asked, text):
    assert text in infer(client, "coder", inputs, status=400, **asked)


def test_the_same_in_bytes(server, client):
    assert client.infer("coder", {"a": A, "b": B}, signature="decode")["difference"].tolist() == [4, 3, 2]
    assert client.infer("coder", ROWS, signature="encode")["y"].tolist() == (ROWS * 2).tolist()
    assert client.infer("coder", {"x": ROWS}, outputs=["y"])["y"].tolist() == (ROWS * 2).tolist()
    with pytest.raises(InputRejected, match="signature 'train' is not one of model 'coder'; it has 'encode', 'decode'"):
        client.infer("coder", ROWS, signature="train")


def test_the_command_line_chooses_a_signature_too(server, tmp_path):
    np.save(tmp_path / "x.npy", ROWS)
    np.savez(tmp_path / "ab.npz", a=A, b=B)
    for signature, file, output in (("encode", "x.npy", {"y": (ROWS * 2).tolist()}), ("decode", "ab.npz", DECODED)):
        words = ["predict", "coder", "--input", tmp_path / file, "--signature", signature, "--json", "--socket", server.socket]
        command = [sys.executable, "-m", "agent.cli", *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
        assert (done.returncode, json.loads(done.stdout or "null")) == (0, output), done.stderr


def test_tensorflow_servings_requests_choose_a_signature_too(client):
    path = "/v1/models/coder:predict"
    assert post(client, path, {"instances": ROWS.tolist()}) == {"predictions": (ROWS * 2).tolist()}
    columns = {"signature_name": "decode", "inputs": {"a": A.tolist(), "b": B.tolist()}}
    assert post(client, path, columns) == {"outputs": DECODED}
    assert post(client, path, {"signature_name": "encode", "inputs": {"encode_x:0": ROWS.tolist()}})["outputs"][1] == [6, 8]
    error = post(client, path, {**columns, "signature_name": "train"}, 400)["error"]
    assert error == "Serving signature name: 'train' not found in signature def; there is 'encode', 'decode'"
    # Both outputs have the names that a caller of the default signature knows.
    row = {"instances": [{"a": 1.0, "b": 2.0}, {"a": 3.0, "b": 4.0}]}
    assert post(client, "/v1/models/nameless:predict", row)["predictions"] == [
        {"sum": 3, "difference": -1},
        {"sum": 7, "difference": -1},
    ]


def test_signatures_are_told(client):
    metadata = client.metadata("coder")
    assert [t["name"] for t in (*metadata["inputs"], *metadata["outputs"])] == ["encode_x:0", "Call:0"]
    assert metadata["parameters"]["default_signature"] == "encode"
    signatures = metadata["parameters"]["signatures"]
    assert list(signatures) == ["encode", "decode"]
    assert signatures["encode"]["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 2], "tensor": "encode_x:0"}]
    assert [t["name"] for t in signatures["decode"]["outputs"]] == ["sum", "difference"]
    _, _, text = client.request("GET", "/v2/models/coder/config")
    assert json.loads(json.loads(text)["parameters"]["signatures"]["string_value"]) == signatures
    _, _, text = client.request("GET", "/v1/models/coder/metadata")
    told = json.loads(text)["metadata"]["signature_def"]["signature_def"]
    assert list(told) == ["encode", "decode"]
    assert told["encode"]["inputs"]["x"]["name"] == "encode_x:0"
    assert "parameters" not in client.metadata("any")


def given(name, array):
    made = triton.InferInput(name, list(array.shape), "FP32")
    made.set_data_from_numpy(array)
    return made


def test_grpc_chooses_a_signature_too(server):
    with triton.InferenceServerClient(f"unix:{server.folder / 'g.sock'}") as client:
        inputs = [given("a", A), given("b", B)]
        found = client.infer("coder", inputs, parameters={"signature_name": "decode"})
        assert {name: found.as_numpy(name).tolist() for name in DECODED} == DECODED
        wanted = [triton.InferRequestedOutput("difference")]
        found = client.infer("coder", inputs, outputs=wanted, parameters={"signature_name": "decode"})
        assert found.as_numpy("difference").tolist() == DECODED["difference"]
        found = client.infer("coder", [given("x", ROWS)], outputs=[triton.InferRequestedOutput("y")])
        assert found.as_numpy("y").tolist() == (ROWS * 2).tolist()
        with pytest.raises(InferenceServerException, match="signature 'train' is not one of model 'coder'"):
            client.infer("coder", inputs, parameters={"signature_name": "train"})
        assert client.infer("optional", [given("x", A)]).as_numpy("y").tolist() == (A * 2).tolist()
        config = client.get_model_config("optional", as_json=True)["config"]
        assert [tensor.get("optional", False) for tensor in config["input"]] == [False, True]
        assert "decode" in client.get_model_config("coder").config.parameters["signatures"].string_value
        assert client.get_model_metadata("coder").inputs[0].name == "encode_x:0"


def test_an_optional_input_may_be_left_out(client):
    assert infer(client, "optional", {"x": A}) == {"y": [10, 10, 10]}
    assert infer(client, "optional", {"x": A, "k": np.float32([3])}) == {"y": [15, 15, 15]}
    assert client.infer("optional", A)["y"].tolist() == [10, 10, 10]
    rows = post(client, "/v1/models/optional:predict", {"instances": [1.0, 2.0]})
    assert rows == {"predictions": [2, 4]}
    assert "expected 1 inputs but got 1 inputs" in infer(client, "optional", {"k": np.float32([3])}, status=400)
    inputs = client.metadata("optional")["inputs"]
    assert [(t["name"], t.get("parameters")) for t in inputs] == [("x", None), ("k", {"optional": True})]
    _, _, text = client.request("GET", "/v2/models/optional/config")
    assert [tensor["optional"] for tensor in json.loads(text)["input"]] == [False, True]


@pytest.mark.parametrize("shape", [(), (3,), (2, 1, 2)])
def test_an_input_of_unknown_rank_takes_any(client, shape):
    array = np.ones(shape, np.float32)
    assert client.infer("any", {"x": array})["y"].shape == shape
    told = client.metadata("any")["inputs"][0]
    assert (told["shape"], told["parameters"]) == ([-1], {"unknown_rank": True})
    _, _, text = client.request("GET", "/v1/models/any/metadata")
    signature = json.loads(text)["metadata"]["signature_def"]["signature_def"]["serving_default"]
    assert signature["inputs"]["x"]["tensor_shape"] == {"dim": [], "unknown_rank": True}


def test_a_text_without_dimensions_comes_back_as_it_went_in(client):
    for text in (b"hello", b"", b"\xff\0"):
        assert client.infer("text", {"x": np.array(text, np.object_)})["y"].tolist() == [text]


def test_sizes_that_only_the_shape_signature_frees(client):
    x = np.arange(400, dtype=np.float32).reshape(1, 400)
    assert np.array_equal(client.infer("windows", x)["y"], x.reshape(-1, 4))


def test_no_request_sees_the_state_of_another(server, client):
    """Nor that of the run that warmed the model up."""
    one = np.float32([1])
    with Client(server.socket) as other:
        assert [who.infer("counter", one)["total"].item() for who in (client, other, client)] == [6, 6, 6]
        with client.sequence("counter") as steps, other.sequence("counter") as others:
            assert [who.infer(one)["total"].item() for who in (steps, others, steps, steps)] == [6, 6, 7, 8]
            assert client.infer("counter", one)["total"].item() == 6


def test_a_sequence_goes_through_several_signatures(client):
    steps = [({"x": A[:1]}, {"sequence_start": True}), ({"y": A[:1] * 0}, {"signature_name": "look"}), ({"x": A[:1]}, {})]
    found = [infer(client, "stages", inputs, sequence_id=9, **parameters) for inputs, parameters in steps]
    assert found == [{"total": [5]}, {"seen": [5]}, {"total": [10]}]
    assert infer(client, "stages", {"y": A[:1] * 0}, signature_name="look") == {"seen": [0]}


def test_the_raw_body_is_the_only_input_that_must_be_there(server):
    path = "/v2/models/optional/infer"
    status, headers, body = server.raw(request("POST", path, A.tobytes(), Inference_Header_Content_Length=0))
    assert status == 200, body
    assert body[int(headers["inference-header-content-length"]) :] == (A * 2).tobytes()


def test_batches_keep_what_cannot_be_joined_apart(device, tmp_path):
    """Requests of the default signature go together; another signature, and optional inputs, have no rows that could."""
    serving = {"max_batch_size": 8, "max_delay_us": 20000}
    device.release("coder", 1, tflite_models.coder(tmp_path / "coder.tflite"), runtime="tflite", serving=serving)
    device.release("optional", 1, onnx_models.scale_by_default(tmp_path / "optional.onnx", 2.0), serving=serving)
    for model in ("coder", "optional"):
        device.select(model, 1)
    device.server().start()
    asks = [
        lambda c: c.infer("coder", {"x": ROWS})["Call:0"].tolist() == (ROWS * 2).tolist(),
        lambda c: c.infer("coder", {"a": A, "b": B}, signature="decode")["sum"].tolist() == DECODED["sum"],
        lambda c: c.infer("optional", {"x": A})["y"].tolist() == (A * 2).tolist(),
        lambda c: c.infer("optional", {"x": A, "k": np.float32([3])})["y"].tolist() == (A * 3).tolist(),
    ] * 3
    with ThreadPoolExecutor(len(asks)) as threads:

        def ask(one):
            with Client(device.socket) as client:
                return one(client)

        assert all(threads.map(ask, asks))


def test_labels_and_state_may_be_declared_by_a_signatures_names(device, tmp_path):
    path = tflite_models.nameless(tmp_path / "nameless.tflite", ("a:0", "b:0", "sum:0", "difference:0"))
    device.release("kept", 1, path, runtime="tflite", state={"b": "sum"})
    device.select("kept", 1)
    device.server().start()
    one = np.float32([1, 1])
    with Client(device.socket) as client:
        assert [t["name"] for t in client.metadata("kept")["inputs"]] == ["a:0"]
        assert [t["name"] for t in client.metadata("kept")["parameters"]["signatures"]["serving_default"]["inputs"]] == ["a"]
        with client.sequence("kept") as steps:
            found = [steps.infer({name: one}, outputs=["sum"])["sum"].tolist() for name in ("a", "a:0", "a")]
        assert found == [[1, 1], [2, 2], [3, 3]]
        assert client.infer("kept", {"a": one}, signature="serving_default")["sum"].tolist() == [1, 1]


def test_copies_of_requests_for_any_signature_are_compared(device, tmp_path):
    for version in (1, 2):
        device.release("coder", version, tflite_models.coder(tmp_path / "coder.tflite"), runtime="tflite")
    device.select("coder", 1)
    device.server(shadow_max_load=0, shadow_max_celsius=0).start()
    with Client(device.socket) as client:
        post(client, "/control/v1/models/coder/load", {"version": 2, "variant": "cpu"})
        post(client, "/control/v1/models/coder/shadow", {"version": 2, "share": 1.0, "max_rate": 1000})

        def compared():
            client.infer("coder", {"a": A, "b": B}, signature="decode")
            client.infer("coder", {"x": ROWS})
            _, _, text = client.request("GET", "/control/v1/models/coder/shadow")
            return json.loads(text)

        deadline = time.monotonic() + DEADLINE_S
        while (found := compared())["samples"] < 4:
            assert time.monotonic() < deadline, found
        assert found["agreed"] == found["samples"]
        assert not any(found["errors"].values()), found
