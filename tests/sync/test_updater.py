"""Updates of one model as stories: what serves, what is reported, and what is remembered afterwards."""

from __future__ import annotations

import datetime as dt
import errno
import os
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from agent.contract.assignment import Exclusion, ModelAssignment, Rollout, Window
from agent.contract.codec import encode
from agent.contract.manifest import WatchRules
from agent.contract.reasons import METADATA, Reason
from agent.contract.reports import Hardware, Outcome, Phase
from agent.store import Choice, Selection, StoreError
from agent.sync.operator import actions
from agent.sync.ports import Signed
from agent.sync.problems import Problem, Stopped
from agent.sync.serving import ServeAway, ServeRefused
from agent.sync.updating import update
from tests.sync.bench import MODEL, Bench, Killed, numbers
from tests.sync.fleet import DAY, script_release, sha

P = Phase
WATCH = WatchRules(duration_s=10.0, max_duration_s=60.0)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


@pytest.fixture
def on_one(bench: Bench) -> Bench:
    """Release 1 is committed and serves; release 2 is published."""
    bench.install(1)
    bench.release(2, watch=WATCH)
    bench.serve.calls.clear()
    bench.news.clear()
    bench.tried.clear()
    return bench


def selected(bench: Bench) -> Selection:
    selection = bench.store.selection(MODEL)
    assert selection is not None
    return selection


def test_a_release_goes_through_every_phase(bench: Bench):
    bench.release(1, watch=WATCH)
    bench.want(1)
    bench.step()

    assert bench.until(P.STEADY) == [P.FETCHING, P.TRIALING, P.ACTIVATING, P.WATCHING, P.STEADY]
    assert bench.serving == 1
    assert selected(bench).active == Choice(version=1, variant="cpu")
    assert (bench.answer.release, bench.answer.outcome) == (1, Outcome.COMMITTED)
    assert bench.news == ["update-started", "committed"]
    assert bench.tried == ["crane:1"]


def test_the_next_release_keeps_the_one_before_until_it_is_committed(on_one: Bench):
    on_one.want(2)
    on_one.step()
    on_one.until(P.WATCHING)

    assert on_one.serve.active == {MODEL: 2}
    assert on_one.serve.previous == {MODEL: 1}
    assert selected(on_one).previous == Choice(version=1, variant="cpu")
    on_one.until(P.STEADY)

    assert on_one.serve.calls == [("load", 2), ("activate", 2), ("commit", None)]
    assert on_one.serve.loaded[MODEL].keys() == {2}


def test_it_is_selected_on_disk_before_serve_is_told(on_one: Bench):
    at_activate = []
    on_one.serve.fault = lambda action, _: at_activate.append(selected(on_one).active.version) if action == "activate" else None
    on_one.want(2)
    on_one.step()
    on_one.until(P.WATCHING)

    assert at_activate == [2]


def no(reason: Reason):
    def trial(*_args):
        raise Problem(reason, "the trial says no", {"agreement": 0.1})

    return trial


@pytest.mark.parametrize("reason", [Reason.GOLDEN_MISMATCH, Reason.TRIAL_CRASHED, Reason.TOO_SLOW, Reason.LOAD_FAILED])
def test_a_failed_trial_is_refused_and_never_tried_again(reason, on_one: Bench):
    on_one.trial = no(reason)
    on_one.want(2)
    on_one.step()

    assert on_one.until(P.QUARANTINED) == [P.FETCHING, P.TRIALING, P.QUARANTINED]
    assert on_one.serving == 1
    assert (on_one.answer.outcome, on_one.answer.reason) == (Outcome.REFUSED, reason.value)
    for _ in range(20):
        on_one.step()
    on_one.again()
    for _ in range(20):
        on_one.step()
    assert on_one.tried == ["crane:2"]
    assert on_one.serve.calls == []


def test_a_refused_release_answers_a_new_rollout_without_a_download_or_a_trial(on_one: Bench):
    on_one.trial = no(Reason.GOLDEN_MISMATCH)
    on_one.want(2)
    on_one.step()
    on_one.until(P.QUARANTINED)
    on_one.source.asked.clear()

    on_one.want(1, rollout=Rollout(id="second-try", release=2, previous=1, permille=1000))
    on_one.step()
    on_one.until(P.QUARANTINED)

    assert (on_one.answer.rollout, on_one.answer.outcome) == ("second-try", Outcome.REFUSED)
    assert on_one.tried == ["crane:2"]
    assert on_one.source.asked == []


def test_a_repaired_release_gets_its_chance(on_one: Bench):
    """The fix is a new version, and the refusal of the old one does not stand in its way."""
    on_one.trial = no(Reason.GOLDEN_MISMATCH)
    on_one.want(2)
    on_one.step()
    on_one.until(P.QUARANTINED)
    on_one.trial = lambda *_: {}
    on_one.release(3)
    on_one.want(3)
    on_one.step()
    on_one.until(P.STEADY)

    assert on_one.serving == 3


def test_an_operator_on_the_device_can_lift_a_refusal(on_one: Bench):
    on_one.trial = no(Reason.GOLDEN_MISMATCH)
    on_one.want(2)
    on_one.step()
    on_one.until(P.QUARANTINED)
    assert on_one.records.quarantine.forget(MODEL, 2)
    on_one.trial = lambda *_: {}
    on_one.step()
    on_one.until(P.STEADY)

    assert on_one.serving == 2


BAD_NUMBERS = [
    ("failing", numbers(90, run=10), Reason.ERROR_RATIO),
    ("refusing its callers", numbers(90, invalid=10), Reason.ERROR_RATIO),
    ("slow", numbers(100, slow=50), Reason.LATENCY_RATIO),
]


