"""What an engine file says of itself, read without any library: who made it, and for which GPUs.

The layout is that of TensorRT-RTX 1.7, found by building engines that differ in one thing: magic, the format's number, the size of the whole
file, the library's version, and a mask of the compute capabilities that it was built for. TensorRT's own files begin with `ftrt` or `ptrt`;
that was read of, not tried, so nothing but their kind is told of them.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from runtimes.contract import ModelInvalid
from runtimes.file_kinds import what_it_is

HEADER_BYTES = 64
RTX_MAGIC = b"vtrt"
TENSORRT_MAGICS = (b"ftrt", b"ptrt")
RTX_LAYOUT = struct.Struct("<4sIQQ4B4sQ")

CAPABILITY_BITS = {0: "sm75", 1: "sm80", 2: "sm86", 3: "sm89", 4: "sm120", 5: "sm121"}
"""Bit of the mask → compute capability. Bits without a name stand for GPUs that came after this was written."""


@dataclass(frozen=True, slots=True)
class EngineHeader:
    """`library` is TensorRT-RTX or TensorRT; `version` and `capabilities` are empty where the file does not say them in a way that is known."""

    library: str
    version: str = ""
    capabilities: tuple[str, ...] = ()


def read(path: Path) -> EngineHeader:
    """The header of an engine file.  Raises: ModelInvalid when it is none, or is not whole."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(HEADER_BYTES)
    except OSError as error:
        raise ModelInvalid(f"{path} cannot be read: {error.strerror}") from error
    if head[:4] in TENSORRT_MAGICS:
        return EngineHeader("TensorRT")
    if head[:4] != RTX_MAGIC:
        what = "it is empty" if not head else f"it is {what_it_is(path) or 'something else'}"
        raise ModelInvalid(f"{path.name} is not a TensorRT engine: {what}")
    if len(head) < HEADER_BYTES:
        raise ModelInvalid(f"{path.name} is cut off: an engine's header has {HEADER_BYTES} bytes, this file has {len(head)}")
    _, _, _, said_bytes, major, minor, patch, build, again, mask = RTX_LAYOUT.unpack_from(head)
    if again != RTX_MAGIC:
        raise ModelInvalid(f"{path.name} has a damaged header, or one of a TensorRT-RTX that is newer than this agent")
    if said_bytes != size:
        raise ModelInvalid(f"{path.name} is damaged or cut off: its header says {said_bytes} bytes, the file has {size}")
    capabilities = tuple(name for bit, name in CAPABILITY_BITS.items() if mask >> bit & 1)
    return EngineHeader("TensorRT-RTX", f"{major}.{minor}.{patch}.{build}", capabilities)
