"""JSON lists as arrays: the declared datatype decides what each value has to be, whatever the others are.

What is short is read whole. A long list is read in pieces straight into its array, so that it takes no more memory than that
and keeps the interpreter's lock for no longer than a piece. Numbers may be NaN, Infinity and -Infinity, as Python, Triton and
TensorFlow Serving write them, and null, which is what JavaScript makes of all three: it is NaN.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Sequence
from functools import cache
from typing import Annotated, Any, NoReturn

import msgspec
import numpy as np

from agent.contract.codec import decoder
from agent.serving.allowance import Allowance
from agent.serving.answers import Refusal
from agent.serving.api import list_pieces
from agent.serving.api.pauses import Pauses
from agent.serving.buffers import aligned, empty
from runtimes.check import shape_text
from runtimes.contract import DTYPES, Array

SHORT_BYTES = 16 * 1024
MAX_RANK = 32  # NumPy 1 counts no further
HEAD_BYTES = 4096  # in which a long list has come to its first element
LARGEST = {"f": float(np.finfo(np.float32).max), "e": float(np.finfo(np.float16).max)}
_WHITE = b" \t\r\n"


class Encoded(msgspec.Struct, forbid_unknown_fields=True):
    """How TensorFlow Serving's clients write bytes that are no text."""

    b64: str


def read(
    name: str,
    text: bytes | memoryview,
    datatype: str,
    shape: tuple[int, ...] | None,
    *,
    encoded: bool = False,
    allowance: Allowance | None = None,
) -> Array:
    """The array in the JSON `text`: a flat list, or nested as `shape` says; without a shape it is what the nesting says.
    `encoded`: BYTES may be `{"b64": …}`. BF16 is rounded to.  Raises: Refusal (400; 413, 503 where it takes too much memory).
    """
    reader = _Reader(name, datatype, encoded=encoded)
    if len(text) <= SHORT_BYTES:
        return reader.short(bytes(text), shape)
    return reader.long(memoryview(text), shape, allowance or Allowance(body_bytes=len(text)))


