"""The SDK against real servers: both clients, shared memory, restarts, deadlines, cancellation, and the stock clients' adapters."""

import asyncio
import gc
import json
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from agent.client import AsyncClient, Client, InputRejected, TimedOut, Unavailable, quantization
from agent.client.triton import tritonclient_aio, tritonclient_http
from agent.host import unix
from tests.serving import onnx_models
from tests.serving.server import DEADLINE_S

ROWS = np.arange(400_000, dtype=np.float32).reshape(-1, 4)  # 1.6 MB
SMALL = np.ones((1, 4), np.float32)


def regions(client):
    return client.request("GET", "/v2/edge/memory")[2]


def until(condition):
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline


def descriptors(pid="self"):
    return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())


def test_large_tensors_go_through_memory(scale_server):
    with scale_server.client() as client:
        for _ in range(3):
            assert np.array_equal(client.infer("scale", ROWS)["y"], ROWS * 3)
        (region,) = json.loads(regions(client))
        assert region["byte_size"] >= ROWS.nbytes
        assert np.array_equal(client.infer("scale", {"x": ROWS[::2]})["y"], ROWS[::2] * 3), "not contiguous"
        assert client.infer("scale", SMALL)["y"][0, 0] == 3


def test_or_through_the_socket(scale_server):
    with scale_server.client(share_from_bytes=None) as client:
        assert np.array_equal(client.infer("scale", ROWS)["y"], ROWS * 3)
        assert regions(client) == b"[]"


def test_a_larger_tensor_gets_larger_memory_and_the_old_one_goes(scale_server):
    with scale_server.client() as client:
        for rows in (40_000, 80_000, 20_000, 160_000):
            given = np.full((rows, 4), 2, np.float32)
            assert np.array_equal(client.infer("scale", given)["y"], given * 3)
        gc.collect()
        client.infer("scale", client_array(client, (1, 4)))
        sizes = sorted(region["byte_size"] for region in json.loads(regions(client)))
        assert sizes == [4096, 160_000 * 16]


def client_array(client, shape):
    array = client.array(shape)
    array[...] = 1
    return array


def test_an_array_of_the_client_is_not_copied(scale_server):
    with scale_server.client() as client:
        image, out = client.array((100, 4)), client.array((100, 4))
        for value in (1.0, 2.0):
            image[...] = value
            found = client.infer("scale", image, into={"y": out})["y"]
            assert found is out
            assert (out == value * 3).all()
        assert client.infer("scale", image[50:60])["y"].shape == (10, 4), "also a part of it"
        assert len(json.loads(regions(client))) == 2


def test_into_an_ordinary_array(scale_server):
    with scale_server.client() as client:
        out = np.zeros((1, 4), np.float32)
        assert client.infer("scale", SMALL, into={"y": out})["y"] is out
        assert out[0, 0] == 3
        for wrong in (np.zeros((2, 4), np.float32), np.zeros((1, 4), np.float64), client.array((1, 5))):
            with pytest.raises(InputRejected):
                client.infer("scale", SMALL, into={"y": wrong})


def test_an_array_is_shared_with_every_connection_that_needs_it(scale_server):
    with scale_server.client() as client:
        shared = client_array(client, (50_000, 4))
        found = []

        def many():
            found.extend((client.infer("scale", shared)["y"] == 3).all() for _ in range(10))

        threads = [threading.Thread(target=many) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert found == [True] * 40


def test_arrays_that_are_forgotten_leave_nothing(scale_server):
    with scale_server.client() as client:
        client.infer("scale", SMALL)
        before = descriptors(), descriptors(scale_server.process.pid)
        for _ in range(100):
            client.infer("scale", client_array(client, (10, 4)))
        gc.collect()
        client.infer("scale", client_array(client, (10, 4)))
        gc.collect()
        assert descriptors() <= before[0] + 2
        until(lambda: descriptors(scale_server.process.pid) <= before[1] + 2)


def test_a_server_that_shares_no_memory_is_asked_through_the_socket(device):
    server = device.server(client_memory_bytes=0).start()
    with server.client() as client:
        for _ in range(3):
            assert np.array_equal(client.infer("scale", ROWS)["y"], ROWS)
        assert np.array_equal(client.infer("scale", client_array(client, (8, 4)))["y"], np.ones((8, 4)))


def test_a_restart_is_not_noticed(serve_files, tmp_path):
    """Memory is shared with the next process again."""
    server = serve_files(onnx_models.scale(tmp_path / "scale.onnx", 3.0))
    with server.client() as client:
        image, out = client_array(client, (50_000, 4)), client.array((50_000, 4))
        for _ in range(3):
            assert (client.infer("scale", image, into={"y": out})["y"] == 3).all()
            assert np.array_equal(client.infer("scale", ROWS)["y"], ROWS * 3)
            out[...] = 0
            server.kill()
            server.start()
        assert len(json.loads(regions(client))) == 0


@pytest.mark.alone  # it measures
def test_a_deadline_reaches_the_server(serve_files, tmp_path):
    server = serve_files(onnx_models.slow(tmp_path / "slow.onnx"))
    with server.client() as client:
        started = time.monotonic()
        with pytest.raises(TimedOut):
            client.infer("slow", np.zeros(1, np.float32), timeout_s=0.02)
        assert time.monotonic() - started < 5
        status, _, body = client.request(
            "POST",
            "/v2/models/slow/infer",
            {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [0]}], "parameters": {"timeout": 1}},
        )
        assert status == 503, body


