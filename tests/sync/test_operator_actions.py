"""Approval, windows of the device's own, and what an operator does on it: durable, and without any network."""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from agent.cli import cli
from agent.config import ConfigError
from agent.config import load as load_config
from agent.contract.acceptance import WatchRules
from agent.contract.assignment import Rollout, Window, parse_window
from agent.contract.codec import encode
from agent.contract.reports import Phase
from agent.store import StoreError
from agent.sync.operator import actions, overview
from agent.sync.problems import Problem
from tests.sync.bench import MODEL, Bench
from tests.sync.stories import no

P = Phase
WATCH = WatchRules(duration_s=10.0, max_duration_s=60.0)


@pytest.fixture
def on_one(tmp_path: Path) -> Bench:
    bench = Bench(tmp_path)
    bench.install(1)
    bench.release(2, watch=WATCH, approval=True)
    bench.tried.clear()
    return bench


def set_up(bench: Bench, **settings) -> None:
    bench.settings = msgspec.structs.replace(bench.settings, **settings)
    bench.again()


def hour(bench: Bench, ahead: int) -> int:
    return (dt.datetime.fromtimestamp(bench.clock.wall()).astimezone().hour + ahead) % 24


def run(bench: Bench, *words: object):
    config = bench.folder / "agent.yaml"
    config.write_text(json.dumps({"store": str(bench.store.root), "serve": {"socket": str(bench.folder / "s.sock")}}))
    return CliRunner().invoke(cli, [*[str(word) for word in words], "--config", str(config)])


# -- approval --------------------------------------------------------------------------------------------------------------------


def test_a_release_that_asks_waits_for_somebody_here(on_one: Bench):
    on_one.want(2)
    on_one.step()
    assert on_one.until(P.WAITING) == [P.FETCHING, P.TRIALING, P.WAITING]
    assert on_one.updater.state.waiting_for == "approval"
    assert "edge-agent approve crane" in overview.text(overview.read(on_one.store))
    for _ in range(10):
        on_one.step()
    assert on_one.serving == 1

    shown = run(on_one, "approve", MODEL)
    assert shown.exit_code == 0, shown.output
    assert on_one.until(P.STEADY) == [P.WAITING, P.ACTIVATING, P.WATCHING, P.STEADY]
    assert on_one.serving == 2


def test_an_approval_survives_a_restart_and_needs_no_network(on_one: Bench):
    on_one.want(2)
    on_one.step()
    on_one.until(P.WAITING)
    on_one.manifest_problem = Problem  # type: ignore[assignment]
    actions.approve(on_one.store, MODEL, 2)
    on_one.again()
    on_one.until(P.STEADY)

    assert on_one.serving == 2


def test_the_device_may_ask_for_every_release(on_one: Bench):
    set_up(on_one, approval="always")
    on_one.release(3)
    on_one.want(3)
    on_one.step()
    on_one.until(P.WAITING)
    assert on_one.updater.state.waiting_for == "approval"


def test_an_approval_ends_when_another_release_is_wanted(on_one: Bench):
    on_one.want(2)
    on_one.step()
    on_one.until(P.WAITING)
    actions.approve(on_one.store, MODEL)
    on_one.release(3)
    on_one.want(3)
    on_one.step()
    on_one.until(P.STEADY)
    on_one.step()
    on_one.until(P.STEADY)
    assert on_one.serving == 3
    on_one.want(2)
    on_one.step()
    on_one.until(P.WAITING)

    assert on_one.updater.state.waiting_for == "approval"


def test_an_approval_is_of_the_bytes_that_were_tried(on_one: Bench):
    on_one.want(2)
    on_one.step()
    on_one.until(P.WAITING)
    actions.approve(on_one.store, MODEL)
    state = on_one.updater.state
    assert on_one.records.approvals.given(MODEL, 2, state.manifest)

    assert not on_one.records.approvals.given(MODEL, 2, "0" * 64)
    assert not on_one.records.approvals.given(MODEL, 3, state.manifest)


def test_going_back_waits_for_nobody(on_one: Bench):
    byhand_settings = {"approval": "always", "windows": (f"{hour(on_one, 3):02}:00-{hour(on_one, 4):02}:00",)}
    on_one.install(3)
    set_up(on_one, **byhand_settings)
    on_one.want(1)
    on_one.step()
    assert on_one.until(P.STEADY) == [P.FETCHING, P.ACTIVATING, P.WATCHING, P.STEADY]
    assert on_one.serving == 1


def test_leaving_what_was_withdrawn_waits_for_nobody(on_one: Bench):
    set_up(on_one, approval="always")
    on_one.release(3)
    on_one.want(3, withdrawn=(1,))
    on_one.step()
    on_one.until(P.STEADY)

    assert on_one.serving == 3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("approve", MODEL), "serves already"),
        (("approve", MODEL, "2"), "is not wanted here"),
        (("approve", "other"), "nothing to approve"),
        (("quarantine", "clear", MODEL, "7"), "is not refused here"),
        (("hold", MODEL, "9"), "9"),
        (("why", "other"), "nothing is known here"),
    ],
)
def test_what_cannot_be_done_is_said(words, said, on_one: Bench):
    done = run(on_one, *words)

    assert done.exit_code == 1
    assert said in done.output


