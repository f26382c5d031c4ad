"""The loop's own view of how it is doing."""

import contextlib
import select
import socket
import threading
import time

import pytest

from agent.contract.manifest import Serving
from agent.serving.access import Access, Grant
from agent.serving.answers import Answer
from agent.serving.routes import Kind, Pace, Route, Router
from agent.serving.scheduling.lanes import Job, Lane
from agent.serving.scheduling.scheduler import Scheduler
from agent.serving.scheduling.threads import busy_threads
from agent.serving.transport import leader, spinning, workers
from agent.serving.transport.loop import Loop
from tests.waiting import wait_until

pytestmark = pytest.mark.alone  # how often a thread polls, and who is kept for how long
GET = b"GET /long HTTP/1.1\r\nHost: t\r\n\r\n"
QUICK = b"GET /quick HTTP/1.1\r\nHost: t\r\n\r\n"


class Service:
    """Answers when it is let."""

    def __init__(self):
        self.going_on = threading.Event()

    def kind(self, _request, _grant):
        return Kind.PREDICT

    def parks(self, _request):
        return False

    def answer(self, _request, _grant):
        self.going_on.wait(20)
        return Answer()


class Begun:
    """A loop that listens at an address of its own."""

    def __init__(self, listener, path, service, *, threads=3, grant_of=None, epoll=None, scheduler=None):
        self.listener = listener
        listener.bind(path)
        listener.listen(8)
        self.path = path
        grant = Grant(Access.CONTROL, "test")
        self.service, self.epoll = service, epoll(select.epoll()) if epoll is not None else None
        self.scheduler = scheduler or Scheduler(busy_threads(threads))
        router = Router([Route("GET", path, Access.NONE, lambda _: Answer()) for path in ("/long", "/quick")])
        self.loop = Loop(
            [listener],
            service,
            router,
            grant_of or (lambda _: grant),
            threads=threads,
            max_body_bytes=1024,
            max_connections=8,
            scheduler=self.scheduler,
            epoll=self.epoll,
        )
        self.loop.start()

    def connect(self):
        client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        client.settimeout(10)
        client.connect(self.path)
        return client


@pytest.fixture
def begin(tmp_path):
    """Starts a loop that ends with the test, if it did not before."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        begun = []

        def begin(service, **how):
            begun.append(Begun(listener, str(tmp_path / "s"), service, **how))
            return begun[0]

        yield begin
        for one in begun:
            if not one.loop.stopping.over:
                assert one.loop.stop(10)


def ask(client):
    client.sendall(GET)
    assert client.recv(1000).startswith(b"HTTP/1.1 200")


@pytest.mark.timeout(30)
def test_it_is_stuck_while_somebody_waits_and_no_thread_comes_free(begin):
    service = Service()
    begun = begin(service)
    with contextlib.ExitStack() as clients:
        clients.callback(service.going_on.set)
        answered = [clients.enter_context(begun.connect()) for _ in range(2)]
        for client in answered:
            client.sendall(GET)
        assert not begun.loop.stuck(0.0), "nobody waits: both are being answered"
        waiting = clients.enter_context(begun.connect())
        waiting.sendall(GET)
        deadline = time.monotonic() + 10
        while not begun.loop.stuck(0.0):
            assert time.monotonic() < deadline
        assert not begun.loop.stuck(60.0)
        service.going_on.set()
        for client in (*answered, waiting):
            assert client.recv(100).startswith(b"HTTP/1.1 200")
        assert not begun.loop.stuck(0.0)


class Hesitant:
    """An epoll whose `register` returns late: the thread that polls hears of the connection before the one that put it there goes on."""

    def __init__(self, epoll):
        self._epoll = epoll
        self.polls = 0
        self.many = threading.Event()

    def poll(self, *arguments):
        self.polls += 1
        if self.polls > 100:
            self.many.set()
        return self._epoll.poll(*arguments)

    def register(self, fd, events):
        self._epoll.register(fd, events)
        if threading.current_thread().name.startswith("serve"):
            self.many.wait(0.2)

    def __getattr__(self, name):
        return getattr(self._epoll, name)


@pytest.mark.timeout(30)
def test_the_thread_that_polls_waits_for_a_connection_that_is_just_put_back(begin):
    service = Service()
    service.going_on.set()
    begun = begin(service, epoll=Hesitant)
    with begun.connect() as client:
        for _ in range(2):
            ask(client)
    assert begun.loop.stop(10)
    assert not begun.epoll.many.is_set()


class Prompt:
    """Answers at once, in the thread that polls."""

    def kind(self, _request, _grant):
        return Kind.QUICK

    def answer(self, _request, _grant):
        return Answer()


def ask_anew(path, begun, end):
    """A client that makes a connection for every request, until nobody listens any more."""
    while not end.is_set():
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.settimeout(10)
            try:
                client.connect(path)
                client.sendall(GET)
                answer = client.recv(100)
            except OSError:
                return
            begun.set()
            assert not answer or answer.startswith(b"HTTP/1.1 200")


def trickle(path, begun, end):
    """A client that never comes to the end of its request."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.connect(path)
        client.sendall(GET[:-2] + b"x: ")
        while not end.wait(0.05):
            try:
                client.sendall(b"a")
            except OSError:
                return
            begun.set()


