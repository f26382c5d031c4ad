"""The throw-away process of a trial: it loads a model that nobody has run here yet, and says whether it keeps its promises.

`python -m agent.sync.trials.child` reads one request from stdin and writes progress and a verdict to stdout; it serves a pipe
and a socket alike. It expects to die: a hostile or broken model may take it down at any line, and the parent makes a reason of
that. Imported here: the runtimes, numpy, msgspec. Neither TUF nor MQTT nor an HTTP client, so that little is there to be
misused.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any

from agent.contract.acceptance import Close
from agent.contract.codec import ContractError, decode, encode
from agent.contract.manifest import Tensor
from agent.contract.reasons import Reason
from agent.host import memory, priority
from agent.sync.trials import containment
from agent.sync.trials.protocol import MAX_REQUEST_BYTES, Case, Limits, Progress, Request, Verdict

if TYPE_CHECKING:
    from runtimes.contract import Array, Model, TensorSpec
    from runtimes.naming import Interface

Arrays = dict[str, Any]

MEASURED_RUNS = 40
MEASURE_S = 2.0
"""p95 comes from as many runs as fit in this time, at most MEASURED_RUNS and at least five."""


class Refused(Exception):
    """The release does not pass."""

    def __init__(self, reason: Reason, message: str, evidence: Mapping[str, float | str] | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.evidence = dict(evidence or {})


def main() -> int:
    """Runs one trial over stdin and stdout."""
    containment.sandbox_process()
    with _own_stdout() as out:
        verdict = _answer(sys.stdin.buffer, out)
        _say(out, verdict)
    return 0


@contextlib.contextmanager
def _own_stdout() -> Any:
    """Keeps the channel to the parent away from engines that print: their stdout becomes stderr."""
    with os.fdopen(os.dup(1), "wb", buffering=0) as out:
        os.dup2(2, 1)
        yield out


def _say(out: IO[bytes], line: Progress | Verdict) -> None:
    out.write(encode(line) + b"\n")


# -- the trial ----------------------------------------------------------------------------------------------------------------


def _answer(source: IO[bytes], out: IO[bytes]) -> Verdict:
    try:
        request = decode(source.readline(MAX_REQUEST_BYTES), Request, limit_bytes=MAX_REQUEST_BYTES)
    except ContractError as error:
        return Verdict(reason=Reason.TRIAL_CRASHED, message=f"the trial did not understand its request: {error}")
    source.read(1)  # to its end
    containment.end_with(source.fileno())
    containment.limit_process(request.limits)
    witness = containment.Witness()
    witness.listen()
    verdict = _judged(request, witness, lambda step: _say(out, Progress(step=step)))
    started = containment.started()
    if verdict.reason is None and started:
        return Verdict(reason=Reason.TRIAL_FORKED, message=f"it left processes behind: {', '.join(started[:5])}")
    return verdict


def _judged(request: Request, witness: containment.Witness, say: Any) -> Verdict:
    try:
        evidence = try_release(request, say)
    except Refused as refused:
        tried = witness.reason(str(refused))
        if tried is not None:
            return Verdict(reason=tried[0], message=f"{tried[1]} ({refused})", evidence=refused.evidence)
        return Verdict(reason=refused.reason, message=str(refused), evidence=refused.evidence)
    except MemoryError:
        return Verdict(reason=Reason.TOO_MUCH_MEMORY, message=_memory_message(request.limits))
    except Exception as error:
        tried = witness.reason(str(error))
        if tried is None:
            raise
        return Verdict(reason=tried[0], message=tried[1])
    if witness.network:
        reason, message = (
            Reason.TRIAL_NETWORK,
            f"it wanted to {witness.network}: a model has no network, here or when it serves",
        )
        return Verdict(reason=reason, message=message)
    return Verdict(evidence=evidence)


def try_release(request: Request, say: Any) -> dict[str, float | str]:
    """Loads, checks the interface, warms up, runs every golden case, measures. Gives the numbers.  Raises: Refused,
    MemoryError.
    """
    from agent.variants import prepared
    from runtimes import registry
    from runtimes.contract import ModelInvalid, RuntimeFailure, is_stateful
    from runtimes.naming import Interfaces

    say("starting the runtime")
    try:
        runtime = registry.find(request.runtime)
        evidence: dict[str, float | str] = {"runtime": runtime.version()}
        say("loading")
        before = memory.resident_bytes()
        model, evidence["load_ms"] = _load(runtime, request)
    except RuntimeFailure as error:
        raise _refusal(request, Reason.LOAD_FAILED, f"{request.runtime} cannot load it: {error}") from error
    raw = Interfaces.of(model)
    try:
        model = prepared(model, state=request.state, serving=request.serving, picture=request.picture)
    except ModelInvalid as error:
        raise Refused(Reason.WRONG_INTERFACE, f"the model does not fit its manifest: {error}") from error
    except RuntimeFailure as error:
        raise Refused(Reason.LOAD_FAILED, f"it cannot be served here as its manifest says: {error}") from error
    try:
        evidence["placement"] = model.placement.actual
        interface = raw.plain
        seen = {name: spec for name, spec in interface.inputs.items() if _is_seen(spec.name, interface, request)}
        check_interface(request.inputs, seen, "input")
        check_interface(request.outputs, interface.outputs, "output")
        say("running golden cases")
        for case in request.cases:
            run_case(model, case)
        if is_stateful(model):
            say("running a sequence")
            run_sequence(model, request.cases)
        say("measuring" if request.cases else "measuring it on zeros, having no golden case")
        evidence |= _measure(model, request.cases)
        evidence["memory_bytes"] = float(max(0, memory.resident_bytes() - before))
        check_limits(request.limits, evidence)
    except RuntimeFailure as error:
        raise _refusal(request, Reason.GOLDEN_MISMATCH, f"it loads but cannot run: {error}") from error
    finally:
        model.close()
    return evidence


def _load(runtime: Any, request: Request) -> tuple[Model, float]:
    from pathlib import Path

    from runtimes.contract import LoadOptions

    started = time.perf_counter()
    data = {location: Path(file) for location, file in request.data.items()}
    libraries = tuple(map(Path, request.libraries))
    options = LoadOptions(threads=request.threads, extra=request.options, data=data, libraries=libraries)
    model = runtime.load(Path(request.model), options)
    return model, round((time.perf_counter() - started) * 1000, 3)


def check_interface(declared: Sequence[Tensor], actual: Mapping[str, TensorSpec], what: str) -> None:
    """Checks that what the manifest says about tensors is what the file has; `actual` is by every name that requests may use. A
    manifest that declares none promises nothing, and it need not list optional inputs.

    Raises: Refused WRONG_INTERFACE.
    """
    named = set()
    for tensor in declared:
        spec = actual.get(tensor.name)
        if spec is None:
            known = ", ".join(repr(name) for name in actual)
            raise Refused(Reason.WRONG_INTERFACE, f"{what} {tensor.name!r} is in the manifest, but the model has {known}")
        if spec.datatype != tensor.datatype:
            raise Refused(
                Reason.WRONG_INTERFACE, f"{what} {tensor.name!r} is {spec.datatype}, the manifest says {tensor.datatype}"
            )
        named.add(spec.name)
        if not (spec.any_rank or _shapes_agree(spec.shape, tensor.shape)):
            raise Refused(
                Reason.WRONG_INTERFACE,
                f"{what} {tensor.name!r} has shape {list(spec.shape)}, the manifest says {list(tensor.shape)}",
            )
    needed = {spec.name for spec in actual.values() if not spec.optional}
    if declared and (extra := sorted(needed - named)):
        raise Refused(Reason.WRONG_INTERFACE, f"{what} {extra[0]!r} of the model is not in the manifest")


def _shapes_agree(actual: Sequence[int], declared: Sequence[int]) -> bool:
    """A model may be freer than its manifest (-1 where a size is declared), not stricter."""
    return len(actual) == len(declared) and all(a in (-1, d) for a, d in zip(actual, declared, strict=True))


def _is_seen(name: str, interface: Interface, request: Request) -> bool:
    """Callers do not see inputs that carry state; a manifest may list them among its inputs all the same."""
    carried = interface.own_names(request.state)
    return name not in carried or name in interface.own_names({tensor.name: tensor for tensor in request.inputs})


def run_sequence(model: Any, cases: Sequence[Case]) -> None:
    """What a run leaves as state must be what the next one takes: two runs of one sequence, on the first golden case or on
    zeros.

    Raises: RuntimeFailure.
    """
    from runtimes.check import zeros
    from runtimes.contract import RuntimeFailure

    feeds, outputs = _given(model, cases[0]) if cases else (zeros(model.inputs), None)
    if feeds is None:
        return
    sequence = model.sequence()
    try:
        for _ in range(2):
            sequence.run(feeds, outputs)
    except RuntimeFailure:
        if cases:
            raise
    finally:
        sequence.close()


def run_case(model: Model, case: Case) -> None:
    """Cases are independent: one of a model with state begins a sequence of its own.  Raises: Refused GOLDEN_MISMATCH;
    RuntimeFailure.
    """
    interface = _interface(model, case)
    feeds = interface.own_names(_arrays(case, case.inputs))
    expected = _arrays(case, case.expected)
    _require(case, [interface.inputs[spec.name].name for spec in interface.required], feeds, "inputs")
    _require(case, list(case.compare), expected, "expected outputs")
    _require(case, list(case.compare), interface.outputs, "outputs of the model")
    wanted = list(case.compare)
    arrays = model.run(feeds, [interface.outputs[name].name for name in wanted])
    for name, got in zip(wanted, arrays, strict=True):
        rule = case.compare[name]
        if isinstance(rule, Close):
            compare_close(case.name, name, got, expected[name], rule)
        else:
            compare_top1(case.name, name, got, expected[name], rule.min_agreement)


def compare_close(case: str, output: str, got: Array, expected: Array, rule: Close) -> None:
    """Raises: Refused when an element is further away than the rule allows. A NaN only matches a NaN."""
    import numpy as np

    if got.shape != expected.shape:
        raise Refused(
            Reason.GOLDEN_MISMATCH,
            f"golden case {case!r}: {output!r} has shape {list(got.shape)}, expected {list(expected.shape)}",
        )
    if np.object_ in (got.dtype, expected.dtype):
        if got.dtype != expected.dtype or list(got.flat) != list(expected.flat):
            raise Refused(Reason.GOLDEN_MISMATCH, f"golden case {case!r}: the texts of {output!r} are not the expected ones")
        return
    a, b = got.astype(np.float64), expected.astype(np.float64)
    far = ~(np.isclose(a, b, rtol=rule.rtol, atol=rule.atol, equal_nan=True))
    if far.any():
        worst = float(np.nanmax(np.where(far, np.abs(a - b), 0.0)))
        raise Refused(
            Reason.GOLDEN_MISMATCH,
            f"golden case {case!r}: {int(far.sum())} of {far.size} elements of {output!r} differ by up to {worst:.6g}, "
            f"allowed are {rule.atol:g} + {rule.rtol:g} of the expected value",
            {"case": case, "worst_difference": worst, "elements_off": float(far.sum())},
        )


def compare_top1(case: str, output: str, got: Array, expected: Array, min_agreement: float) -> None:
    """Raises: Refused when too few rows have their largest value where it was expected."""
    import numpy as np

    rows = expected.reshape(-1)
    table = got.reshape(len(rows), -1) if len(rows) and got.size % len(rows) == 0 else None
    if table is None or not len(rows):
        raise Refused(
            Reason.GOLDEN_MISMATCH, f"golden case {case!r}: {output!r} with shape {list(got.shape)} has no {len(rows)} rows"
        )
    agreement = float((table.argmax(axis=1) == rows.astype(np.int64)).mean())
    if agreement < min_agreement:
        raise Refused(
            Reason.GOLDEN_MISMATCH,
            f"golden case {case!r}: top-1 agreement {agreement:.2f}, at least {min_agreement:.2f} demanded",
            {"case": case, "agreement": round(agreement, 4)},
        )


def check_limits(limits: Limits, evidence: Mapping[str, float | str]) -> None:
    """Raises: Refused TOO_SLOW, TOO_MUCH_MEMORY."""
    p95, memory = evidence.get("p95_ms"), evidence.get("memory_bytes")
    if limits.max_p95_ms is not None and isinstance(p95, float) and p95 > limits.max_p95_ms:
        raise Refused(Reason.TOO_SLOW, f"p95 is {p95:.3g} ms here, at most {limits.max_p95_ms:g} ms allowed", evidence)
    if limits.max_memory_bytes is not None and isinstance(memory, float) and memory > limits.max_memory_bytes:
        raise Refused(
            Reason.TOO_MUCH_MEMORY,
            f"it takes {memory:.0f} bytes of memory, at most {limits.max_memory_bytes} allowed",
            evidence,
        )


def _measure(model: Model, cases: Sequence[Case]) -> dict[str, float | str]:
    """p50 and p95 of runs in a row, on the first golden case or on zeros. A model that takes no zeros is not measured.

    A trial gives way to what answers requests: the time that it stood ready while others ran is none of the model's.
    """
    from runtimes.check import zeros
    from runtimes.contract import RuntimeFailure

    feeds, outputs = _given(model, cases[0]) if cases else (zeros(model.inputs), None)
    if feeds is None:
        return {}
    took: list[float] = []
    waits_s = 0.0
    end = time.perf_counter() + MEASURE_S
    try:
        model.run(feeds, outputs)
        while len(took) < MEASURED_RUNS and (len(took) < 5 or time.perf_counter() < end):
            waited_s, started = priority.waited_s(), time.perf_counter()
            model.run(feeds, outputs)
            ended = time.perf_counter()
            waited_s = priority.waited_s() - waited_s
            waits_s += waited_s
            took.append(max(0.0, ended - started - waited_s) * 1000)
    except RuntimeFailure:
        if cases:
            raise
        return {}
    took.sort()
    return {
        "p50_ms": round(took[len(took) // 2], 4),
        "p95_ms": round(took[min(len(took) - 1, int(len(took) * 0.95))], 4),
        "gave_way_ms": round(waits_s * 1000, 3),
    }


def _interface(model: Model, case: Case) -> Interface:
    """The names that a golden case uses.  Raises: Refused."""
    from runtimes.naming import Interfaces

    interfaces = Interfaces.of(model)
    try:
        return interfaces.find(case.signature)
    except KeyError:
        known = ", ".join(map(repr, interfaces.signatures)) or "none"
        raise Refused(
            Reason.GOLDEN_MISMATCH,
            f"golden case {case.name!r} is for signature {case.signature!r}, which the model has not (it has: {known})",
        ) from None


def _given(model: Model, case: Case) -> tuple[Arrays, list[str] | None]:
    """What to run for a golden case.  Raises: Refused."""
    interface = _interface(model, case)
    return interface.own_names(_arrays(case, case.inputs)), interface.asked


def _arrays(case: Case, path: str) -> Arrays:
    """Raises: Refused."""
    from pathlib import Path

    from runtimes.check import read_npz

    try:
        return read_npz(Path(path))
    except ValueError as error:
        raise Refused(Reason.GOLDEN_MISMATCH, f"golden case {case.name!r}: {error}") from error


def _require(case: Case, names: Sequence[str], have: Mapping[str, Any], what: str) -> None:
    for name in names:
        if name not in have:
            raise Refused(
                Reason.GOLDEN_MISMATCH,
                f"golden case {case.name!r}: {name!r} is not among the {what}: {', '.join(sorted(have))}",
            )


def _refusal(request: Request, reason: Reason, message: str) -> Refused:
    if "bad_alloc" in message or "bad allocation" in message or "MemoryError" in message:
        return Refused(Reason.TOO_MUCH_MEMORY, f"{_memory_message(request.limits)} ({message})")
    return Refused(reason, message)


def _memory_message(limits: Limits) -> str:
    return f"it wants more memory than the {limits.memory_bytes} bytes a trial may take here"


if __name__ == "__main__":
    sys.exit(main())
