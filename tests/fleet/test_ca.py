"""The fleet's CA is replaced: the steps, who has followed, what is told, and power gone before each write of each step."""

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from agent.common import files
from agent.contract.enrolment import RENEWAL_PAYLOAD_TYPE, EnrolmentRequest, EnrolmentString, RenewalRequest, SignedRenewal
from agent.sync import authorities
from fleet_server.access import SERVER
from fleet_server.app import Fleet
from fleet_server.devices import ca_steps, pki
from fleet_server.devices.ca_steps import TRANSITIONS, Event, Step
from fleet_server.devices.renewals import Renewals
from fleet_server.errors import Conflict, Refused, Unavailable
from tests.fleet.stand import make_csr, signed

DAY = 86400.0


class Member:
    """A device as the server knows it; its certificate and the CAs that it believes, as it would keep them."""

    def __init__(self, fleet, name):
        self.fleet, self.name = fleet, name
        self.key = ec.generate_private_key(ec.SECP256R1())
        string = EnrolmentString.parse(fleet.enrolment.create_token(SERVER, device=name, groups=[], uses=1, ttl_s=3600).string)
        given = fleet.enrolment.enrol(EnrolmentRequest(token=string.token, csr_pem=make_csr(self.key, cn=name), device=name))
        self.certificate = x509.load_pem_x509_certificate(given.certificate_pem.encode())
        self.known = authorities.read(given.ca_pem.encode())
        assert authorities.fingerprint(self.known[0]) == string.ca_sha256, "it was told the CA of its certificate"

    def hear(self):
        told = self.fleet.assignment.signed().authorities
        if told is not None:
            self.known = authorities.believed(self.known, told)
        return self

    def renew(self, *, earlier_agent=False):
        named = () if earlier_agent else tuple(authorities.fingerprint(one) for one in self.known)
        request = RenewalRequest(csr_pem=make_csr(self.key, cn=self.name), authorities=named)
        given = self.fleet.enrolment.renew(self.name, request)
        self.certificate = x509.load_pem_x509_certificate(given.certificate_pem.encode())
        return self

    @property
    def is_let_in(self):
        """Whether TLS takes it for somebody's of the fleet, and the listener knows it."""
        if self.fleet.authority.issuer_of(self.certificate) is None:
            return False
        try:
            return self.fleet.inventory.authenticate(self.certificate) == self.name
        except Refused:
            return False

    @property
    def trusts_the_server(self):
        shown = x509.load_pem_x509_certificate(self.fleet.authority.server_cert.read_bytes())
        return authorities.issuer_of(shown, self.known) is not None


@pytest.fixture
def made(fleet):
    fleet.recover()
    return fleet


@pytest.fixture
def two(made):
    return Member(made, "d1"), Member(made, "d2")


def again(fleet, clock):
    """The next start on the same folder."""
    started = Fleet(fleet.folder, fleet.config, clock)
    started.recover()
    return started


def fingerprints(fleet):
    return [one.fingerprint for one in fleet.authority.believed]


def listed(fleet):
    """The serial numbers on the revocation lists, by the list's issuer."""
    parts = fleet.authority.crl.read_bytes().split(b"-----END X509 CRL-----\n")[:-1]
    found = [x509.load_pem_x509_crl(part + b"-----END X509 CRL-----\n") for part in parts]
    return {one.issuer.rfc4514_string(): {f"{entry.serial_number:x}" for entry in one} for one in found}


def test_a_fleet_that_never_replaced_its_ca_says_nothing(made):
    assert made.assignment.signed().authorities is None
    assert b'"authorities":null' in made.repository.assignment_bytes()
    view = made.ca_replacement.view()
    assert (view.step, len(view.authorities), view.switch_at) == (Step.SETTLED, 1, None)
    assert made.ca_replacement.warnings() == []


