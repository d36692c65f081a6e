"""The HTTP figures: what is printed, and what is written as JSON."""

from __future__ import annotations

from statistics import median
from typing import Any

from .http_client import HttpMeasurement
from .http_servers import SERVERS
from .report import CLIENT_LIMIT, milliseconds, range_text, ratio_text, ratios

OURS = ("flask-websockets", "flask", "werkzeug", "uvicorn", "httptools", "uvloop", "h11")
VERSIONS = (*OURS, "asgiref", "a2wsgi", "gunicorn", "waitress", "granian")
#: The second base: each server is told as a multiple of this one, too.
REFERENCE = "gunicorn"


def http_summary(runs: dict[str, list[HttpMeasurement]]) -> dict[str, Any]:
    """One mode: for each server its medians, ours as a multiple of it, and it of gunicorn."""
    rates = {name: [each.rate for each in runs[name]] for name in runs}
    base = next((name for name in runs if SERVERS[name].ours), None)
    result = {}
    for name, measurements in runs.items():
        turns = [each.longest_turn for each in measurements if each.longest_turn is not None]
        result[name] = {
            "median": median(rates[name]),
            "rates": rates[name],
            "ours": base and ratios(rates[base], rates[name]),
            REFERENCE: ratios(rates[name], rates[REFERENCE]) if REFERENCE in runs else None,
            "answers": sum(each.answers for each in measurements),
            "errors": sum(each.errors for each in measurements),
            "error": next((each.error for each in measurements if each.error), None),
            "longest_turn": median(turns) if turns else None,
            "longest_turns": turns,
            "client_cpu": median(each.client_cpu for each in measurements),
        }
        for latency in ("p50", "p99"):
            times = [each for one in measurements if (each := getattr(one, latency)) is not None]
            result[name][latency] = median(times) if times else None
    return result


def http_table(results: dict[str, dict[str, Any]]) -> str:
    title = f"{'server':14}{'answers/s':>10}{'ours/it':>9}  {'of the runs':14}"
    title += f"{'it/' + REFERENCE:>11}{'p50':>11}{'p99':>11}"
    title += f"{'errors':>9}{'longest turn':>14}{'client CPU':>12}"
    lines: list[str] = []
    errors: list[str] = []
    for mode, servers in results.items():
        lines += ["", mode, title] if lines else [mode, title]
        for name, result in servers.items():
            turn = result["longest_turn"]
            longest = "-" if turn is None else f"{turn * 1000:.1f} ms"
            line = f"{name:14}{result['median']:10,.0f}{ratio_text(result['ours']):>9}"
            line += f"  {range_text(result['ours']):14}{ratio_text(result[REFERENCE]):>11}"
            line += "".join(f"{milliseconds(result[each]):>11}" for each in ("p50", "p99"))
            line += f"{result['errors']:9,}{longest:>14}{result['client_cpu']:12.0%}"
            if result["client_cpu"] > CLIENT_LIMIT:
                line += "  the client is near its limit"
            lines.append(line)
            if result["errors"]:
                first = result["error"].splitlines()[0]
                wrong = f"{result['errors']:,} of {result['answers']:,} answers were wrong"
                errors.append(f"{mode}, {name}: {wrong}, the first: {first}")
    return "\n".join([*lines, "", *errors] if errors else lines)
