"""Models go all the way with the real programs: published, tried, served, and answered the same by a process of their own; each with the
right answer or the right refusal, while an app asks another model all the time and notices nothing.
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto

from agent.client import ClientError
from tests.e2e.chain import MODEL, Case, Chain, Offer
from tests.serving import onnx_models, tflite_models
from tests.serving.test_shared_models import CARRIED_STATE, DATATYPES, MODELS, arrays, name_of, tolerance

pytestmark = [pytest.mark.long, pytest.mark.mosquitto, pytest.mark.timeout(240)]
LOAD_S, RUN_S, TRIAL_S = 8.0, 2.0, 4.0
ONE, LEAST = np.float32([1]), np.int32([-(2**31)])
A, B = np.float32([5, 5, 5]), np.float32([1, 2, 3])
X2, X4 = np.float32([[1, 2], [3, 4]]), np.float32([[1, 2, 3, 4], [5, -5, 7, 1]])


@dataclass(frozen=True)
class Kind:
    """`refused` is by which reason, and what it says. `harm` is a request that would hang or kill, and what its caller is told."""

    name: str
    make: Callable[[Path], Path]
    cases: Sequence[Case] = ()
    refused: tuple[str, str] | None = None
    harm: tuple[Mapping[str, Any], str] | None = None
    serving: Mapping[str, Any] = field(default_factory=dict)
    suffix: str = ".onnx"
    on: str = ""  # the only processor where it is so

    @property
    def is_here(self) -> bool:
        return self.on in ("", platform.machine())


def scattered(path: Path) -> Path:
    return onnx_models.scattered(path, (1, 2, 4))


def one_is_missing(path: Path) -> Path:
    scattered(path)
    (path.parent / "weights.bin").unlink()
    return path


def text(path: Path) -> Path:
    return onnx_models.identity(path, TensorProto.STRING, ())


def of_any_rank(path: Path) -> Path:
    return onnx_models.identity(path, TensorProto.FLOAT, None)


def endless(path: Path) -> Path:
    return onnx_models.loops(path, "endless")


def endless_on_zeros(path: Path) -> Path:
    return onnx_models.loops(path, "zeros")


def counts_for_ever(path: Path) -> Path:
    return tflite_models.counts(path, "same")


def nameless(path: Path) -> Path:
    return tflite_models.nameless(path, signed=False)


SIGNED = [
    Case({"x": X2}, {"y": 2 * X2}, signature="encode"),
    Case({"a": A, "b": B}, {"sum": A + B, "difference": A - B}, signature="decode"),
]
WORD = np.array(b"any", "S")
KINDS = [
    Kind("signatures", tflite_models.coder, SIGNED, suffix=".tflite"),
    Kind("no-names", tflite_models.nameless, [Case({"a": A[:2], "b": B[:2]}, {"sum": (A + B)[:2]})], suffix=".tflite"),
    Kind("optional", lambda path: onnx_models.scale_by_default(path, 2.0), [Case({"x": A}, {"y": 2 * A}), Case({"x": A, "k": ONE * 3}, {"y": 3 * A})]),
    Kind("any-rank", of_any_rank, [Case({"x": X2}, {"y": X2}), Case({"x": X2[None]}, {"y": X2[None]}), Case({"x": X2[0, 0]}, {"y": X2[0, 0]})]),
    Kind("variables", tflite_models.counter, [Case({"x": ONE}, {"total": ONE * 6}), Case({"x": ONE * 2}, {"total": ONE * 7})], suffix=".tflite"),
    Kind("maps", onnx_models.classifier, [Case({"x": X2 * np.float32([[1], [-1]])}, {"label": np.int64([1, 0])})]),
    Kind("scattered", scattered, [Case({"x": X2}, {"y": 7 * X2})]),
    Kind("text", text, [Case({"x": WORD}, {"y": WORD})]),
    Kind("wide-int8", onnx_models.wide, [Case({"x": X4}, {"y": X4.sum(1, keepdims=True)})]),
    Kind("divides", onnx_models.divides, [Case({"x": np.int32([9]), "z": np.int32([3])}, {"y": np.int32([3])})], harm=({"x": LEAST, "z": np.int32([-1])}, "SIGFPE"), on="x86_64"),
    Kind("loops-as-asked", onnx_models.loops, [Case({"x": ONE * 0}, {"y": ONE})], harm=({"x": ONE}, "did not end within 2 s")),
    Kind("as-large-as-asked", onnx_models.sized, [Case({"v": ONE, "n": np.int64([3])}, {"y": np.float32([1, 1, 1])})], harm=({"v": ONE, "n": np.int64([1 << 45])}, "memory")),
    Kind("warmed-up-as-told", endless_on_zeros, [Case({"x": ONE}, {"y": ONE * 2})], serving={"warm_up": "case-0"}, harm=({"x": ONE * 0}, "did not end within 2 s")),
    Kind("missing-weights", one_is_missing, refused=("", "weights.bin")),
    Kind("only-maps", lambda path: onnx_models.classifier(path, only_maps=True), refused=("load_failed", "options={'zipmap': False}")),
    Kind("endless", endless, [Case({"x": ONE}, {"y": ONE})], refused=("trial_timed_out", "still running golden cases after 4 s")),
    Kind("counts-for-ever", counts_for_ever, refused=("trial_timed_out", "measuring it on zeros, having no golden case"), suffix=".tflite"),
    Kind("endless-on-zeros", endless_on_zeros, refused=("trial_timed_out", "measuring it on zeros, having no golden case")),
    Kind("warmed-up-on-zeros", endless_on_zeros, [Case({"x": ONE}, {"y": ONE * 2})], refused=("load_failed", "may name a golden case for it (serving: {warm_up: NAME})")),
    Kind("kills-at-load", onnx_models.kills_at_load, refused=("trial_crashed", "SIGFPE while loading"), on="x86_64"),
]  # fmt: skip
HERE = [kind for kind in KINDS if kind.is_here]
GOOD = [kind for kind in HERE if kind.refused is None]
BAD = [kind for kind in HERE if kind.refused is not None]
HARMFUL = [kind for kind in GOOD if kind.harm is not None]


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chain]:
    with Chain(tmp_path_factory.mktemp("kinds"), serve={"load_timeout_s": LOAD_S, "run_timeout_s": RUN_S}) as running:
        yield running


@pytest.fixture(scope="module")
def offers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Offer]:
    folder = tmp_path_factory.mktemp("offers")
    made = {}
    for kind in HERE:
        (folder / kind.name).mkdir()
        file = kind.make(folder / kind.name / f"model{kind.suffix}")
        made[kind.name] = Offer(kind.name, file, kind.cases, kind.serving, max_trial_s=TRIAL_S if kind.refused else 60.0)
    return made


@pytest.fixture(scope="module")
def first(chain: Chain, offers: dict[str, Offer]) -> dict[str, dict[str, Any]]:
    """What became of the first releases, all of which are offered at once: the device's answers, or what kept them from being published."""
    refusals = {name: chain.offer(offer, 1) for name, offer in offers.items()}
    said = chain.roll_out_all([name for name, refusal in refusals.items() if not refusal], 1)
    return {**{name: {"message": refusal} for name, refusal in refusals.items()}, **said}


