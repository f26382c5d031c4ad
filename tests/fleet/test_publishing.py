"""Publishing over REST and by the command line: what is taken in, what is refused, and that nothing half-done is trusted."""

import asyncio
import fcntl
import threading

import pytest

from agent.contract.manifest import File
from fleet_server.client import Client, Profile
from fleet_server.errors import Conflict, Invalid
from fleet_server.releases import builder, keys
from fleet_server.storage.blobs import Blobs
from fleet_server.storage.pending import MARK
from fleet_server.storage.shelves import FolderShelf
from tests.fleet.stand import sha256, simple_manifest, wait_until
from tests.serving import onnx_models
from tests.unit.test_model_files import HOSTILE, hostile


def refused(answer):
    return answer.status_code, answer.json()["code"]


@pytest.fixture
def model(request):
    """A model name of the test's own."""
    return request.node.name.replace("[", "-").replace("]", "").replace("_", "-")[:60]


def test_a_release(server, model):
    server.publish_simple(model, 1)
    found = server.get(f"/releases/{model}/1")
    assert (found["release"], found["withdrawn"], len(found["signers"])) == (f"{model}:1", False, 1)
    assert found["manifest"]["files"]["model.onnx"]["sha256"] == sha256(f"{model} 1".encode())


def test_a_wrong_key(server, model, tmp_path):
    keys.generate(tmp_path / "stranger.key")
    data = b"stranger"
    answer = server.publish(simple_manifest(model, 1, data), [data], key=tmp_path / "stranger.key")
    assert refused(answer) == (403, "wrong_key")
    assert server.get(f"/releases?model={model}") == []


def test_online_keys_do_not_sign_releases(server, model):
    answer = server.publish(simple_manifest(model, 1, b"x"), [b"x"], key=server.data / "keys" / "assignments.key")
    assert refused(answer) == (403, "wrong_key")


def test_a_version_that_was_published(server, model):
    server.publish_simple(model, 2)
    for version in (1, 2):
        with pytest.raises(Exception, match="larger"):
            server.signed(simple_manifest(model, version, b"y"))


def test_a_missing_blob(server, model):
    body = server.signed(simple_manifest(model, 1, b"never uploaded"))
    assert refused(server.request("POST", "/releases", json=body)) == (400, "missing_blob")
    server.upload(b"never uploaded")
    assert server.request("POST", "/releases", json=body).status_code == 200


def test_a_blob_that_changed_on_disk(server, model):
    data = b"good bytes"
    server.upload(data)
    path = server.data / "blobs" / sha256(data)
    path.chmod(0o644)
    path.write_bytes(b"evil bytes")
    body = server.signed(simple_manifest(model, 1, data))
    assert refused(server.request("POST", "/releases", json=body)) == (400, "damaged_blob")
    path.unlink()


def test_a_size_that_is_not_the_blobs(server, model):
    data = b"some bytes"
    server.upload(data)
    lying = File(sha256=sha256(data), size_bytes=99)
    manifest = simple_manifest(model, 1, data)
    body = server.signed(
        type(manifest)(**{**{f: getattr(manifest, f) for f in manifest.__struct_fields__}, "files": {"model.onnx": lying}})
    )
    assert refused(server.request("POST", "/releases", json=body)) == (400, "damaged_blob")


