"""Whom a rule is for: everyone, or the devices that meet all of some conditions. Pure, and the same on both sides.

Rules:
 1. A condition names values of one kind (groups, labels, hardware classes, devices); a device meets it by any of them.
 2. A scope is conditions, all of which must be met. Without conditions it is everyone.
 3. Of the rules of a model a device follows the first whose scope it meets. They stand in the order of `rank`: the most specific first.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Literal

import msgspec

from agent.contract import names
from agent.contract.codec import Document

Kind = Literal["device", "label", "group", "class"]
KINDS: tuple[Kind, ...] = ("device", "label", "group", "class")
"""The most specific kind first: of two scopes with as many conditions the one with an earlier kind goes first."""

MAX_CONDITIONS, MAX_VALUES, MAX_CLASS = 8, 100, 512
EXAMPLES = "group:canary, label:site=berlin, class:aarch64/-/- or device:crane-1,crane-2"
_LABEL = re.compile(rf"({names.LABEL_NAME.pattern})=({names.LABEL_VALUE.pattern})")
_PATTERNS = {"device": names.DEVICE_ID, "group": names.GROUP_NAME, "label": _LABEL}


class Condition(Document, frozen=True, kw_only=True):
    """Devices with any of `values`: ids, groups, labels (`site=berlin`) or hardware classes, in order and each once."""

    kind: Kind
    values: tuple[str, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.values) <= MAX_VALUES:
            raise ValueError(
                f"a scope names from 1 to {MAX_VALUES} {self.kind} values in one condition, not {len(self.values)}"
            )
        if list(self.values) != sorted(set(self.values)):
            raise ValueError(f"the {self.kind} values of a scope stand in order, each once")
        for value in self.values:
            pattern = _PATTERNS.get(self.kind)
            if pattern is not None:
                names.check(pattern, value, self.kind)
            elif not value or len(value) > MAX_CLASS or not value.isprintable():
                raise ValueError(f"hardware class {value!r} is not allowed: at most {MAX_CLASS} printable characters")


Scope = tuple[Condition, ...]
EVERYBODY: Scope = ()


class Identity(msgspec.Struct, frozen=True):
    """What of a device decides which rule it follows."""

    device: str
    groups: Collection[str] = ()
    labels: Mapping[str, str] = {}
    hardware: str = ""


def scope_of(texts: Iterable[str]) -> Scope:
    """The scope that `group:canary,beta` and the like describe: each text a condition, with commas between its values. A hardware class may
    have commas of its own, so there is one in a text.

    Raises: ValueError with the expected spelling.
    """
    found = []
    for text in texts:
        kind, colon, said = text.strip().partition(":")
        if kind not in KINDS or not colon or not said:
            raise ValueError(f"scope {text!r} is none of {EXAMPLES}")
        values = [said] if kind == "class" else [value.strip() for value in said.split(",")]
        found.append(Condition(kind=kind, values=tuple(sorted(set(values)))))
    return checked(tuple(sorted(set(found), key=_place)))


def checked(scope: Scope) -> Scope:
    """The scope itself.  Raises: ValueError when it has too many conditions, or they do not stand in order."""
    if len(scope) > MAX_CONDITIONS:
        raise ValueError(f"a scope has at most {MAX_CONDITIONS} conditions, not {len(scope)}")
    if list(scope) != sorted(set(scope), key=_place):
        raise ValueError("the conditions of a scope stand in order, each once")
    return scope


def _place(condition: Condition) -> tuple[int, tuple[str, ...]]:
    return KINDS.index(condition.kind), condition.values


def text_of(scope: Scope) -> str:
    """`group:canary and label:site=berlin`, or `everyone`."""
    return " and ".join(f"{one.kind}:{','.join(one.values)}" for one in scope) or "everyone"


def meets(scope: Scope, identity: Identity) -> bool:
    """Whether the device is in the scope."""
    return all(_meets(condition, identity) for condition in scope)


def _meets(condition: Condition, identity: Identity) -> bool:
    match condition.kind:
        case "device":
            return identity.device in condition.values
        case "group":
            return any(group in condition.values for group in identity.groups)
        case "label":
            return any(f"{name}={value}" in condition.values for name, value in identity.labels.items())
        case _:
            return identity.hardware in condition.values


def rank(scope: Scope) -> tuple[int, int, tuple[tuple[int, tuple[str, ...]], ...]]:
    """What rules are sorted by: more conditions first, then by kind (devices, labels, groups, hardware classes), then by the alphabet."""
    places = tuple(_place(one) for one in scope)
    return (0 if scope and scope[0].kind == "device" else 1, -len(scope), places)


def depends_on_hardware(scopes: Iterable[Scope]) -> bool:
    """Whether one must know a device's hardware class to say whether it is in one of them."""
    return any(condition.kind == "class" for scope in scopes for condition in scope)


def never_meet(one: Scope, other: Scope) -> bool:
    """Whether no device can ever be in both: they ask for different ids, hardware classes, or values of one label."""
    return any(_exclude(mine, theirs) for mine in one for theirs in other)


def _exclude(one: Condition, other: Condition) -> bool:
    if one.kind != other.kind or one.kind == "group" or set(one.values) & set(other.values):
        return False
    return one.kind != "label" or len(_label_names((one, other))) == 1


def _label_names(conditions: Sequence[Condition]) -> set[str]:
    return {value.partition("=")[0] for condition in conditions for value in condition.values}


def is_within(inner: Scope, outer: Scope) -> bool:
    """Whether every device of `inner` is in `outer`, whatever devices there are."""
    return all(any(c.kind == o.kind and set(c.values) <= set(o.values) for c in inner) for o in outer)
