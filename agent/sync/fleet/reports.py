"""What this device says about itself, built from the update states and from what `serve` says, and signed with the device's
key.
"""

from __future__ import annotations

import json
import secrets
import uuid
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Protocol

from cryptography.hazmat.primitives.asymmetric import ec
from securesystemslib.dsse import Envelope
from securesystemslib.signer import CryptoSigner, SSlibKey  # type: ignore[attr-defined]

from agent.contract.codec import encode
from agent.contract.reports import (
    EVENT_PAYLOAD_TYPE,
    MAX_REPORT_BYTES,
    STATE_PAYLOAD_TYPE,
    Answer,
    Event,
    Hardware,
    ModelState,
    Phase,
    StateReport,
)
from agent.contract.telemetry import TELEMETRY_PAYLOAD_TYPE, MachineFigures, ModelFigures, Telemetry, packed
from agent.store import Store, StoreError
from agent.sync.fleet.counters import Counter
from agent.sync.fleet.outbox import Kind
from agent.sync.fleet.stages import stage_of
from agent.sync.gates.watch import p95_ms
from agent.sync.ports import Clock
from agent.sync.serving import ModelStatus, ServeStatus
from agent.sync.trust.desired import Desired
from agent.sync.updating.quarantine import Quarantine
from agent.sync.updating.update import UpdateState

ANSWERS_SENT = 10
REFUSALS_SENT = 10


class Queue(Protocol):
    """Where messages wait for the broker."""

    def put(self, kind: Kind, payload: bytes) -> int: ...


class Noted(Protocol):
    """Who wants to know which message is which report."""

    def put(self, item: int, begun: float) -> None: ...


class ModelView(Protocol):
    """One model as its updater shows it."""

    @property
    def model(self) -> str: ...

    @property
    def state(self) -> UpdateState: ...

    @property
    def progress(self) -> float | None: ...

    @property
    def stopped(self) -> str | None: ...

    @property
    def held(self) -> bool: ...


def model_state(
    view: ModelView, status: ModelStatus, quarantined: tuple[Answer, ...], selected_before: int | None
) -> ModelState:
    """What is reported of one model. `serving` and `sha256` are what `serve` says it can answer with, never what was asked of
    it.
    """
    state, serving = view.state, status.serving
    stats = serving.stats.for_watch() if serving else None
    return ModelState(
        serving=serving.version if serving else None,
        sha256=serving.sha256 if serving else None,
        phase=state.phase,
        wanted=state.wanted,
        target=state.target,
        progress=round(view.progress, 3) if view.progress is not None and state.phase is Phase.FETCHING else None,
        previous=state.before.version if state.before and state.target is not None else selected_before,
        variant=serving.variant if serving else None,
        placement=serving.placement.actual if serving and serving.placement else None,
        requests=stats.answered if stats else 0,
        failures=stats.failed if stats else 0,
        p95_ms=p95_ms(stats) if stats else None,
        answers=state.answers[-ANSWERS_SENT:],
        quarantined=quarantined[-REFUSALS_SENT:],
        held=view.held,
        waiting_for=state.waiting_for,
        stage=stage_of(state),
        passed=state.watched is not None and state.watched.passed_s is not None,
        stopped=view.stopped,
    )


def model_states(
    views: Sequence[ModelView], status: ServeStatus | None, quarantine: Quarantine, store: Store
) -> dict[str, ModelState]:
    """What is reported of each model. `status` None: `serve` does not answer."""
    said = status or ServeStatus(instance="")
    return {
        view.model: model_state(
            view,
            said.model(view.model),
            tuple(entry.answer for entry in quarantine.entries(view.model)),
            _previous(store, view.model),
        )
        for view in views
    }


def _previous(store: Store, model: str) -> int | None:
    try:
        selection = store.selection(model)
    except StoreError:
        return None
    return selection.previous.version if selection and selection.previous else None