def test_two_publishers_at_once(server, model):
    """Both signed the same next version; one is taken, the other is told to start again and then succeeds."""
    server.upload(b"a", b"b")
    bodies = [server.signed(simple_manifest(f"{model}-{n}", 1, n.encode())) for n in "ab"]
    answers = {}
    threads = [
        threading.Thread(target=lambda n=n: answers.update({n: server.request("POST", "/releases", json=bodies[n])}))
        for n in (0, 1)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(a.status_code for a in answers.values()) == [200, 409]
    loser = next(n for n, a in answers.items() if a.status_code == 409)
    assert answers[loser].json()["code"] == "stale_metadata"
    name = "ab"[loser]
    assert server.publish(simple_manifest(f"{model}-{name}", 1, name.encode()), []).status_code == 200


# -- uploads -------------------------------------------------------------------------------------------------------------------


def test_an_upload_goes_on_where_it_stopped(server):
    data = bytes(range(256)) * 4096
    path = f"/blobs/{sha256(data)}"
    half = server.data / "uploads" / sha256(data)
    half.write_bytes(data[:300_000])
    head = server.request("HEAD", path)
    assert (head.status_code, head.headers["Upload-Offset"]) == (404, "300000")
    assert refused(server.request("PUT", path, data=data, headers={"Upload-Offset": "400000"})) == (409, "wrong_offset")
    answer = server.request("PUT", path, data=data[300_000:], headers={"Upload-Offset": "300000"})
    assert answer.json()["size_bytes"] == len(data)
    assert not half.exists()
    assert server.request("HEAD", path).status_code == 200


def test_bytes_that_are_not_the_hash(server):
    wanted = sha256(b"right")
    assert refused(server.request("PUT", f"/blobs/{wanted}", data=b"wrong")) == (400, "hash_mismatch")
    assert server.request("HEAD", f"/blobs/{wanted}").headers["Upload-Offset"] == "0"


@pytest.mark.parametrize("ends", ["whole", "damaged"])
def test_an_upload_that_ends_while_another_one_begins(tmp_path, monkeypatch, ends):
    """The second has opened the file of the first when that becomes the blob, or is thrown away."""
    folders = tmp_path / "blobs", tmp_path / "uploads"
    for folder in folders:
        folder.mkdir()
    store, data = Blobs(FolderShelf(folders[0]), folders[1]), b"the bytes of both"
    half = store.uploads / sha256(data)
    flock = fcntl.flock

    def just_then(file, operation):
        monkeypatch.setattr(fcntl, "flock", flock)
        if ends == "whole":
            half.write_bytes(data)
            half.rename(folders[0] / sha256(data))
        else:
            half.unlink()
        return flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", just_then)

    async def body():
        yield data

    if ends == "whole":
        assert asyncio.run(store.receive(sha256(data), 0, body())) == len(data)
        assert (folders[0] / sha256(data)).read_bytes() == data, "what was acknowledged is still there"
    else:
        with pytest.raises(Conflict):
            asyncio.run(store.receive(sha256(data), 0, body()))
        assert asyncio.run(store.receive(sha256(data), 0, body())) == len(data)
    assert [path for path in store.uploads.iterdir() if path.suffix != MARK] == []


def test_who_publishes_waits_while_another_one_sends_the_same_file(server, tmp_path):
    data = b"sent by two" * 100_000
    (tmp_path / "weights.bin").write_bytes(data)
    path = f"/blobs/{sha256(data)}"
    half_way, go_on = threading.Event(), threading.Event()

    def slowly():
        yield data[: len(data) // 2]
        half_way.set()
        go_on.wait(20)
        yield data[len(data) // 2 :]

    answers, progress = [], []
    sender = threading.Thread(target=lambda: answers.append(server.request("PUT", path, data=slowly())))
    sender.start()
    half_way.wait(20)
    wait_until(lambda: "Upload-Under-Way" in server.request("HEAD", path).headers, "it is seen to arrive")
    other = Client(Profile.read(server.profile))
    waiter = threading.Thread(target=lambda: other.upload(sha256(data), tmp_path / "weights.bin", progress.append))
    waiter.start()
    waiter.join(1.0)
    assert waiter.is_alive()
    go_on.set()
    for thread in (sender, waiter):
        thread.join(20)
    assert answers[0].status_code == 200
    assert progress == [len(data)], "nothing was sent a second time"


@pytest.mark.parametrize("name", ["x", "..%2f..%2ffleet.yaml", "A" * 64, "0" * 63])
def test_upload_names(server, name):
    assert server.request("PUT", f"/blobs/{name}", data=b"").status_code in {400, 404}


@pytest.mark.parametrize("offset", ["-1", "x", "9" * 40, "1.5"])
def test_upload_offsets(server, offset):
    answer = server.request("PUT", f"/blobs/{sha256(b'o')}", data=b"o", headers={"Upload-Offset": offset})
    assert answer.status_code == 400


# -- the command line ----------------------------------------------------------------------------------------------------------


def describe(tmp_path, model, version, **extra):
    import json

    (tmp_path / "weights.bin").write_bytes(bytes(200_000) + str(version).encode())
    (tmp_path / "labels.txt").write_text("a\nb\n")
    (tmp_path / "pointer").write_text("version https://git-lfs.github.com/spec/v1\n")
    description = {
        "model": model, "version": version, "files": {"model.onnx": "weights.bin"},
        "variants": [{"name": "cpu", "runtime": "onnx", "file": "model.onnx"}],
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 2], "labels": "labels.txt"}], **extra,
    }  # fmt: skip
    path = tmp_path / "RELEASE.yaml"
    path.write_text(json.dumps(description))
    return path


def test_publish_by_command(server, model, tmp_path):
    done = server.cli("publish", describe(tmp_path, model, 1), "--key", server.releases_key, "--yes")
    assert done.returncode == 0, done.stderr
    manifest = server.get(f"/releases/{model}/1")["manifest"]
    assert set(manifest["files"]) == {"model.onnx", "labels.txt"}
    assert manifest["files"]["model.onnx"]["blocks"]
    assert manifest["provenance"]["created"]
    other = describe(tmp_path, model, 1)
    other.write_text(other.read_text().replace('"cpu"', '"cpu-2"'))
    again = server.cli("publish", other, "--key", server.releases_key, "--yes")
    assert (again.returncode, "larger" in again.stderr) == (1, True)