@pytest.mark.parametrize("axis", [None, 1])
def test_real_values_and_back(axis):
    scale, zero = (0.5, 3) if axis is None else ([0.5, 0.25], [3, -1])
    quantized = {"scale": scale, "zero_point": zero, **({} if axis is None else {"axis": axis})}
    metadata = {"datatype": "INT8", "parameters": {"quantization": quantized}}
    values = np.array([[1.0, -2.0], [0.25, 3.0]], np.float32)
    integers = quantization.quantize(values, metadata)
    assert integers.dtype == np.int8
    assert np.abs(quantization.dequantize(integers, metadata) - values).max() <= 0.25
    extremes = quantization.quantize(np.array([[1e9, -1e9], [np.inf, np.nan]], np.float32), metadata)
    assert extremes[0].tolist() == [127, -128]
    assert quantization.quantize(integers, metadata) is integers
    assert quantization.dequantize(values, {"datatype": "FP32", "parameters": metadata["parameters"]}) is values


def test_real_values_follow_the_release(device, tmp_path):
    """Not quantized here, so that the path is taken with the model that is at hand."""
    server = device.server().start()
    with server.client() as client:
        assert client.infer_real("scale", SMALL)["y"][0, 0] == 1
        client.request("POST", "/control/v1/models/scale/load", {"version": 2, "variant": "cpu"})
        client.request("POST", "/control/v1/models/scale/activate", {"version": 2})
        assert client.infer_real("scale", {"x": SMALL})["y"][0, 0] == 2


def test_importing_it_brings_no_event_loop():
    script = "import sys, agent.client; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout.split()
    assert not {"asyncio", "tritonclient", "gevent", "aiohttp", "onnxruntime"} & set(loaded)


# -- asyncio ---------------------------------------------------------------------------------------------------------------


def test_many_tasks_share_few_connections(scale_server):
    async def main():
        async with AsyncClient(scale_server.socket, max_connections=4) as client:
            given = [np.full((n + 1, 4), n, np.float32) for n in range(40)]
            found = await asyncio.gather(*(client.infer("scale", value) for value in given))
            assert all((one["y"] == value * 3).all() for one, value in zip(found, given, strict=True))
            assert client.idle_connections == 4
            assert np.array_equal((await client.infer("scale", ROWS))["y"], ROWS * 3)
            out = client.array((1, 4))
            assert (await client.infer("scale", SMALL, into={"y": out}))["y"] is out
            assert await client.ready("scale")
            assert (await client.metadata("scale"))["name"] == "scale"
            assert (await client.infer_real("scale", SMALL))["y"][0, 0] == 3
            assert [model["name"] for model in await client.models()] == ["pair", "scale"]
            with pytest.raises(InputRejected):
                await client.infer("scale", np.ones((1, 3), np.float32))

    asyncio.run(main())


@pytest.mark.alone  # the run must not end before the task is cancelled
def test_a_cancelled_task_closes_its_connection(serve_files, tmp_path):
    server = serve_files(onnx_models.slow(tmp_path / "slow.onnx", rounds=3))

    async def main():
        async with AsyncClient(server.socket, timeout_s=30, max_connections=1) as client:  # the next request waits for its turn
            await client.ready()
            before = descriptors()
            task = asyncio.create_task(client.infer("slow", np.zeros(1, np.float32)))
            await asyncio.wait({task}, timeout=0.05)  # it takes hundreds of milliseconds
            assert not task.done()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert descriptors() < before, "the connection that was idle is closed too: it was the one"
            with pytest.raises(TimedOut):
                await client.infer("slow", np.zeros(1, np.float32), timeout_s=0.02)
            assert await client.ready()

    asyncio.run(main())