def test_a_refused_release_cannot_be_approved_but_tried_again(on_one: Bench):
    from agent.contract.reasons import Reason

    on_one.trial = no(Reason.GOLDEN_MISMATCH)
    on_one.want(2)
    on_one.step()
    on_one.until(P.QUARANTINED)
    with pytest.raises(StoreError, match="quarantine clear crane 2"):
        actions.approve(on_one.store, MODEL)

    listed = run(on_one, "quarantine", "list")
    assert "crane:2 refused" in listed.output
    assert "agreement 0.1" in listed.output
    found = json.loads(run(on_one, "quarantine", "list", MODEL, "--json").output)
    assert found[MODEL][0]["answer"]["reason"] == "golden_mismatch"
    assert json.loads(run(on_one, "quarantine", "clear", MODEL, "2", "--json").output) == {"model": MODEL, "cleared": [2]}
    on_one.trial = lambda *_: {}
    on_one.step()
    on_one.until(P.WAITING)
    assert run(on_one, "quarantine", "list").output == "this device refuses no release\n"


# -- hold and unhold -------------------------------------------------------------------------------------------------------------


def test_hold_on_a_release_by_number_and_unhold(on_one: Bench):
    on_one.install(3)
    assert json.loads(run(on_one, "hold", MODEL, "1", "--json").output) == {"model": MODEL, "held": 1}
    on_one.manifest_problem = Problem  # type: ignore[assignment]
    on_one.step()
    on_one.until(P.STEADY)
    assert on_one.serving == 1
    on_one.manifest_problem = None
    assert "follows the fleet again" in run(on_one, "unhold", MODEL).output
    assert "was not held" in run(on_one, "unhold", MODEL).output
    on_one.step()
    on_one.until(P.STEADY)

    assert on_one.serving == 3


# -- windows ---------------------------------------------------------------------------------------------------------------------


def test_the_devices_own_window_is_waited_for(on_one: Bench):
    opens = hour(on_one, 2)
    set_up(on_one, windows=(f"{opens:02}:00-{(opens + 1) % 24:02}:00",))
    on_one.release(3, watch=WATCH)
    on_one.want(3)
    on_one.step()
    on_one.until(P.WAITING)
    assert on_one.updater.state.waiting_for == "window"
    on_one.until(P.STEADY, steps=4000)

    assert on_one.serving == 3
    assert hour(on_one, 0) == opens


def test_both_windows_have_to_be_open(on_one: Bench):
    now = hour(on_one, 0)
    set_up(on_one, windows=(f"{now:02}:00-{(now + 2) % 24:02}:00",))
    later = 60 * ((now + 1) % 24)
    rollout = Rollout(
        id="r", release=3, previous=1, permille=1000, window=Window(start_minute=later, end_minute=(later + 60) % 1440)
    )
    on_one.release(3, watch=WATCH)
    on_one.want(1, rollout=rollout)
    on_one.step()
    on_one.until(P.WAITING)
    on_one.until(P.STEADY, steps=4000)

    assert on_one.serving == 3
    assert hour(on_one, 0) == (now + 1) % 24


WINDOWS = [
    ("22:00-05:00", 1320, 300, (0, 1, 2, 3, 4, 5, 6)),
    ("mon-fri 01:30-04:00", 90, 240, (0, 1, 2, 3, 4)),
    ("sat,sun 00:00-24:00", 0, 1440, (5, 6)),
    ("Fri-Mon 00:00-01:00", 0, 60, (0, 4, 5, 6)),
]


@pytest.mark.parametrize(("text", "start", "end", "days"), WINDOWS)
def test_windows_in_words(text, start, end, days):
    assert parse_window(text) == Window(start_minute=start, end_minute=end, days=days)


@pytest.mark.parametrize(
    "text", ["", "always", "25:00-26:00", "1:00-2:00", "01:70-02:00", "moon 01:00-02:00", "mon-noon 01:00-02:00"]
)
def test_a_window_that_is_none(text, tmp_path: Path):
    with pytest.raises(ValueError, match=r"window|start_minute"):
        parse_window(text)
    path = tmp_path / "agent.yaml"
    path.write_bytes(encode({"sync": {"windows": [text]}}))
    with pytest.raises(ConfigError, match="sync"):
        load_config(path)


def test_names_of_models_are_completed(on_one: Bench):
    from agent.sync.cli.common import complete_model
    from agent.sync.cli.operator import approve

    config = on_one.folder / "agent.yaml"
    config.write_text(json.dumps({"store": str(on_one.store.root)}))
    context = approve.make_context("approve", [MODEL, "--config", str(config)])

    assert complete_model(context, approve.params[0], "cr") == [MODEL]
    assert complete_model(context, approve.params[0], "x") == []
    context.params["config_path"] = on_one.folder / "missing.yaml"
    assert complete_model(context, approve.params[0], "") == []
