"""The ratios as bars, with the range of the runs."""
# mypy: disable-error-code="import-not-found,import-untyped"

from __future__ import annotations

from pathlib import Path
from typing import Any

from .http_report import REFERENCE

#: For each server of a panel: the ratio, the lowest and the highest of the runs.
Bars = dict[str, dict[str, tuple[float, float, float]]]

#: Told apart by everybody, on paper as well (Okabe and Ito).
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
#: Inches.
WIDTH, BAR, GAP, FRAME = 8.5, 0.17, 0.14, 1.1


def _bar(found: dict[str, Any] | None) -> tuple[float, float, float] | None:
    each = [ratio for ratio in found["ratios"] if ratio is not None] if found else []
    if not found or found["ratio"] is None or not each:
        return None
    return found["ratio"], min(each), max(each)


def _kept(bars: dict[str, Any]) -> dict[str, tuple[float, float, float]]:
    return {name.replace("_", "-"): each for name, found in bars.items() if (each := _bar(found))}


def panels(results: dict[str, dict[str, Any]]) -> list[tuple[str, Bars]]:
    """What is drawn: a panel for each kind, a group for each mode, a bar for each server."""
    rates: Bars = {}
    idle: Bars = {}
    http: Bars = {}
    of_each: Bars = {}
    beside: Bars = {}
    for mode, result in results.items():
        if "to_raw" in result:
            idle[mode] = _kept(result["to_raw"]["resident"])
        elif "compared" in result:
            label = mode + (" (p99, less is better)" if result["compared"] == "p99" else "")
            found = {
                name: {"ratio": result["ratio"][name], "ratios": result["ratios"][name]}
                for name in result["ratio"]
            }
            rates[label] = _kept(found)
        elif "ratios" in result:
            label = mode if "client_with" in result["medians"] else f"{mode} (p99)"
            beside[label] = _kept({"with trouble beside it": result})
        else:
            others = {name: each for name, each in result.items() if name != REFERENCE}
            http[mode] = _kept({name: each[REFERENCE] for name, each in others.items()})
            of_each[mode] = _kept({name: each["ours"] for name, each in result.items()})
    titles = {
        "WebSockets: messages per second, raw ASGI = 1": rates,
        "Idle connections: memory of each, raw ASGI = 1 (less is better)": idle,
        f"HTTP: right answers per second, {REFERENCE} = 1": http,
        "HTTP: ours as a multiple of each": of_each if not any(http.values()) else {},
        "With trouble beside it, without it = 1": beside,
    }
    kept = {
        title: {mode: each for mode, each in bars.items() if each} for title, bars in titles.items()
    }
    return [(title, bars) for title, bars in kept.items() if bars]


def plot(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw *results* into *path*, whose suffix says how (svg, png, pdf)."""
    from matplotlib.figure import Figure

    drawn = panels(results)
    heights = [FRAME + sum(len(group) * BAR + GAP for group in bars.values()) for _, bars in drawn]
    figure = Figure(figsize=(WIDTH, max(1.0, sum(heights))), layout="constrained")
    if drawn:
        grid = figure.subplots(len(drawn), 1, squeeze=False, height_ratios=heights)
        for axes, (title, bars) in zip(grid[:, 0], drawn, strict=True):
            _draw(axes, title, bars)
    figure.savefig(path)


def _draw(axes: Any, title: str, bars: Bars) -> None:
    names = list(dict.fromkeys(name for group in bars.values() for name in group))
    labelled: set[str] = set()
    top, ticks = 0.0, []
    highest = max(high for group in bars.values() for _, _, high in group.values())
    for group in bars.values():
        first = top
        for name, (ratio, low, high) in group.items():
            axes.barh(
                top,
                ratio,
                height=BAR * 0.9,
                color=COLOURS[names.index(name) % len(COLOURS)],
                label=None if name in labelled else name,
            )
            axes.plot([low, high], [top, top], color="black", linewidth=1.2)
            axes.text(
                max(high, ratio) + highest * 0.01,
                top,
                f"{ratio:.2f}",
                va="center",
                fontsize=7,
            )
            labelled.add(name)
            top += BAR
        ticks.append((first + top - BAR) / 2)
        top += GAP
    axes.axvline(1.0, color="black", linewidth=0.8, linestyle="--", zorder=0)
    axes.set_yticks(ticks, list(bars), fontsize=8)
    axes.set_xlim(0, highest * 1.12)
    axes.set_title(title, fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylim(max(top, 4 * BAR), -BAR)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
