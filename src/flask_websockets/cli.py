"""Both sides. ``flask websockets ...``: what a terminal can ask of an application."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import click
from flask import Flask, current_app
from flask.cli import AppGroup, ScriptInfo, pass_script_info

from .errors import ConfigurationError
from .servers.serve import Options, serve

#: The commands that every application with WebSockets has.
commands: AppGroup = AppGroup(
    "websockets", help="Serve the app with WebSockets, and look at its WebSocket routes."
)

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


@dataclass(frozen=True)
class AppOfCommand:
    """Finds the application of a ``flask`` command again, in another process.

    :param path: of ``--app`` or ``FLASK_APP``; None to look where the command looks.
    :param create_app: of a command group of the application's own.
    """

    path: str | None
    create_app: Any

    def __call__(self) -> Flask:
        return ScriptInfo(self.path, self.create_app).load_app()


@commands.command("serve", short_help="Serve the app, WebSockets included, for production.")
@click.option(
    "--host",
    "-h",
    default="127.0.0.1",
    show_default=True,
    help="The interface to bind to; unix:///path/of/socket for a unix socket.",
)
@click.option(
    "--port", "-p", default=8000, show_default=True, help="The port to bind to; 0 for a free one."
)
@click.option(
    "--workers", default=1, show_default=True, help="Processes. More than one share no channels."
)
@click.option(
    "--separate-channels",
    is_flag=True,
    help="Allow several workers, each with channels, limits and counters of its own.",
)
@click.option("--cert", type=click.Path(dir_okay=False), help="A certificate's file, for HTTPS.")
@click.option("--key", type=click.Path(dir_okay=False), help="The file of the certificate's key.")
@click.option("--reload", is_flag=True, help="Start again when a source file has changed.")
@click.option(
    "--forwarded-allow-ips",
    help="Addresses and networks of proxies, separated by commas, whose X-Forwarded-For and "
    "X-Forwarded-Proto are believed; * for all. By default this machine.",
)
@click.option("--compression", is_flag=True, help="Offer permessage-deflate to WebSocket clients.")
@click.option(
    "--pin-workers",
    is_flag=True,
    help="Keep each worker on a core of its own (Linux): plain views are faster, and code that "
    "computes outside the interpreter has no other core.",
)
@pass_script_info
def serve_command(info: ScriptInfo, /, **options: Any) -> None:
    """Serve the application with uvicorn, HTTP and WebSockets, until SIGTERM or CTRL+C.

    Then everybody is asked to leave: new handshakes get 503, open connections are closed with
    1012, and what is left after WEBSOCKETS_DRAIN_TIMEOUT is cut.
    """
    app = info.load_app()
    served = app.extensions["websockets"].websockets.served(app)
    load = AppOfCommand(info.app_import_path, info.create_app)
    try:
        code = serve(served, Options(**options), load=load, for_good=True)
    except ConfigurationError as error:
        raise click.UsageError(str(error)) from None
    except OSError as error:
        raise click.ClickException(error.strerror or str(error)) from None
    click.get_current_context().exit(code)


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
    if route.max_age is not None:
        limits.append(f"max_age={route.max_age}")
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
