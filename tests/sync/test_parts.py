"""The small deciders around an update: variants, windows, what may be deleted, counters, reports, the port to `serve`."""

from __future__ import annotations

import datetime as dt
import json
import socket
from pathlib import Path

import msgspec
import pytest
from securesystemslib.dsse import Envelope
from securesystemslib.signer import SSlibKey

from agent.contract.assignment import Window
from agent.contract.codec import decode, encode
from agent.contract.manifest import ReleaseManifest, Requires, Variant
from agent.contract.names import ReleaseRef
from agent.contract.reasons import Reason
from agent.contract.reports import (
    EVENT_PAYLOAD_TYPE,
    MAX_EVENT_BYTES,
    MAX_REPORT_BYTES,
    STATE_PAYLOAD_TYPE,
    Answer,
    Event,
    Hardware,
    Outcome,
    Phase,
    StateReport,
)
from agent.host import hardware
from agent.host.clock import LastKnownGood
from agent.store import Store
from agent.sync.fleet.counters import Counter
from agent.sync.fleet.reports import Reporter, Signer, model_state
from agent.sync.gates.variants import choose, needed_files, satisfies
from agent.sync.gates.windows import is_open
from agent.sync.problems import Problem
from agent.sync.serving import ModelStatus, ServeAway, ServeClient, ServeRefused, ServeStatus, VersionStatus
from agent.sync.updating.quarantine import Quarantine
from agent.sync.updating.retention import Housekeeping, collect, surplus
from agent.sync.updating.states import States
from agent.sync.updating.update import UpdateState
from tests.sync.conftest import FakeClock
from tests.sync.fake_serve import FakeServe, stats
from tests.sync.fleet import script_release

PI = Hardware(arch="aarch64", memory_bytes=1 << 30, runtimes={"tflite": "ai-edge-litert 2.3.0"})
JETSON = Hardware(
    arch="arm64",
    memory_bytes=8 << 30,
    accelerator="cuda",
    runtimes={"onnx": "onnxruntime 1.31.1", "tensorrt": "tensorrt 10.3.0"},
)


@pytest.fixture
def manifest(tmp_path: Path) -> ReleaseManifest:
    manifest, _ = script_release(tmp_path / "r", 1, "scale 1", expect=1.0)
    script = manifest.files["model.script"]
    variants = (
        Variant(name="engine", runtime="tensorrt", file="a.plan", requires=Requires(arch=("aarch64",), accelerator="cuda", runtime_version="~10")),
        Variant(name="engine10", runtime="tensorrt", file="b.plan", requires=Requires(arch=("aarch64",), accelerator="cuda", runtime_version=">=10,<11")),
        Variant(name="big", runtime="tflite", file="c.tflite", requires=Requires(memory_bytes=4 << 30)),
        Variant(name="small", runtime="tflite", file="d.tflite"),
    )  # fmt: skip
    files = {**manifest.files, **dict.fromkeys(("a.plan", "b.plan", "c.tflite", "d.tflite"), script)}
    return msgspec.structs.replace(manifest, variants=variants, files=files)


def test_the_first_variant_that_fits(manifest: ReleaseManifest):
    assert choose(manifest, JETSON).name == "engine10", "a demand that cannot be read is not met"
    assert choose(manifest, PI).name == "small"


def test_no_variant_says_why_for_each(manifest: ReleaseManifest):
    with pytest.raises(Problem) as caught:
        choose(manifest, Hardware(arch="riscv64", runtimes={"tensorrt": "tensorrt 10.3"}))

    assert caught.value.reason is Reason.NO_VARIANT
    assert "'engine10': needs aarch64, this is riscv64" in caught.value.message
    assert "'small': runtime 'tflite' does not work here (working: tensorrt)" in caught.value.message


def test_only_the_files_of_the_chosen_variant_are_needed(manifest: ReleaseManifest):
    assert needed_files(manifest, manifest.variant("small")) == {"d.tflite", "model.script", "in.npz", "out.npz"}


