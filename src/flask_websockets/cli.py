"""View side. ``flask websockets ...``: what a terminal can ask of an application."""

from __future__ import annotations

import click
from flask import current_app
from flask.cli import AppGroup

#: The commands that every application with WebSockets has.
commands: AppGroup = AppGroup("websockets", help="Look at the app's WebSocket routes.")

#: What stands where there is nothing to say.
NOTHING = "-"


@commands.command("routes", short_help="Show the WebSocket routes for the app.")
@click.option(
    "--sort",
    "-s",
    type=click.Choice(("endpoint", "rule", "match")),
    default="endpoint",
    help=(
        "Method to sort routes by. 'match' is the order that Flask will match routes when "
        "dispatching a handshake."
    ),
)
def routes_command(sort: str) -> None:
    """Show all registered WebSocket routes with their views and what they allow."""
    rules = [rule for rule in current_app.url_map.iter_rules() if rule.websocket]
    if not rules:
        click.echo("No WebSocket routes were registered.")
        return
    if sort != "match":
        rules.sort(key=lambda rule: getattr(rule, sort))
    host_matching = current_app.url_map.host_matching
    domains = [(rule.host if host_matching else rule.subdomain) or "" for rule in rules]
    rows = [["Endpoint", "View", "Rule", "Subprotocols", "Origins", "Limits"]]
    for rule in rules:
        kind, *allowed = _describe(rule.endpoint)
        rows.append([rule.endpoint, kind, rule.rule, *allowed])
    if any(domains):
        domains.insert(0, "Host" if host_matching else "Subdomain")
        for row, domain in zip(rows, domains, strict=True):
            row.insert(2, domain)
    _print_table(rows)


def _describe(endpoint: str) -> tuple[str, str, str, str]:
    """How the view of a route runs, and the route's subprotocols, origins and limits."""
    # A rule may also have been added with websocket=True by others, or have no view at all.
    route = getattr(current_app.view_functions.get(endpoint), "websocket_route", None)
    if route is None:
        return NOTHING, NOTHING, NOTHING, NOTHING
    origins = route.origins
    if origins is None:
        origins = current_app.extensions["websockets"].config.allowed_origins
    limits = [f"{name}={value}" for name, value in sorted(route.limits.items())]
    return (
        "async" if route.is_async else "sync",
        ", ".join(route.subprotocols) or NOTHING,
        ", ".join(origins) or "same origin",
        ", ".join(limits) or NOTHING,
    )


def _print_table(rows: list[list[str]]) -> None:
    """Print rows of cells, the first of them as headers, as ``flask routes`` does."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        click.echo("  ".join(cells).rstrip())
