"""The outbox keeps its order, its bounds, and what it promised, also when the disk does not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.sync.fleet.outbox import Outbox


@pytest.fixture
def outbox(tmp_path: Path):
    box = Outbox(tmp_path / "outbox.db", max_items=5, max_bytes=1000)
    yield box
    box.close()


def kept(box: Outbox) -> list[bytes]:
    return [item.payload for item in box.first(100)]


def test_first_in_first_out_and_gone_only_when_delivered(outbox: Outbox):
    for text in (b"1", b"2", b"3"):
        outbox.put("events", text)
    first, second = outbox.first(2)
    outbox.delivered(first.id)

    assert kept(outbox) == [b"2", b"3"]
    assert [item.payload for item in outbox.first(5, after=second.id)] == [b"3"]


def test_state_reports_replace_each_other(outbox: Outbox):
    outbox.put("state", b"old")
    outbox.put("events", b"e")
    outbox.put("state", b"new")

    assert kept(outbox) == [b"e", b"new"]


def test_telemetry_goes_first_then_events_and_the_state_stays(outbox: Outbox):
    outbox.put("state", b"s")
    for n in range(3):
        outbox.put("telemetry", b"t%d" % n)
    for n in range(6):
        outbox.put("events", b"e%d" % n)

    assert kept(outbox) == [b"s", b"e2", b"e3", b"e4", b"e5"]
    assert outbox.dropped() == {"telemetry": 3, "events": 2}


def test_bytes_are_bounded_too(outbox: Outbox):
    for _ in range(4):
        outbox.put("events", b"x" * 400)

    assert len(kept(outbox)) == 2


def test_it_survives_being_closed(tmp_path: Path):
    box = Outbox(tmp_path / "outbox.db")
    box.put("events", b"1")
    box.close()
    box = Outbox(tmp_path / "outbox.db")

    assert kept(box) == [b"1"]
    box.close()


@pytest.mark.parametrize("damage", [b"", b"\0" * 5000, b"SQLite format 3\0" + b"\xff" * 5000], ids=["empty", "zeros", "junk"])
def test_a_damaged_database_is_put_aside(damage, tmp_path: Path):
    path = tmp_path / "outbox.db"
    box = Outbox(path)
    box.put("events", b"lost")
    box.close()
    path.write_bytes(damage)
    box = Outbox(path)
    box.put("events", b"kept")

    assert kept(box) == [b"kept"]
    assert damage == b"" or path.with_name("outbox.db.damaged").read_bytes() == damage
    box.close()


def test_a_database_of_a_newer_version_is_put_aside(tmp_path: Path):
    import sqlite3

    db = sqlite3.connect(tmp_path / "outbox.db")
    db.execute("PRAGMA user_version = 99")
    db.commit()
    db.close()
    box = Outbox(tmp_path / "outbox.db")
    box.put("events", b"kept")

    assert kept(box) == [b"kept"]
    box.close()


def test_killed_while_writing_nothing_that_was_put_is_lost(tmp_path: Path):
    code = (
        "import sys; from pathlib import Path; from agent.sync.fleet.outbox import Outbox\n"
        "box = Outbox(Path(sys.argv[1])); n = 0\n"
        "while True:\n    box.put('events', str(n).encode()); print(n, flush=True); n += 1\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "outbox.db")], stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None
        said = [writer.stdout.readline() for _ in range(50)]
        os.kill(writer.pid, signal.SIGKILL)
        said += writer.stdout.readlines()
    complete = [int(line) for line in said if line.endswith("\n")]
    box = Outbox(tmp_path / "outbox.db")

    assert [int(payload) for payload in kept_all(box)][: len(complete)] == complete
    box.close()


def kept_all(box: Outbox) -> list[bytes]:
    return [item.payload for item in box.first(100_000)]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["state", "events", "telemetry", "deliver"]), st.binary(max_size=50)), max_size=40))
def test_the_bounds_hold_and_order_stays(tmp_path_factory, actions):
    box = Outbox(tmp_path_factory.mktemp("box") / "o.db", max_items=4, max_bytes=120)
    for kind, payload in actions:
        if kind == "deliver":
            for item in box.first(1):
                box.delivered(item.id)
        else:
            box.put(kind, payload)
        items = box.first(100)
        assert len(items) <= 4
        assert sum(len(item.payload) for item in items) <= 120
        assert [item.id for item in items] == sorted(item.id for item in items)
        assert sum(item.kind == "state" for item in items) <= 1
    box.close()
