"""What is printed, and what is written as JSON."""

from __future__ import annotations

import os
import platform
from collections import Counter
from collections.abc import Iterable
from importlib.metadata import distributions
from statistics import median
from typing import Any

from .client import WsMeasurement
from .idle import IdleMeasurement

SERVER = ("flask-websockets", "flask", "uvicorn", "websockets", "wsproto", "uvloop", "httptools")
#: Share of its core above which the client holds the server back.
CLIENT_LIMIT = 0.9


def versions(names: Iterable[str] = (*SERVER, "picows")) -> dict[str, str]:
    installed = {each.name.lower().replace("_", "-"): each.version for each in distributions()}
    found = {name: installed.get(name, "missing") for name in names}
    return {"python": platform.python_version(), **found}


def machine(pinned: tuple[int, int] | None) -> dict[str, Any]:
    kernel = f"{platform.system()} {platform.release()} {platform.machine()}"
    return {"cores": os.cpu_count(), "server and client pinned to": pinned, "kernel": kernel}


def ratios(over: list[float], under: list[float]) -> dict[str, Any]:
    """The ratio of the medians, and that of each run; None where there was nothing to divide by."""

    def ratio(a: float, b: float) -> float | None:
        return a / b if b else None

    pairs = zip(over, under, strict=True)
    return {"ratio": ratio(median(over), median(under)), "ratios": [ratio(a, b) for a, b in pairs]}


def ratio_text(found: dict[str, Any] | None) -> str:
    if found is None or found["ratio"] is None:
        return "-"
    return f"{found['ratio']:.2f}"


def range_text(found: dict[str, Any] | None) -> str:
    each = [ratio for ratio in found["ratios"] if ratio is not None] if found else []
    return f"{min(each):.2f} to {max(each):.2f}" if each else "-"


def key(server: str) -> str:
    """The name of a WebSocket server in the JSON."""
    return server.replace("-", "_")


# -- WebSockets -----------------------------------------------------------------------------------


def summary(runs: dict[str, list[WsMeasurement]], paced: bool = False) -> dict[str, Any]:
    """The medians of one mode, and for each server what it is of raw, and ours of it.

    :param paced: the p99s are compared, not the rates, which are given.
    """
    rates = {key(name): [each.rate for each in runs[name]] for name in runs}
    late = {key(name): [each.p99 or 0.0 for each in runs[name]] for name in runs}
    compared = late if paced else rates
    to_raw, ours = {}, {}
    for name in compared:
        if "raw" in compared and name != "raw":
            to_raw[name] = ratios(compared[name], compared["raw"])
        if "ours" in compared and name != "ours":
            ours[name] = ratios(compared["ours"], compared[name])
    return {
        "compared": "p99" if paced else "rate",
        "ratio": {name: found["ratio"] for name, found in to_raw.items()},
        "ratios": {name: found["ratios"] for name, found in to_raw.items()},
        "ours": ours,
        "medians": {name: median(rates[name]) for name in rates},
        "rates": rates,
        "p99s": late,
        **_details(runs),
    }


def _details(runs: dict[str, list[WsMeasurement]]) -> dict[str, Any]:
    details: dict[str, dict[str, Any]] = {}
    for name, measured in runs.items():
        errors = sum((each.errors or Counter() for each in measured), Counter[str]())
        found = {
            "client_cpu": median(each.client_cpu for each in measured),
            "deliveries": sum(each.deliveries for each in measured),
            "errors": dict(errors),
            "error": next((each.error for each in measured if each.error), None),
        }
        for latency in ("p50", "p99"):
            times = [each for one in measured if (each := getattr(one, latency)) is not None]
            found[latency] = median(times) if times else None
        for what, value in found.items():
            details.setdefault(what, {})[key(name)] = value
    return details


def milliseconds(seconds: float | None) -> str:
    """For a table; a dash where there is nothing."""
    return "-" if seconds is None else f"{seconds * 1000:.2f} ms"


