"""Routes on real servers: what each of them says to what comes by the wrong protocol."""

from __future__ import annotations

import http.client
import importlib.util
import json
import subprocess
import sys
from textwrap import dedent

import h2.events
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from .conftest import START_TIMEOUT
from .raw_client import RawClient
from .test_http2 import Http2Client

TIMEOUT = 10.0

APP = """
    import sys
    from flask import Blueprint, Flask, current_app, jsonify, request, url_for
    from flask_websockets import WebSocket, WebSockets
    from werkzeug.middleware.dispatcher import DispatcherMiddleware
    from werkzeug.middleware.proxy_fix import ProxyFix

    app, admin = Flask("front"), Flask("admin")
    websockets = WebSockets()
    live = Blueprint("live", __name__, url_prefix="/live")

    def place():
        return {
            "app": current_app.name, "endpoint": request.endpoint,
            "ws": url_for("shared"), "page": url_for("page", _external=True), "url": request.url,
        }

    @websockets.route("/shared")
    def shared(ws: WebSocket) -> None:
        ws.send_json(place())
        for data in ws.iter_data():
            ws.send(data)

    @websockets.route("/news")
    def news(ws: WebSocket) -> None:
        with websockets.subscribe(ws, "news"):
            ws.send("subscribed")
            for _ in ws.iter_data():
                pass

    def publish():
        websockets.publish(f"from {request.script_root}", "news")
        return "", 204

    @websockets.route("/ws/<room>", blueprint=live, subprotocols=["v1"])
    def only(ws: WebSocket, room: str) -> None:
        ws.send(room)

    @websockets.route("/slash/")
    def slash(ws: WebSocket) -> None:
        ws.send(request.query_string.decode())

    for each in (app, admin):
        websockets.init_app(each)
        each.get("/shared", endpoint="page")(lambda: jsonify(place()))
        each.post("/publish")(publish)
    app.get("/page", endpoint="other")(lambda: "page")
    app.register_blueprint(live)
    app.wsgi_app = DispatcherMiddleware(app.wsgi_app, {"/admin": admin.wsgi_app})
    app.wsgi_app = ProxyFix(app.wsgi_app, x_for=1, x_proto=1, x_host=1, x_prefix=1)
"""

ASGI = APP + "\n    asgi = websockets.asgi_app(app)\n"

WSGIREF = """
    from wsgiref.simple_server import make_server
    make_server("127.0.0.1", {port}, app).serve_forever()
"""

GUNICORN = ["-m", "gunicorn", "--no-control-socket", "-b", "127.0.0.1:{port}"]
WSGI_SERVERS = {
    "gunicorn-sync": [*GUNICORN, "-k", "sync", "served:app"],
    "gunicorn-gthread": [*GUNICORN, "-k", "gthread", "--threads", "4", "served:app"],
    "waitress": ["-m", "waitress", "--listen", "127.0.0.1:{port}", "served:app"],
    "wsgiref": ["served.py"],
}
#: They raise where an application sends a header of the connection, as PEP 3333 has it.
STRICT = ("waitress", "wsgiref")


