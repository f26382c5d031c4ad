"""Deleting releases: their files go, and never those of one that is assigned, in a rollout, served, or gone back to."""

import pytest

from agent.contract.names import ReleaseRef
from fleet_server.access import SERVER
from fleet_server.errors import Conflict, Invalid, NotFound
from fleet_server.rollouts.retention import needed
from tests.fleet.stand import sha256, wait_until
from tests.fleet.test_publishing import describe
from tests.fleet.test_rollouts import Story


@pytest.fixture
def story(fleet, clock):
    fleet.database.migrate()
    made = Story(fleet, clock)
    made.join("d1", "d2")
    return made


def ref(version):
    return ReleaseRef("digits", version)


def files(story):
    return {version for version in range(1, 20) if story.fleet.blobs.size(sha256(f"digits {version}".encode())) is not None}


def why_not(story, version):
    with pytest.raises(Conflict) as refused:
        story.fleet.retention.delete(SERVER, ref(version))
    assert refused.value.code == "needed"
    return str(refused.value)


def bring(story, version):
    """To every device."""
    rollout = story.start(version)
    story.commits("d1", "d2", version=version)
    assert story.state(rollout) == "completed"


def test_what_somebody_needs_stays(story):
    story.publish(1, 2, 3, 4)
    bring(story, 1)
    bring(story, 2)
    rollout = story.start(3)
    assert "every device is assigned" in why_not(story, 2)
    assert rollout in why_not(story, 3)
    assert "goes back to it" in why_not(story, 1)
    story.fleet.retention.delete(SERVER, ref(4))
    assert files(story) == {1, 2, 3}
    story.commits("d1", "d2", version=3)
    assert "goes back to it" in why_not(story, 2)
    story.fleet.retention.delete(SERVER, ref(1))
    assert files(story) == {2, 3}
    with pytest.raises(Conflict) as twice:
        story.fleet.retention.delete(SERVER, ref(1))
    assert twice.value.code == "deleted"
    with pytest.raises(NotFound):
        story.fleet.retention.delete(SERVER, ref(99))


def test_what_a_device_serves_stays(story):
    story.publish(1, 2, 3)
    for version in (1, 2, 3):
        bring(story, version)
    story.say("d2", 1)  # it was restored from an old card
    assert "'d2' serves it" in why_not(story, 1)
    story.fleet.inventory.revoke(SERVER, "d2")
    story.fleet.retention.delete(SERVER, ref(1))
    assert files(story) == {2, 3}


def test_what_an_excluded_class_runs_instead_stays(story):
    from fleet_server.storage.models import ExclusionRow

    story.publish(1, 2)
    with story.fleet.database.session() as session:
        row = ExclusionRow(
            model="digits", release=2, hardware="x", instead=1, rollout="r", at=0.0, count=1, reason="", devices=[]
        )
        session.add(row)
    assert "runs it instead of 2" in why_not(story, 1)
    with story.fleet.database.session() as session:
        session.get(ExclusionRow, 1).ended = 1.0
    story.fleet.retention.delete(SERVER, ref(1))


def test_a_deleted_release_is_not_rolled_out_nor_gone_back_to_until_its_files_are_here_again(story):
    story.publish(1, 2, 3)
    for version in (1, 2, 3):
        bring(story, version)
    story.fleet.retention.delete(SERVER, ref(1))
    for action in (lambda: story.start(1), lambda: story.fleet.rollouts.roll_back(SERVER, "digits", 1)):
        with pytest.raises(Conflict) as refused:
            action()
        assert refused.value.code == "deleted"
    assert story.fleet.rollouts.roll_back(SERVER, "digits", None).release == 2
    with story.fleet.database.reading() as session:
        assert ref(1) not in needed(session), "and nothing goes back to what is gone"
    with pytest.raises(Invalid) as missing:
        story.fleet.retention.undelete(SERVER, ref(1))
    assert missing.value.code == "missing_blob"
    (story.fleet.folder.blobs / sha256(b"digits 1")).write_bytes(b"digits 1")
    story.fleet.retention.undelete(SERVER, ref(1))
    story.fleet.rollouts.roll_back(SERVER, "digits", 1)
    assert story.assignment.models["digits"].release == 1


def test_a_file_that_another_release_has_stays(story, fleet):
    from fleet_server.releases import keys, publisher
    from tests.fleet.stand import simple_manifest

    story.publish(1)
    manifest = simple_manifest("other", 7, b"digits 1")
    role = fleet.repository.releases()
    fleet.catalogue.publish(SERVER, *publisher.add(role, manifest, keys.load(fleet.releases_key), story.clock()))
    fleet.retention.delete(SERVER, ref(1))
    assert files(story) == {1}
    fleet.retention.delete(SERVER, ReleaseRef("other", 7))
    assert files(story) == set()


def test_the_newest_are_kept_and_what_is_needed(story, fleet):
    keeps, fleet.retention.kept = fleet.retention, 2
    story.publish(1, 2, 3, 4, 5, 6)
    bring(story, 1)
    bring(story, 3)
    assert keeps.apply() == 2
    assert files(story) == {1, 3, 5, 6}
    assert keeps.apply() == 0
    assert [row.action for row in fleet.journal.audited()][:2] == ["release.delete"] * 2
    assert fleet.retention.apply() == 0
    fleet.repository.check()
    assert fleet.catalogue.reconcile() == [], "a deleted release is still published"


def test_from_the_command_line(server, tmp_path):
    path = describe(tmp_path, "shelf", 1)
    assert server.cli("publish", path, "--key", server.releases_key, "--yes").returncode == 0
    blobs = {one.name for one in (server.data / "blobs").iterdir()}

    done = server.cli("release", "delete", "shelf:1", "--yes")
    assert done.returncode == 0, done.stderr
    assert not {one.name for one in (server.data / "blobs").iterdir()} & blobs
    assert "deleted" in server.cli("release", "list").stdout
    refused = server.cli("rollout", "start", "shelf:1")
    assert refused.returncode == 3
    assert "publish the same release again" in refused.stderr
    again = server.cli("publish", path, "--key", server.releases_key, "--yes")
    assert again.returncode == 0, again.stderr
    assert {one.name for one in (server.data / "blobs").iterdir()} >= blobs
    assert server.cli("rollout", "start", "shelf:1").returncode == 0
    refused = server.cli("release", "delete", "shelf:1", "--yes")
    assert refused.returncode == 3
    assert "cannot be deleted" in refused.stderr
    wait_until(lambda: server.get("/status")["broker_connected"], "all is well")