@pytest.mark.parametrize(("how", "said", "reason"), BAD_NUMBERS, ids=[row[0] for row in BAD_NUMBERS])
def test_a_bad_release_is_rolled_back_and_remembered(how, said, reason, on_one: Bench):
    on_one.serve.numbers[1] = numbers(1000)
    on_one.want(2)
    on_one.step()
    on_one.until(P.WATCHING)
    on_one.serve.numbers[2] = said

    assert on_one.until(P.QUARANTINED) == [P.WATCHING, P.ROLLING_BACK, P.QUARANTINED]
    assert on_one.serving == 1
    assert selected(on_one).active.version == 1
    assert (on_one.answer.outcome, on_one.answer.reason) == (Outcome.ROLLED_BACK, reason.value)
    on_one.again()
    for _ in range(10):
        on_one.step()
    assert on_one.phase is P.QUARANTINED
    assert on_one.tried == ["crane:2"]


def test_a_crash_of_serve_in_the_watch_is_the_releases_fault(on_one: Bench):
    on_one.want(2)
    on_one.step()
    on_one.until(P.WATCHING)
    on_one.step()
    on_one.serve.start()

    on_one.until(P.QUARANTINED)
    assert on_one.answer.reason == Reason.SERVE_CRASHED.value
    assert on_one.serving == 1


@pytest.mark.parametrize("reason", sorted(METADATA, key=lambda reason: reason.value))
def test_what_was_refused_for_its_metadata_is_judged_anew_when_that_changes(reason, on_one: Bench):
    on_one.manifest_problem = Problem(reason, "not as it should be signed")
    on_one.want(2)
    on_one.step()
    on_one.until(P.WAITING)
    assert (on_one.answer.outcome, on_one.answer.reason) == (Outcome.REFUSED, reason.value)
    asked = on_one.clock.monotonic()
    on_one.manifest_problem, on_one.metadata = None, "now"
    on_one.until(P.FETCHING, P.TRIALING)
    assert on_one.clock.monotonic() - asked < 1.0, "it does not wait for its next try"

    on_one.until(P.STEADY)
    assert (on_one.serving, on_one.answer.outcome) == (2, Outcome.COMMITTED)


def test_what_was_put_off_for_another_reason_waits_for_its_time(on_one: Bench):
    on_one.manifest_problem = Problem(Reason.DOWNLOAD_FAILED, "unplugged")
    on_one.want(2)
    on_one.step()
    on_one.until(P.WAITING)
    asked = on_one.clock.monotonic()
    on_one.manifest_problem, on_one.metadata = None, "now"
    on_one.until(P.FETCHING, P.TRIALING)

    assert on_one.clock.monotonic() - asked >= update.RETRY_FIRST_S / 2


def restart_serve(bench: Bench) -> None:
    bench.serve.restart()


def restart_sync(bench: Bench) -> None:
    bench.updater.leave()
    bench.again()


def restart_both(bench: Bench) -> None:
    bench.serve.restart()
    restart_sync(bench)


def reboot(bench: Bench) -> None:
    bench.serve.end()
    bench.updater.leave()
    bench.boot += "'"
    bench.serve.away = False
    bench.serve.start()
    bench.again()


@pytest.mark.parametrize("phase", [P.FETCHING, P.TRIALING, P.ACTIVATING, P.WATCHING])
@pytest.mark.parametrize("restart", [restart_serve, restart_sync, restart_both, reboot])
def test_orderly_restarts_are_nobodys_fault_however_many(restart, phase, on_one: Bench):
    on_one.want(2)
    on_one.step()
    on_one.until(phase)
    for _ in range(update.MAX_INTERRUPTIONS + 2):
        restart(on_one)
        on_one.serve.numbers = {2: numbers(ok=5)}
        if phase is P.WATCHING:
            on_one.step()
    on_one.until(P.STEADY)

    assert (on_one.serving, on_one.answer.outcome) == (2, Outcome.COMMITTED)
    if phase is P.WATCHING and restart is not restart_sync:
        assert on_one.answer.evidence["requests"] == 5 * (update.MAX_INTERRUPTIONS + 2)


@pytest.mark.parametrize("action", ["load", "activate"])
def test_restarts_of_serve_in_the_middle_of_a_switch_are_nobodys_fault(action, on_one: Bench):
    left = update.MAX_INTERRUPTIONS + 2

    def end(asked: str, version: int | None) -> None:
        nonlocal left
        if (asked, version) == (action, 2) and left:
            left -= 1
            on_one.serve.restart()
            raise ServeAway("connection reset", sent=True)

    on_one.serve.fault = end
    on_one.want(2)
    on_one.step()
    on_one.until(P.STEADY)

    assert (left, on_one.serving, on_one.answer.outcome) == (0, 2, Outcome.COMMITTED)


def test_a_crash_among_orderly_restarts_is_found(on_one: Bench):
    on_one.want(2)
    on_one.step()
    on_one.until(P.WATCHING)
    on_one.step()
    on_one.serve.restart()
    on_one.serve.start()
    on_one.serve.restart()

    on_one.until(P.QUARANTINED)
    assert on_one.answer.reason == Reason.SERVE_CRASHED.value


def test_serve_stopped_for_hours_in_the_watch_is_waited_for(on_one: Bench):
    on_one.want(2)
    on_one.step()
    on_one.until(P.WATCHING)
    on_one.step()
    on_one.serve.end()
    on_one.clock.pass_(3 * 3600)
    for _ in range(200):
        on_one.step()
    assert on_one.phase is P.WATCHING
    on_one.serve.away = False
    on_one.serve.start()

    on_one.until(P.STEADY)
    assert (on_one.serving, on_one.answer.outcome) == (2, Outcome.COMMITTED)


