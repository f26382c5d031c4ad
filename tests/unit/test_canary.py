"""Which requests a canary answers: an exact share, spread evenly, and whole sequences."""

import pytest

from agent.serving.models.canary import MAX_SEQUENCES, Canary
from agent.serving.models.version import Version
from agent.serving.scheduling.demand import SequenceDemand


def canary(share):
    versions = [Version("m", number, "cpu", "", "onnx") for number in (1, 2)]
    return Canary(*versions, share)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.25, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("every", [1, 2, 10])
def test_the_share_is_exact_over_time_whatever_the_rhythm(share, every):
    """`every`: the requests of one caller among several that take turns."""
    found = canary(share)
    chosen = [found.choose() is found.candidate for _ in range(10_000)][::every]
    assert sum(chosen) == pytest.approx(share * len(chosen), abs=6)


def test_a_sequence_stays_where_it_began():
    found = canary(0.5)
    chosen = {number: found.choose(SequenceDemand(number, start=True)) for number in range(1, 41)}
    assert len(set(chosen.values())) == 2
    for _ in range(3):
        assert {number: found.choose(SequenceDemand(number)) for number in chosen} == chosen
    assert {number: found.choose(SequenceDemand(number, end=True)) for number in chosen} == chosen
    assert {found.choose(SequenceDemand(number)) for number in chosen} == {found.active}, "they have ended"


def test_one_whose_start_was_not_seen_stays_with_the_active_version():
    found = canary(1.0)
    assert found.choose(SequenceDemand("older")) is found.active
    assert found.choose() is found.candidate


def test_sequences_that_never_end_are_forgotten():
    found = canary(1.0)
    for number in range(1, MAX_SEQUENCES + 2):
        found.choose(SequenceDemand(number, start=True))
    assert found.choose(SequenceDemand(1)) is found.active
    assert found.choose(SequenceDemand(2)) is found.candidate
