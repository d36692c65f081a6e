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
#: What is compared, by the names in ``servers.py``: raw ASGI, plain views, async views.
COMPARED = ("raw", "ours", "ours_async")
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
    ratios = {
        name: [
            ours / raw if raw else 0.0 for ours, raw in zip(rates[name], rates["raw"], strict=True)
        ]
        for name in COMPARED[1:]
    }
    return {
        "ratio": {
            name: medians[name] / medians["raw"] if medians["raw"] else 0.0 for name in ratios
        },
        "ratios": ratios,
        "medians": medians,
        "client_cpu": client_cpu,
        "rates": rates,
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    lines = [
        "mode           ours/raw  of the runs   async/raw  of the runs"
        "       raw/s    ours/s   async/s  client CPU"
    ]
    for mode, result in results.items():
        line = f"{mode:14}"
        for name, ratios in result["ratios"].items():
            line += f" {result['ratio'][name]:8.2f}  {min(ratios):.2f} to {max(ratios):.2f} "
        cpu = result["client_cpu"]
        line += "".join(f" {result['medians'][name]:9,.0f}" for name in COMPARED)
        line += "  " + " ".join(f"{cpu[name]:4.0%}" for name in COMPARED)
        if max(cpu.values()) > CLIENT_LIMIT:
            line += "  the client is near its limit"
        lines.append(line)
    return "\n".join(lines)
