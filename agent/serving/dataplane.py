"""One prediction from body to answer, whatever transport brought it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence

from agent.serving import oip
from agent.serving.answers import Answer, FilledTemplate, Refusal
from agent.serving.host import ModelHost, Version
from agent.serving.inference import Demand, Result
from agent.serving.regions import Regions
from agent.serving.routes import Match
from runtimes.check import check_feeds
from runtimes.contract import Array, InputInvalid, RunFailed

log = logging.getLogger(__name__)

MAX_PLAN_KEY_BYTES = 2048  # JSON parts without data are far smaller
MAX_PLANS = 64  # per version; callers use a few shapes
INLINE_RUN_S = 100e-6  # a run up to this long costs the next caller less than a switch of threads
INLINE_BODY_BYTES = 64 * 1024


class Dataplane:
    """Answers predictions from the models of a host. Any number of threads may call it."""

    def __init__(self, host: ModelHost) -> None:
        self._host = host

    def is_cheap(self, match: Match, body_bytes: int) -> bool:
        """Whether the answer takes so little that the thread which polls should give it at once."""
        served = self._host.models.get(match.model)  # type: ignore[arg-type]
        if served is None:
            return True
        version = served.active if match.version is None else served.pick(match.version)
        return version is None or (body_bytes <= INLINE_BODY_BYTES and version.cost_s <= INLINE_RUN_S)

    def infer(
        self,
        model: str,
        wanted: str | None,
        body: memoryview,
        header_length: int | None,
        arrived_s: float,
        regions: Regions | None = None,
    ) -> Answer:
        """The prediction. `arrived_s` is the perf_counter of the request's arrival; the answer's arrays may not outlive `body`.

        Raises: Refusal.
        """
        version = self._host.enter(model, wanted)
        try:
            plan = _plan(version, body, header_length)
            arrays, run_s, ended = _run(version, plan.feeds(body, regions), plan.outputs, arrived_s, plan.timeout_s)
            answer = oip.write_response(plan, arrays, version.name, str(version.number), version.labels, regions)
            if type(answer) is not FilledTemplate:  # writing one takes nothing; JSON may take long
                ended = time.perf_counter()
            version.stats.succeeded(ended - arrived_s, run_s, ended)
            return answer
        except Exception as error:
            raise _refusal(version, error) from error
        finally:
            version.leave()

    def predict(
        self,
        model: str,
        wanted: str | None,
        feeds: Mapping[str, Array],
        demand: Demand,
        alive: Callable[[], bool] | None = None,  # noqa: ARG002
    ) -> Result:
        """The same for a caller that has arrays and wants arrays. Blocks until they are there.

        `wanted` is a version's number or label (None: the active one). `alive` is asked while the prediction waits for its turn:
        once it says no, the prediction is dropped.  Raises: Refusal.
        """
        version = self._host.enter(model, wanted)
        try:
            check_feeds(version.inputs, feeds)
            arrays, run_s, ended = _run(version, feeds, demand.outputs, demand.arrived_s, demand.timeout_s)
            version.stats.succeeded(ended - demand.arrived_s, run_s, ended)
            return Result(version, arrays)
        except Exception as error:
            raise _refusal(version, error) from error
        finally:
            version.leave()


def _run(
    version: Version, feeds: Mapping[str, Array], outputs: Sequence[str] | None, arrived_s: float, timeout_s: float | None
) -> tuple[list[Array], float, float]:
    """The outputs, what the run took, and when it ended."""
    started = time.perf_counter()
    if timeout_s is not None and started - arrived_s > timeout_s:
        raise Refusal(503, "Request timeout expired", headers=((b"retry-after", b"1"),))
    assert version.model is not None
    arrays = version.model.run(feeds, outputs)
    ended = time.perf_counter()
    version.measured(ended - started)
    return arrays, ended - started, ended


def _refusal(version: Version, error: Exception) -> Refusal:
    """Counts the failure, and says it so that the caller understands."""
    if isinstance(error, Refusal):
        version.stats.failed("unavailable" if error.status == 503 else "invalid")
        return error
    if isinstance(error, InputInvalid):
        version.stats.failed("invalid")
        return Refusal(400, f"model '{version.name}': {error}")
    version.stats.failed("run")
    if not isinstance(error, RunFailed):
        log.error("model %r version %d failed in an unforeseen way", version.name, version.number, exc_info=error)
    return Refusal(500, f"model '{version.name}' version {version.number} failed: {error}")


def _plan(version: Version, body: memoryview, header_length: int | None) -> oip.Plan:
    if header_length is not None and header_length > len(body):
        raise Refusal(400, f"inference header size should be in range (0, {len(body)}), got: {header_length}")
    key = b""
    if header_length and header_length <= MAX_PLAN_KEY_BYTES:
        key = bytes(body[:header_length])
        plan: oip.Plan | None = version.plans.get(key)
        if plan is not None and plan.size_bytes == len(body):
            return plan
    plan = oip.read_request(body, header_length, version.name, version.inputs, version.outputs)
    if key and plan.reusable:
        if len(version.plans) >= MAX_PLANS:
            version.plans.clear()
        version.plans[key] = plan
    return plan
