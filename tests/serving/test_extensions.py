"""Triton's extensions over HTTP: configuration, repository, logging, tracing, and what is refused by name."""

import json
import logging

import numpy as np
import pytest

from agent.contract.codec import encode
from agent.serving.answers import Refusal
from agent.serving.api.settings import LogSettings, TraceSettings
from agent.store import hash_file
from tests.serving import onnx_models
from tests.serving.server import request

X = np.ones((1, 4), np.float32)


def ask(server, method, path, document=None):
    body = b"" if document is None else json.dumps(document).encode()
    status, _, answer = server.raw(request(method, path, body))
    return status, json.loads(answer) if answer else None


def test_the_configuration_of_a_model(scale_server):
    status, config = ask(scale_server, "GET", "/v2/models/scale/config")
    assert status == 200
    assert (config["name"], config["backend"], config["max_batch_size"]) == ("scale", "onnx", 0)
    assert config["input"][0]["data_type"] == "TYPE_FP32"
    assert config["input"][0]["dims"] == [-1, 4]
    assert config["output"][0]["name"] == "y"
    assert config["default_model_filename"] == "scale.onnx"
    assert config["version_policy"] == {"specific": {"versions": [1]}}
    assert config["instance_group"][0]["kind"] in ("KIND_CPU", "KIND_GPU")
    assert ask(scale_server, "GET", "/v2/models/scale/versions/1/config") == (200, config)
    assert ask(scale_server, "GET", "/v2/models/none/config")[0] == 404


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "error"),
    [
        ("POST", "/v2/repository/other/index", None, 501, "'repository_name' specification is not supported"),
        ("POST", "/v2/repository/other/models/m/load", {}, 501, "'repository_name' specification is not supported"),
        ("POST", "/v2/repository/other/models/m/unload", {}, 501, "'repository_name' specification is not supported"),
        ("GET", "/v2/cudasharedmemory/status", None, 501, "shared memory of a GPU is not supported"),
        ("GET", "/v2/cudasharedmemory/region/r/status", None, 501, "shared memory of a GPU is not supported"),
        ("POST", "/v2/cudasharedmemory/region/r/register", {}, 501, "shared memory of a GPU is not supported"),
        ("POST", "/v2/cudasharedmemory/unregister", None, 501, "shared memory of a GPU is not supported"),
        ("POST", "/v2/cudasharedmemory/region/r/unregister", None, 501, "shared memory of a GPU is not supported"),
        (
            "POST",
            "/v2/repository/models/scale/load",
            {"parameters": {"config": "{}"}},
            501,
            "files and settings of its release",
        ),
        ("POST", "/v2/repository/models/scale/load", {"parameters": {"file:1/a": "YQ=="}}, 501, "'file:1/a' is not supported"),
        ("POST", "/v2/repository/models/scale/load", {"parameters": {"a": "b"}}, 400, "'a' is not known"),
        ("POST", "/v2/repository/models/none/load", {}, 404, "'none' is not found"),
        ("POST", "/v2/repository/models/none/unload", {}, 404, "'none' is not found"),
        ("POST", "/v2/repository/models/scale/unload", {"parameters": {"x": 1}}, 400, "'x' is not known"),
        ("POST", "/v2/repository/models/scale/unload", [], 400, "the body is not what this route takes"),
        ("POST", "/v2/logging", {"log_file": "/tmp/x"}, 501, "log_file cannot be set"),
        ("POST", "/v2/logging", {"log_info": 1}, 400, "log_info is 1; expected true or false"),
        ("POST", "/v2/logging", {"log_colour": True}, 400, "'log_colour' is not a log setting"),
        ("POST", "/v2/logging", {"log_format": "ISO8601"}, 501, "log_format 'ISO8601' is not offered"),
        ("POST", "/v2/trace/setting", {"trace_level": ["TIMESTAMPS"]}, 501, "in agent.yaml decide"),
        ("POST", "/v2/trace/setting", {"trace": "x"}, 400, "'trace' is not a trace setting"),
        ("GET", "/v2/models/none/trace/setting", None, 404, "'none' is not found"),
    ],
)
def test_what_is_refused_says_why(scale_server, method, path, body, status, error):
    got, document = ask(scale_server, method, path, body)
    assert (got, error in document["error"]) == (status, True), document


def test_trace_settings_that_are_so_are_granted(scale_server):
    status, now = ask(scale_server, "GET", "/v2/models/scale/trace/setting")
    assert (status, now["trace_level"]) == (200, ["OFF"])
    assert ask(scale_server, "POST", "/v2/trace/setting", {"trace_level": ["OFF"], "trace_rate": None}) == (200, now)


def test_log_lines_are_chosen_while_it_runs(serve_files, tmp_path):
    server = serve_files(onnx_models.scale(tmp_path / "scale.onnx", 2.0))
    assert ask(server, "GET", "/v2/logging")[1]["log_info"] is False
    assert ask(server, "POST", "/v2/logging", {"log_info": True})[1]["log_info"] is True
    onnx_models.scale(tmp_path / "scale.onnx", 3.0)
    assert ask(server, "POST", "/v2/repository/models/scale/load", {})[0] == 200
    assert "INFO agent.serving.models.loading: loaded model 'scale'" in server.output()


