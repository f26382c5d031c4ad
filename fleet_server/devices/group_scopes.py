"""Which devices a group with a scope is for, by what the fleet server knows of them. Pure.

Rules:
 1. A scope is conditions, all of which a device must meet, as that of a rollout is (`agent.contract.scopes`): labels and named devices.
 2. A hardware class may have `*` for a part of it, or for the rest of a part: `class:aarch64/*/cuda`.
 3. `agent:` names versions of the device's software, of which any will do; `*` stands for the rest: `agent:0.4.*`.
 4. No group is made of groups: a device's groups never depend on the order in which they are looked at.

Devices are told the groups that come of it, so nothing of this stands in a signed document.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterable, Mapping

import msgspec

from agent.contract.scopes import MAX_CONDITIONS, Identity, Scope, meets, scope_of

EXAMPLES = "label:site=berlin,site=paris, class:aarch64/*/cuda, agent:0.4.* or device:crane-1,crane-2"
ANY = "*"
MAX_VERSIONS = 100
_VERSION = re.compile(r"[A-Za-z0-9.+*_-]{1,64}")


class Known(msgspec.Struct, frozen=True):
    """What decides of a device which groups it is in. `hardware`: its class; both are empty as long as it has not said so."""

    device: str
    labels: Mapping[str, str]
    hardware: str
    agent_version: str


class GroupScope(msgspec.Struct, frozen=True):
    """Conditions that a device must meet, all of them. `texts`: as they are written, in order."""

    texts: tuple[str, ...]
    same: Scope
    classes: tuple[tuple[str, str, str], ...]
    versions: tuple[tuple[str, ...], ...]

    def __str__(self) -> str:
        return " and ".join(self.texts)

    def is_met_by(self, known: Known) -> bool:
        """Whether the device is in the group."""
        if not meets(self.same, Identity(known.device, labels=known.labels)):
            return False
        if any(not _fits(wanted, known.hardware) for wanted in self.classes):
            return False
        return all(any(matches(one, known.agent_version) for one in values) for values in self.versions)


def read(texts: Iterable[str]) -> GroupScope:
    """The scope that these conditions describe.  Raises: ValueError with the expected spelling."""
    return _read(tuple(sorted({text.strip() for text in texts})))


@functools.lru_cache(maxsize=1024)
def _read(texts: tuple[str, ...]) -> GroupScope:
    if not 1 <= len(texts) <= MAX_CONDITIONS:
        raise ValueError(f"a group's scope has from 1 to {MAX_CONDITIONS} conditions, such as {EXAMPLES}; not {len(texts)}")
    kinds = {text: text.partition(":")[0] for text in texts}
    if any(kind == "group" for kind in kinds.values()):
        raise ValueError(f"a group is not made of groups; name what its devices have in common: {EXAMPLES}")
    versions = tuple(_versions(text) for text in texts if kinds[text] == "agent")
    classes = tuple(_class(text) for text in texts if kinds[text] == "class")
    try:
        same = scope_of(text for text in texts if kinds[text] not in {"agent", "class"})
    except ValueError as error:
        raise ValueError(str(error) if " is none of " not in str(error) else f"no group's scope: {error}") from error
    return GroupScope(_written(same, classes, versions), same, classes, versions)


def _written(same: Scope, classes: Collection[tuple[str, str, str]], versions: Collection[tuple[str, ...]]) -> tuple[str, ...]:
    found = [f"{one.kind}:{','.join(one.values)}" for one in same]
    found += [f"class:{'/'.join(one)}" for one in classes]
    return (*found, *(f"agent:{','.join(one)}" for one in versions))


def _versions(text: str) -> tuple[str, ...]:
    values = tuple(sorted({value.strip() for value in text.partition(":")[2].split(",")}))
    if len(values) > MAX_VERSIONS or any(not _VERSION.fullmatch(value) for value in values):
        raise ValueError(f"{text!r} names no versions of the devices' software, such as agent:0.4.* or agent:0.4.1,0.4.2")
    return values


def _class(text: str) -> tuple[str, str, str]:
    parts = _parts(text.partition(":")[2])
    if "" in parts or not text.isprintable():
        raise ValueError(
            f"{text!r} names no hardware class ARCHITECTURE/MACHINE/ACCELERATOR, in which {ANY} is anything: class:aarch64/*/cuda; `edge-fleet "
            "device list --json` has what devices say of theirs"
        )
    return parts


def _parts(text: str) -> tuple[str, str, str]:
    """Processor, machine and accelerator of a hardware class; the machine alone may have slashes of its own."""
    arch, _, rest = text.partition("/")
    machine, _, accelerator = rest.rpartition("/")
    return arch, machine, accelerator


def _fits(wanted: tuple[str, str, str], hardware: str) -> bool:
    if not hardware:
        return False  # nobody knows yet what it is
    return all(matches(pattern, part) for pattern, part in zip(wanted, _parts(hardware), strict=True))


def matches(pattern: str, text: str) -> bool:
    """Whether the text is the pattern, in which `*` stands for any characters. The time it takes grows with the text alone, whatever a
    device says.
    """
    first, *rest = pattern.split(ANY)
    if not rest:
        return text == first
    if not text or not text.startswith(first):
        return False
    *middle, last = rest
    at = len(first)
    for part in middle:
        found = text.find(part, at)
        if found < 0:
            return False
        at = found + len(part)
    return len(text) - at >= len(last) and text.endswith(last)
