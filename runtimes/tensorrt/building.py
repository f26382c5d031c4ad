"""Builds an engine in this process: `python -m runtimes.tensorrt.building` reads an order from its input and says how far it is.

One line of JSON for each thing that is said: `{"library", "version"}` first, `{"phase", "done", "of"}` while it goes on, and at the end
`{"built": true}` or `{"refused": why}`. It writes the engine where the order says, not yet under its own name.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

from runtimes.contract import RuntimeUnavailable
from runtimes.tensorrt import libraries, refusals
from runtimes.tensorrt.order import Order, Profile, decoded
from runtimes.tensorrt.refusals import Complaint

WORKSPACE = "WORKSPACE"
_PR_SET_PDEATHSIG = 1


class Refused(Exception):
    """The model cannot be built so; the message says why, and what to change."""


def build(order: Order, trt: Any) -> bytes:
    """The engine.  Raises: Refused."""
    log = libraries.logger(trt)
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(order.model)):
        raise Refused(refusals.of_parser(list(_complaints(parser))))
    config = builder.create_builder_config()
    _set_capability(trt, config, order.capability)
    _set_profiles(builder, network, config, order)
    if order.level is not None:
        config.builder_optimization_level = order.level
    if order.memory_bytes is not None:
        config.set_memory_pool_limit(getattr(trt.MemoryPoolType, WORKSPACE), order.memory_bytes)
    if hasattr(config, "progress_monitor"):  # TensorRT 9 and later
        config.progress_monitor = _monitor(trt)
    log.errors.clear()
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise Refused(refusals.of_builder(log.errors))
    return bytes(engine)


def _set_capability(trt: Any, config: Any, capability: str) -> None:
    if not capability:
        return
    known = getattr(trt, "ComputeCapability", None)
    if known is None:
        raise Refused("this TensorRT builds for the GPU that is here, and for no other: leave the compute capability out")
    names = [name.lower() for name in known.__members__ if name.startswith("SM")]
    if capability not in names:
        raise Refused(f"this TensorRT does not build for {capability}; it does for {', '.join(names)}")
    config.num_compute_capabilities = 1
    config.set_compute_capability(known.__members__[capability.upper()], 0)


def _set_profiles(builder: Any, network: Any, config: Any, order: Order) -> None:
    """One profile, where the model has inputs of free size.  Raises: Refused when what the order says does not fit them."""
    free = {}
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shape = tuple(tensor.shape)
        if -1 in shape:
            free[tensor.name] = shape
    unknown = [name for name in order.profiles if name not in free]
    if unknown:
        raise Refused(f"no input {unknown[0]!r} has a free size; those that have: {', '.join(sorted(free)) or 'none'}")
    if not free:
        return
    profile = builder.create_optimization_profile()
    for name, shape in free.items():
        said = order.profiles.get(name) or _of_batch(shape, order.batch)
        _check_fits(name, shape, said)
        profile.set_shape(name, said.least, said.usual, said.most)
    config.add_optimization_profile(profile)


def _of_batch(shape: tuple[int, ...], batch: tuple[int, int, int]) -> Profile:
    return Profile(*(tuple(size if dimension == -1 else dimension for dimension in shape) for size in batch))


def _check_fits(name: str, shape: tuple[int, ...], profile: Profile) -> None:
    for said in (profile.least, profile.usual, profile.most):
        if len(said) != len(shape) or any(one not in (-1, size) for one, size in zip(shape, said, strict=True)):
            raise Refused(f"input {name!r} has shape {list(shape)}, which {list(said)} is not")


def _complaints(parser: Any) -> Iterator[Complaint]:
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        called = {name: getattr(error, name, None) for name in ("node_name", "node_operator")}  # TensorRT 8.6 and later
        yield Complaint(error.desc(), error.node(), *(str(one()) if one is not None else "" for one in called.values()))


def _monitor(trt: Any) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Says how far the builder is. Its phases are trees; the last one begun is told."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}

        def phase_start(self, phase: str, _parent: str | None, steps: int) -> None:
            self._steps[phase] = steps
            _say(phase=phase, done=0, of=steps)

        def step_complete(self, phase: str, step: int) -> bool:
            _say(phase=phase, done=step + 1, of=self._steps.get(phase, 0))
            return True

        def phase_finish(self, phase: str) -> None:
            self._steps.pop(phase, None)

    return Monitor()


def _say(**said: Any) -> None:
    sys.stdout.write(json.dumps(said) + "\n")
    sys.stdout.flush()


def answer(line: str) -> int:
    """Does what an order says; the exit status."""
    order, out = decoded(line)
    try:
        label, trt = libraries.builder()
        _say(library=label, version=str(trt.__version__))
        engine = build(order, trt)
    except (Refused, RuntimeUnavailable) as error:
        _say(refused=str(error))
        return 1
    except MemoryError:
        _say(refused="memory ran out while it was built")
        return 1
    with out.open("wb") as file:
        file.write(engine)
        file.flush()
        os.fsync(file.fileno())
    _say(built=True)
    return 0


def main() -> int:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # nobody waits for what an orphan builds
    return answer(sys.stdin.readline())


if __name__ == "__main__":
    sys.exit(main())
