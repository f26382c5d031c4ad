"""The protocol's codec: whatever is wrong with a request is said, and what is right comes out as it went in."""

import json
import re
import struct
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.serving.allowance import Allowance
from agent.serving.answers import Answer, FilledTemplate, Refusal
from agent.serving.api import list_pieces, lists, oip_request, oip_response, tensors
from agent.serving.api.pauses import Pauses
from agent.serving.buffers import ALIGNMENT, BufferPool
from agent.serving.models.version import Version
from agent.serving.prediction import refusal
from agent.serving.scheduling.demand import SequenceDemand
from agent.serving.shared.regions import check_fits, check_range, not_found
from runtimes.contract import DATATYPES, DTYPES, TensorSpec

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
    plan = oip_request.read_request(data, length, "m", specs, produces)
    return plan, plan.feeds(data, strays=True)


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
REGION = {"shared_memory_region": "r", "shared_memory_byte_size": 8}

WRONG = {
    "unknown input": ([tensor("z", data=[1, 2])], (), {}, "unexpected inference input 'z' for model 'm'; it takes 'x'"),
    "twice": ([tensor(data=[1, 2]), tensor(data=[1, 2])], (), {}, "input 'x' is given twice"),
    "missing": ([], (), {}, "expected 1 inputs but got 0 inputs for model 'm': 'x' is missing"),
    "datatype": ([tensor(datatype="INT32", data=[1, 2])], (), {}, "has datatype 'INT32'; model 'm' expects 'FP32'"),
    "no datatype of ours": ([tensor(datatype="FP8", parameters=SIZE)], (EIGHT,), {}, "'FP8', which is not a datatype"),
    "rank": ([tensor(shape=(2,), data=[1, 2])], (), {}, "Expected [-1,2], got [2]"),
    "shape": ([tensor(shape=(1, 3), data=[1, 2, 3])], (), {}, "Expected [-1,2], got [1,3]"),
    "negative": ([tensor(shape=(-1, 2), data=[1, 2])], (), {}, "has a negative size"),
    "both": ([tensor(data=[1, 2], parameters=SIZE)], (EIGHT,), {}, "input 'x' sets data and binary_data_size"),
    "none": ([tensor()], (), {}, "input 'x' sets none of them"),
    "too few bytes declared": ([tensor(parameters={"binary_data_size": 4})], (bytes(4),), {}, "expecting 4 additional bytes"),
    "too few bytes": ([tensor(parameters=SIZE)], (bytes(5),), {}, "should have 8 bytes after the JSON, but only 5"),
    "too many bytes": ([tensor(parameters=SIZE)], (bytes(9),), {}, "unexpected additional input data for model 'm': 1 bytes"),
    "negative size": ([tensor(parameters={"binary_data_size": -8})], (), {}, "binary_data_size of 'x' is -8"),
    "true as size": ([tensor(parameters={"binary_data_size": True})], (), {}, "binary_data_size of 'x' is True"),
    "elements": ([tensor(data=[1, 2, 3])], (), {}, "input 'x' has 3 elements, shape [1,2] needs 2"),
    "ragged": ([tensor(shape=(2, 2), data=[[1, 2], [3]])], (), {}, "is not a regular list"),
    "nested otherwise": ([tensor(shape=(2, 2), data=[[1, 2, 3, 4]])], (), {}, "has shape [1,4], but [2,2] is said"),
    "text": ([tensor(data=["a", "b"])], (), {}, "does not fit FP32: expected numbers"),
    "null": (
        [tensor(datatype="INT32", data=[1, None])],
        (),
        {"specs": (TensorSpec("x", "INT32", (1, 2)),)},
        "does not fit INT32",
    ),
    "too large a number": ([tensor(data=[1, 1e300])], (), {}, "does not fit FP32: expected numbers up to"),
    "output": ([tensor(data=[1, 2])], (), {"outputs": [{"name": "q"}]}, "unexpected inference output 'q'"),
    "output twice": ([tensor(data=[1, 2])], (), {"outputs": [{"name": "y"}, {"name": "y"}]}, "asked for twice"),
    "flag": ([tensor(data=[1, 2])], (), {"parameters": {"binary_data_output": 1}}, "'binary_data_output' is 1"),
    "reserved": ([tensor(data=[1, 2])], (), {"parameters": {"triton_x": 1}}, "must not start with 'triton_'"),
    "timeout": ([tensor(data=[1, 2])], (), {"parameters": {"timeout": "1"}}, "parameter 'timeout' is '1'"),
    "huge timeout": ([tensor(data=[1, 2])], (), {"parameters": {"timeout": -(10**50)}}, "'timeout' is a number beyond 64 bits"),
    "priority": ([tensor(data=[1, 2])], (), {"parameters": {"priority": -1}}, "parameter 'priority' is -1"),
    "sequence": ([tensor(data=[1, 2])], (), {"parameters": {"sequence_id": 1.5}}, "parameter 'sequence_id' is 1.5"),
    "sequence number": ([tensor(data=[1, 2])], (), {"parameters": {"sequence_id": 2**64}}, "expected a number from 0 to"),
    "sequence text": ([tensor(data=[1, 2])], (), {"parameters": {"sequence_id": "a" * 129}}, "longer than 128 characters"),
    "sequence start": (
        [tensor(data=[1, 2])],
        (),
        {"parameters": {"sequence_id": 1, "sequence_start": 1}},
        "'sequence_start' is 1",
    ),
    "region and data": ([tensor(data=[1, 2], parameters=REGION)], (), {}, "sets data and shared_memory_region"),
    "region without size": ([tensor(parameters={"shared_memory_region": "r"})], (), {}, "and no shared_memory_byte_size"),
    "region of another size": (
        [tensor(parameters={**REGION, "shared_memory_byte_size": 9})],
        (),
        {},
        "expecting -1 additional",
    ),
    "region offset": ([tensor(parameters={**REGION, "shared_memory_offset": -1})], (), {}, "shared_memory_offset of 'x' is -1"),
    "region name": ([tensor(parameters={**REGION, "shared_memory_region": 5})], (), {}, "shared_memory_region of 'x' is 5"),
    "classification": (
        [tensor(data=[1, 2])],
        (),
        {"outputs": [{"name": "y", "parameters": {"classification": "3"}}]},
        "classification of 'y' is '3'",
    ),
    "a parameter that is a list": ([tensor(data=[1, 2])], (), {"parameters": {"a": []}}, "$.parameters"),
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
        ("INT32", [1.0, 2], "expected whole numbers without a decimal point"),
        ("INT32", [1e3, 2], "expected whole numbers without a decimal point"),
        ("INT64", [2**63, 0], "expected whole numbers from -9223372036854775808 to"),
        ("UINT32", [2**32, 0], "expected whole numbers from 0 to 4294967295"),
        ("UINT64", [-1, 2**63], "expected whole numbers from 0 to 18446744073709551615"),
        ("FP32", [3.5e38, 0], "expected numbers up to 3.40282e+38"),
        ("FP64", [10**400, 0], "expected numbers up to 1.79769e+308"),
        ("FP32", [True, 1], "expected numbers"),
        ("FP32", [[1], 2], "is not a regular list"),
        ("BOOL", [1, 2], "expected true or false"),
        ("BOOL", [1.0, 0], "expected true or false"),
        ("BYTES", ["a", "\ud800"], "half of a surrogate pair"),
        ("BYTES", [1, 2], "expected strings"),
        ("FP16", [1, 2], "receiving FP16 data via JSON is not supported. Please use the binary data format for input v"),
        ("UINT64", [2**64, 0], "expected whole numbers"),
    ],
)
def test_json_values_that_do_not_fit_the_datatype(datatype, data, text):
    with pytest.raises(Refusal, match=re.escape(text)):
        read([tensor("v", (2,), datatype, data=data)], specs=(TensorSpec("v", datatype, (2,)),))


