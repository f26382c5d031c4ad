"""What refers to what: bodies, and memory that clients share, go with their request, not with the next collection."""

import gc
import json
import time
import weakref
from functools import partial

import numpy as np
import pytest

from agent.contract.manifest import Serving
from agent.serving.access import Access, Grant
from agent.serving.answers import Answer, Refusal
from agent.serving.api.oip import OIP
from agent.serving.buffers import BufferPool
from agent.serving.dataplane import Dataplane
from agent.serving.models.host import ModelHost
from agent.serving.models.version import Version
from agent.serving.routes import Kind, Match, Pace, Request, Route, Router
from agent.serving.scheduling.demand import Demand, SequenceDemand
from agent.serving.scheduling.lanes import Lane
from agent.serving.scheduling.scheduler import Scheduler
from agent.serving.scheduling.sequences import Sequences
from agent.serving.service import Service
from agent.serving.telemetry.observing import ObservedService
from agent.serving.transport.admission import Admission
from agent.serving.transport.connection import Connection
from runtimes.contract import Placement, RunFailed, TensorSpec
from tests.unit.test_connection import Pipe

GRANT = Grant(Access.CONTROL, "test")
JSON = json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [2], "parameters": {"binary_data_size": 8}}]}).encode()


class Model:
    inputs = outputs = (TensorSpec("x", "FP32", (-1,)),)
    placement = Placement("cpu", "cpu")

    def run(self, feeds, _outputs=None):
        if feeds["x"][0] < 0:
            raise RunFailed("it is negative")
        return [feeds["x"] * 2]

    def close(self):
        pass


class Body(bytearray):
    """One that can be referred to weakly."""


class Seat:
    has_thread = False

    def parked(self, job):
        pass

    def unparked(self, job):
        pass

    def deliver(self, answer):
        self.status = answer.status


class Observer:
    def see(self, seen):
        pass


@pytest.fixture
def no_collection():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def dataplane():
    host = ModelHost()
    version = Version("m", 1, "cpu", "0" * 64, "fake")
    version.ready(Model())
    host.add(version)
    host.activate("m", 1)
    return Dataplane(host, Scheduler(1))


def ask(dataplane, service, value, pace):
    """The status, and the body."""
    body = Body(JSON + np.array([value, 1], np.float32).tobytes())
    route = Route("POST", "/{model}", Access.PREDICT, partial(dataplane.infer, OIP), Kind.PREDICT, parks=True)
    request = Request(Match(route, {"model": "m"}, model="m"), memoryview(body), len(JSON), time.perf_counter())
    request.pace, request.seat = pace, Seat()
    seat = request.seat
    answer = service.answer(request, GRANT)
    if answer is not None:
        return answer.status, weakref.ref(body)
    assert dataplane.scheduler.begin()
    service.run(dataplane.scheduler.next_for_thread())
    assert dataplane.scheduler.next_for_thread() is None
    return seat.status, weakref.ref(body)


@pytest.mark.parametrize("observers", [[], [Observer()]], ids=["plain", "observed"])
@pytest.mark.parametrize("pace", [Pace.RUN, Pace.PARK], ids=["at once", "parked"])
@pytest.mark.parametrize(("value", "status"), [(1, 200), (-1, 500)])
def test_the_body_goes_with_its_request(dataplane, no_collection, observers, pace, value, status):
    service = ObservedService(dataplane, 1024, observers) if observers else Service(dataplane, 1024)
    found, body = ask(dataplane, service, value, pace)
    assert (found, body()) == (status, None)


class Tensor(np.ndarray):
    """One that can be referred to weakly."""


REFUSED = {
    "its run fails": ([-1, 1], {}, "it is negative"),
    "its input is no input": ([[1, 1]], {}, "shape"),
    "its time is over": ([1, 1], {"timeout_s": 1e-9}, "expired"),
    "its sequence is unknown": ([1, 1], {"sequence": SequenceDemand(7)}, "not under way"),
}


@pytest.mark.parametrize(("value", "changes", "words"), REFUSED.values(), ids=REFUSED)
def test_the_tensors_of_a_refused_caller_go_with_its_refusal(dataplane, no_collection, value, changes, words):
    """Of one that has arrays and wants arrays: a picture of a camera for each request that is refused."""
    if "sequence" in changes:
        dataplane.host.get("m").active.lane = Lane(Serving(), Sequences("m", 1, limit=4, idle_s=60.0))
    x = np.array(value, np.float32).view(Tensor)
    gone = weakref.ref(x)
    said = ""
    try:
        dataplane.predict("m", None, {"x": x}, Demand(**changes))
    except Refusal as refusal:
        said = str(refusal)
    del x
    assert words in said
    assert gone() is None


def test_a_closed_connection_goes(no_collection):
    router = Router([Route("POST", "/a/{name}", Access.PREDICT, lambda _: Answer())])
    raw = b"POST /a/x HTTP/1.1\r\nHost: t\r\nInference-Header-Content-Length: 2\r\nContent-Length: 6\r\n\r\n{}abcd"
    with Pipe() as pipe:
        connection = Connection(pipe.connection.sock.dup(), GRANT, router, BufferPool(1024), 1024)
        connection.seat = [connection]
        for _ in range(2):
            pipe.peer.sendall(raw)
            connection.receive()
            request = connection.next_request()
            request.seat = connection.seat
            connection.finished()
        gone = weakref.ref(connection)
        connection.close()
        del request, connection
        assert gone() is None


def test_closing_twice_leaves_the_next_of_its_number_alone():
    with Pipe() as pipe:
        admission = Admission([], None, None, None, 8)
        first, second = pipe.connection, object()
        admission.open[first.fd] = second
        admission.close(first)
        assert admission.open[first.fd] is second
