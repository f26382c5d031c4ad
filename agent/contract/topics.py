"""MQTT topics. The broker lets a device write below its own `up` and read its own `down` and `all`, by its certificate's CN.

A poke says "look again", and may carry the signed documents that a look would fetch (`news`). They are verified as what is
fetched, so lost, doubled or forged pokes are harmless.
"""

from __future__ import annotations

from typing import Literal

from agent.contract.codec import FORMAT, Document

ROOT = "v1"
POKE_ALL = f"{ROOT}/all/poke"
UP_FILTER = f"{ROOT}/d/+/up/#"

Upward = Literal["state", "events", "telemetry", "presence", "blocks"]


class Poke(Document, frozen=True, kw_only=True):
    """`assignment_version` lets a device that has it already do nothing; it is a hint and is never trusted. `news` is packed as
    `agent.contract.news` says; devices that know nothing of it look, as after any poke. Those that have to ask the server do so
    within `spread_s` seconds, each at a moment of its own; at once when that is 0.
    """

    assignment_version: int | None = None
    news: bytes = b""
    spread_s: float = 0.0
    kind: Literal["poke"] = "poke"
    format: int = FORMAT


def down_poke(device: str) -> str:
    return f"{ROOT}/d/{device}/down/poke"


def down_blocks(device: str, transfer: str) -> str:
    """Where the parts of a transfer go; `+` for `transfer` is the filter of all."""
    return f"{ROOT}/d/{device}/down/blocks/{transfer}"


def up(device: str, what: Upward) -> str:
    return f"{ROOT}/d/{device}/up/{what}"


def parse_up(topic: str) -> tuple[str, str] | None:
    """(device, what) of a topic below UP_FILTER; None for any other."""
    parts = topic.split("/")
    if len(parts) == 5 and parts[:2] == [ROOT, "d"] and parts[3] == "up":
        return parts[2], parts[4]
    return None
