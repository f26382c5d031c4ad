"""One word for one thing: what was called otherwise once is found nowhere but where an old name is answered with the new one.

The words are those of docs/reference/glossary.md.
"""

import re
from pathlib import Path

import pytest

from tests.checkout import ROOT, names

OLD = {
    r"\benrolls?\b|\benrollments?\b": "enrol, enrolment",
    r"\b[Rr]oll-backs?\b": "roll back (verb), rollback (noun)",
    r"\bcolleagues?\b|\bjoint lock\b|save_together|select_together|activate_together": "team, member",
    r"stopped.class|class.stop|class_lifted": "exclusion",
    r"rollout_holding|State\.HOLDING|Event\.HOLD\b|--hold\b": "waiting, --confirm",
    r"\blift(s|ed|ing)? (a|the|that) (withdrawal|hold|exclusion)|class\.lift": "reinstate, unhold, end an exclusion",
    r"\bpeer_listen\b|\bsync\.peers\b|peer_limit_bytes_per_s": "neighbours, neighbour_listen",
    r"\bHolds\([^)]*\)\.(pin|pinned|lift)\b": "hold, held, unhold",
    r'edge-fleet (devices|releases)\b(?!")|edge-fleet rollout (stopped|lift)\b': "device list, release list, rollout show, exclusion",
}
"""A pattern of what was said → what is said now."""

ANSWERED = {
    "agent/cli/__init__.py",
    "agent/config.py",
    "fleet_server/api/operator/app.py",
    "fleet_server/cli/command.py",
    "fleet_server/config.py",
}
"""Where an old name is answered with the new one."""

TOLD = re.compile(r"CHANGELOG\.md|docs/reference/glossary\.md|fleet_server/storage/migrations/|tests/.*|requirements/.*")
"""What was so once may be told: changes, migrations, and tests of the answers and of what was written before."""

KINDS = {".py", ".md", ".js", ".html", ".css", ".yaml", ".yml", ".toml", ".service", ".socket", ".conf", ".sh", ".c", ""}


@pytest.fixture(scope="module")
def files():
    return {
        name: (ROOT / name).read_text(errors="replace")
        for name in names()
        if Path(name).suffix in KINDS and not TOLD.match(name)
    }


@pytest.mark.parametrize("old", OLD)
def test_no_old_word_is_left(files, old):
    assert len(files) > 400
    found = [
        f"{name}:{number}: {line.strip()[:120]}"
        for name, text in files.items()
        if name not in ANSWERED
        for number, line in enumerate(text.splitlines(), 1)
        if re.search(old, line)
    ]
    assert not found, f"say {OLD[old]}:\n" + "\n".join(found)
