"""gRPC as its stock client speaks it, over its own Unix socket. The server is a process, as the two define the same messages."""

import contextlib
import os
import queue
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.utils.shared_memory as shm
from onnx import TensorProto
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException, triton_to_np_dtype

from agent.serving.grpc import compile as protos
from agent.serving.grpc.messages import HEALTH, classes_of
from tests.serving import onnx_models
from tests.serving.server import DEADLINE_S, Device, Server

X = np.arange(4, dtype=np.float32).reshape(1, 4)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grpc")
    models = folder / "models"
    models.mkdir()
    onnx_models.scale(models / "scale.onnx", 3.0)
    onnx_models.pair(models / "pair.onnx")
    for name, kind in KINDS.items():
        onnx_models.identity(models / f"same-{name.lower()}.onnx", kind)
    made = Server(folder, "run", models, "--socket", folder / "s.sock", "--grpc-socket", folder / "g.sock").start()
    yield made
    assert made.stop() == 0
    assert not (folder / "g.sock").exists()


KINDS = {
    "BOOL": TensorProto.BOOL, "UINT8": TensorProto.UINT8, "UINT16": TensorProto.UINT16, "UINT32": TensorProto.UINT32,
    "UINT64": TensorProto.UINT64, "INT8": TensorProto.INT8, "INT16": TensorProto.INT16, "INT32": TensorProto.INT32,
    "INT64": TensorProto.INT64, "FP16": TensorProto.FLOAT16, "FP32": TensorProto.FLOAT, "FP64": TensorProto.DOUBLE,
    "BF16": TensorProto.BFLOAT16, "BYTES": TensorProto.STRING,
}  # fmt: skip


@pytest.fixture
def client(server):
    with triton.InferenceServerClient(f"unix:{server.folder / 'g.sock'}") as made:
        yield made


def given(name, array, datatype):
    tensor = triton.InferInput(name, list(array.shape), datatype)
    tensor.set_data_from_numpy(array)
    return tensor


def refused(status, text, call, *arguments, **options):
    with pytest.raises(InferenceServerException, match=text) as error:
        call(*arguments, **options)
    assert error.value.status() == f"StatusCode.{status}", error.value


def test_health_and_metadata(client):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("scale")
    assert client.is_model_ready("scale", "1")
    refused("NOT_FOUND", "unknown model: 'none'", client.is_model_ready, "none")
    server = client.get_server_metadata(as_json=True)
    assert server["name"] == "edge-agent"
    assert "classification" in server["extensions"]
    model = client.get_model_metadata("scale", as_json=True)
    assert (model["name"], model["versions"], model["inputs"][0]["shape"]) == ("scale", ["1"], ["-1", "4"])
    config = client.get_model_config("scale").config
    assert (config.name, config.backend, config.input[0].data_type, list(config.input[0].dims)) == (
        "scale",
        "onnx",
        11,
        [-1, 4],
    )
    assert config.instance_group[0].count == 1
    assert list(config.version_policy.specific.versions) == [1]


@pytest.mark.parametrize("datatype", KINDS)
def test_every_datatype_goes_through(client, datatype):
    if datatype == "BYTES":
        array = np.array([b"a", "é".encode(), b""], np.object_)
    elif datatype == "BF16":
        ml_dtypes = pytest.importorskip("ml_dtypes")
        array = np.array([1.5, -2.0, np.inf], ml_dtypes.bfloat16)
    else:
        array = np.array([0, 1, 1], triton_to_np_dtype(datatype))
    model = f"same-{datatype.lower()}"
    result = client.infer(model, [given("x", array, datatype)], request_id="r-1")
    assert result.as_numpy("y").tolist() == array.tolist()
    assert result.get_response().id == "r-1"
    assert result.get_response().model_version == "1"