def test_the_whole_way(two, made, clock):
    first, second = two
    old = made.authority.fingerprint
    view = made.ca_replacement.replace(SERVER)
    assert (view.step, view.followed, view.away.devices) == (Step.INTRODUCED, 0, ["d1", "d2"])
    assert made.authority.fingerprint == old, "strings and the server's own certificates are still of the old one"
    for one in two:
        assert one.hear().trusts_the_server
        assert one.renew().is_let_in
        assert made.authority.next.issued(one.certificate)
    late = Member(made, "d3")
    assert made.ca_replacement.view().away.devices == ["d3"]
    assert late.hear().renew().is_let_in
    view = made.ca_replacement.switch(SERVER)
    assert (view.step, view.followed, made.authority.fingerprint) == (Step.SWITCHED, 3, fingerprints(made)[0])
    assert first.trusts_the_server
    assert Member(made, "d4").is_let_in
    view = made.ca_replacement.finish(SERVER, leave_behind=False)
    assert (view.step, view.followed, len(view.authorities)) == (Step.SETTLED, 4, 1)
    assert old not in fingerprints(made)
    for one in two:
        assert one.hear().is_let_in
        assert one.trusts_the_server
        assert [authorities.fingerprint(ca) for ca in one.known] == fingerprints(made)
    assert sorted(path.name for path in made.folder.pki.iterdir()) == [
        "ca.crt", "ca.key", "client.crt", "client.key", "crl.pem", "crossed.pem", "server.crt", "server.key", "trusted.pem"
    ]  # fmt: skip
    assert {"ca.replace", "ca.switch", "ca.finish"} <= {one.action for one in made.journal.audited()}
    assert second.renew().is_let_in


def test_who_slept_through_all_of_several_replacements_believes_what_is_signed(two, made, clock):
    """It knows the first CA only, and hears of the third; its own certificate opens nothing any more."""
    slept, awake = two
    for round_ in range(3):
        made.ca_replacement.replace(SERVER, spread_s=0)
        awake.hear().renew()
        clock.now += 1
        made.ca_replacement.switch(SERVER)
        if round_ == 0:
            with pytest.raises(Conflict, match=r"1 devices have no certificate of the new CA.*: d1;"):
                made.ca_replacement.finish(SERVER, leave_behind=False)
        made.ca_replacement.finish(SERVER, leave_behind=True)
    assert awake.hear().is_let_in
    assert not slept.is_let_in
    assert slept.hear().trusts_the_server
    assert len({one.subject for one in (*awake.known, *slept.known)}) == 1


def test_who_slept_until_the_switch_comes_back_by_itself(two, made):
    slept, _ = two
    made.ca_replacement.replace(SERVER)
    made.ca_replacement.switch(SERVER)
    assert not slept.trusts_the_server
    assert slept.is_let_in, "so it gets the signed documents, and they say the new CA"
    assert slept.hear().trusts_the_server
    assert slept.renew().is_let_in


def test_who_is_here_and_does_not_follow_is_told_from_who_is_away(two, made, clock):
    made.ca_replacement.replace(SERVER, spread_s=100.0)
    with made.database.session() as session:
        row = session.get(type_of_device(), "d1")
        row.last_seen = clock.now + 50
    assert made.ca_replacement.view().away.devices == ["d1", "d2"], "its moment may not have come"
    with made.database.session() as session:
        session.get(type_of_device(), "d1").last_seen = clock.now + 101
    view = made.ca_replacement.view()
    assert (view.here.devices, view.away.devices) == (["d1"], ["d2"])
    text = made.metrics.text()
    assert 'edge_fleet_ca_devices{state="here"} 1' in text
    assert 'edge_fleet_ca_devices{state="away"} 1' in text
    clock.now += 400 * DAY
    assert made.ca_replacement.view().ended.devices == ["d1", "d2"]


def type_of_device():
    from fleet_server.storage.models import Device

    return Device


def test_an_earlier_agent_gets_a_certificate_of_the_ca_that_it_knows(two, made):
    earlier, _ = two
    made.ca_replacement.replace(SERVER)
    before = earlier.certificate
    assert earlier.renew(earlier_agent=True).certificate == before, "it is new enough"
    with made.database.session() as session:
        from fleet_server.storage.models import Certificate

        session.get(Certificate, pki.serial_hex(before)).expires = made.enrolment._clock() + DAY  # noqa: SLF001
    assert made.authority.present.issued(earlier.renew(earlier_agent=True).certificate)
    assert earlier.certificate != before
    assert "d1" in made.ca_replacement.view().away.devices, "it is counted and named"


