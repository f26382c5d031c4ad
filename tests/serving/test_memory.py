"""Memory that clients share: tensors that are not copied through the socket, and nothing that a hostile client can do with it."""

import contextlib
import fcntl
import json
import math
import mmap
import os
import re
import socket
import time
from multiprocessing import shared_memory
from pathlib import Path

import numpy as np
import pytest

from tests.serving import onnx_models
from tests.serving.server import DEADLINE_S, Device, Server, read_answer, request

INFER = "/v2/models/scale/infer"
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
ROWS = np.arange(8, dtype=np.float32).reshape(2, 4)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    device = Device(folder)
    models = {
        "scale": onnx_models.scale(folder / "scale.onnx", 3.0),
        "flags": onnx_models.identity(folder / "flags.onnx", onnx_models.TensorProto.BOOL),
        "texts": onnx_models.identity(folder / "texts.onnx", onnx_models.TensorProto.STRING),
    }
    for name, path in models.items():
        device.release(name, 1, path)
        device.select(name, 1)
    made = device.server(shared_memory="owner").start()
    yield made
    assert made.stop() == 0


def sealed(size, seals=SEALS, flags=os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC):
    fd = os.memfd_create("test", flags)
    os.ftruncate(fd, size)
    if seals:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def register(sock, name, size, *fds):
    data = request("POST", f"/v2/edge/memory/{name}/register", json.dumps({"byte_size": size}).encode())
    socket.send_fds(sock, [data], list(fds)) if fds else sock.sendall(data)
    return read_answer(sock)


def infer(sock, region, size=32, offset=0, model="scale", datatype="FP32", shape=(2, 4), out=None):
    parameters = {"shared_memory_region": region, "shared_memory_byte_size": size, "shared_memory_offset": offset}
    given = {"name": "x", "datatype": datatype, "shape": list(shape), "parameters": parameters}
    document = {"inputs": [given]}
    if out is not None:
        document["outputs"] = [{"name": "y", "parameters": out}]
    sock.sendall(request("POST", f"/v2/models/{model}/infer", json.dumps(document).encode()))
    status, _, body = read_answer(sock)
    return status, json.loads(body)


def descriptors(server):
    return sum(1 for _ in Path(f"/proc/{server.process.pid}/fd").iterdir())


def until(condition):
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline


@pytest.fixture
def nothing_leaks(server):
    """The server ends with as many descriptors as it began with."""
    until(lambda: descriptors(server) == descriptors(server))
    before = descriptors(server)
    yield
    until(lambda: descriptors(server) <= before)


pytestmark = pytest.mark.usefixtures("nothing_leaks")


@pytest.fixture
def fd():
    made = sealed(4096)
    os.pwrite(made, ROWS.tobytes(), 0)
    yield made
    os.close(made)


def test_a_prediction_from_memory_that_came_with_the_connection(server, fd):
    with server.connect() as sock:
        assert register(sock, "mine", 4096, fd)[0] == 200
        status, answer = infer(sock, "mine")
        assert (status, answer["outputs"][0]["data"]) == (200, (ROWS * 3).ravel().tolist())
        os.pwrite(fd, (ROWS + 1).tobytes(), 64)
        assert infer(sock, "mine", offset=64)[1]["outputs"][0]["data"] == ((ROWS + 1) * 3).ravel().tolist()


def repeat(sock, region, model="scale", datatype="FP32", shape=(2, 4)):
    """The status of the answer, and its values: of a request whose every byte is that of the one before, as clients in a loop send it."""
    size = math.prod(shape) * (4 if datatype == "FP32" else 1)
    parameters = {"shared_memory_region": region, "shared_memory_byte_size": size}
    given = {"name": "x", "datatype": datatype, "shape": list(shape), "parameters": parameters}
    document = json.dumps({"inputs": [given], "parameters": {"binary_data_output": True}}).encode()
    sock.sendall(request("POST", f"/v2/models/{model}/infer", document, Inference_Header_Content_Length=len(document)))
    status, headers, body = read_answer(sock)
    if status != 200:
        return status, body.decode()
    return status, np.frombuffer(
        body, "<f4" if datatype == "FP32" else "?", offset=int(headers["inference-header-content-length"])
    ).tolist()


