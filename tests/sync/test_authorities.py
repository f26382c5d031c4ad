"""A fleet server that replaces its CA: which CAs a device believes, when it renews, and how it finds back after it slept.

Invariant: a CA that is new to a device is believed only when a chain of certified keys leads from one that it believes to it.
"""

from __future__ import annotations

import datetime as dt
import itertools
import time
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID
from hypothesis import given
from hypothesis import strategies as st

from agent.common import files
from agent.contract.assignment import Assignment, DeviceRecord
from agent.contract.authorities import MAX_CROSS_CERTIFICATES, Authorities
from agent.contract.codec import ContractError, decode, encode
from agent.contract.enrolment import EnrolmentResponse
from agent.host.clock import LastKnownGood, SignedClock
from agent.sync import authorities, identity
from agent.sync.authorities import NotBelieved
from agent.sync.fleet.authorities import AuthorityFollower
from agent.sync.fleet.connecting import Connector
from agent.sync.http import FleetHttp
from agent.sync.identity import Identity, IdentityError
from agent.sync.problems import Problem
from agent.sync.proxy import Way
from agent.sync.trust.client import Trust
from agent.sync.trust.desired import Desired
from fleet_server.devices.ca import Ca, pem_of
from tests.sync.conftest import FakeClock
from tests.sync.fleet import DEVICE, FLEET, Authority, Repository, Server

FIRST, SECOND, THIRD, STRANGER = (Ca.create(f"test fleet CA {name}") for name in ("1", "2", "3", "of a stranger"))
TWO_BY_ONE, THREE_BY_TWO = FIRST.cross_certify(SECOND), SECOND.cross_certify(THIRD)
KEY = ec.generate_private_key(ec.SECP256R1())


def said(named: tuple[Ca, ...], crossed: tuple[x509.Certificate, ...] = (), spread_s: float = 0.0) -> Authorities:
    return Authorities(
        certificates=tuple(one.pem.decode() for one in named),
        cross_certificates=tuple(pem_of(one).decode() for one in crossed),
        spread_s=spread_s,
    )


def known(*some: Ca) -> authorities.Certificates:
    return tuple(one.certificate for one in some)


BELIEVED = {
    "what is known": ((FIRST,), said((FIRST,)), (FIRST,)),
    "a new one beside it": ((FIRST,), said((SECOND, FIRST), (TWO_BY_ONE,)), (SECOND, FIRST)),
    "the new one alone, after a sleep": ((FIRST,), said((SECOND,), (TWO_BY_ONE,)), (SECOND,)),
    "the third, after a long sleep": ((FIRST,), said((THIRD,), (TWO_BY_ONE, THREE_BY_TWO)), (THIRD,)),
    "the same, told in another order": ((FIRST,), said((THIRD, SECOND), (THREE_BY_TWO, TWO_BY_ONE)), (THIRD, SECOND)),
    "the old one no more": ((SECOND, FIRST), said((SECOND,), (TWO_BY_ONE,)), (SECOND,)),
    "back to the old one": ((SECOND, FIRST), said((FIRST,)), (FIRST,)),
    "one that nobody certified is left out": ((FIRST,), said((STRANGER, FIRST)), (FIRST,)),
}


@pytest.mark.parametrize(("before", "told", "after"), BELIEVED.values(), ids=BELIEVED.keys())
def test_what_is_believed(before, told, after):
    assert authorities.believed(known(*before), told) == known(*after)


def forged_leaf() -> Authorities:
    """A thief of the online keys with a device's certificate: its key signs a CA, and the certificate is to vouch for it."""
    leaf = FIRST.issue("thief", KEY.public_key(), 100, ExtendedKeyUsageOID.CLIENT_AUTH)
    own = Ca(leaf, KEY)
    certificate = own.cross_certify(own)  # a CA by its own word, with the device's name and key
    return said((Ca(certificate, KEY),), (leaf,))


