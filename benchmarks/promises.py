"""What is promised: each row of work, against what, and the ratio that it must reach."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Any

from .compare import Work
from .report import range_text, ratio_text, ratios

_ALL = ("raw", "ours", "ours-async", "flask-sock")
_TWO = ("raw", "ours")
_FREE, _DEFLATE = "echo-50, both cores", "{}, deflate"
_FAN_OUTS = ("fan-out-500", "fan-out-2000", "fan-out-5000")

#: What has to be measured.
WORKS = [
    Work("echo-1", ("raw", "ours", "flask-sock")),
    Work("echo-50", _ALL),
    Work("echo-500", _ALL),
    Work("in-flight-100", _TWO),
    Work("echo-50", _TWO, free=True, label=_FREE),
    *(Work(mode, _TWO) for mode in _FAN_OUTS),
    *(Work(mode, _TWO, deflate=True, label=_DEFLATE.format(mode)) for mode in _FAN_OUTS),
]
IDLE_WORKS = [Work("idle-2000", ("raw", "ours", "ours-async")), Work("idle-10000", ("ours",))]
BYSTANDERS = ["echo-50-parked", "fan-out-1000-stuck"]
HTTP_WORK = Work("http-small", ("ours", "asgiref-reset", "gunicorn", "granian"))


@dataclass(frozen=True)
class Promise:
    """One row. Its ratio is that of *server*'s *what* to that of *base*."""

    work: str
    against: str
    least: str
    goal: str
    name: str  # of what was measured
    server: str = "ours"
    base: str | None = "raw"  # None: the figure itself
    what: str = "rates"


def _echo(base: str, against: str, bounds: tuple[tuple[str, str], ...]) -> list[Promise]:
    return [
        Promise(f"sync echo, {count}", against, least, goal, f"echo-{count}", base=base)
        for count, (least, goal) in zip((1, 50, 500), bounds, strict=True)
    ]


def _fan_out(name: str, work: str, least: str, goal: str) -> list[Promise]:
    return [
        Promise(work.format(mode.rpartition("-")[2]), "raw ASGI", least, goal, name.format(mode))
        for mode in _FAN_OUTS
    ]


PROMISES = [
    *_echo("raw", "raw ASGI", (("0.65", "0.75"), ("0.65", "0.80"), ("0.50", "0.65"))),
    *_echo("flask_sock", "flask-sock", (("0.9", "1.0"), ("1.4", "1.6"), ("2", "4"))),
    Promise("sync echo, 100 in flight", "raw ASGI", "0.75", "0.90", "in-flight-100"),
    Promise("sync echo, 50, both cores", "raw ASGI", "0.48", "0.60", _FREE),
    Promise("async echo, 50", "raw ASGI", "0.80", "0.90", "echo-50", "ours_async"),
    Promise("async echo, 500", "raw ASGI", "0.80", "0.90", "echo-500", "ours_async"),
    *_fan_out("{}", "fan-out to {}", "1.15", "1.3"),
    *_fan_out(_DEFLATE, "fan-out to {}, deflate", "1.8", "3"),
    Promise(
        "fan-out to 1,000, one stuck",
        "without it",
        "0.95",
        "1.0",
        "fan-out-1000-stuck",
        what="with",
    ),
    Promise(
        *("idle memory, sync view", "raw ASGI", "at most 2.6", "2.2", "idle-2000"), what="resident"
    ),
    Promise(
        *("idle memory, async view", "raw ASGI", "at most 2.0", "1.6", "idle-2000"),
        *("ours_async", "raw", "resident"),
    ),
    Promise(
        *("10,000 sync views", "handshakes/s", "works", "1,500", "idle-10000"),
        *("ours", None, "handshakes"),
    ),
    Promise("HTTP small view", "asgiref", "2.2", "2.6", "http-small", base="asgiref-reset"),
    Promise("HTTP small view", "gunicorn", "1.8", "2.3", "http-small", base="gunicorn"),
    Promise("HTTP small view", "granian", "0.6", "0.8", "http-small", base="granian"),
    Promise(
        "echo, 50, 5,000 parked", "without them", "0.85", "0.95", "echo-50-parked", what="with"
    ),
]


def found(promise: Promise, results: dict[str, Any]) -> dict[str, Any] | None:
    """The ratio of the medians and that of each run; None if it was not measured."""
    result = results.get(promise.name)
    if result is None:
        return None
    if promise.what == "with":
        return {name: result[name] for name in ("ratio", "ratios")}
    if promise.name == "http-small":
        figures = {name: server["rates"] for name, server in result.items()}
    else:
        figures = result[promise.what]
    if promise.server not in figures:
        return None
    if promise.base is None:
        return {"ratio": median(figures[promise.server]), "ratios": figures[promise.server]}
    if promise.base not in figures:
        return None
    return ratios(figures[promise.server], figures[promise.base])


def rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    """All of them, as they are written as JSON."""
    return [
        {
            **{name: getattr(each, name) for name in ("work", "against", "least", "goal")},
            **(found(each, results) or {"ratio": None, "ratios": []}),
        }
        for each in PROMISES
    ]


def promises_table(told: list[dict[str, Any]]) -> str:
    title = f"{'work':29}{'against':14}{'ratio':>9}  {'range':18}{'at least':13}goal"
    lines = [title]
    for row in told:
        ratio, between = ratio_text(row), range_text(row)
        if row["against"] == "handshakes/s" and row["ratio"]:
            each = row["ratios"]
            ratio, between = f"{row['ratio']:,.0f}", f"{min(each):,.0f} to {max(each):,.0f}"
        line = f"{row['work']:29}{row['against']:14}{ratio:>9}  {between:18}{row['least']:13}"
        lines.append(line + row["goal"])
    return "\n".join(lines)
