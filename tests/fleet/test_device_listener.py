"""What devices fetch, over real mutual TLS: who is let in, ranges, records, and TUF's own client against the server."""

import json
import re

import pytest
import requests
from cryptography.hazmat.primitives.asymmetric import ec
from securesystemslib.dsse import Envelope
from tuf.api.exceptions import DownloadHTTPError
from tuf.api.metadata import Metadata, Targets
from tuf.ngclient import FetcherInterface, Updater

from agent.contract.assignment import RECORD_PAYLOAD_TYPE, Assignment, DeviceRecord
from agent.contract.codec import decode
from agent.contract.manifest import parse_manifest
from fleet_server.devices.pki import Authority
from tests.fleet.stand import make_csr, pem, sha256

DATA = bytes(range(256)) * 1024


@pytest.fixture(scope="module")
def device(server):
    return server.enrol("listener-1", ["canary"])


@pytest.fixture(scope="module")
def blob(server):
    server.upload(DATA)
    return f"/blobs/{sha256(DATA)}"


# -- who is let in -------------------------------------------------------------------------------------------------------------


def test_no_certificate_no_connection(server):
    with pytest.raises(requests.exceptions.ConnectionError):
        requests.get(f"{server.device_url}/record", verify=str(server.ca), timeout=20)


def _with(server, folder, certificate, key):
    (folder / "c.crt").write_text(certificate)
    (folder / "c.key").write_bytes(pem(key))
    pair = (str(folder / "c.crt"), str(folder / "c.key"))
    return requests.get(f"{server.device_url}/record", cert=pair, verify=str(server.ca), timeout=20)


def test_a_certificate_of_another_authority(server, device, tmp_path):
    from fleet_server.devices.pki import read_csr

    key = ec.generate_private_key(ec.SECP256R1())
    foreign = Authority.create(tmp_path, "test", ("127.0.0.1",)).issue_device(device.id, read_csr(make_csr(key)), 86400)
    from cryptography.hazmat.primitives.serialization import Encoding

    with pytest.raises(requests.exceptions.ConnectionError):
        _with(server, tmp_path, foreign.public_bytes(Encoding.PEM).decode(), key)


def test_the_servers_own_certificates_are_no_devices(server):
    pki = server.data / "pki"
    client = (str(pki / "client.crt"), str(pki / "client.key"))
    answer = requests.get(f"{server.device_url}/record", cert=client, verify=str(server.ca), timeout=20)
    assert (answer.status_code, answer.json()["code"]) == (403, "unknown_device")
    pair = (str(pki / "server.crt"), str(pki / "server.key"))
    with pytest.raises(requests.exceptions.ConnectionError):  # a server's certificate is not one of a client
        requests.get(f"{server.device_url}/record", cert=pair, verify=str(server.ca), timeout=20)


def test_a_revoked_device(server):
    device = server.enrol("revoked-1")
    assert device.get("/record").status_code == 200
    server.post("/devices/revoked-1/revoke")
    for path in ("/record", "/metadata/timestamp.json", f"/blobs/{'0' * 64}", "/targets/assignments/x"):
        answer = device.get(path)
        assert (answer.status_code, answer.json()["code"]) == (403, "revoked")


def test_a_deleted_device(server):
    device = server.enrol("deleted-1")
    server.request("DELETE", "/devices/deleted-1")
    assert device.get("/record").json()["code"] in {"unknown_device", "revoked"}
    assert device.get("/record").status_code == 403


def test_operator_routes_are_not_here(server, device):
    for path in ("/api/v1/status", "/enrolment/ca", "/", "/openapi.json"):
        assert device.get(path).status_code == 404


# -- blobs ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "status", "start", "end"),
    [
        ("bytes=0-99", 206, 0, 100), ("bytes=100-", 206, 100, None), ("bytes=-50", 206, -50, None), ("bytes=5-5", 206, 5, 6),
        ("bytes=0-99999999", 206, 0, None), (None, 200, 0, None),
    ],
)  # fmt: skip
def test_ranges(device, blob, asked, status, start, end):
    answer = device.get(blob, headers={"Range": asked} if asked else {})
    assert answer.status_code == status
    assert answer.content == DATA[start:end]
    assert answer.headers["ETag"] == f'"{sha256(DATA)}"'
    if status == 206:
        assert re.fullmatch(rf"bytes \d+-\d+/{len(DATA)}", answer.headers["Content-Range"])


@pytest.mark.parametrize("asked", ["bytes=99999999-", "bytes=99999999-99999999"])
def test_a_range_behind_the_end(device, blob, asked):
    answer = device.get(blob, headers={"Range": asked})
    assert answer.status_code == 416
    assert answer.headers["Content-Range"].endswith(f"*/{len(DATA)}")


