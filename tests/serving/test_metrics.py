"""The metrics page, read by a parser that takes nothing but Prometheus's text format."""

import json
import re

import numpy as np
import pytest

from agent.client import Client, InputRejected
from tests.serving.server import request

X = np.ones((2, 4), np.float32)
NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\["\\n])*)"(,|$)')
TYPES = {"counter", "gauge", "histogram"}


def parse(text):
    """{family: (type, {(sample, labels): value})}.  Raises: AssertionError for whatever the format does not allow."""
    assert text.endswith("\n")
    families, helped, current = {}, None, None
    for line in text[:-1].split("\n"):
        if line.startswith("# HELP "):
            helped = line.split(" ", 3)[2]
            assert NAME.fullmatch(helped), line
            assert line.split(" ", 3)[3], line
            continue
        if line.startswith("# TYPE "):
            _, _, current, kind = line.split(" ")
            assert current == helped, f"{line}: HELP comes right before TYPE"
            assert kind in TYPES, line
            assert current not in families, f"{line}: a family stands together"
            families[current] = (kind, {})
            continue
        kind, samples = families[current]
        sample, labels, value = re.fullmatch(r"([^{ ]+)(?:\{(.*)\})? (\S+)", line).groups()
        endings = ("_bucket", "_sum", "_count") if kind == "histogram" else ("",)
        assert sample in {current + ending for ending in endings}, line
        key = (sample, read_labels(labels or ""))
        assert key not in samples, f"{line} stands twice"
        samples[key] = float(value)
        assert kind == "gauge" or samples[key] >= 0, line
    for name, (kind, samples) in families.items():
        if kind == "histogram":
            check_histogram(name, samples)
    return families


def read_labels(text):
    found, at = {}, 0
    while at < len(text):
        match = LABEL.match(text, at)
        assert match, text
        assert match[1] not in found, text
        found[match[1]] = match[2]
        at = match.end()
    return frozenset(found.items())


def check_histogram(name, samples):
    series = {}
    for (sample, labels), value in samples.items():
        if sample == f"{name}_bucket":
            bound = dict(labels)["le"]
            series.setdefault(frozenset(labels - {("le", bound)}), []).append((float(bound), value))
    for labels, buckets in series.items():
        assert [b for b, _ in buckets] == sorted(b for b, _ in buckets)
        assert [v for _, v in buckets] == sorted(v for _, v in buckets)
        assert buckets[-1] == (float("inf"), samples[f"{name}_count", labels])
        assert (f"{name}_sum", labels) in samples


def page(server):
    status, _, body = server.raw(request("GET", "/metrics"))
    assert status == 200
    return parse(body.decode())


def sample(families, name, **labels):
    family = name if name in families else re.sub(r"_(bucket|sum|count)$", "", name)
    return families[family][1][name, frozenset(labels.items())]


@pytest.fixture
def of():
    return {"model": "scale", "version": "1"}


def test_every_name_is_there_and_every_line_is_of_the_format(device, of):
    server = device.server().start()
    with Client(server.socket) as client:
        for _ in range(3):
            client.infer("scale", X)
        with pytest.raises(InputRejected):
            client.infer("scale", np.ones((1, 3), np.float32))
    families = page(server)
    phases = ("request", "queue", "compute_input", "compute_infer", "compute_output")
    for phase in phases:
        assert sample(families, f"nv_inference_{phase}_duration_us", **of) > 0
        assert sample(families, f"edge_inference_{phase}_duration_seconds_count", **of) == 3
    assert sample(families, "nv_inference_request_success", **of) == 3
    assert sample(families, "nv_inference_count", **of) >= 3
    assert sample(families, "nv_inference_exec_count", **of) == 3
    assert sample(families, "nv_inference_request_failure", **of, reason="OTHER") == 1
    assert sample(families, "nv_inference_request_failure", **of, reason="CANCELED") == 0
    assert sample(families, "nv_inference_pending_request_count", **of) == 0
    assert sample(families, "nv_model_load_duration_secs", **of) > 0
    assert sample(families, "edge_model_ready", **of) == 1
    assert sample(families, "edge_model_active", **of) == 1
    info = dict(next(iter(families["edge_model_info"][1]))[1])
    assert (info["runtime"], info["provider"], info["variant"]) == ("onnx", "cpu", "cpu")
    total = sample(families, "nv_inference_request_duration_us", **of)
    parts = sum(sample(families, f"nv_inference_{phase}_duration_us", **of) for phase in phases[1:])
    assert parts == pytest.approx(total, rel=0.01)
    assert sample(families, "process_resident_memory_bytes") > 1e6
    assert sample(families, "process_cpu_seconds_total") > 0
    assert sample(families, "nv_cpu_memory_total_bytes") > sample(families, "nv_cpu_memory_used_bytes") > 0
    assert sample(families, "process_start_time_seconds") > 1e9


def test_switches_and_going_back_are_counted(device):
    server = device.server().start()

    def control(what, **body):
        status, _, answer = server.raw(request("POST", f"/control/v1/models/scale/{what}", json.dumps(body).encode()))
        assert status == 200, answer

    control("load", version=2, variant="cpu")
    control("activate", version=2)
    control("activate", version=2)
    control("rollback", version=1)
    control("rollback", version=1)
    families = page(server)
    assert sample(families, "edge_model_activations_total", model="scale") == 3
    assert sample(families, "edge_model_rollbacks_total", model="scale") == 1


def test_a_server_without_models_has_a_page(device):
    device.store.deselect("scale")
    families = page(device.server().start())
    assert families["nv_inference_request_success"] == ("counter", {})
    assert "process_cpu_seconds_total" in families


def test_the_statistics_of_triton_have_every_phase(device):
    server = device.server().start()
    with Client(server.socket) as client:
        for _ in range(4):
            client.infer("scale", X)
    _, _, body = server.raw(request("GET", "/v2/models/scale/stats"))
    (found,) = json.loads(body)["model_stats"]
    stats = found["inference_stats"]
    assert (found["execution_count"], stats["success"]["count"], stats["fail"]["count"]) == (4, 4, 0)
    parts = [stats[phase]["ns"] for phase in ("queue", "compute_input", "compute_infer", "compute_output")]
    assert all(part > 0 for part in parts)
    assert sum(parts) == pytest.approx(stats["success"]["ns"], rel=0.01)
    assert [batch["compute_infer"]["count"] for batch in found["batch_stats"]] == [4]