def test_serve_gone_for_long_is_a_crash_and_rolling_back_waits_for_it(on_one: Bench):
    on_one.want(2)
    on_one.step()
    on_one.until(P.WATCHING)
    on_one.serve.away = True
    on_one.until(P.ROLLING_BACK)
    for _ in range(50):
        on_one.step()
    assert on_one.phase is P.ROLLING_BACK
    assert selected(on_one).active.version == 1, "when serve starts again it loads what is right"
    on_one.serve.away = False
    on_one.serve.start()

    on_one.until(P.QUARANTINED)
    assert on_one.serving == 1


def test_a_reboot_in_the_watch_is_not_the_releases_fault(on_one: Bench):
    on_one.want(2)
    on_one.step()
    on_one.until(P.WATCHING)
    on_one.boot = "boot-2"
    on_one.serve.start()
    on_one.again()

    on_one.until(P.STEADY)
    assert on_one.serving == 2


def test_reboot_after_reboot_in_the_watch_is(on_one: Bench):
    on_one.want(2)
    on_one.step()
    on_one.until(P.WATCHING)
    for n in range(update.MAX_INTERRUPTIONS + 1):
        on_one.boot = f"boot-{n + 2}"
        on_one.serve.start()
        on_one.again()
        on_one.step()

    on_one.until(P.QUARANTINED)
    assert on_one.answer.reason == Reason.INTERRUPTED_TOO_OFTEN.value


def test_the_first_release_of_a_model_can_be_rolled_back_to_nothing(bench: Bench):
    bench.release(1, watch=WATCH)
    bench.want(1)
    bench.step()
    bench.until(P.WATCHING)
    bench.serve.numbers[1] = numbers(10, run=90)

    bench.until(P.QUARANTINED)
    assert bench.serving is None
    assert bench.store.selection(MODEL) is None


def test_a_first_release_is_not_blamed_for_callers_that_ask_wrongly(bench: Bench):
    bench.release(1, watch=WATCH)
    bench.want(1)
    bench.step()
    bench.until(P.WATCHING)
    bench.serve.numbers[1] = numbers(50, invalid=50)

    bench.until(P.STEADY)
    assert bench.serving == 1


# -- superseded -------------------------------------------------------------------------------------------------------------------


def stop_in(bench: Bench, phase: Phase) -> None:
    """Release 2 stands in `phase` and stays there."""
    if phase is P.WAITING:
        bench.manifest_problem = Problem(Reason.DOWNLOAD_FAILED, "unplugged")
    bench.want(2)
    if phase is P.SHADOWING:
        bench.want(1, rollout=Rollout(id="look-first", release=2, previous=1, permille=1000, mode="shadow"))
    bench.step()
    bench.until(phase)
    bench.manifest_problem = None


@pytest.mark.parametrize("phase", [P.FETCHING, P.TRIALING, P.SHADOWING, P.WAITING, P.ACTIVATING, P.WATCHING])
def test_a_newer_release_overtakes(phase, on_one: Bench):
    on_one.release(3)
    stop_in(on_one, phase)
    on_one.want(3)
    on_one.step()
    on_one.until(P.WATCHING)
    on_one.until(P.STEADY)

    assert on_one.serving == 3
    assert on_one.records.quarantine.entries(MODEL) == ()


@pytest.mark.parametrize("phase", [P.FETCHING, P.TRIALING, P.SHADOWING, P.WAITING, P.ACTIVATING, P.WATCHING])
def test_back_to_what_serves(phase, on_one: Bench):
    """The operator aborts the rollout."""
    stop_in(on_one, phase)
    on_one.want(1)
    on_one.step()
    on_one.until(P.STEADY)
    on_one.step()

    assert on_one.serving == 1
    assert selected(on_one).active.version == 1
    assert on_one.serve.loaded[MODEL].keys() == {1}
    assert on_one.records.quarantine.entries(MODEL) == ()


@pytest.mark.parametrize("phase", [P.FETCHING, P.TRIALING, P.WAITING, P.ACTIVATING, P.WATCHING, P.STEADY])
def test_withdrawn_at_any_point(phase, on_one: Bench):
    stop_in(on_one, phase) if phase is not P.STEADY else on_one.install(2)
    on_one.want(1, withdrawn=(2,))
    on_one.step()
    on_one.until(P.STEADY)
    on_one.step()
    on_one.until(P.STEADY)

    assert on_one.serving == 1


def test_a_model_that_is_wanted_no_more_is_unloaded(on_one: Bench):
    on_one.want(None)
    on_one.step()

    assert on_one.serving is None
    assert on_one.store.selection(MODEL) is None
    on_one.want(2)
    on_one.step()
    on_one.until(P.STEADY)
    assert on_one.serving == 2


def test_nobody_may_run_a_withdrawn_first_release(bench: Bench):
    bench.release(1, watch=WATCH)
    bench.want(1)
    bench.step()
    bench.until(P.WATCHING)
    bench.want(1, withdrawn=(1,))
    bench.step()
    bench.until(P.STEADY)

    assert bench.serving is None
    assert bench.answer.reason == Reason.WITHDRAWN.value


def test_back_to_a_lower_release_that_was_committed_here_skips_the_trial(on_one: Bench):
    on_one.install(2)
    on_one.tried.clear()
    on_one.source.asked.clear()
    on_one.want(1)
    on_one.step()

    assert on_one.until(P.STEADY) == [P.FETCHING, P.ACTIVATING, P.WATCHING, P.STEADY]
    assert on_one.serving == 1
    assert on_one.tried == []
    assert on_one.source.asked == []


