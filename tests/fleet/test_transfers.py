"""Documents and blobs over MQTT, through a real server and broker: all of it arrives, for whoever may have it, whatever gets lost."""

from __future__ import annotations

import json
import queue
import random
import threading
from pathlib import Path

import pytest

from agent.contract import topics, transfers
from agent.contract.acceptance import WatchRules
from agent.contract.codec import encode
from agent.contract.manifest import File
from agent.contract.transfers import Ask, Part, Status, bitmap, decode_part
from agent.host.clock import SystemClock
from agent.store import Store
from agent.sync import identity
from agent.sync.fetching.downloader import Downloader
from agent.sync.fetching.mqtt import MqttBlobs, MqttDocuments, Transfers, sized
from agent.sync.fleet.link import Broker, Link, tls_context
from agent.sync.http import HttpStatus, TooLong
from agent.sync.problems import Problem
from fleet_server.releases import blocks
from tests import warm
from tests.fleet.stand import environment, sha256, wait_until
from tests.sync.fake_serve import FakeServe
from tests.sync.fleet import onnx_release

DATA = random.Random(31).randbytes(3_000_000)


def enrolled(server, folder: Path, name: str) -> tuple[Path, Path]:
    """The real command's identity folder and configuration, for a device that reaches the broker's port alone."""
    config = folder / "agent.yaml"
    store = Store.create(folder / "store")
    config.write_text(
        json.dumps(
            {
                "store": str(store.root),
                "serve": {"socket": str(folder / "s.sock")},
                "sync": {
                    "identity": str(folder / "identity"), "disk_reserve_bytes": 0, "watch_poll_s": 0.05, "poll_interval_s": 0.5,
                    "heartbeat_s": 0.5,
                },
            }
        )
    )  # fmt: skip
    line = ["enrol", str(server.enrolment_string()), "--device", name, "--config", str(config)]
    warm.run("agent.cli", line, env=environment()).check_returncode()
    address = folder / "identity" / "fleet.json"
    said = json.loads(address.read_text())
    said["device_url"] = "https://127.0.0.1:1"
    address.write_text(json.dumps(said))
    return folder / "identity", config


class NoOutbox:
    def first(self, count, after=0):
        return []

    def delivered(self, item):
        return


@pytest.fixture
def pulled(server, tmp_path):
    """Transfers over a link of their own."""
    who = identity.load(enrolled(server, tmp_path, f"puller-{tmp_path.name}"[:60])[0])
    link = Link(
        who.device,
        Broker("127.0.0.1", server.broker, lambda: tls_context(*map(str, (who.ca_file, who.certificate_file, who.key_file)))),
        NoOutbox(),
        lambda: 1,
        on_poke=lambda _said, _alone: None,
    )
    made = Transfers(link.ask, lambda: link.connected, silence_s=1.0)
    made.link = link
    link.on_blocks = lambda id_, payload: made.received(id_, payload)  # noqa: PLW0108 - tests put something else in its place
    link.busy = lambda: made.active
    link.start()
    wait_until(lambda: link.connected, "the link")
    yield made
    link.stop()


def test_a_blob_arrives_and_is_verified(server, pulled, tmp_path):
    server.upload(DATA)
    (tmp_path / "model").write_bytes(DATA)
    file = blocks.describe(tmp_path / "model")
    store = Store.create(tmp_path / "s")
    downloads = Downloader(store, [MqttBlobs(pulled)], SystemClock(), reserve_bytes=0, min_bytes_per_s=1)

    downloads.fetch(file, lambda _: None, lambda: False)

    assert store.blob(file.sha256).read_bytes() == DATA


def test_what_gets_lost_is_asked_for_again(server, pulled, tmp_path):
    server.upload(DATA)
    store = Store.create(tmp_path / "s")
    chance, received = random.Random(1), pulled.received
    pulled.received = lambda id_, payload: received(id_, payload) if chance.random() < 0.7 else None
    downloads = Downloader(store, [MqttBlobs(pulled)], SystemClock(), reserve_bytes=0, min_bytes_per_s=1)

    downloads.fetch(File(sha256=sha256(DATA), size_bytes=len(DATA)), lambda _: None, lambda: False)

    assert store.blob(sha256(DATA)).read_bytes() == DATA


def test_documents(server, pulled):
    documents = MqttDocuments(pulled)

    def get(path, limit=1 << 20):
        return documents.get(documents.url(path), limit_bytes=limit, deadline_s=10)

    assert json.loads(get("/metadata/timestamp.json"))["signed"]["_type"] == "timestamp"
    assert b"payload" in get("/record")
    with pytest.raises(HttpStatus) as missing:
        get("/metadata/99.root.json")
    assert missing.value.status == 404
    with pytest.raises(TooLong):
        get("/metadata/timestamp.json", limit=10)
    for hostile in ("/metadata/../../fleet.yaml", "/targets/../../keys/online", "/metadata/%2e%2e", "/targets//etc/passwd"):
        with pytest.raises(HttpStatus):
            get(hostile)
    with pytest.raises(Problem):
        list(pulled.parts("blob", "../../fleet.yaml", 0, 1))


@pytest.mark.parametrize(
    "payload", [b"", b"{}", b"\x00" * 5000, b'{"id":"+/#","thing":"blob","name":"x","first":0,"wanted":"01"}', b"[" * 4000]
)
def test_rubbish_is_not_answered_and_hurts_nobody(payload, server, pulled):
    pulled.link.asks.append(payload)

    assert pulled.parts("record", "", 0, None).__next__()[0] > 0


