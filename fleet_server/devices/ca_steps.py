"""The replacement of the fleet's CA as it stands on the disk: which step it has reached, and what may follow. Pure but for `read`
and `write`.

Each step is written before it is acted on. What follows from it (files, certificates, what devices are told) is made again at every
start, so a server that is killed between any two writes goes on from the step that it has written.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from pathlib import Path

from agent.common import files
from agent.contract.codec import FORMAT, ContractError, Document, decode, encode, require_format
from fleet_server.errors import Conflict, Unavailable

FILE = "replacement.json"
MAX_FILE_BYTES = 64 * 1024


class Step(str, Enum):
    """What is so from the moment at which the step is written."""

    SETTLED = "settled"
    """There is one CA."""
    INTRODUCED = "introduced"
    """There is a new one beside it. Both are believed, devices are told so and renew under the new one; the server's own
    certificates are of the old one, as devices that have heard nothing yet know no other."""
    SWITCHED = "switched"
    """The server's own certificates are of the new one."""
    FINISHING = "finishing"
    """The old one is believed no more. Never waited in: what follows is done at once, or at the next start."""


class Event(str, Enum):
    REPLACE = "replace"
    SWITCH = "switch"
    FINISH = "finish"
    DONE = "done"


TRANSITIONS: Mapping[tuple[Step, Event], Step] = {
    (Step.SETTLED, Event.REPLACE): Step.INTRODUCED,
    (Step.INTRODUCED, Event.SWITCH): Step.SWITCHED,
    (Step.INTRODUCED, Event.FINISH): Step.FINISHING,  # the CA's key was stolen: there is no time for a switch of its own
    (Step.SWITCHED, Event.FINISH): Step.FINISHING,
    (Step.FINISHING, Event.DONE): Step.SETTLED,
}
_INSTEAD = {
    Step.SETTLED: "no CA is being replaced; `edge-fleet ca replace` begins that",
    Step.INTRODUCED: "the CA is being replaced already: see `edge-fleet ca status`, then `edge-fleet ca switch` or `finish`",
    Step.SWITCHED: "the server's own certificates are of the new CA already: see `edge-fleet ca status`, then `edge-fleet ca finish`",
    Step.FINISHING: "the replacement of the CA is being finished; try again",
}


class Replacement(Document, frozen=True, kw_only=True):
    """How far it is. `since`: when it began, `switch_at`: when the server's own certificates switch if nobody had them switched
    before; in seconds since the epoch. Devices renew within `spread_s` seconds.
    """

    step: Step
    since: float = 0.0
    switch_at: float = 0.0
    spread_s: float = 0.0
    format: int = FORMAT

    def __post_init__(self) -> None:
        require_format(self.format, FILE)


SETTLED = Replacement(step=Step.SETTLED)


def after(step: Step, event: Event) -> Step:
    """Raises: Conflict that says what to do instead."""
    found = TRANSITIONS.get((step, event))
    if found is None:
        raise Conflict(_INSTEAD[step], code="wrong_step")
    return found


def read(folder: Path) -> Replacement:
    """Raises: Unavailable when the file is there and cannot be used."""
    path = folder / FILE
    try:
        return decode(path.read_bytes(), Replacement, limit_bytes=MAX_FILE_BYTES)
    except FileNotFoundError:
        return SETTLED
    except ContractError as error:
        raise Unavailable(f"{path} cannot be used: {error}; restore the folder from a backup") from error


def write(folder: Path, replacement: Replacement) -> None:
    """Raises: OSError."""
    if replacement.step is Step.SETTLED:
        files.remove(folder / FILE)
    else:
        files.write(folder / FILE, encode(replacement))