def test_a_committed_release_whose_file_was_damaged_since_is_tried_again(on_one: Bench):
    on_one.install(2)
    manifest = on_one.signed[next(ref for ref in on_one.signed if ref.version == 1)].manifest
    on_one.store.file(manifest, "model.script").unlink()
    on_one.tried.clear()
    on_one.want(1)
    on_one.step()
    on_one.until(P.WATCHING)

    assert on_one.tried == []  # it was fetched again, whole and verified: what was proved holds


# -- causes outside the release ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reason", [Reason.DOWNLOAD_FAILED, Reason.EXPIRED_METADATA, Reason.CLOCK_UNTRUSTED, Reason.BAD_SIGNATURE]
)
def test_trouble_before_a_manifest_is_verified_is_tried_again_later(reason, on_one: Bench):
    on_one.manifest_problem = Problem(reason, "not now")
    on_one.want(2)
    on_one.step()
    on_one.until(P.WAITING)

    expected = Outcome.REFUSED if reason is Reason.BAD_SIGNATURE else Outcome.FAILED
    assert (on_one.answer.outcome, on_one.answer.reason) == (expected, reason.value)
    assert on_one.records.quarantine.entries(MODEL) == ()
    on_one.manifest_problem = None
    on_one.until(P.STEADY)
    assert on_one.serving == 2
    assert on_one.answer.outcome is Outcome.COMMITTED


def test_a_server_that_has_other_bytes_than_were_signed(on_one: Bench):
    ref = next(ref for ref in on_one.signed if ref.version == 2)
    digest = on_one.signed[ref].manifest.files["model.script"].sha256
    on_one.blobs[digest] = b"x" * len(on_one.blobs[digest])
    on_one.want(2)
    on_one.step()
    on_one.until(P.QUARANTINED)

    assert on_one.answer.reason == Reason.HASH_MISMATCH.value
    assert on_one.serving == 1
    assert not on_one.store.has_blob(digest)
    assert on_one.tried == []


def test_a_blob_that_breaks_off_is_put_off_and_resumed(on_one: Bench):
    ref = next(ref for ref in on_one.signed if ref.version == 2)
    digest = on_one.signed[ref].manifest.files["model.script"].sha256
    whole = on_one.blobs[digest]
    on_one.blobs[digest] = whole[:5]
    on_one.want(2)
    on_one.step()
    on_one.until(P.WAITING)
    on_one.blobs[digest] = whole
    on_one.source.asked.clear()
    on_one.until(P.STEADY)

    assert on_one.serving == 2
    assert on_one.source.offsets == [5]


def test_tries_come_less_and_less_often(on_one: Bench):
    on_one.manifest_problem = Problem(Reason.DOWNLOAD_FAILED, "unplugged")
    on_one.want(2)
    on_one.step()
    waits = []
    for _ in range(12):
        on_one.until(P.WAITING)
        state = on_one.updater.state
        assert state.retry_at is not None
        waits.append(round(state.retry_at - state.since))
        on_one.until(P.FETCHING, steps=10_000)

    assert waits[:4] == [10, 20, 40, 80]
    assert max(waits) == update.RETRY_LONGEST_S
    assert on_one.news.count("put-off") == 1, "people are told once"


def test_a_clock_set_back_does_not_stretch_a_wait(on_one: Bench):
    on_one.manifest_problem = Problem(Reason.DOWNLOAD_FAILED, "unplugged")
    on_one.want(2)
    on_one.step()
    on_one.until(P.WAITING)
    on_one.clock.set_wall(on_one.clock.wall() - 30 * DAY)
    on_one.manifest_problem = None

    on_one.until(P.FETCHING, steps=2)


def test_no_variant_for_this_device(on_one: Bench):
    manifest = on_one.release(2)
    other = msgspec.structs.replace(manifest, variants=(msgspec.structs.replace(manifest.variants[0], runtime="tensorrt"),))
    on_one.signed[manifest.ref] = Signed(encode(other), sha(encode(other)), other)
    on_one.want(2)
    on_one.step()
    on_one.until(P.QUARANTINED)

    assert on_one.answer.reason == Reason.NO_VARIANT.value
    assert "'cpu': runtime 'tensorrt' does not work here (working: script)" in on_one.answer.message


def test_nothing_is_installed_on_an_expired_word(on_one: Bench):
    on_one.want(2)
    on_one.clock.pass_(8 * DAY)
    for _ in range(20):
        on_one.step()

    assert on_one.phase is P.STEADY
    assert on_one.serving == 1


@pytest.mark.parametrize("phase", [P.FETCHING, P.ACTIVATING])
def test_a_word_that_expires_on_the_way(phase, on_one: Bench):
    on_one.want(2)
    on_one.step()
    on_one.until(phase)
    on_one.clock.pass_(8 * DAY)
    on_one.until(P.WAITING)
    assert on_one.answer.reason == Reason.EXPIRED_METADATA.value
    assert on_one.serving == 1
    on_one.want(2)
    on_one.until(P.STEADY)

    assert on_one.serving == 2


def test_a_watch_goes_on_after_its_word_expired(on_one: Bench):
    on_one.want(2)
    on_one.step()
    on_one.until(P.WATCHING)
    on_one.valid_s = -1.0
    on_one.until(P.STEADY)

    assert on_one.serving == 2


def test_without_any_word_nothing_happens(bench: Bench):
    for _ in range(5):
        bench.step()

    assert bench.phase is P.STEADY
    assert bench.serving is None


