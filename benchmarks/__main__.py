"""Compare flask-websockets with raw ASGI, its HTTP with other servers, or itself with itself in
trouble, in turn, in one run."""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

try:
    from .bystanders import BYSTANDER_MODES, bystander_summary, bystander_table
    from .client import MODES, Fault, measure
    from .http_client import HTTP_MODES, measure_http
except ImportError as error:
    print(f"{error}\nFirst: pip install -r benchmarks/requirements.txt", file=sys.stderr)
    sys.exit(2)
from .http_report import VERSIONS, http_summary, http_table
from .http_servers import SERVERS, missing, serve_http
from .report import COMPARED, SERVER, machine, summary, table, versions
from .servers import IMPLEMENTATIONS, serve


def compare(options: argparse.Namespace, core: int | None) -> dict[str, Any]:
    modes = [mode for mode in options.modes if mode in MODES]
    runs: dict[str, Any] = {mode: {name: [] for name in COMPARED} for mode in modes}
    for run in range(1, options.runs + 1):
        for mode in runs:
            for name in COMPARED:
                step = f"run {run} of {options.runs}, {mode}, {name}"
                with serve(f"benchmarks.servers:{name}", options.ws, core) as port:
                    try:
                        measurement = measure(MODES[mode], port, options.seconds)
                    except Fault as fault:
                        raise Fault(f"{step}: {fault}") from None
                runs[mode][name].append(measurement)
                print(f"{step}: {measurement.rate:,.0f}/s", file=sys.stderr)
    return {mode: summary(runs[mode]) for mode in runs}


def compare_http(options: argparse.Namespace, core: int | None) -> dict[str, Any]:
    modes = [mode for mode in options.modes if mode in HTTP_MODES]
    runs: dict[str, Any] = {mode: {name: [] for name in options.servers} for mode in modes}
    for run in range(1, options.runs + 1):
        for mode in runs:
            for name in runs[mode]:
                step = f"run {run} of {options.runs}, {mode}, {name}"
                server = SERVERS[name]
                with serve_http(server, core) as port:
                    try:
                        measurement = measure_http(
                            HTTP_MODES[mode],
                            port,
                            options.seconds,
                            strict=server.ours,
                            observe=server.asgi,
                        )
                    except Fault as fault:
                        raise Fault(f"{step}: {fault}") from None
                runs[mode][name].append(measurement)
                errors = f", {measurement.errors:,} errors" if measurement.errors else ""
                print(f"{step}: {measurement.rate:,.0f}/s{errors}", file=sys.stderr)
    return {mode: http_summary(runs[mode]) for mode in runs}


def compare_bystanders(options: argparse.Namespace, core: int | None) -> dict[str, Any]:
    modes = [mode for mode in options.modes if mode in BYSTANDER_MODES]
    runs: dict[str, list[dict[str, Any]]] = {mode: [] for mode in modes}
    for run in range(1, options.runs + 1):
        for mode in modes:
            step = f"run {run} of {options.runs}, {mode}"
            try:
                measured = BYSTANDER_MODES[mode](options.ws, core, options.seconds)
            except Fault as fault:
                raise Fault(f"{step}: {fault}") from None
            runs[mode].append(measured)
            print(f"{step}: {measured['with'] / measured['without']:.2f} times", file=sys.stderr)
    return {mode: bystander_summary(runs[mode]) for mode in modes}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    groups = {
        "websockets": list(MODES),
        "http": list(HTTP_MODES),
        "bystanders": list(BYSTANDER_MODES),
    }
    parser.add_argument("group", nargs="?", choices=groups, help="all modes of one kind")
    modes = [mode for group in groups.values() for mode in group]
    parser.add_argument("--modes", nargs="+", choices=modes, help="just these")
    parser.add_argument("--runs", type=int, default=3, help="of which the medians are taken")
    parser.add_argument("--seconds", type=float, default=2.0, help="timed, for each measurement")
    parser.add_argument("--ws", choices=IMPLEMENTATIONS, default="auto", help="not for HTTP")
    parser.add_argument("--servers", nargs="+", choices=SERVERS, help="for HTTP; default: all")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write everything there as well")
    options = parser.parse_args()
    if options.runs < 1 or not 0 < options.seconds < float("inf"):
        parser.error("--runs and --seconds must be positive")
    if options.group and options.modes:
        parser.error(f"either {options.group} or --modes")
    options.modes = options.modes or groups[options.group or "websockets"]
    options.servers = options.servers or list(SERVERS)
    return options


def leave_out_missing(options: argparse.Namespace) -> None:
    """A server that is not installed has no line in the tables, but one before them."""
    for name in list(options.servers):
        if absent := missing(SERVERS[name]):
            print(f"{name} is left out: {', '.join(absent)} is not installed.")
            options.servers.remove(name)


def main() -> int:
    options = parse()
    http = any(mode in HTTP_MODES for mode in options.modes)
    if http:
        leave_out_missing(options)
        if not options.servers:
            return 2
    # One core for the server and one for the client, where there are two to choose from.
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    pinned = (cores[0], cores[1]) if len(cores) > 1 else None
    if pinned:
        os.sched_setaffinity(0, {pinned[1]})
    try:
        results = compare(options, pinned and pinned[0])
        http_results = compare_http(options, pinned and pinned[0])
        bystander_results = compare_bystanders(options, pinned and pinned[0])
    except Fault as fault:
        headline = "MESSAGES WERE LOST, DOUBLED OR REORDERED, OR AN ANSWER WAS WRONG"
        print(f"{headline}\n{fault}", file=sys.stderr)
        return 1
    except Exception:  # Python's own exit code would be 1, which speaks of faults alone.
        traceback.print_exc()
        return 2
    ours = (*SERVER, "picows") if results or bystander_results else ()
    names = dict.fromkeys(ours + (VERSIONS if http else ()))
    report = {
        "options": {name: getattr(options, name) for name in ("ws", "runs", "seconds")},
        "versions": versions(names),
        "machine": machine(pinned),
    }
    if http:
        report["servers"] = {name: SERVERS[name].setting for name in options.servers}
    tables = [table(results)] if results else []
    tables += [http_table(http_results)] if http_results else []
    tables += [bystander_table(bystander_results)] if bystander_results else []
    print("\n\n".join(tables), end="\n\n")
    for title, part in report.items():
        if title == "servers":
            print("\n".join(f"{name}: {setting}" for name, setting in part.items()))
        else:
            print(f"{title}:", ", ".join(f"{name} {value}" for name, value in part.items()))
    if options.json:
        everything = {**report, "results": {**results, **http_results, **bystander_results}}
        options.json.write_text(json.dumps(everything, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
