"""The shortest way through a real server."""

from __future__ import annotations

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


def test_echo_under_app_run(development_server):
    """The development server does the same."""
    server = development_server(ECHO + "\n    app.run(port={port})\n")
    with connect(server.ws_url("/echo")) as client:
        for data in ("text", b"binary", "x" * 200_000):
            client.send(data)
            assert client.recv(timeout=5) == data