def _table_line(name: str, result: dict[str, Any]) -> str:
    to_raw = None
    if name in result["ratio"]:
        to_raw = {"ratio": result["ratio"][name], "ratios": result["ratios"][name]}
    ours = result["ours"].get(name)
    line = f"{name.replace('_', '-'):14}{result['medians'][name]:10,.0f}"
    line += f"{ratio_text(to_raw):>8}  {range_text(to_raw):13}"
    line += f"{ratio_text(ours):>8}  {range_text(ours):14}"
    line += "".join(f"{milliseconds(result[each][name]):>11}" for each in ("p50", "p99"))
    return line + f"{sum(result['errors'][name].values()):8,}{result['client_cpu'][name]:12.0%}"


def _proof(mode: str, result: dict[str, Any]) -> list[str]:
    """How much faster the client has been than with the fastest of its servers."""
    limits, fastest = result.get("client_limits"), max(result["medians"].values())
    if not limits or result["compared"] == "p99" or not fastest:
        return []
    line = f"{mode}: the client has done {median(limits):,.0f}/s with the least of servers, "
    line += f"{median(limits) / fastest:.2f} times the fastest here"
    busy = max(result["client_cpu"].values()) > CLIENT_LIMIT
    near = busy and fastest > CLIENT_LIMIT * median(limits)
    return [line + ("; it is near its limit" if near else "")]


def table(results: dict[str, dict[str, Any]]) -> str:
    title = f"{'server':14}{'rate/s':>10}{'it/raw':>8}  {'of the runs':13}{'ours/it':>8}"
    title += f"  {'of the runs':14}{'p50':>11}{'p99':>11}{'errors':>8}{'client CPU':>12}"
    lines: list[str] = []
    for mode, result in results.items():
        paced = " (the ratios are those of the p99: less is better)"
        lines += [""] if lines else []
        lines += [mode + (paced if result["compared"] == "p99" else ""), title]
        lines += [_table_line(name, result) for name in result["medians"]]
        lines += _proof(mode, result)
        for name, errors in result["errors"].items():
            if errors:
                kinds = ", ".join(f"{count:,} {kind}" for kind, count in errors.items())
                of = f"{kinds}, of {result['deliveries'][name]:,} deliveries"
                first = f"the first: {result['error'][name]}"[:200]
                lines.append(f"{mode}, {name.replace('_', '-')}: {of}; {first}")
    return "\n".join(lines)


# -- idle connections -----------------------------------------------------------------------------


def idle_summary(runs: dict[str, list[IdleMeasurement]]) -> dict[str, Any]:
    """One mode: the medians, and what memory and the rate of handshakes are of raw's."""
    figures: dict[str, dict[str, list[float]]] = {
        what: {key(name): [getattr(each, what) or 0.0 for each in runs[name]] for name in runs}
        for what in ("resident", "handshakes", "threads", "answer", "client_cpu")
    }
    medians = {
        what: {name: median(found) for name, found in servers.items()}
        for what, servers in figures.items()
    }
    to_raw = {
        what: {
            name: ratios(figures[what][name], figures[what]["raw"])
            for name in figures[what]
            if name != "raw" and "raw" in figures[what]
        }
        for what in ("resident", "handshakes")
    }
    return {"medians": medians, "to_raw": to_raw, **figures}


def idle_table(results: dict[str, dict[str, Any]]) -> str:
    title = f"{'server':14}{'KB each':>9}{'it/raw':>8}  {'of the runs':13}{'threads':>9}"
    title += f"{'handshakes/s':>14}{'it/raw':>8}  {'of the runs':13}{'HTTP answer':>13}"
    title += f"{'client CPU':>12}"
    lines: list[str] = []
    for mode, result in results.items():
        lines += ["", mode, title] if lines else [mode, title]
        medians = result["medians"]
        for name in medians["resident"]:
            memory, rate = (result["to_raw"][each].get(name) for each in ("resident", "handshakes"))
            kilobytes = medians["resident"][name] / 1000
            line = f"{name.replace('_', '-'):14}" + (
                f"{kilobytes:9.1f}" if kilobytes else f"{'-':>9}"
            )
            line += f"{ratio_text(memory):>8}  {range_text(memory):13}"
            line += f"{medians['threads'][name]:9,.0f}{medians['handshakes'][name]:14,.0f}"
            line += f"{ratio_text(rate):>8}  {range_text(rate):13}"
            line += f"{milliseconds(medians['answer'][name]):>13}"
            lines.append(line + f"{medians['client_cpu'][name]:12.0%}")
    return "\n".join(lines)