def test_all_files_of_the_chosen_variant_are_needed_and_none_of_the_others(manifest: ReleaseManifest):
    extra = ("a.data", "b.data", "shared.data", "a.so", "b.so")
    variants = (
        Variant(name="a", runtime="script", file="a.plan", data={"w": "a.data", "v": "shared.data"}, libraries=("a.so",)),
        Variant(name="b", runtime="script", file="b.plan", data={"w": "b.data", "v": "shared.data"}, libraries=("b.so",)),
    )
    files = {**manifest.files, **dict.fromkeys(extra, manifest.files["a.plan"])}
    for unused in ("c.tflite", "d.tflite", "model.script"):
        del files[unused]
    several = msgspec.structs.replace(manifest, variants=variants, files=files)
    assert needed_files(several, variants[0]) == {"a.plan", "a.data", "shared.data", "a.so", "in.npz", "out.npz"}


@pytest.mark.parametrize(
    ("version", "demand", "met"),
    [
        ("onnxruntime 1.31.1", ">=1.20", True), ("onnxruntime 1.9.0", ">=1.20", False), ("x 2.3.0", ">=2,<3", True),
        ("x 3.0", ">=2,<3", False), ("x 1.2.9", "==1.2", True), ("x 1.3.0", "1.2", False), ("x 2", ">1.9.9", True),
        ("x 1.0", ">=banana", False), ("unknown", ">=0", True), ("unknown", ">0", False),
    ],
)  # fmt: skip
def test_version_demands(version, demand, met):
    assert satisfies(version, demand) is met


NIGHT = Window(start_minute=22 * 60, end_minute=4 * 60, days=(4,))  # Friday night


@pytest.mark.parametrize(
    ("when", "is_it"),
    [("2026-11-20 21:59", False), ("2026-11-20 22:00", True), ("2026-11-21 03:59", True), ("2026-11-21 04:00", False),
     ("2026-11-21 23:00", False), ("2026-11-20 02:00", False)],
)  # fmt: skip
def test_a_window_past_midnight(when, is_it):
    assert is_open(NIGHT, dt.datetime.fromisoformat(when)) is is_it


def test_no_window_is_always_open():
    assert is_open(None, dt.datetime.fromisoformat("2026-01-01"))


def ref(version: int, model: str = "crane") -> ReleaseRef:
    return ReleaseRef(model, version)


def test_what_may_be_deleted_goes_oldest_first():
    releases = [ref(n) for n in (1, 2, 3, 4, 5)] + [ref(7, "lift")]
    needed = {"crane": {2, 5}, "lift": {7}}

    assert surplus(releases, needed, 2) == [ref(1)]
    assert surplus(releases, needed, 0) == [ref(1), ref(3), ref(4)]
    assert surplus(releases, {}, 0) == releases


def fill(store: Store, tmp_path: Path, version: int, **options) -> ReleaseManifest:
    manifest, contents = script_release(tmp_path / "made", version, f"scale {version}", **options)
    for name, data in contents.items():
        store.file(manifest, name).write_bytes(data)
    store.write_manifest(encode(manifest))
    return manifest


def test_collecting_keeps_shared_blobs_and_downloads_under_way(store: Store, tmp_path: Path):
    one, two = fill(store, tmp_path, 1, expect=1.0), fill(store, tmp_path, 2)
    (store.staging / ("a" * 64)).write_bytes(b"half")
    (store.staging / ("b" * 64)).write_bytes(b"orphan")

    collect(store, [one.ref], staging_needed=["a" * 64])

    assert store.releases() == [two.ref]
    assert store.has_blob(two.files["model.script"].sha256)
    assert not store.has_blob(one.files["model.script"].sha256)
    assert [path.name for path in store.staging.iterdir()] == ["a" * 64]


def test_a_manifest_that_cannot_be_read_keeps_all_blobs(store: Store, tmp_path: Path):
    fill(store, tmp_path, 1)
    (store.root / "releases" / "crane" / "2.json").write_bytes(b"?")

    assert collect(store, []) == 0
    assert len(list(store.blobs.iterdir())) == 1


def test_nothing_is_collected_while_a_download_has_not_said_what_it_needs(store: Store, tmp_path: Path):
    fill(store, tmp_path, 1)
    keeping = Housekeeping(store, 0)
    keeping.need("crane", ())
    keeping.fetching("lift", None)
    assert keeping.collect() == 0
    keeping.fetched("lift")

    assert keeping.collect() > 0
    assert store.releases() == []