def renamed_stranger() -> Authorities:
    """A stranger that takes the name of the fleet's CA, and certifies himself."""
    taken = Ca.create("test fleet CA 1")
    return said((STRANGER,), (taken.cross_certify(STRANGER),))


FORGED = {
    "a stranger": said((STRANGER,)),
    "a stranger who certified himself": said((STRANGER,), (STRANGER.cross_certify(STRANGER),)),
    "a stranger with the cross certificate of another": said((STRANGER,), (TWO_BY_ONE,)),
    "a stranger under the name of the fleet's CA": renamed_stranger(),
    "a chain with a gap": said((THIRD,), (THREE_BY_TWO,)),
    "a device's certificate that is to vouch": forged_leaf(),
    "no certificate": Authorities(certificates=("x",)),
    "a cross certificate that is none": Authorities(certificates=(SECOND.pem.decode(),), cross_certificates=("x",)),
}


@pytest.mark.parametrize("told", FORGED.values(), ids=FORGED.keys())
def test_what_is_not(told):
    with pytest.raises(NotBelieved):
        authorities.believed(known(FIRST), told)


CAS = (FIRST, SECOND, THIRD, STRANGER, Ca.create("test fleet CA 5"))
CROSSED = {(by, of): CAS[by].cross_certify(CAS[of]) for by, of in itertools.permutations(range(len(CAS)), 2)}
NUMBERS = st.integers(0, len(CAS) - 1)


@given(
    before=st.lists(NUMBERS, min_size=1, max_size=2, unique=True),
    named=st.lists(NUMBERS, min_size=1, max_size=4, unique=True),
    edges=st.lists(st.sampled_from(sorted(CROSSED)), max_size=MAX_CROSS_CERTIFICATES, unique=True),
)
def test_a_chain_leads_to_whatever_is_believed(before, named, edges):
    reached = set(before)
    while more := {of for by, of in edges if by in reached} - reached:
        reached |= more
    expected = tuple(CAS[one].certificate for one in named if one in reached)
    told = said(tuple(CAS[one] for one in named), tuple(CROSSED[edge] for edge in edges))
    try:
        found = authorities.believed(known(*(CAS[one] for one in before)), told)
    except NotBelieved:
        found = ()
    assert found == expected


@pytest.mark.parametrize(
    "fields",
    [
        {"certificates": []},
        {"certificates": ["x"] * 5},
        {"certificates": ["x"], "cross_certificates": ["x"] * 9},
        {"certificates": ["x" * 5000]},
    ],
)
def test_more_than_a_device_reads(fields):
    with pytest.raises(ContractError):
        decode(encode(fields), Authorities, limit_bytes=100_000)


# -- the device ------------------------------------------------------------------------------------------------------------


def enrolled(folder: Path, ca: Ca, *, url: str = "https://127.0.0.1:1", root: bytes = b"{}") -> Identity:
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = ca.issue(DEVICE, key.public_key(), 365, ExtendedKeyUsageOID.CLIENT_AUTH)
    response = EnrolmentResponse(
        fleet=FLEET, device=DEVICE, certificate_pem=pem_of(certificate).decode(), ca_pem=ca.pem.decode(), device_url=url,
        broker_host="127.0.0.1", broker_port=1, tuf_root=root.decode(),
    )  # fmt: skip
    identity.write(folder, response, key, time.time())
    return identity.load(folder)


class Follows:
    """A device that hears of CAs."""

    def __init__(self, folder: Path, place: float = 0.5) -> None:
        self.who = enrolled(folder / "identity", FIRST)
        self.clock, self.place = FakeClock(), place
        self.looks: list[float] = []
        self.changes: list[tuple[str, bool]] = []
        self.restart()

    def restart(self) -> None:
        self.who = identity.load(self.who.folder)
        self.follower = AuthorityFollower(
            lambda: self.who, self.clock, self.place, self.looks.append, lambda *change: self.changes.append(change)
        )

    def told(self, said: Authorities | None) -> None:
        assignment = Assignment(fleet=FLEET, version=1, models={}, authorities=said)
        record = DeviceRecord(fleet=FLEET, device=DEVICE, serial=1, groups=(), issued=0.0, expires=1e12)
        self.follower.told(
            Desired(assignment=assignment, record=record, issued=0.0, heard_at=0.0, verified_at=0.0, valid_until=1e12)
        )

    @property
    def wants_renewal(self) -> bool:
        return self.follower.wants_renewal(self.who)

    def renew(self, ca: Ca, days: float = 365) -> None:
        certificate = ca.issue(DEVICE, self.who.key.public_key(), days, ExtendedKeyUsageOID.CLIENT_AUTH)
        self.who = identity.replace_certificate(self.who, pem_of(certificate))


