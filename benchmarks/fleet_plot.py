"""The fleet's table as a picture: what grows with the number of devices, and the course of each rollout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

PANELS = (
    (
        "start of a rollout to its end, s",
        (("by the server", lambda r: r.rollout_s), ("last commit of a device", lambda r: r.last_commit_s or float("nan"))),
    ),
    (
        "CPU of a rollout, ms per device",
        tuple(
            (part, lambda r, part=part: 1000 * getattr(r.rollout_cpu, part) / r.devices)
            for part in ("server", "broker", "simulator")
        ),
    ),
    ("most memory, MB", (("server", lambda r: r.server_mb[0]), ("broker", lambda r: r.broker_mb[0]))),
    ("API meanwhile, ms", (("p50", lambda r: r.api(0.5)), ("p99", lambda r: r.api(0.99)))),
    ("reports stored per second of the server's CPU", (("", lambda r: r.reports_per_core_s),)),
)  # fmt: skip


def draw(results: Sequence[Any], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(16, 9), layout="constrained")
    sizes = [result.devices for result in results]
    for axis, (title, curves) in zip(axes.flat, PANELS, strict=False):
        for name, pick in curves:
            axis.plot(sizes, [pick(result) for result in results], marker="o", label=name)
        axis.set_title(title, fontsize=11, loc="left")
        axis.set_xlabel("devices")
        axis.set_xscale("log")
        axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axis.minorticks_off()
        axis.set_ylim(bottom=0)
        if curves[0][0]:
            axis.legend(frameon=False)
    course = axes.flat[len(PANELS)]
    for result in results:
        moments = result.reports[0].moments
        course.plot([m.at for m in moments], [100 * m.committed / result.devices for m in moments], label=f"{result.devices:,}")
    course.set_title("devices that committed, % over s", fontsize=11, loc="left")
    course.legend(frameon=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
