"""An isolated model behind the contract of all models: loads it in a process of its own, and hands out slots to runs.

Each run has a slot of its own while it goes on; slots are made as they are needed, to a limit.
"""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path

from runtimes.contract import Array, LoadOptions, Placement, Signature, TensorSpec
from runtimes.isolated import wire
from runtimes.isolated.process import Died, Process
from runtimes.isolated.slot import Slot

MAX_SLOTS = 16
COPY_BYTES = 32 * 1024  # outputs up to this size are copied out of the slot, which is then free at once
RUN_LIMIT_S = 60.0
LOAD_LIMIT_S = 600.0  # engines that optimise for the hardware take minutes; whoever waits for one that hangs waits no longer


def load(runtime: str, path: Path, options: LoadOptions, *, slots: int = 0, limit_s: float = LOAD_LIMIT_S) -> IsolatedModel:
    """Loads it in a process of its own; `slots` runs may go on at once there (0: as many as there are threads, to a limit).

    Raises: as `Runtime.load`; ModelInvalid when the process dies of it or is not done in time, MemoryError when the kernel
    killed it.
    """
    process = Process()
    try:
        data = None if options.data is None else {name: str(file) for name, file in options.data.items()}
        libraries = tuple(map(str, options.libraries))
        found = process.load(wire.Load(runtime, str(path), options.threads, dict(options.extra), data, libraries), limit_s)
        return IsolatedModel(process, found, slots or MAX_SLOTS)
    except BaseException:
        process.end(patience_s=0)
        raise


class IsolatedModel:
    """A model in a process of its own."""

    def __init__(self, process: Process, loaded: wire.Loaded, slots: int) -> None:
        self.process = process
        self._inputs = tuple(spec.spec() for spec in loaded.inputs)
        self._outputs = tuple(spec.spec() for spec in loaded.outputs)
        self._placement = Placement(loaded.requested, loaded.actual, loaded.fallback)
        self._stateful = loaded.stateful
        self._signatures = tuple(signed.signature() for signed in loaded.signatures)
        self.idle_slots: list[Slot] = []
        self.slots: list[Slot] = []
        self._most = slots
        self.waiting = 0  # threads, for a slot
        self._free = threading.Condition()
        self._numbers = itertools.count(1)
        self.run_limit_s = RUN_LIMIT_S
        """How long a run may take; then it fails, and with it its process and whatever else runs there."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self._inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self._outputs

    @property
    def placement(self) -> Placement:
        return self._placement

    @property
    def stateful(self) -> bool:
        return self._stateful

    @property
    def signatures(self) -> tuple[Signature, ...]:
        return self._signatures

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def is_alive(self) -> bool:
        return self.process.is_alive

    @property
    def ending(self) -> str:
        """How its process ended, in words."""
        return self.process.ending

    @property
    def memory_bytes(self) -> int:
        """What of its process is in memory now; 0 when it is gone."""
        try:
            return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
        except (OSError, IndexError):
            return 0

    def on_death(self, died: Died) -> None:
        """Calls `died`, in a thread of this module, once the process ends by itself; at once when it has."""
        self.process.on_death = died
        if not self.process.is_alive:
            died(self.process.ending)

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None) -> list[Array]:
        return self.run_in(0, feeds, outputs)

    def run_in(self, sequence: int, feeds: Mapping[str, Array], outputs: Sequence[str] | None) -> list[Array]:
        slot, spare = self._slot()
        try:
            tensors = slot.run(feeds, outputs, sequence, self.run_limit_s)
            if spare and sum(tensor.size for tensor in tensors) > COPY_BYTES:
                kept, slot_of_views = slot, weakref.ref(self)
                slot = None  # type: ignore[assignment]
                return kept.views(tensors, lambda: _give_back(slot_of_views, kept))
            return slot.copies(tensors)
        finally:
            if slot is not None:
                self.give_back(slot)

    def sequence(self) -> IsolatedSequence:
        number = next(self._numbers)
        self.process.tell(wire.Sequence_(number, opens=True))
        return IsolatedSequence(self, number)

    def end_sequence(self, number: int) -> None:
        self.process.end_sequence(number)

    def close(self) -> None:
        self.process.end()
        self.process.on_death = lambda _: None  # whoever wanted to know may know this model
        with self._free:
            for slot in self.slots:
                slot.close()
            self.idle_slots.clear()
            self.slots.clear()

    def _slot(self) -> tuple[Slot, bool]:
        """A slot, and whether there are others for whoever comes next."""
        with self._free:
            while not self.idle_slots and len(self.slots) >= self._most:
                self.waiting += 1
                self._free.wait()
                self.waiting -= 1
            if not self.process.is_alive:
                self._free.notify_all()  # nor will anybody else who waits have a run
                raise self.process.gone()
            if not self.idle_slots:
                slot = Slot(self.process)
                self.slots.append(slot)
            else:
                slot = self.idle_slots.pop()
            return slot, bool(self.idle_slots) or len(self.slots) < self._most

    def give_back(self, slot: Slot) -> None:
        with self._free:
            self.idle_slots.append(slot)
            self._free.notify()


def _give_back(model: weakref.ref[IsolatedModel], slot: Slot) -> None:
    found = model()
    if found is not None:
        found.give_back(slot)


class IsolatedSequence:
    """State that lives in the process."""

    def __init__(self, model: IsolatedModel, number: int) -> None:
        self._model = model
        self._number = number

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None) -> list[Array]:
        return self._model.run_in(self._number, feeds, outputs)

    def close(self) -> None:
        self._model.end_sequence(self._number)
