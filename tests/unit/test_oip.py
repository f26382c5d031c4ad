"""The protocol's codec: whatever is wrong with a request is said, and what is right comes out as it went in."""

import json
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.serving import oip
from agent.serving.answers import Answer, FilledTemplate, Refusal
from runtimes.contract import DTYPES, TensorSpec

X = TensorSpec("x", "FP32", (-1, 2))
N = TensorSpec("n", "INT8", (2,))
Y = TensorSpec("y", "FP32", (-1, 2))


def tensor(name="x", shape=(1, 2), datatype="FP32", **fields):
    return {"name": name, "shape": list(shape), "datatype": datatype, **fields}


def body(inputs, *parts, **fields):
    text = json.dumps({"inputs": inputs, **fields}).encode()
    return memoryview(text + b"".join(parts)), len(text)


def read(inputs, *parts, specs=(X,), produces=(Y,), **fields):
    data, length = body(inputs, *parts, **fields)
    plan = oip.read_request(data, length, "m", specs, produces)
    return plan, plan.feeds(data)


def test_json_and_binary_inputs_may_be_mixed():
    raw = np.array([7, -7], np.int8).tobytes()
    _, feeds = read([tensor(data=[1.5, 2]), tensor("n", (2,), "INT8", parameters={"binary_data_size": 2})], raw, specs=(X, N))
    assert np.array_equal(feeds["x"], np.array([[1.5, 2]], np.float32))
    assert np.array_equal(feeds["n"], np.array([7, -7], np.int8))


def test_nested_and_flat_json_data_mean_the_same():
    for data in ([1, 2, 3, 4], [[1, 2], [3, 4]]):
        _, feeds = read([tensor(shape=(2, 2), data=data)])
        assert np.array_equal(feeds["x"], np.array([[1, 2], [3, 4]], np.float32))


SIZE = {"binary_data_size": 8}
EIGHT = bytes(8)