def test_the_same_request_again_reads_what_is_there_then(server, fd):
    with server.connect() as sock:
        register(sock, "mine", 4096, fd)
        for n in range(5):
            os.pwrite(fd, (ROWS + n).tobytes(), 0)
            assert repeat(sock, "mine") == (200, ((ROWS + n) * 3).ravel().tolist())


def test_the_same_request_again_after_its_region_became_another_one(server, fd):
    other = sealed(4096)
    os.pwrite(other, (ROWS + 100).tobytes(), 0)
    with server.connect() as sock:
        register(sock, "stays", 4096, fd)  # so that descriptors are looked for
        for made, rows in ((fd, ROWS), (other, ROWS + 100)):
            assert register(sock, "mine", 4096, made)[0] == 200
            assert [repeat(sock, "mine") for _ in range(3)] == [(200, (rows * 3).ravel().tolist())] * 3
            sock.sendall(request("POST", "/v2/edge/memory/mine/unregister"))
            assert read_answer(sock)[0] == 200
            assert repeat(sock, "mine")[0] == 404
    os.close(other)


def test_memory_that_was_asked_for_again_and_again_goes_when_it_is_unregistered(server, fd):
    before = descriptors(server)
    with server.connect() as sock:
        register(sock, "mine", 4096, fd)
        for _ in range(3):
            repeat(sock, "mine")
        sock.sendall(request("POST", "/v2/edge/memory/mine/unregister"))
        read_answer(sock)
        until(lambda: descriptors(server) <= before + 1)  # the connection's own


def test_flags_are_checked_each_time(server, fd):
    with server.connect() as sock:
        register(sock, "mine", 4096, fd)
        for value in (1, 2, 0, 255):
            os.pwrite(fd, bytes([1, 0, value, 1]), 0)
            status, said = repeat(sock, "mine", "flags", "BOOL", (4,))
            assert (status, said) == (200, [True, False, value == 1, True]) if value < 2 else status == 400


def test_an_output_goes_there_too(server, fd):
    with server.connect() as sock:
        register(sock, "mine", 4096, fd)
        out = {"shared_memory_region": "mine", "shared_memory_byte_size": 32, "shared_memory_offset": 1024}
        status, answer = infer(sock, "mine", out=out)
        assert status == 200
        assert "data" not in answer["outputs"][0]
        assert np.frombuffer(os.pread(fd, 32, 1024), np.float32).tolist() == (ROWS * 3).ravel().tolist()


def test_memory_that_was_sealed_against_writing_can_be_read(server):
    made = sealed(4096, 0)
    os.pwrite(made, ROWS.tobytes(), 0)
    fcntl.fcntl(made, fcntl.F_ADD_SEALS, SEALS | fcntl.F_SEAL_WRITE)
    with server.connect() as sock:
        assert register(sock, "mine", 4096, made)[0] == 200
        assert infer(sock, "mine")[0] == 200
        status, answer = infer(sock, "mine", out={"shared_memory_region": "mine", "shared_memory_byte_size": 32})
        assert status == 400
        assert "cannot be written" in answer["error"]
    os.close(made)


def ordinary_file():
    fd = os.open("/tmp", os.O_TMPFILE | os.O_RDWR)
    os.ftruncate(fd, 4096)
    return fd


def pipe_end():
    read, write = os.pipe()
    os.close(read)
    return write


def huge():
    try:
        return sealed(2 << 20, SEALS, os.MFD_ALLOW_SEALING | os.MFD_HUGETLB)
    except OSError:
        pytest.skip("no huge pages here")