def test_outputs_are_chosen_and_classified(client):
    a, b = np.array([5, 6]), np.array([1, 9])
    inputs = [given("a", a, "INT64"), given("b", b, "INT64")]
    result = client.infer("pair", inputs, outputs=[triton.InferRequestedOutput("difference")])
    assert result.as_numpy("difference").tolist() == [4, -3]
    assert result.as_numpy("total") is None
    best = client.infer("pair", inputs, outputs=[triton.InferRequestedOutput("total", class_count=1)])
    assert best.as_numpy("total").tolist() == [b"15:1"]


def test_what_is_wrong_is_said_with_its_status(client):
    x = [given("x", X, "FP32")]
    refused("NOT_FOUND", "unknown model: 'none' is not found", client.infer, "none", x)
    refused("NOT_FOUND", "version 9 is not found", client.infer, "scale", x, model_version="9")
    refused("NOT_FOUND", "version 'x' is not found", client.infer, "scale", x, model_version="x")
    refused("INVALID_ARGUMENT", "unexpected inference input 'z'", client.infer, "scale", [given("z", X, "FP32")])
    refused("INVALID_ARGUMENT", r"Expected \[-1,4\], got \[1,3\]", client.infer, "scale", [given("x", X[:, :3], "FP32")])
    refused("INVALID_ARGUMENT", "expects 'FP32'", client.infer, "scale", [given("x", X.astype(np.int64), "INT64")])
    refused("INVALID_ARGUMENT", "'q' for model 'scale'", client.infer, "scale", x, outputs=[triton.InferRequestedOutput("q")])
    refused("INVALID_ARGUMENT", "is missing", client.infer, "pair", [given("a", np.array([1]), "INT64")])
    assert np.array_equal(client.infer("scale", x, parameters={"custom": "x"}).as_numpy("y"), 3 * X)
    assert np.array_equal(client.infer("scale", x, priority=1, timeout=10_000_000).as_numpy("y"), 3 * X)
    assert np.array_equal(client.infer("scale", x, model_version="stable").as_numpy("y"), 3 * X)
    refused("UNAVAILABLE", "timeout expired", client.infer, "scale", x, timeout=1)


def test_repository_statistics_and_settings(client):
    assert "scale" in [model.name for model in client.get_model_repository_index().models]
    client.unload_model("pair")
    states = {model.name: (model.state, model.reason) for model in client.get_model_repository_index().models}
    assert states["pair"] == ("UNAVAILABLE", "unloaded")
    client.load_model("pair")
    assert client.is_model_ready("pair")
    refused("UNIMPLEMENTED", "files and settings of its release", client.load_model, "pair", config="{}")
    refused("NOT_FOUND", "'none' is not found", client.load_model, "none")
    client.infer("scale", [given("x", X, "FP32")])
    (statistics,) = client.get_inference_statistics("scale").model_stats
    assert statistics.inference_count >= 1
    assert statistics.inference_stats.success.count == statistics.inference_count
    assert statistics.inference_stats.success.ns > 0
    assert len(client.get_inference_statistics().model_stats) == 2 + len(KINDS)
    assert client.get_log_settings(as_json=True)["settings"]["log_error"] == {"bool_param": True}
    assert client.update_log_settings({"log_verbose_level": 1}).settings["log_verbose_level"].uint32_param == 1
    client.update_log_settings({"log_verbose_level": 0})
    refused("UNIMPLEMENTED", "log_file cannot be set", client.update_log_settings, {"log_file": "x"})
    assert list(client.get_trace_settings("scale").settings["trace_level"].value) == ["OFF"]
    assert client.update_trace_settings(settings={"trace_level": ["OFF"], "trace_rate": None}).settings["trace_rate"].value
    refused("UNIMPLEMENTED", "in agent.yaml decide", client.update_trace_settings, settings={"trace_level": ["TIMESTAMPS"]})
    refused("UNIMPLEMENTED", "memory of a GPU", client.get_cuda_shared_memory_status)
    refused("UNIMPLEMENTED", "memory of a GPU", client.unregister_cuda_shared_memory)


