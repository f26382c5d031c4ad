"""Where this device may find its fleet server, and where it goes now. Decides only; `fleet/moving.py` asks and acts.

Rules:
 1. the fleet says addresses when the device enrols and renews its certificate, and in the signed assignment; what is newer by its
    own number than everything known is known from then on. Nothing is used because it was said;
 2. an address is used once the fleet server answered there: with a certificate of the fleet's own CA, to this device's
    certificate. Whoever makes the device hear of an address gains nothing without such a certificate;
 3. a newer one is used when every way that leads to the server at the present one leads to it there too; an older one is gone back
    to only when more ways do. So two that work equally well do not alternate;
 4. the present one is kept beside the newer until that has worked, and two earlier ones after it; so is, for ever, the one that came
    with enrolment.
"""

from __future__ import annotations

import logging
from pathlib import Path

import msgspec

from agent.common import files
from agent.contract.addresses import Addresses
from agent.contract.codec import FORMAT, ContractError, Document, decode, encode, require_format

log = logging.getLogger(__name__)

FILE = "addresses.json"
KEPT = 3
"""Beside the one in use: a newer one that has not answered yet, and two earlier ones."""

MAX_FILE_BYTES = 64 * 1024

Ways = frozenset[str]
"""By which ways the fleet server answers at an address: `https`, `mqtt`, both or none."""


class Known(Document, frozen=True, kw_only=True):
    """`used` is where this device goes since the moment `used_since` (seconds since the epoch); 0 when that was enrolment. `others`:
    the newest first.
    """

    used: Addresses
    used_since: float = 0.0
    others: tuple[Addresses, ...] = ()
    format: int = FORMAT

    def __post_init__(self) -> None:
        require_format(self.format, FILE)

    @property
    def newest(self) -> Addresses:
        """What the fleet said last."""
        return max((self.used, *self.others), key=lambda one: one.since)

    @property
    def awaited(self) -> Addresses | None:
        """What the fleet said last, while it has not answered there."""
        return self.newest if self.newest.since > self.used.since else None


def hear(known: Known, said: Addresses) -> Known:
    """What is known after the fleet said `said`: `known` itself when that is no news."""
    if said.since <= known.newest.since:
        return known
    if said.is_same_place(known.used):  # back to where it is: nothing is awaited any more
        others = tuple(one for one in known.others if one.since < known.used.since)
        return msgspec.structs.replace(known, used=said, others=others)
    earlier = (one for one in known.others if not one.is_same_place(said))
    return msgspec.structs.replace(known, others=_newest((said, *earlier)))


def to_ask(known: Known, *, lost: bool) -> tuple[Addresses, ...]:
    """Where to see whether the server answers, in order; with `lost`, when it does not at the present address, everywhere."""
    return tuple(one for one in known.others if lost or one is known.awaited)


def is_better(known: Known, one: Addresses, there: Ways, here: Ways) -> bool:
    """Whether to go to `one`, by the ways that lead to the server `there` and `here`."""
    if one.since > known.used.since:
        return bool(there) and there >= here
    return there > here


def gone_to(known: Known, one: Addresses, now: float) -> Known:
    """After `one` was found to be better."""
    rest = (known.used, *(other for other in known.others if other is not one))
    return msgspec.structs.replace(known, used=one, used_since=now, others=_newest(rest))


def with_enrolled(known: Known, enrolled: Addresses) -> Known:
    """`known`, with the address that came with enrolment among the others."""
    if any(one.is_same_place(enrolled) for one in (known.used, *known.others)):
        return known
    return msgspec.structs.replace(known, others=(*known.others, enrolled))


def read(folder: Path, enrolled: Addresses) -> Known:
    """What the identity folder says; what enrolment said where there is no file, or one that cannot be used: the fleet says it
    again.
    """
    try:
        known = decode((folder / FILE).read_bytes(), Known, limit_bytes=MAX_FILE_BYTES)
    except FileNotFoundError:
        return Known(used=enrolled)
    except (OSError, ContractError) as error:
        log.warning("%s cannot be used, so the addresses of enrolment are: %s", folder / FILE, error)
        return Known(used=enrolled)
    return with_enrolled(known, enrolled)


def write(folder: Path, known: Known) -> None:
    """Raises: OSError."""
    files.write(folder / FILE, encode(known))


def _newest(some: tuple[Addresses, ...]) -> tuple[Addresses, ...]:
    """The newest KEPT, and the oldest of all, with which this device enrolled."""
    ordered = sorted(some, key=lambda one: -one.since)
    return (*ordered[:KEPT], *ordered[KEPT:][-1:])
