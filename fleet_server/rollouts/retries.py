"""Another attempt at a release for devices that refused it: all that a rollout reaches, or single ones.

An attempt has a number, signed for the devices: in the rollout for all of them, in a device's record for that one. A device that
refused the release in an attempt with a lower number tries it again, and what it answered in one counts no more.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from sqlalchemy.orm import Session

from agent.contract.assignment import MAX_RETRIES
from agent.contract.reports import Outcome
from fleet_server.errors import Conflict, NotFound
from fleet_server.rollouts import facts
from fleet_server.storage.models import Device, DeviceModel, RolloutRow, Setting

AT_ONCE = 100
"""Devices whose records are signed for one request."""

LAST = "last_attempt"  # the row of `settings` with the last number

BAD = frozenset({Outcome.REFUSED, Outcome.ROLLED_BACK, Outcome.FAILED})


def next_attempt(session: Session, now: float) -> int:
    """The number of another attempt: the time, unless one that is no smaller was given already. So it grows also where a backup brought
    an older database back.
    """
    last = session.get(Setting, LAST)
    number = max(int(now), int(last.value) + 1 if last is not None else 1)
    if last is None:
        session.add(Setting(name=LAST, value=str(number)))
    else:
        last.value = str(number)
    return number


def with_retry(retries: list[Any] | None, model: str, release: int, attempt: int) -> list[Any]:
    """The retries of a device with another one; the oldest give way when there are too many."""
    others = [one for one in retries or () if not _is_of(one, model, release)]
    return [*others, {"model": model, "release": release, "attempt": attempt}][-MAX_RETRIES:]


def failed(session: Session, row: RolloutRow, device: str | None) -> list[str]:
    """The devices (or this one, if it is) whose last answer to the rollout's release is bad, by id; at most one more than are told at
    once.
    """
    about, found = facts.about(session, row), list[str]()
    query = facts.of_devices(about).where(Device.revoked.is_(False), DeviceModel.phase.is_not(None)).order_by(Device.id)
    for one in session.execute(query if device is None else query.where(Device.id == device)):
        attempt = facts.attempt_of(about, one.retries)
        fact = facts.fact_of(one.id, True, one, row.release, about.hashes, row.id, attempt)
        reached = device is not None or facts.is_reached(about, one)
        if reached and fact.outcome in BAD and not fact.serving_it:
            found.append(one.id)
            if len(found) > AT_ONCE:
                break
    return found


def refuse_none(session: Session, row: RolloutRow, device: str | None, found: Collection[str]) -> None:
    """Raises: NotFound; Conflict when nobody is to try again, or more than are told one by one."""
    ref = f"{row.model}:{row.release}"
    if device is not None and session.get(Device, device) is None:
        raise NotFound(f"there is no device {device!r}; `edge-fleet rollout devices {row.id}` shows those that it reaches")
    if not found:
        who = f"{device} did not refuse {ref}" if device is not None else f"no device that {row.id} reached refused {ref}"
        raise Conflict(f"{who}; `edge-fleet rollout devices {row.id}` shows how devices stand", code="nothing_to_retry")
    if len(found) > AT_ONCE:
        raise Conflict(
            f"more than {AT_ONCE} devices refused {ref}, and a rollout that is {row.state} tells them one by one; begin another one in "
            f"which all try again: `edge-fleet rollout start {ref} --retry`",
            code="too_many",
        )


def _is_of(one: Any, model: str, release: int) -> bool:
    return bool((one["model"], one["release"]) == (model, release))