def test_a_stream_goes_on_after_an_error(client):
    answers = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    for model, array in (("scale", X), ("none", X), ("scale", 2 * X)):
        client.async_stream_infer(model, [given("x", array, "FP32")], enable_empty_final_response=True, request_id=model)
    first, second, third = (answers.get(timeout=DEADLINE_S) for _ in range(3))
    client.stop_stream()
    assert np.array_equal(first[0].as_numpy("y"), 3 * X)
    assert first[0].get_response().parameters["triton_final_response"].bool_param
    assert second[0] is None
    assert "'none' is not found" in str(second[1])
    assert np.array_equal(third[0].as_numpy("y"), 6 * X)


def test_a_stream_may_want_real_status_codes(server):
    with triton.InferenceServerClient(f"unix:{server.folder / 'g.sock'}") as client:
        answers = queue.Queue()
        client.start_stream(lambda result, error: answers.put((result, error)), headers={"triton_grpc_error": "true"})
        client.async_stream_infer("none", [given("x", X, "FP32")])
        _, error = answers.get(timeout=DEADLINE_S)
        assert error.status() == "StatusCode.NOT_FOUND"
        client.stop_stream()


def test_typed_contents_as_clients_without_raw_bytes_send_them(server):
    def ask(model, datatype, **contents):
        request = service_pb2.ModelInferRequest(model_name=model)
        tensor = request.inputs.add(name="x", datatype=datatype, shape=[2])
        for field, values in contents.items():
            getattr(tensor.contents, field).extend(values)
        return stub.ModelInfer(request, timeout=DEADLINE_S).raw_output_contents[0]

    with grpc.insecure_channel(f"unix:{server.folder / 'g.sock'}") as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        assert ask("same-int8", "INT8", int_contents=[-1, 5]) == b"\xff\x05"
        assert ask("same-bool", "BOOL", bool_contents=[True, False]) == b"\1\0"
        assert ask("same-fp32", "FP32", fp32_contents=[1.5, 2]) == np.array([1.5, 2], np.float32).tobytes()
        assert ask("same-uint64", "UINT64", uint64_contents=[2**64 - 1, 0]) == np.array([2**64 - 1, 0], np.uint64).tobytes()
        assert ask("same-bytes", "BYTES", bytes_contents=[b"a", b""]) == b"\1\0\0\0a\0\0\0\0"
        for model, datatype, contents, text in (
            ("same-int8", "INT8", {"int_contents": [200, 0]}, "does not fit INT8"),
            ("same-int8", "INT8", {"int64_contents": [1, 0]}, "values belong in int_contents, not in int64_contents"),
            ("same-int8", "INT8", {"int_contents": [1]}, "has 1 elements in int_contents, its shape needs 2"),
            ("same-fp16", "FP16", {"fp32_contents": [1, 2]}, "can only be sent in raw_input_contents"),
        ):
            with pytest.raises(grpc.RpcError, match=text):
                ask(model, datatype, **contents)
        request = service_pb2.ModelInferRequest(model_name="same-int8", raw_input_contents=[b"\1\2"])
        request.inputs.add(name="x", datatype="INT8", shape=[2]).contents.int_contents.extend([1, 2])
        with pytest.raises(grpc.RpcError, match="contents field must not be specified when using raw_input_contents for 'x'"):
            stub.ModelInfer(request, timeout=DEADLINE_S)
        request = service_pb2.ModelInferRequest(model_name="same-int8", raw_input_contents=[b"\1\2", b"\1"])
        request.inputs.add(name="x", datatype="INT8", shape=[2])
        with pytest.raises(grpc.RpcError, match="more entries than"):
            stub.ModelInfer(request, timeout=DEADLINE_S)


def test_the_health_protocol(server):
    asked, answered = classes_of(HEALTH.methods_by_name["Check"])
    with grpc.insecure_channel(f"unix:{server.folder / 'g.sock'}") as channel:
        check = channel.unary_unary("/grpc.health.v1.Health/Check", asked.SerializeToString, answered.FromString)
        for service in ("", "inference.GRPCInferenceService"):
            assert check(asked(service=service), timeout=DEADLINE_S).status == 1
        with pytest.raises(grpc.RpcError) as error:
            check(asked(service="other"), timeout=DEADLINE_S)
        assert error.value.code() is grpc.StatusCode.NOT_FOUND
        watch = channel.unary_stream("/grpc.health.v1.Health/Watch", asked.SerializeToString, answered.FromString)
        call = watch(asked(), timeout=DEADLINE_S)
        assert next(call).status == 1
        call.cancel()
        assert next(watch(asked(service="other"), timeout=DEADLINE_S)).status == 3