def test_if_range(device, blob):
    headers = {"Range": "bytes=0-9", "If-Range": f'"{sha256(DATA)}"'}
    assert device.get(blob, headers=headers).status_code == 206
    assert device.get(blob, headers={**headers, "If-Range": '"other"'}).status_code == 200


@pytest.mark.parametrize(
    "path",
    ["/blobs/" + "0" * 64, "/blobs/..%2f..%2ffleet.yaml", "/blobs/x", "/metadata/..%2f..%2ffleet.yaml", "/metadata/root.json",
     "/metadata/999.root.json", "/metadata/2.root.json", "/metadata/.timestamp.json", "/targets/../metadata/timestamp.json",
     "/targets/assignments/..%2f..%2fmetadata%2ftimestamp.json", "/targets//etc/passwd", "/targets/assignments", "/targets/",
     "/targets/" + "a" * 300, "/targets/releases/" + "a" * 5000 + "/1.json", "/targets" + "/a" * 2000],
)  # fmt: skip
def test_what_is_not_there(device, path):
    session = requests.Session()
    request = requests.Request("GET", device.server.device_url + path).prepare()
    request.url = device.server.device_url + path
    with session:
        answer = session.send(
            request, cert=(str(device.certificate), str(device.key_file)), verify=str(device.server.ca), timeout=20
        )
    assert answer.status_code in {400, 404}
    assert set(answer.json()) == {"error", "code"}


# -- the record and the certificate --------------------------------------------------------------------------------------------


def record_of(device):
    envelope = Envelope.from_dict(device.get("/record").json())
    root = Metadata.from_bytes(device.response["tuf_root"].encode())
    targets = Metadata[Targets].from_bytes(device.get("/metadata/1.targets.json").content)
    root.signed.verify_delegate("targets", targets.signed_bytes, targets.signatures)
    keyids = targets.signed.delegations.roles["assignments"].keyids
    envelope.verify([targets.signed.delegations.keys[keyid] for keyid in keyids], 1)
    assert envelope.payload_type == RECORD_PAYLOAD_TYPE
    return decode(envelope.payload, DeviceRecord, limit_bytes=65536)


def test_the_record_is_signed_and_follows_the_groups(server, device):
    first = record_of(device)
    assert (first.fleet, first.device, first.groups) == ("test", device.id, ("canary",))
    server.request("PUT", f"/devices/{device.id}/groups", json={"groups": ["b", "a", "b"]})
    second = record_of(device)
    assert (second.groups, second.serial) == (("a", "b"), first.serial + 1)


def test_renewal(server, device, tmp_path):
    key = ec.generate_private_key(ec.SECP256R1())
    pair = (str(device.certificate), str(device.key_file))
    renewed = requests.post(
        f"{server.device_url}/renew", json={"csr_pem": make_csr(key)}, cert=pair, verify=str(server.ca), timeout=20
    ).json()
    assert renewed["device"] == device.id
    assert _with(server, tmp_path, renewed["certificate_pem"], key).status_code == 200
    assert device.get("/record").status_code == 200  # the old one still works: the answer may have been lost
    assert (
        requests.post(
            f"{server.device_url}/renew", json={"csr_pem": "x"}, cert=pair, verify=str(server.ca), timeout=20
        ).status_code
        == 400
    )


# -- TUF's own client ----------------------------------------------------------------------------------------------------------


class Fetcher(FetcherInterface):
    def __init__(self, device):
        self.device = device

    def _fetch(self, url):
        answer = self.device.get(url.removeprefix(self.device.server.device_url))
        if answer.status_code != 200:
            raise DownloadHTTPError("refused", answer.status_code)
        yield answer.content


def updater(device, folder):
    for name in ("metadata", "targets"):
        (folder / name).mkdir(exist_ok=True)
    url = device.server.device_url
    return Updater(
        str(folder / "metadata"), f"{url}/metadata/", str(folder / "targets"), f"{url}/targets/", Fetcher(device),
        bootstrap=device.response["tuf_root"].encode(),
    )  # fmt: skip


def fetch(client, folder, path):
    info = client.get_targetinfo(path)
    return (folder / "got").read_bytes() if info and client.download_target(info, str(folder / "got")) else None


def test_tuf_client_gets_assignment_and_manifest(server, device, tmp_path):
    client = updater(device, tmp_path)
    before = decode(fetch(client, tmp_path, "assignments/fleet.json"), Assignment, limit_bytes=1 << 20)
    manifest = server.publish_simple("tuf", 1)
    server.begin("tuf:1")
    client = updater(device, tmp_path)
    after = decode(fetch(client, tmp_path, "assignments/fleet.json"), Assignment, limit_bytes=1 << 20)
    assert after.version > before.version
    assert after.models["tuf"].rollout.release == 1
    assert parse_manifest(fetch(client, tmp_path, "releases/tuf/1.json"), expected=manifest.ref) == manifest
    assert fetch(client, tmp_path, "releases/tuf/2.json") is None
    for file in manifest.files.values():
        assert sha256(device.get(f"/blobs/{file.sha256}").content) == file.sha256


