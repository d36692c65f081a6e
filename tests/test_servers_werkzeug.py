"""The development server: what it relies on in uvicorn and Werkzeug, and what it leaves alone."""

from __future__ import annotations

import asyncio
import inspect
import io
import os
import socket
import subprocess
import sys
import textwrap

import pytest
from flask import Flask
from uvicorn import Config
from uvicorn.protocols.websockets.auto import AutoWebSocketsProtocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from uvicorn.protocols.websockets.wsproto_impl import WSProtocol
from uvicorn.server import ServerState
from werkzeug.serving import WSGIRequestHandler, make_server
from werkzeug.test import EnvironBuilder, run_wsgi_app

from flask_websockets import WebSockets

#: Seconds that anything may take.
TIMEOUT = 10.0

CLASSES = [WSProtocol, WebSocketsSansIOProtocol]

HEAD = (
    b"GET /ws HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)

HANDSHAKE = {
    "Host": "localhost",
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
}


# -- the contract with uvicorn ---------------------------------------------------------------------


def test_the_class_that_is_chosen_is_one_of_those():
    """What ``--ws auto`` means is one of the classes that the contract below is of."""
    assert AutoWebSocketsProtocol in CLASSES
    config = Config(lambda: None, lifespan="off", log_config=None)
    config.load()
    assert config.ws_protocol_class is AutoWebSocketsProtocol


@pytest.mark.parametrize("kind", CLASSES)
def test_the_constructor(kind):
    """It takes config, server_state and app_state by their names, and needs nothing else."""
    parameters = inspect.signature(kind).parameters
    assert {"config", "server_state", "app_state"} <= parameters.keys()
    needed = {
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }
    assert needed == {"config", "server_state", "app_state"}
    inspect.signature(kind).bind(config=None, server_state=None, app_state=None)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize(
    "name, arguments",
    [("connection_made", 1), ("data_received", 1), ("connection_lost", 1), ("shutdown", 0)],
)
def test_the_methods(kind, name, arguments):
    """They are plain functions of so many arguments: asyncio's protocol, and a shutdown."""
    method = getattr(kind, name)
    assert not inspect.iscoroutinefunction(method)
    inspect.signature(method).bind(None, *range(arguments))
    assert issubclass(kind, asyncio.Protocol)
    assert not issubclass(kind, asyncio.BufferedProtocol)


@pytest.fixture(params=["tcp", "unix"])
def sockets(request):
    """Both ends of a connection: the server's, and the client's."""
    if request.param == "unix":
        ends = socket.socketpair()
    else:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            client = socket.create_connection(listener.getsockname())
            ends = listener.accept()[0], client
    yield ends
    for end in ends:
        end.close()


@pytest.mark.parametrize("kind", CLASSES)
def test_a_socket_that_was_accepted_elsewhere(kind, sockets):
    """The loop takes it over, the head is given by hand, and app_state is in the scope."""
    marker = object()
    scopes = []

    async def app(scope, receive, send):
        scopes.append(scope)
        await receive()
        await send({"type": "websocket.accept", "headers": [(b"set-cookie", b"a=b")]})
        await send({"type": "websocket.send", "text": (await receive())["text"]})
        await send({"type": "websocket.close", "code": 4001, "reason": "bye"})
        await receive()

    async def main():
        config = Config(
            app,
            lifespan="off",
            log_config=None,
            proxy_headers=False,
            ws_max_size=1000,
            ws_per_message_deflate=False,
        )
        config.load()
        protocol = kind(config=config, server_state=ServerState(), app_state={"marker": marker})
        ours, theirs = sockets
        for end in sockets:
            end.setblocking(False)
        loop = asyncio.get_running_loop()
        transport, same = await loop.connect_accepted_socket(lambda: protocol, ours)
        assert same is protocol
        protocol.data_received(HEAD)
        reader, writer = await asyncio.open_connection(sock=theirs)
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101 ")
        assert b"set-cookie: a=b" in head.lower()
        writer.write(b"\x81\x85\0\0\0\0hello")
        assert await reader.readexactly(7) == b"\x81\x05hello"
        assert await reader.readexactly(7) == b"\x88\x05\x0f\xa1bye"
        writer.write(b"\x88\x82\0\0\0\0\x0f\xa1")
        assert await reader.read() == b""
        writer.close()
        await asyncio.wait(tuple(protocol.tasks) or [asyncio.create_task(asyncio.sleep(0))])
        transport.close()

    asyncio.run(asyncio.wait_for(main(), TIMEOUT))
    (scope,) = scopes
    assert scope["type"] == "websocket"
    assert scope["path"] == "/ws"
    assert scope["state"]["marker"] is marker


@pytest.mark.parametrize("kind", CLASSES)
def test_a_refusal_on_a_socket_that_was_accepted_elsewhere(kind, sockets):
    """A response instead of a 101 goes out, and the connection is closed behind it."""

    async def app(scope, receive, send):
        assert "websocket.http.response" in scope["extensions"]
        await receive()
        await send({"type": "websocket.http.response.start", "status": 401, "headers": []})
        await send({"type": "websocket.http.response.body", "body": b"not you"})

    async def main():
        config = Config(app, lifespan="off", log_config=None)
        config.load()
        protocol = kind(config=config, server_state=ServerState(), app_state={})
        ours, theirs = sockets
        for end in sockets:
            end.setblocking(False)
        loop = asyncio.get_running_loop()
        transport, _ = await loop.connect_accepted_socket(lambda: protocol, ours)
        protocol.data_received(HEAD)
        reader, writer = await asyncio.open_connection(sock=theirs)
        answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 401 ")
        assert b"not you" in answer
        writer.close()
        transport.close()

    asyncio.run(asyncio.wait_for(main(), TIMEOUT))


# -- the contract with Werkzeug --------------------------------------------------------------------


def test_werkzeug_gives_its_socket_away():
    """Its environ has the very object that the handler reads from, writes to and closes."""
    seen = {}

    class Handler(WSGIRequestHandler):
        def run_wsgi(self):
            seen["handler"] = self
            super().run_wsgi()

    def app(environ, start_response):
        connection = environ["werkzeug.socket"]
        handler = seen["handler"]
        assert connection is handler.connection is handler.request
        assert isinstance(environ["wsgi.input"], io.BufferedReader)
        assert environ["wsgi.input"] is handler.rfile
        seen["ahead"] = environ["wsgi.input"].peek()
        assert not environ["wsgi.multiprocess"]
        assert environ["RAW_URI"] == environ["REQUEST_URI"] == "/ws"
        start_response("204 No Content", [])
        return []

    server = make_server("127.0.0.1", 0, app, request_handler=Handler)
    try:
        server.timeout = TIMEOUT
        with socket.create_connection(("127.0.0.1", server.port), TIMEOUT) as client:
            client.sendall(HEAD + b"early")
            server.handle_request()
            assert b" 204 No Content" in client.recv(1000).splitlines()[0]
    finally:
        server.server_close()
    assert seen["ahead"] == b"early"


def test_werkzeug_forks_only_where_it_says_so():
    """``processes=`` is what wsgi.multiprocess tells of; threads do not count."""
    told = {}
    for name, options in {"threads": {"threaded": True}, "plain": {}}.items():
        server = make_server("127.0.0.1", 0, lambda *_: [], **options)
        told[name] = server.multiprocess
        server.server_close()
    assert told == {"threads": False, "plain": False}
    server = make_server("127.0.0.1", 0, lambda *_: [], processes=2)
    assert server.multiprocess
    server.server_close()


# -- what is no handshake of this server's ---------------------------------------------------------


@pytest.fixture
def served(app: Flask, websockets: WebSockets) -> Flask:
    @websockets.route("/ws")
    def view(ws):
        ws.send("never called here")

    app.get("/page")(lambda: "the page")
    app.post("/page", endpoint="post")(lambda: "posted")
    return app


@pytest.fixture
def connection():
    """A socket as Werkzeug's handler holds it; nothing may have happened to it."""
    ours, theirs = socket.socketpair()
    descriptor = ours.fileno()
    yield ours
    assert ours.fileno() == descriptor
    theirs.setblocking(False)
    with pytest.raises(BlockingIOError):
        theirs.recv(1)
    ours.close()
    theirs.close()


def call(app: Flask, path: str, method: str = "GET", headers=(), **extra):
    environ = EnvironBuilder(path=path, method=method, headers=dict(headers)).get_environ()
    environ.update({key.replace("__", "."): value for key, value in extra.items()})
    chunks, status, answered = run_wsgi_app(app.wsgi_app, environ)
    return int(status.split()[0]), b"".join(chunks), answered


@pytest.mark.parametrize(
    "method, path, headers, status, body",
    [
        ("GET", "/page", {}, 200, b"the page"),
        # Flask goes by the headers: to its router this is a WebSocket, wherever it comes from.
        ("POST", "/page", HANDSHAKE, 405, None),
        ("GET", "/page", {"Upgrade": "websocket"}, 200, b"the page"),
        ("GET", "/page", {"Connection": "Upgrade"}, 200, b"the page"),
        ("GET", "/page", {"Connection": "Upgrade", "Upgrade": "h2c"}, 200, b"the page"),
        ("GET", "/page", {"Connection": "upgraded", "Upgrade": "websocket"}, 200, b"the page"),
        ("GET", "/ws", {}, 426, None),
        ("GET", "/nowhere", {}, 404, None),
    ],
)
def test_what_is_no_handshake_goes_to_flask(
    served, connection, method, path, headers, status, body
):
    """And the socket is left alone."""
    answer = call(served, path, method, headers, werkzeug__socket=connection)
    assert answer[0] == status
    assert body is None or answer[1] == body


def test_another_wsgi_server_gets_426(served):
    """Without Werkzeug's socket a handshake is Flask's to answer."""
    assert call(served, "/ws", headers=HANDSHAKE)[0] == 426


def test_several_processes_get_501(served, connection):
    """A forking server's child cannot keep a connection; the answer says what to do."""
    status, body, headers = call(
        served,
        "/ws",
        headers=HANDSHAKE,
        werkzeug__socket=connection,
        wsgi__multiprocess=True,
    )
    assert status == 501
    assert b"uvicorn" in body
    assert headers["Content-Type"].startswith("text/plain")


def test_an_application_is_wrapped_once(app, websockets):
    """init_app wraps wsgi_app of its own application, and of no other."""
    plain = Flask("plain")
    assert plain.wsgi_app == Flask.wsgi_app.__get__(plain)
    assert "wsgi_app" not in vars(plain)
    assert app.wsgi_app != Flask.wsgi_app.__get__(app)
    assert call(app, "/nowhere")[0] == call(plain, "/nowhere")[0] == 404


# -- applications that do not use the extension ----------------------------------------------------

#: What could be changed in a process, before and after; read by both scripts below.
PICTURE = """
    import importlib, logging, pkgutil, signal, sys, threading, types, warnings
    import asyncio, concurrent.futures.thread, http.server, socket, socketserver, ssl
    import click, flask, flask.cli, werkzeug

    for package in (click, flask, werkzeug):
        for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            if not module.name.endswith("__main__"):
                try:
                    importlib.import_module(module.name)
                except (ImportError, AssertionError):
                    pass  # for another system, or with something that is not installed

    def picture_of(value, depth=3):
        if isinstance(value, types.FunctionType):
            return (id(value), id(value.__code__), repr(value.__defaults__))
        if isinstance(value, (classmethod, staticmethod, property)) or depth == 0:
            return id(value)
        if isinstance(value, type):
            return (id(value), tuple(
                (name, picture_of(member, depth - 1))
                for name, member in sorted(vars(value).items())
                if name not in ("__doc__", "__dict__", "__weakref__", "_abc_impl",
                                "__abstractmethods__")
            ))
        if isinstance(value, click.Command):
            commands = getattr(value, "commands", {})
            return (
                id(value), id(value.callback), [id(param) for param in value.params],
                {name: picture_of(command) for name, command in commands.items()},
            )
        if isinstance(value, (dict, list, set, frozenset, tuple, str, int, bytes)):
            return (id(value), repr(value))
        return id(value)

    def picture():
        found = {}
        for name, module in sorted(sys.modules.items()):
            if name.split(".")[0] in ("click", "flask", "werkzeug", "socketserver", "socket",
                                      "ssl", "http", "threading"):
                for attribute, value in vars(module).items():
                    if not (attribute.startswith("__") or name == "threading"
                            and attribute in ("_active", "_limbo", "_dangling")):
                        found[name, attribute] = picture_of(value)
        found["signals"] = [signal.getsignal(number) for number in signal.valid_signals()]
        found["hooks"] = [id(hook) for hook in (
            sys.excepthook, threading.excepthook, sys.unraisablehook, warnings.showwarning)]
        found["filters"] = list(warnings.filters)
        found["root logger"] = (logging.getLogger().handlers[:], logging.getLogger().level)
        found["werkzeug's logger"] = (
            logging.getLogger("werkzeug").handlers[:], logging.getLogger("werkzeug").level)
        found["threads"] = threading.enumerate()
        found["loop policy"] = type(asyncio.events._event_loop_policy)
        found["flask run"] = (
            id(flask.cli.run_command.callback), [p.name for p in flask.cli.run_command.params])
        return found

    plain = flask.Flask("plain")
    before = picture()
"""


def run_script(source: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PICTURE) + textwrap.dedent(source)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


COMPARE = """
    after = picture()
    changed = [key for key in before.keys() | after.keys() if before.get(key) != after.get(key)]
    assert not changed, sorted(map(str, changed))
    print("nothing changed among", len(before))
"""


def test_the_picture_shows_changes():
    """The comparison below can fail: one method replaced, one command added, are seen."""
    out = run_script(
        """
        original = werkzeug.serving.WSGIRequestHandler.run_wsgi
        werkzeug.serving.WSGIRequestHandler.run_wsgi = lambda self: original(self)
        flask.cli.run_command.params.append(click.Option(["--new"]))
        flask.Flask.new = 1
        after = picture()
        changed = {str(key) for key in before if before[key] != after[key]}
        for key in ("WSGIRequestHandler", "run_command", "Flask'", "flask run"):
            assert any(key in name for name in changed), (key, changed)
        print("seen")
        """
    )
    assert out == "seen\n"


@pytest.mark.parametrize(
    "use",
    [
        "import flask_websockets",
        "import flask_websockets.testing, flask_websockets.cli",
        """
import flask_websockets
other = flask.Flask("other")
websockets = flask_websockets.WebSockets(other)
websockets.route("/ws")(lambda ws: None)
websockets.asgi_app()
""",
    ],
    ids=["import", "import-all", "another-app"],
)
def test_nothing_is_replaced(use):
    """Neither the import nor another application's extension changes Flask, Werkzeug or click."""
    out = run_script(textwrap.indent(textwrap.dedent(use), "    ") + COMPARE)
    assert out.startswith("nothing changed among ")
    assert int(out.split()[-1]) > 1000


def test_an_application_without_the_extension():
    """Its wsgi_app, its commands and its state are Flask's own, whoever imports the package."""
    out = run_script(
        """
        import flask_websockets
        from click.testing import CliRunner

        other = flask.Flask("other")
        flask_websockets.WebSockets(other)

        assert "wsgi_app" not in vars(plain) and "async_to_sync" not in vars(plain)
        assert plain.wsgi_app.__func__ is flask.Flask.wsgi_app
        assert "websockets" not in plain.extensions
        assert "websockets" not in plain.cli.commands
        assert plain.after_request_funcs == {} == plain.url_value_preprocessors

        def help_of(app, *args):
            group = flask.cli.FlaskGroup(create_app=lambda: app)
            return CliRunner().invoke(group, args)

        assert "websockets" not in help_of(plain, "--help").output
        assert "websockets" in help_of(other, "--help").output
        assert help_of(plain, "websockets").exit_code == 2
        runs = [help_of(app, "run", "--help").output for app in (plain, other)]
        assert runs[0] == runs[1]

        from importlib.metadata import entry_points
        ours = [entry for entry in entry_points(group="flask.commands")
                if "flask_websockets" in entry.value]
        assert not ours
        print("untouched")
        """
    )
    assert out == "untouched\n"