def test_a_call_out_of_time_is_not_answered_late(serve_files, tmp_path):
    slow = onnx_models.slow(tmp_path / "slow.onnx", rounds=4)
    serve_files(slow, options=("--grpc-socket", tmp_path / "g.sock"))
    with triton.InferenceServerClient(f"unix:{tmp_path / 'g.sock'}") as client:
        x = [given("x", np.zeros(1, np.float32), "FP32")]
        refused("DEADLINE_EXCEEDED", "Deadline", client.infer, "slow", x, client_timeout=0.01)
        assert client.infer("slow", x).as_numpy("y").shape == ()


def test_state_is_kept_within_a_sequence(device, tmp_path):
    device.release("total", 1, onnx_models.total(tmp_path / "total.onnx"), state={"before": "sum"})
    device.select("total", 1)
    device.server(grpc_socket=str(tmp_path / "g.sock")).start()

    def add(number, sequence, **options):
        x = given("x", np.full((1, 1), number, np.float32), "FP32")
        return client.infer("total", [x], sequence_id=sequence, **options).as_numpy(output).item()

    with triton.InferenceServerClient(f"unix:{tmp_path / 'g.sock'}") as client:
        assert client.get_model_config("total").config.HasField("sequence_batching")
        (output,) = [tensor.name for tensor in client.get_model_metadata("total").outputs]
        assert add(1, 5, sequence_start=True) == 1
        assert add(10, "other", sequence_start=True) == 10
        assert add(2, 5) == 3
        assert add(5, "other", sequence_end=True) == 15
        assert add(3, 5, sequence_end=True) == 6
        refused("INVALID_ARGUMENT", "sequence", add, 1, 5)


@pytest.mark.alone  # the runs must not end before it is seen that calls wait
def test_a_call_whose_caller_leaves_while_it_waits_is_counted_as_cancelled(device, tmp_path):
    device.release("slow", 1, onnx_models.slow(tmp_path / "slow.onnx", rounds=4), serving={"instances": 1})
    device.select("slow", 1)
    server = device.server(grpc_socket=str(tmp_path / "g.sock")).start()
    asked = service_pb2.ModelInferRequest(model_name="slow", raw_input_contents=[bytes(4)])
    asked.inputs.add(name="x", datatype="FP32", shape=[1])

    def metric(name):
        return next(line for line in metrics(server).decode().splitlines() if line.startswith(name) and "slow" in line)

    def until(name, value):
        deadline = time.monotonic() + DEADLINE_S
        while not metric(name).endswith(f" {value}"):
            assert time.monotonic() < deadline, metric(name)

    with grpc.insecure_channel(f"unix:{tmp_path / 'g.sock'}") as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        calls = [stub.ModelInfer.future(asked, timeout=DEADLINE_S) for _ in range(4)]
        until("nv_inference_pending_request_count", 3)
        calls.append(stub.ModelInfer.future(asked, timeout=DEADLINE_S))  # it waits behind the others, whichever of them runs
        until("nv_inference_pending_request_count", 4)
        calls[4].cancel()
        assert all(len(call.result().raw_output_contents) == 1 for call in calls[:4])
    cancelled = 'nv_inference_request_failure{model="slow",version="1",reason="CANCELED"}'
    until(cancelled, 1)