class Signer:
    """Signs reports with the key of the device's certificate."""

    def __init__(self, key: ec.EllipticCurvePrivateKey) -> None:
        public = SSlibKey.from_crypto(key.public_key())
        self._signer = CryptoSigner(key, public)

    def envelope(self, payload: bytes, payload_type: str) -> bytes:
        """A DSSE envelope as JSON."""
        envelope = Envelope(payload, payload_type, {})
        envelope.sign(self._signer)
        return json.dumps(envelope.to_dict(), separators=(",", ":")).encode()


class Reporter:
    """Builds reports and events and puts them into the outbox."""

    def __init__(
        self,
        device: str,
        signer: Signer,
        queue: Queue,
        counter: Counter,
        clock: Clock,
        hardware: Callable[[], Hardware | None],
        noted: Noted | None = None,
    ) -> None:
        self._noted = noted
        self._device = device
        self._signer = signer
        self._queue = queue
        self._counter = counter
        self._clock = clock
        self._hardware = hardware
        self._run = secrets.token_hex(8)
        self._instance: str | None = None
        self._restarts = 0

    def report(
        self,
        models: Mapping[str, ModelState],
        status: ServeStatus | None,
        desired: Desired | None,
        session: int,
        problem: str | None,
        begun: float = 0.0,
    ) -> StateReport:
        """Puts a signed report of this moment into the outbox, and gives it. `begun` (monotonic): when what it says was read.

        Raises: OSError.
        """
        self._notice(status)
        report = StateReport(
            device=self._device,
            counter=self._counter.next(),
            session=session,
            at=self._clock.wall(),
            agent_version=version("edge-inference-agent"),
            models=dict(models),
            assignment_version=desired.assignment.version if desired else None,
            record_serial=desired.record.serial if desired else None,
            hardware=self._hardware(),
            serve_instance=status.instance if status else None,
            serve_restarts=self._restarts,
            problem=problem,
            run=self._run,
        )
        payload = _bounded(report)
        item = self._queue.put("state", self._signer.envelope(payload, STATE_PAYLOAD_TYPE))
        if self._noted is not None:
            self._noted.put(item, begun)
        return report

    def event(
        self, name: str, message: str, *, model: str | None = None, release: int | None = None, reason: str | None = None
    ) -> None:
        """Puts a signed event for people into the outbox.  Raises: OSError."""
        event = Event(
            id=uuid.uuid4().hex,
            device=self._device,
            at=self._clock.wall(),
            name=name,
            message=message[:2000],
            model=model,
            release=release,
            reason=reason,
        )
        self._queue.put("events", self._signer.envelope(encode(event), EVENT_PAYLOAD_TYPE))

    def telemetry(self, seconds: float, figures: tuple[ModelFigures, ...], machine: MachineFigures) -> None:
        """Puts signed telemetry of the last `seconds` into the outbox.  Raises: OSError."""
        told = Telemetry(
            device=self._device, counter=self._counter.next(), at=self._clock.wall(), seconds=seconds, figures=figures, machine=machine,
        )  # fmt: skip
        self._queue.put("telemetry", self._signer.envelope(packed(told), TELEMETRY_PAYLOAD_TYPE))

    @property
    def restarts(self) -> int:
        """How often `serve` was another process than before, since this one began."""
        return self._restarts

    def _notice(self, status: ServeStatus | None) -> None:
        if status is None or status.instance == self._instance:
            return
        if self._instance is not None:
            self._restarts += 1
        self._instance = status.instance


def _bounded(report: StateReport) -> bytes:
    """The report's bytes; without its history of answers when a device with very many models would exceed what the fleet
    reads.
    """
    payload = encode(report)
    if len(payload) * 4 // 3 + 1024 <= MAX_REPORT_BYTES:  # base64 in the envelope
        return payload
    import msgspec

    short = {
        name: msgspec.structs.replace(state, answers=state.answers[-1:], quarantined=())
        for name, state in report.models.items()
    }
    return encode(msgspec.structs.replace(report, models=short))
