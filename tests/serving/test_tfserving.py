"""TensorFlow Serving's REST API, with the requests of its documentation."""

import base64
import json

import numpy as np
import pytest
from onnx import TensorProto, helper

from tests.serving import onnx_models
from tests.serving.onnx_models import save, value
from tests.serving.server import Server, request


def half_plus_two(path):
    """y = 0.5 x + 2, float32 [n]: the model of TensorFlow Serving's documentation."""
    nodes = [helper.make_node("Mul", ["x", "a"], ["h"]), helper.make_node("Add", ["h", "b"], ["y"])]
    tensors = [("a", np.float32(0.5)), ("b", np.float32(2))]
    return save(path, nodes, [value("x", TensorProto.FLOAT, ["n"])], [value("y", TensorProto.FLOAT, ["n"])], tensors)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tf")
    models = folder / "models"
    models.mkdir()
    half_plus_two(models / "half_plus_two.onnx")
    onnx_models.scale(models / "scale.onnx", 2.0, width=2)
    onnx_models.pair(models / "pair.onnx")
    onnx_models.identity(models / "text.onnx", TensorProto.STRING)
    onnx_models.identity(models / "half.onnx", TensorProto.FLOAT16)
    onnx_models.identity(models / "brain.onnx", TensorProto.BFLOAT16)
    onnx_models.identity(models / "flag.onnx", TensorProto.BOOL)
    onnx_models.identity(models / "float.onnx", TensorProto.FLOAT)
    made = Server(folder, "run", models, "--socket", folder / "s.sock").start()
    yield made
    assert made.stop() == 0


def ask(server, path, document=None):
    if document is None:
        sent = request("GET", path)
    else:
        sent = request("POST", path, document if isinstance(document, bytes) else json.dumps(document).encode())
    status, _, body = server.raw(sent)
    return status, json.loads(body)


def test_the_documented_example(server):
    assert ask(server, "/v1/models/half_plus_two:predict", {"instances": [1.0, 2.0, 5.0]}) == (
        200,
        {"predictions": [2.5, 3.0, 4.5]},
    )
    for path in ("/v1/models/half_plus_two/versions/1:predict", "/v1/models/half_plus_two/labels/stable:predict"):
        assert ask(server, path, {"signature_name": "serving_default", "instances": [0]}) == (200, {"predictions": [2.0]})