def test_a_full_disk_is_tried_again(on_one: Bench, monkeypatch: pytest.MonkeyPatch):
    usage = type("Usage", (), {"free": 0})
    monkeypatch.setattr("agent.sync.fetching.downloader.shutil.disk_usage", lambda _: usage)
    on_one.want(2)
    on_one.step()
    on_one.until(P.WAITING)
    assert on_one.answer.reason == Reason.NO_SPACE.value
    monkeypatch.undo()

    on_one.until(P.STEADY)
    assert on_one.serving == 2


def test_serve_short_of_memory_is_asked_again(on_one: Bench):
    def full(action: str, version: int | None) -> None:
        if action in ("load", "swap"):
            raise ServeRefused(507, "no_memory", "it does not fit")

    on_one.serve.fault = full
    on_one.want(2)
    on_one.step()
    on_one.until(P.WAITING)
    assert on_one.answer.outcome is Outcome.FAILED
    assert selected(on_one).active.version == 1
    assert not on_one.updater.state.activated
    on_one.serve.fault = lambda *_: None
    on_one.until(P.STEADY)

    assert on_one.serving == 2


def no_room_for_two(action: str, version: int | None) -> None:
    if action == "load" and version == 2:
        raise ServeRefused(507, "no_memory", "both do not fit")


def test_without_memory_for_two_what_serves_makes_room(on_one: Bench):
    on_one.serve.fault = no_room_for_two
    on_one.want(2)
    on_one.step()
    on_one.until(P.STEADY)

    assert on_one.serve.calls[:2] == [("load", 2), ("swap", 2)]
    assert (on_one.serving, on_one.answer.outcome) == (2, Outcome.COMMITTED)
    assert selected(on_one).previous == Choice(version=1, variant="cpu")


def test_killed_while_one_makes_room_for_the_other(on_one: Bench):
    """The machine dies in the middle of it: `serve` starts with what is selected, and the update goes on from there."""
    selections = []

    def die(action: str, version: int | None) -> None:
        no_room_for_two(action, version)
        if action == "swap":
            selections.append(selected(on_one).active.version)
            raise Killed

    on_one.serve.fault = die
    on_one.want(2)
    on_one.step()
    with pytest.raises(Killed):
        on_one.until(P.STEADY)
    assert selections == [2], "persist, then act"
    on_one.serve.fault = lambda *_: None
    on_one.boot = "boot-2"
    on_one.serve.start()
    on_one.again()
    on_one.until(P.STEADY)

    assert (on_one.serving, on_one.answer.outcome) == (2, Outcome.COMMITTED)


def test_going_back_after_a_swap(on_one: Bench):
    on_one.serve.fault = no_room_for_two
    on_one.want(2)
    on_one.step()
    on_one.until(P.WATCHING)
    on_one.serve.numbers[2] = numbers(ok=1, run=50)
    on_one.until(P.QUARANTINED)

    assert (on_one.serving, on_one.answer.outcome) == (1, Outcome.ROLLED_BACK)


def test_serve_away_at_activation_is_waited_for(on_one: Bench):
    on_one.want(2)
    on_one.step()
    on_one.until(P.ACTIVATING)
    on_one.serve.away = True
    for _ in range(10):
        on_one.step()
    assert on_one.phase is P.ACTIVATING
    on_one.serve.away = False
    on_one.until(P.STEADY)

    assert on_one.serving == 2


def test_serve_away_for_long_puts_the_activation_off(on_one: Bench):
    on_one.want(2)
    on_one.step()
    on_one.until(P.ACTIVATING)
    on_one.serve.away = True
    on_one.until(P.WAITING)

    assert on_one.answer.outcome is Outcome.FAILED
    assert on_one.records.quarantine.entries(MODEL) == ()


@pytest.mark.parametrize(
    ("action", "code", "reason"),
    [("load", "model_invalid", Reason.LOAD_FAILED), ("activate", "internal", Reason.ACTIVATION_FAILED)],
)
def test_serve_refusing_the_release(action, code, reason, on_one: Bench):
    def refuse(asked: str, version: int | None) -> None:
        if (asked, version) == (action, 2):
            raise ServeRefused(422, code, "it cannot be loaded")

    on_one.serve.fault = refuse
    on_one.want(2)
    on_one.step()
    on_one.until(P.QUARANTINED)

    assert on_one.answer.reason == reason.value
    assert on_one.serving == 1
    assert selected(on_one).active.version == 1


def test_a_release_whose_loading_takes_serve_down_again_and_again(on_one: Bench):
    def die(action: str, version: int | None) -> None:
        if (action, version) == ("load", 2):
            on_one.serve.start()
            raise ServeAway("connection reset", sent=True)

    on_one.serve.fault = die
    on_one.want(2)
    on_one.step()
    on_one.until(P.QUARANTINED)

    assert on_one.answer.reason == Reason.INTERRUPTED_TOO_OFTEN.value
    assert on_one.serve.calls.count(("load", 2)) == update.MAX_INTERRUPTIONS + 1
    assert on_one.serving == 1


def test_a_roll_back_that_serve_refuses_does_not_keep_a_fixed_release_out(on_one: Bench):
    on_one.want(2)
    on_one.step()
    on_one.until(P.WATCHING)
    on_one.serve.numbers[2] = numbers(10, run=90)

    def refuse(action: str, version: int | None) -> None:
        if action == "rollback":
            raise ServeRefused(422, "model_invalid", "the disk ate it")

    on_one.serve.fault = refuse
    on_one.until(P.QUARANTINED)
    assert "the disk ate it" in on_one.answer.message
    on_one.serve.fault = lambda *_: None
    on_one.serve.numbers.clear()
    on_one.release(3)
    on_one.want(3)
    on_one.step()
    on_one.until(P.WATCHING)
    on_one.until(P.STEADY)

    assert on_one.serving == 3