def test_log_settings_change_all_or_nothing():
    root = logging.getLogger("tests.log settings")
    root.propagate = False
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.msg)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    settings = LogSettings(root)
    with pytest.raises(Refusal):
        settings.change({"log_info": True, "log_error": "no"})
    assert settings.document()["log_info"] is False
    settings.change({"log_info": True, "log_warning": False, "log_verbose_level": None})
    for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
        root.log(level, logging.getLevelName(level))
    assert lines == ["INFO", "ERROR"]
    settings.change({"log_verbose_level": 2, "log_error": False})
    root.debug("verbose")
    root.error("not wanted")
    assert lines[2:] == ["verbose"]
    assert TraceSettings(0.0).change({}) == TraceSettings(0.0).document()


def test_a_file_is_loaded_again_when_it_changed(serve_files, tmp_path):
    path = onnx_models.scale(tmp_path / "scale.onnx", 2.0)
    server = serve_files(path)
    with server.client() as client:
        assert client.infer("scale", X)["y"][0, 0] == 2
        onnx_models.scale(path, 5.0)
        assert ask(server, "POST", "/v2/repository/models/scale/load", {}) == (200, None)
        assert client.infer("scale", X)["y"][0, 0] == 5
        path.write_bytes(b"no model")
        status, document = ask(server, "POST", "/v2/repository/models/scale/load")
        assert (status, document["code"]) == (422, "model_invalid")
        assert client.infer("scale", X)["y"][0, 0] == 5, "what was loaded goes on serving"


def test_unloading_lists_the_model_as_unloaded_and_loading_brings_it_back(device):
    server = device.server().start()
    unload = {"parameters": {"unload_dependents": False}}
    assert ask(server, "POST", "/v2/repository/models/scale/unload", unload) == (200, None)
    entry = {"name": "scale", "version": "1", "state": "UNAVAILABLE", "reason": "unloaded"}
    assert ask(server, "POST", "/v2/repository/index")[1] == [entry]
    assert ask(server, "POST", "/v2/repository/index", {"ready": True})[1] == []
    assert ask(server, "GET", "/v2/models/scale/ready")[0] != 200
    assert ask(server, "GET", "/v2/health/ready") == (200, None)
    assert ask(server, "POST", "/v2/models/scale/infer", {"inputs": []})[0] == 503
    assert ask(server, "POST", "/v2/repository/models/scale/load", {}) == (200, None)
    assert ask(server, "POST", "/v2/repository/models/scale/load", {}) == (200, None)
    with server.client() as client:
        assert client.infer("scale", X)["y"][0, 0] == 1
    device.select("scale", 2, previous=1)
    assert ask(server, "POST", "/v2/repository/models/scale/load", {}) == (200, None)
    with server.client() as client:
        assert client.infer("scale", X)["y"][0, 0] == 2


def test_classes_are_named_by_the_release(device, tmp_path):
    model, labels = onnx_models.scale(tmp_path / "named.onnx", 1.0), tmp_path / "labels.txt"
    labels.write_text("zero\none\ntwo\nthree\n")
    files = {}
    for name, path in (("named.onnx", model), ("labels.txt", labels)):
        files[name] = {"sha256": hash_file(path), "size_bytes": path.stat().st_size}
        (device.store.blobs / files[name]["sha256"]).write_bytes(path.read_bytes())
    device.store.write_manifest(
        encode({
            "kind": "release", "format": 1, "model": "named", "version": 1, "files": files,
            "variants": [{"name": "cpu", "runtime": "onnx", "file": "named.onnx"}],
            "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 4], "labels": "labels.txt"}],
        })
    )  # fmt: skip
    device.select("named", 1)
    server = device.server().start()
    wanted = {
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [2, 4], "data": [0, 1, 3, 2, 9, 8, 7, 6]}],
        "outputs": [{"name": "y", "parameters": {"classification": 2}}],
    }
    (output,) = ask(server, "POST", "/v2/models/named/infer", wanted)[1]["outputs"]
    assert output["data"] == ["3.0:2:two", "2.0:3:three", "9.0:0:zero", "8.0:1:one"]
    assert (output["shape"], output["datatype"]) == ([2, 2], "BYTES")
    assert ask(server, "GET", "/v2/models/named/config")[1]["output"][0]["label_filename"] == "labels"


def test_the_configuration_of_a_model_that_gathers_batches(device, tmp_path):
    serving = {"max_batch_size": 8, "max_delay_us": 500, "preferred_batch_sizes": [4], "default_timeout_us": 9, "instances": 2}
    device.release("batched", 1, onnx_models.scale(tmp_path / "batched.onnx", 1.0), serving=serving)
    device.select("batched", 1)
    _, config = ask(device.server().start(), "GET", "/v2/models/batched/config")
    assert (config["max_batch_size"], config["input"][0]["dims"]) == (8, [4]), "the batch's own dimension is not said"
    batching = config["dynamic_batching"]
    assert (batching["preferred_batch_size"], batching["max_queue_delay_microseconds"]) == ([4], 500)
    assert batching["default_queue_policy"]["default_timeout_microseconds"] == 9
    assert config["instance_group"][0]["count"] == 2
    assert "sequence_batching" not in config


def test_the_configuration_of_a_model_that_keeps_state(device, tmp_path):
    device.release("total", 1, onnx_models.total(tmp_path / "total.onnx"), state={"before": "sum"})
    device.select("total", 1)
    server = device.server(max_sequences=7, sequence_idle_s=2.5).start()
    _, config = ask(server, "GET", "/v2/models/total/config")
    assert config["sequence_batching"]["max_sequence_idle_microseconds"] == 2_500_000
    assert config["sequence_batching"]["oldest"]["max_candidate_sequences"] == 7
    assert "dynamic_batching" not in config
