"""The records of what several models do at once: large ones count, and damaged ones stop nobody."""

from __future__ import annotations

from pathlib import Path

from agent.contract.reports import Answer, Outcome, Phase
from agent.store import Choice, Selection, Store
from agent.sync.updating.states import States
from agent.sync.updating.update import UpdateState


def test_a_damaged_record_of_several_selections_does_not_stop_the_device(tmp_path: Path):
    store = Store.create(tmp_path)
    one = Selection(model="arm", active=Choice(version=1, variant="cpu"))
    store.select(one)
    (tmp_path / "models" / ".together.json").write_bytes(b"\0" * 100)

    store = Store.create(tmp_path)

    assert store.selection("arm") == one
    store.deselect("arm")
    assert store.selection("arm") is None


def test_states_that_are_large_together_are_saved_together(tmp_path: Path):
    answers = tuple(Answer(release=n, outcome=Outcome.REFUSED, message="x" * 2000) for n in range(1, 21))
    models = [f"m{n}" for n in range(32)]
    states = States(tmp_path)
    states.save_team([UpdateState(model=m, phase=Phase.ACTIVATING, answers=answers) for m in models])

    found = [States(tmp_path).read(model) for model in models]

    assert [state.phase for state in found if state is not None] == [Phase.ACTIVATING] * 32
