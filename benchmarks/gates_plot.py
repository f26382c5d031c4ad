"""The table of `benchmarks.gates` as a picture: who is stopped, and how many devices are harmed before."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def draw(rows: Sequence[Any], path: Path) -> None:
    """One line of bars for each scenario; `rows` as `benchmarks.gates` measures them, those of one scenario together."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    scenarios = [(scenario, list(found)) for scenario, found in itertools.groupby(rows, key=lambda row: row.scenario)]
    rules = [row.rule for row in scenarios[0][1]]
    figure, axes = plt.subplots(1, 2, figsize=(13, 0.5 * len(scenarios) + 1.5), layout="constrained", sharey=True)
    height = 0.8 / len(rules)
    for axis, title, pick in (
        (axes[0], "rollouts that were stopped or held, %", lambda row: 100 * (row.stopped + row.held)),
        (axes[1], "devices harmed, mean", lambda row: row.harmed),
    ):
        for number, rule in enumerate(rules):
            places = [place + number * height for place in range(len(scenarios))]
            axis.barh(places, [pick(found[number]) for _, found in scenarios], height, label=rule)
        axis.set_title(title, fontsize=11, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
    axes[1].set_xscale("symlog", linthresh=1)
    axes[0].set_yticks([place + 0.4 - height / 2 for place in range(len(scenarios))])
    axes[0].set_yticklabels([("" if scenario.good else "bad: ") + scenario.name for scenario, _ in scenarios])
    axes[0].invert_yaxis()
    axes[0].legend(frameon=False, loc="lower right")
    figure.savefig(path)
