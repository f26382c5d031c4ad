"""Which release a device should run. Both sides compute it with the functions here, so they cannot disagree.

The assignment is one TUF target per fleet (`assignments/fleet.json`), signed online; its size grows with the number of models
and rules, never with the number of devices. What groups a device is in stands in its own record, signed by the same key.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType
from typing import Any, Literal

import msgspec

from agent.contract import names
from agent.contract.addresses import Addresses
from agent.contract.authorities import Authorities
from agent.contract.codec import FORMAT, Document, decode, require_format
from agent.contract.scopes import EVERYBODY, Identity, Scope, checked, meets

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

NEWEST_FORMAT = 2
"""Of an assignment with something that an agent of format 1 would pass over, and then run what was not meant for it; see `format_of`."""

MAX_KEPT = 8
MAX_RULES = 100
MAX_RETRIES = 32

NO_LABELS: Mapping[str, str] = MappingProxyType({})

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


class Reach(Document, frozen=True, kw_only=True):
    """The devices that the rollout `id` has come to: those in `groups`, and those whose slot is below `permille`."""

    id: str
    release: int
    groups: tuple[str, ...] = ()
    permille: int = 0
    group_permille: dict[str, int] = {}
    """Of these groups only the devices are reached whose slot is below the number; of the others every one."""
    team: str | None = None
    """The name of the team that the release switches with. Devices are chosen by it, so that a wave reaches the same ones for every member."""

    def __post_init__(self) -> None:
        names.check(names.GROUP_NAME, self.id, "rollout id")
        if not 0 <= self.permille <= EVERYONE:
            raise ValueError(f"permille {self.permille} must be from 0 to {EVERYONE}")
        for group, permille in self.group_permille.items():
            if not 0 <= permille <= EVERYONE:
                raise ValueError(f"group_permille of {group!r}: {permille} must be from 0 to {EVERYONE}")


class Rollout(Reach, frozen=True, kw_only=True):
    """A staged change under way: the devices that it has come to should run `release`; the rest stay.

    `attempt`: a device that refused the release in an earlier attempt, or before attempts were counted, tries it again; numbers only
    grow. `kept`: the rollouts that this one superseded, the latest first. A device that one of them had reached goes on with its release
    until this one reaches the device, and so does not go back in between.
    """

    previous: int | None
    mode: Mode = "install"
    window: Window | None = None
    attempt: int = 0
    kept: tuple[Reach, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.kept) > MAX_KEPT:
            raise ValueError(f"a rollout may have superseded {MAX_KEPT} others, not {len(self.kept)}")


class Exclusion(Document, frozen=True, kw_only=True):
    """Devices of one hardware class (`hardware_class`) do not run `release`; they run `instead`, when it is not None."""

    release: int
    hardware: str
    instead: int | None = None


class Rule(Document, frozen=True, kw_only=True):
    """Devices in `scope` run `release`, but for those that the `rollout` reaches. `release` None: nothing was brought to all of them yet, and
    those that the rollout does not reach follow the next rule.
    """

    scope: Scope
    release: int | None = None
    rollout: Rollout | None = None

    def __post_init__(self) -> None:
        checked(self.scope)


class ModelAssignment(Document, frozen=True, kw_only=True):
    """A device follows the first of `rules` whose scope it is in, else what is for everyone: it runs `release` (None when the model has none
    yet), but for those that the `rollout` reaches. Nobody may run a withdrawn release.
    """

    release: int | None = None
    rollout: Rollout | None = None
    withdrawn: tuple[int, ...] = ()
    excluded: tuple[Exclusion, ...] = ()
    rules: tuple[Rule, ...] = ()

    def __post_init__(self) -> None:
        if len(self.rules) > MAX_RULES:
            raise ValueError(f"a model has at most {MAX_RULES} rules, not {len(self.rules)}")

    def all_rules(self) -> tuple[Rule, ...]:
        """The rules in the order in which they are looked at; the last one is everyone's."""
        return (*self.rules, Rule(scope=EVERYBODY, release=self.release, rollout=self.rollout))

    def named(self) -> set[int]:
        """The releases that some device may be told to run by a rule or a rollout."""
        found = {rule.release for rule in self.all_rules()}
        for rollout in self.rollouts():
            found |= {rollout.release, *(kept.release for kept in rollout.kept)}
        return {release for release in found if release is not None}

    def rollouts(self) -> tuple[Rollout, ...]:
        """The rollouts of the model that are under way."""
        return tuple(rule.rollout for rule in self.all_rules() if rule.rollout is not None)


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
        require_format(self.format, "assignment", NEWEST_FORMAT)
        for model in self.models:
            names.check_model(model)
        for members in self.teams.values():
            for model in members:
                names.check_model(model)


