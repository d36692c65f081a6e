"""The shortest way through a real server."""

from __future__ import annotations

import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

ECHO = """
    from flask import Flask
    from flask_websockets import WebSocket, WebSockets

    app = Flask(__name__)
    websockets = WebSockets(app)

    @websockets.route("/echo")
    def echo(ws: WebSocket) -> None:
        for data in ws.iter_data():
            ws.send(data)

    @app.get("/")
    def index():
        return "hello"
"""


def test_echo_on_uvicorn(uvicorn_server):
    """uvicorn echoes text and binary through a sync view."""
    server = uvicorn_server(ECHO + "\n    asgi = websockets.asgi_app()\n")
    with connect(server.ws_url("/echo")) as client:
        for data in ("text", b"binary", "x" * 200_000):
            client.send(data)
            assert client.recv(timeout=5) == data
    assert server.stop()[0] in (0, -15)


@pytest.mark.parametrize("limit", ["", "app.config['WEBSOCKETS_MAX_CONNECTIONS'] = 1"])
def test_a_refusal_is_no_error_of_the_servers(uvicorn_server, limit):
    """The server's log has no error for a handshake that was refused, by a view or by a limit."""
    source = ECHO.replace("app = Flask(__name__)", f"app = Flask(__name__)\n    {limit}")
    source += """
    @websockets.route("/no")
    def no(ws):
        return "Not you", 401

    asgi = websockets.asgi_app()
    """
    server = uvicorn_server(source)
    with connect(server.ws_url("/echo")) as client:
        client.send("x")
        assert client.recv(timeout=5) == "x"
        with pytest.raises(InvalidStatus) as caught, connect(server.ws_url("/no")):
            pass
        assert caught.value.response.status_code == (503 if limit else 401)
    server.stop()
    assert "Finished server process" in server.log()
    assert "ERROR" not in server.log()


def test_echo_under_app_run(development_server):
    """The development server does the same."""
    server = development_server(ECHO + "\n    app.run(port={port})\n")
    with connect(server.ws_url("/echo")) as client:
        for data in ("text", b"binary", "x" * 200_000):
            client.send(data)
            assert client.recv(timeout=5) == data