def test_no_server_is_said(tmp_path):
    async def main():
        async with AsyncClient(tmp_path / "none.sock") as client:
            assert not await client.ready()
            with pytest.raises(Unavailable, match="no server answers"):
                await client.metadata("m")

    asyncio.run(main())


def test_a_restart_under_tasks(serve_files, tmp_path):
    server = serve_files(onnx_models.scale(tmp_path / "scale.onnx", 3.0))

    async def main():
        async with AsyncClient(server.socket) as client:
            assert np.array_equal((await client.infer("scale", ROWS))["y"], ROWS * 3)
            server.kill()
            server.start()
            assert np.array_equal((await client.infer("scale", ROWS))["y"], ROWS * 3)

    asyncio.run(main())


# -- the stock clients -----------------------------------------------------------------------------------------------------


def test_the_stock_client_over_the_socket(scale_server):
    import tritonclient.http as triton

    with tritonclient_http(scale_server.socket, concurrency=2) as client:
        assert client.is_model_ready("scale")
        given = triton.InferInput("x", [1, 4], "FP32")
        given.set_data_from_numpy(SMALL)
        assert client.infer("scale", [given]).as_numpy("y")[0, 0] == 3
        asked = [client.async_infer("scale", [given]) for _ in range(4)]
        assert [one.get_result().as_numpy("y")[0, 0] for one in asked] == [3] * 4
        packed = client.infer("scale", [given], request_compression_algorithm="gzip", response_compression_algorithm="deflate")
        assert packed.as_numpy("y")[0, 0] == 3


def test_the_stock_asyncio_client_over_the_socket(scale_server):
    import tritonclient.http.aio as triton

    async def main():
        client = tritonclient_aio(scale_server.socket)
        given = triton.InferInput("x", [1, 4], "FP32")
        given.set_data_from_numpy(SMALL)
        assert (await client.infer("scale", [given])).as_numpy("y")[0, 0] == 3
        await client.close()

    asyncio.run(main())


# -- many and slow ---------------------------------------------------------------------------------------------------------


def test_a_thousand_connections(device):
    """More than may be open: idle ones make room, those with half a request keep theirs, and whoever asks is answered."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(4096, hard)), hard))
    server = device.server(max_connections=900).start()
    socks = []
    try:
        for n in range(1000):
            socks.append(unix.connect(str(server.socket), 10.0))
            if n % 3 == 0:
                socks[-1].sendall(b"POST /v2/models/scale/infer HTTP/1.1\r\nContent-Le")
        with server.client(timeout_s=10) as client:
            for _ in range(50):
                assert client.infer("scale", SMALL)["y"][0, 0] == 1
    finally:
        for sock in socks:
            sock.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    with Client(server.socket) as client:
        assert client.infer("scale", ROWS)["y"].shape == ROWS.shape


# -- sequences -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def totals(device, tmp_path):
    device.release("total", 1, onnx_models.total(tmp_path / "total.onnx"), state={"before": "sum"})
    device.select("total", 1)
    return device.server().start()


def one(value):
    return {"x": np.full((1, 1), value, np.float32)}


def test_a_sequence_keeps_its_state_and_begins_and_ends_by_itself(totals):
    with totals.client() as client:
        with client.sequence("total") as first, client.sequence("total") as second:
            assert [first.infer(one(n))["sum"].item() for n in (5, 2)] == [5, 7]
            assert second.infer(one(1))["sum"].item() == 1
            assert first.infer(one(1), last=True)["sum"].item() == 8
            assert first.infer(one(3))["sum"].item() == 3, "after the last one it begins anew"
        tensor = {"name": "x", "datatype": "FP32", "shape": [1, 1], "data": [1.0]}
        body = json.dumps({"parameters": {"sequence_id": first.id}, "inputs": [tensor]}).encode()
        head = b"POST /v2/models/total/infer HTTP/1.1\r\nhost: t\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
        status, _, answer = totals.raw(head, body)
        assert status == 400
        assert b"sequence_start" in answer
        with client.sequence("total") as third:
            assert [answer["sum"].item() for answer in third.steps(one(n) for n in (1, 2, 3))] == [1, 3, 6]
            assert not third.is_open


def test_a_sequence_for_tasks(totals):
    async def main():
        async with AsyncClient(totals.socket) as client, client.sequence("total") as total:
            assert [(await total.infer(one(n)))["sum"].item() for n in (5, 2)] == [5, 7]

    asyncio.run(main())
