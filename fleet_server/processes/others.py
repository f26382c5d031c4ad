"""What a process knows of the others: who leads, who lives, since when devices can be heard."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable

import msgspec
from sqlalchemy.exc import SQLAlchemyError

from agent.contract.codec import convert
from fleet_server.ingest.broker_views import BrokerView
from fleet_server.status import LeaderView, Messages
from fleet_server.storage import leadership, processes
from fleet_server.storage.database import Database
from fleet_server.storage.leadership import Leader
from fleet_server.storage.processes import Known, ProcessView
from fleet_server.storage.signals import Signals

_log = logging.getLogger(__name__)

FRESH_S = 1.0
LEADER, INGEST = "leader", "ingest"
"""A signal: somebody leads, or leads no more. A kind of process."""


class Others:
    """Reads when it is asked and what it knows is older than a second, or somebody says that there is a new leader. For any thread."""

    def __init__(self, database: Database, signals: Signals) -> None:
        self._database, self._signals = database, signals
        self._leader: Leader | None = None
        self._known: list[Known] = []
        self._until = 0.0
        self._lock = threading.Lock()
        self.on_leader: Callable[[], None] = lambda: None
        """Told when somebody leads, or leads no more."""
        signals.on(LEADER, lambda _: self._hear_of_leader())
        signals.on_again("leader", self._hear_of_leader)

    def forget(self) -> None:
        """The next who asks reads anew."""
        self._until = 0.0

    def leader(self) -> Leader | None:
        """Who leads; None while nobody does, or while the database does not say."""
        self._read()
        return self._leader

    def leading(self) -> LeaderView | None:
        """Who leads, as it is shown."""
        leader = self.leader()
        return LeaderView(leader.number, leader.holder, leader.since) if leader is not None else None

    def processes(self) -> list[ProcessView]:
        self._read()
        return [one.process for one in self._known]

    def connected(self) -> bool:
        """Whether somebody hears devices."""
        return any(one.detail.get("connected") for one in self._living())

    def heard_since(self) -> float:
        """Since when devices could be heard without a break, by the clock of who hears them; now while nobody does."""
        since = [one.detail.get("heard_since") for one in self._living() if one.detail.get("connected")]
        return min((float(at) for at in since if at is not None), default=time.time())

    def messages(self) -> Messages:
        """What the processes that live have stored and dropped since each was started."""
        living = self._living()
        dropped: Counter[str] = Counter()
        for one in living:
            dropped.update(one.detail.get("dropped", {}))
        return Messages(sum(one.detail.get("accepted", 0) for one in living), dict(dropped))

    def paused(self) -> list[str]:
        return sorted({device for one in self._living() for device in one.detail.get("paused", ())})

    def broker(self) -> BrokerView | None:
        """How the broker is, as one that speaks with it sees it; None while nobody does."""
        for one in self._living():
            if one.detail.get("connected"):
                with contextlib.suppress(msgspec.ValidationError):  # another version of this software has other words for it
                    return convert(one.detail.get("broker"), BrokerView)
        return None

    def warnings(self) -> list[str]:
        return list(dict.fromkeys(said for one in self._living() for said in one.detail.get("warnings", ())))

    def tell_of_leader(self) -> None:
        """Everybody reads anew who leads."""
        self._signals.send(LEADER)

    def _hear_of_leader(self) -> None:
        self.forget()
        self.on_leader()

    def _living(self) -> list[Known]:
        """The processes that store what devices send."""
        self._read()
        return [one for one in self._known if one.process.kind == INGEST and not one.process.missing]

    def _read(self) -> None:
        with self._lock:
            if time.monotonic() < self._until:
                return
            try:
                with self._database.reading() as session:
                    self._leader, self._known = leadership.current(session), processes.known(session)
            except SQLAlchemyError as error:
                _log.debug("who else there is cannot be read: %s", error)
                self._leader, self._known = None, []
            self._until = time.monotonic() + FRESH_S