def test_the_socket_has_its_mode_and_one_class_for_all(device, tmp_path):
    device.server(grpc_socket=str(tmp_path / "g.sock"), grpc_socket_mode=0o640, grpc_access="predict").start()
    path = tmp_path / "g.sock"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    with triton.InferenceServerClient(f"unix:{path}") as client:
        assert np.array_equal(client.infer("scale", [given("x", X, "FP32")]).as_numpy("y"), X)
        refused("PERMISSION_DENIED", "needs access class 'control'", client.unload_model, "scale")
        refused("PERMISSION_DENIED", "needs access class 'observe'", client.get_inference_statistics)
        refused("PERMISSION_DENIED", "needs access class 'control'", client.update_log_settings, {"log_info": True})
        refused("UNIMPLEMENTED", "disabled", client.get_system_shared_memory_status)


def test_tensors_in_system_shared_memory(device, tmp_path):
    device.server(grpc_socket=str(tmp_path / "g.sock"), grpc_access="control", shared_memory="owner").start()
    key = f"/edge-grpc-{os.getpid()}"
    with triton.InferenceServerClient(f"unix:{tmp_path / 'g.sock'}") as client:
        memory = shm.create_shared_memory_region("r", key, 64)
        try:
            shm.set_shared_memory_region(memory, [X])
            client.register_system_shared_memory("r", key, 64)
            assert client.get_system_shared_memory_status().regions["r"].byte_size == 64
            refused("INVALID_ARGUMENT", "already in manager", client.register_system_shared_memory, "r", key, 64)
            x = triton.InferInput("x", [1, 4], "FP32")
            x.set_shared_memory("r", 16)
            y = triton.InferRequestedOutput("y")
            y.set_shared_memory("r", 16, offset=32)
            result = client.infer("scale", [x], outputs=[y])
            assert result.get_response().raw_output_contents[0] == b""
            assert np.array_equal(shm.get_contents_as_numpy(memory, np.float32, [1, 4], offset=32), X)
            y.set_shared_memory("r", 16, offset=60)
            refused("INVALID_ARGUMENT", "Invalid offset", client.infer, "scale", [x], outputs=[y])
            client.unregister_system_shared_memory("r")
            client.unregister_system_shared_memory()
            refused("NOT_FOUND", "Unable to find", client.infer, "scale", [x])
        finally:
            shm.destroy_shared_memory_region(memory)


@pytest.mark.alone  # it measures
def test_the_end_answers_what_was_asked_and_waits_for_no_silent_stream(serve_files, tmp_path):
    slow = onnx_models.slow(tmp_path / "slow.onnx", rounds=4)
    server = serve_files(slow, options=("--grpc-socket", tmp_path / "g.sock"))
    answers = queue.Queue()
    with triton.InferenceServerClient(f"unix:{tmp_path / 'g.sock'}") as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        x = [given("x", np.zeros(1, np.float32), "FP32")]
        client.async_stream_infer("slow", x)
        assert answers.get(timeout=DEADLINE_S)[1] is None
        calls = [client.async_infer("slow", x, lambda result, error: answers.put((result, error))) for _ in range(2)]
        until = time.monotonic() + DEADLINE_S
        while b'nv_inference_request_success{model="slow",version="1"} 2' not in metrics(server):
            assert time.monotonic() < until
        started = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - started < 8
        assert answers.get(timeout=DEADLINE_S)[1] is None
        assert answers.get(timeout=DEADLINE_S)[1] is None
        assert len(calls) == 2


def metrics(server):
    return server.raw(b"GET /metrics HTTP/1.1\r\nHost: t\r\n\r\n")[2]


def test_a_socket_in_use_is_not_taken_and_a_stale_one_is(serve_files, tmp_path):
    path, model = tmp_path / "g.sock", onnx_models.scale(tmp_path / "scale.onnx", 2.0)
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    server = serve_files(model, options=("--grpc-socket", path))
    folder = tmp_path / "second"
    folder.mkdir()
    second = Server(folder, "run", model, "--socket", folder / "s.sock", "--grpc-socket", path).start(wait=False)
    assert second.process.wait(DEADLINE_S) == 1
    assert "another server answers" in second.output()
    second.stop()
    server.kill()
    server.start()
    with triton.InferenceServerClient(f"unix:{path}") as client:
        assert client.is_server_ready()


