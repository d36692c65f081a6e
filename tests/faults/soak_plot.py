"""The picture of a soak: ``python -m tests.faults.soak_plot soak.json docs/explanation/soak.svg``.

Plain SVG, without a library. It has a background of its own, so that it can be read on a light page
and on a dark one.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

#: Pixels: the whole, one chart, and what surrounds it.
WIDTH, HEIGHT = 760, 112
LEFT, RIGHT, ABOVE, BETWEEN = 64, 16, 64, 34

STYLE = """
  .page { fill: #ffffff } text { fill: #333333; font: 12px sans-serif }
  .title { font-weight: bold } .small { font-size: 11px } .end { text-anchor: end }
  .grid { stroke: #dddddd } .line { fill: none; stroke: #0b6fa4; stroke-width: 1.4 }
  .warm { fill: #f3f3f3 }
  @media (prefers-color-scheme: dark) {
    .page { fill: #1c1e21 } text { fill: #d8d8d8 } .grid { stroke: #3a3d42 }
    .line { stroke: #62b8e8 } .warm { fill: #25282c }
  }
"""

#: What each chart is called, and what of a sample it shows.
CHARTS: list[tuple[str, Callable[[dict[str, Any]], float | None]]] = [
    ("resident memory, MiB", lambda sample: sample["resident"] / 2**20),
    ("connections", lambda sample: sample["connections"]),
    ("threads", lambda sample: sample["threads"]),
    ("descriptors", lambda sample: sample["descriptors"]),
    (
        "p99 of a word and its echo, of clients that do nothing wrong, ms",
        lambda sample: None if sample["p99"] is None else sample["p99"] * 1000,
    ),
]


def ceiling(value: float) -> float:
    """A round number that is not below *value*."""
    if value <= 0:
        return 1.0
    power: float = 10.0 ** math.floor(math.log10(value))
    return next(power * step for step in (1, 1.5, 2, 3, 4, 5, 6, 8, 10) if power * step >= value)


def chart(title: str, points: list[tuple[float, float]], end: float, warm: float, top: int) -> str:
    """One chart.

    :param points: minutes, and values from 0 up.
    :param end: the minutes of the whole run.
    :param warm: the minutes of its warm-up.
    """
    highest = ceiling(max((value for _, value in points), default=0.0))
    width = WIDTH - LEFT - RIGHT

    def x(minutes: float) -> float:
        return LEFT + width * minutes / end

    def y(value: float) -> float:
        return top + HEIGHT * (1 - value / highest)

    parts = [
        f'<text class="title" x="{LEFT}" y="{top - 8}">{escape(title)}</text>',
        f'<rect class="warm" x="{LEFT}" y="{top}" width="{x(warm) - LEFT:.1f}" height="{HEIGHT}"/>',
    ]
    for share in (0.0, 0.5, 1.0):
        at = y(highest * share)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
            f'<text class="small end" x="{LEFT - 6}" y="{at + 4:.1f}">{highest * share:g}</text>'
        )
    line = " ".join(f"{x(minutes):.1f},{y(value):.1f}" for minutes, value in points)
    parts.append(f'<polyline class="line" points="{line}"/>')
    return "\n".join(parts)


def draw(report: dict[str, Any]) -> str:
    """The picture of what :mod:`tests.faults.soak` has written down."""
    samples, end = report["samples"], max(report["seconds"] / 60, 0.01)
    step = HEIGHT + BETWEEN
    height = ABOVE + step * len(CHARTS) + 6
    deaths, warm = sum(report["died"].values()), end / 6
    said = (
        f"{end:.0f} minutes of flask websockets serve with {report['implementation']}: "
        f"{deaths:,} connections died in {len(report['died'])} ways"
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'width="{WIDTH}" height="{height}" role="img">',
        f"<title>{escape(said)}</title>",
        f"<style>{STYLE}</style>",
        f'<rect class="page" width="{WIDTH}" height="{height}"/>',
        f'<text x="{LEFT}" y="24">{escape(said)}. Grey: the warm-up.</text>',
    ]
    top = ABOVE
    for title, value in CHARTS:
        points = [
            (sample["seconds"] / 60, shown)
            for sample in samples
            if (shown := value(sample)) is not None
        ]
        parts.append(chart(title, points, end, warm, top))
        top += step
    for share in range(7):
        at, minutes = LEFT + (WIDTH - LEFT - RIGHT) * share / 6, end * share / 6
        anchor = ' class="small end"' if share == 6 else ' class="small"'
        label = f"{minutes:g} min" if minutes == int(minutes) else f"{minutes:.1f} min"
        parts.append(f'<text{anchor} x="{at:.0f}" y="{top - BETWEEN + 16}">{label}</text>')
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    source, target = map(Path, sys.argv[1:])
    target.write_text(draw(json.loads(source.read_text())))


if __name__ == "__main__":
    main()