def test_publish_with_a_wrong_key_is_refused_by_the_server(server, model, tmp_path):
    done = server.cli("publish", describe(tmp_path, model, 1), "--key", server.offline / "root.key", "--yes")
    assert (done.returncode, "wrong_key" in done.stderr) == (3, True)


def test_publish_asks_before_it_signs(server, model, tmp_path):
    path = describe(tmp_path, model, 1)
    done = server.cli("publish", path, "--key", server.releases_key, stdin="n\n")
    assert done.returncode == 1
    assert server.get(f"/releases?model={model}") == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"variants": []}, "variant"), ({"surprise": 1}, "surprise"), ({"version": 0}, "version"), ({"model": "../x"}, "model"),
        ({"variants": [{"name": "cpu", "runtime": "onnx", "file": "missing.onnx"}]}, "missing.onnx"),
        ({"variants": [{"name": "cpu", "runtime": "tflite", "file": "pointer"}]}, "is a Git LFS pointer, not the file itself"),
        ({"acceptance": {"golden": [{"name": "g", "inputs": "labels.txt", "expected": "labels.txt", "compare": {"y": {"kind": "top1"}}}]}}, "npz"),
    ],
)  # fmt: skip
def test_a_description_that_is_wrong(server, tmp_path, change, says):
    done = server.cli(
        "publish", describe(tmp_path, **{"model": "wrong", "version": 1, **change}), "--key", server.releases_key, "--yes"
    )
    assert done.returncode == 1
    assert says in done.stderr


def several(tmp_path, model, **variant):
    import json

    path = tmp_path / "RELEASE.yaml"
    variant = {"name": "cpu", "runtime": "onnx", "file": "m/model.onnx", **variant}
    path.write_text(json.dumps({"model": model, "version": 1, "variants": [variant]}))
    return path


def test_the_other_files_of_a_model_are_found_and_published(server, model, tmp_path):
    onnx_models.scattered(tmp_path / "m/model.onnx", (1, 2, 4), ("weights #1.bin", "model.onnx_data", "sub/_body.bin"))
    done = server.cli("publish", several(tmp_path, model), "--key", server.releases_key, "--yes")
    assert done.returncode == 0, done.stderr
    manifest = server.get(f"/releases/{model}/1")["manifest"]
    expected = {
        "model.onnx_data": "m/model.onnx_data",
        "sub/_body.bin": "m/sub/body.bin",
        "weights #1.bin": "m/weights--1.bin",
    }
    assert manifest["variants"][0]["data"] == expected
    assert set(manifest["files"]) == {"m/model.onnx", *expected.values()}
    for location, name in expected.items():
        data = (tmp_path / "m" / location).read_bytes()
        assert manifest["files"][name]["sha256"] == sha256(data)
        assert (server.data / "blobs" / sha256(data)).read_bytes() == data


def test_a_variant_may_name_other_files_for_its_data(tmp_path):
    path = onnx_models.scattered(tmp_path / "m/model.onnx", (1, 2, 4))
    (tmp_path / "m" / "weights.bin").rename(tmp_path / "shared.bin")
    built = builder.build(several(tmp_path, "m", data={"weights.bin": "shared.bin"}))
    assert built.manifest.variants[0].data["weights.bin"] == "shared.bin"
    assert built.paths["shared.bin"] == tmp_path / "shared.bin"
    distinct = {file.read_bytes() for file in (path, *built.paths.values())}
    assert built.manifest.model_bytes(built.manifest.variants[0]) == sum(map(len, distinct))


@pytest.mark.parametrize(("location", "words"), HOSTILE)
def test_a_model_that_names_files_elsewhere_is_not_published(tmp_path, location, words):
    hostile(tmp_path, location)
    with pytest.raises(Invalid, match=words):
        builder.build(several(tmp_path, "m"))


@pytest.mark.parametrize("location", ["../x", "/x", "a//b", "", "a\\b", "a\0b"])
def test_a_manifest_that_names_files_elsewhere_is_none(tmp_path, location):
    onnx_models.scattered(tmp_path / "m/model.onnx", (1, 2, 4))
    with pytest.raises(Invalid, match="location"):
        builder.build(several(tmp_path, "m", data={location: "m/weights.bin"}))


def test_a_key_with_a_passphrase(tmp_path):
    made = keys.generate(tmp_path / "k", passphrase="open sesame")
    assert keys.is_encrypted(tmp_path / "k")
    assert (tmp_path / "k").stat().st_mode & 0o777 == 0o600
    assert keys.load(tmp_path / "k", passphrase="open sesame").public_key == made.public_key
    for wrong in (None, "sesame"):
        with pytest.raises(Exception, match="passphrase"):
            keys.load(tmp_path / "k", passphrase=wrong)