class _Reader:
    def __init__(self, name: str, datatype: str, *, encoded: bool) -> None:
        self._name = name
        self._datatype = datatype
        self._encoded = encoded
        self._dtype = DTYPES[datatype]

    # -- short lists
    # ---------------------------------------------------------------------------------------------------------------

    def short(self, text: bytes, shape: tuple[int, ...] | None) -> Array:
        rank = _rank(text)
        if rank > MAX_RANK:
            self._irregular(shape)
        values = self._values(text, rank)
        array, found = self._made(values, rank, shape)
        if shape is None:
            shape = found
        elif array.size != math.prod(shape):
            self._count(array.size, shape)
        elif rank > 1 and found != _nested(shape):
            raise Refusal(
                400, f"the data of input '{self._name}' has shape {shape_text(found)}, but {shape_text(shape)} is said"
            )
        return array.reshape(shape) if array.dtype == object else aligned(array.reshape(shape))

    def _made(self, values: Any, rank: int, shape: tuple[int, ...] | None) -> tuple[Array, tuple[int, ...]]:
        """The array of lists nested so deep, and the shape that they have.  Raises: Refusal (400)."""
        if rank < 2:
            return self._array(values if rank else [values]), (len(values),) if rank else ()
        if self._datatype != "BYTES":
            try:
                array = self._array(values)
            except ValueError:
                self._irregular(shape)
            return array, array.shape
        found = _shape(values, rank)
        if found is None:
            self._irregular(shape)
        for _ in range(rank - 1):
            values = [value for row in values for value in row]
        return self._array(values), found

    def _values(self, text: bytes | memoryview, rank: int) -> Any:
        """The value, or lists of values nested `rank` deep.  Raises: Refusal."""
        try:
            return _decoder(self._datatype, rank, encoded=self._encoded).decode(text)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            return self._slowly(text, rank, error)

    def _slowly(self, text: bytes | memoryview, rank: int, error: Exception) -> Any:
        """Reads a list that the fast reader refused: most such lists are refused here as well, with words that say why."""
        try:
            values = json.loads(bytes(text).decode(), parse_float=_finite)
        except OverflowError:
            self._out_of_range()
        except (ValueError, RecursionError) as reason:
            shown = error if isinstance(error, UnicodeDecodeError) or not isinstance(reason, UnicodeDecodeError) else reason
            raise Refusal(400, f"the data of input '{self._name}' cannot be read: {shown}") from reason
        return self._leaves(values, rank)

    def _leaves(self, values: Any, rank: int) -> Any:
        if isinstance(values, list) != (rank > 0):
            self._irregular(None)
        return [self._leaves(value, rank - 1) for value in values] if rank else self._leaf(values)

    def _leaf(self, value: object) -> Any:  # noqa: RET503 - what refuses does not return
        kind = self._dtype.kind if self._datatype != "BF16" else "f"
        plain = isinstance(value, int) and not isinstance(value, bool)
        if kind == "f":
            if value is None:
                return math.nan
            if isinstance(value, float) or plain:
                try:
                    return float(value)  # type: ignore[arg-type]
                except OverflowError:
                    self._out_of_range()
        elif kind == "b":
            if isinstance(value, bool) or (plain and value in (0, 1)):
                return bool(value)
        elif kind == "O":
            if isinstance(value, str):
                return value
            if self._encoded and isinstance(value, dict) and set(value) == {"b64"} and isinstance(value["b64"], str):
                return Encoded(value["b64"])
        elif plain:
            limits = np.iinfo(self._dtype)
            if limits.min <= value <= limits.max:  # type: ignore[operator]
                return value
            self._out_of_range()
        self._misfit()

    def _array(self, flat: Sequence[Any]) -> Array:
        """The array of values that were checked; numbers may be in lists of lists.

        Raises: Refusal (400) where a number is too large for the datatype, ValueError where lists are not regular.
        """
        if self._datatype == "BYTES":
            array: Array = np.empty(len(flat), np.object_)
            array[:] = [self._bytes(value) for value in flat]
            return array
        if self._datatype == "BF16":
            return rounded(self._floats(flat, np.dtype(np.float32)))
        if self._dtype.kind == "f":
            return self._floats(flat, self._dtype)
        try:
            return np.array(flat, self._dtype)
        except OverflowError:
            self._out_of_range()

    def _floats(self, flat: Sequence[float], dtype: np.dtype[Any]) -> Array:
        exact = np.array(flat, np.float64)
        if dtype == np.float64:
            return exact
        if not (np.abs(exact) <= LARGEST[dtype.char]).all():  # also where there is NaN or an infinity
            finite = np.abs(exact[np.isfinite(exact)])
            with np.errstate(over="ignore"):
                if np.isinf(finite.astype(dtype)).any():
                    self._out_of_range()
        return exact.astype(dtype)

    def _bytes(self, value: Any) -> bytes:
        try:
            if isinstance(value, str):
                return value.encode()
            return base64.b64decode(value.b64, validate=True)
        except UnicodeEncodeError:
            raise Refusal(400, f"the data of input '{self._name}' has half of a surrogate pair, which is no text") from None
        except ValueError as error:
            raise Refusal(400, f"the data of input '{self._name}' is not base64: {error}") from error

    # -- long lists
    # ----------------------------------------------------------------------------------------------------------------

    def long(self, text: memoryview, shape: tuple[int, ...] | None, allowance: Allowance) -> Array:
        pauses = Pauses()
        rank = _rank(bytes(text[:HEAD_BYTES]))
        if rank > MAX_RANK:
            self._irregular(shape)
        if rank == 0:  # one long text, or nothing that is read
            allowance.elements(1, 2 * len(text), f"input '{self._name}'")
            array = self._array([self._values(text, 0)])
            if shape is not None and math.prod(shape) != 1:
                self._count(1, shape)
            return array.reshape(shape or ())
        if shape is None:
            shape = list_pieces.shape_of(text, pauses) or self._irregular(None)
        found = shape if rank > 1 else (math.prod(shape),)
        if rank != len(_nested(found)):
            self._irregular(shape)
        count = math.prod(found)
        if not count:
            return self._empty(text, shape, pauses)
        if 2 * count > len(text) + 1:
            raise Refusal(400, f"input '{self._name}' has fewer elements than shape {shape_text(shape)}, which needs {count}")
        if self._datatype == "BYTES":
            allowance.elements(count, len(text), f"input '{self._name}'")
            array = np.empty(count, np.object_)
        else:
            allowance.reserve(count * self._dtype.itemsize, f"input '{self._name}'")
            array = empty(count * self._dtype.itemsize).view(self._dtype)
        self._read_into(array, text, found, pauses, shape)
        return array.reshape(shape)

    def _read_into(
        self, array: Array, text: memoryview, found: tuple[int, ...], pauses: Pauses, shape: tuple[int, ...]
    ) -> None:
        form, at = list_pieces.Form(found), 0
        for piece in list_pieces.pieces(text, pauses):
            if not form.fits(piece.outline):
                if form.commas >= len(array):
                    self._too_many(shape)
                self._irregular(shape)
            inner = list_pieces.without_brackets(piece)
            values = [self._values(inner, 0)] if piece.lone else self._values(b"".join((b"[", inner, b"]")), 1)
            if at + len(values) > len(array):
                self._too_many(shape)
            array[at : at + len(values)] = self._array(values)
            at += len(values)
        if at != len(array):
            self._count(at, shape)
        if not form.ended():
            self._irregular(shape)

    def _empty(self, text: memoryview, shape: tuple[int, ...], pauses: Pauses) -> Array:
        """The array of a long text without elements, such as [[],[],…]. Its innermost lists are counted as elements."""
        rows = _nested(shape)[:-1]
        form = list_pieces.Form(rows)
        for piece in list_pieces.pieces(text, pauses):
            tight = piece.outline.translate(None, b" ")
            if b"0" in tight:
                self._too_many(shape)
            tight = tight.replace(b"[]", b"0")
            flat = tight.translate(None, b"[]")
            if flat.rstrip(b",") + b"," != b"0," * (len(flat) - len(flat) // 2) or not form.fits(tight):
                self._irregular(shape)
        if not rows or not form.ended():
            self._irregular(shape)
        return np.empty(shape, self._dtype)

    # -- what is refused
    # -----------------------------------------------------------------------------------------------------------

    def _count(self, count: int, shape: tuple[int, ...]) -> NoReturn:
        raise Refusal(400, f"input '{self._name}' has {count} elements, shape {shape_text(shape)} needs {math.prod(shape)}")

    def _too_many(self, shape: tuple[int, ...]) -> NoReturn:
        raise Refusal(
            400, f"input '{self._name}' has more elements than shape {shape_text(shape)}, which needs {math.prod(shape)}"
        )

    def _irregular(self, shape: tuple[int, ...] | None) -> NoReturn:
        what = f"for shape {shape_text(shape)}" if shape is not None else f"of at most {MAX_RANK} dimensions"
        raise Refusal(400, f"the data of input '{self._name}' is not a regular list {what}")

    def _misfit(self) -> NoReturn:
        kind = self._dtype.kind
        expected = {"b": "true or false, or 1 or 0", "O": 'strings or {"b64": …}' if self._encoded else "strings"}.get(kind)
        if expected is None:
            expected = "whole numbers without a decimal point" if kind in "iu" and self._datatype != "BF16" else "numbers"
        raise Refusal(400, f"the data of input '{self._name}' does not fit {self._datatype}: expected {expected}")

    def _out_of_range(self) -> NoReturn:
        if self._dtype.kind in "bO":  # no number fits, however large
            self._misfit()
        if self._dtype.kind in "iu" and self._datatype != "BF16":
            limits = np.iinfo(self._dtype)
            expected = f"whole numbers from {limits.min} to {limits.max}"
        else:
            expected = f"numbers up to {np.finfo(np.float32 if self._datatype == 'BF16' else self._dtype).max:g}"
        raise Refusal(400, f"the data of input '{self._name}' does not fit {self._datatype}: expected {expected}")


@cache
def _decoder(datatype: str, rank: int, *, encoded: bool) -> Any:
    dtype = DTYPES[datatype]
    kind: Any = float
    if datatype == "BYTES":
        kind = str | Encoded if encoded else str
    elif dtype.kind == "b":
        kind = bool
    elif dtype.kind in "iu" and datatype != "BF16":
        limits = np.iinfo(dtype)
        # 64 bits without a sign go beyond what a limit may be here; NumPy raises for what is too large
        limit = msgspec.Meta(ge=0) if datatype == "UINT64" else msgspec.Meta(ge=int(limits.min), le=int(limits.max))
        kind = Annotated[int, limit]
    for _ in range(rank):
        kind = list[kind]
    return decoder(kind)


def _finite(text: str) -> float:
    """Raises: OverflowError for a number that only Infinity could stand for."""
    value = float(text)
    if math.isinf(value):
        raise OverflowError
    return value


def _rank(text: bytes) -> int:
    """How many lists the first element is in, or the first list without elements."""
    rank = 0
    for code in text:
        if code == list_pieces.OPEN:
            rank += 1
        elif code not in _WHITE:
            break
    return rank


def _shape(values: Any, rank: int) -> tuple[int, ...] | None:
    """The shape of lists that are nested `rank` deep; None when they are not regular."""
    sizes, level = [len(values)], values
    for _ in range(rank - 1):
        size = len(level[0]) if level else 0
        if any(len(row) != size for row in level):
            return None
        sizes.append(size)
        level = [value for row in level for value in row]
    return tuple(sizes)


def _nested(shape: tuple[int, ...]) -> tuple[int, ...]:
    """As far as a nested list can say it: behind a size of 0 there is nothing."""
    return shape[: shape.index(0) + 1] if 0 in shape else shape


def rounded(array: Array) -> Array:
    """float32 as the 16 bits of the nearest BF16, the even one of two; NaN stays one."""
    bits = array.view(np.uint32)
    found: Array = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(array), np.uint16(0x7FC0), found)
