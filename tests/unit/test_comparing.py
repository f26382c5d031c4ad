"""Two versions' answers to the same inputs, as numbers; and when a machine has no time for such work."""

import numpy as np
import pytest

from agent.host.throttle import Throttle
from agent.serving.candidates.comparing import RATIO_BOUNDS, Comparison, Tolerance
from runtimes.contract import Quantization, TensorSpec

Y = TensorSpec("y", "FP32", (-1, 3))


def compared(live, other, spec=Y, **tolerance):
    found = Comparison([spec], {spec.name: Tolerance(**tolerance)} if tolerance else {})
    found.add([spec.name], [np.asarray(live, spec.dtype)], [np.asarray(other, spec.dtype)])
    return found


CASES = [
    ("the same", [[1, 2, 3]], [[1, 2, 3]], {}, True, 0, 0.0),
    ("near", [[1, 2, 3]], [[1.005, 2, 3]], {}, True, 0, 0.005),
    ("far", [[1, 2, 3]], [[1.5, 2, 3]], {}, False, 0, 0.5),
    ("far, but allowed", [[1, 2, 3]], [[1.5, 2, 3]], {"atol": 0.6, "rtol": 0.0}, True, 0, 0.5),
    ("another best class", [[1, 2, 3], [1, 2, 3]], [[1, 2, 3], [9, 2, 3]], {}, False, 1, 8.0),
    ("nan where there was none", [[1, 2, 3]], [[np.nan, 2, 3]], {}, False, 1, 0.0),
    ("nan where there was one", [[np.nan, 2, 3]], [[np.nan, 2, 3]], {}, True, 0, 0.0),
    ("infinite as before", [[np.inf, 2, 3]], [[np.inf, 2, 3]], {}, True, 0, 0.0),
    ("another shape", [[1, 2, 3]], [[1, 2, 3], [1, 2, 3]], {}, False, 0, 0.0),
]


@pytest.mark.parametrize(
    ("live", "other", "tolerance", "agrees", "flips", "difference"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)
def test_a_sample(live, other, tolerance, agrees, flips, difference):
    found = compared(live, other, **tolerance)
    assert (found.samples, found.agreed) == (1, int(agrees))
    assert found.flips == flips
    assert found.outputs["y"].max_difference == pytest.approx(difference, rel=1e-4, abs=1e-6)


def test_what_is_no_score_has_no_best_class():
    for spec, value in ((TensorSpec("y", "FP32", (-1,)), [1, 2]), (TensorSpec("y", "FP32", (-1, 1)), [[1], [2]])):
        assert compared(value, value, spec).rows == 0


def test_texts_are_the_same_or_not():
    spec = TensorSpec("y", "BYTES", (-1,))
    assert compared(np.array([b"a"], object), np.array([b"a"], object), spec).agreed == 1
    assert compared(np.array([b"a"], object), np.array([b"b"], object), spec).agreed == 0


def test_quantized_numbers_stand_for_real_ones():
    spec = TensorSpec("y", "INT8", (-1, 2), Quantization((0.5,), (3,)))
    found = compared([[3, 13]], [[3, 11]], spec, atol=1.0, rtol=0.0)
    assert (found.agreed, found.outputs["y"].max_difference) == (1, 1.0)
    each = TensorSpec("y", "INT8", (-1, 2), Quantization((0.5, 100.0), (0, 0), axis=1))
    assert compared([[1, 1]], [[1, 2]], each).outputs["y"].max_difference == 100.0


def test_bf16_comes_as_its_bits():
    spec = TensorSpec("y", "BF16", (-1,))
    found = compared([0x3F80], [0x4000], spec)  # 1 and 2
    assert found.outputs["y"].max_difference == 1.0


def test_the_ratio_of_times_is_that_of_pairs():
    found = compared([[1, 2, 3]], [[1, 2, 3]])
    assert found.median_ratio == 0.0
    y = [np.ones((1, 3), np.float32)]
    for _ in range(10):
        found.add(["y"], y, y, 0.001, 0.002)
    found.add(["y"], y, y, 0.001, 1000.0)  # beyond every bound
    found.add(["y"], y, y, 0.0, 1.0)  # not to be compared
    assert found.pairs == 11
    assert 2.0 <= found.median_ratio <= 2.0 * 2**0.25
    assert sum(found.document()["latency"]["counts"]) == 11
    assert len(found.document()["latency"]["counts"]) == len(RATIO_BOUNDS) + 1


def thermal(folder, *degrees):
    for number, value in enumerate(degrees):
        zone = folder / f"thermal_zone{number}"
        zone.mkdir()
        (zone / "temp").write_text(value)
    return folder


def test_a_hot_machine_has_no_time(tmp_path):
    zones = thermal(tmp_path, "41000\n", "81500\n", "")
    assert Throttle(0, 80, zones).reason() == "the device has 82 °C, above 80"
    assert Throttle(0, 90, zones).reason() is None
    assert Throttle(0, 0, zones).reason() is None
    assert Throttle(0, 80, tmp_path / "nowhere").reason() is None


def test_a_loaded_machine_has_no_time(tmp_path, monkeypatch):
    monkeypatch.setattr("os.getloadavg", lambda: (7.0, 1.0, 1.0))
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    assert Throttle(1.5, 0, tmp_path).reason() == "the load is 1.75 per core, above 1.5"
    assert Throttle(2.0, 0, tmp_path).reason() is None
    assert Throttle(0, 0, tmp_path).reason() is None
