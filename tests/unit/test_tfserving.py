"""TensorFlow Serving's requests as bytes: whatever they are, they are read or refused; nothing else is raised."""

import contextlib
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.serving.answers import Refusal
from agent.serving.api import lists
from agent.serving.api.tfserving_body import Body
from agent.serving.api.tfserving_forms import FORMS
from agent.serving.models.version import Version
from runtimes.contract import DTYPES, TensorSpec
from runtimes.naming import Interfaces

pytestmark = pytest.mark.alone  # each example has a deadline
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.just({"b64": "aGk="})
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("xyb"), inner, max_size=3)
)
READERS = tuple(form.read_body for form in FORMS.values())


def version(datatype):
    made = Version("m", 1, "cpu", "", "onnx")
    made.inputs = (TensorSpec("x", datatype, (-1, 2)), TensorSpec("y", "FP32", (-1,)))
    made.outputs = (TensorSpec("scores", "FP32", (-1, 3)), TensorSpec("value", "FP32", (-1,)))
    made.interfaces = Interfaces(made.inputs, made.outputs)
    return made


@given(st.sampled_from(sorted(DTYPES)), st.sampled_from(("instances", "inputs", "examples")), VALUES)
def test_no_document_breaks_a_reader(datatype, key, document):
    body = json.dumps({key: document}).encode()
    for read in READERS:
        with contextlib.suppress(Refusal):
            assert set(read(version(datatype), Body(body)).feeds) == {"x", "y"}


@given(st.binary(max_size=100))
def test_no_bytes_break_a_reader(body):
    for read in READERS:
        with contextlib.suppress(Refusal):
            read(version("FP32"), Body(body))


@given(st.sampled_from(sorted(DTYPES)), VALUES)
def test_no_value_breaks_the_tensor_reader(datatype, value):
    try:
        array = lists.read("x", json.dumps(value).encode(), datatype, None, encoded=True)
    except Refusal:
        return
    assert array.dtype == DTYPES[datatype]


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=8))
def test_bf16_is_the_nearest(values):
    """No BF16 is nearer to the number than the one it is rounded to."""
    bits = lists.read("x", json.dumps(values).encode(), "BF16", None)
    array = np.array(values, np.float32)

    def widened(of):
        with np.errstate(invalid="ignore"):
            return (of.astype(np.uint32) << 16).view(np.float32).astype(np.float64)

    here = np.abs(widened(bits) - array)
    for other in (bits - 1, bits + 1):
        away = np.abs(widened(other.astype(np.uint16)) - array)
        assert np.all((here <= away) | ~np.isfinite(away) | ~np.isfinite(here))


@pytest.mark.parametrize("filler", [0, 9000], ids=["short", "long"])
@pytest.mark.parametrize("number", ["1e999", "-2999e99999999999999999", f"1{'0' * 5000}"])
@pytest.mark.parametrize("datatype", sorted(DTYPES))
def test_numbers_beyond_every_datatype_are_refused(datatype, number, filler):
    text = f"[{', '.join([number] + ['0'] * filler)}]".encode()
    with pytest.raises(Refusal) as refused:
        lists.read("x", text, datatype, None, encoded=True)
    assert refused.value.status == 400
