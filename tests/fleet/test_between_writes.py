"""Power gone before each single file write of every signed change: the next start holds together, and devices and database agree.

The order of the writes decides who wins: a release is in the repository first (the index follows it), a decision is in the database
first (the signed assignment follows it), a certificate is revoked in the database first (the list of revoked ones follows it).
"""

import pytest
from cryptography import x509

from agent.common import files
from agent.contract.names import ReleaseRef
from fleet_server.access import SERVER
from fleet_server.app import Fleet
from fleet_server.releases.publication import published
from tests.fleet.test_rollouts import Story, completed


class PowerGone(BaseException):
    pass


@pytest.fixture
def story(fleet, clock):
    made = Story(fleet, clock)
    made.publish(1, 2)
    made.join("canary-1", "plain-1", "plain-2")
    completed(made, 1)
    return made


CHANGES = {
    "publish": (lambda story: story.publish(3), 4),
    "start": (lambda story: story.start(2), 4),
    "withdraw": (lambda story: story.fleet.rollouts.withdraw(SERVER, ReleaseRef("digits", 1)), 4),
    "renew": (lambda story: (setattr(story.clock, "now", story.clock.now + 6 * 86400), story.fleet.repository.renew()), 3),
    "delete a device": (lambda story: story.fleet.inventory.delete(SERVER, "plain-1"), 1),
}


@pytest.mark.no_cover  # it would take two or three times as long
@pytest.mark.parametrize(("name", "survived"), [(name, n) for name, (_, writes) in CHANGES.items() for n in range(writes)])
def test_power_gone_before_each_write(story, clock, monkeypatch, name, survived):
    change, _ = CHANGES[name]
    works, left = files.write, {"writes": survived}

    def write(path, data, **options):
        if left["writes"] == 0:
            raise PowerGone
        left["writes"] -= 1
        works(path, data, **options)

    with monkeypatch.context() as patched:
        patched.setattr(files, "write", write)
        with pytest.raises(PowerGone):
            change(story)
    story.fleet.close()
    story.fleet = again(story.fleet, clock)
    if name == "publish":
        there = [r.version for r in story.fleet.catalogue.published("digits")]
        assert there == [2, 1], "nothing is trusted before the last write"
        change(story)
    check_done(story, name)
    story.fleet.close()


def test_the_rows_above_cover_every_write(story, monkeypatch):
    works = files.write
    for name, (change, writes) in CHANGES.items():
        counted = []
        with monkeypatch.context() as patched:
            patched.setattr(
                files,
                "write",
                lambda path, *rest, counted=counted, **options: (counted.append(path), works(path, *rest, **options)),
            )
            change(story)
        assert len(counted) == writes, (name, counted)


def again(fleet, clock):
    """The next start on the same folder."""
    started = Fleet(fleet.folder, fleet.config, clock)
    started.releases_key = fleet.releases_key
    started.recover()
    started.repository.check()
    listed = [ReleaseRef(r.model, r.version) for r in started.catalogue.published()]
    assert sorted(listed) == published(started.repository.releases().signed)
    before = started.repository.assignment_bytes()
    started.assignment.publish()
    assert started.repository.assignment_bytes() == before, "nothing was left to sign"
    return started


def check_done(story, name):
    if name == "publish":
        assert [r.version for r in story.fleet.catalogue.published("digits")] == [3, 2, 1]
    elif name == "renew":
        assert min(story.fleet.repository.expirations().values()) > story.clock.now
    elif name == "start":
        assert {story.wanted(d) for d in story.devices} == {2}
    elif name == "withdraw":
        assert story.assignment.models["digits"].withdrawn == (1,)
    else:
        revoked = x509.load_pem_x509_crl(story.fleet.authority.crl.read_bytes())
        assert len(list(revoked)) == 1