WORLD = {
    "NaN and infinities, as Python, Triton and TensorFlow Serving write them": ("FP32", "[NaN, Infinity, -Infinity, -0.0]", [np.nan, np.inf, -np.inf, -0.0]),
    "null, as JavaScript writes all three": ("FP64", "[null, 1e21, 1.5e-7]", [np.nan, 1e21, 1.5e-7]),
    "whole numbers for floats": ("FP32", "[1, 0, -3]", [1, 0, -3]),
    "more digits than 64 bits": ("FP64", f"[{10**30}, {-(10**300)}]", [1e30, -1e300]),
    "digits without end": ("FP64", f"[0.{'1' * 5000}, 1{'0' * 200}]", [0.1111111111111111, 1e200]),
    "around 2**63": ("UINT64", f"[1, {2**63 - 1}, {2**63}, {2**64 - 1}]", [1, 2**63 - 1, 2**63, 2**64 - 1]),
    "the ends of INT64": ("INT64", f"[{-(2**63)}, {2**63 - 1}]", [-(2**63), 2**63 - 1]),
    "truth as numbers": ("BOOL", "[1, 0, true, false]", [True, False, True, False]),
    "text with escapes": ("BYTES", r'["\ud83d\ude00", "\u00e9\n", "[\"]", "\\"]', ["😀".encode(), "é\n".encode(), b'["]', b"\\"]),
}  # fmt: skip


