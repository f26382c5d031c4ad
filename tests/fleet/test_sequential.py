"""The test of a share that may be looked at after every report."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet_server.rollouts import sequential

shares = st.floats(0.005, 0.5)


@given(shares, st.integers(0, 200), st.integers(1, 200))
def test_it_is_a_bet_that_is_fair_while_nothing_is_wrong(share, hits, of):
    """What one more device is expected to make of the e-value is the e-value: no look is better than another."""
    hits = min(hits, of)
    now = sequential.log_e_above(share, hits, of)
    hit, miss = (sequential.log_e_above(share, hits + one, of + 1) for one in (1, 0))
    expected = share * math.exp(hit - now) + (1 - share) * math.exp(miss - now)
    assert expected == pytest.approx(1, rel=1e-6)


@given(shares)
def test_nobody_was_seen_and_nothing_is_known(share):
    assert sequential.log_e_above(share, 0, 0) == pytest.approx(0, abs=1e-9)


@given(shares, st.integers(1, 300), st.data())
def test_more_hits_are_more_evidence_and_fewer_than_the_share_are_none(share, of, data):
    hits = data.draw(st.integers(0, of - 1))
    assert sequential.log_e_above(share, hits + 1, of) > sequential.log_e_above(share, hits, of)
    assert hits > share * of or not sequential.is_above(share, hits, of, 0.99)


def test_looking_after_every_report_raises_no_false_alarms():
    """Of 2000 rollouts in which as many fail as may, looked at 400 times each, at most 1 % are ever stopped; a usual test that is
    looked at as often stops a multiple.
    """
    chance, allowed, stopped, usual = random.Random(7), 0.05, 0, 0
    for _ in range(2000):
        hits, wrong, naive = 0, False, False
        for of in range(1, 401):
            hits += chance.random() < allowed
            wrong = wrong or sequential.is_above(allowed, hits, of, 0.99)
            spread = math.sqrt(of * allowed * (1 - allowed))
            naive = naive or (of >= 20 and hits - of * allowed > 2.33 * spread)  # 99 %, once
        stopped += wrong
        usual += naive
    assert stopped <= 20
    assert usual > 100


@pytest.mark.parametrize(("truth", "of"), [(0.10, 160), (0.30, 20), (1.0, 3)])
def test_how_soon_it_finds_what_is_wrong(truth, of):
    """In the middle, and where 3 % are allowed."""
    chance, needed = random.Random(11), []
    for _ in range(101):
        hits, seen = 0, 0
        while not sequential.is_above(0.03, hits, seen, 0.99):
            hits += chance.random() < truth
            seen += 1
        needed.append(seen)
    assert sorted(needed)[50] <= of


@pytest.mark.parametrize(("share", "hits", "of"), [(0.1, 3, 2), (0.1, -1, 2), (0.0, 1, 2), (1.0, 1, 2)])
def test_what_cannot_be(share, hits, of):
    with pytest.raises(ValueError, match=r"cannot be|above 0"):
        sequential.log_e_above(share, hits, of)
