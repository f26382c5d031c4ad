"""Which release a device should run. Both sides compute it with the functions here, so they cannot disagree.

The assignment is one TUF target per fleet (`assignments/fleet.json`), signed online; its size grows with the number of models
and rules, never with the number of devices. What groups a device is in stands in its own record, signed by the same key.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection
from typing import Any, Literal

import msgspec

from agent.contract import names
from agent.contract.addresses import Addresses
from agent.contract.authorities import Authorities
from agent.contract.codec import FORMAT, Document, decode, require_format

ASSIGNMENT_TARGET = "assignments/fleet.json"
MAX_ASSIGNMENT_BYTES = 4 * 1024 * 1024
MAX_RECORD_BYTES = 64 * 1024
RECORD_PAYLOAD_TYPE = "application/vnd.edge-fleet.device-record+json"
"""The DSSE payload type of a signed device record."""

ISSUED_FIELD = "issued"
"""In the signed part of timestamp.json: when the server signed it, whole seconds since the epoch, UTC. A device without a clock
knows from it which time is past.
"""

REINSTATED_FIELD = "reinstated"
"""In a release's TUF target, under `custom`: how often its publisher reinstated it, with the offline key."""

EVERYONE = 1000
"""A rollout's `permille` that reaches every device."""

Mode = Literal["install", "shadow"]


class Window(Document, frozen=True, kw_only=True):
    """When devices may switch: minutes of the day in the device's local time, from `start` until before `end` (may pass midnight)."""

    start_minute: int
    end_minute: int
    days: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6)

    def __post_init__(self) -> None:
        if not (0 <= self.start_minute < 1440 and 0 <= self.end_minute <= 1440):
            raise ValueError("start_minute and end_minute are minutes of a day, 0 to 1440")


DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_WINDOW = re.compile(r"(?:([a-z,-]+) )?(\d\d):(\d\d)-(\d\d):(\d\d)")


def parse_window(text: str) -> Window:
    """The window that `text` describes: `22:00-05:00`, `sat,sun 00:00-24:00`, `mon-fri 01:30-04:00`.

    Raises: ValueError with the expected spelling.
    """
    match = _WINDOW.fullmatch(text.strip().lower())
    if match is None:
        raise ValueError(f"window {text!r} is not DAYS HH:MM-HH:MM, for example 'mon-fri 22:00-05:00' or '01:00-04:00'")
    hours = [int(part) for part in match.groups()[1:]]
    if hours[1] > 59 or hours[3] > 59:
        raise ValueError(f"window {text!r}: an hour has minutes 00 to 59")
    return Window(start_minute=60 * hours[0] + hours[1], end_minute=60 * hours[2] + hours[3], days=_days(match[1], text))


def _days(named: str | None, text: str) -> tuple[int, ...]:
    found: set[int] = set()
    for part in (named or "mon-sun").split(","):
        first, _, last = part.partition("-")
        if first not in DAYS or (last or first) not in DAYS:
            raise ValueError(f"window {text!r}: {part!r} is no day; days are {', '.join(DAYS)}, or a span such as mon-fri")
        begin, end = DAYS.index(first), DAYS.index(last or first)
        found |= {day % 7 for day in range(begin, end + 1 if end >= begin else end + 8)}
    return tuple(sorted(found))


class Rollout(Document, frozen=True, kw_only=True):
    """A staged change under way: devices in `groups`, or whose slot is below `permille`, should run `release`; the rest stay."""

    id: str
    release: int
    previous: int | None
    groups: tuple[str, ...] = ()
    permille: int = 0
    group_permille: dict[str, int] = {}
    """Of these groups only the devices are reached whose slot is below the number; of the others every one."""
    mode: Mode = "install"
    window: Window | None = None
    team: str | None = None
    """The name of the team that the release switches with. Devices are chosen by it, so that a wave reaches the same ones for every member."""

    def __post_init__(self) -> None:
        names.check(names.GROUP_NAME, self.id, "rollout id")
        if not 0 <= self.permille <= EVERYONE:
            raise ValueError(f"permille {self.permille} must be from 0 to {EVERYONE}")
        for group, permille in self.group_permille.items():
            if not 0 <= permille <= EVERYONE:
                raise ValueError(f"group_permille of {group!r}: {permille} must be from 0 to {EVERYONE}")


class Exclusion(Document, frozen=True, kw_only=True):
    """Devices of one hardware class (`hardware_class`) do not run `release`; they run `instead`, when it is not None."""

    release: int
    hardware: str
    instead: int | None = None


class ModelAssignment(Document, frozen=True, kw_only=True):
    """`release` is what every device runs that no rollout reaches; None when the model has none yet. Nobody may run a withdrawn one."""

    release: int | None = None
    rollout: Rollout | None = None
    withdrawn: tuple[int, ...] = ()
    excluded: tuple[Exclusion, ...] = ()