WRONG = {
    "not sealed": (lambda: sealed(4096, 0), 4096, "can still change its size"),
    "sealed against growing only": (lambda: sealed(4096, fcntl.F_SEAL_GROW), 4096, "can still change its size"),
    "sealed against shrinking only": (lambda: sealed(4096, fcntl.F_SEAL_SHRINK), 4096, "can still change its size"),
    "cannot be sealed": (lambda: sealed(4096, 0, os.MFD_CLOEXEC), 4096, "can still change its size"),
    "too small": (lambda: sealed(4096), 4097, "has 4096 bytes, 4097 are to be shared"),
    "empty": (lambda: sealed(0), 1, "has 0 bytes"),
    "no bytes": (lambda: sealed(4096), 0, "0 are to be shared"),
    "fewer than none": (lambda: sealed(4096), -1, "-1 are to be shared"),
    "more than any number": (lambda: sealed(4096), 2**63, "the body is not|are to be shared|may share"),
    "more than it may": (lambda: sealed(1 << 40), 1 << 40, "may share"),
    "a file": (ordinary_file, 4096, "not a memfd|can still change"),
    "a pipe": (pipe_end, 4096, "not a memfd"),
    "a directory": (lambda: os.open("/", os.O_RDONLY), 4096, "not a memfd"),
    "a device": (lambda: os.open("/dev/zero", os.O_RDWR), 4096, "not a memfd"),
    "huge pages": (huge, 4096, "MFD_HUGETLB"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_could_harm_is_not_mapped(server, name):
    make, size, message = WRONG[name]
    made = make()
    with server.connect() as sock:
        status, _, body = register(sock, "mine", size, made)
        assert status in {400, 503}, body
        assert re.search(message, json.loads(body)["error"]), body
        good = sealed(4096)
        assert register(sock, "good", 4096, good)[0] == 200, "the connection goes on"
        assert infer(sock, "mine")[0] == 404
        os.close(good)
    os.close(made)


RANGES = [(-1, 32), (4097, 0), (4096, 32), (4065, 32), (2**62, 32), (2**64, 32)]


@pytest.mark.parametrize(("offset", "size"), RANGES)
def test_nothing_outside_of_it(server, fd, offset, size):
    with server.connect() as sock:
        register(sock, "mine", 4096, fd)
        assert infer(sock, "mine", size=size, offset=offset)[0] == 400
        out = {"shared_memory_region": "mine", "shared_memory_byte_size": size, "shared_memory_offset": offset}
        assert infer(sock, "mine", out=out)[0] == 400


def test_an_output_that_does_not_fit_is_not_written(server, fd):
    with server.connect() as sock:
        register(sock, "mine", 4096, fd)
        assert infer(sock, "mine", out={"shared_memory_region": "mine", "shared_memory_byte_size": 31})[0] == 400
        assert os.pread(fd, 32, 0) == ROWS.tobytes()


def test_another_connection_does_not_have_it(server, fd):
    with server.connect() as sock, server.connect() as other:
        register(sock, "mine", 4096, fd)
        assert infer(other, "mine")[0] == 404
        assert infer(sock, "mine")[0] == 200


def test_it_goes_with_the_connection(server, fd):
    before = descriptors(server)
    with server.connect() as sock:
        for n in range(5):
            register(sock, f"r{n}", 4096, fd)
        assert descriptors(server) >= before + 5
    until(lambda: descriptors(server) <= before)


def test_unregistered_and_registered_again(server, fd):
    with server.connect() as sock:
        register(sock, "mine", 4096, fd)
        assert register(sock, "mine", 4096, fd)[0] == 400
        sock.sendall(request("GET", "/v2/edge/memory"))
        assert json.loads(read_answer(sock)[2]) == [{"name": "mine", "byte_size": 4096, "writable": True}]
        for path in ("/v2/edge/memory/mine/unregister", "/v2/edge/memory/mine/unregister", "/v2/edge/memory/unregister"):
            sock.sendall(request("POST", path))
            assert read_answer(sock)[0] == 200
        assert register(sock, "other", 4096, fd)[0] == 200
        assert infer(sock, "mine")[0] == 404
        assert infer(sock, "other")[0] == 200


def test_descriptors_that_nobody_asked_for_are_closed(server, fd):
    before = descriptors(server)
    with server.connect() as sock:
        for _ in range(20):
            socket.send_fds(sock, [request("GET", "/v2/health/live")], [fd])
            assert read_answer(sock)[0] == 200
        for _ in range(5):
            socket.send_fds(sock, [request("GET", "/v2/edge/memory")], [fd])
            assert read_answer(sock)[0] == 200
        until(lambda: descriptors(server) <= before + 1)


def test_several_at_once_are_refused_and_closed(server, fd):
    before = descriptors(server)
    with server.connect() as sock:
        for count in (2, 3, 200):
            status, _, body = register(sock, "mine", 4096, *[fd] * count)
            assert status == 400
            assert "several descriptors" in json.loads(body)["error"]
        until(lambda: descriptors(server) <= before + 1)
        assert register(sock, "mine", 4096, fd)[0] == 200


def test_half_a_request_holds_one_descriptor(server, fd):
    before = descriptors(server)
    with server.connect() as sock:
        sock.sendall(b"POST /v2/edge/memory/a/regi")
        for _ in range(50):
            socket.send_fds(sock, [b"x"], [fd])
        until(lambda: descriptors(server) <= before + 2)
    until(lambda: descriptors(server) <= before)


def test_many_half_requests_hold_few_descriptors(server, fd):
    """Those that are refused are told to try again; nobody else is out of descriptors."""
    before = descriptors(server)
    with contextlib.ExitStack() as stack:
        for _ in range(200):
            sock = stack.enter_context(server.connect())
            socket.send_fds(sock, [b"POST /v2/edge/memory/a/regi"], [fd])
        until(lambda: descriptors(server) >= before + 200)
        with server.connect() as sock:
            status, _, body = register(sock, "mine", 4096, fd)
            assert (status, "try again" in json.loads(body)["error"]) == (503, True)
        assert descriptors(server) <= before + 200 + 80
    until(lambda: descriptors(server) <= before)


def test_none_came(server, fd):
    with server.connect() as sock:
        assert infer(sock, "mine")[0] == 404
        status, _, body = register(sock, "mine", 4096, fd)
        assert (status, json.loads(body)["code"]) == (400, "no_descriptor")
        assert register(sock, "mine", 4096, fd)[0] == 200, "sent once more it is looked for"
        assert register(sock, "other", 4096)[0] == 400


def test_pipelined_registrations_keep_their_order(server):
    first, second = sealed(4096), sealed(4096)
    os.pwrite(first, ROWS.tobytes(), 0)
    os.pwrite(second, (2 * ROWS).tobytes(), 0)
    with server.connect() as sock:
        for name, made in (("a", first), ("b", second)):
            data = request("POST", f"/v2/edge/memory/{name}/register", b'{"byte_size":4096}')
            socket.send_fds(sock, [data], [made])
        assert [read_one(sock), read_one(sock)] == [200, 200]
        assert infer(sock, "b")[1]["outputs"][0]["data"] == (ROWS * 6).ravel().tolist()
        assert infer(sock, "a")[1]["outputs"][0]["data"] == (ROWS * 3).ravel().tolist()
    os.close(first)
    os.close(second)


def read_one(sock):
    """One answer whose body is {}, and not a byte more."""
    data = b""
    while not data.endswith(b"\r\n\r\n{}"):
        data += sock.recv(1)
    return int(data.split()[1])


def test_a_connection_has_a_bounded_share(server):
    quarter = 1 << 28
    made = sealed(quarter)
    with server.connect() as sock:
        assert register(sock, "all", quarter, made)[0] == 200
        small = sealed(4096)
        assert register(sock, "more", 4096, small)[0] == 503
        os.close(small)
    os.close(made)


def test_regions_are_counted(server, fd):
    with server.connect() as sock:
        assert [register(sock, f"r{n}", 64, fd)[0] for n in range(65)] == [200] * 64 + [503]


@pytest.mark.parametrize("value", [2, 255])
def test_flags_are_checked_where_they_cannot_change_any_more(server, fd, value):
    os.pwrite(fd, bytes([1, 0, value, 1]), 0)
    with server.connect() as sock:
        register(sock, "mine", 4096, fd)
        status, answer = infer(sock, "mine", size=4, model="flags", datatype="BOOL", shape=(4,))
        assert status == 400
        assert "neither 0 nor 1" in answer["error"]


def test_a_client_that_changes_the_bytes_meanwhile_changes_its_own_answer_only(server, fd):
    with mmap.mmap(fd, 4096) as mapped, server.connect() as sock:
        register(sock, "mine", 4096, fd)
        for n in range(200):
            mapped[:4] = bytes([n % 2, 1, 3 if n % 3 == 0 else 0, 1])
            status, _ = infer(sock, "mine", size=4, model="flags", datatype="BOOL", shape=(4,))
            assert status in {200, 400}


def test_texts(server, fd):
    os.pwrite(fd, b"\2\0\0\0ab\1\0\0\0c", 0)
    with server.connect() as sock:
        register(sock, "mine", 4096, fd)
        status, answer = infer(sock, "mine", size=11, model="texts", datatype="BYTES", shape=(2,))
        assert (status, answer["outputs"][0]["data"]) == (200, ["ab", "c"])


def test_no_memory_over_the_loopback(tmp_path):
    onnx_models.scale(tmp_path / "scale.onnx", 3.0)
    server = Server(tmp_path, "run", tmp_path / "scale.onnx", "--socket", tmp_path / "s.sock", "--http", "127.0.0.1:0").start()
    try:
        port = int(server.output().split("http://127.0.0.1:")[1].split()[0])
        with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
            data = b'{"byte_size":1}'
            sock.sendall(b"POST /v2/edge/memory/a/register HTTP/1.1\r\nHost: localhost\r\nContent-Length: 15\r\n\r\n" + data)
            assert read_answer(sock)[0] == 501
    finally:
        assert server.stop() == 0


# -- Triton's system shared memory -----------------------------------------------------------------------------------------


@pytest.fixture
def shm():
    memory = shared_memory.SharedMemory(create=True, size=4096)
    memory.buf[:32] = ROWS.tobytes()
    yield memory
    memory.close()
    memory.unlink()


def post(server, path, value=None):
    body = b"" if value is None else json.dumps(value).encode()
    status, _, answer = server.raw(request("POST", path, body))
    return status, answer


REGION = "/v2/systemsharedmemory/region/sys"


def test_a_named_region_is_used_from_any_connection_of_its_owner(server, shm):
    assert post(server, REGION + "/register", {"key": shm.name, "byte_size": 4096})[0] == 200
    try:
        with server.connect() as sock:
            assert infer(sock, "sys")[1]["outputs"][0]["data"] == (ROWS * 3).ravel().tolist()
            out = {"shared_memory_region": "sys", "shared_memory_byte_size": 32, "shared_memory_offset": 64}
            assert infer(sock, "sys", out=out)[0] == 200
            assert np.frombuffer(shm.buf, np.float32, 8, 64).tolist() == (ROWS * 3).ravel().tolist()
            assert infer(sock, "sys", offset=4090)[0] == 400
        status, _, body = server.raw(request("GET", "/v2/systemsharedmemory/status"))
        assert (status, json.loads(body)) == (200, [{"name": "sys", "key": shm.name, "offset": 0, "byte_size": 4096}])
        assert post(server, REGION + "/register", {"key": shm.name, "byte_size": 4096})[0] == 400
    finally:
        assert post(server, REGION + "/unregister")[0] == 200
    assert post(server, REGION + "/unregister")[0] == 200
    assert server.raw(request("GET", REGION + "/status"))[0] == 404
    assert Path("/dev/shm", shm.name).exists(), "it belongs to the client"


def test_the_same_request_again_after_others_took_a_named_region_away(server, shm):
    assert post(server, REGION + "/register", {"key": shm.name, "byte_size": 4096})[0] == 200
    with server.connect() as sock:
        assert [repeat(sock, "sys")[0] for _ in range(3)] == [200] * 3
        assert post(server, REGION + "/unregister")[0] == 200
        assert repeat(sock, "sys")[0] == 404


def test_an_owner_that_shrinks_it_breaks_only_its_own_request(server, shm):
    assert post(server, REGION + "/register", {"key": "/" + shm.name, "byte_size": 4096})[0] == 200
    os.truncate(f"/dev/shm/{shm.name}", 16)
    with server.connect() as sock:
        status, answer = infer(sock, "sys")
        assert (status, "smaller" in answer["error"]) == (400, True)
        sock.sendall(request("POST", "/v2/systemsharedmemory/unregister"))
        assert read_answer(sock)[0] == 200
    os.truncate(f"/dev/shm/{shm.name}", 4096)


KEYS = ["", "/", "..", "a/b", "/../tmp/x", "a\0b", "x" * 300, "triton_python_backend_shm_region_1", "no-such-thing-here"]


@pytest.mark.parametrize("key", KEYS)
def test_keys_that_are_not_names_of_memory(server, key):
    status, body = post(server, REGION + "/register", {"key": key, "byte_size": 1})
    assert status == 400
    assert key == "" or len(key) < 4 or key.startswith("triton") or key.encode() not in body, "a key is not repeated"


@pytest.mark.parametrize(("offset", "size"), [(0, 4097), (4096, 1), (-1, 1), (0, 0), (1, 4096), (2**62, 1), (0, 2**62)])
def test_sizes_that_are_not_there(server, shm, offset, size):
    asked = {"key": shm.name, "offset": offset, "byte_size": size}
    assert post(server, REGION + "/register", asked)[0] == 400


def test_a_link_is_not_followed(server, tmp_path):
    (tmp_path / "secret").write_bytes(bytes(4096))
    link = Path("/dev/shm/edge-agent-test-link")
    link.unlink(missing_ok=True)
    link.symlink_to(tmp_path / "secret")
    try:
        assert post(server, REGION + "/register", {"key": link.name, "byte_size": 1})[0] == 400
    finally:
        link.unlink()


def test_what_belongs_to_somebody_else_cannot_be_registered(shm):
    """The server may be able to open it; the peer need not be."""
    from agent.serving.answers import Refusal
    from agent.serving.shared.systemmemory import SystemMemory

    memory = SystemMemory("owner", 1 << 20)
    with pytest.raises(Refusal, match="belong to the user"):
        memory.register(os.getuid() + 4242, "sys", shm.name, 0, 4096)
    memory.register(os.getuid(), "sys", shm.name, 0, 4096)
    assert memory.find(os.getuid(), "sys") is not None
    assert memory.find(os.getuid() + 4242, "sys") is None
    assert memory.status(os.getuid() + 4242, None) == []
    region = memory.find(os.getuid(), "sys")
    memory.unregister(os.getuid(), None)
    assert bytes(region.view("sys", 0, 32)) == ROWS.tobytes(), "a request under way goes on with it"


def test_off_unless_switched_on(scale_server, shm):
    status, body = post(scale_server, REGION + "/register", {"key": shm.name, "byte_size": 1})
    assert status == 501
    assert b"serve.shared_memory" in body
