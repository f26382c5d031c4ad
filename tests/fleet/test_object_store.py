"""Files of releases in an object store that speaks S3 (moto's), which also fails, lies, and is what devices are sent to."""

from __future__ import annotations

import contextlib
import http.server
import io
import json
import ssl
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
import requests
import yaml
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

from agent.sync.fetching.https import HttpBlobs
from agent.sync.http import FleetHttp
from agent.sync.problems import Problem
from fleet_server.config import BlobSettings, ConfigError, Folder, load
from fleet_server.errors import Unavailable
from fleet_server.storage.object_store import ObjectShelf
from tests.fleet.stand import Server, sha256, simple_manifest, wait_until
from tests.sync.conftest import FakeClock

pytestmark = [pytest.mark.long, pytest.mark.mosquitto]

BUCKET = "models"
DATA = bytes(range(256)) * 4096 + b"end"


class Store:
    """An S3 of its own behind what a test wants of it."""

    def __init__(self) -> None:
        self._app = DomainDispatcherApplication(create_backend_app)
        self._http = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self.failing = 0
        """How many further requests are answered 503."""
        self.lying = False
        self.asked: list[str] = []
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        self.client = boto3.client(
            "s3", endpoint_url=self.url, region_name="us-east-1", aws_access_key_id="key", aws_secret_access_key="secret"
        )
        self.client.create_bucket(Bucket=BUCKET)

    def _answer(self, environ, start_response):
        self.asked.append(f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}")
        if self.failing > 0:
            self.failing -= 1
            start_response("503 Slow Down", [("Content-Length", "0")])
            return [b""]
        body = self._app(environ, start_response)
        if self.lying and environ["REQUEST_METHOD"] == "GET":
            return [bytes(len(part)) for part in body]
        return body

    def names(self) -> set[str]:
        return {one["Key"] for one in self.client.list_objects_v2(Bucket=BUCKET).get("Contents", [])}

    @property
    def settings(self) -> dict[str, object]:
        options = {"endpoint": self.url, "region": "us-east-1", "access_key_id": "key", "secret_access_key": "secret"}
        return {"store": f"s3://{BUCKET}/fleet", "options": options, "allow_http": True}

    def close(self) -> None:
        self.client.close()
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    made = Store()
    yield made
    made.close()


@pytest.fixture(autouse=True)
def _well(store):
    store.failing, store.lying = 0, False
    store.asked.clear()


@pytest.fixture(scope="module")
def server(store, tmp_path_factory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("fleet"), blobs=store.settings).start()
    yield made
    made.stop()


@pytest.fixture(scope="module")
def device(server):
    return server.enrol("d1")


def test_what_is_published_is_there_and_devices_get_it_through_the_server(server, store, device):
    server.publish_simple("m", 1, DATA)
    digest = sha256(DATA)
    assert f"fleet/{digest}" in store.names()
    assert list((server.data / "blobs").iterdir()) == []
    assert [path for path in (server.data / "uploads").iterdir() if path.suffix != ".by"] == []

    whole = device.get(f"/blobs/{digest}")
    assert (whole.status_code, whole.content == DATA, whole.headers["ETag"]) == (200, True, f'"{digest}"')
    for asked, expected in {
        "bytes=0-9": DATA[:10], "bytes=1000000-": DATA[1_000_000:], "bytes=-3": b"end", "bytes=5-5": DATA[5:6], f"bytes=0-{10**15}": DATA,
    }.items():  # fmt: skip
        part = device.get(f"/blobs/{digest}", headers={"Range": asked})
        assert (part.status_code, part.content == expected) == (200 if expected == DATA else 206, True), asked
    assert device.get(f"/blobs/{digest}", headers={"Range": f"bytes={len(DATA)}-"}).status_code == 416
    assert device.get(f"/blobs/{digest}", headers={"If-None-Match": f'"{digest}"'}).status_code == 304
    assert device.get(f"/blobs/{'0' * 64}").status_code == 404
    bundle = server.request("POST", "/bundles", json={"models": [], "devices": ["d1"]})
    assert bundle.status_code == 200


def test_a_bundle_holds_it(server, device, store):
    server.publish_simple("b", 1, DATA)
    server.post("/rollouts", {"release": "b:1"})
    bundle = server.request("POST", "/bundles", json={"models": ["b"], "devices": ["d1"]})
    with tarfile.open(fileobj=io.BytesIO(bundle.content)) as tar:
        file = tar.extractfile(f"blobs/{sha256(DATA)}")
        assert file is not None
        assert file.read() == DATA


def test_a_deleted_release_leaves_the_store(server, store):
    server.publish_simple("gone", 1, b"gone 1")
    server.publish_simple("gone", 2, b"gone 2")
    assert server.request("DELETE", "/releases/gone/1").status_code == 200
    wait_until(lambda: f"fleet/{sha256(b'gone 1')}" not in store.names(), "its file is gone")
    assert f"fleet/{sha256(b'gone 2')}" in store.names()


def test_a_store_that_is_short_of_breath_is_ridden_out(server, store):
    store.failing = 3
    server.publish_simple("m", 2, b"after three refusals")
    assert f"fleet/{sha256(b'after three refusals')}" in store.names()


def test_a_store_that_does_not_answer_is_told_and_nothing_is_lost(server, store, device):
    digest = sha256(b"while it is away")
    store.failing = 10_000
    refused = server.request("PUT", f"/blobs/{digest}", data=b"while it is away", headers={"Upload-Offset": "0"})
    assert (refused.status_code, refused.json()["code"]) == (503, "object_store")
    assert int(refused.headers["Retry-After"]) > 0
    assert device.get(f"/blobs/{sha256(DATA)}").status_code == 503
    assert server.get("/status")["fleet"] == "test"
    store.failing = 0
    server.publish_simple("m", 3, b"while it is away")
    assert device.get(f"/blobs/{digest}").content == b"while it is away"