@pytest.mark.parametrize("name", WORLD)
@pytest.mark.parametrize("filler", [0, 9000], ids=["short", "long"])
def test_json_that_the_world_writes(name, filler):
    """Whether it is short and read whole, or long and read in pieces."""
    datatype, text, expected = WORLD[name]
    more = {"BYTES": '"a"', "BOOL": "true"}.get(datatype, "1")
    text = "[" + f"{more}," * filler + text[1:]
    size = len(expected) + filler
    request = f'{{"inputs":[{{"name":"v","shape":[{size}],"datatype":"{datatype}","data":{text}}}]}}'.encode()
    plan = oip_request.read_request(memoryview(request), None, "m", (TensorSpec("v", datatype, (-1,)),), (Y,))
    found = plan.feeds(memoryview(request))["v"]
    assert found.dtype == DTYPES[datatype]
    if datatype == "BYTES":
        assert found.tolist()[filler:] == expected
    else:
        assert np.array_equal(found[filler:], np.array(expected, found.dtype), equal_nan=datatype.startswith("FP"))


@pytest.mark.parametrize(
    ("shape", "data"),
    [((2, 0), [[], []]), ((2, 0), []), ((0, 3), []), ((2, 0, 3), [[], []]), ((2, 2, 0), [[[], []], [[], []]]), ((9000, 0), [[]] * 9000)],
)  # fmt: skip
def test_what_numpy_makes_of_empty_arrays(shape, data):
    _, feeds = read([tensor("v", shape, "INT8", data=data)], specs=(TensorSpec("v", "INT8", (-1,) * len(shape)),))
    assert feeds["v"].shape == shape


@pytest.mark.parametrize(
    ("shape", "data"),
    [((2, 0), [[], [], []]), ((0, 3), [[]]), ((2, 0), [[[]], [[]]]), ((9001, 0), [[]] * 9000), ((2, 0), [[[]] * 9000])],
)
def test_an_empty_list_of_another_shape(shape, data):
    with pytest.raises(Refusal):
        read([tensor("v", shape, "INT8", data=data)], specs=(TensorSpec("v", "INT8", (-1,) * len(shape)),))


VALUES = {
    "INT8": st.integers(-9, 300) | st.floats(),
    "FP32": st.integers() | st.floats(width=32) | st.none(),
    "BOOL": st.booleans() | st.integers(0, 2),
    "BYTES": st.text('a"\\[],é', max_size=4) | st.text("x", min_size=70, max_size=90),
}


def innermost(lists):
    return [lists] if not isinstance(lists[0], list) else [row for inner in lists for row in innermost(inner)]