def test_nobody_reads_what_another_device_asked_for(server, pulled, connect):
    """The broker's list: only the device itself may read below its own `down`, and write below its own `up`."""
    other = server.enrol()
    connect(other)
    client = other.mqtt
    device = pulled.link.device
    client.subscribe([(topics.down_blocks(device, "+"), 0)])
    ask = Ask(id="stolen", thing="record", name="", first=0, wanted=bitmap(0, [0]))
    client.publish(topics.up(device, "blocks"), encode(ask), qos=1).wait_for_publish(5)

    assert pulled.parts("record", "", 0, None).__next__()[0] > 0
    got = []
    while not other.received.empty():
        got.append(other.received.get())
    assert not [topic for topic, _ in got if "/down/blocks/" in topic]


def test_an_update_by_the_brokers_port_alone(server, tmp_path):
    """`edge-agent sync` whose HTTPS leads nowhere: metadata, manifest, record and files come over MQTT, and it reports that it serves."""
    _, config = enrolled(server, tmp_path, "harbour-1")
    store = Store(tmp_path / "store")
    manifest, contents = onnx_release(tmp_path / "release", 1, 2.0, watch=WatchRules(duration_s=0.2, max_duration_s=5.0))
    assert server.publish(manifest, contents.values()).status_code == 200
    server.post("/rollouts", {"release": "crane:1"})
    serve = FakeServe(store, tmp_path / "s.sock")
    with (tmp_path / "log").open("wb") as log:
        process = warm.Process("agent.cli", ["sync", "--config", str(config)], stdout=log, stderr=log, env=environment())
    try:
        wait_until(lambda: serve.models.get("crane", {}).get("active") == 1, "release 1 serves", within=60)
        wait_until(
            lambda: server.get("/devices/harbour-1")["models"].get("crane", {}).get("serving") == 1,
            "the fleet knows",
            within=30,
        )
        wait_until(
            lambda: any(event["model"] == "crane" for event in server.get("/events?device=harbour-1")),
            "what the device says happened, signed by it",
        )
    finally:
        process.terminate()
        process.wait(15)
        serve.stop()


# -- the messages -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("numbers", [[0], [5], [3, 4, 9, 66], list(range(10, 74))])
def test_bitmaps(numbers):
    ask = Ask(id="a", thing="blob", name="x", first=numbers[0], wanted=bitmap(numbers[0], numbers))

    assert list(ask.parts()) == numbers


def test_parts():
    part = Part(Status.OK, 7, 1 << 40, b"bytes")

    assert decode_part(part.encode()) == part
    assert decode_part(b"") is None
    assert decode_part(b"\x09" + part.encode()[1:]) is None
    assert decode_part(bytes([1, 9]) + part.encode()[2:]) is None


@pytest.mark.parametrize(
    "change",
    [{"wanted": ""}, {"wanted": "0"}, {"wanted": "zz"}, {"wanted": "00" * 9}, {"first": -1}, {"part_bytes": 1}, {"id": "a/b"}],
)
def test_an_ask_that_breaks_a_rule(change):
    with pytest.raises(ValueError):
        Ask(**{"id": "a", "thing": "blob", "name": "x", "first": 0, "wanted": "01", **change})


@pytest.mark.parametrize("limit", [0, 1, 1000, 5000, 65_535, 65_536, 1_000_000, 100_000_000])
def test_a_bandwidth_limit_holds_at_the_broker_too(limit):
    """Parts come as soon as they are asked for, so no more is asked for than the limit lets through in a second (or the smallest part)."""
    found = sized(limit)

    assert limit == 0 or found["window"] * found["part_bytes"] <= max(limit, transfers.MIN_PART_BYTES)
    assert 1 <= found["window"] <= transfers.MAX_PARTS
    assert transfers.MIN_PART_BYTES <= found["part_bytes"] <= transfers.MAX_PART_BYTES


@pytest.mark.parametrize("window", [1, 2, 3])
def test_the_smallest_windows_come_to_an_end(server, pulled, window):
    server.upload(DATA)
    small = Transfers(pulled.link.ask, lambda: True, window=window, part_bytes=4096)
    pulled.link.on_blocks = small.received

    got = b"".join(data for _, data in small.parts("blob", sha256(DATA), 5, 25))

    assert got == DATA[5 * 4096 : 25 * 4096]


def test_a_broker_that_sends_nothing_is_given_up():
    silent = Transfers(lambda _: True, lambda: True, silence_s=0.01)

    with pytest.raises(Problem, match="brought nothing"):
        list(silent.parts("blob", "x", 0, 3))
    assert not silent.active


@pytest.mark.alone  # silence of 10 ms is noticed
def test_parts_that_nobody_asked_for_are_forgotten():
    sent = queue.Queue()
    eager = Transfers(lambda ask: sent.put(ask) or True, lambda: True, silence_s=0.01, part_bytes=1024)

    def lie() -> None:
        id_ = json.loads(sent.get(timeout=5))["id"]
        for part in (
            Part(Status.OK, 99, 5000, b"x" * 1024),
            Part(Status.OK, 0, 5000, b"short"),
            Part(Status.OK, 0, 5000, b"y" * 1024),
        ):
            eager.received(id_, part.encode())
        eager.received(id_, transfers.PART_BYTES.to_bytes(4, "big"))
        eager.received("unknown", Part(Status.OK, 0, 1, b"z").encode())

    thread = threading.Thread(target=lie)
    thread.start()
    assert next(eager.parts("blob", "x", 0, 1)) == (5000, b"y" * 1024)
    thread.join()