class Assignment(Document, frozen=True, kw_only=True):
    """What the fleet should run. `version` only grows; a device refuses a lower one than it has seen."""

    fleet: str
    version: int
    models: dict[str, ModelAssignment]
    teams: dict[str, dict[str, int]] = {}
    """Releases that switch together, all of them or none: the team's name → model → release. A model is in one team at most."""
    addresses: Addresses | None = None
    """Where devices reach the fleet server; None of a server that does not say."""
    authorities: Authorities | None = None
    """The CAs that vouch for the fleet server; None of a server that never replaced its CA."""
    kind: Literal["assignment"] = "assignment"
    format: int = FORMAT

    def __post_init__(self) -> None:
        require_format(self.format, "assignment")
        for model in self.models:
            names.check_model(model)
        for members in self.teams.values():
            for model in members:
                names.check_model(model)


FORMER_KEYS = {"together": "team"}
"""Keys of documents that were signed before → what a rollout calls them now. A whole assignment has them in the plural."""


def read_assignment(data: bytes, *, limit_bytes: int = MAX_ASSIGNMENT_BYTES) -> Assignment:
    """The assignment in `data`, which may have been signed when teams had another key.

    Raises: ContractError when it breaks a rule; its kind Unreadable when it is larger than `limit_bytes` or is not JSON.
    """
    if len(data) <= limit_bytes and has_former_keys(data):
        raw = decode(data, dict[str, Any], limit_bytes=limit_bytes)
        return decode(msgspec.json.encode(with_present_keys(raw)), Assignment, limit_bytes=2 * limit_bytes)
    return decode(data, Assignment, limit_bytes=limit_bytes)


def has_former_keys(data: bytes) -> bool:
    """Whether some key in the JSON document `data` may be a former one."""
    return any(f'"{former}"'.encode() in data for former in FORMER_KEYS)


def with_present_keys(raw: dict[str, Any]) -> dict[str, Any]:
    """An assignment as JSON gives it, with the keys that are used now."""
    models = raw.get("models")
    for model in models.values() if isinstance(models, dict) else ():
        rollout = model.get("rollout") if isinstance(model, dict) else None
        if isinstance(rollout, dict):
            model["rollout"] = {FORMER_KEYS.get(key, key): value for key, value in rollout.items()}
    return {f"{FORMER_KEYS[key]}s" if key in FORMER_KEYS else key: value for key, value in raw.items()}


class DeviceRecord(Document, frozen=True, kw_only=True):
    """What the fleet knows of one device, for that device alone. `serial` only grows; times are seconds since the epoch, UTC."""

    fleet: str
    device: str
    serial: int
    groups: tuple[str, ...]
    issued: float
    expires: float
    labels: dict[str, str] = {}
    kind: Literal["device-record"] = "device-record"
    format: int = FORMAT

    def __post_init__(self) -> None:
        require_format(self.format, "device record")
        names.check(names.DEVICE_ID, self.device, "device id")


class Wanted(msgspec.Struct, frozen=True):
    """What a device should do about one model. `release` None: stop serving it. `rollout` None: nothing staged reaches this device."""

    release: int | None
    mode: Mode = "install"
    rollout: str | None = None
    window: Window | None = None


def slot(rollout_id: str, device: str) -> int:
    """The device's place among 1000 for this rollout, different in each rollout so that no device is always first."""
    digest = hashlib.sha256(f"{rollout_id}\0{device}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % EVERYONE


def reaches(rollout: Rollout, device: str, groups: Collection[str]) -> bool:
    """Whether the rollout reaches the device by now."""
    shares = [rollout.group_permille.get(group, EVERYONE) for group in rollout.groups if group in groups]
    share = max(rollout.permille, *shares) if shares else rollout.permille
    return share >= EVERYONE or slot(rollout.team or rollout.id, device) < share


def wanted(models: ModelAssignment, device: str, groups: Collection[str], hardware: str = "") -> Wanted:
    """What `device` should run of the model. A release that is withdrawn, or from which the device's hardware class is excluded, is never
    wanted; then the one before it is, under the same condition.
    """
    rollout = models.rollout
    exclusions = [exclusion for exclusion in models.excluded if exclusion.hardware == hardware]
    never = {*models.withdrawn, *(exclusion.release for exclusion in exclusions)}
    if rollout and rollout.release not in never and reaches(rollout, device, groups):
        return Wanted(rollout.release, rollout.mode, rollout.id, rollout.window)
    instead = [exclusion.instead for exclusion in exclusions]
    for release in (models.release, rollout.previous if rollout else None, *instead):
        if release is not None and release not in never:
            return Wanted(release)
    return Wanted(None)
