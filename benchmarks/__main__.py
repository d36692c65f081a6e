"""Compare flask-websockets with raw ASGI and with other projects, its HTTP with other servers, or
itself with itself in trouble, in turn, in one run."""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

try:
    from .bystanders import BYSTANDER_MODES, bystander_table
    from .client import MODES, PEER_MODES, Fault
    from .compare import (
        Work,
        compare,
        compare_bystanders,
        compare_http,
        compare_idle,
        files_needed,
    )
    from .crowds import CROWD_MODES, crowd_table
    from .http_client import HTTP_MODES
except ImportError as error:
    print(f"{error}\nFirst: pip install -r benchmarks/requirements.txt", file=sys.stderr)
    sys.exit(2)
from .http_report import VERSIONS, http_table
from .http_servers import SERVERS as HTTP_SERVERS
from .idle import IDLE_MODES
from .machine import Cores, allow_files
from .plot import plot
from .promises import BYSTANDERS, HTTP_WORK, IDLE_WORKS, WORKS, promises_table, rows
from .report import SERVER, idle_table, machine, table, versions
from .servers import IMPLEMENTATIONS, SERVERS, USUAL, missing

GROUPS = {
    "websockets": list(MODES),
    "idle": list(IDLE_MODES),
    "http": list(HTTP_MODES),
    "bystanders": [*BYSTANDER_MODES, *CROWD_MODES],
}
#: The group that measures what is promised, and nothing else; and how often.
PROMISES, PROMISED_RUNS = "promises", 5
RUNS = 3


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "group", nargs="?", choices=[*GROUPS, PROMISES], help="all modes of one kind"
    )
    modes = [mode for group in GROUPS.values() for mode in group]
    servers = ["all", *dict.fromkeys([*SERVERS, *HTTP_SERVERS])]
    parser.add_argument("--modes", nargs="+", choices=modes, help="just these")
    parser.add_argument("--runs", type=int, help=f"default: {RUNS}; {PROMISED_RUNS} for promises")
    parser.add_argument("--seconds", type=float, default=2.0, help="timed, for each measurement")
    parser.add_argument("--ws", choices=IMPLEMENTATIONS, default="auto", help="not for HTTP")
    parser.add_argument(
        *("--servers",),
        nargs="+",
        choices=servers,
        help=f"default: for HTTP all, else {', '.join(USUAL)}",
    )
    parser.add_argument("--deflate", action="store_true", help="compress, as browsers offer it")
    parser.add_argument("--free", action="store_true", help="pin neither server nor client")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write everything there as well")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draw it, as .svg, .png or .pdf")
    options = parser.parse_args()
    if options.runs is None:
        options.runs = PROMISED_RUNS if options.group == PROMISES else RUNS
    if options.runs < 1 or not 0 < options.seconds < float("inf"):
        parser.error("--runs and --seconds must be positive")
    if options.group and options.modes:
        parser.error(f"either {options.group} or --modes")
    if options.group == PROMISES and (options.deflate or options.free or options.servers):
        parser.error("promises say themselves where: no --deflate, --free, --servers")
    options.modes = options.modes or GROUPS.get(options.group or "websockets", [])
    choose_servers(parser, options)
    return options


