"""Access tokens that are shown: how often an address may fail and an account may sign in, and what is noted of it."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable

from fleet_server.access import Access, Actor
from fleet_server.errors import Denied, TooOften
from fleet_server.journal import Journal
from fleet_server.storage.database import Database

FAILURES, FAILURE_EVERY_S = 10, 6.0  # of an address: a person mistypes a few times, a script with an old token does so for ever
SIGN_INS, SIGN_IN_EVERY_S = 20, 3.0  # of an account: each is a row until it ends
NOTES, NOTE_EVERY_S = 100, 10.0  # of refusals in the audit: strangers must not fill the database
KEPT = 10_000  # addresses or accounts that are remembered


class Allowance:
    """So many at once, and another one after each `every_s`; for each key. Safe between threads."""

    def __init__(self, burst: int, every_s: float, clock: Callable[[], float]) -> None:
        self._burst, self._every_s, self._clock = burst, every_s, clock
        self._free_at: OrderedDict[str, float] = OrderedDict()
        """When all of a key's allowance is back."""
        self._lock = threading.Lock()

    def wait_s(self, key: str) -> float:
        """How many seconds until the key may again; 0 when it may."""
        with self._lock:
            used_s = self._free_at.get(key, 0.0) - self._clock()
        return max(0.0, used_s - (self._burst - 1) * self._every_s)

    def spend(self, key: str) -> None:
        now = self._clock()
        with self._lock:
            self._free_at[key] = max(now, self._free_at.get(key, 0.0)) + self._every_s
            self._free_at.move_to_end(key)
            while self._free_at and (len(self._free_at) > KEPT or next(iter(self._free_at.values())) <= now):
                self._free_at.popitem(last=False)


class _Notes:
    """What is refused to strangers, in the audit and counted; bounded in all, as strangers must not fill the database."""

    def __init__(self, database: Database, journal: Journal, clock: Callable[[], float]) -> None:
        self._database, self._journal = database, journal
        self._notes = Allowance(NOTES, NOTE_EVERY_S, clock)
        self.outcomes: Counter[str] = Counter()

    def add(self, action: str, address: str) -> None:
        """`action` is `SUBJECT.OUTCOME`."""
        self.outcomes[action.partition(".")[2]] += 1
        if self._notes.wait_s("") > 0:
            return
        self._notes.spend("")
        with self._database.session() as session:
            self._journal.audit(session, None, action, address)


class WrongTokens:
    """Wrong access tokens in requests. A right one always passes, whatever else comes from its address: many scripts may stand
    behind one, and a token is too long to be guessed. Safe between threads.
    """

    def __init__(self, database: Database, journal: Journal, clock: Callable[[], float]) -> None:
        self._failures = Allowance(FAILURES, FAILURE_EVERY_S, clock)
        self._notes = _Notes(database, journal, clock)
        self.outcomes = self._notes.outcomes
        """How many were `denied`, and `throttled`."""

    def note(self, address: str) -> None:
        """One came from there.  Raises: TooOften, when too many did."""
        wait_s = self._failures.wait_s(address)
        if wait_s > 0:
            self._notes.add("token.throttled", address)
            raise TooOften(f"too many wrong access tokens; try again in {wait_s:.0f} s with one that is known", after_s=wait_s)
        self._failures.spend(address)
        self._notes.add("token.denied", address)


class SignIns:
    """Opens browser sessions for those who show an access token."""

    def __init__(self, database: Database, access: Access, journal: Journal, clock: Callable[[], float]) -> None:
        self._database, self._access, self._journal = database, access, journal
        self._failures = Allowance(FAILURES, FAILURE_EVERY_S, clock)
        self._sign_ins = Allowance(SIGN_INS, SIGN_IN_EVERY_S, clock)
        self._notes = _Notes(database, journal, clock)
        self.outcomes = self._notes.outcomes
        """How many were `opened`, `denied` and `throttled`."""

    def open(self, token: str, address: str) -> tuple[Actor, str]:
        """Who it is, and the cookie's value.  Raises: Denied; TooOften, before the token is looked at, for an address that failed
        too often, and for an account that comes too often.
        """
        self._refuse_above(self._failures, address, address)
        try:
            actor = self._access.by_token(token)
        except Denied:
            self._failures.spend(address)
            self._notes.add("session.denied", address)
            raise
        account = actor.token or ""
        self._refuse_above(self._sign_ins, account, address)
        self._sign_ins.spend(account)
        cookie = self._access.open_session(actor)
        with self._database.session() as session:
            self._journal.audit(session, actor, "session.open", account, address=address)
        self.outcomes["opened"] += 1
        return actor, cookie

    def _refuse_above(self, allowance: Allowance, key: str, address: str) -> None:
        wait_s = allowance.wait_s(key)
        if wait_s > 0:
            self._notes.add("session.throttled", address)
            raise TooOften(f"too many attempts to sign in; try again in {wait_s:.0f} s", after_s=wait_s)
