"""Tries whether a runtime keeps the contract, for the tests of a runtime in a package of its own: see
docs/how-to/add-a-runtime.md.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from runtimes.contract import CONTRACT_VERSION, DTYPES, Array, InputInvalid, LoadOptions, Model, ModelInvalid, Runtime

THREADS = 4
RUNS = 32


class Broken(AssertionError):
    """The runtime breaks its contract. The message says where."""


def check(runtime: Runtime, path: Path, feeds: Mapping[str, Array], expected: Mapping[str, Array]) -> None:
    """Loads the model at `path`, runs it with `feeds` in every way the agent does, and looks for what the agent could not live
    with.

    `expected` has every output for `feeds`, bit for bit.  Raises: Broken.
    """
    _require(
        runtime.contract_version == CONTRACT_VERSION, f"contract_version is {runtime.contract_version}, not {CONTRACT_VERSION}"
    )
    _require(bool(runtime.name), "name is empty")
    _require(path.suffix in runtime.suffixes, f"suffixes {runtime.suffixes} lack {path.suffix!r}")
    _require(bool(runtime.version()), "version() is empty")
    _refuses_what_is_no_model(runtime, path)
    model = runtime.load(path, LoadOptions())
    try:
        _describes(model)
        _answers(model, feeds, expected)
        _refuses_wrong_inputs(model, feeds)
        with ThreadPoolExecutor(THREADS) as pool:
            for answer in pool.map(lambda _: model.run(feeds), range(RUNS)):
                _same(answer, list(expected.values()), "several threads at once")
    finally:
        model.close()


def _require(kept: bool, otherwise: str) -> None:
    if not kept:
        raise Broken(otherwise)


def _refuses_what_is_no_model(runtime: Runtime, path: Path) -> None:
    whole = path.read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        wrong = Path(folder) / path.name
        for what, data in {"an empty file": b"", "half of a file": whole[: len(whole) // 2], "zeros": bytes(64)}.items():
            wrong.write_bytes(data)
            try:
                runtime.load(wrong, LoadOptions()).close()
            except ModelInvalid:
                continue
            except Exception as error:
                raise Broken(f"load() of {what} raised {type(error).__name__} instead of ModelInvalid: {error}") from error
            raise Broken(f"load() took {what} for a model")


def _describes(model: Model) -> None:
    _require(bool(model.outputs), "the model has no outputs")
    for spec in (*model.inputs, *model.outputs):
        _require(spec.datatype in DTYPES, f"tensor {spec.name!r} has the unknown datatype {spec.datatype!r}")
        _require(all(size >= -1 for size in spec.shape), f"tensor {spec.name!r} has the shape {spec.shape}; a free size is -1")
    for kind, specs in (("inputs", model.inputs), ("outputs", model.outputs)):
        _require(len({spec.name for spec in specs}) == len(specs), f"two {kind} have one name")
    _require(bool(model.placement.actual), "placement says not what the model runs on")


def _answers(model: Model, feeds: Mapping[str, Array], expected: Mapping[str, Array]) -> None:
    names = [spec.name for spec in model.outputs]
    _require(set(names) == set(expected), f"outputs are {names}, expected {sorted(expected)}")
    whole = model.run(feeds)
    _same(whole, [expected[name] for name in names], "all outputs")
    for spec, array in zip(model.outputs, whole, strict=True):
        _require(array.dtype == spec.dtype, f"output {spec.name!r} came as {array.dtype}, said to be {spec.datatype}")
        _require(spec.fits(array.shape), f"output {spec.name!r} came in shape {array.shape}, said to be {spec.shape}")
    turned = names[::-1]
    _same(model.run(feeds, turned), [expected[name] for name in turned], f"outputs {turned}")
    before = [np.array(array) for array in whole]
    model.run({name: np.zeros_like(array) for name, array in feeds.items()})
    _same(whole, before, "an answer after the next run: arrays belong to the caller")


def _refuses_wrong_inputs(model: Model, feeds: Mapping[str, Array]) -> None:
    name, array = next(iter(feeds.items()))
    other = np.float64 if array.dtype != np.float64 else np.float32
    for what, wrong in {
        "a missing input": {key: value for key, value in feeds.items() if key != name},
        "a datatype": {**feeds, name: np.zeros(array.shape, other)},
        "a dimension more": {**feeds, name: np.asarray(array[np.newaxis], order="C")},
    }.items():
        try:
            model.run(wrong)
        except InputInvalid:
            continue
        except Exception as error:
            raise Broken(f"run() with {what} wrong raised {type(error).__name__} instead of InputInvalid: {error}") from error
        raise Broken(f"run() took {what} that does not fit")


def _same(answer: list[Array], expected: list[Array], when: str) -> None:
    same = len(answer) == len(expected) and all(
        one.shape == other.shape and one.dtype == other.dtype and one.tobytes() == other.tobytes()
        for one, other in zip(answer, expected, strict=True)
    )
    _require(same, f"wrong answer ({when})")