def test_a_message_larger_than_allowed_is_refused(device, tmp_path):
    server = device.server(grpc_socket=str(tmp_path / "g.sock"), max_body_bytes=65536).start()
    with triton.InferenceServerClient(f"unix:{tmp_path / 'g.sock'}") as client:
        refused(
            "RESOURCE_EXHAUSTED",
            "larger than max",
            client.infer,
            "scale",
            [given("x", np.ones((20_000, 4), np.float32), "FP32")],
        )
        assert client.is_server_live()
    assert server.stop() == 0


def test_many_calls_at_once(server):
    failures = []

    def work(seed):
        rng = np.random.default_rng(seed)
        with triton.InferenceServerClient(f"unix:{server.folder / 'g.sock'}") as client:
            for _ in range(20):
                x = rng.standard_normal((int(rng.integers(1, 500)), 4)).astype(np.float32)
                if not np.array_equal(client.infer("scale", [given("x", x, "FP32")]).as_numpy("y"), 3 * x):
                    failures.append(x.shape)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert not failures


def test_the_descriptors_are_those_of_the_proto_files():
    script = f"import {protos.__name__} as c, sys; sys.exit(c.compiled() != c.TARGET.read_text())"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_names_and_numbers_are_the_stock_clients():
    """Every message and field here is in the client's definitions, with the same number and type."""
    from tritonclient.grpc import model_config_pb2, service_pb2

    from agent.serving.grpc.messages import INFERENCE

    theirs = {**service_pb2.DESCRIPTOR.message_types_by_name, **model_config_pb2.DESCRIPTOR.message_types_by_name}

    def compare(ours, other):
        for name, field in ours.fields_by_name.items():
            twin = other.fields_by_name[name]
            assert (field.number, field.type) == (twin.number, twin.type), field.full_name
            if field.message_type is not None and field.message_type.nested_types is not None:
                assert field.message_type.full_name == twin.message_type.full_name
        for name, nested in ours.nested_types_by_name.items():
            compare(nested, other.nested_types_by_name[name])

    for name, message in INFERENCE.file.message_types_by_name.items():
        compare(message, theirs[name])
    their_service = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    assert [m.name for m in INFERENCE.methods] == [m.name for m in their_service.methods]


def test_grpc_is_loaded_only_when_it_is_asked_for():
    script = "import sys, agent.serving.app, agent.cli.serve; print(*{name.split('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout.split()
    assert "agent" in loaded
    assert not {"grpc", "google"} & set(loaded)


