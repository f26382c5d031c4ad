"""What goes wrong around a server of several processes in `test_storm`, and who looks on: processes and nodes are killed and started again as systemd would,
PostgreSQL crashes once, every signed document is written down, and everybody who answers is asked again and again.
"""

from __future__ import annotations

import base64
import collections
import contextlib
import json
import random
import threading
import time

import requests

from fleet_server.config import Folder, load
from fleet_server.storage.database import Database
from tests.fleet.reporters import stored

RESTARTS_AFTER_S = 1.0
SETTLES_WITHIN_S = 30.0
PAUSES_S = (1.0, 4.0)
TWO_AT_ONCE = 0.3

KEEPS = (
    "CREATE TABLE written (at float, seq serial, name text, data bytea, number int)",
    """CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    INSERT INTO written (at, name, data, number)
    SELECT extract(epoch FROM clock_timestamp()), NEW.name, NEW.data, (SELECT max(leaders.number) FROM leaders);
    RETURN NEW; END $$""",
    "CREATE TRIGGER keeps AFTER INSERT OR UPDATE ON documents FOR EACH ROW EXECUTE FUNCTION keep()",
)


class Storm:
    """Between `start` and `stop` something is killed every few seconds. What took how long is in `took`: (kind, seconds)."""

    def __init__(self, rabbits, database, reporters, seed):
        self._rabbits, self._server, self._database, self._reporters = rabbits, rabbits.server, database, reporters
        self._rng = random.Random(seed)
        self.took: list[tuple[str, float]] = []
        self.said: list[str] = []
        self.failed: list[str] = []
        self.kinds: set[str] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self):
        self._thread.start()
        return self

    def stop(self):
        """Everything is there again afterwards."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(90)
        for node in self._rabbits.nodes:
            if not node.is_up:
                node.wait()
        self._server.leading()

    def _run(self):
        """First each kind once, in an order of the seed, then whatever comes."""
        once = ["leader", "ingest", "api", "node", "database"]
        self._rng.shuffle(once)
        try:
            while not self._stop.wait(self._rng.uniform(*PAUSES_S)):
                kind = once.pop() if once else None
                if kind is None:
                    self._strike()
                elif kind == "database":
                    self._crash_database()
                else:
                    self._kill(kind)
        except BaseException as error:  # the test says it
            self.failed.append(repr(error))
            raise

    def _strike(self):
        kinds = ["decide", "ingest", "api"] + (["node"] if all(node.is_up for node in self._rabbits.nodes) else [])
        for kind in self._rng.sample(kinds, 2 if self._rng.random() < TWO_AT_ONCE else 1):
            self._kill(kind)

    def _kill(self, kind):
        server, rng = self._server, self._rng
        if kind == "node":
            node = rng.choice(self._rabbits.nodes)
            self._note(f"node {node.name}")
            node.kill()
            before = {one: len(one.acknowledged) for one in self._reporters}
            threading.Timer(RESTARTS_AFTER_S, node.launch).start()
            self._measure("node", lambda: all(len(one.acknowledged) > before[one] for one in self._reporters))
            return
        leading = self._leading() if kind == "leader" else None
        process = leading or rng.choice([one for one in server.processes if one.kind == kind.replace("leader", "decide")])
        kind = "leader" if process is self._leading() else kind
        before = self._newest()
        number = self._number()
        self._note(f"{kind} {process.folder.name}")
        process.kill()
        threading.Timer(RESTARTS_AFTER_S, process.begin).start()
        if kind == "leader":
            self._measure("leader", lambda: self._number() > number)
        elif kind == "ingest":
            self._measure("ingest", lambda: all(now > before[device] for device, now in self._newest().items()))
        time.sleep(RESTARTS_AFTER_S + 0.2)  # it is started again before the next is chosen

    def _crash_database(self):
        self._note("database")
        number = self._number()
        self._database.stop()
        time.sleep(2.0)
        self._database.start()
        self._measure("database", lambda: self._number() >= number and self._leads())

    def _measure(self, kind, over):
        began = time.monotonic()
        while time.monotonic() - began < SETTLES_WITHIN_S:
            with contextlib.suppress(Exception):  # the database may be away, too
                if over():
                    self.took.append((kind, round(time.monotonic() - began, 2)))
                    return
            time.sleep(0.05)
        self.failed.append(f"{kind}: not over within {SETTLES_WITHIN_S} s")

    def _note(self, what):
        self.kinds.add(what.partition(" ")[0])
        self.said.append(f"{time.strftime('%H:%M:%S')} {what}")

    def _newest(self):
        with contextlib.suppress(Exception):
            return {one.device.id: len(stored(self._server, one.device)) for one in self._reporters}
        return {one.device.id: 0 for one in self._reporters}

    def _leads(self):
        return rows(self._server, "SELECT number FROM leaders WHERE until > extract(epoch FROM clock_timestamp())")

    def _number(self):
        """The fencing number of who leads, or led last and did not end well; -1 when it cannot be asked."""
        with contextlib.suppress(Exception):
            return self._leads()[0][0] if self._leads() else -1
        return -1

    def _leading(self):
        with contextlib.suppress(Exception):
            (holder,) = rows(self._server, "SELECT holder FROM leaders")[0]
            pid = int(holder.split("-")[-2])
            return next((one for one in self._server.deciders if one.process is not None and one.process.pid == pid), None)
        return None


def rows(server, statement):
    from sqlalchemy import text

    database = Database(Folder(server.data).database_url(load(Folder(server.data))))
    try:
        with database.reading() as session:
            return [tuple(row) for row in session.execute(text(statement))]
    finally:
        database.close()


class Watch:
    """Asks each of those that answer, and whoever is behind the balancer, how the rollout and the assignment are."""

    def __init__(self, server):
        self._server = server
        self.wrong: list[str] = []
        self.counts: collections.Counter[str] = collections.Counter()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(number,), daemon=True) for number in (0, 1, None)]

    def __enter__(self):
        for one in self._threads:
            one.start()
        return self

    def __exit__(self, *_: object):
        self._stop.set()
        for one in self._threads:
            one.join(30)

    def _run(self, number):
        version, wave = 0, {}
        while not self._stop.wait(0.3):
            found = self._ask(number, "/assignment")
            if found is not None and number is not None:  # two that answer may hear of a new one a moment apart
                if found["version"] < version:
                    self.wrong.append(f"api {number} went back from version {version} to {found['version']}")
                version = found["version"]
            for one in self._ask(number, "/rollouts") or []:
                now = (one["wave"], one["state"])
                before = wave.get(one["id"], now)
                if now[0] < before[0] or (before[1] in {"completed", "superseded", "aborted"} and now[1] != before[1]):
                    self.wrong.append(f"rollout {one['id']} went back from {before} to {now}")
                wave[one["id"]] = now

    def _ask(self, number, path):
        port = self._server.front if number is None else self._server.api_ports[number][0]
        try:
            answer = requests.get(
                f"https://127.0.0.1:{port}/api/v1{path}", headers={"Authorization": f"Bearer {self._server.token}"},
                verify=str(self._server.ca), timeout=30,
            )  # fmt: skip
        except (
            requests.ConnectionError,
            requests.exceptions.ChunkedEncodingError,
        ):  # none, or it ends in the middle of the answer
            self.counts["broken off"] += 1
            return None
        except requests.RequestException as error:
            self.wrong.append(f"{path}: {error}")
            return None
        self.counts[str(answer.status_code)] += 1
        if answer.status_code == 200:
            return answer.json()
        if answer.status_code != 503 or int(answer.headers.get("Retry-After", "0")) <= 0:
            self.wrong.append(f"{path}: {answer.status_code} {dict(answer.headers)} {answer.text[:200]}")
        return None


def signed(server):
    """What was signed, in order: (role, version, the words that were signed, the fencing number)."""
    found = []
    for name, data, number in rows(server, "SELECT name, data, number FROM written ORDER BY seq"):
        with contextlib.suppress(ValueError, KeyError):
            said = json.loads(bytes(data))["signed"]
            found.append((name, said["_type"], said["version"], base64.b64encode(bytes(data)), number))
    return found