def format_of(models: Iterable[ModelAssignment]) -> int:
    """The format that an assignment with these models has: the lowest whose readers do what it says. So devices with older software
    follow the fleet until something is used that they do not know; then they refuse it, say so, and run on what they have.
    """
    newer = any(one.rules or any(rollout.kept for rollout in one.rollouts()) for one in models)
    return NEWEST_FORMAT if newer else FORMAT


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


class Retry(Document, frozen=True, kw_only=True):
    """The device tries a release again that it refused in an attempt with a lower number."""

    model: str
    release: int
    attempt: int


class DeviceRecord(Document, frozen=True, kw_only=True):
    """What the fleet knows of one device, for that device alone. `serial` only grows; times are seconds since the epoch, UTC."""

    fleet: str
    device: str
    serial: int
    groups: tuple[str, ...]
    issued: float
    expires: float
    labels: dict[str, str] = {}
    retries: tuple[Retry, ...] = ()
    kind: Literal["device-record"] = "device-record"
    format: int = FORMAT

    def __post_init__(self) -> None:
        require_format(self.format, "device record")
        names.check(names.DEVICE_ID, self.device, "device id")

    def attempt(self, model: str, release: int | None) -> int:
        """The last attempt at a release that this device alone was told to make; 0 when it was told of none."""
        return max((one.attempt for one in self.retries if (one.model, one.release) == (model, release)), default=0)


class Wanted(msgspec.Struct, frozen=True):
    """What a device should do about one model. `release` None: stop serving it. `rollout` None: nothing staged reaches this device."""

    release: int | None
    mode: Mode = "install"
    rollout: str | None = None
    window: Window | None = None
    attempt: int = 0
    """What was refused here in an attempt with a lower number is tried again."""


def slot(rollout_id: str, device: str) -> int:
    """The device's place among 1000 for this rollout, different in each rollout so that no device is always first."""
    digest = hashlib.sha256(f"{rollout_id}\0{device}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % EVERYONE


def reaches(rollout: Reach, device: str, groups: Collection[str]) -> bool:
    """Whether the rollout has come to the device by now."""
    shares = [rollout.group_permille.get(group, EVERYONE) for group in rollout.groups if group in groups]
    share = max(rollout.permille, *shares) if shares else rollout.permille
    return share >= EVERYONE or slot(rollout.team or rollout.id, device) < share


def wanted(
    models: ModelAssignment, device: str, groups: Collection[str], hardware: str = "", labels: Mapping[str, str] = NO_LABELS
) -> Wanted:
    """What `device` should run of the model. A release that is withdrawn, or from which the device's hardware class is excluded, is never
    wanted; then the one before it is, under the same condition.
    """
    exclusions = [exclusion for exclusion in models.excluded if exclusion.hardware == hardware]
    never = {*models.withdrawn, *(exclusion.release for exclusion in exclusions)}
    identity = Identity(device, groups, labels, hardware)
    for rule in models.all_rules():
        if not meets(rule.scope, identity):
            continue
        if (found := _by_rollout(rule.rollout, device, groups, never)) is not None:
            return found
        if not rule.scope or rule.release is not None:
            for release in (rule.release, rule.rollout.previous if rule.rollout else None):
                if release is not None and release not in never:
                    return Wanted(release)
    for exclusion in exclusions:
        if exclusion.instead is not None and exclusion.instead not in never:
            return Wanted(exclusion.instead)
    return Wanted(None)


def _by_rollout(rollout: Rollout | None, device: str, groups: Collection[str], never: Collection[int]) -> Wanted | None:
    """What a device in the scope of the rollout runs because of it; None when it is not reached."""
    if rollout is None:
        return None
    if rollout.release not in never and reaches(rollout, device, groups):
        return Wanted(rollout.release, rollout.mode, rollout.id, rollout.window, rollout.attempt)
    for kept in rollout.kept:
        if kept.release not in never and reaches(kept, device, groups):
            return Wanted(kept.release, rollout=kept.id)
    return None
