"""What a publication must be before it is trusted: one row per way to break it. Pure, no server."""

import datetime as dt
import time

import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import DelegatedRole, Delegations, Metadata, TargetFile, Targets

from agent.contract.codec import encode
from fleet_server.errors import Conflict, FleetError, Invalid, Refused, TooLarge
from fleet_server.releases import publication, publisher
from tests.fleet.stand import simple_manifest

NOW = time.time()
KEY, OTHER = CryptoSigner.generate_ed25519(), CryptoSigner.generate_ed25519()


def later(days=365):
    return dt.datetime.fromtimestamp(NOW + days * 86400, tz=dt.timezone.utc).replace(microsecond=0)


def delegator():
    role = DelegatedRole("releases", [KEY.public_key.keyid], 1, True, paths=["releases/*/*"])
    return Targets(delegations=Delegations({KEY.public_key.keyid: KEY.public_key}, {"releases": role}))


def target(manifest, path=None):
    return TargetFile.from_data(path or manifest.ref.target_path, encode(manifest), ["sha256"])


ONE, TWO = simple_manifest("m", 1, b"one"), simple_manifest("m", 2, b"two")
TRUSTED = Targets(version=5, expires=later(), targets={ONE.ref.target_path: target(ONE)})


def metadata(manifest=TWO, *, version=6, signer=KEY, targets=None, days=365, delegations=None):
    added = {**TRUSTED.targets, manifest.ref.target_path: target(manifest)} if targets is None else targets
    made = Metadata(Targets(version=version, expires=later(days), targets=added, delegations=delegations))
    made.sign(signer)
    return made.to_bytes()


def check(data=None, signed=None):
    return publication.check(TRUSTED, delegator(), encode(TWO) if data is None else data, signed or metadata(), NOW)


def test_a_good_one():
    found = check()
    assert (found.manifest, found.version, found.signers) == (TWO, 6, (KEY.public_key.keyid,))


def test_what_the_publisher_makes_is_accepted():
    trusted = Metadata(TRUSTED)
    data, signed = publisher.add(trusted, TWO, KEY, NOW)
    assert check(data, signed).manifest == TWO


def _moved():
    return {**TRUSTED.targets, "releases/other/2.json": target(TWO, "releases/other/2.json")}


BROKEN = [
    ("wrong key", Refused, "wrong_key", lambda: check(signed=metadata(signer=OTHER))),
    ("no signature", Refused, "wrong_key", lambda: check(signed=Metadata(Targets(version=6, expires=later())).to_bytes())),
    ("same version", Conflict, "stale_metadata", lambda: check(signed=metadata(version=5))),
    ("a version left out", Conflict, "stale_metadata", lambda: check(signed=metadata(version=7))),
    ("version going down", Conflict, "stale_metadata", lambda: check(signed=metadata(version=4))),
    ("a release removed", Refused, "changes_published", lambda: check(signed=metadata(targets={TWO.ref.target_path: target(TWO)}))),
    (
        "a release changed", Refused, "changes_published",
        lambda: check(signed=metadata(targets={ONE.ref.target_path: target(TWO, ONE.ref.target_path), TWO.ref.target_path: target(TWO)})),
    ),
    ("nothing added", Refused, "not_one_release", lambda: check(signed=metadata(targets=dict(TRUSTED.targets)))),
    (
        "two added", Refused, "not_one_release",
        lambda: check(signed=metadata(targets={**TRUSTED.targets, **{m.ref.target_path: target(m) for m in (TWO, simple_manifest("n", 1, b"n"))}})),
    ),
    ("another manifest", Refused, "hash_mismatch", lambda: check(data=encode(simple_manifest("m", 2, b"twO")))),
    ("manifest at a wrong path", Refused, "wrong_path", lambda: check(signed=metadata(targets=_moved()))),
    ("not a manifest", Invalid, "bad_manifest", lambda: check(data=b"{}")),
    ("hostile json", Invalid, "bad_manifest", lambda: check(data=b"[" * 100_000)),
    ("metadata that is no json", Invalid, "bad_metadata", lambda: check(signed=b"\xff\xfe")),
    ("metadata of deep json", Invalid, "bad_metadata", lambda: check(signed=b"[" * 100_000)),
    ("metadata of another type", Invalid, "bad_metadata", lambda: check(signed=_snapshot())),
    ("metadata that ends soon", Refused, "expires_soon", lambda: check(signed=metadata(days=0.5))),
    ("metadata that delegates", Refused, "delegates", lambda: check(signed=metadata(delegations=delegator().delegations))),
    ("metadata too large", TooLarge, "too_large", lambda: check(signed=b" " * (publication.MAX_ROLE_BYTES + 1))),
    ("manifest too large", TooLarge, "too_large", lambda: check(data=b" " * (4 * 1024 * 1024 + 1))),
]  # fmt: skip


def _snapshot():
    from tuf.api.metadata import Snapshot

    made = Metadata(Snapshot())
    made.sign(KEY)
    return made.to_bytes()


@pytest.mark.parametrize(("name", "kind", "code", "attempt"), BROKEN, ids=[row[0] for row in BROKEN])
def test_broken(name, kind, code, attempt):
    with pytest.raises(FleetError) as caught:
        attempt()
    assert (type(caught.value), caught.value.code) == (kind, code)


def test_a_version_that_is_not_larger():
    old = simple_manifest("m", 4, b"x")
    trusted = Targets(version=5, expires=later(), targets={old.ref.target_path: target(old)})
    signed = metadata(TWO, targets={**trusted.targets, TWO.ref.target_path: target(TWO)})
    with pytest.raises(Conflict) as caught:
        publication.check(trusted, delegator(), encode(TWO), signed, NOW)
    assert caught.value.code == "version_not_larger"