@pytest.mark.no_cover  # it would take two or three times as long
@settings(max_examples=400, deadline=None)
@given(st.data())
def test_a_long_list_is_read_as_a_short_one(data):
    """However it is cut into pieces, whatever is wrong with it: the same array, or refused both times."""
    datatype = data.draw(st.sampled_from(list(VALUES)))
    shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    count = int(np.prod(shape))
    values = np.array([*data.draw(st.lists(VALUES[datatype], min_size=count, max_size=count)), None], object)[:-1]
    nested = values.reshape(shape).tolist()
    rows = innermost(nested)
    if len(rows) > 1 and data.draw(st.booleans()):  # an element moves to another list; the brackets are as many
        rows[-1].append(rows[0].pop())
    text = bytearray(json.dumps(nested, indent=data.draw(st.sampled_from([None, 1]))).encode())
    if data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(text) - 1))
        end = at + data.draw(st.integers(0, 1))
        text[at:end] = data.draw(st.sampled_from([b"", b"[", b"]", b",", b'"', b"\\", b"0", b" "]))
    said = data.draw(st.sampled_from([tuple(shape), None]))
    size = data.draw(st.integers(1, 60))

    class Steady(Pauses):
        def rest(self):
            self.size = size

    def outcome(short_bytes):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lists, "SHORT_BYTES", short_bytes)
            patch.setattr(list_pieces, "WINDOW", 64)
            patch.setattr(list_pieces, "LONGEST", 256)
            patch.setattr(lists, "Pauses", Steady)
            try:
                found = lists.read("x", bytes(text), datatype, said)
            except Refusal:
                return None
            return found.shape, found.tobytes() if datatype != "BYTES" else found.tolist()

    assert outcome(0) == outcome(1 << 20)


class Memory:
    """Regions as plain bytes."""

    def __init__(self, **regions):
        self.regions = {name: bytearray(data) for name, data in regions.items()}

    def view(self, name, offset, size):
        if name not in self.regions:
            raise not_found(name)
        check_range(name, offset, size, len(self.regions[name]))
        return memoryview(self.regions[name])[offset : offset + size]

    def check(self, name, offset, size):
        self.view(name, offset, size)

    def keep(self, key, made, names):
        self.kept = (key, made, names)

    def recall(self, key):
        return None

    def store(self, name, offset, size, data):
        data = bytes(data)
        check_fits(name, len(data), size)
        self.view(name, offset, size)[: len(data)] = data


def test_shared_memory_is_refused_as_unsupported_where_none_is_offered():
    for parameters in (
        {"inputs": [tensor(parameters=REGION)]},
        {"inputs": [tensor(data=[1, 2])], "outputs": [{"name": "y", "parameters": REGION}]},
    ):
        with pytest.raises(Refusal) as refused:
            read(**parameters)
        assert refused.value.status == 501


def test_tensors_in_shared_memory_come_and_go_there():
    x = np.array([[1.5, 2]], np.float32)
    memory = Memory(a=bytes(3) + x.tobytes(), b=bytes(20))
    given_tensor = tensor(parameters={"shared_memory_region": "a", "shared_memory_byte_size": 8, "shared_memory_offset": 3})
    wanted = {
        "name": "y",
        "parameters": {"shared_memory_region": "b", "shared_memory_byte_size": 12, "shared_memory_offset": 8},
    }
    data, length = body([given_tensor], outputs=[wanted])
    plan = oip_request.read_request(data, length, "m", (X,), (Y,))
    feeds = plan.feeds(data, memory)
    assert np.array_equal(feeds["x"], x)
    assert feeds["x"].size == 0 or feeds["x"].ctypes.data % ALIGNMENT == 0
    answer = oip_response.write_response(plan, [2 * x], "m", "1", {}, memory)
    assert memory.regions["b"] == bytes(8) + (2 * x).tobytes() + bytes(4)
    used = {"shared_memory_region": "b", "shared_memory_byte_size": 8}
    assert json.loads(answer.parts[0])["outputs"] == [{"name": "y", "datatype": "FP32", "shape": [1, 2], "parameters": used}]
    with pytest.raises(Refusal, match="does not fit the 12 bytes"):
        oip_response.write_response(plan, [np.zeros((2, 2), np.float32)], "m", "1", {}, memory)


