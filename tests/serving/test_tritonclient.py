"""Every method of tritonclient's HTTP clients, plain and asyncio, over the Unix socket and over the loopback port."""

import asyncio
import os

import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
import tritonclient.utils.shared_memory as shm
from onnx import TensorProto
from tritonclient.utils import InferenceServerException, triton_to_np_dtype

from agent.client.triton import tritonclient_aio, tritonclient_http
from tests.serving import onnx_models
from tests.serving.server import Device

X = np.arange(4, dtype=np.float32).reshape(1, 4)
KINDS = {
    "BOOL": TensorProto.BOOL, "UINT8": TensorProto.UINT8, "UINT16": TensorProto.UINT16, "UINT32": TensorProto.UINT32,
    "UINT64": TensorProto.UINT64, "INT8": TensorProto.INT8, "INT16": TensorProto.INT16, "INT32": TensorProto.INT32,
    "INT64": TensorProto.INT64, "FP16": TensorProto.FLOAT16, "FP32": TensorProto.FLOAT, "FP64": TensorProto.DOUBLE,
    "BF16": TensorProto.BFLOAT16, "BYTES": TensorProto.STRING,
}  # fmt: skip


class Plain:
    """The asyncio client, called as the plain one is."""

    def __init__(self, make):
        self._loop = asyncio.new_event_loop()
        self._client = self._loop.run_until_complete(make())

    def __getattr__(self, name):
        method = getattr(self._client, name)
        return lambda *arguments, **options: self._loop.run_until_complete(method(*arguments, **options))

    def shut(self):
        self._loop.run_until_complete(self._client.close())
        self._loop.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("triton")
    device = Device(folder)
    device.release("scale", 1, onnx_models.scale(folder / "scale-1.onnx", 3.0))
    device.release("pair", 1, onnx_models.pair(folder / "pair.onnx"))
    for name, kind in KINDS.items():
        device.release(f"same-{name}", 1, onnx_models.identity(folder / f"same-{name}.onnx", kind))
    for model in ("scale", "pair", *(f"same-{name}" for name in KINDS)):
        device.select(model, 1)
    made = device.server(shared_memory="owner", http_listen="127.0.0.1:0").start()
    yield made
    assert made.stop() == 0


@pytest.fixture(params=["socket", "port", "socket, asyncio", "port, asyncio"])
def way(request):
    return request.param


@pytest.fixture
def client(server, way):
    if way == "socket":
        made = tritonclient_http(server.socket)
        yield made
        made.close()
    elif way == "port":
        made = triton.InferenceServerClient(f"127.0.0.1:{server.port()}")
        yield made
        made.close()
    else:
        made = Plain(lambda: make_aio(server, way))
        yield made
        made.shut()


async def make_aio(server, way):
    if way.startswith("socket"):
        return tritonclient_aio(server.socket)
    return triton_aio.InferenceServerClient(f"127.0.0.1:{server.port()}")


def given(name, array, datatype, *, binary=True):
    tensor = triton.InferInput(name, list(array.shape), datatype)
    tensor.set_data_from_numpy(array, binary_data=binary)
    return tensor


def refused(text, call, *arguments, **options):
    with pytest.raises(InferenceServerException, match=text):
        call(*arguments, **options)


