"""The parameters of requests and tensors, read and checked. The protocol leaves their names open: unknown ones are passed over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from agent.serving.answers import Refusal
from agent.serving.scheduling.demand import SequenceDemand
from runtimes.naming import SERVING_DEFAULT, Interface, Interfaces

MAX_PRIORITY = 2**32 - 1
MAX_SEQUENCE_ID = 2**64 - 1
MAX_SEQUENCE_TEXT = 128  # as long as Triton takes
MAX_TIMEOUT_US = 10**15  # thirty years
MAX_CLASSES = 2**31 - 1
MAX_SHOWN = 60

Value = bool | int | float | str | None
Parameters = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Place:
    """`size` bytes of a shared memory region, from `offset`."""

    region: str
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class OutputRule:
    """An output wanted otherwise than as its values: its best `classes`, or stored at `place`, or both."""

    classes: int
    place: Place | None


def check_reserved(parameters: Parameters) -> None:
    """Raises: Refusal (400)."""
    for key in parameters:
        if key.startswith("triton_"):
            raise Refusal(400, f"parameter {shown(key)} is reserved: names must not start with 'triton_'")


def timeout_of(parameters: Parameters) -> float | None:
    """Seconds; None when there is no limit.  Raises: Refusal (400)."""
    timeout = parameters.get("timeout")
    if timeout is None:
        return None
    if isinstance(timeout, bool) or not isinstance(timeout, int) or timeout < 0:
        raise Refusal(400, f"parameter 'timeout' is {shown(timeout)}; expected microseconds as a whole number")
    return min(timeout, MAX_TIMEOUT_US) / 1e6 if timeout else None


def priority_of(parameters: Parameters) -> int:
    """Raises: Refusal (400)."""
    priority = parameters.get("priority", 0)
    if isinstance(priority, bool) or not isinstance(priority, int) or not 0 <= priority <= MAX_PRIORITY:
        raise Refusal(400, f"parameter 'priority' is {shown(priority)}; expected a whole number, 1 being the highest")
    return priority


def sequence_of(parameters: Parameters) -> SequenceDemand | None:
    """None for a request of no sequence.  Raises: Refusal (400)."""
    number = parameters.get("sequence_id", 0)
    if isinstance(number, bool) or not isinstance(number, int | str):
        raise Refusal(400, f"parameter 'sequence_id' is {shown(number)}; expected a whole number or a string")
    if isinstance(number, int) and not 0 <= number <= MAX_SEQUENCE_ID:
        raise Refusal(400, f"parameter 'sequence_id' is {shown(number)}; expected a number from 0 to {MAX_SEQUENCE_ID}")
    if isinstance(number, str) and len(number) > MAX_SEQUENCE_TEXT:
        raise Refusal(400, f"parameter 'sequence_id' is longer than {MAX_SEQUENCE_TEXT} characters")
    start, end = flag(parameters, "sequence_start"), flag(parameters, "sequence_end")
    if number:
        return SequenceDemand(number, start, end)
    return None


def interface_of(parameters: Parameters, interfaces: Interfaces, model: str) -> Interface:
    """What the names of a request are to mean.  Raises: Refusal (400) when it names a signature that is not there."""
    name = parameters.get("signature_name", "")
    if not isinstance(name, str):
        raise Refusal(400, f"parameter 'signature_name' is {shown(name)}; expected a string")
    try:
        return interfaces.find(name)
    except KeyError:
        known = ", ".join(f"'{signature}'" for signature in interfaces.signatures) or f"'{SERVING_DEFAULT}'"
        raise Refusal(400, f"signature {shown(name)} is not one of model '{model}'; it has {known}") from None


def place_of(parameters: Parameters, tensor: str) -> Place | None:
    """Where the tensor lies in shared memory; None when it does not.  Raises: Refusal (400)."""
    if "shared_memory_region" not in parameters:
        return None
    region = parameters["shared_memory_region"]
    if not isinstance(region, str):
        raise Refusal(400, f"shared_memory_region of '{tensor}' is {shown(region)}; expected a name")
    if "shared_memory_byte_size" not in parameters:
        raise Refusal(400, f"'{tensor}' names the shared memory region '{region}' and no shared_memory_byte_size")
    size = whole(parameters, "shared_memory_byte_size", tensor)
    return Place(region, whole(parameters, "shared_memory_offset", tensor), size)


def output_rule(parameters: Parameters, output: str) -> OutputRule | None:
    """None for an output wanted as its values, in the answer.  Raises: Refusal (400)."""
    if not parameters:
        return None
    classes, place = whole(parameters, "classification", output), place_of(parameters, output)
    if not classes and place is None:
        return None
    return OutputRule(min(classes, MAX_CLASSES), place)


def whole(parameters: Parameters, key: str, tensor: str) -> int:
    """A number of bytes or elements; 0 when it is not said.  Raises: Refusal (400)."""
    value = parameters.get(key, 0)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise Refusal(400, f"{key} of '{tensor}' is {shown(value)}; expected a whole number")
    return value


def flag(parameters: Parameters, key: str, *, default: bool = False) -> bool:
    """Raises: Refusal (400)."""
    value = parameters.get(key, default)
    if not isinstance(value, bool):
        raise Refusal(400, f"parameter {key!r} is {shown(value)}; expected true or false")
    return value


def shown(value: object) -> str:
    """For a message: `value` as its sender would recognize it, cut short."""
    text = repr(value) if not isinstance(value, int) or abs(value) < 2**64 else "a number beyond 64 bits"
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"
