"""Causes outside the release: it is tried again later, and not blamed."""

from __future__ import annotations

import pytest

from agent.contract.reasons import Reason
from agent.contract.reports import Hardware, Outcome, Phase
from agent.sync.problems import Problem
from agent.sync.serving import ServeRefused
from agent.sync.updating import update
from tests.sync.bench import MODEL, Bench
from tests.sync.fleet import DAY

P = Phase


def test_what_was_put_off_for_another_reason_waits_for_its_time(on_one: Bench):
    on_one.manifest_problem = Problem(Reason.DOWNLOAD_FAILED, "unplugged")
    on_one.want(2)
    on_one.step()
    on_one.until(P.WAITING)
    asked = on_one.clock.monotonic()
    on_one.manifest_problem, on_one.metadata = None, "now"
    on_one.until(P.FETCHING, P.TRIALING)

    assert on_one.clock.monotonic() - asked >= update.RETRY_FIRST_S / 2


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