def test_a_region_for_an_output_is_looked_for_before_the_run():
    data, length = body([tensor(data=[1, 2])], outputs=[{"name": "y", "parameters": REGION}])
    plan = oip_request.read_request(data, length, "m", (X,), (Y,))
    with pytest.raises(Refusal, match="Unable to find shared memory region: 'r'"):
        plan.feeds(data, Memory())
    with pytest.raises(Refusal, match="Invalid offset"):
        plan.feeds(data, Memory(r=b"1234567"))


def test_checked_values_in_shared_memory_cannot_change_after_the_check():
    spec = TensorSpec("b", "BOOL", (2,))
    memory = Memory(r=b"\0\1")
    data, length = body([tensor("b", (2,), "BOOL", parameters={"shared_memory_region": "r", "shared_memory_byte_size": 2})])
    feeds = oip_request.read_request(data, length, "m", (spec,), (Y,)).feeds(data, memory)
    memory.regions["r"][:] = b"\2\2"
    assert feeds["b"].tolist() == [False, True]


def classify(array, count, spec=None, labels=None, **parameters):
    array = np.asarray(array)
    spec = spec or TensorSpec("y", DATATYPES[array.dtype], array.shape)
    wanted = {"name": "y", "parameters": {"classification": count, **parameters}}
    plan, _ = read([tensor(data=[1, 2])], produces=(spec,), outputs=[wanted])
    return oip_response.write_response(plan, [array], "m", "1", labels or {})


CLASSES = {
    "one set": (np.array([0.1, 0.7, 0.2], np.float32), 2, [2], ["0.7:1", "0.2:2"]),
    "a batch": (np.array([[1, 2], [4, 3]], np.int64), 1, [2, 1], ["2:1", "4:0"]),
    "more than there are": (np.array([[1, 2]], np.uint8), 9, [1, 2], ["2:1", "1:0"]),
    "equal ones": (np.array([5, 7, 7, 5], np.uint8), 4, [4], ["7:1", "7:2", "5:0", "5:3"]),
    "beyond float": (np.array([2**53, 2**53 + 1]), 1, [1], [f"{2**53 + 1}:1"]),
    "nan": (np.array([np.nan, 1], np.float16), 2, [2], ["1.0:1", "nan:0"]),
    "a picture each": (np.array([[[1, 2], [3, 0]]], np.uint16), 2, [1, 2], ["3:2", "2:1"]),
    "a scalar": (np.array(3.5), 1, [1], ["3.5:0"]),
    "nothing": (np.zeros((2, 0), np.float32), 3, [2, 0], []),
}


@pytest.mark.parametrize("name", CLASSES)
def test_the_best_classes_of_an_output(name):
    array, count, shape, expected = CLASSES[name]
    (output,) = json.loads(parts_of(classify(array, count))[0])["outputs"]
    assert output == {"name": "y", "datatype": "BYTES", "shape": shape, "data": expected}


def test_classes_have_labels_where_the_release_names_them():
    labels = {"y": ("zero", "one:1", "zwei")}
    answer = classify(np.array([[1, 3, 2, 9]], np.float32), 3, labels=labels, binary_data=True)
    assert tensors.read_bytes("y", memoryview(answer.parts[1]), (1, 3)).tolist() == [[b"9.0:3", b"3.0:1:one:1", b"2.0:2:zwei"]]


def test_bf16_is_classified_by_value():
    bits = (np.array([-1.5, 2.5, -0.25], np.float32).view(np.uint32) >> 16).astype(np.uint16)
    (output,) = json.loads(parts_of(classify(bits, 3, TensorSpec("y", "BF16", (3,))))[0])["outputs"]
    assert output["data"] == ["2.5:1", "-0.25:2", "-1.5:0"]


def test_text_is_not_classified():
    with pytest.raises(Refusal, match="output 'y' is BYTES: classification is for numbers"):
        classify(np.array([b"a"], np.object_), 1, TensorSpec("y", "BYTES", (1,)))