def test_a_damaged_manifest_that_nobody_needs_does_not_stop_collecting(store: Store, tmp_path: Path):
    fill(store, tmp_path, 1)
    kept = fill(store, tmp_path, 3)
    (store.root / "releases" / "crane" / "2.json").write_bytes(b"?")
    keeping = Housekeeping(store, 1)
    keeping.need("crane", {3})

    assert keeping.collect() > 0
    assert store.releases() == [kept.ref]
    assert store.has_blob(kept.files["model.script"].sha256)


def test_counters_grow_across_restarts_lost_disks_and_clocks_that_go_back(tmp_path: Path):
    clock = FakeClock(wall=2000.0)
    path = tmp_path / "counter.json"
    first = Counter(path, clock).next()
    clock.set_wall(1000.0)
    second = Counter(path, clock).next()
    path.write_bytes(b"")
    clock.set_wall(3000.0)
    third = Counter(path, clock).next()

    assert 0 < first < second < third


def test_the_known_time_survives_and_only_grows(tmp_path: Path):
    path = tmp_path / "clock.json"
    LastKnownGood(path, floor=100.0).advance(1_000_000.0)
    known = LastKnownGood(path)
    known.advance(5.0)

    assert known.time == 1_000_000.0
    assert known.believable(1_000_000.0 - 60)
    assert not known.believable(0.0)
    path.write_bytes(b"\xff")
    assert LastKnownGood(path, floor=7.0).time == 7.0


def test_quarantine_remembers_manifests_not_numbers(tmp_path: Path):
    quarantine = Quarantine(tmp_path / "q")
    answer = Answer(release=3, outcome=Outcome.REFUSED, reason="golden_mismatch", message="wrong")
    quarantine.add("crane", "m1", answer)

    again = Quarantine(tmp_path / "q")
    assert again.find("crane", 3, "m1") == answer
    assert again.find("crane", 3, "m2") is None
    assert again.find("lift", 3, "m1") is None
    assert again.forget("crane", 3)
    assert not again.forget("crane", 3)


def test_a_state_of_a_newer_format_is_not_used(tmp_path: Path):
    states = States(tmp_path / "updates")
    states.save(UpdateState(model="crane"))
    path = tmp_path / "updates" / "crane.json"
    path.write_bytes(path.read_bytes().replace(b'"format":1', b'"format":9'))

    assert states.read("crane") is None


# -- reports ----------------------------------------------------------------------------------------------------------------------


class View:
    def __init__(self, state: UpdateState) -> None:
        self.state, self.progress, self.held, self.stopped = state, 0.25, False, None


class Kept:
    def __init__(self) -> None:
        self.items: list[tuple[str, bytes]] = []

    def put(self, kind: str, payload: bytes) -> None:
        self.items.append((kind, payload))


def a_model(**changes):
    version = VersionStatus(version=2, variant="cpu", state="READY", sha256="f" * 64)
    return ModelStatus(active=2, previous=1, versions={"2": msgspec.structs.replace(version, **changes)})


def test_a_report_says_what_serve_says():
    state = UpdateState(model="crane", phase=Phase.FETCHING, wanted=3, target=3)

    ready = model_state(View(state), a_model(), (), 1)
    broken = model_state(View(state), a_model(state="UNAVAILABLE"), (), 1)
    away = model_state(View(state), ModelStatus(), (), 1)

    assert (ready.serving, ready.sha256, ready.progress, ready.target) == (2, "f" * 64, 0.25, 3)
    assert (broken.serving, broken.sha256) == (None, None)
    assert away.serving is None


@pytest.fixture
def reporter(identity, clock, tmp_path: Path):
    kept = Kept()
    counter = Counter(tmp_path / "counter.json", clock)
    return Reporter("crane-7", Signer(identity.key), kept, counter, clock, lambda: Hardware(arch="x86_64")), kept


def test_a_report_is_signed_with_the_key_of_the_certificate(reporter, identity):
    reporting, kept = reporter
    first = reporting.report({}, None, None, 5, "a problem")
    second = reporting.report({}, ServeStatus("life-1"), None, 5, None)

    assert second.counter > first.counter
    envelope = Envelope.from_dict(json.loads(kept.items[1][1]))
    assert envelope.payload_type == STATE_PAYLOAD_TYPE
    envelope.verify([SSlibKey.from_crypto(identity.certificate.public_key())], 1)
    assert decode(envelope.payload, StateReport, limit_bytes=MAX_REPORT_BYTES) == second


