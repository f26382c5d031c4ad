"""What a simulated device says: reports and events as an agent makes and signs them, or signs them not."""

from __future__ import annotations

import json
import random
import uuid
from collections.abc import Callable
from typing import Protocol

from cryptography.hazmat.primitives.asymmetric import ec
from securesystemslib.dsse import Envelope
from securesystemslib.signer import CryptoSigner, SSlibKey  # type: ignore[attr-defined]

from agent.contract import topics
from agent.contract.codec import encode
from agent.contract.reports import EVENT_PAYLOAD_TYPE, STATE_PAYLOAD_TYPE, Event, ModelState, StateReport
from fleet_server.simulation.behaviours import Behaviour
from fleet_server.simulation.members import Member
from fleet_server.simulation.papers import Papers

AGENT_VERSION = "simulated"
EVENTS_KEPT = 50
"""While there is no link."""


class Carries(Protocol):
    """What takes messages to the broker."""

    session: int

    def publish(self, topic: str, payload: bytes) -> int | None: ...


class Counts(Protocol):
    """Who counts what was said."""

    reports: int
    events: int


class Voice:
    """One device's. `run` is the word that its agent made up when it started."""

    def __init__(
        self, member: Member, papers: Papers, link: Carries, wall: Callable[[], float], run: str, counts: Counts
    ) -> None:
        self._member, self._link, self._wall, self._run, self._counts = member, link, wall, run, counts
        self._key, self._signer = papers.key, _signer(papers.key)
        self._rng = random.Random(run)  # noqa: S311 - to be repeated, not to be secret
        self._counter = 0
        self._sent: dict[int, int] = {}  # paho's message id → the report's number
        self._events: list[bytes] = []
        self.spoilt: Callable[[], bool] = lambda: False
        """Whether the device's signature is missing, or another's, by now."""

    def report(self, models: dict[str, ModelState], *, assignment: int | None) -> int | None:
        self._counter = max(self._counter + 1, int(self._wall() * 1000))
        said = StateReport(
            device=self._member.id, counter=self._counter, session=self._link.session, at=self._wall(), agent_version=AGENT_VERSION,
            models=models, assignment_version=assignment, hardware=self._member.hardware, serve_instance=self._run, run=self._run,
        )  # fmt: skip
        mid = self._link.publish(topics.up(self._member.id, "state"), self._envelope(encode(said), STATE_PAYLOAD_TYPE))
        if mid is None:
            return None
        self._sent[mid] = self._counter
        self._counts.reports += 1
        while self._events and self._publish_event(self._events[0]):
            self._events.pop(0)
        return self._counter

    def event(self, name: str, message: str, *, model: str, release: int | None, reason: str | None = None) -> None:
        said = Event(
            id=uuid.UUID(int=self._rng.getrandbits(128), version=4).hex, device=self._member.id, at=self._wall(), name=name,
            message=message, model=model, release=release, reason=reason,
        )  # fmt: skip
        payload = self._envelope(encode(said), EVENT_PAYLOAD_TYPE)
        if not self._publish_event(payload):
            self._events = [*self._events, payload][-EVENTS_KEPT:]

    def acknowledged(self, mid: int) -> int | None:
        """The report that the broker has now; None when it was another message."""
        return self._sent.pop(mid, None)

    def _publish_event(self, payload: bytes) -> bool:
        said = self._link.publish(topics.up(self._member.id, "events"), payload) is not None
        self._counts.events += said
        return said

    def _envelope(self, payload: bytes, payload_type: str) -> bytes:
        envelope = Envelope(payload, payload_type, {})
        if not self.spoilt():
            envelope.sign(self._signer)
        elif self._member.behaviour is Behaviour.WRONG_KEY:
            envelope.sign(_signer(ec.generate_private_key(ec.SECP256R1())))
        return json.dumps(envelope.to_dict(), separators=(",", ":")).encode()


def _signer(key: ec.EllipticCurvePrivateKey) -> CryptoSigner:
    return CryptoSigner(key, SSlibKey.from_crypto(key.public_key()))
