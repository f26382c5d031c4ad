"""What a simulated device that verifies believes of what a poke carries, and what not. No server is asked."""

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from agent.contract.codec import ContractError, encode
from agent.contract.names import ReleaseRef
from agent.contract.news import unpack
from agent.contract.topics import Poke
from fleet_server.errors import FleetError, Refused
from fleet_server.releases import keys
from fleet_server.releases import news as packing
from fleet_server.simulation import news, releases
from fleet_server.simulation.looks import Looker
from fleet_server.simulation.papers import Address, Papers
from fleet_server.storage.models import Device


@pytest.fixture
def told(fleet):
    """A fleet that assigns m:1 to everyone and brings out m:2 … as news with the record of the device d-1."""
    releases.publish(fleet, [ReleaseRef("m", 1)], keys.load(fleet.releases_key))
    releases.assign(fleet, {"m": 1})
    with fleet.database.session() as session:
        row = Device(
            id="d-1", created=0.0, groups=["shop"], labels={}, serial=7, revoked=False, counter=-1, session=-1, present=False
        )
        fleet.inventory.sign_record(row)
        session.add(row)
    packed = packing.packed(fleet.repository, fleet.inventory.record("d-1"))
    data, _, _ = fleet.repository.in_force()
    needed = {path: text.decode() for path, text in data.items() if not path.endswith("root.json")}
    _, target, _ = fleet.repository.in_force()
    needed |= {path: text.decode() for path, text in target(ReleaseRef("m", 1).target_path).items()}
    found = unpack(packed)
    return fleet, msgspec.structs.replace(found, documents={**needed, **found.documents})


def looker(fleet, tmp_path, device="d-1", name="test"):
    address = Address(
        fleet=name, device_url="https://127.0.0.1:1", broker_host="127.0.0.1", broker_port=1, ca=fleet.authority.ca_path,
        root=fleet.repository.root_bytes(),
    )  # fmt: skip
    return Looker(address, Papers(device, ec.generate_private_key(ec.SECP256R1()), tmp_path / "none.pem"), tmp_path / device)


def test_news_that_verifies_are_believed(told, tmp_path):
    fleet, said = told
    found = looker(fleet, tmp_path).look(said)
    assert found.assignment.models["m"].release == 1
    assert found.groups == ("shop",)
    assert [str(manifest.ref) for manifest in found.manifests] == ["m:1"]


TAMPERED = [
    ("the assignment", "targets/assignments/", '"release":1', '"release":9'),
    ("the timestamp", "metadata/timestamp.json", '"version":', '"version":1'),
    ("a manifest", "targets/releases/", '"version":1', '"version":2'),
    ("the record", "record", '"sig":"', '"sig":"AAAA'),
]


@pytest.mark.parametrize(("what", "beginning", "old", "new"), TAMPERED, ids=[row[0] for row in TAMPERED])
def test_news_that_were_changed_are_not(told, tmp_path, what, beginning, old, new):
    fleet, said = told
    changed = {path: text.replace(old, new) if path.startswith(beginning) else text for path, text in said.documents.items()}
    assert changed != said.documents
    with pytest.raises(Refused, match="d-1"):
        looker(fleet, tmp_path).look(msgspec.structs.replace(said, documents=changed))


def test_a_poke_that_is_older_than_what_is_known_is_no_news(told, tmp_path):
    fleet, said = told
    device = looker(fleet, tmp_path)
    assert device.look(said) is not None
    releases.assign(fleet, {"m": 1})
    packed = unpack(packing.packed(fleet.repository, fleet.inventory.record("d-1")))
    newer = msgspec.structs.replace(packed, documents={**said.documents, **packed.documents})
    assert device.look(newer).assignment.version > 2
    assert device.look(said) is None


def test_the_record_of_another_and_the_word_of_another_fleet(told, tmp_path):
    fleet, said = told
    with pytest.raises(FleetError, match="the device record is of 'd-1'"):
        looker(fleet, tmp_path, device="d-2").look(said)
    with pytest.raises(FleetError, match="the assignment is of fleet 'test'"):
        looker(fleet, tmp_path, name="other").look(said)


def test_what_is_read_without_verifying(told):
    fleet, _ = told
    poke = encode(
        Poke(assignment_version=2, news=packing.packed(fleet.repository, fleet.inventory.record("d-1")), spread_s=1.0)
    )
    found = news.Reader().read(poke)
    assert (found.assignment.models["m"].release, found.groups, found.spread_s) == (1, ("shop",), 1.0)
    for broken in (b"", b"{}x", poke[:-20], poke.replace(b'"news":"', b'"news":"AAAA')):
        with pytest.raises(ContractError):
            news.Reader().read(broken)