def choose_servers(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """One option names them for WebSockets and for HTTP; each kind takes those that it knows."""
    named = set(options.servers or ())
    options.ws_servers = [name for name in SERVERS if {name, "all"} & named] or list(USUAL)
    options.http_servers = [name for name in HTTP_SERVERS if {name, "all"} & named]
    if not named:
        options.http_servers = list(HTTP_SERVERS)
    chosen = {kind for kind, modes in GROUPS.items() if set(modes) & set(options.modes)}
    if named and "http" in chosen and not options.http_servers:
        parser.error(f"--servers names none of {', '.join(HTTP_SERVERS)}")
    for kind, known in (("websockets", list(SERVERS)), ("idle", list(USUAL))):
        if named and kind in chosen and not {*known, "all"} & named:
            parser.error(f"--servers names none of {', '.join(known)}")


def leave_out_missing(names: Iterable[str], table: Mapping[str, Any]) -> list[str]:
    """A server that is not installed has no line in the tables, but one before them."""
    kept = []
    for name in names:
        if absent := missing(table[name].needs):
            print(f"{name} is left out: {', '.join(absent)} is not installed.")
        else:
            kept.append(name)
    return kept


def plan(options: argparse.Namespace) -> dict[str, Any]:
    """What is to be done, of each kind."""
    ws_kept = leave_out_missing(options.ws_servers, SERVERS)
    http_kept = leave_out_missing(options.http_servers, HTTP_SERVERS)

    def those(modes: Iterable[str], work: Any) -> list[Any]:
        return [work(mode) for mode in options.modes if mode in modes]

    def of(mode: str) -> tuple[str, ...]:
        return tuple(each for each in ws_kept if mode in PEER_MODES or not SERVERS[each].peer)

    return {
        "websockets": those(MODES, lambda mode: Work(mode, of(mode), options.deflate)),
        "idle": those(IDLE_MODES, lambda mode: Work(mode, of(mode), options.deflate)),
        "http": those(HTTP_MODES, lambda mode: Work(mode, tuple(http_kept))),
        "bystanders": those(GROUPS["bystanders"], str),
    }


def promised() -> dict[str, Any]:
    """What the promises need, of what is installed."""
    kept = leave_out_missing(
        dict.fromkeys(name for work in WORKS for name in work.servers), SERVERS
    )
    http_kept = leave_out_missing(HTTP_WORK.servers, HTTP_SERVERS)

    def narrowed(work: Work, known: list[str]) -> Work:
        servers = tuple(name for name in work.servers if name in known)
        return Work(work.mode, servers, work.deflate, work.free, work.label)

    return {
        "websockets": [narrowed(work, kept) for work in WORKS],
        "idle": IDLE_WORKS,
        "http": [narrowed(HTTP_WORK, http_kept)],
        "bystanders": BYSTANDERS,
    }


def possible(plans: dict[str, Any], options: argparse.Namespace) -> bool:
    """Whether all can be run here; else the reason is printed."""
    modes = [work.mode for kind in ("websockets", "idle") for work in plans[kind]]
    need = files_needed([*modes, *plans["bystanders"]])
    if (limit := allow_files(need)) < need:
        print(f"This needs {need:,} open files; the system allows {limit:,}.", file=sys.stderr)
        print(f"Raise the limit (ulimit -n {need}), or choose other --modes.", file=sys.stderr)
        return False
    if options.plot is not None and missing(["matplotlib"]):
        print("--plot needs matplotlib, which is not installed.", file=sys.stderr)
        return False
    works = [work for kind in ("websockets", "idle", "http") for work in plans[kind]]
    return all(work.servers for work in works)


def main() -> int:
    options = parse()
    plans = promised() if options.group == PROMISES else plan(options)
    if not possible(plans, options):
        return 2
    cores = Cores.found(options.free)
    try:
        results = {
            "websockets": compare(plans["websockets"], options, cores),
            "idle": compare_idle(plans["idle"], options, cores),
            "http": compare_http(plans["http"], options, cores),
            "bystanders": compare_bystanders(plans["bystanders"], options, cores),
        }
    except Fault as fault:
        headline = "MESSAGES WERE LOST, DOUBLED OR REORDERED, OR AN ANSWER WAS WRONG"
        print(f"{headline}\n{fault}", file=sys.stderr)
        return 1
    except Exception:  # Python's own exit code would be 1, which speaks of faults alone.
        traceback.print_exc()
        return 2
    tell(options, plans, results, cores)
    return 0


def about(options: argparse.Namespace, plans: dict[str, Any], cores: Cores) -> dict[str, Any]:
    """The options, the versions, the machine, and how each server was set."""
    shown = ("ws", "runs", "seconds", "deflate", "free")
    websocket_works = plans["websockets"] + plans["idle"]
    ours = (*SERVER, "picows") if websocket_works or plans["bystanders"] else ()
    ws_names = dict.fromkeys(name for work in websocket_works for name in work.servers)
    http_names = dict.fromkeys(name for work in plans["http"] for name in work.servers)
    needed = [need for name in ws_names for need in SERVERS[name].needs]
    report = {
        "options": {name: getattr(options, name) for name in shown},
        "versions": versions(dict.fromkeys([*ours, *needed, *(VERSIONS if http_names else ())])),
        "machine": machine(cores.pinned),
    }
    if ws_names:
        report["websocket_servers"] = {name: SERVERS[name].setting for name in ws_names}
    if http_names:
        report["servers"] = {name: HTTP_SERVERS[name].setting for name in http_names}
    return report


def tell(
    options: argparse.Namespace, plans: dict[str, Any], results: dict[str, Any], cores: Cores
) -> None:
    """Print the tables and what they rest on; write and draw them where that is asked for."""
    crowds = {mode: each for mode, each in results["bystanders"].items() if mode in CROWD_MODES}
    late = {mode: each for mode, each in results["bystanders"].items() if mode not in crowds}
    tables = [table(results["websockets"]), idle_table(results["idle"])]
    tables += [http_table(results["http"])]
    tables += [bystander_table(late)] if late else []
    tables += [crowd_table(crowds)] if crowds else []
    everything = {mode: each for kind in results.values() for mode, each in kind.items()}
    report = about(options, plans, cores)
    written = {**report, "results": everything}
    if options.group == PROMISES:
        written["promises"] = rows(everything)
        tables.append(promises_table(written["promises"]))
    print("\n\n".join(filter(None, tables)), end="\n\n")
    for title, part in report.items():
        if title.endswith("servers"):
            print("\n".join(f"{name}: {setting}" for name, setting in part.items()))
        else:
            print(f"{title}:", ", ".join(f"{name} {value}" for name, value in part.items()))
    if options.json:
        options.json.write_text(json.dumps(written, indent=2) + "\n")
    if options.plot:
        plot(everything, options.plot)


if __name__ == "__main__":
    sys.exit(main())
