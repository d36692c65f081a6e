"""``flask websockets routes``, and what ``flask routes`` says of WebSocket rules."""

from __future__ import annotations

from functools import wraps

import pytest
from flask import Blueprint, Flask
from flask.cli import ScriptInfo, routes_command

from flask_websockets import AsyncWebSocket, WebSocket, WebSockets

HEADERS = ["Endpoint", "View", "Rule", "Subprotocols", "Origins", "Limits"]


def view(ws: WebSocket, **arguments: object) -> None:
    """A view for routes that nobody connects to."""


async def async_view(ws: AsyncWebSocket, **arguments: object) -> None:
    """Its asynchronous twin."""


@pytest.fixture
def routes(app, websockets):
    """Run ``flask websockets routes``; the lines that it printed."""

    def run(*options: str) -> list[str]:
        result = app.test_cli_runner().invoke(args=["websockets", "routes", *options])
        assert result.exit_code == 0, result.output
        return result.output.splitlines()

    return run


def table(lines: list[str]) -> list[list[str]]:
    """The cells of a printed table, cut where its headers and their dashes begin."""
    dashes = lines[1]
    starts = [
        at for at, sign in enumerate(dashes) if sign == "-" and dashes[at - 1 : at] in ("", " ")
    ]
    ends = [*starts[1:], None]
    return [
        [line[start:end].strip() for start, end in zip(starts, ends, strict=True)]
        for line in [lines[0], *lines[2:]]
    ]


def endpoints(lines: list[str]) -> list[str]:
    return [row[0] for row in table(lines)[1:]]


def test_no_routes(app, routes):
    """An application without WebSocket routes says so; its HTTP routes do not count."""
    app.get("/")(lambda: "hello")
    assert routes() == ["No WebSocket routes were registered."]


def test_a_route_with_nothing_special(websockets, routes):
    """What a route does not set is a dash, or what the application's setting gives."""
    websockets.route("/ws/<room>", endpoint="chat")(view)
    lines = routes()
    assert table(lines) == [HEADERS, ["chat", "sync", "/ws/<room>", "-", "same origin", "-"]]
    assert lines == [
        "Endpoint  View  Rule        Subprotocols  Origins      Limits",
        "--------  ----  ----------  ------------  -----------  ------",
        "chat      sync  /ws/<room>  -             same origin  -",
    ]


def test_a_route_with_everything(websockets, routes):
    """Subprotocols and origins stand in a route's row in their order, its limits by their names."""
    websockets.route(
        "/ws",
        endpoint="all",
        subprotocols=["v2.chat", "v1.chat"],
        origins=["https://app.example.com", "https://*.example.org"],
        max_message_bytes=65536,
        send_timeout=2.5,
        inbox_full="close",
    )(view)
    assert table(routes())[1] == [
        "all",
        "sync",
        "/ws",
        "v2.chat, v1.chat",
        "https://app.example.com, https://*.example.org",
        "inbox_full=close, max_message_bytes=65536, send_timeout=2.5",
    ]


def test_sync_and_async(websockets, routes):
    """Each view is told as what it is."""
    websockets.route("/sync", endpoint="one")(view)
    websockets.route("/async", endpoint="two")(async_view)
    assert [row[:2] for row in table(routes())[1:]] == [["one", "sync"], ["two", "async"]]


def test_the_origins_are_those_that_hold():
    """A route without origins has those of the configuration; its own ones replace them."""
    app = Flask("origins")
    app.config["WEBSOCKETS_ALLOWED_ORIGINS"] = ["https://one.example", "https://two.example"]
    websockets = WebSockets(app)
    websockets.route("/a", endpoint="a")(view)
    websockets.route("/b", endpoint="b", origins=["*"])(view)
    websockets.route("/c", endpoint="c", origins=[])(view)
    result = app.test_cli_runner().invoke(args=["websockets", "routes"])
    rows = table(result.output.splitlines())
    assert [row[4] for row in rows[1:]] == [
        "https://one.example, https://two.example",
        "*",
        "same origin",
    ]


def test_two_applications_show_their_own_origins():
    """One object, two applications: each shows its routes under its own configuration."""
    websockets = WebSockets()
    websockets.route("/ws", endpoint="shared")(view)
    strict, open_to_all = Flask("strict"), Flask("open")
    open_to_all.config["WEBSOCKETS_ALLOWED_ORIGINS"] = "*"
    for app in (strict, open_to_all):
        websockets.init_app(app)
    origins = [
        table(app.test_cli_runner().invoke(args=["websockets", "routes"]).output.splitlines())[1][4]
        for app in (strict, open_to_all)
    ]
    assert origins == ["same origin", "*"]


def test_sorting(app, websockets, routes):
    """By endpoint, by rule, or in the order in which Flask matches."""
    websockets.route("/y", endpoint="c")(view)
    websockets.route("/z", endpoint="a")(view)
    websockets.route("/x", endpoint="b")(view)
    assert endpoints(routes()) == ["a", "b", "c"]
    assert endpoints(routes("--sort", "endpoint")) == ["a", "b", "c"]
    assert endpoints(routes("--sort", "rule")) == ["b", "c", "a"]
    matched = [rule.endpoint for rule in app.url_map.iter_rules() if rule.websocket]
    assert endpoints(routes("-s", "match")) == matched == ["c", "a", "b"]


