"""Leases: a release that asks for it stops without a recent signed word of the fleet, and comes back with the next one."""

from __future__ import annotations

import datetime as dt
import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.common import files
from agent.contract.acceptance import Acceptance, CanaryRules, WatchRules
from agent.contract.assignment import Window
from agent.contract.reasons import Reason
from agent.contract.reports import Phase
from agent.sync.fetching.budget import Budget
from agent.sync.fleet import reports
from agent.sync.problems import Stopped
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
    assert "older than its lease" in (said.stopped or "")
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
    leased.records.states.save(leased.updater.state.but(stopped=leased.store.selection(MODEL)))  # dies before it deselects
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
    assert leased.records.quarantine.entries(MODEL) == ()


@pytest.mark.parametrize("whose", ["what serves", "the candidate"])
def test_it_ends_while_a_candidate_answers_a_share_of_the_requests(whose: str, leased: Bench):
    """A share may be looked at for days: no release serves that long beyond its lease, neither of the two."""
    canary = CanaryRules(duration_s=2 * LEASE, max_duration_s=3 * LEASE)
    if whose == "the candidate":
        leased.install(2)
    leased.release(3, canary=canary, lease_s=LEASE if whose == "the candidate" else None)
    leased.want(3)
    leased.step()
    leased.until(P.CANARYING)
    leased.step()
    assert leased.serve.canaries[MODEL].version == 3
    assert leased.updater.lease_s == LEASE, "the fleet is asked often enough for it"
    leased.clock.pass_(LEASE + 60)
    steps(leased)

    assert leased.serve.canaries == {}
    assert leased.serving == (2 if whose == "the candidate" else None)
    assert leased.answer.reason == Reason.LEASE_ENDED.value
    assert leased.records.quarantine.entries(MODEL) == ()


def test_it_ends_while_a_download_waits_for_its_hour(leased: Bench):
    """Or for a neighbour that trickles: one step may take hours."""
    opens = dt.datetime.fromtimestamp(leased.clock.wall() + 2 * LEASE).astimezone()
    minute = opens.hour * 60 + opens.minute
    window = Window(start_minute=minute, end_minute=(minute + 60) % 1440)
    leased.downloader.budget = Budget(leased.clock, window=window, pause=leased.clock.pass_)
    leased.release(2)
    leased.want(2)
    begun = leased.clock.wall()
    leased.step()
    assert leased.phase is P.FETCHING
    steps(leased, 2)
    assert leased.serving is None
    assert leased.clock.wall() - begun < 1.1 * LEASE
    renew(leased)
    steps(leased, 1)
    assert leased.serving == 1


def test_it_ends_during_a_trial_which_is_no_interruption_of_it(leased: Bench):
    def takes_long(_request, _timeout_s, stop):
        leased.clock.pass_(LEASE + 60)
        if stop():
            raise Stopped
        return {}

    leased.release(2)
    leased.want(2)
    leased.step()
    leased.until(P.TRIALING)
    leased.trial = takes_long
    steps(leased, 2)
    assert leased.serving is None
    assert leased.phase is P.TRIALING
    leased.again()
    assert leased.updater.state.interruptions == 0


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


# -- a disk that is full -------------------------------------------------------------------------------------------------------


class Disk:
    """Refuses what is written below `full`; counts how often."""

    def __init__(self, write) -> None:
        self._write = write
        self.full: Path | None = None
        self.refused = 0

    def __call__(self, path: Path, data: bytes, *, mode: int = 0o644) -> None:
        if self.full is not None and (path == self.full or self.full in path.parents):
            self.refused += 1
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        self._write(path, data, mode=mode)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    disk = Disk(files.write)
    monkeypatch.setattr(files, "write", disk)
    return disk


def test_a_lease_that_cannot_be_written_down_keeps_nothing_else_from_going_on(leased: Bench, disk: Disk):
    leased.release(2)
    disk.full = leased.store.private / "lease.json"
    leased.clock.pass_(120)
    leased.want(2)
    leased.step()
    assert disk.refused == 1
    assert leased.phase is P.FETCHING
    leased.until(P.STEADY)
    assert leased.serving == 2


def test_what_could_not_be_written_down_is_tried_again_at_the_next_look(leased: Bench, disk: Disk):
    """Not a minute later: until then a power cut would take all of it from the count."""
    disk.full = leased.store.private / "lease.json"
    leased.clock.pass_(120)
    leased.step()
    leased.step()
    assert disk.refused >= 2
    disk.full = None
    leased.step()
    later = Leases(leased.store.private / "lease.json", leased.clock, leased.desired)
    assert later.age_s() >= 120


def test_it_stops_when_the_lease_ends_while_nothing_can_be_written(leased: Bench, disk: Disk):
    disk.full = leased.store.root
    leased.clock.pass_(LEASE + 60)
    steps(leased)

    assert leased.serving is None
    assert "older than its lease" in (leased.updater.stopped or "")
    leased.serve.start()  # it loads what is selected, which could not be changed
    steps(leased, 2)
    assert leased.serving is None
    disk.full = None
    steps(leased)
    assert leased.store.selection(MODEL) is None
    renew(leased)
    steps(leased)
    assert leased.serving == 1


def test_a_lease_that_is_renewed_while_nothing_can_be_written_serves_again(leased: Bench, disk: Disk):
    disk.full = leased.store.root
    leased.clock.pass_(LEASE + 60)
    steps(leased)
    assert leased.serving is None
    renew(leased)
    steps(leased)

    assert leased.serving == 1


@pytest.mark.parametrize(("reboot", "enough_s"), [(False, LEASE / 3), (True, 100.0)], ids=["before", "since its start"])
def test_running_time_that_cannot_be_written_down_ends_the_lease(reboot: bool, enough_s: float, leased: Bench, disk: Disk):
    """Else a board without a clock could be switched off and on for ever, each time for a whole lease."""
    leased.step()
    disk.full = leased.store.private / "lease.json"
    if reboot:
        leased.again()
    leased.clock.pass_(enough_s)
    leased.step()
    assert leased.serving == 1
    leased.clock.pass_(enough_s)
    steps(leased)
    assert leased.serving is None
    assert "cannot be counted" in (leased.updater.stopped or "")
    disk.full = None
    steps(leased)

    assert leased.serving == 1
    assert leased.updater.stopped is None


def test_a_disk_that_refuses_is_not_asked_all_the_time(leased: Bench, disk: Disk):
    """A download asks often whether the lease is over."""
    disk.full = leased.store.private / "lease.json"
    leased.clock.pass_(120)
    for _ in range(100):
        leased.leases.over(LEASE)
        leased.clock.pass_(0.05)
    assert 1 < disk.refused < 5