def test_metadata_never_goes_down(server, device, tmp_path):
    for _ in range(3):
        client = updater(device, tmp_path)
        client.refresh()
        server.publish_simple("steps", server.get("/releases?model=steps").__len__() + 1)
    assert json.loads(device.get("/metadata/timestamp.json").content)["signed"]["version"] >= 4


def test_a_device_follows_a_renewed_root(own_server, tmp_path):
    server = own_server.start()
    device = server.enrol("old")
    updater(device, tmp_path).refresh()
    assert server.cli("renew-root", server.data, "--root-key", server.offline / "root.key").returncode == 1  # it is running
    server.stop()
    done = server.cli(
        "renew-root", server.data, "--root-key", server.offline / "root.key", "--releases-key", server.releases_key
    )
    assert done.returncode == 0, done.stderr
    wrong = server.cli("renew-root", server.data, "--root-key", server.releases_key)
    assert (wrong.returncode, "not the key" in wrong.stderr) == (1, True)
    server.start()
    updater(device, tmp_path).refresh()
    assert json.loads((tmp_path / "metadata" / "root.json").read_bytes())["signed"]["version"] == 2
    server.publish_simple("after", 1)
    assert fetch(updater(device, tmp_path), tmp_path, "releases/after/1.json") is not None


# -- caches --------------------------------------------------------------------------------------------------------------------


def immutable(server, device):
    """Paths of files that never change: metadata with its version, a target and a blob with their hash."""
    server.upload(DATA)
    snapshot = device.get("/metadata/timestamp.json").json()["signed"]["meta"]["snapshot.json"]["version"]
    roles = device.get(f"/metadata/{snapshot}.snapshot.json").json()["signed"]["meta"]
    version = roles["assignments.json"]["version"]
    role = device.get(f"/metadata/{version}.assignments.json").json()["signed"]
    sha = role["targets"]["assignments/fleet.json"]["hashes"]["sha256"]
    return [
        f"/metadata/{version}.assignments.json", "/metadata/1.root.json", f"/targets/assignments/{sha}.fleet.json",
        f"/blobs/{sha256(DATA)}",
    ]  # fmt: skip


def test_what_never_changes_may_be_kept_for_ever(server, device):
    for path in immutable(server, device):
        answer = device.get(path)
        assert answer.headers["Cache-Control"] == "public, max-age=31536000, immutable", path
        again = device.get(path, headers={"If-None-Match": answer.headers["ETag"]})
        assert (again.status_code, again.content) == (304, b""), path
        assert again.headers["ETag"] == answer.headers["ETag"]
        assert device.get(path, headers={"If-None-Match": f'"other", W/{answer.headers["ETag"]}'}).status_code == 304
        assert device.get(path, headers={"If-None-Match": '"other"'}).content == answer.content


def test_what_changes_is_asked_for_again(server, device):
    for path, said in (("/metadata/timestamp.json", "no-cache"), ("/record", "private, no-cache")):
        first = device.get(path)
        assert first.headers["Cache-Control"] == said
        assert device.get(path, headers={"If-None-Match": first.headers["ETag"]}).status_code == 304
    first = device.get("/metadata/timestamp.json")
    server.publish_simple("cached", 1)
    second = device.get("/metadata/timestamp.json", headers={"If-None-Match": first.headers["ETag"]})
    assert second.status_code == 200
    assert second.json()["signed"]["version"] > first.json()["signed"]["version"]


def test_head_says_what_get_would(server, device):
    for path in ("/metadata/timestamp.json", "/metadata/1.root.json"):
        get = device.get(path)
        pair = (str(device.certificate), str(device.key_file))
        head = requests.head(server.device_url + path, cert=pair, verify=str(server.ca), timeout=20)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["Content-Length"] == get.headers["Content-Length"]
        assert head.headers["ETag"] == get.headers["ETag"]


def test_who_is_shut_out_is_so_on_a_connection_that_it_had(server):
    """The certificate is looked up once for each connection, and again when anybody was shut out."""
    device, other = server.enrol("kept-1"), server.enrol("kept-2")
    kept = requests.Session()
    pair, ca = (str(device.certificate), str(device.key_file)), str(server.ca)
    paths = ("/metadata/timestamp.json", "/record", "/metadata/9.root.json", f"/blobs/{'0' * 64}")

    def statuses():
        return [kept.get(server.device_url + path, cert=pair, verify=ca, timeout=20).status_code for path in paths]

    with kept:
        assert statuses() == [200, 200, 404, 404]
        server.post("/devices/kept-2/revoke")
        assert statuses() == [200, 200, 404, 404]
        server.post("/devices/kept-1/revoke")
        assert statuses() == [403] * 4
    assert other.get("/record").status_code == 403