@pytest.fixture
def device(tmp_path: Path) -> Follows:
    return Follows(tmp_path)


BOTH = said((SECOND, FIRST), (TWO_BY_ONE,), spread_s=100.0)
ALONE = said((SECOND,), (TWO_BY_ONE,))


def test_a_device_follows_at_its_own_moment(device):
    start = device.clock.monotonic()
    device.told(None)
    device.told(BOTH)
    device.told(BOTH)
    assert device.who.authorities() == known(SECOND, FIRST)
    assert device.looks == [start + 50.0]
    assert [dropped for _, dropped in device.changes] == [False]
    device.clock.pass_(49.0)
    assert not device.wants_renewal
    device.clock.pass_(1.0)
    assert device.wants_renewal
    device.renew(SECOND)
    assert not device.wants_renewal
    device.told(ALONE)
    assert device.who.authorities() == known(SECOND)
    assert [dropped for _, dropped in device.changes] == [False, True]


def test_a_clock_that_is_wrong_keeps_nobody_from_following(device, monkeypatch):
    """The device stands in 1970, or the server made its CA with a clock that was ahead."""
    device.clock.set_wall(0.0)
    later = dt.datetime.now(dt.timezone.utc) + dt.timedelta(days=4000)
    with monkeypatch.context() as patched:
        patched.setattr("fleet_server.devices.ca._now", lambda: later)
        ahead = Ca.create("test fleet CA 2")
        crossed = FIRST.cross_certify(ahead)
    device.told(said((ahead, FIRST), (crossed,)))
    assert device.who.authorities() == known(ahead, FIRST)
    assert device.wants_renewal


def test_after_a_power_cut_it_goes_on(device):
    device.told(BOTH)
    device.restart()
    device.told(BOTH)  # as it was remembered
    assert device.changes[1:] == [], "that is no news"
    device.clock.pass_(100.0)
    assert device.wants_renewal


def test_what_is_forged_changes_nothing(device):
    for told in FORGED.values():
        device.told(told)
    assert device.who.authorities() == known(FIRST)
    assert (device.changes, device.looks, device.wants_renewal) == ([], [], False)


