"""What the server counts, as Prometheus reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import msgspec

TEXT = "text/plain; version=0.0.4; charset=utf-8"


class Sample(msgspec.Struct, frozen=True):
    """One number of a metric, with its labels."""

    value: float
    labels: Mapping[str, str] = {}


class Metric(msgspec.Struct, frozen=True):
    """A counter or a gauge, and where its numbers come from. A counter's name ends in `_total`."""

    name: str
    help: str
    read: Callable[[], Iterable[Sample]]

    @property
    def kind(self) -> str:
        return "counter" if self.name.endswith("_total") else "gauge"


class Metrics:
    """Every metric of the server. Whoever counts something adds it."""

    def __init__(self) -> None:
        self._all: list[Metric] = []

    def add(self, name: str, says: str, read: Callable[[], Iterable[Sample]]) -> None:
        self._all.append(Metric(name, says, read))

    def text(self) -> str:
        lines = []
        for metric in self._all:
            lines += [f"# HELP {metric.name} {metric.help}", f"# TYPE {metric.name} {metric.kind}"]
            lines += [f"{metric.name}{_labels(sample.labels)} {_number(sample.value)}" for sample in metric.read()]
        return "\n".join([*lines, ""])


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(value)


def _labels(labels: Mapping[str, str]) -> str:
    said = ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items())
    return f"{{{said}}}" if said else ""


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