def test_a_renewal_over_the_broker_follows_as_well(two, made):
    one, _ = two
    made.ca_replacement.replace(SERVER)
    one.hear()
    renewals = Renewals(made.inventory, made.enrolment)
    wanted = SignedRenewal(
        device="d1", replaces=pki.serial_hex(one.certificate), csr_pem=make_csr(one.key, cn="d1"),
        authorities=tuple(authorities.fingerprint(ca) for ca in one.known),
    )  # fmt: skip
    given = renewals.certificate("d1", signed(wanted, RENEWAL_PAYLOAD_TYPE, one.key).decode())
    assert made.authority.next.issued(x509.load_pem_x509_certificate(given))


def test_who_is_shut_out_stays_so_under_both(two, made):
    out, stays = two
    made.ca_replacement.replace(SERVER)
    out.hear().renew()
    stays.hear().renew()
    made.inventory.revoke(SERVER, "d1")
    lists = listed(made)
    assert len(lists) == 2
    for serials in lists.values():
        assert {pki.serial_hex(out.certificate)} <= serials
    assert not out.is_let_in
    with pytest.raises(Refused):
        out.renew()
    made.ca_replacement.switch(SERVER)
    made.ca_replacement.finish(SERVER, leave_behind=False)
    assert not out.is_let_in
    assert stays.is_let_in
    (serials,) = listed(made).values()
    assert serials == {pki.serial_hex(out.certificate)}


def test_a_stolen_key_makes_no_certificate_that_is_let_in(two, made):
    """The thief knows the number and name of a certificate that was issued, and signs another with them."""
    real, _ = two
    ca = made.authority.present
    forged = (
        x509.CertificateBuilder().subject_name(real.certificate.subject).issuer_name(ca.certificate.subject)
        .public_key(ec.generate_private_key(ec.SECP256R1()).public_key()).serial_number(real.certificate.serial_number)
        .not_valid_before(real.certificate.not_valid_before_utc).not_valid_after(real.certificate.not_valid_after_utc)
        .sign(ca.key, ca.certificate.signature_hash_algorithm)
    )  # fmt: skip
    assert ca.issued(forged)
    with pytest.raises(Refused, match="no device"):
        made.inventory.authenticate(forged)
    assert real.is_let_in


def test_now(two, made):
    view = made.ca_replacement.replace(SERVER, switch_after_s=0, spread_s=0)
    assert view.step is Step.SWITCHED
    assert made.assignment.signed().authorities.spread_s == 0
    for one in two:
        one.hear().renew()
    assert made.ca_replacement.finish(SERVER, leave_behind=False).step is Step.SETTLED


def test_it_switches_by_itself_when_it_is_time(two, made, clock):
    made.ca_replacement.replace(SERVER, switch_after_s=DAY)
    clock.now += DAY - 1
    made.ca_replacement.tick()
    assert made.authority.replacement.step is Step.INTRODUCED
    assert any("ca trust" in warning for warning in made.status.view().warnings)
    clock.now += 2
    made.ca_replacement.tick()
    assert made.authority.replacement.step is Step.SWITCHED
    assert any("ca finish" in warning for warning in made.status.view().warnings)


def test_what_outside_could_not_be_told_is_told_again(two, made):
    told = []

    class Outside:
        fails = True

        def trust_changed(self, *, dropped):
            if self.fails:
                raise OSError("not now")
            told.append(dropped)

    made.ca_replacement.outside = outside = Outside()
    with pytest.raises(OSError, match="not now"):
        made.ca_replacement.replace(SERVER)
    assert made.assignment.signed().authorities is None, "devices hear of it when the broker takes it"
    outside.fails = False
    made.ca_replacement.tick()
    assert made.assignment.signed().authorities is not None
    outside.fails = True
    with pytest.raises(OSError, match="not now"):
        made.ca_replacement.finish(SERVER, leave_behind=True)
    assert made.authority.replacement.step is Step.FINISHING
    outside.fails = False
    made.ca_replacement.tick()
    assert (made.authority.replacement.step, told) == (Step.SETTLED, [False, True])


def test_the_clock_is_wrong(two, made, clock):
    clock.now -= 365 * DAY
    with pytest.raises(Conflict, match="clock"):
        made.ca_replacement.replace(SERVER)
    assert not (made.folder.pki / "next.crt").exists()


