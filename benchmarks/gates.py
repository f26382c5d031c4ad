"""How soon gates stop what is bad, and how seldom what is good: rollouts in fast motion, by the product's own functions and by rules of others.

    python -m benchmarks.gates --seeds 200 --devices 300 --plot gates.svg

Every rule sees the same devices: who is there, what each of them is going to answer, and how long it takes. Waves are 1, 5, 25 and 100 %.
A rollout without a gate goes through the same waves and stops for nothing: the time of the others is measured by it.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np

from benchmarks import gates_devices, gates_plot, gates_rules
from benchmarks.gates_devices import Scenario
from benchmarks.gates_rules import Course, Rule


class Row(msgspec.Struct, frozen=True):
    """What a rule did in a scenario, over all seeds. `stopped` and `held`: which part of the rollouts it ended, and which it let stand
    until a person comes; `harmed`: devices that had been told when they failed, in the mean; `decided`: minutes to the stop, the median of those
    stopped; `slower`: of the completed ones, how many times as long as without a gate, the median; `steps`: signatures.
    """

    scenario: Scenario
    rule: str
    stopped: float
    held: float
    harmed: float
    decided: float
    slower: float
    steps: float


def measure(scenario: Scenario, rule: Callable[[], Rule], devices: int, seeds: int) -> Row:
    found: list[tuple[Course, Course]] = []
    for seed in range(seeds):
        fleet = gates_devices.fleet(scenario, devices, seed)
        found.append((gates_rules.run(fleet, rule()), _ungated(scenario, devices, seed)))
    stopped = [course for course, _ in found if course.end == "stopped"]
    ratios = [course.minutes / free.minutes for course, free in found if course.end == "completed" and free.minutes]
    return Row(
        scenario=scenario, rule=rule().name,
        stopped=len(stopped) / seeds, held=sum(course.end == "held" for course, _ in found) / seeds,
        harmed=statistics.fmean(course.harmed for course, _ in found),
        decided=statistics.median(course.minutes for course in stopped) if stopped else float("nan"),
        slower=statistics.median(ratios) if ratios else float("nan"),
        steps=statistics.fmean(course.signed for course, _ in found),
    )  # fmt: skip


@functools.lru_cache(maxsize=100_000)
def _ungated(scenario: Scenario, devices: int, seed: int) -> Course:
    return gates_rules.run(gates_devices.fleet(scenario, devices, seed), gates_rules.NoGate())


def table(rows: Sequence[Row]) -> str:
    """In Markdown: a line for each scenario."""
    rules = list(dict.fromkeys(row.rule for row in rows))
    lines = ["| | " + " | ".join(rules) + " |", "|---|" + "---|" * len(rules)]
    for scenario, found in itertools.groupby(rows, key=lambda row: row.scenario):
        lines.append(f"| {scenario.name} | " + " | ".join(map(_cell, found)) + " |")
    return "\n".join(lines)


def _cell(row: Row) -> str:
    times = f"{row.slower:.2f} ×" if row.slower == row.slower else "-"
    when = f"{row.decided:.0f} min" if row.decided == row.decided else "-"
    return f"{row.stopped:.1%} / {row.held:.1%} / {row.harmed:.1f} / {when} / {times}"


def main() -> None:
    words = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    words.add_argument("--seeds", type=int, default=200)
    words.add_argument("--devices", type=int, nargs="+", default=[300])
    words.add_argument("--only", help="Scenarios whose name has this in it.")
    words.add_argument("--json", type=Path)
    words.add_argument("--plot", type=Path)
    asked = words.parse_args()
    rows: list[Row] = []
    for devices in asked.devices:
        began, mine = time.process_time(), list[Row]()
        for scenario in gates_devices.SCENARIOS:
            if asked.only and asked.only not in scenario.name:
                continue
            mine += [measure(scenario, rule, devices, asked.seeds) for rule in gates_rules.RULES]
        print(
            f"\n{devices} devices, {asked.seeds} seeds: stopped / held / harmed / minutes to the stop / times as long as without a gate"
        )
        print(table(mine))
        steps = {row.rule: row.steps for row in mine}
        print(f"signatures of the last scenario: {steps}; {time.process_time() - began:.0f} s of processor time", flush=True)
        rows += mine
    if asked.json:
        asked.json.write_bytes(msgspec.json.format(msgspec.json.encode(rows)))
    if asked.plot:
        gates_plot.draw(rows[: len(gates_rules.RULES) * len(gates_devices.SCENARIOS)], asked.plot)


if __name__ == "__main__":
    np.seterr(all="raise")
    main()