def test_restarts_of_serve_are_counted(reporter):
    reporting, _ = reporter
    lives = [ServeStatus("a"), ServeStatus("a"), None, ServeStatus("b"), ServeStatus("c")]

    assert [reporting.report({}, life, None, 1, None).serve_restarts for life in lives] == [0, 0, 0, 1, 2]


def test_a_report_of_very_many_models_fits(reporter):
    reporting, kept = reporter
    answer = Answer(release=1, outcome=Outcome.REFUSED, message="x" * 500)
    state = UpdateState(model="crane", answers=(answer,) * 10)
    models = {f"model-{n}": model_state(View(state), a_model(), (answer,) * 10, None) for n in range(100)}
    reporting.report(models, None, None, 1, None)

    assert len(kept.items[0][1]) <= MAX_REPORT_BYTES


def test_events_are_signed_and_have_an_id_of_their_own(reporter, identity):
    reporting, kept = reporter
    for _ in range(2):
        reporting.event("refused", "no", model="crane", release=3, reason="too_slow")
    envelopes = [Envelope.from_dict(json.loads(payload)) for _, payload in kept.items]
    for envelope in envelopes:
        assert envelope.payload_type == EVENT_PAYLOAD_TYPE
        envelope.verify([SSlibKey.from_crypto(identity.certificate.public_key())], 1)
    events = [decode(envelope.payload, Event, limit_bytes=MAX_EVENT_BYTES) for envelope in envelopes]

    assert events[0].id != events[1].id
    assert (events[0].model, events[0].release, events[0].reason) == ("crane", 3, "too_slow")


# -- the port to serve ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def serve(store: Store, tmp_path: Path):
    fill(store, tmp_path, 1)
    serve = FakeServe(store, tmp_path / "s.sock")
    yield serve
    serve.stop()


def test_control_routes_round(serve: FakeServe, tmp_path: Path):
    client = ServeClient(tmp_path / "s.sock")
    serve.stats["crane", 1] = stats(ok=7, invalid=2, run=1)
    assert client.load("crane", 1, "cpu").version == 1
    client.activate("crane", 1)
    model = client.status().model("crane")

    assert model.serving is not None
    assert model.serving.stats.for_watch().answered == 10
    client.commit("crane")
    client.rollback("crane", 1)
    client.unload("crane")
    assert client.status().models == {}


def test_refusals_and_absence_are_told_apart(serve: FakeServe, tmp_path: Path):
    client = ServeClient(tmp_path / "s.sock")
    with pytest.raises(ServeRefused, match="not in the store") as refused:
        client.load("crane", 9, "cpu")
    assert refused.value.code == "not_in_store"
    serve.crash_on = ("load", 1)
    with pytest.raises(ServeAway) as away:
        client.load("crane", 1, "cpu")
    assert away.value.sent
    with pytest.raises(ServeAway) as nobody:
        ServeClient(tmp_path / "nobody.sock").status()
    assert not nobody.value.sent


# -- the machine ------------------------------------------------------------------------------------------------------------------


def test_a_question_that_is_not_answered_took_nobody_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`serve` that still loads its models lets its callers wait; only a change may be what killed it."""
    monkeypatch.setattr("agent.sync.serving.STATUS_TIMEOUT_S", 0.05)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(tmp_path / "s.sock"))
        listener.listen(4)
        with pytest.raises(ServeAway) as away:
            ServeClient(tmp_path / "s.sock").status()

    assert not away.value.sent


@pytest.mark.usefixtures("script_runtime")
def test_the_hardware_is_what_it_is():
    found = hardware.probe()

    assert found.cpus >= 1
    assert found.memory_bytes > 1 << 20
    assert found.runtimes["script"] == "script 1.0"
    assert found.runtimes["onnx"].startswith("onnxruntime ")


def test_a_probe_that_hangs_is_given_up():
    assert hardware.probe_runtimes(timeout_s=0.01) == {}
