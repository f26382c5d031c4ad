"""From a file to a warm version: what it is warmed up with."""

import os

import numpy as np
import pytest
from onnx import TensorProto, helper

from agent.contract.codec import ContractError, encode
from agent.contract.manifest import Serving, parse_manifest
from agent.host.priority import STEP_BACK
from agent.serving.models import loading
from agent.serving.models.loading import Source
from runtimes.onnx import OnnxRuntime
from tests.serving import onnx_models


@pytest.fixture
def picky(tmp_path):
    """y = 100 + x for x from 50 to 59; it fails on zeros."""
    value = onnx_models.value
    return onnx_models.save(
        tmp_path / "picky.onnx",
        [helper.make_node("Sub", ["x", "k"], ["i"]), helper.make_node("Gather", ["t", "i"], ["y"])],
        [value("x", TensorProto.INT64, ["n"])],
        [value("y", TensorProto.INT64, ["n"])],
        [("t", np.arange(150, 160)), ("k", np.int64(50))],
    )


@pytest.mark.parametrize(("content", "warm"), [(None, False), ([55], True), ([0], False), (b"no archive", False)], ids=str)
def test_what_a_model_is_warmed_up_with(content, warm, picky, tmp_path):
    path = None
    if isinstance(content, bytes):
        path = tmp_path / "x.npz"
        path.write_bytes(content)
    elif content is not None:
        path = tmp_path / "x.npz"
        np.savez(path, x=np.array(content, np.int64))
    version = loading.load(Source("picky", 1, picky, "", warm_up=path), threads=1)
    assert version.state == "READY"
    assert version.loaded.is_warm is warm
    version.retire()


@pytest.mark.parametrize(
    ("kind", "x"), [(TensorProto.FLOAT, np.array(3, np.float32)), (TensorProto.STRING, np.array(b"one"))], ids=str
)
def test_inputs_to_warm_up_with_may_be_texts_and_have_no_dimensions(kind, x, tmp_path):
    path = onnx_models.identity(tmp_path / "m.onnx", kind, ())
    np.savez(tmp_path / "x.npz", x=x)
    version = loading.load(Source("m", 1, path, "", warm_up=tmp_path / "x.npz"), threads=1)
    assert version.loaded.is_warm
    version.retire()


@pytest.mark.parametrize("isolation", ["in-process", "process"])
@pytest.mark.skipif(os.geteuid() != 0, reason="a thread that gives way needs a privilege to come back")
def test_what_takes_the_engine_long_gives_way(isolation, tmp_path, monkeypatch):
    def nice(pid=0):
        return os.getpriority(os.PRIO_PROCESS, pid) - own

    def telling(name, act):
        def tell(*given):
            steps.append((name, nice()))
            return act(*given)

        return tell

    own, steps = os.getpriority(os.PRIO_PROCESS, 0), []
    monkeypatch.setattr(OnnxRuntime, "load", telling("load", OnnxRuntime.load))
    monkeypatch.setattr(loading, "warm_up", telling("warm up", loading.warm_up))
    path = onnx_models.scale(tmp_path / "scale.onnx", 2.0)
    version = loading.load(Source("scale", 1, path, "", serving=Serving(isolation=isolation)), threads=1)
    try:
        assert steps == [("load", STEP_BACK), ("warm up", STEP_BACK)][isolation == "process" :]
        assert nice() == 0
        if version.loaded.process is not None:
            assert nice(version.loaded.process.pid) == STEP_BACK
    finally:
        version.retire()


def test_a_golden_case_must_be_there():
    document = {
        "kind": "release", "format": 1, "model": "m", "version": 1,
        "files": {"f": {"sha256": "0" * 64, "size_bytes": 1}},
        "variants": [{"name": "cpu", "runtime": "onnx", "file": "f", "serving": {"warm_up": "truth"}}],
    }  # fmt: skip
    with pytest.raises(ContractError, match="'truth', which is no golden case"):
        parse_manifest(encode(document))
    assert Serving().warm_up == ""