WRONG = {
    "unknown input": ([tensor("z", data=[1, 2])], (), {}, "unexpected inference input 'z' for model 'm'; it takes 'x'"),
    "twice": ([tensor(data=[1, 2]), tensor(data=[1, 2])], (), {}, "input 'x' is given twice"),
    "missing": ([], (), {}, "expected 1 inputs but got 0 inputs for model 'm': 'x' is missing"),
    "datatype": ([tensor(datatype="INT32", data=[1, 2])], (), {}, "has datatype 'INT32'; model 'm' expects 'FP32'"),
    "no datatype of ours": ([tensor(datatype="BF16", parameters=SIZE)], (EIGHT,), {}, "'BF16', which is not a datatype"),
    "rank": ([tensor(shape=(2,), data=[1, 2])], (), {}, "Expected [-1,2], got [2]"),
    "shape": ([tensor(shape=(1, 3), data=[1, 2, 3])], (), {}, "Expected [-1,2], got [1,3]"),
    "negative": ([tensor(shape=(-1, 2), data=[1, 2])], (), {}, "has a negative size"),
    "both": ([tensor(data=[1, 2], parameters=SIZE)], (EIGHT,), {}, "input 'x' sets data and binary_data_size"),
    "none": ([tensor()], (), {}, "input 'x' sets none of them"),
    "too few bytes declared": ([tensor(parameters={"binary_data_size": 4})], (bytes(4),), {}, "expecting 4 additional bytes"),
    "too few bytes": ([tensor(parameters=SIZE)], (bytes(5),), {}, "should have 8 bytes after the JSON, but only 5"),
    "too many bytes": ([tensor(parameters=SIZE)], (bytes(9),), {}, "unexpected additional input data for model 'm': 1 bytes"),
    "negative size": ([tensor(parameters={"binary_data_size": -8})], (), {}, "binary_data_size of input 'x' is -8"),
    "true as size": ([tensor(parameters={"binary_data_size": True})], (), {}, "binary_data_size of input 'x' is True"),
    "elements": ([tensor(data=[1, 2, 3])], (), {}, "input 'x' has 3 elements, shape [1,2] needs 2"),
    "ragged": ([tensor(shape=(2, 2), data=[[1, 2], [3]])], (), {}, "is not a regular list"),
    "nested otherwise": ([tensor(shape=(2, 2), data=[[1, 2, 3, 4]])], (), {}, "has shape [1,4], but [2,2] is said"),
    "text": ([tensor(data=["a", "b"])], (), {}, "does not fit FP32: expected numbers"),
    "null": ([tensor(data=[1, None])], (), {}, "does not fit FP32"),
    "too large a number": ([tensor(data=[1, 1e300])], (), {}, "does not fit FP32: expected numbers up to"),
    "output": ([tensor(data=[1, 2])], (), {"outputs": [{"name": "q"}]}, "unexpected inference output 'q'"),
    "output twice": ([tensor(data=[1, 2])], (), {"outputs": [{"name": "y"}, {"name": "y"}]}, "asked for twice"),
    "flag": ([tensor(data=[1, 2])], (), {"parameters": {"binary_data_output": 1}}, "'binary_data_output' is 1"),
    "reserved": ([tensor(data=[1, 2])], (), {"parameters": {"triton_x": 1}}, "must not start with 'triton_'"),
    "timeout": ([tensor(data=[1, 2])], (), {"parameters": {"timeout": "1"}}, "parameter 'timeout' is '1'"),
    "id": ([tensor(data=[1, 2])], (), {"id": 5}, "$.id"),
    "no inputs": ({}, (), {}, "$.inputs"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said(name):
    inputs, parts, fields, text = WRONG[name]
    with pytest.raises(Refusal) as refused:
        read(inputs, *parts, **fields)
    assert refused.value.status == 400
    assert text in str(refused.value)


@pytest.mark.parametrize(
    ("datatype", "data", "text"),
    [
        ("INT8", [1, 128], "expected whole numbers from -128 to 127"),
        ("UINT8", [-1, 0], "expected whole numbers from 0 to 255"),
        ("INT8", [1.5, 2], "expected whole numbers"),
        ("INT8", [True, False], "expected whole numbers"),
        ("BOOL", [1, 0], "expected true or false"),
        ("BYTES", [1, 2], "expected strings"),
        ("FP16", [1, 2], "receiving FP16 data via JSON is not supported. Please use the binary data format for input v"),
        ("UINT64", [2**64, 0], "expected whole numbers"),
    ],
)
def test_json_values_that_do_not_fit_the_datatype(datatype, data, text):
    with pytest.raises(Refusal, match=text.replace("(", r"\(")):
        read([tensor("v", (2,), datatype, data=data)], specs=(TensorSpec("v", datatype, (2,)),))


def test_shared_memory_is_refused_as_unsupported():
    with pytest.raises(Refusal) as refused:
        read([tensor(parameters={"shared_memory_region": "r", "shared_memory_byte_size": 8})])
    assert refused.value.status == 501


@given(st.sampled_from(sorted(set(DTYPES) - {"BYTES"})), st.lists(st.integers(0, 3), max_size=3), st.integers(0, 2**32))
def test_any_tensor_goes_through_binary_unchanged(datatype, shape, seed):
    dtype = DTYPES[datatype]
    count = int(np.prod(shape, dtype=int))
    raw = np.random.default_rng(seed).integers(0, 256, count * dtype.itemsize, np.uint8)
    if datatype == "BOOL":
        raw &= 1
    array = raw.view(dtype).reshape(shape)
    spec = TensorSpec("x", datatype, tuple(shape))
    parameters = {"binary_data_size": array.nbytes}
    plan, feeds = read([tensor("x", shape, datatype, parameters=parameters)], array.tobytes(), specs=(spec,), produces=(spec,),
                       parameters={"binary_data_output": True})  # fmt: skip
    assert feeds["x"].tobytes() == array.tobytes()
    assert feeds["x"].flags.aligned
    head, *tensors = parts_of(oip.write_response(plan, [array], "m", "1"))
    assert b"".join(tensors) == array.tobytes()
    assert json.loads(head)["outputs"] == [{"name": "x", "datatype": datatype, "shape": list(shape), "parameters": parameters}]


@given(st.lists(st.binary(max_size=20), max_size=5))
def test_byte_elements_go_through_binary_unchanged(elements):
    spec = TensorSpec("s", "BYTES", (-1,))
    packed = b"".join(struct.pack("<I", len(e)) + e for e in elements)
    given_tensor = tensor("s", (len(elements),), "BYTES", parameters={"binary_data_size": len(packed)})
    plan, feeds = read([given_tensor], packed, specs=(spec,), produces=(spec,), parameters={"binary_data_output": True})
    assert list(feeds["s"]) == elements
    _, *rest = parts_of(oip.write_response(plan, [feeds["s"]], "m", "1"))
    assert b"".join(rest) == packed


@pytest.mark.parametrize(
    ("packed", "text"),
    [(b"\x01\0", "incomplete string length"), (b"\x05\0\0\0ab", "incomplete string data"), (b"", "has 0 elements"), (bytes(8), "more elements")],
)  # fmt: skip
def test_broken_byte_elements(packed, text):
    spec = TensorSpec("s", "BYTES", (1,))
    with pytest.raises(Refusal, match=text):
        read([tensor("s", (1,), "BYTES", parameters={"binary_data_size": len(packed)})], packed, specs=(spec,))


def test_a_bool_that_is_neither_is_refused():
    spec = TensorSpec("b", "BOOL", (1,))
    with pytest.raises(Refusal, match="neither 0 nor 1"):
        read([tensor("b", (1,), "BOOL", parameters={"binary_data_size": 1})], b"\x02", specs=(spec,))


def parts_of(answer):
    return [bytes(part) if isinstance(part, bytes) else part.tobytes() for part in answer.parts]


def test_the_answer_in_json_has_the_fields_in_order():
    plan, _ = read([tensor(data=[1, 2])], id="a7")
    answer = oip.write_response(plan, [np.array([[1.5, 2]], np.float32)], "m", "3")
    assert parts_of(answer) == [
        b'{"id":"a7","model_name":"m","model_version":"3","outputs":[{"name":"y","datatype":"FP32","shape":[1,2],"data":[1.5,2.0]}]}'
    ]


def test_each_output_has_the_form_it_was_asked_for():
    outputs = (Y, N)
    wanted = [{"name": "n", "parameters": {"binary_data": True}}, {"name": "y"}]
    plan, _ = read([tensor(data=[1, 2])], produces=outputs)
    assert plan.binary == (False, False)
    plan, _ = read([tensor(data=[1, 2])], produces=outputs, outputs=wanted)
    assert plan.outputs == ["n", "y"]
    assert plan.binary == (True, False)
    answer = oip.write_response(plan, [np.array([1, 2], np.int8), np.zeros((1, 2), np.float32)], "m", "1")
    document = json.loads(parts_of(answer)[0])
    assert document["outputs"][0]["parameters"] == {"binary_data_size": 2}
    assert document["outputs"][1]["data"] == [0, 0]


def test_a_template_stands_for_answers_of_the_same_shapes_only():
    parameters = {"binary_data_output": True}
    plan, _ = read([tensor(data=[1, 2])], parameters=parameters)
    plan.values.clear()
    first = oip.write_response(plan, [np.zeros((1, 2), np.float32)], "m", "1")
    second = oip.write_response(plan, [np.ones((1, 2), np.float32)], "m", "1")
    other = oip.write_response(plan, [np.ones((3, 2), np.float32)], "m", "1")
    assert (type(first), type(second), type(other)) == (Answer, FilledTemplate, Answer)
    assert parts_of(first)[0] == parts_of(second)[0]
    assert json.loads(parts_of(other)[0])["outputs"][0]["shape"] == [3, 2]


def test_values_that_json_cannot_say_are_not_sent_as_something_else():
    plan, _ = read([tensor(data=[1, 2])])
    with pytest.raises(Refusal, match="output 'y' has values that are not finite"):
        oip.write_response(plan, [np.array([[1, np.nan]], np.float32)], "m", "1")


@pytest.mark.parametrize(
    ("shape", "size", "expected"),
    [((1, 2), 8, (1, 2)), ((-1, 2), 24, (3, 2)), ((-1, -1), 12, (1, 3)), ((), 4, ())],
)
def test_a_raw_body_is_the_only_input(shape, size, expected):
    data = memoryview(np.arange(size // 4, dtype=np.float32).tobytes())
    plan = oip.read_request(data, 0, "m", (TensorSpec("x", "FP32", shape),), (Y,))
    assert plan.feeds(data)["x"].shape == expected
    assert plan.binary == (True,)


@pytest.mark.parametrize(
    ("specs", "size", "text"),
    [((X, N), 8, "has 2"), ((X,), 7, "7 bytes do not make"), ((TensorSpec("x", "FP32", (2, -1, -1)),), 8, "cannot be told")],
)
def test_a_raw_body_that_does_not_fit(specs, size, text):
    with pytest.raises(Refusal, match=text):
        oip.read_request(memoryview(bytes(size)), 0, "m", specs, (Y,))


@given(st.binary(max_size=200), st.integers(0, 220))
def test_no_bytes_break_the_reader(data, length):
    """Whatever the body is, it is read or refused; nothing else is raised."""
    try:
        plan = oip.read_request(memoryview(data), min(length, len(data)), "m", (X,), (Y,))
        plan.feeds(memoryview(data))
    except Refusal:
        pass