def ask(server, method, path, headers=()):
    """One request on a connection of its own: status, headers, text."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=TIMEOUT)
    try:
        connection.request(method, path, headers=dict(headers))
        response = connection.getresponse()
        return response.status, response.headers, response.read().decode()
    finally:
        connection.close()


def refused(server, path):
    """The status that a handshake is answered with."""
    with pytest.raises(InvalidStatus) as caught, connect(server.ws_url(path), open_timeout=TIMEOUT):
        pass
    return caught.value.response.status_code


def told(server, path, **options):
    with connect(server.ws_url(path), open_timeout=TIMEOUT, **options) as client:
        return json.loads(client.recv(timeout=TIMEOUT))


# -- ASGI servers and the development server --------------------------------------------------


def check_every_protocol(server):
    """Each path answers each protocol as it should."""
    for method in ("GET", "HEAD", "POST"):
        status, headers, text = ask(server, method, "/live/ws/blue")
        assert (status, headers.get_all("Upgrade")) == (426, ["websocket"]), method
        assert bool(text) == (method != "HEAD")
    with connect(server.ws_url("/live/ws/blue"), subprotocols=["v1"]) as client:
        assert client.recv(timeout=TIMEOUT) == "blue"
        assert client.subprotocol == "v1"
    assert refused(server, "/page") == 400
    assert refused(server, "/nowhere") == 404
    with RawClient(server.port, "/slash?x=1") as client:
        assert client.status == 308
        assert f"location: {server.ws_url('/slash/?x=1')}\r\n" in client.head.replace("L", "l")
    with connect(server.ws_url("/slash?x=1")) as client:  # this client follows
        assert client.recv(timeout=TIMEOUT) == "x=1"
    assert "Traceback" not in server.log()


def check_mounted(server):
    """An application and one that is mounted in it: both views of one path know where they are."""
    host = f"127.0.0.1:{server.port}"
    for prefix, name in (("", "front"), ("/admin", "admin")):
        expected = {
            "app": name,
            "ws": f"ws://{host}{prefix}/shared",
            "page": f"http://{host}{prefix}/shared",
            "url": f"http://{host}{prefix}/shared",
        }
        assert told(server, f"{prefix}/shared") == {**expected, "endpoint": "shared"}
        status, _, text = ask(server, "GET", f"{prefix}/shared")
        assert (status, json.loads(text)) == (200, {**expected, "endpoint": "page"})
    assert "Traceback" not in server.log()


def check_shared_channels(server):
    """One object, two applications: its channels are theirs."""
    with connect(server.ws_url("/news")) as one, connect(server.ws_url("/admin/news")) as two:
        assert one.recv(timeout=TIMEOUT) == two.recv(timeout=TIMEOUT) == "subscribed"
        for prefix in ("", "/admin"):
            assert ask(server, "POST", f"{prefix}/publish")[0] == 204
            assert one.recv(timeout=TIMEOUT) == two.recv(timeout=TIMEOUT) == f"from {prefix}"


def test_every_protocol_on_uvicorn(uvicorn_server):
    """uvicorn: 426, 400, 404, a redirect, and both views of one path, mounted ones as well."""
    server = uvicorn_server(ASGI)
    check_every_protocol(server)
    check_mounted(server)


def test_every_protocol_under_app_run(development_server):
    """app.run: 426, 400, 404 and a redirect as well."""
    check_every_protocol(development_server(APP + "\n    app.run(port={port})\n"))


def test_mounted_applications_under_app_run(development_server):
    """app.run: the mounted application is served beside the one that it is mounted in."""
    check_mounted(development_server(APP + "\n    app.run(port={port})\n"))


def test_mounted_applications_share_channels(uvicorn_server):
    """uvicorn: what one of them publishes, the subscribers of the other get."""
    check_shared_channels(uvicorn_server(ASGI))


def test_mounted_applications_share_channels_under_app_run(development_server):
    """app.run: the same."""
    check_shared_channels(development_server(APP + "\n    app.run(port={port})\n"))


@pytest.mark.parametrize("worker", ["asyncio", "trio"])
def test_every_protocol_on_hypercorn(start_server, worker):
    """hypercorn, on each kind of loop: the same."""
    command = ["-m", "hypercorn", "-w", "0", "-k", worker, "--bind", "127.0.0.1:{port}"]
    server = start_server(ASGI, [sys.executable, *command, "served:asgi"])
    check_every_protocol(server)
    check_mounted(server)


def test_a_connection_is_kept_after_426(uvicorn_server):
    """The refusal is a response like any other: the next request comes on the same connection."""
    server = uvicorn_server(ASGI)
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=TIMEOUT)
    for path, status in (("/live/ws/a", 426), ("/page", 200), ("/live/ws/a", 426), ("/page", 200)):
        connection.request("GET", path)
        response = connection.getresponse()
        assert response.status == status
        response.read()
        assert not response.will_close
    connection.close()


FORWARDED = {
    "X-Forwarded-Proto": "https",
    "X-Forwarded-Host": "app.example.com",
    "X-Forwarded-Prefix": "/shop",
}
FORWARDED_PLACE = {
    "app": "front",
    "ws": "wss://app.example.com/shop/shared",
    "page": "https://app.example.com/shop/shared",
    "url": "https://app.example.com/shop/shared",
}


def check_urls_behind_a_proxy(server):
    headers = {**FORWARDED, "Origin": "https://app.example.com"}
    ws = told(server, "/shared", additional_headers=FORWARDED, origin="https://app.example.com")
    assert ws == {**FORWARDED_PLACE, "endpoint": "shared"}
    _, _, text = ask(server, "GET", "/shared", headers)
    assert json.loads(text) == {**FORWARDED_PLACE, "endpoint": "page"}


@pytest.mark.parametrize("option", ["--proxy-headers", "--no-proxy-headers"])
def test_urls_behind_a_proxy_on_uvicorn(uvicorn_server, option):
    """wss:// with the public host and prefix, whether or not uvicorn reads the headers too."""
    check_urls_behind_a_proxy(uvicorn_server(ASGI, option))


def test_urls_behind_a_proxy_under_app_run(development_server):
    """The development server behind a proxy: the same."""
    check_urls_behind_a_proxy(development_server(APP + "\n    app.run(port={port})\n"))


