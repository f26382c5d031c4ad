"""What a device tells the fleet of its models: differences, signed, at intervals, and nothing where it was switched off."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agent.contract.telemetry import TELEMETRY_PAYLOAD_TYPE, Counters, Figures, MachineFigures, ModelFigures, ServeFigures
from agent.sync.fleet.counters import Counter
from agent.sync.fleet.outbox import Outbox
from agent.sync.fleet.reports import Reporter, Signer
from agent.sync.fleet.telemetry import Collector, machine_figures
from agent.sync.serving import ServeAway


class Time:
    now = 1000.0

    def wall(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now


class Serve:
    def __init__(self) -> None:
        self.instance, self.away = "one", False
        self.counted: dict[tuple[str, int, str], Figures] = {}

    def counters(self) -> ServeFigures:
        if self.away:
            raise ServeAway("it restarts", sent=False)
        found = tuple(Counters(model=m, release=r, begun=b, figures=f) for (m, r, b), f in self.counted.items())
        return ServeFigures(instance=self.instance, counters=found)


class Told:
    def __init__(self) -> None:
        self.all: list[tuple[float, dict[tuple[str, int], Figures], MachineFigures]] = []

    def telemetry(self, seconds: float, figures: tuple[ModelFigures, ...], machine: MachineFigures) -> None:
        self.all.append((seconds, {(one.model, one.release): one.figures for one in figures}, machine))


def answered(count: int) -> Figures:
    return Figures(ok=count, latency={80: count})


@pytest.fixture
def parts(tmp_path: Path):
    time, serve, told = Time(), Serve(), Told()
    return time, serve, told, Collector(serve, told, time, 300.0, lambda: 2, tmp_path)


def test_differences_are_told_at_intervals(parts) -> None:
    time, serve, told, collector = parts
    serve.counted["m", 1, "a"] = answered(1000)
    collector.collect()  # what it counted before is of no time that is known
    serve.counted["m", 1, "a"] = answered(1010)
    time.now += 299
    collector.collect()
    assert told.all == []
    time.now += 1
    collector.collect()
    serve.counted["m", 1, "a"] = answered(1011)
    serve.counted["m", 2, "b"] = answered(7)  # loaded meanwhile: all of it is new
    time.now += 310
    collector.collect()
    assert [(seconds, figures) for seconds, figures, _ in told.all] == [
        (300.0, {("m", 1): answered(10)}), (310.0, {("m", 1): answered(1), ("m", 2): answered(7)}),
    ]  # fmt: skip
    assert told.all[0][2].serve_restarts == 2


def test_a_serve_that_began_anew_counts_from_nothing(parts) -> None:
    time, serve, told, collector = parts
    serve.counted["m", 1, "a"] = answered(1000)
    collector.collect()
    serve.instance, serve.counted = "two", {("m", 1, "c"): answered(5)}
    time.now += 300
    collector.collect()
    serve.counted = {("m", 1, "d"): answered(3)}  # the same release loaded again
    time.now += 300
    collector.collect()
    assert [figures for _, figures, _ in told.all] == [{("m", 1): answered(5)}, {("m", 1): answered(3)}]


def test_while_serve_is_away_nothing_is_lost(parts) -> None:
    time, serve, told, collector = parts
    serve.counted["m", 1, "a"] = answered(10)
    collector.collect()
    serve.away = True
    time.now += 300
    collector.collect()
    serve.away, serve.counted["m", 1, "a"] = False, answered(30)
    time.now += 60
    collector.collect()
    assert [(seconds, figures) for seconds, figures, _ in told.all] == [(360.0, {("m", 1): answered(20)})]


def test_counters_that_went_back_are_told_of_as_nothing(parts) -> None:
    time, serve, told, collector = parts
    serve.counted["m", 1, "a"] = answered(10)
    collector.collect()
    serve.counted["m", 1, "a"] = answered(4)
    time.now += 300
    collector.collect()
    assert [figures for _, figures, _ in told.all] == [{}]


def test_switched_off_nothing_is_asked_or_told(tmp_path: Path) -> None:
    time, serve, told = Time(), Serve(), Told()
    serve.counters = None  # type: ignore[assignment,method-assign]
    collector = Collector(serve, told, time, 0.0, lambda: 0, tmp_path)
    for _ in range(3):
        collector.collect()
        time.now += 1e6
    assert told.all == []


def test_heat_and_what_is_done_about_it(tmp_path: Path) -> None:
    (tmp_path / "thermal_zone0").mkdir()
    (tmp_path / "thermal_zone0" / "temp").write_text("71234\n")
    assert machine_figures(1, tmp_path).celsius == 71.2
    assert not machine_figures(1, tmp_path).throttled
    for number, (kind, state) in enumerate((("pwm-fan", "3"), ("Processor", "2"))):
        (tmp_path / f"cooling_device{number}").mkdir()
        (tmp_path / f"cooling_device{number}" / "type").write_text(kind)
        (tmp_path / f"cooling_device{number}" / "cur_state").write_text(state)
        assert machine_figures(1, tmp_path).throttled == (kind == "Processor")
    (tmp_path / "thermal_zone0" / "temp").write_text("999999999")  # a sensor that lies
    assert machine_figures(1, tmp_path).celsius is None


def test_it_is_signed_and_small(identity, clock, tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "outbox.db")
    reporter = Reporter("crane-7", Signer(identity.key), outbox, Counter(tmp_path / "counter.json", clock), clock, lambda: None)
    usual = Figures(
        ok=300_000, run=3, latency=dict.fromkeys(range(60, 75), 20000), rows=3000, classes=dict.fromkeys(range(10), 300),
        confidence=dict.fromkeys(range(10), 300),
    )  # fmt: skip
    reporter.telemetry(300.0, (ModelFigures(model="digits", release=3, figures=usual),), machine_figures(0, tmp_path))
    (item,) = outbox.first(5)
    outbox.close()
    assert item.kind == "telemetry"
    assert json.loads(item.payload)["payloadType"] == TELEMETRY_PAYLOAD_TYPE
    assert len(item.payload) * 12 < 16 * 1024, "what docs/reference/telemetry.md says an hour costs"
    print(len(item.payload), "bytes a message")