def test_a_full_disk_is_no_other_ca(device, monkeypatch):
    def full(*_args, **_options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(files, "write", full)
        device.told(BOTH)
    assert device.who.authorities() == known(FIRST)
    device.told(BOTH)
    assert device.who.authorities() == known(SECOND, FIRST), "it is tried again"


def test_which_certificate_takes_the_place_of_which(device):
    device.told(BOTH)
    device.renew(SECOND, 100)  # ends sooner than the one of the old CA, and is right all the same
    with pytest.raises(IdentityError, match="older CA"):
        device.renew(FIRST, 1000)
    with pytest.raises(IdentityError, match="before the one there is"):
        device.renew(SECOND, 50)
    with pytest.raises(IdentityError, match="not one that this fleet's CA issued"):
        device.renew(STRANGER)
    device.renew(SECOND, 200)


# -- a device that slept ------------------------------------------------------------------------------------------------------


class Awake:
    """A device that knows the first CA, and a server that shows a certificate of another one."""

    def __init__(self, folder: Path, server: Server, ca: Ca, repository: Repository) -> None:
        self.who = enrolled(folder / "identity", ca, url=server.url, root=repository.first_root)
        known_time = LastKnownGood(folder / "trust" / "clock.json", floor=self.who.not_before)
        clock = SignedClock(FakeClock(), known_time)
        connector = Connector(self.who, clock, Way())
        self.http = connector.http(server.url)
        self.trust = Trust(folder / "trust", self.who, self.http, clock, lambda: [connector.unproven(self.http)])


@pytest.fixture
def shown() -> Authority:
    return Authority("the new CA of the server")


@pytest.fixture
def slept(tmp_path: Path, shown: Authority, repository: Repository):
    server = Server(shown, repository, tmp_path / "server")
    server._context.load_verify_locations(cadata=FIRST.pem.decode())  # noqa: SLF001 - the server still believes the old one
    made = Awake(tmp_path, server, FIRST, repository)
    made.server = server
    yield made
    made.trust.close()
    server.close()


def test_signed_documents_are_fetched_from_a_server_that_cannot_prove_itself(slept, repository: Repository, tmp_path: Path):
    repository.assign("crane", 3)
    assert slept.trust.refresh().wanted("crane").release == 3
    assert slept.http.mistrusted
    with pytest.raises(Problem, match="certificate"):
        slept.http.post("/renew", b"{}", limit_bytes=1000)
    assert set(slept.server.asked) <= {*repository.files, "metadata/2.root.json"}, "nothing but documents was asked for"


def test_what_is_not_rightly_signed_is_refused_all_the_same(slept, repository: Repository):
    from securesystemslib.signer import CryptoSigner

    slept.trust.refresh()
    before = slept.trust.remembered()
    repository.assign("crane", 3)
    repository.sign(signers={"timestamp": CryptoSigner.generate_ed25519()})
    with pytest.raises(Problem):
        slept.trust.refresh()
    assert slept.trust.remembered() == before


def test_a_server_that_is_only_away_is_not_asked_that_way(slept, monkeypatch):
    asked = []
    monkeypatch.setattr("agent.sync.fleet.unproven.Unproven._connect", lambda *_: asked.append(1))
    slept.server.close()
    with pytest.raises(Problem):
        slept.trust.refresh()
    assert asked == []


def test_a_body_without_end_and_one_that_breaks_off(slept, repository: Repository):
    connector_way = slept.trust._client._others()[0]  # noqa: SLF001
    with pytest.raises(Problem):
        slept.http.get(slept.server.url + "/record", limit_bytes=10_000, deadline_s=5)
    assert connector_way.get(connector_way.url("/record"), limit_bytes=10_000, deadline_s=5) == repository.files["record"]
    with pytest.raises(Problem, match="more than the 10 bytes"):
        connector_way.get(connector_way.url("/record"), limit_bytes=10, deadline_s=5)
    with pytest.raises(Problem) as missing:
        connector_way.get(connector_way.url("/nothing"), limit_bytes=10, deadline_s=5)
    assert missing.value.status == 404
    slept.server.faults["record"] = lambda handler: (handler.answer(200, b"x" * 10, length=100), handler.hang_up()) and True
    with pytest.raises(Problem):
        connector_way.get(connector_way.url("/record"), limit_bytes=10_000, deadline_s=5)


def test_connections_follow_the_file_of_cas(tmp_path: Path, repository: Repository):
    """A CA that is believed no more opens no further connection, without a restart."""
    old = Authority("old")
    server = Server(old, repository, tmp_path / "server")
    server.anonymous()
    ca = tmp_path / "ca.pem"
    ca.write_text(old.pem)
    http = FleetHttp(server.url, FakeClock(), ca=ca)
    try:
        assert http.get(http.url("/record"), limit_bytes=10_000, deadline_s=5)
        files.write(ca, SECOND.pem)
        with pytest.raises(Problem, match="certificate"):
            http.get(http.url("/record"), limit_bytes=10_000, deadline_s=5)
        files.write(ca, SECOND.pem + old.pem.encode())
        assert http.get(http.url("/record"), limit_bytes=10_000, deadline_s=5)
    finally:
        http.close()
        server.close()
