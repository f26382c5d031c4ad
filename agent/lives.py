"""The lives of `serve`: the processes that served on this device one after the other, and which of them ended in order. Pure.

A life that nobody ended, on a machine that went on running, was a crash: killed, out of memory, a fault in an engine, the
watchdog, or an end that was begun and not finished. A life that noted its end was not, and one that went with its machine says
nothing about itself.
"""

from __future__ import annotations

from collections.abc import Sequence

from agent.contract.codec import Document


class Life(Document, frozen=True, kw_only=True):
    """One process. `instance` is its name in `/control/v1/status`, `boot` the machine's boot that it lived in."""

    instance: str
    boot: str = ""
    ended: bool = False
    """Whether it noted its orderly end, as the last thing it did."""


def crashed(lives: Sequence[Life], since: str, until: str) -> tuple[str, ...] | None:
    """The instances from `since` on and before `until` that crashed; None when the lives between the two are not known."""
    names = [life.instance for life in lives]
    if since not in names or until not in names:
        return None
    first, last = names.index(since), names.index(until)
    between = zip(lives[first:last], lives[first + 1 : last + 1], strict=True)
    return tuple(life.instance for life, following in between if not life.ended and life.boot == following.boot)


def stopped(lives: Sequence[Life], since: str) -> bool:
    """Whether nobody serves now on purpose: the last life there was, `since` or a later one, ended in order."""
    return bool(lives) and lives[-1].ended and any(life.instance == since for life in lives)


def ended_with_its_boot(lives: Sequence[Life], since: str) -> bool:
    """Whether the last life of the boot that `since` lived in ended in order: then that machine was not torn away from under
    it.
    """
    boot = next((life.boot for life in lives if life.instance == since), None)
    of_boot = [life for life in lives if life.boot == boot]
    return bool(of_boot) and of_boot[-1].ended
