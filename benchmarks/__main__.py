"""Compare flask-websockets with raw ASGI on the same server, in turn, in one run."""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

try:
    from .client import MODES, Fault, measure
except ImportError as error:
    print(f"{error}\nFirst: pip install -r benchmarks/requirements.txt", file=sys.stderr)
    sys.exit(2)
from .report import machine, summary, table, versions
from .servers import IMPLEMENTATIONS, serve


def compare(options: argparse.Namespace, core: int | None) -> dict[str, Any]:
    runs: dict[str, Any] = {mode: {"raw": [], "ours": []} for mode in options.modes}
    for run in range(1, options.runs + 1):
        for mode in runs:
            for name in ("raw", "ours"):
                step = f"run {run} of {options.runs}, {mode}, {name}"
                with serve(f"benchmarks.servers:{name}", options.ws, core) as port:
                    try:
                        measurement = measure(MODES[mode], port, options.seconds)
                    except Fault as fault:
                        raise Fault(f"{step}: {fault}") from None
                runs[mode][name].append(measurement)
                print(f"{step}: {measurement.rate:,.0f}/s", file=sys.stderr)
    return {mode: summary(runs[mode]) for mode in runs}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--runs", type=int, default=3, help="of which the medians are taken")
    parser.add_argument("--seconds", type=float, default=2.0, help="timed, for each measurement")
    parser.add_argument("--ws", choices=IMPLEMENTATIONS, default="auto")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write everything there as well")
    options = parser.parse_args()
    if options.runs < 1 or not 0 < options.seconds < float("inf"):
        parser.error("--runs and --seconds must be positive")
    # One core for the server and one for the client, where there are two to choose from.
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    pinned = (cores[0], cores[1]) if len(cores) > 1 else None
    if pinned:
        os.sched_setaffinity(0, {pinned[1]})
    try:
        results = compare(options, pinned and pinned[0])
    except Fault as fault:
        print(f"MESSAGES WERE LOST, DOUBLED OR REORDERED\n{fault}", file=sys.stderr)
        return 1
    except Exception:  # Python's own exit code would be 1, which speaks of messages alone.
        traceback.print_exc()
        return 2
    report = {
        "options": {name: getattr(options, name) for name in ("ws", "runs", "seconds")},
        "versions": versions(),
        "machine": machine(pinned),
    }
    print(table(results), end="\n\n")
    for title, part in report.items():
        print(f"{title}:", ", ".join(f"{name} {value}" for name, value in part.items()))
    if options.json:
        options.json.write_text(json.dumps({**report, "results": results}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
