"""What the machine is."""

from __future__ import annotations

import pytest

from agent.host import hardware


@pytest.mark.usefixtures("script_runtime")
def test_the_hardware_is_what_it_is():
    found = hardware.probe()

    assert found.cpus >= 1
    assert found.memory_bytes > 1 << 20
    assert found.runtimes["script"] == "script 1.0"
    assert found.runtimes["onnx"].startswith("onnxruntime ")


def test_a_probe_that_hangs_is_given_up():
    assert hardware.probe_runtimes(timeout_s=0.01) == {}
