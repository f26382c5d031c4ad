"""kill -9 while releases are being published: after the restart the repository holds together and only whole releases are in it."""

import contextlib
import gc
import random
import threading

import pytest
import requests

from tests.fleet.stand import Server, sha256, simple_manifest, wait_until


# The client's connection breaks in the middle of a request when the server is killed; it is left to the garbage collector, which is called
# before the test ends: the next one would be blamed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
@pytest.mark.parametrize("seed", range(2))
def test_killed_while_publishing(tmp_path, seed):
    server = Server(tmp_path).start()
    try:
        generator = random.Random(seed)
        server.publish_simple("m", 1)
        acknowledged = [1]
        stop = threading.Event()

        def publish():
            with contextlib.suppress(requests.exceptions.RequestException, AssertionError):
                for version in range(2, 500):
                    if stop.is_set():
                        return
                    data = f"m {version}".encode()
                    if server.publish(simple_manifest("m", version, data), [data]).status_code == 200:
                        acknowledged.append(version)

        worker = threading.Thread(target=publish)
        worker.start()
        wait_until(lambda: len(acknowledged) > 1 + generator.randrange(4), "some are published")
        threading.Event().wait(generator.random() * 0.05)  # anywhere within a publication
        server.kill()
        stop.set()
        worker.join(60)
        server.start()  # checks every signature and hash of the repository
        found = sorted(r["version"] for r in server.get("/releases"))
        assert set(acknowledged) <= set(found)
        assert found == list(range(1, len(found) + 1))
        assert len(found) <= len(acknowledged) + 1
        server.publish_simple("m", found[-1] + 1)
        device = server.enrol("d1")
        for version in found:
            listed = server.get(f"/releases/m/{version}")
            got = device.get(f"/targets/releases/m/{listed['sha256']}.{version}.json").content
            assert sha256(got) == listed["sha256"]
    finally:
        server.stop()
        gc.collect()


def test_left_overs_of_a_publication_are_not_trusted(own_server):
    """Everything but the last step: metadata of a next version that nothing leads to."""
    from tests.fleet.test_device_listener import fetch, updater

    server = own_server.start()
    server.publish_simple("m", 1)
    data = b"half done"
    server.upload(data)
    body = server.signed(simple_manifest("m", 2, data))
    server.stop()
    metadata = server.data / "repository" / "metadata"
    (metadata / "3.releases.json").write_text(body["metadata"])
    newest = max(metadata.glob("*.snapshot.json"), key=lambda p: int(p.name.split(".")[0]))
    (metadata / f"{int(newest.name.split('.')[0]) + 1}.snapshot.json").write_bytes(newest.read_bytes())
    server.start()
    device = server.enrol("d1")
    (server.base / "tuf").mkdir()
    client = updater(device, server.base / "tuf")
    client.refresh()
    assert fetch(client, server.base / "tuf", "releases/m/2.json") is None
    assert [r["version"] for r in server.get("/releases")] == [1]
    assert server.request("POST", "/releases", json=body).status_code == 200
    client = updater(device, server.base / "tuf")
    assert fetch(client, server.base / "tuf", "releases/m/2.json") is not None


@pytest.mark.parametrize("name", ["timestamp.json", "1.root.json", "1.targets.json", "1.assignments.json"])
def test_a_damaged_repository_is_not_served(own_server, name):
    path = own_server.data / "repository" / "metadata" / name
    path.write_bytes(path.read_bytes()[:-40])
    done = own_server.cli("serve", own_server.data)
    assert done.returncode == 1
    assert "restore" in done.stderr or "cannot be read" in done.stderr


def test_a_release_missing_from_the_index_is_found_again(own_server):
    server = own_server.start()
    server.publish_simple("m", 1)
    server.stop()
    server.execute("DELETE FROM releases")
    server.start()
    assert [r["release"] for r in server.get("/releases")] == ["m:1"]
