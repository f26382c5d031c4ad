"""A publisher whose key never leaves a hardware module: SoftHSM2, the token that needs no hardware, through PKCS#11 for real."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fleet.test_keys import ceremony, cli, describe

pytest.importorskip("pkcs11", reason="python-pkcs11 is not installed")
if shutil.which("softhsm2-util") is None:
    pytest.skip("softhsm2 is not installed", allow_module_level=True)

LABEL, PIN, SLOT_KEY = "fleet", "1234", 2


@pytest.fixture
def token(tmp_path, monkeypatch):
    """A token with one key; its URI."""
    library = next(path for path in Path("/usr/lib").glob("**/libsofthsm2.so"))
    (tmp_path / "tokens").mkdir()
    (tmp_path / "softhsm2.conf").write_text(f"directories.tokendir = {tmp_path / 'tokens'}\nlog.level = ERROR\n")
    monkeypatch.setenv("SOFTHSM2_CONF", str(tmp_path / "softhsm2.conf"))
    monkeypatch.setenv("PYKCS11LIB", str(library))
    monkeypatch.setenv("EDGE_FLEET_KEY_SECRET", PIN)
    line = ["softhsm2-util", "--init-token", "--free", "--label", LABEL, "--pin", PIN, "--so-pin", "123456"]
    subprocess.run(line, check=True, capture_output=True, timeout=30)
    program = f"""
import pkcs11
from pkcs11.util.ec import encode_named_curve_parameters
from pkcs11 import Attribute, KeyType
token = pkcs11.lib({str(library)!r}).get_token(token_label={LABEL!r})
with token.open(rw=True, user_pin={PIN!r}) as session:
    curve = session.create_domain_parameters(KeyType.EC, {{Attribute.EC_PARAMS: encode_named_curve_parameters("secp256r1")}}, local=True)
    curve.generate_keypair(store=True, id=bytes([{SLOT_KEY}]), label="publisher")
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=30, env=dict(os.environ))
    return f"hsm:{SLOT_KEY}?label={LABEL}"


def test_a_publisher_signs_in_a_hardware_module(own_server, tmp_path, token):
    running = own_server.start()
    (tmp_path / "alice.pub").write_text(cli(running, "keys", "public", token))
    ceremony(running, tmp_path, "publisher", "add", "alice", "--pattern", "alice-*", "--key", tmp_path / "alice.pub")
    cli(running, "publish", describe(tmp_path, "alice-a", 1), "--key", token, "--yes")
    assert len(running.get("/releases/alice-a/1")["signers"]) == 1
    assert "wrong_key" in cli(
        running, "publish", describe(tmp_path, "alice-a", 2), "--key", running.releases_key, "--yes", code=3
    )
    said = cli(running, "publish", describe(tmp_path, "other", 1), "--key", token, "--yes", code=1)
    assert "is not one of the keys that count" in said


def test_a_wrong_pin_is_tried_once(own_server, tmp_path, token, monkeypatch):
    """A token locks after a few."""
    running = own_server.start()
    (tmp_path / "alice.pub").write_text(cli(running, "keys", "public", token))
    cli(running, "keys", "make", running.offline / "bob.key")
    ceremony(
        running, tmp_path, "publisher", "add", "alice", "--pattern", "alice-*", "--key", running.offline / "bob.key.pub",
        "--key", tmp_path / "alice.pub",
    )  # fmt: skip
    monkeypatch.setenv("EDGE_FLEET_KEY_SECRET", "9999")
    said = cli(running, "publish", describe(tmp_path, "alice-a", 1), "--key", token, "--yes", code=1)
    assert "Pin" in said
    monkeypatch.setenv("EDGE_FLEET_KEY_SECRET", PIN)
    cli(running, "publish", describe(tmp_path, "alice-a", 1), "--key", token, "--yes")
