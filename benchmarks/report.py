"""What is printed, and what is written as JSON."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from importlib.metadata import distributions
from statistics import median
from typing import Any

from .client import Measurement

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


def summary(runs: dict[str, list[Measurement]]) -> dict[str, Any]:
    """The medians of one mode, and the ratio of each run beside the ratio of the medians."""
    rates = {name: [each.rate for each in runs[name]] for name in runs}
    medians = {name: median(rates[name]) for name in runs}
    client_cpu = {name: median(each.client_cpu for each in runs[name]) for name in runs}
    pairs = zip(rates["ours"], rates["raw"], strict=True)
    return {
        "ratio": medians["ours"] / medians["raw"] if medians["raw"] else 0.0,
        "ratios": [ours / raw if raw else 0.0 for ours, raw in pairs],
        "medians": medians,
        "client_cpu": client_cpu,
        "rates": rates,
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    lines = ["mode           ours/raw  of the runs       raw/s    ours/s  client CPU (raw, ours)"]
    for mode, result in results.items():
        medians, cpu, ratios = result["medians"], result["client_cpu"], result["ratios"]
        line = f"{mode:14} {result['ratio']:8.2f}  {min(ratios):.2f} to {max(ratios):.2f}"
        line += f"  {medians['raw']:9,.0f} {medians['ours']:9,.0f}"
        line += f"  {cpu['raw']:4.0%} {cpu['ours']:4.0%}"
        if max(cpu.values()) > CLIENT_LIMIT:
            line += "  the client is near its limit"
        lines.append(line)
    return "\n".join(lines)
