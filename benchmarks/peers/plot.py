"""The table as a picture: a bar per server and number, ours in colour. The numbers differ by orders of magnitude: logarithmic."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PANELS = (
    ("one client, tiny model: µs (less is better)", lambda r: r.p50_us["tiny 1"]),
    ("8 clients, tiny model: requests/s (more is better)", lambda r: r.per_s["tiny 8"]),
    ("one client, 602 KB image: µs (less is better)", lambda r: r.p50_us["image 1"]),
    ("8 clients, 602 KB image: requests/s (more is better)", lambda r: r.per_s["image 8"]),
    ("start to first prediction: s (less is better)", lambda r: r.start_s),
    ("memory with both models: MB (less is better)", lambda r: r.pss_mb),
)
OURS, THEIRS = "#1f6feb", "#9aa4b2"


def draw(results: Sequence[Any], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(3, 2, figsize=(13, 10), layout="constrained")
    names = [result.name for result in results]
    for axis, (title, pick) in zip(axes.flat, PANELS, strict=True):
        medians = [statistics.median(pick(result)) for result in results]
        errors = [
            [m - min(pick(r)) for m, r in zip(medians, results, strict=True)],
            [max(pick(r)) - m for m, r in zip(medians, results, strict=True)],
        ]
        bars = axis.barh(names, medians, xerr=errors, color=[OURS, *[THEIRS] * (len(results) - 1)], ecolor="#57606a")
        axis.bar_label(bars, labels=[f"{m:,.3g}" if m < 10 else f"{m:,.0f}" for m in medians], padding=6, fontsize=9)
        axis.set_xscale("log")
        axis.set_xlim(right=max(medians) * 4)
        axis.set_title(title, fontsize=11, loc="left")
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
