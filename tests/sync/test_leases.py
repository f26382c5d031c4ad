"""Leases: a release that asks for it stops without a recent signed word of the fleet, and comes back with the next one."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.contract.manifest import Acceptance, WatchRules
from agent.contract.reasons import Reason
from agent.contract.reports import Phase
from agent.sync.fleet import reports
from agent.sync.serving import ModelStatus
from agent.sync.trust.leases import Leases
from tests.sync.bench import MODEL, Bench
from tests.sync.conftest import FakeClock
from tests.sync.fleet import DAY

P = Phase
LEASE = 3600.0


@pytest.fixture
def leased(tmp_path: Path) -> Bench:
    bench = Bench(tmp_path)
    bench.install(1, lease_s=LEASE)
    return bench


def renew(bench: Bench) -> None:
    """The fleet says the same again, freshly signed."""
    bench.verified_at = bench.clock.wall()


def steps(bench: Bench, count: int = 5) -> None:
    for _ in range(count):
        bench.step()


def test_it_stops_when_the_lease_ends_and_comes_back_with_a_fresh_word(leased: Bench):
    leased.clock.pass_(LEASE - 120)
    steps(leased)
    assert leased.serving == 1
    leased.clock.pass_(300)
    steps(leased)

    assert leased.serving is None
    assert leased.store.selection(MODEL) is None
    said = reports.model_state(leased.updater, ModelStatus(), (), None)
    assert "older than the lease" in (said.stopped or "")
    assert leased.news[-1] == "stopped"
    renew(leased)
    steps(leased)
    assert leased.serving == 1
    assert leased.store.selection(MODEL) is not None
    assert leased.updater.stopped is None
    assert leased.tried == ["crane:1"], "nothing is fetched or tried for it"


def test_a_renewed_lease_goes_on(leased: Bench):
    for _ in range(10):
        leased.clock.pass_(LEASE / 2)
        renew(leased)
        steps(leased, 2)
        assert leased.serving == 1


def test_it_stays_stopped_over_a_reboot_and_a_clock_that_is_set_back(leased: Bench):
    leased.clock.pass_(LEASE - 100)
    leased.step()
    for _ in range(3):
        leased.clock.pass_(60)
        leased.step()
    assert leased.serving is None
    leased.clock.set_wall(leased.clock.wall() - DAY)
    leased.serve.start()
    leased.again()
    steps(leased)
    assert leased.serving is None

    renew(leased)
    steps(leased)
    assert leased.serving == 1


def test_a_release_without_a_lease_serves_on(tmp_path: Path):
    bench = Bench(tmp_path)
    bench.install(1)
    bench.clock.pass_(400 * DAY)
    steps(bench)

    assert bench.serving == 1
    assert not (bench.store.private / "lease.json").exists()


def test_a_death_between_stopping_and_coming_back(leased: Bench):
    """Wherever the process dies, what was to come back comes back, and what is over does not serve."""
    leased.clock.pass_(LEASE + 60)
    leased.surroundings.states.save(leased.updater.state.but(stopped=leased.store.selection(MODEL)))  # dies before it deselects
    leased.again()
    steps(leased)
    assert leased.serving is None
    assert leased.store.selection(MODEL) is None
    renew(leased)
    selection = leased.updater.state.stopped
    assert selection is not None
    leased.store.select(selection)  # dies before it forgets
    leased.again()
    steps(leased)
    assert leased.serving == 1


def test_it_goes_back_when_it_ends_during_a_watch(leased: Bench):
    leased.install(2)
    leased.release(3, lease_s=LEASE, watch=WatchRules(duration_s=2 * LEASE, max_duration_s=3 * LEASE))
    leased.want(3)
    leased.step()
    leased.until(P.WATCHING)
    leased.clock.pass_(LEASE + 60)
    leased.until(P.STEADY)

    assert leased.serving == 2
    assert leased.answer.reason == Reason.LEASE_ENDED.value
    assert leased.surroundings.quarantine.entries(MODEL) == ()


def test_it_is_not_installed_while_its_lease_is_over(leased: Bench):
    leased.install(2)
    leased.clock.pass_(2 * LEASE)
    leased.release(3, lease_s=LEASE)
    heard = leased.verified_at
    leased.want(3)
    leased.verified_at = heard
    leased.step()
    leased.until(P.WAITING)
    assert leased.updater.state.failure is not None
    assert leased.updater.state.failure.reason is Reason.LEASE_ENDED
    renew(leased)
    leased.until(P.STEADY, steps=4000)

    assert leased.serving == 3


def test_running_time_counts_where_there_is_no_clock(tmp_path: Path, clock: FakeClock):
    """A board that wakes up at the same time of day after every power cut."""
    bench = Bench(tmp_path)
    bench.want(1)
    word = bench.desired()
    assert word is not None
    morning = clock.wall()
    for life in range(1, 5):
        clock.set_wall(morning)
        leases = Leases(tmp_path / "lease.json", clock, lambda: word)
        leases.age_s()
        clock.pass_(1000)
        assert leases.age_s() >= 1000 * life


def test_the_same_word_again_renews_nothing(leased: Bench):
    leased.clock.pass_(LEASE + 60)
    leased.assignment = leased.assignment  # fetched again, as it was
    steps(leased)
    assert leased.serving is None


def test_a_lease_too_short_to_be_renewed_is_refused():
    with pytest.raises(ValueError, match="at least 60"):
        Acceptance(lease_s=5.0)
