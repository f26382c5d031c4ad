"""What version 0.1.0 wrote is read: states, a journal and selections with the words of then, as literal files."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.contract.reports import Phase
from agent.store import Choice, Selection, Store
from agent.sync.updating.journal import Journal
from agent.sync.updating.states import States

STATE = (
    b'{"activated":true,"answers":[{"at":5.0,"evidence":{},"message":"the word \\"peers\\": or \\"waiting_for\\":\\"others\\"",'
    b'"outcome":"failed","reason":null,"release":2,"rollout":null}],"before":{"variant":"cpu","version":1},"canaried":null,'
    b'"committed":[],"failure":null,"format":1,"interruptions":0,"judged_by":null,"manifest":"aa","mode":"install","model":"MODEL",'
    b'"peers":["arm","eye"],"phase":"watching","retry_at":null,"rollout":null,"shadowed":null,"since":7.0,"stopped":null,"target":2,'
    b'"trial_began":false,"tries":0,"unreported":0,"variant":"cpu","waiting_for":null,"wanted":2,"watched":null}'
)
WAITING = STATE.replace(b'"peers":["arm","eye"],"phase":"watching"', b'"peers":[],"phase":"waiting"').replace(
    b'"waiting_for":null', b'"waiting_for":"others"'
)


def state_of(model: str, document: bytes = STATE) -> bytes:
    return document.replace(b"MODEL", model.encode())


def test_a_state_with_its_team(tmp_path: Path):
    (tmp_path / "arm.json").write_bytes(state_of("arm"))
    state = States(tmp_path).load("arm")
    assert state.team == ("arm", "eye")
    assert state.phase is Phase.WATCHING
    assert state.answers[0].message == 'the word "peers": or "waiting_for":"others"'


def test_a_state_that_waits_for_the_others(tmp_path: Path):
    (tmp_path / "arm.json").write_bytes(state_of("arm", WAITING))
    assert States(tmp_path).load("arm").waiting_for == "team"


def test_the_states_of_a_team_that_were_being_saved(tmp_path: Path):
    (tmp_path / "arm.json").write_bytes(state_of("arm", WAITING))
    together = b'{"format":1,"states":[' + state_of("arm") + b"," + state_of("eye") + b"]}"
    (tmp_path / ".together.json").write_bytes(together)
    states = States(tmp_path)
    assert [states.load(model).team for model in ("arm", "eye")] == [("arm", "eye"), ("arm", "eye")]
    states.save(states.load("arm").but(phase=Phase.STEADY, team=()))

    again = States(tmp_path)
    assert again.load("arm").phase is Phase.STEADY
    assert again.load("eye").phase is Phase.WATCHING
    assert not (tmp_path / ".together.json").exists()


def test_a_journal(tmp_path: Path):
    entries = (
        b'[{"at":1.0,"evidence":{},"gate":"together","message":"waits","reason":null,"release":2,"rollout":null,"times":3,'
        b'"verdict":"waits"},{"at":2.0,"evidence":{},"gate":"watch","message":"","reason":null,"release":2,"rollout":null,'
        b'"times":1,"verdict":"committed"}]'
    )
    (tmp_path / "arm.json").write_bytes(b'{"entries":' + entries + b',"format":1}')
    assert [entry.gate for entry in Journal(tmp_path).entries("arm")] == ["team", "watch"]


@pytest.mark.parametrize("reader", ["sync", "serve"])
def test_selections_that_were_being_written(reader: str, tmp_path: Path):
    store = Store.create(tmp_path / "store")
    store.select(Selection(model="arm", active=Choice(version=1, variant="cpu")))
    (store.root / "models" / ".together.json").write_bytes(
        b'{"format":1,"selections":{"arm":{"active":{"variant":"cpu","version":2},"format":1,"model":"arm","previous":null},"eye":null}}'
    )
    found = Store.create(store.root) if reader == "sync" else Store(store.root)
    selection = found.selection("arm")
    assert selection is not None
    assert selection.active.version == 2
    assert list(found.selections()) == ["arm"]
    assert (store.root / "models" / ".together.json").exists() == (reader == "serve")
