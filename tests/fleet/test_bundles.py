"""A bundle has what its devices should run, signed as it is in force, and is a file that any tar lists."""

import json
import tarfile

import pytest
import requests

from agent.contract import bundle
from agent.contract.acceptance import WatchRules
from agent.contract.assignment import Exclusion, ModelAssignment
from agent.contract.codec import decode
from fleet_server.rollouts.bundles import may_want
from tests import warm
from tests.fleet.stand import sha256


@pytest.fixture(scope="module")
def filled(server):
    server.enrol("crane-1", groups=["harbour"])
    server.enrol("crane-2")
    for model in ("digits", "faces"):
        server.publish_simple(model, 1, data=f"{model} one".encode() * 1000)
        server.post("/rollouts", {"release": f"{model}:1"})
    return server


def packed(server, path, **body):
    answer = server.request("POST", "/bundles", json=body)
    assert answer.status_code == 200, answer.text
    path.write_bytes(answer.content)
    with path.open("rb") as file:
        members = {member.name: member for member in bundle.members(file)}
        about = decode(bundle.read(file, members["bundle.json"]), bundle.Bundle, limit_bytes=1 << 20)
    return about, members


def test_everything_for_everybody(filled, tmp_path):
    about, members = packed(filled, tmp_path / "b")

    assert about.fleet == "test"
    assert set(about.devices) == {"crane-1", "crane-2"}
    assert set(about.releases) == {"digits:1", "faces:1"}
    assert {name for name in members if name.startswith("blobs/")} == {
        f"blobs/{sha256(model * 1000)}" for model in (b"digits one", b"faces one")
    }
    assert {"records/crane-1.json", "records/crane-2.json", "metadata/timestamp.json", "metadata/1.root.json"} <= set(members)
    with tarfile.open(tmp_path / "b") as tar:
        assert len(tar.getnames()) == len(members)


def test_one_model_for_one_device(filled, tmp_path):
    about, members = packed(filled, tmp_path / "b", models=["digits"], devices=["crane-2"])

    assert about.releases == ("digits:1",)
    assert [name for name in members if name.startswith("records/")] == ["records/crane-2.json"]
    assert not any("faces" in name for name in members)


def test_the_devices_of_a_group(filled, tmp_path):
    about, _ = packed(filled, tmp_path / "b", group="harbour")

    assert about.devices == ("crane-1",)


def test_a_class_that_is_excluded_from_a_release_gets_what_it_runs_instead():
    rules = ModelAssignment(release=2, excluded=(Exclusion(release=2, hardware="pi", instead=1),))
    assert may_want(rules, "d", [], "pi") == {1}
    assert may_want(rules, "d", [], "jetson") == {2}
    assert may_want(rules, "d", [], None) == {1, 2}, "it has never said what it is"


def test_it_can_be_believed_for_longer(filled, tmp_path):
    usual, _ = packed(filled, tmp_path / "b")
    longer, _ = packed(filled, tmp_path / "c", valid_days=30)

    assert longer.valid_until - longer.created > 29 * 86400
    assert usual.valid_until - usual.created < 2 * 86400


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"devices": ["nobody"]}, 404),
        ({"group": "empty"}, 404),
        ({"models": ["unknown"]}, 404),
        ({"devices": ["crane-1"], "group": "harbour"}, 400),
        ({"valid_days": 1000}, 400),
    ],
)
def test_what_cannot_be_packed(filled, body, status):
    assert filled.request("POST", "/bundles", json=body).status_code in {status, 422}


def test_it_takes_an_operator(filled):
    assert filled.request("POST", "/bundles", json={}, token=filled.make_token("viewer")).status_code == 403
    assert requests.post(filled.url + "/api/v1/bundles", json={}, verify=str(filled.ca), timeout=10).status_code == 401


def test_by_command(filled, tmp_path):
    path = tmp_path / "fleet.bundle"
    done = filled.cli("bundle", "--output", path, "--device", "crane-1", "--json")

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["releases"] == ["digits:1", "faces:1"]
    assert json.loads(done.stdout)["size_bytes"] == path.stat().st_size
    refused = filled.cli("bundle", "--output", tmp_path / "no", "--device", "nobody")
    assert refused.returncode == 3
    assert [one.name for one in tmp_path.iterdir()] == ["fleet.bundle"]


def test_from_the_server_to_a_device_without_a_network(own_server, tmp_path):
    """The real commands on both sides; between them a file."""

    from agent.store import Store
    from tests.fleet.stand import environment
    from tests.sync.fake_serve import FakeServe
    from tests.sync.fleet import onnx_release

    server = own_server.start()
    store = Store.create(tmp_path / "device" / "store")
    config = tmp_path / "device" / "agent.yaml"
    config.write_text(
        json.dumps(
            {
                "store": str(store.root),
                "serve": {"socket": str(tmp_path / "s.sock")},
                "sync": {"identity": str(tmp_path / "device" / "identity"), "disk_reserve_bytes": 0, "watch_poll_s": 0.05},
            }
        )
    )

    def agent(*line):
        return warm.run("agent.cli", [*map(str, line), "--config", str(config)], env=environment(), timeout=90)

    assert agent("enrol", str(server.enrolment_string()), "--device", "crane-9").returncode == 0
    manifest, contents = onnx_release(tmp_path / "release", 1, 2.0, watch=WatchRules(duration_s=0.2, max_duration_s=5.0))
    assert server.publish(manifest, contents.values()).status_code == 200
    server.post("/rollouts", {"release": "crane:1"})
    file = tmp_path / "crane.bundle"
    assert server.cli("bundle", "-o", file, "--device", "crane-9").returncode == 0
    server.stop()
    serve = FakeServe(store, tmp_path / "s.sock")
    try:
        done = agent("import", file)
        assert done.returncode == 0, done.stderr
        assert serve.models["crane"]["active"] == 1
        assert agent("import", file).returncode == 0
    finally:
        serve.stop()
