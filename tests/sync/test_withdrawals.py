"""A thief of the online keys offers again what was withdrawn: by the rules alone, and against the real client."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.contract.assignment import Assignment, ModelAssignment
from agent.contract.names import ReleaseRef
from agent.sync.trust import withdrawals
from tests.sync.fleet import DAY, script_release
from tests.sync.test_trust import make_trust, trust

__all__ = ["make_trust", "trust"]
PATH = "releases/crane/2.json"


def assignment(*withdrawn: int) -> Assignment:
    return Assignment(fleet="harbour", version=1, models={"crane": ModelAssignment(release=2, withdrawn=withdrawn)})


def signed(**counts: int):
    """Releases that publishers signed, by number, with how often they were reinstated."""
    known = {int(name.removeprefix("r")): count for name, count in counts.items()}

    def count(ref: ReleaseRef) -> int | None:
        return known.get(ref.version)

    return count


def away(_: ReleaseRef) -> int | None:
    raise LookupError


ROWS = [
    ("it is remembered", [((2,), signed(r2=0)), ((), signed(r2=0))], (2,)),
    ("nothing that nobody signed is remembered", [((2, 3, 4), signed(r2=0))], (2,)),
    ("the publisher reinstates it", [((2,), signed(r2=0)), ((), signed(r2=1))], ()),
    ("withdrawn again after that", [((2,), signed(r2=0)), ((), signed(r2=1)), ((2,), signed(r2=1)), ((), signed(r2=1))], (2,)),
    (
        "reinstated and withdrawn again while the device was away",
        [((2,), signed(r2=0)), ((2,), signed(r2=1)), ((), signed(r2=1))],
        (2,),
    ),
    ("reinstated twice", [((2,), signed(r2=1)), ((), signed(r2=2))], ()),
    ("a lower number reinstates nothing", [((2,), signed(r2=3)), ((), signed(r2=1))], (2,)),
    ("while it cannot be learnt nothing is reinstated", [((2,), signed(r2=0)), ((), away)], (2,)),
    ("an unknown number is decided by the first that is known", [((2,), away), ((), signed(r2=5)), ((), signed(r2=5))], (2,)),
    ("and reinstated by a higher one", [((2,), away), ((), signed(r2=5)), ((), signed(r2=6))], ()),
    ("a publisher that vanished reinstates nothing", [((2,), signed(r2=0)), ((), signed())], (2,)),
]


@pytest.mark.parametrize(("steps", "expected"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_rules(steps, expected):
    known: dict[str, dict[str, int]] = {}
    for listed, count in steps:
        known = withdrawals.remember(known, assignment(*listed), count)
    assert withdrawals.refused(known).get("crane", ()) == expected


@pytest.mark.alone  # each example has a deadline
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 1)), max_size=12))
def test_only_the_publisher_lifts(history):
    """Whatever the server says and in whatever order: a withdrawn release is free only after a reinstatement that followed it."""
    known: dict[str, dict[str, int]] = {}
    count, withdrawn_at = 0, None
    for listed, more in history:
        count += more
        known = withdrawals.remember(known, assignment(*([2] if listed else [])), signed(r2=count))
        if listed:
            withdrawn_at = count
        elif withdrawn_at is not None and count > withdrawn_at:
            withdrawn_at = None
        assert (2 in withdrawals.refused(known).get("crane", ())) == (withdrawn_at is not None)


def test_a_flood_of_numbers_is_bounded():
    listed = assignment(*range(1, 100_000))
    known = withdrawals.remember({}, listed, lambda ref: 0)
    assert len(known["crane"]) == withdrawals.MAX_PER_MODEL
    assert "99999" in known["crane"]


@pytest.fixture
def two_releases(repository, tmp_path):
    for version in (1, 2):
        repository.publish(*script_release(tmp_path / f"r{version}", version, f"scale {version}"))
    return repository


def test_a_release_that_was_withdrawn_is_not_taken_back_from_the_server(trust, make_trust, two_releases):
    two_releases.assign("crane", 1, withdrawn=(2,))
    assert trust.refresh().withdrawn("crane", 2)

    two_releases.assign("crane", 2)
    desired = make_trust().refresh()

    assert desired.withdrawn("crane", 2)
    assert desired.wanted("crane").release is None
    assert [str(ref) for ref in desired.contradicted()] == ["crane:2"]
    assert make_trust().remembered().wanted("crane").release is None, "also after a restart without the network"


def test_the_publishers_signature_lifts_it(trust, two_releases):
    two_releases.assign("crane", 1, withdrawn=(2,))
    trust.refresh()
    two_releases.reinstated[PATH] = 1
    two_releases.assign("crane", 2)

    desired = trust.refresh()

    assert desired.wanted("crane").release == 2
    assert desired.contradicted() == ()


def test_the_memory_outlives_new_online_keys(trust, two_releases):
    two_releases.assign("crane", 1, withdrawn=(2,))
    trust.refresh()
    for role in ("timestamp", "snapshot"):
        two_releases.rotate_root(role)
    two_releases.rotate_assignments()
    two_releases.assign("crane", 2)

    assert trust.refresh().wanted("crane").release is None


def test_an_expired_publisher_does_not_hold_up_the_rest(trust, two_releases):
    import time

    two_releases.assign("crane", 1)
    trust.refresh()
    two_releases.expires["releases"] = time.time() - DAY
    two_releases.assign("crane", 1, withdrawn=(2,))

    assert trust.refresh().withdrawn("crane", 2), "withdrawals are obeyed"


def test_a_damaged_memory_forgives_nothing(trust, two_releases, tmp_path):
    from agent.contract.reasons import Reason
    from tests.sync.test_trust import reason_of

    two_releases.assign("crane", 1, withdrawn=(2,))
    trust.refresh()
    path = tmp_path / "trust" / "seen.json"
    assert json.loads(path.read_text())["withdrawn"] == {"crane": {"2": 0}}
    path.write_text(path.read_text()[:-9])

    assert reason_of(trust.refresh) is Reason.STORE_FAILED
