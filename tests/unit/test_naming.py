"""Which tensor a name means, asked with and without a signature."""

import pytest

from runtimes.contract import Signature, TensorSpec
from runtimes.naming import Interfaces


def spec(name, **how):
    return TensorSpec(name, "FP32", (1,), **how)


X, Y, Z, OUT = spec("x"), spec("y"), spec("z", optional=True), spec("out")
# The default signature calls the two inputs by each other's names.
SWAPPED = Signature("main", {"y": X, "x": Y, "third": Z}, {"result": OUT})
OTHER = Signature("other", {"x": spec("other/x")}, {"result": spec("other/result")})
NAMES = Interfaces((X, Y, Z), (OUT,), (SWAPPED, OTHER))


@pytest.mark.parametrize(
    ("signature", "name", "tensor"),
    [
        ("", "x", "x"), ("", "y", "y"), ("", "third", "z"), ("", "z", "z"),
        ("main", "x", "y"), ("main", "y", "x"), ("main", "third", "z"), ("main", "z", "z"),
        ("other", "x", "other/x"), ("other", "y", None), ("", "other/x", None),
    ],
)  # fmt: skip
def test_a_name_means_one_tensor(signature, name, tensor):
    inputs = NAMES.find(signature).inputs
    assert (inputs[name].name if name in inputs else None) == tensor


def test_what_is_told_has_the_names_that_belong_to_it():
    assert [s.name for s in NAMES.plain.said_inputs] == ["x", "y", "z"]
    assert [s.name for s in NAMES.find("main").said_inputs] == ["y", "x", "third"]
    assert [s.name for s in NAMES.find("other").required] == ["x"]
    assert [s.name for s in NAMES.find("main").required] == ["y", "x"]
    assert (NAMES.plain.asked, NAMES.find("main").asked, NAMES.find("other").asked) == (None, ["out"], ["other/result"])
    assert NAMES.default is NAMES.find("main")


def test_a_model_without_signatures_has_tensorflows():
    plain = Interfaces((X,), (OUT,))
    assert plain.find("serving_default") is plain.find("") is plain.default
    for unknown in ("main", "serving"):
        with pytest.raises(KeyError):
            plain.find(unknown)
    with pytest.raises(KeyError):
        NAMES.find("serving_default")


def test_the_inputs_that_go_with_a_runs_names():
    assert [s.name for s in NAMES.inputs_for(["x", "y"])] == ["x", "y", "z"]
    assert [s.name for s in NAMES.inputs_for(["other/x"])] == ["other/x"]
    assert [s.name for s in NAMES.inputs_for(["nothing"])] == ["x", "y", "z"]


@pytest.mark.parametrize("known", ["out", "result"])
def test_labels_are_found_under_every_name(known):
    assert NAMES.by_every_name({known: "labels"}) == {"out": "labels", "result": "labels"}
    assert NAMES.by_every_name({"nothing": "labels"}) == {"nothing": "labels"}