# -- windows, shadow, hold --------------------------------------------------------------------------------------------------------


def test_a_window_is_waited_for(on_one: Bench):
    local = dt.datetime.fromtimestamp(on_one.clock.wall()).astimezone()
    minute = (local.hour * 60 + local.minute + 120) % 1440
    window = Window(start_minute=minute, end_minute=(minute + 60) % 1440)
    on_one.want(1, rollout=Rollout(id="tonight", release=2, previous=1, permille=1000, window=window))
    on_one.step()
    on_one.until(P.WAITING)
    assert on_one.serving == 1
    assert on_one.updater.state.waiting_for == "window"
    on_one.again()
    on_one.until(P.STEADY, steps=2000)

    assert on_one.serving == 2
    assert on_one.answer.rollout == "tonight"
    waited_s = on_one.clock.wall() - local.timestamp()
    assert 118 * 60 < waited_s < 125 * 60


def test_a_shadow_rollout_is_tried_and_does_not_serve_until_it_may(on_one: Bench):
    shadow = Rollout(id="look-first", release=2, previous=1, permille=1000, mode="shadow")
    on_one.want(1, rollout=shadow)
    on_one.step()
    on_one.until(P.SHADOWING)
    for _ in range(5):
        on_one.step()
    assert on_one.phase is P.SHADOWING
    assert on_one.serving == 1
    assert on_one.tried == ["crane:2"]
    on_one.want(1, rollout=Rollout(id="look-first", release=2, previous=1, permille=1000))
    on_one.until(P.STEADY)

    assert on_one.serving == 2
    assert on_one.tried == ["crane:2"]


def test_a_held_model_stays_as_it_is(on_one: Bench):
    actions.hold(on_one.store, MODEL)
    on_one.want(2)
    for _ in range(5):
        on_one.step()
    assert on_one.phase is P.STEADY
    assert on_one.updater.held
    on_one.records.holds.unhold(MODEL)
    on_one.step()
    on_one.until(P.STEADY)

    assert on_one.serving == 2


def test_an_operator_goes_back_by_hand_without_a_network(on_one: Bench):
    on_one.install(2)
    on_one.manifest_problem = Problem(Reason.DOWNLOAD_FAILED, "unplugged")
    on_one.clock.pass_(30 * DAY)
    assert actions.roll_back(on_one.store, MODEL, None) == 1
    on_one.step()
    on_one.until(P.STEADY)
    for _ in range(5):
        on_one.step()

    assert on_one.serving == 1
    assert on_one.phase is P.STEADY


def test_going_back_by_hand_during_a_watch(on_one: Bench):
    on_one.want(2)
    on_one.step()
    on_one.until(P.WATCHING)
    assert actions.roll_back(on_one.store, MODEL, None) == 1
    on_one.until(P.STEADY)

    assert on_one.serving == 1


def test_a_withdrawal_is_stronger_than_a_hold(on_one: Bench):
    on_one.install(2)
    actions.hold(on_one.store, MODEL)
    on_one.want(1, withdrawn=(2,))
    on_one.step()
    on_one.until(P.STEADY)

    assert on_one.serving == 1


def test_there_may_be_nothing_to_go_back_to(on_one: Bench):
    with pytest.raises(StoreError, match="nothing to go back to"):
        actions.roll_back(on_one.store, MODEL, None)


def test_a_release_that_serves_already_answers_a_new_rollout(on_one: Bench):
    on_one.want(1, rollout=Rollout(id="again", release=1, previous=None, permille=1000))
    on_one.step()

    assert (on_one.answer.rollout, on_one.answer.outcome) == ("again", Outcome.COMMITTED)
    reports = on_one.reports
    on_one.step()
    assert on_one.reports == reports


# -- at rest ----------------------------------------------------------------------------------------------------------------------


def test_a_commit_that_serve_did_not_hear_is_told_again(on_one: Bench):
    on_one.want(2)
    on_one.step()
    on_one.until(P.WATCHING)

    def deaf(action: str, version: int | None) -> None:
        if action == "commit":
            raise ServeAway("gone", sent=False)

    on_one.serve.fault = deaf
    on_one.until(P.STEADY)
    assert on_one.serve.previous[MODEL] == 1
    on_one.serve.fault = lambda *_: None
    on_one.step()

    assert on_one.serve.previous[MODEL] is None


def test_a_release_that_was_damaged_on_disk_is_fetched_again(on_one: Bench):
    manifest = on_one.signed[next(iter(on_one.signed))].manifest
    path = on_one.store.file(manifest, "model.script")
    path.write_bytes(b"rotten")
    on_one.serve.loaded.clear()
    on_one.serve.active.clear()
    on_one.want(1)
    on_one.step()
    on_one.until(P.STEADY)

    assert on_one.serving == 1
    assert on_one.store.release(MODEL, selected(on_one).active)


def test_old_releases_go_and_needed_ones_stay(bench: Bench):
    for version in range(1, 7):
        bench.install(version)

    kept = [ref.version for ref in bench.store.releases()]
    assert kept == [3, 4, 5, 6], "active, the one before, and two more"
    assert len(list(bench.store.blobs.iterdir())) == 4


