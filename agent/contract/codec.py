"""Bytes to checked values and back. Every document that crosses the fleet link is decoded here, size first."""

from __future__ import annotations

import threading
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")

_making = threading.Lock()
_decoders: dict[Any, msgspec.json.Decoder[Any]] = {}

FORMAT = 1
"""The format number every document of this generation carries. A reader refuses a higher one."""


class ContractError(ValueError):
    """A document does not follow the contract; the message says where and what was expected."""


class Unreadable(ContractError):
    """Not even JSON of a bearable size: no rule of the contract was reached."""


class Document(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=False):
    """Base of every document: a value that is valid by construction. Unknown fields are ignored, so that
    a newer writer of the same format may say more; what changes meaning raises `FORMAT`.
    """


def decode(data: bytes | bytearray | memoryview | str, kind: type[T], *, limit_bytes: int) -> T:
    """The document of type `kind` in `data` (JSON, UTF-8).

    Raises: ContractError when `data` breaks a rule of `kind`; its kind Unreadable when it is larger than `limit_bytes` or is
    not JSON.
    """
    if len(data) > limit_bytes:
        raise Unreadable(f"document of {len(data)} bytes is larger than the {limit_bytes} bytes allowed")
    try:
        return decoder(kind).decode(data)
    except msgspec.ValidationError as error:
        raise ContractError(f"not a valid {kind.__name__}: {error}") from error
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise Unreadable(f"not a valid {kind.__name__}: {error}") from error


def decoder(kind: type[T]) -> msgspec.json.Decoder[T]:
    """The decoder of `kind`, made once.

    msgspec works out what a type looks like at its first use; a second thread that uses the type meanwhile takes the process
    down (seen with 0.22). So types are worked out under one lock, and whatever is decoded at run time goes through here or
    `convert`.
    """
    found = _decoders.get(kind)
    if found is None:
        with _making:
            found = _decoders[kind] = _decoders.get(kind) or msgspec.json.Decoder(kind)
    return found


def convert(value: object, kind: type[T], *, str_keys: bool = False) -> T:
    """`value`, of the types that JSON and YAML have, as a `kind`. `str_keys`: keys that are numbers are texts in it, as in JSON.

    Raises: msgspec.ValidationError.
    """
    decoder(kind)
    return msgspec.convert(value, kind, str_keys=str_keys)


def encode(document: object) -> bytes:
    """The canonical bytes of a document: JSON with sorted keys, so that equal documents have equal hashes."""
    return msgspec.json.encode(document, order="deterministic")


def require_format(number: int, what: str, newest: int = FORMAT) -> None:
    """Raises: ValueError when a document was written by a newer generation than this one reads. `newest`: the format that such documents
    have now.
    """
    if not FORMAT <= number <= newest:
        known = f"format {FORMAT}" if newest == FORMAT else f"formats {FORMAT} to {newest}"
        raise ValueError(f"{what} has format {number}; this version reads {known}: update the software")
