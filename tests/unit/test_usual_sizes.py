"""What an engine keeps of a large request goes back, unless such requests are usual."""

import numpy as np
import pytest

from runtimes import registry
from runtimes.contract import LoadOptions
from runtimes.usual_sizes import AMONG, LEAST_BYTES, OFTEN, UsualSizes, resident_bytes
from tests.serving import onnx_models, tflite_models

SMALL, LARGE = LEAST_BYTES * 2, LEAST_BYTES * 100


def keeps(sizes, usual=None):
    usual = usual or UsualSizes()
    return "".join("k" if usual.keeps(size) else "-" for size in sizes)


@pytest.mark.parametrize(
    ("sizes", "kept"),
    [
        ([SMALL] * 5, "kkkkk"),
        ([LARGE] * 5, "kkkkk"),
        ([SMALL, LARGE, SMALL, SMALL], "k-kk"),
        ([SMALL, LARGE, LARGE, LARGE, LARGE], "k--kk"),
        ([SMALL, SMALL * 3, SMALL * 9], "kkk"),
        ([10, 100, 10_000, LEAST_BYTES], "kkkk"),
    ],
)
def test_what_is_kept(sizes, kept):
    assert keeps(sizes) == kept


def test_large_ones_far_apart_are_not_usual():
    usual = UsualSizes()
    usual.keeps(SMALL)
    for _ in range(2 * OFTEN):
        assert keeps([LARGE] + [SMALL] * AMONG, usual) == "-" + "k" * AMONG


def test_once_they_do_not_come_any_more_their_memory_goes_back_once():
    usual = UsualSizes()
    keeps([LARGE] * 3, usual)
    assert keeps([SMALL] * (AMONG + 5), usual) == "k" * (AMONG - 1) + "-" + "k" * 5
    assert keeps([SMALL] * (AMONG - 1) + [LARGE] + [SMALL] * (AMONG - 1), usual).count("-") == 1


@pytest.mark.parametrize("make", [lambda f: onnx_models.chain(f / "m.onnx"), lambda f: tflite_models.chain(f / "m.tflite")])
def test_one_large_request_leaves_nothing_behind_and_many_are_told(tmp_path, make):
    path = make(tmp_path)
    model = registry.for_file(path).load(path, LoadOptions())
    small, large = ({model.inputs[0].name: np.ones(size, np.float32)} for size in (50_000, 10_000_000))
    for _ in range(3):
        model.run(small)
    before = resident_bytes()
    model.run(large)
    assert resident_bytes() - before < 10e6
    assert model.grown_bytes < 10e6
    for _ in range(4):
        model.run(large)
    assert resident_bytes() - before > 35e6
    assert model.grown_bytes > 35e6
    for _ in range(AMONG + 1):
        model.run(small)
    assert resident_bytes() - before < 10e6
    assert model.grown_bytes == 0
    model.close()


def test_a_model_of_fixed_sizes_is_not_looked_at(tmp_path):
    path = onnx_models.identity(tmp_path / "m.onnx", 1, (4,))
    assert registry.for_file(path).load(path, LoadOptions()).grown_bytes == 0