@pytest.fixture(scope="module")
def second(chain: Chain, offers: dict[str, Offer], first: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The same of the next releases of those that serve, each of which demands a process of its own."""
    served = [kind.name for kind in GOOD if first[kind.name].get("outcome") == "committed"]
    for name in served:
        assert chain.offer(offers[name], 2, isolation="process") == ""
    return chain.roll_out_all(served, 2)


@pytest.fixture(scope="module", params=["first", "second"], ids=["as it comes", "isolated"])
def served(request: pytest.FixtureRequest) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = request.getfixturevalue(request.param)
    return found


@pytest.mark.parametrize("kind", BAD, ids=lambda kind: kind.name)
def test_it_is_refused_by_name(kind: Kind, first: dict[str, dict[str, Any]]):
    assert kind.refused is not None
    reason, words = kind.refused
    said = first[kind.name]
    assert said.get("reason", "") == reason, said
    assert words in said["message"]


def test_what_is_refused_is_not_listed(chain: Chain, first: dict[str, dict[str, Any]]):
    with chain.client() as client:
        listed = {model["name"] for model in client.models()}
    assert listed == {kind.name for kind in GOOD} | {MODEL}


@pytest.mark.parametrize("kind", GOOD, ids=lambda kind: kind.name)
def test_it_answers(kind: Kind, chain: Chain, served: dict[str, dict[str, Any]]):
    assert served[kind.name]["outcome"] == "committed", served[kind.name]
    with chain.client() as client:
        for case in kind.cases:
            answer = client.infer(kind.name, case.given, signature=case.signature or None)
            for name, expected in case.expected.items():
                assert answer[name].shape == expected.shape
                assert answer[name].tolist() == expected.tolist()


@pytest.mark.parametrize("kind", HARMFUL, ids=lambda kind: kind.name)
def test_a_request_that_does_harm_costs_its_caller_alone(kind: Kind, chain: Chain, served: dict[str, dict[str, Any]]):
    assert served[kind.name]["outcome"] == "committed", served[kind.name]
    assert kind.harm is not None
    given, words = kind.harm
    with chain.client() as client:
        with pytest.raises(ClientError, match=words):
            client.infer(kind.name, given)
        case = kind.cases[0]
        answer = client.infer(kind.name, case.given)
        assert {name: answer[name].tolist() for name in case.expected} == {k: v.tolist() for k, v in case.expected.items()}


def test_who_is_isolated(chain: Chain, second: dict[str, dict[str, Any]]):
    assert all(chain.process_of(kind.name) for kind in GOOD)


def test_nobody_else_noticed(chain: Chain, second: dict[str, dict[str, Any]]):
    chain.nobody_noticed()


# -- the collection of models ------------------------------------------------------------------------------------------------------

REFUSED = {"audio_preprocessor_int8.tflite": "SignalWindow", "person_detect.tflite": "quantized_dimension"}


def tensors(entry: dict, role: str) -> list[dict]:
    return [
        {
            "name": tensor["name"],
            "datatype": DATATYPES[tensor["dtype"].removeprefix("tensor(").rstrip(")")],
            "shape": [size if isinstance(size, int) and size >= 0 else -1 for size in tensor["shape"]],
        }
        for tensor in entry[role]
    ]


def offer_of(entry: dict, models: Path, folder: Path) -> Offer:
    """With a golden case for each of its cases, but for those that were recorded with the state that others had left."""
    folder.mkdir(parents=True)
    file = folder / Path(entry["file"]).name
    shutil.copy(models / entry["file"], file)
    names = {role: [tensor["name"] for tensor in entry[role]] for role in ("inputs", "outputs")}
    cases = [
        Case(
            dict(zip(names["inputs"], arrays(models / case["in_npz"], "in"), strict=True)),
            dict(zip(names["outputs"], arrays(models / case["out_npz"], "out"), strict=True)),
            tolerance(entry),
        )
        for case in entry["cases"]
        if (entry["id"], case["name"]) not in CARRIED_STATE
    ]
    return Offer(name_of(entry), file, cases, tensors={role: tensors(entry, role) for role in ("inputs", "outputs")})


def answers(chain: Chain, offers: dict[str, Offer]) -> dict[tuple[str, int], dict[str, np.ndarray]]:
    """To every case of every model, each within its tolerance of what was recorded."""
    found = {}
    with chain.client() as client:
        for offer in offers.values():
            for number, case in enumerate(offer.cases):
                answer = client.infer(offer.model, case.given)
                for name, expected in case.expected.items():
                    got = answer[name]
                    assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
                    assert np.abs(got.astype(np.float64) - expected).max(initial=0) <= case.atol, (offer.model, number, name)
                found[offer.model, number] = {name: answer[name].copy() for name in case.expected}
    return found


def refused(said: dict[str, dict]) -> dict[str, dict]:
    return {model: answer for model, answer in said.items() if answer["outcome"] != "committed"}


@pytest.mark.shared
def test_the_collection_all_the_way(chain: Chain, shared_models: Path, tmp_path: Path):
    offers = {name_of(entry): offer_of(entry, shared_models, tmp_path / name_of(entry)) for entry in MODELS}
    for offer in offers.values():
        assert chain.offer(offer, 1) == ""
    negative = []
    for name in REFUSED:
        (tmp_path / name).mkdir()
        shutil.copy(shared_models / "negative" / name, tmp_path / name)
        negative.append(Offer(Path(name).stem, tmp_path / name / name))
        assert chain.offer(negative[-1], 1) == ""
    said = chain.roll_out_all([*offers, *(offer.model for offer in negative)], 1)
    for file, words in REFUSED.items():
        answer = said.pop(Path(file).stem)
        assert (answer["outcome"], answer["reason"]) == ("refused", "load_failed")
        assert words in answer["message"]
    assert not refused(said)
    here = answers(chain, offers)
    assert {chain.process_of(model) for model in offers} == {None}

    for offer in offers.values():
        assert chain.offer(offer, 2, isolation="process") == ""
    said = chain.roll_out_all(offers, 2)
    assert not refused(said)
    assert len({chain.process_of(model) for model in offers} - {None}) == len(offers)
    apart = answers(chain, offers)
    for key, outputs in here.items():
        for name, array in outputs.items():
            assert np.array_equal(apart[key][name], array), (key, name)
    chain.nobody_noticed()
