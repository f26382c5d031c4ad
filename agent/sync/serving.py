"""The control routes of `edge-agent serve`, over its Unix socket. The one place where its errors are translated."""

from __future__ import annotations

import http.client
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, TypeVar

import msgspec

from agent.contract import names
from agent.contract.acceptance import ShadowRules
from agent.contract.codec import ContractError, decode
from agent.contract.telemetry import ServeFigures
from agent.host import unix
from agent.sync.gates.shadow import ShadowCounts
from agent.sync.gates.watch import Stats
from agent.sync.problems import MESSAGE_KEPT

STATUS_TIMEOUT_S = 5.0
CHANGE_TIMEOUT_S = 300.0
"""Loading a large engine from a slow card took four minutes; draining waits for requests in flight."""

_MAX_ANSWER_BYTES = 4 * 1024 * 1024
_Answer = TypeVar("_Answer", bound=msgspec.Struct)


class ServeAway(Exception):
    """`serve` does not answer. It may be restarting; says nothing about any model.

    `sent`: a change had been delivered, so what was asked may be what took the process down. A question never is: a `serve`
    that still loads its models lets everybody wait.
    """

    def __init__(self, message: str, *, sent: bool) -> None:
        super().__init__(message)
        self.sent = sent


class ServeRefused(Exception):
    """`serve` answered with an error. `code` is its word for it, such as `model_invalid` or `no_memory`."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message[:MESSAGE_KEPT])
        self.status = status
        self.code = code


class Failed(msgspec.Struct, frozen=True):
    """Failed requests by whose fault they were."""

    invalid: int = 0
    run: int = 0
    unavailable: int = 0


class Latency(msgspec.Struct, frozen=True):
    """A histogram of answered requests."""

    bounds_ms: tuple[float, ...] = ()
    counts: tuple[int, ...] = ()


class VersionStats(msgspec.Struct, frozen=True):
    requests: int = 0
    ok: int = 0
    failed: Failed = Failed()
    latency: Latency = Latency()

    def for_watch(self) -> Stats:
        return Stats(
            ok=self.ok,
            invalid=self.failed.invalid,
            run=self.failed.run,
            unavailable=self.failed.unavailable,
            bounds_ms=self.latency.bounds_ms,
            counts=self.latency.counts,
        )


class Placement(msgspec.Struct, frozen=True):
    requested: str = ""
    actual: str = ""
    fallback: str | None = None


class VersionStatus(msgspec.Struct, frozen=True):
    """One version of a model as `serve` has it. `away`: it is not in memory now, and who asks for it waits until it is."""

    version: int
    variant: str = ""
    state: str = ""
    reason: str = ""
    away: bool = False
    sha256: str | None = None
    placement: Placement | None = None
    memory_bytes: int = 0
    stats: VersionStats = VersionStats()


class CanaryStatus(msgspec.Struct, frozen=True):
    """The version that answers a share of the requests beside the active one."""

    version: int
    share: float = 0.0


class OutputNumbers(msgspec.Struct, frozen=True):
    max_difference: float = 0.0


class PairedTimes(msgspec.Struct, frozen=True):
    pairs: int = 0
    live_ms: float = 0.0
    run_ms: float = 0.0
    bounds: tuple[float, ...] = ()
    counts: tuple[int, ...] = ()


class ShadowStatus(msgspec.Struct, frozen=True):
    """What came of running a version on copies of requests. `state`: none, running or ended."""

    state: str = "none"
    version: int | None = None
    ended: str = ""
    failed: bool = False
    throttled: str = ""
    samples: int = 0
    agreed: int = 0
    rows: int = 0
    flips: int = 0
    dropped: int = 0
    errors: dict[str, int] = {}
    last_error: str = ""
    outputs: dict[str, OutputNumbers] = {}
    latency: PairedTimes = PairedTimes()

    def counts(self) -> ShadowCounts:
        return ShadowCounts(
            samples=self.samples,
            agreed=self.agreed,
            rows=self.rows,
            flips=self.flips,
            errors=sum(self.errors.values()),
            dropped=self.dropped,
            max_difference=max((output.max_difference for output in self.outputs.values()), default=0.0),
            pairs=self.latency.pairs,
            live_ms=self.latency.live_ms,
            run_ms=self.latency.run_ms,
            bounds=self.latency.bounds,
            counts=self.latency.counts,
        )


class ModelStatus(msgspec.Struct, frozen=True):
    """One model as `serve` has it. `versions` has decimal numbers as keys."""

    active: int | None = None
    previous: int | None = None
    canary: CanaryStatus | None = None
    versions: dict[str, VersionStatus] = {}

    def version(self, number: int | None) -> VersionStatus | None:
        return None if number is None else self.versions.get(str(number))

    @property
    def serving(self) -> VersionStatus | None:
        """The active version, if it can answer; one that is away does, after a while."""
        active = self.version(self.active)
        return active if active is not None and (active.state == "READY" or active.away) else None


class ServeStatus(msgspec.Struct, frozen=True):
    """Everything `serve` says about itself."""

    instance: str
    agent_version: str = ""
    models: dict[str, ModelStatus] = {}

    def model(self, name: str) -> ModelStatus:
        return self.models.get(name, ModelStatus())


class ServingPort(Protocol):
    """What `sync` asks of `serve`. Every method is idempotent and raises ServeAway or ServeRefused."""

    def status(self) -> ServeStatus: ...

    def load(self, model: str, version: int, variant: str) -> VersionStatus: ...

    def activate(self, model: str, version: int) -> None: ...

    def activate_team(self, versions: Mapping[str, int | None]) -> None:
        """Makes these answer, all of them or none; models with None are unloaded, without a request between the two."""
        ...

    def swap(self, model: str, version: int, variant: str) -> None: ...

    def rollback(self, model: str, version: int) -> None: ...

    def commit(self, model: str) -> None: ...

    def unload(self, model: str, version: int | None = None) -> None: ...

    def shadow(self, model: str, version: int, rules: ShadowRules) -> ShadowStatus: ...

    def shadow_numbers(self, model: str) -> ShadowStatus: ...

    def canary(self, model: str, version: int, share: float) -> None: ...


class ServeClient:
    """ServingPort over HTTP on a Unix socket, a connection per request: they are rare, and `serve` may restart between any
    two.
    """

    def __init__(self, socket_path: Path) -> None:
        self._socket_path = socket_path

    def status(self) -> ServeStatus:
        return _parse(self._ask("GET", "/control/v1/status", None, STATUS_TIMEOUT_S), ServeStatus)

    def counters(self) -> ServeFigures:
        """What was counted of each version, for telemetry.  Raises: ServeAway; ServeRefused, as by one that counts none."""
        return _parse(self._ask("GET", "/control/v1/telemetry", None, STATUS_TIMEOUT_S), ServeFigures)

    def load(self, model: str, version: int, variant: str) -> VersionStatus:
        answer = self._change(model, "load", {"version": version, "variant": variant})
        return _parse(answer, VersionStatus)

    def activate(self, model: str, version: int) -> None:
        self._change(model, "activate", {"version": version})

    def activate_team(self, versions: Mapping[str, int | None]) -> None:
        body = msgspec.json.encode({"versions": dict(versions)})
        self._ask("POST", "/control/v1/activate", body, CHANGE_TIMEOUT_S)

    def swap(self, model: str, version: int, variant: str) -> None:
        self._change(model, "swap", {"version": version, "variant": variant})

    def rollback(self, model: str, version: int) -> None:
        self._change(model, "rollback", {"version": version})

    def commit(self, model: str) -> None:
        self._change(model, "commit", {})

    def unload(self, model: str, version: int | None = None) -> None:
        self._change(model, "unload", {} if version is None else {"version": version})

    def shadow(self, model: str, version: int, rules: ShadowRules) -> ShadowStatus:
        tolerance = {name: {"atol": close.atol, "rtol": close.rtol} for name, close in rules.tolerance.items()}
        body = {"version": version, "share": rules.share, "max_rate": rules.max_rate, "tolerance": tolerance}
        return _parse(self._change(model, "shadow", body), ShadowStatus)

    def shadow_numbers(self, model: str) -> ShadowStatus:
        path = f"/control/v1/models/{names.check_model(model)}/shadow"
        return _parse(self._ask("GET", path, None, STATUS_TIMEOUT_S), ShadowStatus)

    def canary(self, model: str, version: int, share: float) -> None:
        self._change(model, "canary", {"version": version, "share": share})

    def _change(self, model: str, action: str, body: dict[str, object]) -> bytes:
        path = f"/control/v1/models/{names.check_model(model)}/{action}"
        return self._ask("POST", path, msgspec.json.encode(body), CHANGE_TIMEOUT_S)

    def _ask(self, method: str, path: str, body: bytes | None, timeout_s: float) -> bytes:
        connection = _UnixConnection(self._socket_path, timeout_s)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json", "Connection": "close"})
            response = connection.getresponse()
            data = response.read(_MAX_ANSWER_BYTES + 1)
        except (OSError, http.client.HTTPException) as error:
            message = f"serve does not answer on {self._socket_path}: {error or type(error).__name__}"
            raise ServeAway(message, sent=connection.connected and method != "GET") from error
        finally:
            connection.close()
        if response.status != 200:
            raise _refusal(response.status, data)
        return data


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._timeout_s = timeout_s
        self._path = path
        self.connected = False

    def connect(self) -> None:
        self.sock = unix.connect(str(self._path), self._timeout_s)
        self.connected = True


def _parse(data: bytes, kind: type[_Answer]) -> _Answer:
    try:
        return decode(data, kind, limit_bytes=_MAX_ANSWER_BYTES)
    except ContractError as error:
        raise ServeRefused(
            200, "protocol", f"serve's answer is not understood: {error}; are both from the same release?"
        ) from error


def _refusal(status: int, data: bytes) -> ServeRefused:
    try:
        body = decode(data, dict[str, object], limit_bytes=_MAX_ANSWER_BYTES)
    except ContractError:
        body = {}
    return ServeRefused(status, str(body.get("code", "")), str(body.get("error") or f"serve answered {status}"))