def test_status_and_metadata(server):
    available = {"version": "1", "state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}
    for path in ("/v1/models/half_plus_two", "/v1/models/half_plus_two/versions/1", "/v1/models/half_plus_two/labels/stable"):
        assert ask(server, path) == (200, {"model_version_status": [available]})
    status, document = ask(server, "/v1/models/half_plus_two/metadata")
    assert (status, document["model_spec"]) == (200, {"name": "half_plus_two", "signature_name": "", "version": "1"})
    signature = document["metadata"]["signature_def"]["signature_def"]["serving_default"]
    assert signature["inputs"]["x"]["dtype"] == "DT_FLOAT"
    assert signature["inputs"]["x"]["tensor_shape"]["dim"] == [{"size": "-1", "name": ""}]
    assert signature["method_name"] == "tensorflow/serving/predict"


ROWS = {
    "rows of lists": ("scale", {"instances": [[1, 2], [3, 4]]}, {"predictions": [[2, 4], [6, 8]]}),
    "rows by name": ("scale", {"instances": [{"x": [1, 2]}, {"x": [3, 4]}]}, {"predictions": [[2, 4], [6, 8]]}),
    "a column": ("scale", {"inputs": [[1, 2], [3, 4]]}, {"outputs": [[2, 4], [6, 8]]}),
    "a column by name": ("scale", {"inputs": {"x": [[1, 2]]}}, {"outputs": [[2, 4]]}),
    "two of each, rows": (
        "pair",
        {"instances": [{"a": 5, "b": 1}, {"a": 7, "b": 3}]},
        {"predictions": [{"total": 6, "difference": 4}, {"total": 10, "difference": 4}]},
    ),
    "two of each, columns": (
        "pair",
        {"inputs": {"a": [5, 7], "b": [1, 3]}},
        {"outputs": {"total": [6, 10], "difference": [4, 4]}},
    ),
    "text": ("text", {"instances": ["a", "é"]}, {"predictions": ["a", "é"]}),
    "base64": (
        "text",
        {"instances": [{"b64": "aGk="}, {"x": {"b64": "aGk="}}, {"x": "é"}]},
        {"predictions": ["hi", "hi", "é"]},
    ),
    "a base64 column": ("text", {"inputs": {"x": [{"b64": "aGk="}]}}, {"outputs": ["hi"]}),
    "fp16": ("half", {"instances": [1.5, -2]}, {"predictions": [1.5, -2]}),
    "bf16 is rounded to": ("brain", {"instances": [1.5, 3.14159, 1.00390625]}, {"predictions": [1.5, 3.140625, 1.0]}),
    "flags": ("flag", {"instances": [True, False]}, {"predictions": [True, False]}),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_and_columns(server, name):
    model, document, expected = ROWS[name]
    assert ask(server, f"/v1/models/{model}:predict", document) == (200, expected)


def test_values_that_are_not_finite_are_written_as_tensorflow_does(server):
    status, _, body = server.raw(request("POST", "/v1/models/half_plus_two:predict", b'{"instances": [3e38, -3e38]}'))
    assert status == 200
    status, _, body = server.raw(request("POST", "/v1/models/scale:predict", b'{"instances": [[3e38, -3e38]]}'))
    assert (status, body) == (200, b'{"predictions":[[Infinity,-Infinity]]}')


def test_classify_and_regress(server):
    assert ask(server, "/v1/models/scale:classify", {"examples": [{"x": [1, 2]}, {"x": [3, 4]}]}) == (
        200,
        {"result": [[["0", 2.0], ["1", 4.0]], [["0", 6.0], ["1", 8.0]]]},
    )
    assert ask(server, "/v1/models/half_plus_two:regress", {"examples": [{"x": 1.0}, {"x": 5.0}]}) == (
        200,
        {"result": [2.5, 4.5]},
    )
    assert ask(server, "/v1/models/half_plus_two:regress", {"context": {"x": 2}, "examples": [{}, {"x": 0}]}) == (
        200,
        {"result": [3.0, 2.0]},
    )


WRONG = {
    "neither": ("half_plus_two:predict", {}, 400, "Missing 'inputs' or 'instances' key"),
    "both": ("half_plus_two:predict", {"inputs": [1], "instances": [1]}, 400, "one of the two"),
    "no rows": ("half_plus_two:predict", {"instances": []}, 400, "'instances' is empty"),
    "not JSON": ("half_plus_two:predict", b"{", 400, "JSON Parse error"),
    "NaN in a word": ("half_plus_two:predict", b'{"instances": [NaNa]}', 400, "cannot be read"),
    "deep": ("half_plus_two:predict", b'{"instances": [' + b"[" * 100_000 + b"]" * 100_000 + b"]}", 400, "regular list"),
    "deeper": ("half_plus_two:predict", b'{"instances": {"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}}", 400, "is no list"),
    "rather deep": ("half_plus_two:predict", b'{"inputs": ' + b"[" * 900 + b"]" * 900 + b"}", 400, "regular list|shape"),
    "rather deep text": ("text:predict", b'{"inputs": ' + b"[" * 900 + b"]" * 900 + b"}", 400, "regular list of at most 32 dimensions"),
    "signature": ("half_plus_two:predict", {"signature_name": "other", "instances": [1]}, 400, "Serving signature name"),
    "unknown model": ("none:predict", {"instances": [1]}, 404, "'none' is not found"),
    "unknown version": ("half_plus_two/versions/7:predict", {"instances": [1]}, 404, "version 7 is not found"),
    "unknown label": ("half_plus_two/labels/candidate:predict", {"instances": [1]}, 404, "version candidate is not found"),
    "shape": ("scale:predict", {"instances": [[1, 2, 3]]}, 400, r"Expected \[-1,2\], got \[1,3\]"),
    "ragged": ("scale:predict", {"instances": [[1, 2], [3]]}, 400, "is not a regular list"),
    "text for numbers": ("scale:predict", {"instances": [["a", "b"]]}, 400, "does not fit FP32: expected numbers"),
    "numbers for text": ("text:predict", {"instances": [1]}, 400, "does not fit BYTES: expected strings"),
    "ragged text": ("text:predict", {"inputs": [["a"], "b", "c"]}, 400, "is not a regular list"),
    "not base64": ("text:predict", {"instances": [{"b64": "?"}]}, 400, "is not base64"),
    "names": ("pair:predict", {"instances": [1]}, 400, "has 2 inputs: give each by its name"),
    "another name": ("scale:predict", {"instances": [{"z": 1}]}, 400, "input 'z' is not one of model 'scale'; it takes 'x'"),
    "missing": ("pair:predict", {"inputs": {"a": [1]}}, 400, "input 'b' of model 'pair' is missing"),
    "other names": ("pair:predict", {"instances": [{"a": 1, "b": 2}, {"a": 1}]}, 400, "instance 1 has other inputs"),
    "too large": ("pair:predict", {"inputs": {"a": [2**70], "b": [1]}}, 400, "expected whole numbers|out of range"),
    "no scores": ("half_plus_two:classify", {"examples": [{"x": 1}]}, 400, "no outputs that are a score per class"),
    "no number": ("scale:regress", {"examples": [{"x": [1, 2]}]}, 400, "no outputs that are one number"),
    "no examples": ("half_plus_two:regress", {"examples": []}, 400, "'examples' is empty"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said(server, name):
    path, document, status, text = WRONG[name]
    got, answer = ask(server, f"/v1/models/{path}", document)
    assert got == status, answer
    with pytest.raises(ValueError, match=text):
        raise ValueError(answer["error"])


def test_rows_need_an_output_with_a_row_for_each(serve_files, tmp_path):
    server = serve_files(onnx_models.slow(tmp_path / "slow.onnx", side=4))
    status, answer = ask(server, "/v1/models/slow:predict", {"instances": [1.0]})
    assert (status, "no row for each of 1 instances" in answer["error"]) == (400, True)
    assert ask(server, "/v1/models/slow:predict", {"inputs": [1.0]})[0] == 200


def test_binary_texts_come_back_as_base64(server):
    data = base64.b64encode("ü".encode()).decode()
    assert ask(server, "/v1/models/text:predict", {"instances": [{"b64": data}]}) == (200, {"predictions": ["ü"]})
    status, answer = ask(server, "/v1/models/text:predict", {"instances": [{"b64": base64.b64encode(b"\xff").decode()}]})
    assert (status, "is not UTF-8" in answer["error"]) == (400, True)


def test_what_is_not_finite_comes_and_goes(server):
    """In rows, columns and objects; `null` is what JavaScript makes of it."""
    for body in (b'{"instances": [NaN, 1.5, -Infinity]}', b'{"instances": [{"x": null}, {"x": 1.5}, {"x": -Infinity}]}'):
        status, _, answer = server.raw(request("POST", "/v1/models/float:predict", body))
        assert (status, answer) == (200, b'{"predictions":[NaN,1.5,-Infinity]}')
    status, _, answer = server.raw(request("POST", "/v1/models/float:predict", b'{"inputs": {"x": [Infinity]}}'))
    assert (status, answer) == (200, b'{"outputs":[Infinity]}')


@pytest.mark.parametrize("count", [3, 20_000])
def test_rows_in_every_form_mean_the_same(server, count):
    """However many they are: many are read some at a time."""
    a, b = np.arange(count), np.arange(count) * 2
    rows = [{"a": int(x), "b": int(y)} for x, y in zip(a, b, strict=True)]
    answers = [
        ask(server, "/v1/models/pair:predict", document)
        for document in ({"instances": rows}, {"inputs": {"a": a.tolist(), "b": b.tolist()}})
    ]
    assert [status for status, _ in answers] == [200, 200]
    found, columns = answers[0][1]["predictions"], answers[1][1]["outputs"]
    assert (found if not isinstance(columns, dict) else {n: [row[n] for row in found] for n in columns}) == columns


def test_a_long_text_within_rows(server):
    texts = ["x" * 4_000_000, "é", 'a"b', "x" * 70_000]  # the first of more bytes than rows may have
    rows = [{"x": {"b64": base64.b64encode(text.encode()).decode()}} for text in texts]
    assert ask(server, "/v1/models/text:predict", {"instances": rows}) == (200, {"predictions": texts})
    assert ask(server, "/v1/models/text:predict", {"instances": texts}) == (200, {"predictions": texts})
    encoded = [{"b64": base64.b64encode(text.encode()).decode()} for text in texts]
    assert ask(server, "/v1/models/text:predict", {"inputs": encoded}) == (200, {"outputs": texts})


def test_predictions_are_counted(server):
    before = ask(server, "/v2/models/float/stats")[1]["model_stats"][0]["inference_stats"]
    assert ask(server, "/v1/models/float:predict", {"instances": [1]})[0] == 200
    assert ask(server, "/v1/models/float:predict", {"instances": ["x"]})[0] == 400
    after = ask(server, "/v2/models/float/stats")[1]["model_stats"][0]["inference_stats"]
    assert after["success"]["count"] == before["success"]["count"] + 1
    assert after["fail"]["count"] == before["fail"]["count"] + 1