def test_an_unknown_sorting_is_refused(app, websockets):
    """Click says what there is to choose from."""
    result = app.test_cli_runner().invoke(args=["websockets", "routes", "--sort", "colour"])
    assert result.exit_code == 2
    assert "'endpoint', 'rule', 'match'" in result.output


def test_blueprints(app, websockets, routes):
    """Endpoints and rules carry the names and prefixes of their blueprints."""
    outer, inner = Blueprint("outer", "x"), Blueprint("inner", "x")
    websockets.route("/ws", blueprint=inner, endpoint="chat")(view)
    outer.register_blueprint(inner, url_prefix="/inner")
    app.register_blueprint(outer, url_prefix="/outer")
    assert table(routes())[1][:3] == ["outer.inner.chat", "sync", "/outer/inner/ws"]


def test_hosts():
    """With host matching there is a column for it."""
    app = Flask("hosts", host_matching=True, static_host="static.example")
    websockets = WebSockets(app)
    websockets.route("/ws", endpoint="a", host="ws.example")(view)
    websockets.route("/ws", endpoint="b", host="<name>.example")(view)
    rows = table(app.test_cli_runner().invoke(args=["websockets", "routes"]).output.splitlines())
    assert [row[:4] for row in rows] == [
        ["Endpoint", "View", "Host", "Rule"],
        ["a", "sync", "ws.example", "/ws"],
        ["b", "sync", "<name>.example", "/ws"],
    ]


def test_subdomains_sorted_by_rule():
    """A subdomain stays with its rule, whatever the rows are sorted by; no domain is empty."""
    app = Flask("subdomains", subdomain_matching=True)
    app.config["SERVER_NAME"] = "example.com"
    websockets = WebSockets(app)
    websockets.route("/z", endpoint="a", subdomain="api")(view)
    websockets.route("/y", endpoint="b")(view)
    result = app.test_cli_runner().invoke(args=["websockets", "routes", "--sort", "rule"])
    rows = table(result.output.splitlines())
    assert [row[:4] for row in rows] == [
        ["Endpoint", "View", "Subdomain", "Rule"],
        ["b", "sync", "", "/y"],
        ["a", "sync", "api", "/z"],
    ]


def test_rules_of_others(app, routes):
    """A WebSocket rule that somebody else added is listed, with dashes for what is unknown."""
    app.add_url_rule("/raw", "raw", lambda: "", websocket=True)
    app.add_url_rule("/empty", "empty", websocket=True)
    assert table(routes())[1:] == [
        ["empty", "-", "/empty", "-", "-", "-"],
        ["raw", "-", "/raw", "-", "-", "-"],
    ]


def test_a_wrapped_view_function(app, websockets, routes):
    """A view function that was wrapped after its registration, with wraps, is still known."""
    websockets.route("/ws", endpoint="chat")(async_view)
    inner = app.view_functions["chat"]

    @wraps(inner)
    def outer(**arguments):
        return inner(**arguments)

    app.view_functions["chat"] = outer
    assert table(routes())[1][:2] == ["chat", "async"]


def test_the_route_is_told_on_the_view_function(app, websockets):
    """``view_functions[endpoint].websocket_route`` has what the route was given."""
    websockets.route("/a", endpoint="a", origins="*", subprotocols=["v1"], inbox_messages=5)(view)
    websockets.route("/b", endpoint="b")(async_view)
    a, b = (app.view_functions[name].websocket_route for name in "ab")
    assert (a.view, a.is_async, a.subprotocols, a.origins) == (view, False, ("v1",), ("*",))
    assert a.limits == {"inbox_messages": 5}
    assert (b.view, b.is_async, b.subprotocols, b.origins) == (async_view, True, (), None)
    assert b.limits == {}


def test_the_command_finds_the_application_like_any_other(websockets, app):
    """The command runs in the context of the application that the terminal names."""
    websockets.route("/ws", endpoint="chat")(view)
    made = []

    def create_app():
        made.append(app)
        return app

    result = app.test_cli_runner().invoke(
        app.cli, ["websockets", "routes"], obj=ScriptInfo(create_app=create_app)
    )
    assert result.exit_code == 0
    assert "chat" in result.output
    assert made == [app]


def test_help(app, websockets):
    """``flask websockets`` names its commands, and each says what it does."""
    runner = app.test_cli_runner()
    assert "Show the WebSocket routes for the app." in runner.invoke(args=["websockets"]).output
    text = runner.invoke(args=["websockets", "routes", "--help"]).output
    assert "Show all registered WebSocket routes" in text
    assert "--sort" in text


def test_flask_routes_lists_them_too(app, websockets):
    """Flask's own command has WebSocket rules among the others, with the endpoint's name."""
    app.get("/")(lambda: "hello")
    websockets.route("/ws/<room>", endpoint="chat")(view)
    result = app.test_cli_runner().invoke(routes_command)
    assert result.exit_code == 0
    rows = {row[0]: row for row in table(result.output.splitlines())}
    assert rows["chat"][1:] == ["GET", "/ws/<room>"]