def flood(path, begun, end):
    """A client that goes on sending and reads nothing."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(10)
        client.connect(path)
        while not end.is_set():
            try:
                client.sendall(GET)
            except OSError:
                return
            begun.set()


@pytest.mark.timeout(30)
@pytest.mark.parametrize("behave", [ask_anew, flood, trickle])
def test_no_client_can_keep_it_from_ending(begin, behave, monkeypatch):
    monkeypatch.setattr(leader, "STOP_LONGEST_S", 0.5)
    begun, acted, end = begin(Prompt()), threading.Event(), threading.Event()
    clients = [threading.Thread(target=behave, args=(begun.path, acted, end)) for _ in range(3)]
    try:
        for client in clients:
            client.start()
        assert acted.wait(10)
        assert begun.loop.stop(12)
        begun.listener.close()
    finally:
        end.set()
        for client in clients:
            client.join(10)


@pytest.mark.timeout(30)
def test_who_has_just_connected_is_answered_before_it_ends(begin):
    came_in = threading.Event()

    def grant_of(_sock):
        came_in.set()
        return Grant(Access.CONTROL, "test")

    begun = begin(Prompt(), grant_of=grant_of)
    with begun.connect() as client:
        assert came_in.wait(10)
        ending = threading.Thread(target=begun.loop.stop, args=(10,))
        ending.start()
        assert not begun.loop.stopping.drained.wait(0.2)
        client.sendall(GET)
        answer = client.recv(1000)
    ending.join(15)
    assert answer.startswith(b"HTTP/1.1 200")
    assert b"connection: close" in answer.lower()


LARGE = b"a" * (8 << 20)


class Generous(Prompt):
    def answer(self, _request, _grant):
        return Answer((LARGE,))


@pytest.mark.timeout(30)
def test_who_reads_a_long_answer_slowly_gets_all_of_it(begin, monkeypatch):
    monkeypatch.setattr(leader, "STOP_LONGEST_S", 0.2)
    begun = begin(Generous())
    with begun.connect() as client:
        client.sendall(GET)
        got = len(client.recv(1000))
        ending = threading.Thread(target=begun.loop.stop, args=(20,))
        ending.start()
        while piece := client.recv(256 << 10):
            got += len(piece)
            begun.loop.stopping.drained.wait(0.03)
    ending.join(25)
    assert got > len(LARGE)


class Counting:
    """An epoll that counts how often it is polled, and how often a connection is put there to be read from."""

    def __init__(self, epoll):
        self._epoll = epoll
        self.registered = self.polled = 0

    def register(self, fd, events):
        self.registered += bool(events)
        self._epoll.register(fd, events)

    def poll(self, timeout_s):
        self.polled += 1
        return self._epoll.poll(timeout_s)

    def __getattr__(self, name):
        return getattr(self._epoll, name)


@pytest.fixture
def prompt(begin, monkeypatch):
    """A loop with one thread for long work, to which every client is prompt."""
    monkeypatch.setattr(workers, "PROMPT_S", 1000.0)
    service = Service()
    service.going_on.set()
    return begin(service, threads=2, epoll=Counting)


@pytest.mark.timeout(60)
def test_a_thread_stays_with_a_client_that_asks_again_at_once(prompt, monkeypatch):
    monkeypatch.setattr(workers, "STAY_MS", 10_000)
    with prompt.connect() as client:
        ask(client)
        ask(client)
        before = prompt.epoll.registered
        for _ in range(20):
            ask(client)
        assert prompt.epoll.registered == before


@pytest.mark.timeout(60)
def test_it_waits_for_its_client_no_longer_than_a_moment(prompt):
    with prompt.connect() as first, prompt.connect() as second:
        for _ in range(20):
            ask(first)
            ask(first)
            ask(second)


@pytest.mark.timeout(60)
def test_it_does_not_wait_for_its_client_while_others_do(prompt, monkeypatch):
    with prompt.connect() as first, prompt.connect() as second:
        ask(first)
        monkeypatch.setattr(workers, "STAY_MS", 60_000)
        prompt.service.going_on.clear()
        first.sendall(GET)
        wait_until(lambda: not prompt.scheduler.free)
        second.sendall(GET)
        wait_until(lambda: prompt.scheduler.crowded)
        prompt.service.going_on.set()
        assert second.recv(1000).startswith(b"HTTP/1.1 200")
        second.close()


@pytest.mark.timeout(60)
def test_a_client_that_goes_while_a_thread_stays_with_it_is_let_go(prompt, monkeypatch):
    monkeypatch.setattr(workers, "STAY_MS", 60_000)
    with prompt.connect() as client:
        ask(client)
        ask(client)
    with prompt.connect() as other:
        ask(other)
    wait_until(lambda: not prompt.loop.admission.open)


class Queued:
    """Predictions of a model whose runs end when they are let, one by one; those for which no thread is free wait."""

    def __init__(self, cost_s, together=1):
        self.lane = Lane(Serving(max_batch_size=together))
        self.lane.cost_s = cost_s
        self.begun = 0  # runs
        self.sizes = []  # of those that were waited for
        self.let = threading.Semaphore(0)
        self.scheduler = Scheduler(1)

    def kind(self, request, _grant):
        return Kind.QUICK if request.match.route.pattern == "/quick" else Kind.PREDICT

    def parks(self, request):
        return request.match.route.pattern == "/long"

    def keeps_order(self, _request):
        return False

    def expire(self): ...

    def drop(self, job): ...

    def answer(self, request, grant):
        if self.kind(request, grant) is Kind.QUICK:
            return Answer()
        job, pace = Job(self.lane, request.seat, None, request.arrived_s), request.pace
        job.key = self
        work = self.scheduler.admit(job, may_run=pace is Pace.RUN, polls=pace is Pace.PARK, goes_on=pace is Pace.READ)
        if not work:
            return None
        self.begun += 1
        self.let.acquire()
        self.scheduler.finished(work)
        return Answer()

    def run(self, work):
        self.begun += 1
        self.let.acquire()
        self.sizes.append(len(work))
        self.scheduler.finished(work, goes_on=True)
        for job in work:
            job.caller.deliver(Answer())

    def one(self, asking):
        """Lets the oldest run end, whose client asks again at once."""
        self.let.release()
        assert asking[0].recv(1000).startswith(b"HTTP/1.1 200")
        asking[0].sendall(GET)
        asking.append(asking.pop(0))

    def wait_for(self, number):
        """Until so many requests came to the scheduler."""
        wait_until(lambda: self.scheduler.admitted >= number)

    def wait_for_run(self, number):
        wait_until(lambda: self.begun >= number)


@pytest.fixture
def crowd(begin, monkeypatch):
    """Makes clients of a loop with one thread for long work. All have asked, and the thread takes one after the other."""
    monkeypatch.setattr(workers, "KEEP_S", 1e12)
    monkeypatch.setattr(leader, "SWEEP_S", 1000.0)
    with contextlib.ExitStack() as clients:

        def make(cost_s, *, count=3, together=1):
            service = Queued(cost_s, together)
            clients.callback(service.let.release, 1000)
            begun = begin(service, threads=2, epoll=Counting, scheduler=service.scheduler)
            asking = []
            for number in range(1, count + 1):
                asking.append(clients.enter_context(begun.connect()))
                asking[-1].sendall(GET)
                service.wait_for(number)
            service.one(asking)  # which had not waited
            service.wait_for(count + 1)
            return begun, service, asking

        yield make


@pytest.mark.timeout(60)
def test_while_all_threads_are_at_work_clients_that_ask_again_wake_nobody(crowd):
    begun, service, asking = crowd(1e-3)
    registered, polled = begun.epoll.registered, begun.epoll.polled
    for _ in range(20):
        service.one(asking)
    assert begun.epoll.registered == registered
    assert begun.epoll.polled == polled


@pytest.mark.timeout(60)
@pytest.mark.parametrize("is_short", [True, False])
def test_a_client_is_kept_waiting_for_a_short_run_and_not_for_a_long_one(crowd, is_short):
    _, service, asking = crowd(1e-3 if is_short else float("inf"))
    service.let.release()
    assert asking[0].recv(1000).startswith(b"HTTP/1.1 200")
    asking[0].sendall(QUICK)
    if is_short:
        asking[0].settimeout(0.2)
        with pytest.raises(TimeoutError):
            asking[0].recv(1000)
        asking[0].settimeout(10)
        service.let.release()
    assert asking[0].recv(1000).startswith(b"HTTP/1.1 200")


@pytest.mark.timeout(60)
def test_a_client_is_not_kept_by_a_run_that_hangs(crowd, monkeypatch):
    begun, service, asking = crowd(1e-3)
    service.let.release()
    assert asking[0].recv(1000).startswith(b"HTTP/1.1 200")
    asking[0].sendall(QUICK)
    monkeypatch.setattr(leader, "SWEEP_S", 0.1)
    begun.loop.wake_up()
    assert asking[0].recv(1000).startswith(b"HTTP/1.1 200")
    service.let.release()
    assert asking[1].recv(1000).startswith(b"HTTP/1.1 200")


@pytest.mark.timeout(60)
def test_clients_that_were_answered_together_are_answered_together_again(crowd):
    _, service, asking = crowd(1e-3, count=4, together=2)
    for again in (True, False, False):
        service.let.release()
        for _ in range(2):
            client = asking.pop(0)
            assert client.recv(1000).startswith(b"HTTP/1.1 200")
            if again:
                client.sendall(GET)
                asking.append(client)
    assert service.sizes == [2, 2, 2]


@pytest.mark.timeout(60)
def test_a_client_that_goes_while_it_is_kept_is_let_go(crowd):
    begun, service, asking = crowd(1e-3)
    service.let.release()
    assert asking[0].recv(1000).startswith(b"HTTP/1.1 200")
    asking[0].close()
    service.let.release()
    wait_until(lambda: len(begun.loop.admission.open) <= 2)


@pytest.mark.timeout(60)
def test_a_client_that_goes_during_a_wait_that_was_to_be_short_is_let_go_after_a_while(crowd, monkeypatch):
    begun, service, asking = crowd(1e-3)
    service.one(asking)
    service.one(asking)
    service.wait_for(5)  # the one before the last waits again, and the run that it waits for hangs
    gone = asking.pop(-2)
    registered = begun.epoll.registered
    gone.close()
    assert begun.epoll.registered == registered
    monkeypatch.setattr(leader, "SWEEP_S", 0.1)
    begun.loop.wake_up()
    wait_until(lambda: len(begun.loop.admission.open) <= 2)
    service.let.release(1000)
    for client in asking:
        assert client.recv(1000).startswith(b"HTTP/1.1 200")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("closed", [False, True])
def test_a_client_that_goes_during_a_wait_that_may_be_long_is_let_go_at_once(crowd, closed):
    begun, service, asking = crowd(1e-3 if closed else 1.0)
    service.one(asking)
    service.wait_for_run(3)  # a closed lane lets none begin
    service.lane.closed = closed
    service.one(asking)
    service.wait_for(5)
    asking.pop(-2).close()
    wait_until(lambda: len(begun.loop.admission.open) <= 2)
    service.lane.closed = False


@pytest.mark.timeout(60)
def test_it_ends_while_clients_are_kept(crowd):
    begun, service, asking = crowd(1e-3)
    service.one(asking)
    ending = threading.Thread(target=begun.loop.stop, args=(10,))
    ending.start()
    service.let.release(1000)
    ending.join(15)
    assert begun.loop.stopping.drained.is_set()
    for client in asking:
        assert client.recv(1000).startswith(b"HTTP/1.1 200")


@pytest.mark.timeout(30)
def test_it_stays_awake_for_a_client_that_asks_again_at_once_unless_another_thread_is_at_work(begin, monkeypatch):
    monkeypatch.setattr(spinning, "SPIN_S", 5.0)
    monkeypatch.setattr(spinning, "LOST_S", 5.0)
    service = Queued(1.0)
    begun = begin(service, epoll=Counting, scheduler=service.scheduler)

    def polls(client):
        """How often it polls while this client makes it wait, after it has asked again at once."""
        for _ in range(10):
            client.sendall(QUICK)
            assert client.recv(1000).startswith(b"HTTP/1.1 200")
        before = begun.epoll.polled
        threading.Event().wait(0.05)  # how often it polls in this time is what is asked
        return begun.epoll.polled - before

    with contextlib.ExitStack() as clients:
        clients.callback(service.let.release, 1000)
        prompt, long = clients.enter_context(begun.connect()), clients.enter_context(begun.connect())
        assert polls(prompt) > 100
        long.sendall(GET)
        service.wait_for(1)
        assert polls(prompt) <= 1
        service.let.release()
        assert long.recv(1000).startswith(b"HTTP/1.1 200")