def test_wrong_bytes_in_the_store_are_not_published(server, store):
    server.upload(b"honest bytes")
    store.lying = True
    refused = server.request("POST", "/releases", json=server.signed(simple_manifest("m", 4, b"honest bytes")))
    assert (refused.status_code, "is damaged" in refused.json()["error"]) == (400, True)


# -- devices that are sent elsewhere -------------------------------------------------------------------------------------------------


def test_a_signed_url_opens_one_file_for_a_while(server, store, device, tmp_path):
    server.publish_simple("m", 5, b"for whoever has the URL")
    other = Server(tmp_path, blobs={**store.settings, "hand_out": "signed", "signed_s": 120.0}).start()
    try:
        other.publish_simple("m", 5, b"for whoever has the URL")
        sent = other.enrol("d2").get(f"/blobs/{sha256(b'for whoever has the URL')}", allow_redirects=False)
        assert (sent.status_code, sent.headers["Cache-Control"]) == (307, "no-store")
        place = sent.headers["Location"]
        assert place.startswith(store.url)
        assert "X-Amz-Expires=120" in place
        assert requests.get(place, timeout=20).content == b"for whoever has the URL"
    finally:
        other.stop()


class Elsewhere:
    """HTTPS that serves a folder, and what a hostile or broken store would."""

    def __init__(self, server: Server, folder: Path) -> None:
        asked = self.asked = []
        serving = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                asked.append((self.path, self.headers.get("Range"), self.connection.getpeercert()))
                data = (folder / self.path.rsplit("/", 1)[-1].partition("?")[0]).read_bytes()
                start, _, end = self.headers["Range"].removeprefix("bytes=").partition("-")
                part = data[int(start) : int(end) + 1]
                if serving.lying:
                    part = bytes(len(part))
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{int(start) + len(part) - 1}/{len(data)}")
                self.send_header("Content-Length", str(len(part)))
                self.end_headers()
                self.wfile.write(part)

            def log_message(self, *_):
                pass

        self.lying = False
        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(server.data / "pki/server.crt", server.data / "pki/server.key")
        self._http.socket = context.wrap_socket(self._http.socket, server_side=True)
        self.url = f"https://127.0.0.1:{self._http.server_port}/models"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture
def elsewhere(tmp_path):
    (tmp_path / "cdn").mkdir()
    (tmp_path / "cdn" / sha256(DATA)).write_bytes(DATA)
    server = Server(tmp_path / "one")
    made = Elsewhere(server, tmp_path / "cdn")
    server.set(blobs={"hand_out": "public", "public_url": made.url, "store": f"file://{tmp_path}/kept"})
    (tmp_path / "kept").mkdir()
    server.start()
    yield server, made
    server.stop()
    made.close()


def fetching(server, device, **options):
    clock = FakeClock()

    def connect():
        return FleetHttp(server.device_url, clock, ca=server.ca, certificate=device.certificate, key=device.key_file)

    return HttpBlobs(connect, elsewhere=lambda base: FleetHttp(base, clock, ca=server.ca, public=True), **options)


def test_a_device_follows_to_where_it_is_sent_without_showing_who_it_is(elsewhere):
    server, cdn = elsewhere
    server.publish_simple("m", 1, DATA)
    with fetching(server, server.enrol("d1")).open(sha256(DATA)) as read:
        for start, end in ((0, 10), (1000, 5000), (1_000_000, len(DATA))):
            with read(start, end) as (at, pieces):
                assert (at, b"".join(pieces)) == (start, DATA[start:end])
    assert [path for path, _, _ in cdn.asked] == [f"/models/{sha256(DATA)}"] * 3
    assert {json.dumps(shown) for _, _, shown in cdn.asked} <= {"{}", "null"}


def test_a_device_is_not_sent_where_everybody_listens(elsewhere, monkeypatch):
    server, _ = elsewhere
    server.publish_simple("m", 1, DATA)
    device = server.enrol("d1")
    source = fetching(server, device)
    opened = FleetHttp.open

    @contextlib.contextmanager
    def elsewhere_in_plain(self, url, **options):
        with opened(self, url, **options) as response:
            if response.status_code == 307:
                response.headers["Location"] = "http://192.0.2.1/x?secret=1"
            yield response

    monkeypatch.setattr(FleetHttp, "open", elsewhere_in_plain)
    with source.open(sha256(DATA)) as read, pytest.raises(Problem, match="not https"), read(0, 10):
        pass


# -- settings ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"hand_out": "signed"}, "needs store"), ({"hand_out": "public", "store": "s3://b"}, "need each other"),
        ({"public_url": "https://x", "store": "s3://b"}, "need each other"), ({"hand_out": "public", "public_url": "http://x"}, "https://"),
        ({"signed_s": 5.0}, "60 seconds"), ({"hand_out": "often"}, "often"), ({"stores": "x"}, "stores"),
    ],
)  # fmt: skip
def test_settings_that_contradict_each_other(tmp_path, settings, words):
    (tmp_path / "fleet.yaml").write_text(yaml.safe_dump({"fleet": "x", "hosts": ["h"], "blobs": settings}))
    with pytest.raises(ConfigError, match=words):
        load(Folder(tmp_path))


@pytest.mark.parametrize("url", ["nonsense", "ftp://x/y", "s3://"])
def test_stores_that_are_none(url):
    with pytest.raises(Unavailable, match="cannot be used"):
        ObjectShelf(BlobSettings(store=url))