@pytest.mark.parametrize("step", [Step.SETTLED, Step.INTRODUCED, Step.SWITCHED, Step.FINISHING])
@pytest.mark.parametrize("event", list(Event))
def test_what_may_follow_what(step, event):
    if (step, event) in TRANSITIONS:
        assert ca_steps.after(step, event) is TRANSITIONS[step, event]
    else:
        with pytest.raises(Conflict, match="CA"):
            ca_steps.after(step, event)


def test_a_ca_that_ends_is_warned_of(made, clock):
    assert made.ca_replacement.warnings() == []
    clock.now = made.authority.present.ends - 300 * DAY
    (warning,) = made.ca_replacement.warnings()
    assert "ends in 300 days" in warning
    assert "edge-fleet ca replace" in warning


def test_a_database_of_before_is_filled_in(two, made, clock):
    with made.database.session() as session:
        from sqlalchemy import update

        from fleet_server.storage.models import Certificate

        session.execute(update(Certificate).values(authority=None))
    made.close()
    started = again(made, clock)
    assert started.ca_replacement.view().followed == 2
    started.close()


# -- power gone --------------------------------------------------------------------------------------------------------------


class PowerGone(BaseException):
    pass


def introduced(fleet):
    fleet.ca_replacement.replace(SERVER)


def switched(fleet):
    introduced(fleet)
    fleet.ca_replacement.switch(SERVER)


CHANGES = {
    "replace": (lambda _: None, introduced),
    "switch": (introduced, lambda fleet: fleet.ca_replacement.switch(SERVER)),
    "finish": (switched, lambda fleet: fleet.ca_replacement.finish(SERVER, leave_behind=True)),
    "replace now": (lambda _: None, lambda fleet: fleet.ca_replacement.replace(SERVER, switch_after_s=0, spread_s=0)),
}


@pytest.mark.no_cover
@pytest.mark.parametrize("name", CHANGES)
def test_power_gone_before_each_write(name, made, clock, monkeypatch, tmp_path):
    """Whatever was written: the next start holds together, devices come in and trust what is shown, and the change goes on."""
    import shutil

    before, change = CHANGES[name]
    member = Member(made, "d1")
    before(made)
    member.hear().renew()
    made.close()
    kept = tmp_path / "kept"
    shutil.copytree(made.folder.root, kept)
    survived, done = 0, False
    while not done:
        shutil.rmtree(made.folder.root)
        shutil.copytree(kept, made.folder.root)
        fleet = again(made, clock)
        done = killed_after(survived, fleet, change, monkeypatch)
        fleet.close()
        fleet = again(made, clock)
        same = Returned(fleet, member)
        assert same.is_let_in, survived
        assert same.trusts_the_server or same.hear().trusts_the_server, survived
        assert same.hear().renew().is_let_in, survived
        told = fleet.assignment.signed().authorities
        assert told == fleet.authority.told() or (told is None and fleet.authority.replacement.step is Step.SETTLED), survived
        assert fleet.authority.trusted_path.read_bytes() == b"".join(one.pem for one in fleet.authority.believed)
        assert set(listed(fleet)) == {one.certificate.subject.rfc4514_string() for one in fleet.authority.believed}
        to_the_end(fleet)
        assert Returned(fleet, same).hear().is_let_in, survived
        fleet.close()
        survived += 1
    assert survived > 4, "every write was met"


class Returned(Member):
    """The same device before the server's next start."""

    def __init__(self, fleet, member):
        self.fleet, self.name, self.key = fleet, member.name, member.key
        self.certificate, self.known = member.certificate, member.known


def killed_after(survived, fleet, change, monkeypatch):
    """Whether the change came to its end before its writes were over."""
    left = {"writes": survived}

    def counted(works):
        def called(*args, **options):
            if left["writes"] == 0:
                raise PowerGone
            left["writes"] -= 1
            return works(*args, **options)

        return called

    with monkeypatch.context() as patched:
        patched.setattr(files, "write", counted(files.write))
        patched.setattr(files, "remove", counted(files.remove))
        try:
            change(fleet)
        except PowerGone:
            return False
        return True


def to_the_end(fleet):
    """The operator goes on from wherever it is."""
    if fleet.authority.replacement.step is Step.SETTLED:
        fleet.ca_replacement.replace(SERVER)
    if fleet.authority.replacement.step is Step.INTRODUCED:
        member = next(iter(fleet.ca_replacement.view().away.devices), None)
        assert member in {None, "d1"}
        fleet.ca_replacement.switch(SERVER)


