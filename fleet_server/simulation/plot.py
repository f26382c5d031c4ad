"""The course of a rollout as a picture (SVG): devices over time, with the moments at which waves began."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from xml.sax.saxutils import escape

from fleet_server.simulation.report import Moment, Report

WIDTH, HEIGHT = 900, 420
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 50, 50
CURVES: tuple[tuple[str, str, Callable[[Moment], int]], ...] = (
    ("connected", "#9aa4b2", lambda moment: moment.connected),
    ("updating", "#bf8700", lambda moment: moment.busy),
    ("committed", "#1f6feb", lambda moment: moment.committed),
    ("refused or rolled back", "#cf222e", lambda moment: moment.bad),
)
TICKS = 5


def svg(report: Report) -> str:
    """The whole picture; of a rollout that was seen less than twice, its title alone."""
    title = f"{report.release} to {report.devices} devices: {report.ended.state} after {report.over_s:.0f} s"
    body = list(_drawn(report)) if len(report.moments) > 1 else []
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="22" font-size="15">{escape(title)}</text>',
        *body,
        "</svg>",
        "",
    ])  # fmt: skip


def _drawn(report: Report) -> list[str]:
    moments = report.moments
    last_s = max(moments[-1].at, 0.001)
    most = max(1, *(pick(moment) for _, _, pick in CURVES for moment in moments))

    def x(at: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * at / last_s, 1)

    def y(number: float) -> float:
        return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * number / most, 1)

    found = []
    for tick in range(TICKS + 1):
        number, at = most * tick / TICKS, last_s * tick / TICKS
        found += [
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(number)}" y2="{y(number)}" stroke="#e5e8ec"/>',
            f'<text x="{LEFT - 8}" y="{y(number) + 4}" text-anchor="end">{number:.0f}</text>',
            f'<text x="{x(at)}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{at:.0f} s</text>',
        ]
    for at, words in _waves(moments):
        beside, anchor = (4, "start") if at < last_s / 2 else (-4, "end")
        found += [
            f'<line x1="{x(at)}" x2="{x(at)}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="#57606a" stroke-dasharray="4 3"/>',
            f'<text x="{x(at) + beside}" y="{TOP + 12}" fill="#57606a" text-anchor="{anchor}">{escape(words)}</text>',
        ]
    for number, (name, colour, pick) in enumerate(CURVES):
        points = " ".join(f"{x(moment.at)},{y(pick(moment))}" for moment in moments)
        found += [
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>',
            f'<text x="{LEFT + 170 * number}" y="{HEIGHT - 10}" fill="{colour}">{name}</text>',
        ]
    return found


def _waves(moments: Sequence[Moment]) -> list[tuple[float, str]]:
    """When each wave began, and when the rollout was over."""
    found = [(moments[0].at, "wave 1")]
    for before, after in itertools.pairwise(moments):
        if after.wave != before.wave:
            found.append((after.at, f"wave {after.wave + 1}"))
        if after.state != before.state:
            found.append((after.at, after.state))
    return found