GOOD = '{"inputs":[{"name":"x","shape":[1,2],"datatype":"FP32","data":%s}]%s}'
HOSTILE = {
    "a key twice": (GOOD % ("[1,2]", ',"id":"a","id":"b"'), "key 'id' stands twice"),
    "inputs twice": ('{"inputs":[],' + (GOOD % ("[1,2]", ""))[1:], "key 'inputs' stands twice"),
    "data twice": (GOOD % ('[1,2],"data":[3,4]', ""), "key 'data' stands twice"),
    "a long tensor twice": (GOOD.replace("[1,2]", "[500,2]") % (f'{[0] * 1000},"data":{[0] * 1000}', ""), "stands twice"),
    "a parameter twice": (GOOD % ("[1,2]", ',"parameters":{"a":1,"\\u0061":2}'), "key 'a' stands twice"),
    "in what nobody reads": (GOOD % ("[1,2]", ',"extra":{"b":{"c":1,"c":1}}'), "key 'c' stands twice"),
    "NaN somewhere": (GOOD % ("[1,2]", ',"id":NaN'), "the body is not an inference request"),
    "NaN in a word": (GOOD % ("[NaNa,2]", ""), "cannot be read"),
    "1e400": (GOOD % ("[1e400,2]", ""), "does not fit FP32: expected numbers up to"),
    "a huge integer": (GOOD % ("[" + "9" * 4000 + ",2]", ""), "does not fit FP32: expected numbers"),
    "a larger one": (GOOD % ("[" + "9" * 3_000_000 + ",2]", ""), "goes on for more than"),
    "a lone surrogate": (GOOD % ("[1,2]", ',"id":"\\ud800"'), "half of a surrogate pair"),
    "not UTF-8": ((GOOD % ("[1,2]", ',"id":"?"')).encode().replace(b"?", b"\xff"), "the body is not an inference request"),
    "deep data": (GOOD % ("[" * 200_000 + "]" * 200_000, ""), "is not a regular list"),
    "deep something": (GOOD % ("[1,2]", ',"extra":' + "[" * 100_000 + "]" * 100_000), "recursion"),
    "deep objects": (GOOD % ("[1,2]", ',"extra":' + '{"a":' * 200_000 + "1" + "}" * 200_000), "besides the tensors' data"),
    "rather deep objects": (GOOD % ("[1,2]", ',"extra":' + '{"a":' * 20_000 + "1" + "}" * 20_000), "recursion"),
    "a list that does not end": ('{"inputs":[{"data":[' + "1," * 100_000, "does not end"),
    "a string that does not end": (GOOD % ('["' + "a" * 100_000, ""), "does not end"),
    "many parameters": (GOOD % ("[1,2]", ',"parameters":{' + ",".join(f'"{n}":1' for n in range(50_000)) + "}"), "besides the tensors' data"),
    "unread lists": (GOOD % ("[1,2]", ',"extra":[' + "0," * 200_000 + "0]"), "besides the tensors' data"),
    "an unread list that is none": (GOOD % ("[1,2]", ',"extra":[' + "0,,0," * 20_000 + "0]"), "cannot be read"),
    "many unread bytes": (GOOD % ("[1,2]", ',"extra":[' + "{}," * 700_000 + '{"a":1}]'), "besides the tensors' data"),
    "more than the shape": (GOOD % ("[" + "0," * 1_000_000 + "0]", ""), "has more elements than shape [1,2]"),
}  # fmt: skip


@pytest.mark.alone  # it measures
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_json_is_refused_soon(name):
    text, said = HOSTILE[name]
    data = memoryview(text if isinstance(text, bytes) else text.encode())
    started = time.process_time()
    with pytest.raises(Refusal, match=re.escape(said)) as refused:
        oip_request.read_request(data, None, "m", (TensorSpec("x", "FP32", (-1, 2)),), (Y,))
    assert refused.value.status == 400
    assert len(str(refused.value)) < 400
    assert time.process_time() - started < 2.0