def test_a_new_ca_that_was_not_entered_counts_for_nothing(made, clock):
    """Killed between its making and the step."""
    old = fingerprints(made)
    made.authority.prepare("test")
    made.close()
    started = again(made, clock)
    assert (fingerprints(started), started.authority.told()) == (old, None)
    started.ca_replacement.replace(SERVER)
    assert len(fingerprints(started)) == 2
    started.close()


def test_reports_of_before_and_after_are_read(two, made):
    """The same key signs, whichever certificate counts."""
    one, _ = two
    keys = [key.keyid for key in made.inventory.signers("d1")]
    made.ca_replacement.replace(SERVER)
    one.hear().renew()
    made.ca_replacement.switch(SERVER)
    made.ca_replacement.finish(SERVER, leave_behind=True)
    assert [key.keyid for key in made.inventory.signers("d1")] == keys
    assert made.inventory.signers("d2") == [], "its certificate counts no more"
    assert made.inventory.get("d2").certificate == "ended"
    assert msgspec.json.encode(made.ca_replacement.view())


def test_a_process_without_the_key_knows_devices_and_certifies_nobody(two, made, tmp_path):
    import shutil

    made.ca_replacement.replace(SERVER)
    shutil.copytree(made.folder.pki, tmp_path / "pki", ignore=shutil.ignore_patterns("ca.key", "next.key"))
    authority = pki.Authority(tmp_path / "pki")
    one, _ = two
    assert authority.issuer_of(one.certificate).fingerprint == authority.present.fingerprint
    assert authority.told() == made.authority.told()
    with pytest.raises(Unavailable, match="certifies nobody"):
        authority.issue_device("d9", pki.read_csr(make_csr(one.key)), DAY)


def test_a_server_that_is_not_alone_says_so(made):
    made.ca_replacement.impossible = "others believe it"
    with pytest.raises(Conflict, match="others believe it"):
        made.ca_replacement.replace(SERVER)
    assert made.authority.replacement.step is Step.SETTLED


@pytest.mark.sqlite
def test_a_backup_in_the_middle_goes_on_from_there(two, made, clock, tmp_path):
    import io

    from fleet_server.backups.backup import Backup
    from fleet_server.backups.restore import restore
    from fleet_server.config import Folder, dump, load

    made.folder.config.write_bytes(dump(made.config))
    one, other = two
    made.ca_replacement.replace(SERVER)
    one.hear().renew()
    out, scratch = io.BytesIO(), tmp_path / "scratch"
    scratch.mkdir()
    Backup(made.folder, scratch, clock, blobs=True).write(out)
    other.hear().renew()
    clock.now += 60  # certificates bear the real time, and this clock stands
    restore(io.BytesIO(out.getvalue()), Folder(tmp_path / "new"), clock)
    again_made = Fleet(Folder(tmp_path / "new"), load(Folder(tmp_path / "new")), clock)
    view = again_made.ca_replacement.view()
    assert (view.step, view.followed) == (Step.INTRODUCED, 1)
    for member in two:
        assert Returned(again_made, member).is_let_in, "also who renewed after the backup: it is known again by its certificate"
    assert again_made.ca_replacement.view().followed == 2
    again_made.ca_replacement.switch(SERVER)
    assert again_made.ca_replacement.finish(SERVER, leave_behind=False).step is Step.SETTLED
    again_made.close()


def test_what_doctor_says(made, clock):
    from fleet_server.doctor import _authority

    assert _authority(made.folder).level == "ok"
    made.ca_replacement.replace(SERVER)
    found = _authority(made.folder)
    assert (found.level, "introduced" in found.message) == ("warning", True)
    (made.folder.pki / "ca.crt").write_text("x")
    assert _authority(made.folder).level == "failed"


def test_in_the_middle_it_takes_no_step_either(made, clock):
    made.ca_replacement.replace(SERVER)
    made.ca_replacement.impossible = "others believe it"
    clock.now += 400 * DAY
    made.ca_replacement.tick()
    for step in (made.ca_replacement.switch, lambda actor: made.ca_replacement.finish(actor, leave_behind=True)):
        with pytest.raises(Conflict, match="others believe it"):
            step(SERVER)
    assert made.authority.replacement.step is Step.INTRODUCED
