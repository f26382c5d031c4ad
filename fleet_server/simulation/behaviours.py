"""What simulated devices do wrong, and how many of them. Pure."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from enum import Enum

import msgspec

from fleet_server.errors import Invalid


class Behaviour(str, Enum):
    """How a simulated device differs from a good one, once there is a new release."""

    HONEST = "honest"  # it does not
    OFFLINE = "offline"  # enrolled, and never there
    SLOW = "slow"  # everything takes it ten times as long
    FLAPPING = "flapping"  # its connection breaks again and again
    REFUSING = "refusing"  # the new release fails its trial
    ROLLING_BACK = "rolling-back"  # the new release fails its watch
    SILENT = "silent"  # it hangs in the middle of the update: its connection stays, and nothing comes any more
    WRONG_DIGEST = "wrong-digest"  # it claims to serve the new release, and serves other bytes
    UNSIGNED = "unsigned"  # what it reports of the new release bears no signature
    WRONG_KEY = "wrong-key"  # ... or one of a key that is not its own
    CLONED = "cloned"  # two machines have its identity
    WRONG_CLOCK = "wrong-clock"  # its clock is years off


BREAKS = frozenset({Behaviour.FLAPPING, Behaviour.CLONED, Behaviour.SILENT})
"""Behaviours of devices whose connections do not hold."""

_AMOUNT = re.compile(r"([0-9]{1,7}(?:\.[0-9]{1,4})?)(%?)", re.ASCII)
TEXT = ", ".join(one.value for one in Behaviour if one is not Behaviour.HONEST)


class Share(msgspec.Struct, frozen=True):
    """How many devices behave so: a `part` of all, or a number of `devices`."""

    behaviour: Behaviour
    part: float | None = None
    devices: int | None = None

    def of(self, count: int) -> int:
        """How many of `count` devices that are, rounded to the nearest."""
        return self.devices if self.devices is not None else round((self.part or 0.0) * count)


def parse(text: str) -> Share:
    """`refusing=3%` or `offline=12`.  Raises: Invalid with the expected spelling."""
    name, equals, amount = text.strip().partition("=")
    try:
        behaviour = Behaviour(name)
    except ValueError:
        raise Invalid(f"{name!r} is no behaviour; there are {TEXT}") from None
    share = _amount(behaviour, amount) if equals and behaviour is not Behaviour.HONEST else None
    if share is None:
        raise Invalid(
            f"{text!r} is not BEHAVIOUR=SHARE, such as refusing=3% or offline=12 (that many devices); behaviours are {TEXT}"
        )
    return share


def _amount(behaviour: Behaviour, text: str) -> Share | None:
    found = _AMOUNT.fullmatch(text)
    if found is None:
        return None
    if not found[2]:
        return Share(behaviour, devices=int(found[1])) if found[1].isdigit() else None
    part = float(found[1]) / 100
    return Share(behaviour, part=part) if part <= 1 else None


def draw(count: int, shares: Sequence[Share], seed: int) -> list[Behaviour]:
    """A behaviour for each of `count` devices: exactly as many of each as its share says, which ones is decided by `seed`.

    Raises: Invalid when the shares add up to more devices than there are, or one is named twice.
    """
    if len({share.behaviour for share in shares}) < len(shares):
        raise Invalid("each behaviour has one share")
    bad = [share.behaviour for share in shares for _ in range(share.of(count))]
    if len(bad) > count:
        raise Invalid(f"{len(bad)} devices are to misbehave, and there are {count}")
    found = [*bad, *[Behaviour.HONEST] * (count - len(bad))]
    random.Random(f"behaviours {seed}").shuffle(found)  # noqa: S311 - to be repeated, not to be secret
    return found