def test_colons_in_text_are_not_keys():
    spec = TensorSpec("s", "BYTES", (2,))
    _, feeds = read([tensor("s", (2,), "BYTES", data=["a:b::", '":"'])], specs=(spec,), id="1:2:3:4")
    assert feeds["s"].tolist() == [b"a:b::", b'":"']


def test_priority_sequence_and_what_is_not_ours_pass():
    parameters = {
        "priority": 3,
        "timeout": 5000,
        "sequence_id": "s",
        "sequence_start": True,
        "custom": "x",
        "more": 1.5,
        "b": None,
    }
    plan, _ = read([tensor(data=[1, 2])], parameters=parameters)
    assert (plan.priority, plan.timeout_s, plan.sequence) == (3, 0.005, SequenceDemand("s", start=True))
    for nothing in (0, ""):
        assert read([tensor(data=[1, 2])], parameters={"sequence_id": nothing})[0].sequence is None


@pytest.mark.alone  # each example has a deadline
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
    assert feeds["x"].size == 0 or feeds["x"].ctypes.data % ALIGNMENT == 0
    head, *sent = parts_of(oip_response.write_response(plan, [array], "m", "1"))
    assert b"".join(sent) == array.tobytes()
    assert json.loads(head)["outputs"] == [{"name": "x", "datatype": datatype, "shape": list(shape), "parameters": parameters}]


@pytest.mark.alone  # each example has a deadline
@given(st.lists(st.binary(max_size=20), max_size=5))
def test_byte_elements_go_through_binary_unchanged(elements):
    spec = TensorSpec("s", "BYTES", (-1,))
    packed = b"".join(struct.pack("<I", len(e)) + e for e in elements)
    given_tensor = tensor("s", (len(elements),), "BYTES", parameters={"binary_data_size": len(packed)})
    plan, feeds = read([given_tensor], packed, specs=(spec,), produces=(spec,), parameters={"binary_data_output": True})
    assert list(feeds["s"]) == elements
    _, *rest = parts_of(oip_response.write_response(plan, [feeds["s"]], "m", "1"))
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
    answer = oip_response.write_response(plan, [np.array([[1.5, 2]], np.float32)], "m", "3")
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
    answer = oip_response.write_response(plan, [np.array([1, 2], np.int8), np.zeros((1, 2), np.float32)], "m", "1")
    document = json.loads(parts_of(answer)[0])
    assert document["outputs"][0]["parameters"] == {"binary_data_size": 2}
    assert document["outputs"][1]["data"] == [0, 0]


def test_a_template_stands_for_answers_of_the_same_shapes_only():
    parameters = {"binary_data_output": True}
    plan, _ = read([tensor(data=[1, 2])], parameters=parameters)
    plan.values.clear()
    first = oip_response.write_response(plan, [np.zeros((1, 2), np.float32)], "m", "1")
    second = oip_response.write_response(plan, [np.ones((1, 2), np.float32)], "m", "1")
    other = oip_response.write_response(plan, [np.ones((3, 2), np.float32)], "m", "1")
    assert (type(first), type(second), type(other)) == (Answer, FilledTemplate, Answer)
    assert parts_of(first)[0] == parts_of(second)[0]
    assert json.loads(parts_of(other)[0])["outputs"][0]["shape"] == [3, 2]


