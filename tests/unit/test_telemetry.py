"""Telemetry's documents: sums are exact, and what cannot be is refused."""

from __future__ import annotations

import json
import math
import random

import pytest

from agent.contract.codec import ContractError, decode
from agent.contract.telemetry import (
    BINS_PER_OCTAVE,
    MAX_TELEMETRY_BYTES,
    Figures,
    MachineFigures,
    ModelFigures,
    Telemetry,
    median_ms,
    packed,
    shares_apart,
)

SOME = Figures(ok=3, run=1, latency={80: 2, 83: 1}, rows=4, unusable=1, classes={0: 2, 31: 1}, confidence={9: 3})


def said(**other: object) -> bytes:
    whole = {
        "device": "dev-1",
        "counter": 1,
        "at": 1.0,
        "seconds": 300,
        "figures": [],
        "machine": None,
        "kind": "telemetry",
        "format": 1,
    }
    return json.dumps({**whole, **other}).encode()


def of_model(**figures: object) -> bytes:
    return said(figures=[{"model": "m", "release": 1, "figures": figures}])


def test_a_document_comes_back_as_it_went() -> None:
    told = Telemetry(
        device="dev-1", counter=7, at=1.5, seconds=300, figures=(ModelFigures(model="m", release=2, figures=SOME),),
        machine=MachineFigures(memory_bytes=1 << 30, celsius=61.5, throttled=True),
    )  # fmt: skip
    assert decode(packed(told), Telemetry, limit_bytes=MAX_TELEMETRY_BYTES) == told


def test_figures_add_up_and_take_apart_again() -> None:
    more = Figures(ok=1, latency={90: 1}, rows=1, classes={5: 1}, confidence={0: 1}, compared=5, differ=2)
    assert SOME.plus(more).minus(SOME) == more
    assert SOME.plus(more).minus(more) == SOME
    assert not SOME.minus(SOME)
    assert SOME.requests == 4
    with pytest.raises(ValueError, match="has become less"):
        SOME.minus(SOME.plus(more))


def test_the_median_is_known_to_two_percent() -> None:
    rng = random.Random(3)
    for scale in (0.05, 1.0, 30.0, 900.0):
        times = sorted(scale * rng.lognormvariate(0, 0.4) for _ in range(2001))
        bins: dict[int, int] = {}
        for one in times:
            at = int(math.log2(one * 1e3) * BINS_PER_OCTAVE)
            bins[at] = bins.get(at, 0) + 1
        found = median_ms(bins)
        assert found is not None
        assert found == pytest.approx(times[1000], rel=0.02)
    assert median_ms({}) is None


def test_how_far_mixes_are_apart() -> None:
    assert shares_apart({0: 5, 1: 5}, {0: 50, 1: 50}) == 0.0
    assert shares_apart({0: 5}, {1: 9}) == 1.0
    assert shares_apart({0: 6, 1: 4}, {0: 4, 1: 6}) == pytest.approx(0.2)
    assert shares_apart({}, {1: 9}) == 0.0


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(of_model(ok=-1), id="less than nothing"),
        pytest.param(of_model(ok=2**41, latency={"1": 2**41}), id="more than a device can do"),
        pytest.param(of_model(ok=10**400), id="no number of this world"),
        pytest.param(of_model(ok=5, latency={"80": 4}), id="answers without a latency"),
        pytest.param(of_model(ok=1, latency={"217": 1}), id="a latency beyond the last bin"),
        pytest.param(of_model(rows=1, unusable=2), id="more unusable rows than rows"),
        pytest.param(of_model(rows=3, classes={"1": 2}), id="classes of other rows"),
        pytest.param(of_model(rows=1, classes={"32": 1}), id="a class above the last"),
        pytest.param(of_model(rows=10**6, classes={str(at): 1 for at in range(10**6)}), id="a million classes"),
        pytest.param(of_model(rows=1, confidence={"10": 1}), id="surer than sure"),
        pytest.param(of_model(compared=1, differ=2), id="more differ than were compared"),
        pytest.param(said(figures=[{"model": "m", "release": 1, "figures": {}}] * 2), id="one release twice"),
        pytest.param(said(figures=[{"model": f"m{at}", "release": 1, "figures": {}} for at in range(129)]), id="too many models"),
        pytest.param(said(figures=[{"model": "../m", "release": 1, "figures": {}}]), id="a name that is none"),
        pytest.param(said(figures=[{"model": "m", "release": 2**60, "figures": {}}]), id="a release that cannot be"),
        pytest.param(said(seconds=0), id="no time"),
        pytest.param(said(seconds=1e9), id="thirty years at once"),
        pytest.param(said(machine={"celsius": 5000}), id="hotter than the sun's surface"),
        pytest.param(said(machine={"load": -1}), id="a negative load"),
        pytest.param(said(format=2), id="of a later format"),
        pytest.param(said(device="../x"), id="a device that is none"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(wrong: bytes) -> None:
    with pytest.raises(ContractError):
        decode(wrong, Telemetry, limit_bytes=MAX_TELEMETRY_BYTES)
