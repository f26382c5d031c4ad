"""Documents that were signed or written down when teams had another key are read with their teams."""

import json

from agent.contract.assignment import Rollout, read_assignment
from agent.contract.codec import encode
from agent.sync.trust.desired import read_desired

SIGNED_BEFORE = {
    "fleet": "harbour", "format": 1, "kind": "assignment", "version": 7, "together": {"r3-9f1c": {"arm": 2, "eye": 5}},
    "models": {
        "arm": {
            "excluded": [], "release": 1, "withdrawn": [],
            "rollout": {
                "id": "r3-9f1c", "release": 2, "previous": 1, "groups": ["canary"], "permille": 500, "mode": "install", "window": None,
                "together": "r3-9f1c",
            },
        },
        "eye": {"excluded": [], "release": 4, "rollout": None, "withdrawn": [3]},
    },
}  # fmt: skip
RECORD = {"fleet": "harbour", "device": "crane-7", "serial": 3, "groups": ["canary"], "issued": 1.0, "expires": 2.0}


def test_an_assignment_that_was_signed_before_keeps_its_teams():
    found = read_assignment(json.dumps(SIGNED_BEFORE).encode())
    assert found.teams == {"r3-9f1c": {"arm": 2, "eye": 5}}
    assert found.models["arm"].rollout == Rollout(
        id="r3-9f1c", release=2, previous=1, groups=("canary",), permille=500, team="r3-9f1c"
    )
    assert read_assignment(encode(found)) == found, "and is written with the present keys"
    assert b"together" not in encode(found)


def test_what_a_device_wrote_down_before_keeps_its_teams():
    written = {"assignment": SIGNED_BEFORE, "record": RECORD, "verified_at": 1.0, "valid_until": 2.0, "format": 1}
    found = read_desired(json.dumps(written).encode())
    assert found.assignment.teams == {"r3-9f1c": {"arm": 2, "eye": 5}}
    assert read_desired(encode(found)) == found
