"""The runs: within each, every server in turn, each time as a fresh process."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .bystanders import BYSTANDER_MODES, bystander_summary
from .client import MODES, Fault, WsMeasurement, measure
from .crowds import CROWD_MODES, PARKED
from .http_client import HTTP_MODES, measure_http
from .http_report import http_summary
from .http_servers import SERVERS as HTTP_SERVERS
from .http_servers import serve_http
from .idle import IDLE_MODES, measure_idle
from .machine import Cores
from .report import idle_summary, summary
from .servers import SERVERS, serve_floor, serve_ws
from .speech import spoken

#: Beyond those of the connections: the client's own, and the server's.
MORE_FILES = 200


@dataclass(frozen=True)
class Work:
    """One mode, and what it is done by."""

    mode: str
    servers: tuple[str, ...]
    deflate: bool = False
    free: bool = False
    label: str = ""  # else the mode's name

    @property
    def name(self) -> str:
        return self.label or self.mode


def files_needed(modes: Iterable[str]) -> int:
    """Open files that the client, and likewise a server, needs for the largest of *modes*."""
    sizes = {mode: MODES[mode].connections for mode in MODES} | IDLE_MODES
    sizes |= {"echo-50-parked": PARKED + 50}
    return max((sizes.get(mode, 1_000) for mode in modes), default=0) + MORE_FILES


def compare(works: list[Work], options: argparse.Namespace, cores: Cores) -> dict[str, Any]:
    runs: dict[str, Any] = {work.name: {name: [] for name in work.servers} for work in works}
    limits: dict[str, list[float]] = {work.name: [] for work in works}
    for run in range(1, options.runs + 1):
        for work in works:
            core = cores.place(work.free)
            limits[work.name].append(_client_limit(work, options, core))
            for name in work.servers:
                step = f"run {run} of {options.runs}, {work.name}, {name}"
                try:
                    measurement = _measured(work, name, options, core)
                except Fault as fault:
                    raise Fault(f"{step}: {fault}") from None
                runs[work.name][name].append(measurement)
                errors = sum((measurement.errors or Counter()).values())
                after = f", {errors:,} errors" if errors else ""
                print(f"{step}: {measurement.rate:,.0f}/s{after}", file=sys.stderr)
    return {
        work.name: {
            **summary(runs[work.name], bool(MODES[work.mode].paced)),
            "client_limits": limits[work.name],
        }
        for work in works
    }


def _measured(
    work: Work, name: str, options: argparse.Namespace, core: int | None
) -> WsMeasurement:
    """One measurement. A peer with which nothing works has the rate 0 and an error."""
    server, mode = SERVERS[name], MODES[work.mode]
    try:
        with serve_ws(server, options.ws, core, mode.connections, work.deflate) as port:
            how = spoken(work.deflate, server.socketio)
            return measure(mode, port, options.seconds, strict=not server.peer, **how)
    except Exception as error:
        if not server.peer:
            raise
        reason = f"{type(error).__name__}: {error}"
        return WsMeasurement(0.0, 0.0, errors=Counter(["not measured"]), error=reason)


def _client_limit(work: Work, options: argparse.Namespace, core: int | None) -> float:
    """What the client does with the same load and the fastest server there is."""
    with serve_floor(core) as port:
        rate = measure(MODES[work.mode], port, options.seconds, **spoken(work.deflate, False)).rate
    print(f"{work.name}, the client alone: {rate:,.0f}/s", file=sys.stderr)
    return rate


def compare_idle(works: list[Work], options: argparse.Namespace, cores: Cores) -> dict[str, Any]:
    runs: dict[str, Any] = {work.name: {name: [] for name in work.servers} for work in works}
    for run in range(1, options.runs + 1):
        for work in works:
            core, count = cores.place(work.free), IDLE_MODES[work.mode]
            for name in work.servers:
                step = f"run {run} of {options.runs}, {work.name}, {name}"
                with serve_ws(SERVERS[name], options.ws, core, count, work.deflate) as port:
                    try:
                        measurement = measure_idle(port, count, work.deflate)
                    except Fault as fault:
                        raise Fault(f"{step}: {fault}") from None
                runs[work.name][name].append(measurement)
                print(f"{step}: {measurement.handshakes:,.0f} handshakes/s", file=sys.stderr)
    return {name: idle_summary(found) for name, found in runs.items()}


def compare_http(works: list[Work], options: argparse.Namespace, cores: Cores) -> dict[str, Any]:
    runs: dict[str, Any] = {work.name: {name: [] for name in work.servers} for work in works}
    core = cores.place()
    for run in range(1, options.runs + 1):
        for work in works:
            for name in work.servers:
                step = f"run {run} of {options.runs}, {work.name}, {name}"
                server, mode = HTTP_SERVERS[name], HTTP_MODES[work.mode]
                with serve_http(server, core) as port:
                    try:
                        measurement = measure_http(
                            *(mode, port, options.seconds), strict=server.ours, observe=server.asgi
                        )
                    except Fault as fault:
                        raise Fault(f"{step}: {fault}") from None
                runs[work.name][name].append(measurement)
                errors = f", {measurement.errors:,} errors" if measurement.errors else ""
                print(f"{step}: {measurement.rate:,.0f}/s{errors}", file=sys.stderr)
    return {name: http_summary(found) for name, found in runs.items()}


def compare_bystanders(
    modes: list[str], options: argparse.Namespace, cores: Cores
) -> dict[str, Any]:
    runs: dict[str, list[dict[str, Any]]] = {mode: [] for mode in modes}
    core = cores.place()
    for run in range(1, options.runs + 1):
        for mode in modes:
            step = f"run {run} of {options.runs}, {mode}"
            try:
                measured = {**BYSTANDER_MODES, **CROWD_MODES}[mode](
                    options.ws, core, options.seconds
                )
            except Fault as fault:
                raise Fault(f"{step}: {fault}") from None
            runs[mode].append(measured)
            print(f"{step}: {measured['with'] / measured['without']:.2f} times", file=sys.stderr)
    return {mode: bystander_summary(runs[mode]) for mode in modes}
