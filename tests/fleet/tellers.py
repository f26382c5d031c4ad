"""Devices that tell how their models do."""

from __future__ import annotations

import math
from typing import Any

import msgspec
from cryptography.hazmat.primitives.asymmetric import ec
from securesystemslib.dsse import Envelope
from securesystemslib.signer import CryptoSigner, SSlibKey

from agent.contract.telemetry import TELEMETRY_PAYLOAD_TYPE, Figures, MachineFigures, ModelFigures, Telemetry, packed


def signed_telemetry(told: Telemetry | bytes, key: ec.EllipticCurvePrivateKey) -> bytes:
    """In its envelope, as devices send it; bytes as they are."""
    envelope = Envelope(told if isinstance(told, bytes) else packed(told), TELEMETRY_PAYLOAD_TYPE, {})
    envelope.sign(CryptoSigner(key, SSlibKey.from_crypto(key.public_key())))  # type: ignore[arg-type]
    return msgspec.json.encode(envelope.to_dict())


def telemetry(
    device: str, counter: int, at: float, *figures: tuple[int, Figures], model: str = "digits", **other: Any
) -> Telemetry:
    """Of 300 seconds, in which each release did that."""
    told = tuple(ModelFigures(model=model, release=release, figures=one) for release, one in figures)
    machine = MachineFigures(memory_bytes=1 << 30, memory_free_bytes=1 << 29, load=0.5, celsius=55.0)
    return Telemetry(
        **{"device": device, "counter": counter, "at": at, "seconds": 300.0, "figures": told, "machine": machine, **other}
    )


def did(ok: int = 1000, *, ms: float = 10.0, run: int = 0, classes: dict[int, int] | None = None, unusable: int = 0) -> Figures:
    """So many requests, each of which took about so long."""
    mix = classes if classes is not None else {0: ok // 2, 1: ok - ok // 2}
    at = int(math.log2(ms * 1e3) * 8)
    rows = sum(mix.values())
    return Figures(
        ok=ok,
        run=run,
        latency={at: ok} if ok else {},
        rows=rows + unusable,
        unusable=unusable,
        classes=mix,
        confidence={9: rows} if rows else {},
    )
