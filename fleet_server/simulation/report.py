"""What a rehearsal found, in numbers and in words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from fleet_server.simulation.expected import Ending

LOST_NAMED = 20


class Moment(msgspec.Struct, frozen=True, kw_only=True):
    """How things stood `at` seconds after the rollout began, by what the devices themselves know."""

    at: float
    connected: int
    busy: int
    committed: int
    bad: int
    wave: int
    state: str


class Sent(msgspec.Struct, frozen=True, kw_only=True):
    """What went over the wire. `requests`: over HTTPS; `distrusted`: words of the fleet that did not verify."""

    reports: int
    events: int
    pokes: int
    requests: int
    fetched_bytes: int
    verifying: int
    distrusted: list[str]
    unanswered: int
    reconnected: int
    """How often the connection of a device broke that was to have one that holds."""
    accepted: int
    """Messages that the server stored."""
    dropped: dict[str, int]
    """Messages that the server did not take, by cause."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """A rehearsal from its beginning to its end. Times are seconds; `over_s` and `settled_s` count from the rollout's start.

    `last_commit_s`: when the last device committed, by its own word; None when none did. `settled_s`: when the last device that can had
    done what it was told last, and the rollout was over; None when some had not within the time.
    """

    devices: int
    behaviours: dict[str, int]
    seed: int
    speed: float
    release: str
    rollout: str
    max_failures: int | None
    failure_share: float
    waves: list[str]
    connected: int
    connecting_s: float
    ended: Ending
    """How the rollout ended, by the server's word, with what the server counts of the devices."""
    expected: Ending
    """How it had to, by what the devices did."""
    why: str
    late: bool
    """Whether the time ran out before it ended."""
    over_s: float
    last_commit_s: float | None
    settled_s: float | None
    lost: list[str]
    """Devices that did nothing wrong and are not where they should be in the end."""
    problems: list[str]
    sent: Sent
    moments: list[Moment]

    @property
    def as_expected(self) -> bool:
        """Whether the rollout ended as its gates say, with nobody lost and nothing distrusted."""
        return self.expected.allows(self.ended) and not self.late and not self.lost and not self.sent.distrusted

    def to_builtins(self) -> dict[str, Any]:
        """For JSON."""
        said: dict[str, Any] = msgspec.to_builtins(self)
        return {"as_expected": self.as_expected, **said}


def lines(report: Report) -> Iterator[str]:
    """The report for people."""
    odd = ", ".join(f"{number} {name}" for name, number in sorted(report.behaviours.items()) if name != "honest" and number)
    yield f"{report.devices} devices ({odd or 'none misbehaves'}), seed {report.seed}, {report.speed:g} times as fast as real ones"
    yield f"connected: {report.connected} within {report.connecting_s:.1f} s"
    yield (f"rollout {report.rollout} of {report.release}: waves {', '.join(report.waves)}; {_allowed(report)}")
    yield f"  {_told(report.ended)} after {report.over_s:.1f} s ({report.why})"
    if report.expected.allows(report.ended):
        yield f"  as it had to: {_counted(report.expected)}"
    else:
        yield f"  NOT AS IT HAD TO: {_told(report.expected)}, because {_counted(report.expected)}"
    if report.lost:
        named = ", ".join(report.lost[:LOST_NAMED])
        yield f"  LOST: {len(report.lost)} devices that did nothing wrong are not where they should be: {named}"
    elif report.settled_s is not None:
        committed = (
            f"the last device committed after {report.last_commit_s:.1f} s, " if report.last_commit_s is not None else ""
        )
        yield f"  {committed}all was done after {report.settled_s:.1f} s"
    sent = report.sent
    yield (
        f"sent: {sent.reports} reports, {sent.events} events; heard: {sent.pokes} pokes; {sent.requests} HTTPS requests, "
        f"{sent.fetched_bytes} bytes fetched; {sent.reconnected} connections that were to hold broke"
    )
    said = ", ".join(f"{number} {cause}" for cause, number in sorted(sent.dropped.items()))
    yield f"the server stored {sent.accepted} messages" + (f" and took not: {said}" if said else "")
    yield f"verified by python-tuf on {sent.verifying} devices: {'all of it' if not sent.distrusted else ''}" + "".join(
        f"\n  DISTRUSTED: {text}" for text in sent.distrusted[:LOST_NAMED]
    )
    yield from (f"not connected: {text}" for text in report.problems)


def _allowed(report: Report) -> str:
    share = f"at most {100 * report.failure_share:g} % failures"
    return share if report.max_failures is None else f"{share}, and at most {report.max_failures}"


def _told(ending: Ending) -> str:
    word = {"running": "still waits", "waiting": "passed, waits for confirmation"}.get(ending.state, ending.state)
    return f"{word} in wave {ending.wave + 1}, which reaches {ending.reached} devices"


def _counted(ending: Ending) -> str:
    names = {
        "good": "commit",
        "bad": "refuse it or roll back",
        "claims": "never answer though they are there",
        "held": "are held",
        "lost": "fall silent",
        "silent": "are not heard",
    }
    return ", ".join(f"{ending.counts.get(kind, 0)} {words}" for kind, words in names.items())