def test_releases_set_up_by_hand_are_left_alone(on_one: Bench, tmp_path: Path):
    manifest, contents = script_release(tmp_path / "hand", 1, "scale 9", model="mine")
    for name, data in contents.items():
        on_one.store.file(manifest, name).write_bytes(data)
    on_one.store.write_manifest(encode(manifest))
    for version in range(2, 6):
        on_one.install(version)

    assert on_one.store.manifest(manifest.ref) == manifest
    assert on_one.store.has_blob(manifest.files["model.script"].sha256)


def test_a_damaged_state_is_put_aside_and_serving_is_not_touched(on_one: Bench):
    path = on_one.store.private / "updates" / f"{MODEL}.json"
    path.write_bytes(b"\0" * 100)
    on_one.again()
    on_one.want(1)
    on_one.step()

    assert on_one.serving == 1
    assert on_one.phase is P.STEADY
    assert path.with_name(f"{MODEL}.json.damaged").exists()


@pytest.mark.parametrize("serve_knows", [True, False])
def test_a_damaged_selection_is_mended(serve_knows, on_one: Bench):
    path = on_one.store.root / "models" / f"{MODEL}.json"
    path.write_bytes(b"")
    if not serve_knows:
        on_one.serve.loaded.clear()
        on_one.serve.active.clear()
    on_one.want(1)
    on_one.step()
    on_one.until(P.STEADY)

    assert on_one.serving == 1
    assert selected(on_one).active.version == 1


@pytest.mark.parametrize("phase", [P.TRIALING, P.ACTIVATING, P.WATCHING])
def test_a_manifest_damaged_on_the_way(phase, on_one: Bench):
    on_one.want(2)
    on_one.step()
    on_one.until(phase)
    (on_one.store.root / "releases" / MODEL / "2.json").write_bytes(b"{}")
    on_one.until(P.STEADY, steps=2000)

    assert on_one.serving == 2
    assert on_one.records.quarantine.entries(MODEL) == ()


FULL_IN = [P.STEADY, P.FETCHING, P.TRIALING, P.ACTIVATING, P.WATCHING, P.ROLLING_BACK]