def test_health_and_what_the_server_says_of_itself(client):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("scale")
    assert client.is_model_ready("scale", "1")
    assert not client.is_model_ready("none")
    metadata = client.get_server_metadata()
    assert metadata["name"] == "edge-agent"
    assert set(metadata["extensions"]) == {
        "classification", "sequence", "model_repository", "schedule_policy", "model_configuration", "binary_tensor_data",
        "parameters", "statistics", "logging", "system_shared_memory",
    }  # fmt: skip
    assert client.get_model_metadata("scale")["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}]
    assert client.get_model_metadata("scale", "1")["versions"] == ["1"]
    assert client.get_model_config("scale")["max_batch_size"] == 0
    assert client.get_model_config("scale", "1")["input"][0]["data_type"] == "TYPE_FP32"
    refused("'none' is not found", client.get_model_metadata, "none")
    refused("'none' is not found", client.get_model_config, "none")


@pytest.mark.parametrize("datatype", KINDS)
def test_every_datatype_in_bytes_and_in_json(client, datatype):
    if datatype == "BYTES":
        array = np.array([b"a", "é".encode(), b""], np.object_)
    elif datatype == "BF16":
        array = np.array([1.5, -2.0, 3.0], pytest.importorskip("ml_dtypes").bfloat16)
    else:
        array = np.array([0, 1, 1], triton_to_np_dtype(datatype))
    model = f"same-{datatype}"
    result = client.infer(model, [given("x", array, datatype)], request_id="r-1")
    assert result.as_numpy("y").tolist() == array.tolist()
    assert result.get_response()["id"] == "r-1"
    wanted = [triton.InferRequestedOutput("y", binary_data=False)]
    if datatype in ("FP16", "BF16"):
        refused(f"sending {datatype} data via JSON", client.infer, model, [given("x", array, datatype)], outputs=wanted)
        return
    result = client.infer(model, [given("x", array, datatype, binary=False)], outputs=wanted)
    expected = [text.decode() for text in array] if datatype == "BYTES" else array.tolist()
    assert result.get_output("y")["data"] == expected


def test_options_of_a_prediction(client):
    x = [given("x", X, "FP32")]
    for compression in (None, "gzip", "deflate"):
        result = client.infer(
            "scale", x, "1", priority=1, timeout=10_000_000, parameters={"custom": "x", "more": 1.5},
            request_compression_algorithm=compression, response_compression_algorithm=compression,
        )  # fmt: skip
        assert np.array_equal(result.as_numpy("y"), 3 * X)
    best = client.infer("scale", x, outputs=[triton.InferRequestedOutput("y", class_count=2)])
    assert best.as_numpy("y").tolist() == [[b"9.0:3", b"6.0:2"]]
    a, b = np.array([5, 6]), np.array([1, 9])
    pair = [given("a", a, "INT64"), given("b", b, "INT64")]
    result = client.infer("pair", pair, outputs=[triton.InferRequestedOutput("difference")])
    assert result.as_numpy("difference").tolist() == [4, -3]
    assert result.as_numpy("total") is None
    refused("expired", client.infer, "scale", x, timeout=1)
    refused("'none' is not found", client.infer, "none", x)
    refused("version 9 is not found", client.infer, "scale", x, "9")
    refused("expects 'FP32'", client.infer, "scale", [given("x", X.astype(np.int64), "INT64")])


def test_many_at_once(server, way):
    if way == "socket":
        with tritonclient_http(server.socket, concurrency=4) as client:
            waiting = [client.async_infer("scale", [given("x", n * X, "FP32")]) for n in range(20)]
            results = [one.get_result(timeout=10) for one in waiting]
    elif way == "port":
        with triton.InferenceServerClient(f"127.0.0.1:{server.port()}", concurrency=4) as client:
            waiting = [client.async_infer("scale", [given("x", n * X, "FP32")]) for n in range(20)]
            results = [one.get_result(timeout=10) for one in waiting]
    else:

        async def ask():
            client = await make_aio(server, way)
            try:
                return await asyncio.gather(*(client.infer("scale", [given("x", n * X, "FP32")]) for n in range(20)))
            finally:
                await client.close()

        results = asyncio.run(ask())
    for n, result in enumerate(results):
        assert np.array_equal(result.as_numpy("y"), 3 * n * X)


def test_the_repository(client, way):
    assert {"name": "pair", "version": "1", "state": "READY"} in client.get_model_repository_index()
    if way.startswith("port"):
        refused("'control'", client.unload_model, "pair")
        refused("'control'", client.load_model, "pair")
        return
    client.unload_model("pair")
    unloaded = {"name": "pair", "version": "1", "state": "UNAVAILABLE", "reason": "unloaded"}
    assert unloaded in client.get_model_repository_index()
    assert not client.is_model_ready("pair")
    assert client.is_server_ready()
    client.load_model("pair")
    assert client.is_model_ready("pair")
    refused("files and settings of its release", client.load_model, "pair", config="{}")
    refused("files and settings of its release", client.load_model, "pair", config="{}", files={"file:1/model.onnx": b"x"})


def test_statistics(client):
    before = client.get_inference_statistics("scale", "1")["model_stats"][0]["inference_stats"]["success"]["count"]
    client.infer("scale", [given("x", X, "FP32")])
    (found,) = client.get_inference_statistics("scale")["model_stats"]
    assert found["inference_stats"]["success"]["count"] == before + 1
    assert len(client.get_inference_statistics()["model_stats"]) == 2 + len(KINDS)


def test_logging_and_tracing(client, way):
    assert client.get_log_settings()["log_error"] is True
    assert client.get_trace_settings()["trace_level"] == ["OFF"]
    assert client.get_trace_settings("scale")["trace_level"] == ["OFF"]
    if way.startswith("port"):
        refused("'control'", client.update_log_settings, {"log_info": False})
        return
    assert client.update_log_settings({"log_verbose_level": 1})["log_verbose_level"] == 1
    assert client.update_log_settings({"log_verbose_level": 0})["log_verbose_level"] == 0
    assert client.update_trace_settings(settings={"trace_level": ["OFF"]})["trace_level"] == ["OFF"]
    refused("in agent.yaml decide", client.update_trace_settings, "scale", {"trace_level": ["TIMESTAMPS"]})


def test_shared_memory_of_the_system(client, way):
    if way.startswith("port"):
        refused("memory is shared", client.get_system_shared_memory_status)
        return
    key = f"/edge-triton-{os.getpid()}"
    memory = shm.create_shared_memory_region("r", key, 64)
    try:
        shm.set_shared_memory_region(memory, [X])
        client.register_system_shared_memory("r", key, 64)
        (status,) = client.get_system_shared_memory_status()
        assert (status["name"], status["byte_size"]) == ("r", 64)
        assert client.get_system_shared_memory_status("r") == [status]
        refused("already in manager", client.register_system_shared_memory, "r", key, 64)
        x = triton.InferInput("x", [1, 4], "FP32")
        x.set_shared_memory("r", 16)
        y = triton.InferRequestedOutput("y")
        y.set_shared_memory("r", 16, offset=32)
        client.infer("scale", [x], outputs=[y])
        assert np.array_equal(shm.get_contents_as_numpy(memory, np.float32, [1, 4], offset=32), 3 * X)
        client.unregister_system_shared_memory("r")
        client.unregister_system_shared_memory()
        refused("Unable to find", client.infer, "scale", [x])
    finally:
        shm.destroy_shared_memory_region(memory)


def test_memory_of_a_gpu_is_refused_by_name(client):
    refused("memory of a GPU", client.get_cuda_shared_memory_status)
    refused("memory of a GPU", client.register_cuda_shared_memory, "r", b"aGk=", 0, 16)
    refused("memory of a GPU", client.unregister_cuda_shared_memory)
    refused("memory of a GPU", client.unregister_cuda_shared_memory, "r")


def test_a_body_made_once_and_sent_otherwise(server):
    body, header_length = triton.InferenceServerClient.generate_request_body([given("x", X, "FP32")])
    head = f"POST /v2/models/scale/infer HTTP/1.1\r\nHost: t\r\nInference-Header-Content-Length: {header_length}\r\n"
    status, headers, answer = server.raw(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + bytes(body))
    assert status == 200
    length = int(headers["inference-header-content-length"])
    result = triton.InferenceServerClient.parse_response_body(answer, header_length=length)
    assert np.array_equal(result.as_numpy("y"), 3 * X)
