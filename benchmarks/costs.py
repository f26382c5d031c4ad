"""What each step of a tiny prediction takes inside the server, in nanoseconds: the whole of it, and what a product needs besides.

Everything runs in this process and one thread, over a pair of sockets, as the thread that polls would do it. Each figure is the best of
many rounds, so that other work on the machine hardly shows; compare within one run only.
"""

import os
import select
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["ORT_DISABLE_TELEMETRY"] = os.environ["ORT_TELEMETRY_DISABLED"] = "1"

from agent.config import ServeSettings
from agent.serving import app
from agent.serving.access import Access, Grant
from agent.serving.api.oip import OIP
from agent.serving.api.oip_request import read_request
from agent.serving.api.oip_response import write_response
from agent.serving.models import loading
from agent.serving.models.loading import Source
from agent.serving.routes import Request
from agent.serving.shared.memory import ClientMemory, MemoryBudget
from agent.serving.transport import http
from agent.serving.transport.loop import Loop
from benchmarks import models

ROUNDS, TIMES = 40, 2000


def best_ns(step: Callable[[], object]) -> float:
    found = []
    for _ in range(ROUNDS):
        began = time.perf_counter_ns()
        for _ in range(TIMES):
            step()
        found.append((time.perf_counter_ns() - began) / TIMES)
    return min(found)


class Bench:
    """One connection to a server without threads, and a request under way on it."""

    def __init__(self, folder: Path) -> None:
        models.tiny(folder / "tiny.onnx")
        self.parts = app.assemble(None, ServeSettings())
        self.parts.host.add(loading.load(Source("tiny", 1, folder / "tiny.onnx", ""), threads=1))
        self.parts.host.activate("tiny", 1)
        self.grant = Grant(Access.CONTROL, "the benchmark", uid=os.geteuid())
        memory = ClientMemory(MemoryBudget(1 << 20), self.parts.system, os.geteuid())
        self.loop = Loop(
            [], self.parts.service, self.parts.router, lambda _: self.grant, threads=1, max_body_bytes=1 << 20, max_connections=8,
            scheduler=self.parts.dataplane.scheduler, memory_of=lambda _: memory,
        )  # fmt: skip
        self.client, sock = socket.socketpair()
        self.loop.admission.admit(sock)
        (self.connection,) = self.loop.admission.open.values()
        self.request = models.request("tiny", models.tiny_input())
        version = self.parts.host.models["tiny"].active
        assert version is not None
        self.version = version
        for _ in range(100):
            self.predict()

    def predict(self) -> None:
        self.client.send(self.request)
        self.loop.leader.attend(self.connection, select.EPOLLIN)
        self.client.recv(4096)

    def arrive(self) -> Request:
        self.client.send(self.request)
        self.connection.receive()
        request = self.connection.next_request()
        assert request is not None
        return request

    def costs(self) -> dict[str, float]:
        whole = best_ns(self.predict)
        sock = self.connection.sock
        reply, room = bytes(300), memoryview(bytearray(1 << 14))

        def echo() -> None:
            self.client.send(self.request)
            sock.recv_into(room)
            sock.send(reply)
            self.client.recv(4096)

        bare = best_ns(echo)
        request = self.arrive()
        version, stats, body = self.version, self.version.stats, request.body
        plan, feeds = request.known.plan, request.known.feeds
        assert version.model is not None
        arrays = version.model.run(feeds)
        answer = write_response(plan, arrays, "tiny", "1")
        service, host, head = self.parts.service, self.parts.host, self.connection.head
        size = request.header_length
        model = version.model
        return {
            "the whole, with the client's two system calls": whole,
            "four system calls with these bytes": bare,
            "the engine, called by its runtime": best_ns(lambda: model.run(feeds)),
            "which thread: access, and what the model costs": best_ns(lambda: service.kind(request, self.grant)),
            "the version is kept open and let go": best_ns(lambda: (host.enter("tiny", None), version.leave())),
            "times of the phases, in sums and histograms": best_ns(lambda: stats.succeeded(0.0, 1e-6, 5e-6, 1e-6, 1e-5)),
            "the moving mean of what a run takes": best_ns(lambda: version.measured(4e-6)),
            "one look at the clock, of which there are four": best_ns(time.perf_counter),
            "the answer, from its template": best_ns(lambda: write_response(plan, arrays, "tiny", "1")),
            "its head and its bytes in one piece": best_ns(lambda: b"".join(http.encode(answer, head, keep_alive=True)[0])),
            "not repeated: the JSON looked up among the plans": best_ns(lambda: OIP.read(version, request)),
            "not repeated: arrays over the body": best_ns(lambda: OIP.feeds(version, plan, request)),
            "never seen: the JSON read and checked": best_ns(
                lambda: read_request(body, size, "tiny", version.inputs, version.outputs, version.interfaces)
            ),
        }


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="edge-costs-") as folder:
        for step, ns in Bench(Path(folder)).costs().items():
            print(f"{ns:8.0f} ns  {step}")


if __name__ == "__main__":
    main()