@pytest.mark.parametrize("phase", FULL_IN)
def test_a_disk_that_is_full_for_a_while(phase, on_one: Bench, monkeypatch: pytest.MonkeyPatch):
    """Not one byte can be written, in each phase: the old release serves on, and afterwards the update is completed."""
    on_one.want(2)
    if phase is not P.STEADY:
        on_one.step()
    if phase is P.ROLLING_BACK:
        on_one.until(P.WATCHING)
        on_one.serve.numbers[2] = numbers(10, run=90)
    else:
        on_one.until(phase)
    before = on_one.store.selection(MODEL)

    def full(*_args, **_options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("agent.common.files.replacing", full)
    on_one.clock.pass_(30)
    for _ in range(15):
        on_one.step()
    assert on_one.store.selection(MODEL) == before
    assert on_one.serving == (2 if phase is P.WATCHING else 1), (
        "a bad release is taken away even when that cannot be written down"
    )
    assert "no space left" in (on_one.updater.problem or "")
    monkeypatch.undo()
    on_one.until(P.QUARANTINED if phase is P.ROLLING_BACK else P.STEADY)
    if phase is P.STEADY:
        on_one.step()
        on_one.until(P.STEADY)

    assert on_one.serving == (1 if phase is P.ROLLING_BACK else 2)
    assert on_one.answer.reason == ("error_ratio" if phase is P.ROLLING_BACK else None)


def test_a_rollback_that_cannot_be_selected_on_disk_still_protects_callers(on_one: Bench, monkeypatch: pytest.MonkeyPatch):
    on_one.want(2)
    on_one.step()
    on_one.until(P.WATCHING)
    on_one.serve.numbers[2] = numbers(10, run=90)
    on_one.until(P.ROLLING_BACK)

    def full(*_args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(on_one.store, "select", full)
    on_one.step()
    assert on_one.serving == 1
    assert on_one.phase is P.ROLLING_BACK
    monkeypatch.undo()
    on_one.until(P.QUARANTINED)
    assert selected(on_one).active.version == 1


# -- what nothing else takes away ---------------------------------------------------------------------------------------------


def fill_up(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk of which every byte is in use, and of which what is deleted becomes free."""
    full = sum(path.stat().st_size for path in bench.store.blobs.iterdir())

    def usage(_path):
        used = sum(path.stat().st_size for path in bench.store.blobs.iterdir())
        return SimpleNamespace(free=full - used)

    monkeypatch.setattr("agent.sync.fetching.downloader.shutil.disk_usage", usage)


def test_old_releases_make_room_also_after_a_restart_in_the_middle(on_one: Bench, monkeypatch: pytest.MonkeyPatch):
    on_one.install(2)
    on_one.install(3)
    on_one.release(4)
    on_one.want(4)
    on_one.step()
    fill_up(on_one, monkeypatch)
    on_one.again()
    on_one.until(P.STEADY, steps=40)

    assert on_one.serving == 4


def test_a_release_that_cannot_be_found_keeps_no_room_from_another_model(on_one: Bench, monkeypatch: pytest.MonkeyPatch):
    on_one.install(2)
    on_one.install(3)
    other = on_one.machine.updater("lift")
    on_one.release(4)
    on_one.want(4)
    models = {**on_one.assignment.models, "lift": ModelAssignment(release=9)}
    on_one.assignment = msgspec.structs.replace(on_one.assignment, models=models)
    for _ in range(3):
        other.step(lambda: False)
    assert other.state.phase is P.WAITING
    fill_up(on_one, monkeypatch)
    on_one.step()
    on_one.until(P.STEADY, steps=40)

    assert on_one.serving == 4


def test_the_files_of_a_model_that_is_wanted_no_more_may_go(on_one: Bench):
    on_one.want(None)
    on_one.step()
    on_one.again()
    on_one.step()
    on_one.machine.housekeeping.collect(short_of_space=True)

    assert on_one.store.releases() == []
    assert list(on_one.store.blobs.iterdir()) == []


def test_a_withdrawn_release_does_not_stay_because_the_next_one_is_refused(on_one: Bench):
    on_one.trial = no(Reason.GOLDEN_MISMATCH)
    on_one.want(2, withdrawn=(1,))
    on_one.step()
    on_one.until(P.QUARANTINED)
    on_one.step()

    assert on_one.serving is None
    assert on_one.store.selection(MODEL) is None


def test_what_serve_holds_beside_the_selected_release_is_unloaded_at_rest(on_one: Bench):
    on_one.want(2)
    on_one.step()
    on_one.until(P.ACTIVATING)
    on_one.serve.fault = died_after(on_one, "load")
    on_one.step()
    on_one.serve.fault = lambda *_: None
    on_one.clock.pass_(8 * DAY)  # what the fleet said has expired: put off, with 2 in memory
    on_one.until(P.WAITING)
    assert on_one.serve.loaded[MODEL].keys() == {1, 2}
    on_one.want(1)
    on_one.step()
    on_one.until(P.STEADY)
    on_one.step()

    assert on_one.serve.loaded[MODEL].keys() == {1}


def died_after(bench: Bench, action: str):
    """`serve` does what it is asked, and its answer is lost."""

    def fault(asked: str, version: int | None) -> None:
        if asked == action:
            assert version is not None
            bench.serve._load(MODEL, version, "cpu")
            raise ServeAway("no answer", sent=True)

    return fault


@pytest.mark.parametrize("code", ["forbidden", "protocol"])
def test_an_agent_that_is_set_up_wrongly_is_no_fault_of_the_release(code, on_one: Bench):
    def refuse(asked: str, _version: int | None) -> None:
        if asked == "load":
            raise ServeRefused(403, code, "this needs access class 'control'")

    on_one.serve.fault = refuse
    on_one.want(2)
    on_one.step()
    on_one.until(P.WAITING)
    assert on_one.records.quarantine.entries(MODEL) == ()
    on_one.serve.fault = lambda *_: None
    on_one.until(P.STEADY)

    assert on_one.serving == 2


def test_a_probe_that_found_no_engine_is_no_fault_of_the_release(on_one: Bench):
    works, on_one.hardware = on_one.hardware, Hardware(arch="x86_64", runtimes={})
    on_one.want(2)
    on_one.step()
    on_one.until(P.WAITING)
    assert on_one.records.quarantine.entries(MODEL) == ()
    on_one.hardware = works
    on_one.until(P.STEADY)

    assert on_one.serving == 2


# -- stopping ---------------------------------------------------------------------------------------------------------------------


def test_power_cuts_while_its_trial_waits_for_its_turn_are_not_counted_against_the_release(on_one: Bench):
    def power_cut(_stop):
        raise Killed

    on_one.want(2)
    on_one.step()
    on_one.until(P.TRIALING)
    on_one.tried.clear()
    on_one.queue = power_cut
    for _ in range(update.MAX_INTERRUPTIONS + 3):
        with pytest.raises(Killed):
            on_one.step()
        on_one.again()
    assert on_one.tried == []
    on_one.queue = lambda _stop: None
    on_one.until(P.STEADY, P.QUARANTINED)

    assert on_one.serving == 2


def test_an_orderly_end_while_its_trial_waits_leaves_what_was_counted(on_one: Bench):
    def power_cut(*_):
        raise Killed

    def told_to_stop(_stop):
        raise Stopped

    on_one.want(2)
    on_one.step()
    on_one.until(P.TRIALING)
    on_one.trial = power_cut
    for times in range(1, 3):
        with pytest.raises(Killed):
            on_one.step()
        on_one.again()
        assert on_one.updater.state.interruptions == times
    on_one.queue = told_to_stop
    for _ in range(3):
        with pytest.raises(Stopped):
            on_one.updater.step(lambda: True)
        on_one.updater.leave()
        on_one.again()

    assert on_one.updater.state.interruptions == 2


def test_an_orderly_end_in_a_trial_is_not_counted_against_the_release(on_one: Bench):
    def told_to_stop(_request, _timeout_s, stop):
        assert stop()
        raise Stopped

    on_one.want(2)
    on_one.step()
    on_one.until(P.TRIALING)
    on_one.trial = told_to_stop
    for _ in range(update.MAX_INTERRUPTIONS + 3):
        with pytest.raises(Stopped):
            on_one.updater.step(lambda: True)
        on_one.updater.leave()
        on_one.again()
    on_one.trial = lambda *_: {}
    on_one.until(P.STEADY)

    assert on_one.serving == 2


def test_a_release_that_is_stopped_for_this_kind_of_hardware_is_left(on_one: Bench):
    on_one.install(2)
    rules = {
        "another kind": ModelAssignment(release=2, excluded=(Exclusion(release=2, hardware="aarch64/-/cuda", instead=1),)),
        "this kind": ModelAssignment(release=2, excluded=(Exclusion(release=2, hardware="x86_64/-/-", instead=1),)),
    }
    for kind, serving in (("another kind", 2), ("this kind", 1)):
        on_one.want(2)
        on_one.assignment = msgspec.structs.replace(on_one.assignment, models={MODEL: rules[kind]})
        on_one.step()
        on_one.until(P.STEADY)
        on_one.step()
        assert on_one.serving == serving