def test_urls_below_uvicorns_root_path(uvicorn_server):
    """--root-path, for a proxy that takes the prefix off, is in every URL."""
    server = uvicorn_server(ASGI, "--root-path", "/shop")
    host = f"127.0.0.1:{server.port}"
    ws = told(server, "/shared")
    assert ws["ws"] == f"ws://{host}/shop/shared"
    assert ws["page"] == f"http://{host}/shop/shared"
    page = json.loads(ask(server, "GET", "/shared")[2])
    assert (page["ws"], page["page"]) == (ws["ws"], ws["page"])


@pytest.mark.parametrize("worker", ["asyncio", "trio"])
def test_426_over_http_2(start_server, worker):
    """HTTP/2 has no Upgrade header: the 426 comes without, and the connection goes on."""
    command = ["-m", "hypercorn", "-w", "0", "-k", worker, "--bind", "127.0.0.1:{port}"]
    server = start_server(ASGI, [sys.executable, *command, "served:asgi"])
    client = Http2Client(server.port)
    try:
        client.request("GET", "/live/ws/blue")
        names: list[str] = []
        for event in client.events():
            if isinstance(event, h2.events.ResponseReceived):
                names = [name for name, _ in event.headers]
                assert dict(event.headers)[":status"] == "426"
            if isinstance(event, h2.events.StreamEnded):
                break
        assert {"upgrade", "connection"}.isdisjoint(names)  # RFC 9113, section 8.2.2
        assert client.answers(client.request("GET", "/page")) == [(200, b"page")]
    finally:
        client.socket.close()
    assert "Traceback" not in server.log()


# -- WSGI servers -----------------------------------------------------------------------------


@pytest.fixture(params=WSGI_SERVERS)
def wsgi_server(request, start_server):
    """The Flask application itself, on a server that knows WSGI only."""
    name = request.param
    if name == "waitress" and importlib.util.find_spec("waitress") is None:
        pytest.skip("waitress is not installed")
    source = APP + (WSGIREF if name == "wsgiref" else "")
    server = start_server(source, [sys.executable, *WSGI_SERVERS[name]])
    server.may_say_upgrade = name not in STRICT
    return server


def test_a_wsgi_server_says_426(wsgi_server):
    """Plain HTTP to a WebSocket path; pages are served as ever, and nothing is logged."""
    for method in ("GET", "HEAD", "POST"):
        status, headers, text = ask(wsgi_server, method, "/live/ws/blue")
        assert status == 426, wsgi_server.log()
        expected = ["websocket"] if wsgi_server.may_say_upgrade else None
        assert headers.get_all("Upgrade") == expected
        assert bool(text) == (method != "HEAD")
    assert ask(wsgi_server, "GET", "/page")[2] == "page"
    assert json.loads(ask(wsgi_server, "GET", "/shared")[2])["endpoint"] == "page"
    assert "Traceback" not in wsgi_server.log()


@pytest.mark.parametrize("path", ["/live/ws/blue", "/shared", "/admin/shared"])
def test_a_handshake_at_a_wsgi_server_is_told_what_to_serve(wsgi_server, path):
    """426, and the body says to serve asgi_app(); the same beside a page, and mounted."""
    with RawClient(wsgi_server.port, path) as client:
        assert client.status == 426
        names = [line.partition(":")[0].lower() for line in client.head.splitlines()]
        assert ("upgrade" in names) == wsgi_server.may_say_upgrade
        length = int(client.head.lower().partition("content-length:")[2].split()[0])
        body = client._read(length).decode()
    assert "asgi_app()" in body
    assert "Traceback" not in wsgi_server.log()


def test_a_handshake_at_a_page_of_a_wsgi_server_is_400(wsgi_server):
    """There is nothing that asgi_app() would serve."""
    with RawClient(wsgi_server.port, "/page") as client:
        assert client.status == 400
    with RawClient(wsgi_server.port, "/nowhere") as client:
        assert client.status == 404


# -- the terminal -----------------------------------------------------------------------------


def flask(tmp_path, *arguments):
    result = subprocess.run(
        [sys.executable, "-m", "flask", "--app", "served", *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=START_TIMEOUT,
    )
    assert result.returncode == 0, result.stderr
    return [line.split() for line in result.stdout.splitlines()]


def test_the_terminal_lists_the_routes(tmp_path):
    """``flask routes`` has WebSocket rules too, ``flask websockets routes`` has them alone."""
    (tmp_path / "served.py").write_text(dedent(APP))
    everything = flask(tmp_path, "routes")
    assert ["live.only", "GET", "/live/ws/<room>"] in everything
    assert ["other", "GET", "/page"] in everything
    assert flask(tmp_path, "websockets", "routes", "--sort", "rule")[2:] == [
        ["live.only", "sync", "/live/ws/<room>", "v1", "same", "origin", "-"],
        ["news", "sync", "/news", "-", "same", "origin", "-"],
        ["shared", "sync", "/shared", "-", "same", "origin", "-"],
        ["slash", "sync", "/slash/", "-", "same", "origin", "-"],
    ]