@pytest.mark.parametrize("count", [4, 5000])
def test_what_is_not_finite_is_written_as_triton_writes_it(count):
    plan, _ = read([tensor(data=[1, 2])])
    array = np.full((count // 4, 4), 0.5, np.float32)
    array[-1] = [np.nan, np.inf, -np.inf, 1]
    (text,) = parts_of(oip_response.write_response(plan, [array], "m", "1"))
    assert text.endswith(b"NaN,Infinity,-Infinity,1.0]}]}")
    assert np.array_equal(np.array(json.loads(text)["outputs"][0]["data"], np.float32), array.reshape(-1), equal_nan=True)


def test_an_answer_that_json_cannot_say_is_not_the_callers_mistake():
    plan, _ = read([tensor(data=[1, 2])], produces=(TensorSpec("y", "BYTES", (1,)),))
    with pytest.raises(Refusal, match="output 'y' is not UTF-8 text") as refused:
        oip_response.write_response(plan, [np.array([b"\xff"], np.object_)], "m", "1")
    version = Version("m", 1, "cpu", "", "onnx")
    assert refusal(version, refused.value).status == 500
    assert version.stats.failures == {"invalid": 0, "run": 1, "unavailable": 0}, "a watch is to see it"


def test_an_output_that_json_never_says_is_refused_before_the_run():
    for fields in ({}, {"outputs": [{"name": "y", "parameters": {"binary_data": False}}]}):
        with pytest.raises(Refusal, match="sending FP16 data via JSON is not supported") as refused:
            read([tensor(data=[1, 2])], produces=(TensorSpec("y", "FP16", (1,)),), **fields)
        assert refused.value.status == 400


LARGE = {
    "BYTES": ([tensor("s", (300_000,), "BYTES", parameters={"binary_data_size": 1_200_000})], bytes(1_200_000), "BYTES", 1),
    "strings": ([tensor("s", (300_000,), "BYTES", data=[""] * 300_000)], b"", "BYTES", 1),
}


@pytest.mark.parametrize("name", LARGE)
def test_what_a_body_becomes_has_a_bound(name):
    inputs, part, datatype, rank = LARGE[name]
    with pytest.raises(Refusal, match="of memory, of which") as refused:
        read(inputs, part, specs=(TensorSpec("s", datatype, (-1,) * rank),))
    assert refused.value.status == 413


def test_one_digit_for_eight_bytes_is_too_much_of_a_large_body():
    count = 3_000_000
    with pytest.raises(Refusal, match="of memory, of which") as refused:
        lists.read("x", b"[" + b"0," * (count - 1) + b"0]", "INT64", (count,))
    assert refused.value.status == 413


def test_what_a_body_becomes_is_charged_to_the_pool():
    pool = BufferPool(4_000_000)
    data, _ = body([tensor("s", (20_000,), "BYTES", data=["ab"] * 20_000)])

    def ask():
        allowance = Allowance(pool, len(data))
        oip_request.read_request(data, None, "m", (TensorSpec("s", "BYTES", (-1,)),), (Y,), allowance=allowance)
        return allowance

    one = ask()
    with pytest.raises(Refusal, match="too many large requests at once") as refused:
        ask()
    assert refused.value.status == 503
    one.end()
    ask().end()
    pool.charge(4_000_000)  # all of it is there again


@pytest.mark.parametrize(
    ("shape", "size", "expected"),
    [((1, 2), 8, (1, 2)), ((-1, 2), 24, (3, 2)), ((-1, -1), 12, (1, 3)), ((), 4, ())],
)
def test_a_raw_body_is_the_only_input(shape, size, expected):
    data = memoryview(np.arange(size // 4, dtype=np.float32).tobytes())
    plan = oip_request.read_request(data, 0, "m", (TensorSpec("x", "FP32", shape),), (Y,))
    assert plan.feeds(data)["x"].shape == expected
    assert plan.binary == (True,)


@pytest.mark.parametrize(
    ("specs", "size", "text"),
    [((X, N), 8, "has 2"), ((X,), 7, "7 bytes do not make"), ((TensorSpec("x", "FP32", (2, -1, -1)),), 8, "cannot be told")],
)
def test_a_raw_body_that_does_not_fit(specs, size, text):
    with pytest.raises(Refusal, match=text):
        oip_request.read_request(memoryview(bytes(size)), 0, "m", specs, (Y,))


@pytest.mark.alone  # each example has a deadline
@given(st.binary(max_size=200), st.integers(0, 220))
def test_no_bytes_break_the_reader(data, length):
    """Whatever the body is, it is read or refused; nothing else is raised."""
    try:
        plan = oip_request.read_request(memoryview(data), min(length, len(data)), "m", (X,), (Y,))
        plan.feeds(memoryview(data))
    except Refusal:
        pass