PINGING = [
    ("grpc.keepalive_time_ms", 1000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]
THROWN_OFF_S = 3.0  # the third ping too many ends the connection


def test_how_often_a_client_may_ping(tmp_path):
    """Every second is allowed unless the configuration says otherwise; beyond what is allowed a client is told to go."""
    servers, ended, watches = [], {}, {}
    with contextlib.ExitStack() as stack:
        for interval_s in (None, 0, 60):
            folder = tmp_path / str(interval_s)
            folder.mkdir()
            settings = {} if interval_s is None else {"grpc_ping_interval_s": interval_s}
            servers.append(Device(folder).server(grpc_socket=str(folder / "g.sock"), **settings).start())
            stack.callback(servers[-1].stop)
            channel = stack.enter_context(grpc.insecure_channel(f"unix:{folder / 'g.sock'}", PINGING))
            ended[interval_s] = threading.Event()
            watches[interval_s] = channel.unary_stream("/grpc.health.v1.Health/Watch")(b"")
            watches[interval_s].add_done_callback(lambda _, event=ended[interval_s]: event.set())
            assert next(watches[interval_s])
        assert ended[60].wait(DEADLINE_S)
        with pytest.raises(grpc.RpcError, match="Too many pings"):
            next(watches[60])
        assert not ended[None].wait(THROWN_OFF_S / 2)
        assert not ended[0].is_set()
        for watch in watches.values():
            watch.cancel()


def test_as_many_streams_as_are_allowed(device, tmp_path):
    device.server(grpc_socket=str(tmp_path / "g.sock"), grpc_streams=20).start()
    ended = queue.SimpleQueue()
    request = service_pb2.ModelInferRequest(model_name="scale", raw_input_contents=[X.tobytes()])
    request.inputs.add(name="x", datatype="FP32", shape=X.shape)

    def asking():
        yield request
        ended.get()

    with grpc.insecure_channel(f"unix:{tmp_path / 'g.sock'}") as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        streams = [stub.ModelStreamInfer(asking()) for _ in range(20)]
        try:
            for stream in streams:
                assert next(stream).infer_response.raw_output_contents == [X.tobytes()]
            with pytest.raises(grpc.RpcError, match="all 20 streams are in use") as error:
                next(stub.ModelStreamInfer(iter([request])))
            assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert stub.ModelInfer(request).raw_output_contents == [X.tobytes()]
        finally:
            for _ in streams:
                ended.put(None)
        assert all(list(stream) == [] for stream in streams)
        assert next(stub.ModelStreamInfer(iter([request]))).infer_response.raw_output_contents == [X.tobytes()]


def field(number, value):
    size, head = len(value), b""
    while size > 127:
        head, size = head + bytes((size & 127 | 128,)), size >> 7
    return bytes((number << 3 | 2,)) + head + bytes((size,)) + value


def text_request(elements, **contents):
    request = service_pb2.ModelInferRequest(model_name="same-bytes", **contents)
    request.inputs.add(name="x", datatype="BYTES", shape=[elements])
    return request.SerializeToString()


MILLION = 1_000_000
HEAVY = {
    "empty inputs": field(1, b"same-fp32") + field(5, b"") * MILLION,
    "parameters": field(1, b"same-fp32") + b"".join(field(4, field(1, b"%d" % n)) for n in range(300_000)),
    "small numbers": field(1, b"same-int64")
    + field(5, field(1, b"x") + field(2, b"INT64") + field(5, field(3, bytes(2 * MILLION)))),
    "one by one": field(1, b"same-int64") + field(5, field(1, b"x") + field(2, b"INT64") + field(5, b"\x18\1" * 2 * MILLION)),
    "sizes": field(1, b"same-fp32") + field(5, field(1, b"x") + field(3, b"\1" * 2 * MILLION)),
    "empty texts": field(1, b"same-bytes") + field(5, field(1, b"x") + field(2, b"BYTES") + field(5, field(8, b"") * MILLION)),
    "raw texts": text_request(300_000, raw_input_contents=[bytes(4 * 300_000)]),
}


@pytest.mark.parametrize("name", HEAVY)
def test_a_message_that_would_take_far_more_than_its_bytes_is_refused(server, name):
    before = rss_bytes(server)
    with grpc.insecure_channel(f"unix:{server.folder / 'g.sock'}") as channel:
        with pytest.raises(grpc.RpcError, match="of memory, of which") as error:
            channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")(HEAVY[name], timeout=DEADLINE_S)
        assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert rss_bytes(server) - before < 40 * MILLION


def rss_bytes(server):
    with Path(f"/proc/{server.process.pid}/statm").open() as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.parametrize("data", [b"\x0a\x05ab", b"\xff" * 20, b"\x0b", field(5, b"\x0a"), field(1, b"same-fp32") + b"\x80"])
def test_what_is_no_message_is_the_callers_mistake(server, data):
    with grpc.insecure_channel(f"unix:{server.folder / 'g.sock'}") as channel:
        with pytest.raises(grpc.RpcError) as error:
            channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")(data, timeout=DEADLINE_S)
        assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_long_message_without_tensors_is_refused(server):
    with grpc.insecure_channel(f"unix:{server.folder / 'g.sock'}") as channel:
        with pytest.raises(grpc.RpcError, match="without tensors at most") as error:
            channel.unary_unary("/inference.GRPCInferenceService/ServerLive")(field(15, bytes(100_000)), timeout=DEADLINE_S)
        assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
