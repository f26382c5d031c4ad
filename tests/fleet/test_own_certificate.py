"""The server's own certificates end soon while it runs: they are renewed, and nobody's connection ends for it."""

import socket
import ssl

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from agent.common import files
from fleet_server.devices import pki
from tests.fleet.stand import wait_until

pytestmark = [pytest.mark.long, pytest.mark.mosquitto]


def shown(server, port):
    """The serial number of the certificate at the port, to a client that shows none."""
    context = ssl.create_default_context(cafile=str(server.ca))
    context.maximum_version = ssl.TLSVersion.TLSv1_3
    with (
        socket.create_connection(("127.0.0.1", port), timeout=10) as sock,
        context.wrap_socket(sock, server_hostname="127.0.0.1") as tls,
    ):
        return x509.load_der_x509_certificate(tls.getpeercert(binary_form=True)).serial_number


def end_soon(server):
    """The certificate on the disk has a day left."""
    authority = pki.Authority(server.data / "pki")
    key = pki.ec.generate_private_key(pki.ec.SECP256R1())
    names = {"127.0.0.1", "localhost", "::1"}
    soon = authority.shown.issue("127.0.0.1", key.public_key(), 1, ExtendedKeyUsageOID.SERVER_AUTH, alternatives=names)
    files.write(authority.server_key, pki.key_pem(key), mode=0o600)
    files.write(authority.server_cert, pki.pem_of(soon))


def test_it_is_renewed_and_everybody_stays_connected(own_server, connect):
    server = own_server
    server.set(expiry={"timestamp_s": 60.0})  # what is signed online, and these certificates, are looked at every 7.5 s
    server.start()
    device = connect(server.enrol("d1"))
    ports = (server.operator, server.device, server.broker)
    lost = []
    device.mqtt.on_disconnect = lambda *_: lost.append(1)
    before = {port: shown(server, port) for port in ports}
    kept = server.session
    assert kept.get(f"{server.url}/api/v1/me", headers={"Authorization": f"Bearer {server.token}"}, verify=str(server.ca)).ok
    end_soon(server)
    wait_until(lambda: all(shown(server, port) != before[port] for port in ports), "the new certificate is shown at every port")
    new = {shown(server, port) for port in ports}
    assert len(new) == 1
    certificate = x509.load_pem_x509_certificate((server.data / "pki/server.crt").read_bytes())
    assert certificate.serial_number in new
    assert kept.get(f"{server.url}/api/v1/me", headers={"Authorization": f"Bearer {server.token}"}, verify=str(server.ca)).ok
    assert (lost, device.mqtt.is_connected(), server.get("/status")["broker_connected"]) == ([], True, True)
