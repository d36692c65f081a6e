"""``app.run(...)``: Werkzeug's server hands its sockets over; nothing else changes."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import textwrap
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import websockets.asyncio.client
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect, unix_connect

from .conftest import ServerProcess, free_port
from .raw_client import RawClient
from .serving import make_certificate
from .waiting import wait_until

COUNTED = """
    from flask import Flask, request, session
    from flask_websockets import WebSocket, WebSockets

    app = Flask(__name__)
    app.secret_key = "x"
    seen = []

    def counting(name, inner):
        def middleware(environ, start_response):
            if environ["PATH_INFO"] == "/ws":
                seen.append(name)
                environ["seen." + name] = "yes"
            return inner(environ, start_response)
        return middleware

    app.wsgi_app = counting("inside", app.wsgi_app)
    websockets = WebSockets(app)
    app.wsgi_app = counting("outside", app.wsgi_app)

    @app.before_request
    def before():
        if request.path == "/ws":
            seen.append("before_request")

    @websockets.route("/ws")
    def view(ws):
        session["seen"] = "yes"
        keys = [key for key in request.environ if key.startswith("seen.")]
        ws.send_json([sorted(keys), request.headers["X-Custom"], request.remote_addr])
        for data in ws.iter_data():
            ws.send(data)

    @app.get("/seen")
    def show():
        return seen
"""


def fetch(server, path):
    with urllib.request.urlopen(server.url(path), timeout=10) as response:
        return response.read()


def check_counted(server):
    with connect(server.ws_url("/ws"), additional_headers={"X-Custom": "yes"}) as client:
        keys, custom, address = json.loads(client.recv(timeout=5))
        assert keys == ["seen.inside", "seen.outside"]
        assert custom == "yes"
        assert address == "127.0.0.1"
        assert client.response.headers["Set-Cookie"].startswith("session=")
        for data in ("text", b"binary", "x" * 1_000_000):
            client.send(data)
            assert client.recv(timeout=5) == data
    assert json.loads(fetch(server, "/seen")) == ["outside", "inside", "before_request"]


def test_i3_each_middleware_sees_a_handshake_once_under_app_run(development_server):
    """A middleware outside, one inside and before_request each count one."""
    check_counted(development_server(COUNTED + "\n    app.run(port={port})\n"))


def test_i3_each_middleware_sees_a_handshake_once_under_uvicorn(uvicorn_server):
    """The same under uvicorn."""
    check_counted(uvicorn_server(COUNTED + "\n    asgi = websockets.asgi_app()\n"))


ENDINGS = """
    import threading
    from flask import Flask, abort
    from flask_websockets import WebSocket, WebSockets

    app = Flask(__name__)
    websockets = WebSockets(app)

    @websockets.route("/echo")
    def echo(ws):
        for data in ws.iter_data():
            ws.send(data)

    @websockets.route("/return")
    def return_(ws):
        pass

    @websockets.route("/raise")
    def raise_(ws):
        ws.accept()
        raise RuntimeError("the secret")

    @websockets.route("/refuse")
    def refuse(ws):
        abort(401)

    @websockets.route("/news")
    def news(ws):
        with websockets.subscribe(ws, "news"):
            ws.send("subscribed")
            for _ in ws.iter_data():
                pass

    @app.get("/publish")
    def publish():
        websockets.publish("from a request", "news")
        return {"threads": sorted(thread.name for thread in threading.enumerate())}
"""


def test_the_implementation_is_the_one_that_is_there(development_server, implementation):
    """Without the websockets library the development server speaks through wsproto."""
    source = (
        ENDINGS
        + """
    @app.get("/protocol")
    def protocol():
        kinds = {type(c.protocol).__name__ for c in websockets._runtime.connections}
        return sorted(kinds)

    app.run(port={port})
    """
    )
    server = development_server(source)
    with connect(server.ws_url("/news")) as client:
        assert client.recv(timeout=5) == "subscribed"
        expected = {"wsproto": "WSProtocol", "sansio": "WebSocketsSansIOProtocol"}
        assert json.loads(fetch(server, "/protocol")) == [expected[implementation]]


@pytest.fixture(params=["threaded=True", "threaded=False", "debug=True, use_reloader=False"])
def server(development_server, request):
    return development_server(ENDINGS + f"\n    app.run(port={{port}}, {request.param})\n")


def test_the_development_server(server):
    """Echo, endings, refusals, 404, channels and HTTP, with and without threads and debugger."""
    reason = "RuntimeError: the secret" if "Debug mode: on" in server.log() else ""
    for path, *expected in (("/return", 1000, ""), ("/raise", 1011, reason)):
        with connect(server.ws_url(path)) as client:
            with pytest.raises(ConnectionClosed) as caught:
                client.recv(timeout=5)
            assert [caught.value.rcvd.code, caught.value.rcvd.reason] == expected
    for path, status in (("/refuse", 401), ("/nowhere", 404)):
        with pytest.raises(InvalidStatus) as refused:
            connect(server.ws_url(path))
        assert refused.value.response.status_code == status
    with connect(server.ws_url("/news")) as client:
        assert client.recv(timeout=5) == "subscribed"
        threads = json.loads(fetch(server, "/publish"))["threads"]
        assert client.recv(timeout=5) == "from a request"
        # The connection costs its view's thread, and the loop's is shared by all.
        assert threads.count("flask-websockets-loop") == 1
    wait_until(lambda: "RuntimeError: the secret" in server.log())
    assert server.log().count("RuntimeError: the secret") == 1


def test_a_request_that_is_no_handshake_goes_to_the_application(server):
    """A POST or a half upgrade is Flask's business; a bad handshake is answered 400."""
    for headers in ({"Upgrade": "websocket"}, {"Connection": "Upgrade"}):
        request = urllib.request.Request(server.url("/publish"), headers=headers)
        with urllib.request.urlopen(request, timeout=5) as response:
            assert response.status == 200
    with socket.create_connection(("127.0.0.1", server.port), 5) as plain:
        plain.sendall(
            b"GET /echo HTTP/1.1\r\nHost: x\r\nConnection: keep-alive, Upgrade\r\n"
            b"Upgrade: WebSocket\r\n\r\n"
        )
        assert plain.recv(1000).split()[1] in (b"400", b"426")


def test_descriptors_come_back(server):
    """Connections that come and go leave no socket behind."""
    fetch(server, "/publish")
    with RawClient(server.port, "/echo"):
        pass
    base = server.descriptors()  # the loop's own are open now
    for number in range(30):
        client = RawClient(server.port, "/echo" if number % 2 else "/refuse")
        if number % 3:
            client.reset()
        else:
            client.close()
    wait_until(lambda: server.descriptors() <= base)
    wait_until(lambda: server.threads() <= 6)


def test_a_forking_server_says_so(development_server):
    """processes= cannot work, and the answer says what to do."""
    server = development_server(
        ENDINGS + "\n    app.run(port={port}, threaded=False, processes=2)\n"
    )
    with pytest.raises(InvalidStatus) as refused:
        connect(server.ws_url("/echo"))
    assert refused.value.response.status_code == 501
    assert b"uvicorn" in refused.value.response.body


def test_the_reloader_restarts_with_sockets_open(start_server):
    """With the stat reloader the new code answers, and the socket of the old one is gone."""
    source = ENDINGS + "\n    app.run(port={port}, debug=True, reloader_type='stat')\n"
    server = start_server(source, [sys.executable, "served.py"])
    try:
        with connect(server.ws_url("/news")) as client:
            assert client.recv(timeout=5) == "subscribed"
            path = server._log_path.parent / "served.py"
            path.write_text(path.read_text().replace('"subscribed"', '"reloaded"'))
            with pytest.raises(ConnectionClosed):
                client.recv(timeout=15)

        def reloaded():
            try:
                with connect(server.ws_url("/news"), open_timeout=2) as client:
                    return client.recv(timeout=5) == "reloaded"
            except OSError:
                return False

        wait_until(reloaded, 15)
    finally:
        server.stop(signal.SIGINT)
    wait_until(lambda: refused(server.port), 10, "the end of the reloader's child")


def refused(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


# -- publish where it cannot, or hardly, work ---------------------------------------------------

SIGNALS = """
    import signal
    from flask import Flask
    from flask_websockets import WebSockets

    app = Flask(__name__)
    websockets = WebSockets(app)
    errors = []

    def on_signal(number, frame):
        try:
            websockets.publish("from a signal handler", "news")
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")

    signal.signal(signal.SIGUSR1, on_signal)

    @websockets.route("/news")
    def news(ws):
        with websockets.subscribe(ws, "news"):
            ws.send("subscribed")
            for _ in ws.iter_data():
                pass

    @app.get("/errors")
    def show():
        return errors
"""


def test_publish_in_a_signal_handler_under_app_run(development_server):
    """The main thread is not the loop's: a signal handler may publish."""
    server = development_server(SIGNALS + "\n    app.run(port={port})\n")
    with connect(server.ws_url("/news")) as client:
        assert client.recv(timeout=5) == "subscribed"
        for _ in range(20):
            os.kill(server.pid, signal.SIGUSR1)
            assert client.recv(timeout=5) == "from a signal handler"
    assert json.loads(fetch(server, "/errors")) == []


def test_publish_in_a_signal_handler_under_uvicorn(uvicorn_server):
    """There it is the loop's thread: WrongThread, which names what to do, and no deadlock."""
    server = uvicorn_server(SIGNALS + "\n    asgi = websockets.asgi_app()\n")
    fetch(server, "/errors")
    os.kill(server.pid, signal.SIGUSR1)
    error = wait_until(lambda: json.loads(fetch(server, "/errors")))[0]
    assert error.startswith("WrongThread")
    assert "asyncio.create_task(websockets.apublish(...))" in error


def run_script(source, timeout=20):
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(source)],
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def test_publish_in_a_forked_child():
    """The child of a running server gets NotRunning; one that had not started stays fresh."""
    done = run_script(
        """
        import asyncio, os
        from flask import Flask
        from flask_websockets import NotRunning, WebSockets

        def forked(check):
            if pid := os.fork():
                return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            try:
                check()
            except BaseException as error:
                print(repr(error), flush=True)
                os._exit(1)
            os._exit(0)

        app = Flask("app")
        websockets = WebSockets(app)

        @websockets.route("/ws")
        def view(ws):
            with websockets.subscribe(ws, "news"):
                ws.send("subscribed")
                ws.receive()

        async def serve_in_the_child():
            # A server that starts in the child brings a runtime of its own.
            messages = ["startup", "shutdown"]

            async def receive():
                return {"type": "lifespan." + messages.pop(0)}

            async def send(message):
                if message["type"] == "lifespan.startup.complete":
                    await asyncio.to_thread(websockets.publish, "from the child", "news")
                    assert (await websockets.apublish("x", "news")).local == 0
                    assert websockets.stats().published == 2

            await websockets.asgi_app()({"type": "lifespan"}, receive, send)

        def dead():
            try:
                websockets.publish("x", "news")
            except NotRunning as error:
                assert "forked" in str(error)
                asyncio.run(serve_in_the_child())
            else:
                raise AssertionError("published into the parent's loop")

        assert forked(lambda: websockets.publish("x", "news")) == 0  # fresh
        with websockets.test_client().websocket_connect("/ws") as ws:
            assert ws.receive() == "subscribed"
            assert forked(dead) == 0
            websockets.publish("the parent lives", "news")
            assert ws.receive() == "the parent lives"
        print("done")
        """
    )
    assert done.stdout.endswith("done\n"), done.stdout + done.stderr
    assert done.returncode == 0, done.stderr


def test_http_in_a_forked_child():
    """The child of a server that has HTTP threads gets threads of its own."""
    done = run_script(
        """
        import anyio, os, warnings
        from flask import Flask
        from flask_websockets import WebSockets

        # 3.12 and later warn of forks beside threads, which is what this is about.
        warnings.simplefilter("ignore", DeprecationWarning)
        app = Flask("app")
        asgi = WebSockets(app).asgi_app()
        app.get("/")(lambda: "ok")

        async def get():
            async def receive():
                return {"type": "http.request"}

            async def send(message):
                answers.append(message)

            answers = []
            scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
            with anyio.fail_after(10):
                await asgi(scope, receive, send)
            assert answers[1]["body"] == b"ok", answers

        anyio.run(get)
        if pid := os.fork():
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
            print("done")
        else:
            try:
                anyio.run(get)
            except BaseException as error:
                print(repr(error), flush=True)
                os._exit(1)
            os._exit(0)
        """
    )
    assert done.stdout == "done\n", done.stdout + done.stderr


def test_publish_after_the_main_thread_has_ended():
    """A publisher thread that is no daemon cannot keep a finished process alive."""
    done = run_script(
        """
        import threading, time
        from flask import Flask
        from flask_websockets import NotRunning, WebSockets

        websockets = WebSockets(Flask("app"))

        def publish():
            try:
                while True:
                    websockets.publish("x", "news")
                    time.sleep(0.01)
            except NotRunning as error:
                print(error, flush=True)

        threading.Thread(target=publish).start()
        """
    )
    assert "main thread has ended" in done.stdout
    assert done.returncode == 0


# -- servers that have children, a certificate or a unix socket ------------------------------------


class Launched(ServerProcess):
    """A server that may have children, speak TLS, or listen on a unix socket."""

    def __init__(
        self, command: list[str], port: int, directory: Path, path: Path | None, tls: bool
    ) -> None:
        self.directory = directory.resolve()
        #: Its unix socket; None if it has a port.
        self.path = path
        #: How to speak TLS to it; None if it speaks none.
        self.tls: ssl.SSLContext | None = None
        if tls:
            self.tls = ssl.create_default_context()
            self.tls.check_hostname = False
            self.tls.verify_mode = ssl.CERT_NONE
        # A client of two threads is at the mercy of OpenSSL while one of them reads the tickets of
        # TLS 1.3, which come unasked: it loses one connection in some hundred, on any server.
        self._old_tls = self.tls and ssl.create_default_context()
        if self._old_tls is not None:
            self._old_tls.check_hostname = False
            self._old_tls.verify_mode = ssl.CERT_NONE
            self._old_tls.maximum_version = ssl.TLSVersion.TLSv1_2
        super().__init__(command, port, directory / "log.txt", directory)

    def wait_until_listening(self) -> None:
        if self.path is None:
            return super().wait_until_listening()

        def listening() -> bool:
            assert self.process.poll() is None, self.log()
            try:
                self.dial().close()
            except OSError:
                return False
            return True

        wait_until(listening, 30, "the server's socket")

    def dial(self) -> socket.socket:
        """A connection below HTTP, and above TLS."""
        if self.path is None:
            plain = socket.create_connection(("127.0.0.1", self.port), 10)
            return plain if self.tls is None else self.tls.wrap_socket(plain)
        plain = socket.socket(socket.AF_UNIX)
        plain.settimeout(10)
        try:
            plain.connect(str(self.path))
        except OSError:
            plain.close()
            raise
        return plain

    def ws_url(self, path: str = "/") -> str:
        return f"ws{'' if self.tls is None else 's'}://127.0.0.1:{self.port}{path}"

    def connect(self, path: str, **options):
        if self.path is not None:
            return unix_connect(str(self.path), self.ws_url(path), **options)
        return connect(self.ws_url(path), ssl=self._old_tls, **options)

    def aconnect(self, path: str):
        """The same for asyncio, with ``async with``."""
        if self.path is not None:
            return websockets.asyncio.client.unix_connect(str(self.path), self.ws_url(path))
        return websockets.asyncio.client.connect(self.ws_url(path), ssl=self.tls)

    def ask(self, path: str, *headers: str) -> tuple[int, bytes]:
        """GET a path: the status and the body."""
        lines = [f"GET {path} HTTP/1.0", f"Host: 127.0.0.1:{self.port}", *headers]
        with self.dial() as client:
            client.sendall("\r\n".join([*lines, "", ""]).encode())
            head, _, body = read_to_the_end(client).partition(b"\r\n\r\n")
            return int(head.split()[1]), body

    def json(self, path: str):
        status, body = self.ask(path)
        assert status == 200, body
        return json.loads(body)

    def processes(self) -> set[int]:
        """The server, what it started, and what that left behind."""
        found = set()
        for name in os.listdir("/proc"):
            if name.isdigit():
                try:
                    cwd = os.readlink(f"/proc/{name}/cwd")
                except OSError:
                    continue  # it has ended, or is somebody else's
                if cwd == str(self.directory):
                    found.add(int(name))
        return found

    def kill(self) -> None:
        left = self.processes()
        super().kill()  # before its child, which it would start again
        for pid in left - {self.pid}:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass  # it went with its parent


def read_to_the_end(client: socket.socket) -> bytes:
    data = b""
    while part := client.recv(65536):
        data += part
    return data


Launch = Callable[..., Launched]


@contextmanager
def launching(directory: Path) -> Iterator[Launch]:
    """Start ``command`` beside ``served.py`` made of *source*, in a directory of its own.

    ``{port}`` in both is a free port, ``{path}`` a unix socket, if *unix* says so. *without*
    names libraries that the server does not find. Its environment has *env* as well.
    """
    servers: list[Launched] = []

    def launch(
        source: str,
        *command: str,
        without: tuple[str, ...] = (),
        env: dict[str, str] | None = None,
        tls: bool = False,
        unix: bool = False,
    ) -> Launched:
        here = directory / f"server{len(servers)}"
        here.mkdir(parents=True)
        port, path = free_port(), here / "socket"

        def fill(text: str) -> str:
            return text.replace("{port}", str(port)).replace("{path}", str(path))

        for library in without:
            (here / f"{library}.py").write_text("raise ImportError")
        if tls:
            certificate = make_certificate(here)
            Path(certificate.cert).rename(here / "cert.pem")
            Path(certificate.key).rename(here / "key.pem")
        (here / "served.py").write_text(fill(textwrap.dedent(source)))
        # No .pyc: two edits within a second, of one length, look the same to it.
        variables = {"PYTHONPATH": str(here), "PYTHONDONTWRITEBYTECODE": "1", **(env or {})}
        filled = ["env", *(f"{name}={value}" for name, value in variables.items())]
        filled += map(fill, command or (sys.executable, "served.py"))
        server = Launched(filled, port, here, path if unix else None, tls)
        servers.append(server)
        server.wait_until_listening()
        return server

    try:
        yield launch
    finally:
        for server in servers:
            server.kill()


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """See :func:`launching`."""
    with launching(tmp_path) as launch:
        yield launch


def closed_with(client) -> tuple[int | None, str]:
    """Code and reason of the close that comes next; what comes before it is passed over."""
    with pytest.raises(ConnectionClosed) as caught:
        while True:
            client.recv(timeout=10)
    received = caught.value.rcvd
    return (received.code, received.reason) if received else (None, "")


# -- the end of app.run ----------------------------------------------------------------------------

BUSY = """
    import time
    from flask import Flask
    from flask_websockets import WebSockets

    app = Flask(__name__)
    websockets = WebSockets(app)

    @websockets.route("/news")
    def news(ws):
        with websockets.subscribe(ws, "news"):
            ws.send("ready")
            for _ in ws.iter_data():
                pass

    @websockets.route("/async")
    async def news_async(ws):
        async with websockets.subscribe(ws, "news"):
            await ws.send("ready")
            async for _ in ws.iter_data():
                pass

    @websockets.route("/stuck")
    def stuck(ws):
        ws.send("ready")
        time.sleep(600)

    @websockets.route("/flood")
    def flood(ws):
        ws.send("ready")
        while True:
            ws.send("x" * 65536)

    app.run(port={port})
"""


@pytest.mark.parametrize("without", [(), ("websockets",)], ids=["sansio", "wsproto"])
def test_clients_are_told_that_app_run_ends(launch, without):
    """CTRL+C closes with 1012, whatever the views are doing, and the process ends."""
    server = launch(BUSY, without=without)
    with ExitStack() as stack:
        silent = RawClient(server.port, "/flood", receive_buffer=4096)  # and never reads
        stack.enter_context(silent)
        paths = ("/news", "/async", "/stuck")
        clients = [stack.enter_context(server.connect(path)) for path in paths]
        for client in clients:
            assert client.recv(timeout=5) == "ready"
        server.process.send_signal(signal.SIGINT)
        assert [closed_with(client)[0] for client in clients] == [1012] * 3
        # A second for the goodbyes, half a one for Werkzeug's poll; the rest is the machine's.
        assert server.process.wait(1.5 + 3.5) == 0
        assert "Traceback" not in server.log()


def test_nobody_is_waited_for_where_nobody_is(launch):
    """Without connections there is nothing to close: CTRL+C ends app.run as it always did."""
    server = launch(BUSY)
    with server.connect("/news") as client:
        assert client.recv(timeout=5) == "ready"
    code, _ = server.stop(signal.SIGINT, 5)
    assert code == 0
    assert "Traceback" not in server.log()


# -- exceptions in views ---------------------------------------------------------------------------

RAISING = """
    from flask import Flask, abort
    from flask_websockets import WebSockets

    app = Flask(__name__)
    websockets = WebSockets(app)

    class Silent(Exception):
        def __str__(self):
            raise ValueError("nothing to say")

    ERRORS = {
        "plain": RuntimeError("marked-plain"),
        "empty": RuntimeError(),
        "key": KeyError("marked-key"),
        "chinese": RuntimeError("marked-chinese " + "\\u4e2d" * 100),
        "emoji": RuntimeError("marked-emoji" + "\\U0001f40d" * 5000),
        "exact": RuntimeError("marked-exact" + "x" * 97),
        "surrogate": RuntimeError("marked-surrogate \\udc80"),
        "lines": RuntimeError("marked-lines\\r\\nX-Evil: 1\\0"),
        "silent": Silent("marked-silent"),
        "group": ExceptionGroup("tasks", [RuntimeError("marked-group")]),
    }

    @websockets.route("/sync/<name>")
    def sync(ws, name):
        ws.accept()
        raise ERRORS[name]

    @websockets.route("/async/<name>")
    async def asynchronous(ws, name):
        await ws.accept()
        raise ERRORS[name]

    @websockets.route("/sync/before")
    def sync_before(ws):
        raise RuntimeError("marked-before")

    @websockets.route("/async/before")
    async def async_before(ws):
        raise RuntimeError("marked-before")

    @websockets.route("/sync/http")
    def sync_http(ws):
        ws.accept()
        abort(403)

    @websockets.route("/async/http")
    async def async_http(ws):
        await ws.accept()
        abort(403)

    @websockets.route("/sync/http-before")
    def sync_http_before(ws):
        abort(403)

    @websockets.route("/async/http-before")
    async def async_http_before(ws):
        abort(403)

    @websockets.route("/sync/bye")
    def sync_bye(ws):
        ws.accept()
        ws.close(4001, "its own")
        raise RuntimeError("marked-bye")
"""

#: What the client is told in debug mode, of what is in ERRORS above.
REASONS = {
    "plain": "RuntimeError: marked-plain",
    "key": "KeyError: 'marked-key'",
    "chinese": "RuntimeError: marked-chinese " + "\u4e2d" * 31,
    "emoji": "RuntimeError: marked-emoji" + "\U0001f40d" * 24,
    "exact": "RuntimeError: marked-exact" + "x" * 97,
    "group": "RuntimeError: marked-group",
}


@pytest.mark.parametrize("debug", [True, False], ids=["debug", "plain"])
@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("served_by", ["app.run", "uvicorn"])
def test_exceptions_in_views(launch, served_by, kind, debug):
    """One traceback in the terminal, 1011, and the reason on the close frame only in debug."""
    if served_by == "app.run":
        last = f"    app.run(port={{port}}, debug={debug}, use_reloader=False)\n"
        server = launch(RAISING + last)
    else:
        command = [sys.executable, "-m", "uvicorn", "--port", "{port}", "--ws", "wsproto"]
        last = f"    app.debug = {debug}\n    asgi = websockets.asgi_app()\n"
        server = launch(RAISING + last, *command, "served:asgi")

    def closed(name: str) -> tuple[int | None, str]:
        with server.connect(f"/{kind}/{name}") as client:
            return closed_with(client)

    for name, reason in REASONS.items():
        assert len(reason.encode()) <= 123
        assert closed(name) == (1011, reason if debug else ""), name
    assert len(REASONS["exact"].encode()) == 123
    # What cannot be said is left out; but the code always comes.
    code, reason = closed("empty")
    assert (code, reason.rstrip(": ")) == (1011, "RuntimeError" if debug else "")
    code, reason = closed("surrogate")
    assert code == 1011
    assert reason.startswith("RuntimeError: marked-surrogate") if debug else reason == ""
    code, reason = closed("lines")
    assert code == 1011
    assert reason.startswith("RuntimeError: marked-lines") if debug else reason == ""
    code, reason = closed("silent")
    assert code == 1011
    assert "Silent" in reason if debug else reason == ""
    raised = {*REASONS, "surrogate", "lines"}

    assert closed("http") == (4403, "Forbidden")
    for name, status in (("before", 500), ("http-before", 403)):
        with pytest.raises(InvalidStatus) as refused:
            server.connect(f"/{kind}/{name}")
        assert refused.value.response.status_code == status
        assert debug or b"marked" not in refused.value.response.body
    raised.add("before")
    if kind == "sync":
        assert closed("bye") == (4001, "its own")
        raised.add("bye")

    def tracebacks() -> int:
        return server.log().count("Traceback (most recent call last)")

    # "empty" and "silent" have no mark.
    wait_until(lambda: all(f"marked-{name}" in server.log() for name in raised))
    wait_until(lambda: tracebacks() >= len(raised) + 2)
    for name in raised:
        lines = [line for line in server.log().splitlines() if f"marked-{name}" in line]
        told = [line for line in lines if "Error" in line and "raise" not in line]
        assert len(told) == 1, told
    assert tracebacks() == len(raised) + 2, server.log()


# -- TLS, unix sockets and a uvicorn of another shape ----------------------------------------------

#: A later uvicorn that agrees with itself: its HTTP side knows how to call its WebSocket class.
OTHER_UVICORN = """
    import logging
    import uvicorn.protocols.websockets.auto as auto
    from uvicorn.protocols.http.h11_impl import H11Protocol
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

    class OtherProtocol(auto.AutoWebSocketsProtocol):
        made = 0

        def __init__(self, settings, shared, lifespan):
            OtherProtocol.made += 1
            super().__init__(config=settings, server_state=shared, app_state=lifespan)

    auto.AutoWebSocketsProtocol = OtherProtocol

    def knowing(upgrade):
        def handle_websocket_upgrade(self, *arguments):
            self.ws_protocol_class = (
                lambda config, server_state, app_state: OtherProtocol(
                    config, server_state, app_state
                )
            )
            upgrade(self, *arguments)
        return handle_websocket_upgrade

    for kind in (H11Protocol, HttpToolsProtocol):
        kind.handle_websocket_upgrade = knowing(kind.handle_websocket_upgrade)

    class Kept(logging.Handler):
        records = []

        def emit(self, record):
            self.records.append([record.name, record.levelname, record.getMessage()])

    logging.getLogger().addHandler(Kept())
"""

#: What the tests below ask of any application.
CONVERSING = (
    COUNTED
    + """
    from flask import abort, url_for
    from flask_websockets import ConnectionClosed
    import threading

    ends = []

    @websockets.route("/echo")
    def echo(ws):
        for data in ws.iter_data():
            ws.send(data)

    @websockets.route("/note")
    def note(ws):
        ws.send("ready")
        try:
            while True:
                ws.receive()
        except ConnectionClosed as closed:
            ends.append([closed.code, closed.reason])

    @websockets.route("/bye")
    def bye(ws):
        ws.receive()
        ws.close(4002, "bye")

    @websockets.route("/refuse")
    def refuse(ws):
        abort(401, "not you")

    @websockets.route("/news")
    def news(ws):
        with websockets.subscribe(ws, "news"):
            ws.send("subscribed")
            for _ in ws.iter_data():
                pass

    @websockets.route("/urls")
    def urls(ws):
        ws.send_json([request.is_secure, request.host, url_for("show", _external=True)])

    @app.get("/publish")
    def publish():
        websockets.publish("from a request", "news")
        return "published"

    @app.get("/ends")
    def show_ends():
        return ends

    @app.get("/state")
    def state():
        return {
            "threads": sorted(thread.name for thread in threading.enumerate()),
            "subscriptions": websockets.stats().subscriptions,
            "connections": websockets.stats().connections,
        }
"""
)


class Peer:
    """A client made of a socket that :meth:`Launched.dial` gave, which shows each frame."""

    HEAD = (
        "GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade\r\n"
        "Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )

    def __init__(self, server: Launched, path: str) -> None:
        self.socket = server.dial()
        self.socket.sendall(self.HEAD.format(path=path).encode())
        self._data = b""
        while b"\r\n\r\n" not in self._data:
            self._more()
        head, self._data = self._data.split(b"\r\n\r\n", 1)
        self.status = int(head.split()[1])

    @staticmethod
    def frame(payload: bytes, opcode: int = 1) -> bytes:
        """A short masked frame: a mask of zeros is a mask."""
        assert len(payload) < 126
        return bytes((0x80 | opcode, 0x80 | len(payload), 0, 0, 0, 0)) + payload

    def read(self) -> tuple[int, bytes]:
        """Opcode and payload of the next frame, which is short."""
        while len(self._data) < 2 or len(self._data) < 2 + self._data[1]:
            self._more()
        assert self._data[1] < 126
        end = 2 + self._data[1]
        opcode, payload, self._data = self._data[0] & 15, self._data[2:end], self._data[end:]
        return opcode, payload

    def reset(self) -> None:
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.socket.close()

    def close(self) -> None:
        self.socket.close()

    def _more(self) -> None:
        part = self.socket.recv(65536)
        assert part, "the server closed the connection"
        self._data += part


MEGABYTE = "x" * 1_000_000


def check_echo(server):
    """Text, binary, nothing and a megabyte come back."""
    with server.connect("/echo") as client:
        for data in ("text", "\u4e2d", b"binary", bytes(range(256)), "", b"", MEGABYTE):
            client.send(data)
            assert client.recv(timeout=10) == data


def check_both_ways_at_once(server):
    """Megabytes there and back at the same time."""

    # asyncio's client takes messages while it sends; the threaded one waits for itself.
    async def receive(client):
        for _ in range(8):
            assert await client.recv() == MEGABYTE

    async def send(client):
        for _ in range(8):
            await client.send(MEGABYTE)

    async def converse():
        async with (
            asyncio.timeout(30),
            server.aconnect("/echo") as client,
            asyncio.TaskGroup() as tasks,
        ):
            tasks.create_task(receive(client))
            tasks.create_task(send(client))

    asyncio.run(converse())


def check_pipelined(server):
    """A thousand messages in one breath come back in their order."""
    messages = [f"{number}".encode() for number in range(1000)]
    peer = Peer(server, "/echo")
    assert peer.status == 101
    peer.socket.sendall(b"".join(map(Peer.frame, messages)))
    assert [peer.read() for _ in messages] == [(1, message) for message in messages]
    # A frame that comes byte by byte, and two of which the second comes later.
    for at in Peer.frame(b"in pieces"):
        peer.socket.sendall(bytes((at,)))
    assert peer.read() == (1, b"in pieces")
    peer.socket.sendall(Peer.frame(b"one") + Peer.frame(b"two")[:4])
    assert peer.read() == (1, b"one")
    peer.socket.sendall(Peer.frame(b"two")[4:])
    assert peer.read() == (1, b"two")
    peer.socket.sendall(Peer.frame(b"are you there", opcode=9))
    assert peer.read() == (10, b"are you there")
    peer.close()


def check_endings(server):
    """Either side's close code arrives; a reset or a bare end does not go unnoticed."""
    with server.connect("/bye") as client:
        client.send("bye")
        assert closed_with(client) == (4002, "bye")
    for leave in ("close", "reset", "vanish"):
        before = len(server.json("/ends"))
        if leave == "close":
            with server.connect("/note") as client:
                assert client.recv(timeout=5) == "ready"
                client.close(4001, "enough")
        else:
            peer = Peer(server, "/note")
            assert peer.read() == (1, b"ready")
            peer.reset() if leave == "reset" else peer.close()
        ended = wait_until(lambda before=before: server.json("/ends")[before:], 10, leave)
        if leave == "close":
            assert ended == [[4001, "enough"]]
        else:
            assert [code for code, _ in ended] in ([1005], [1006])


def check_refusals(server):
    """A refusal's status and page arrive, and the connection ends behind them."""
    for path, status, text in (("/refuse", 401, b"not you"), ("/nowhere", 404, b"Not Found")):
        with pytest.raises(InvalidStatus) as refused:
            server.connect(path)
        assert refused.value.response.status_code == status
        assert text in refused.value.response.body
        peer = Peer(server, path)
        assert peer.status == status
        assert len(read_to_the_end(peer.socket)) < 1000
        peer.close()
    with pytest.raises(InvalidStatus) as refused:
        server.connect("/echo", origin="https://evil.example")
    assert refused.value.response.status_code == 403


def check_http_beside(server):
    """HTTP is answered while a WebSocket is open, and its views publish to it."""
    with server.connect("/news") as client, server.connect("/echo"):
        assert client.recv(timeout=5) == "subscribed"
        assert server.ask("/publish") == (200, b"published")
        assert client.recv(timeout=5) == "from a request"
        assert server.ask("/echo")[0] == 426
        assert server.ask("/nowhere")[0] == 404
        state = server.json("/state")
        assert state["subscriptions"] == 1
        assert state["threads"].count("flask-websockets-loop") == 1
    wait_until(lambda: server.json("/state")["subscriptions"] == 0)


def check_handshake(server):
    """What the middleware, the request and the session have to do with a handshake."""
    before = len(server.json("/seen"))
    with server.connect("/ws", additional_headers={"X-Custom": "yes"}) as client:
        keys, custom, _ = json.loads(client.recv(timeout=5))
        assert (keys, custom) == (["seen.inside", "seen.outside"], "yes")
        assert client.response.headers["Set-Cookie"].startswith("session=")
        client.send("hello")
        assert client.recv(timeout=5) == "hello"
    assert server.json("/seen")[before:] == ["outside", "inside", "before_request"]
    with server.connect("/urls") as client:
        secure, host, url = json.loads(client.recv(timeout=5))
        assert secure is (server.tls is not None)
        assert url == f"http{'s' * secure}://{host}/seen"


def check_that_all_comes_back(server):
    """After thirty connections that ended in all ways, descriptors and threads are back."""
    with server.connect("/echo") as client:  # the loop's own descriptors are open from now on
        client.send("hello")
        assert client.recv(timeout=5) == "hello"
    wait_until(lambda: server.json("/state")["connections"] == 0)

    def threads() -> list[str]:
        return server.json("/state")["threads"]

    def settled() -> tuple[int, int]:
        return len(threads()), server.descriptors()

    wait_until(lambda: settled() == settled())
    base_threads, base = settled()
    for number in range(30):
        peer = Peer(server, "/refuse" if number % 5 == 4 else "/echo")
        if number % 3 and peer.status == 101:
            peer.socket.sendall(Peer.frame(b"hello"))
            assert peer.read() == (1, b"hello")
        if number % 3 == 1 and peer.status == 101:
            peer.socket.sendall(Peer.frame(b"\x03\xe8", opcode=8))
            assert peer.read()[0] == 8
        if number % 3 == 0:
            peer.reset()
        else:
            peer.close()
    wait_until(lambda: server.json("/state")["connections"] == 0)
    wait_until(lambda: server.descriptors() <= base, what="the end of the descriptors")
    wait_until(lambda: len(threads()) <= base_threads, what="the end of the threads")


CHECKS = [
    check_echo,
    check_both_ways_at_once,
    check_pipelined,
    check_endings,
    check_refusals,
    check_http_beside,
    check_handshake,
    check_that_all_comes_back,
]

#: How app.run is asked to serve, and what the server does not find. The other combinations are
#: with ``flask run``.
SERVED = {
    "tls": ("ssl_context=('cert.pem', 'key.pem')", ()),
    "unix": ("host='unix://{path}'", ("websockets",)),
    "fallback": ("threaded=True", ()),
    "fallback-tls": ("ssl_context='adhoc', threaded=False", ("websockets",)),
}


@pytest.fixture(scope="module", params=SERVED)
def served(request, tmp_path_factory) -> Iterator[Launched]:
    """One server for all the checks: what one leaves behind the next one sees."""
    options, without = SERVED[request.param]
    source = (OTHER_UVICORN if "fallback" in request.param else "") + CONVERSING
    source += """
    if "OtherProtocol" in globals():
        @app.get("/fallback")
        def fallback():
            return {"made": OtherProtocol.made, "records": Kept.records}
    """
    with launching(tmp_path_factory.mktemp("run")) as launch:
        yield launch(
            f"{source}\n    app.run(port={{port}}, {options})\n",
            without=without,
            tls="ssl_context" in options,
            unix="unix" in options,
        )


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__[6:])
def test_served(served, check):
    """TLS, unix sockets, without threads, and with a uvicorn whose protocol class is another."""
    check(served)
    assert "Traceback" not in served.log()


def test_a_handler_that_comes_late_says_nothing(launch):
    """Over TLS too: what Werkzeug writes when a refused connection is over goes nowhere."""
    source = """
    import time
    from flask import Flask
    from flask_websockets import WebSockets

    app = Flask(__name__)
    websockets = WebSockets(app)

    def late(environ, start_response, inner=app.wsgi_app):
        body = inner(environ, start_response)
        time.sleep(0.3)  # the relay has closed the connection by now
        return body

    app.wsgi_app = late
    app.run(port={port}, ssl_context=("cert.pem", "key.pem"))
    """
    server = launch(source, tls=True)
    with server.dial() as client:
        client.sendall(
            b"GET /nowhere HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )
        answer = read_to_the_end(client)
    assert answer.startswith(b"HTTP/1.1 404 ")
    assert answer.count(b"HTTP/1.1") == 1
    wait_until(lambda: " 404 -" in server.log(), what="the end of the request")
    assert "Traceback" not in server.log()


@pytest.mark.parametrize("served", [name for name in SERVED if "fallback" in name], indirect=True)
def test_the_fallback_says_so_once(served):
    """A uvicorn that we do not know is one warning in the log, and no way in from outside."""
    for _ in range(2):
        with served.connect("/echo") as client:
            client.send("hello")
            assert client.recv(timeout=5) == "hello"
    state = served.json("/fallback")
    assert state["made"] >= 2, "the other class was not used"
    # The other warnings are of foreign origins, which one of the checks comes with.
    told = [record for record in state["records"] if "origin" not in record[2]]
    told = [record for record in told if record[1] not in ("DEBUG", "INFO")]
    assert [record[:2] for record in told] == [["flask_websockets", "WARNING"]], told
    assert "uvicorn" in told[0][2]
    for port in listening_ports(served.pid) - {served.port}:
        # Its private one, if it has any, answers nobody else.
        stranger = RawClient(port, "/echo")
        assert stranger.status >= 400
        stranger.close()
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/publish", timeout=5)
        refused.value.close()


FLOODING = """
    import threading
    from flask import Flask
    from flask_websockets import WebSockets

    app = Flask(__name__)
    app.config["WEBSOCKETS_SEND_TIMEOUT"] = 1
    websockets = WebSockets(app)

    @websockets.route("/flood")
    def flood(ws):
        while True:
            ws.send("x" * 65536)

    @websockets.route("/news")
    def news(ws):
        ws.send("ready")
        ws.receive()

    @app.get("/threads")
    def threads():
        return [thread.name for thread in threading.enumerate()]
"""


@pytest.mark.parametrize("way", ["plain", "tls", "fallback", "fallback-tls"])
def test_a_client_that_takes_nothing_is_cut(launch, way):
    """Whatever lies between: after WEBSOCKETS_SEND_TIMEOUT its thread and sockets are gone."""
    options = "ssl_context='adhoc'" if "tls" in way else ""
    source = (OTHER_UVICORN if "fallback" in way else "") + FLOODING
    server = launch(f"{source}\n    app.run(port={{port}}, {options})\n", tls="tls" in way)
    with server.connect("/news") as client:  # the loop's own descriptors are open from now on
        assert client.recv(timeout=5) == "ready"
        client.send("enough")

    def at_rest() -> bool:
        names = server.json("/threads")
        return not [name for name in names if "view" in name or "relay" in name]

    wait_until(at_rest)
    base = server.descriptors()
    silent = Peer(server, "/flood")
    try:
        wait_until(lambda: not at_rest())
        # A second for the deadline, and what a closed transport is given.
        wait_until(at_rest, 10, "the end of the threads")
        wait_until(lambda: server.descriptors() <= base, what="the end of the descriptors")
    finally:
        silent.close()


@pytest.mark.parametrize("way", ["plain", "tls", "fallback", "fallback-tls"])
def test_the_log_says_how_a_handshake_was_answered(launch, way):
    """The terminal shows the status that the client got, and 499 for one that did not wait."""
    answers = """
    go = threading.Event()

    @websockets.route("/thinks")
    def thinks(ws):
        go.wait(10)

    @websockets.route("/fails")
    def fails(ws):
        raise RuntimeError("at once")

    @app.get("/http")
    def http():
        return "no WebSocket"
    """
    options = "ssl_context='adhoc'" if "tls" in way else ""
    source = (OTHER_UVICORN if "fallback" in way else "") + CONVERSING + answers
    if "fallback" in way:  # whose own handler keeps Werkzeug from having one
        source += "\n    logging.getLogger().addHandler(logging.StreamHandler())\n"
    server = launch(f"{source}\n    app.run(port={{port}}, {options})\n", tls="tls" in way)
    expected = {"/echo": 101, "/refuse": 401, "/nowhere": 404, "/http": 400, "/fails": 500}
    for path, status in expected.items():
        peer = Peer(server, path)
        assert peer.status == status
        peer.close()
    with server.dial() as client:
        client.sendall(Peer.HEAD.format(path="/thinks").encode())
        wait_until(lambda: server.json("/state")["connections"] == 1)
    with server.dial() as client:
        client.sendall(Peer.HEAD.format(path="/broken").replace("Key", "Lock").encode())
        assert client.recv(1000).split()[1] in (b"400", b"426")
    expected |= {"/thinks": 499, "/broken": 400}
    for path, status in expected.items():
        line = f'"GET {path} HTTP/1.1" {status} -'
        wait_until(lambda line=line: line in plain(server.log()), what=line)


def test_a_server_without_threads_does_not_wait_for_the_answer(launch):
    """It would serve nobody else meanwhile: its log says 101, whatever the client gets."""
    answers = """
    go = threading.Event()

    @websockets.route("/thinks")
    def thinks(ws):
        assert go.wait(10)
        abort(403)

    @app.get("/go")
    def let_it_go():
        go.set()
        return "gone"
    """
    server = launch(CONVERSING + answers + "\n    app.run(port={port}, threaded=False)\n")
    with server.dial() as client:
        client.sendall(Peer.HEAD.format(path="/thinks").encode())
        assert server.ask("/go") == (200, b"gone")
        assert client.recv(1000).split()[1] == b"403"
    assert '"GET /thinks HTTP/1.1" 101 -' in plain(server.log())


def plain(log: str) -> str:
    """The log without Werkzeug's colours."""
    return re.sub(r"\x1b\[[\d;]*m", "", log)


@pytest.mark.parametrize("options", ["", "ssl_context='adhoc'"], ids=["plain", "tls"])
def test_the_fallback_says_goodbye(launch, options):
    """CTRL+C closes with 1012 there as well."""
    source = f"{OTHER_UVICORN}\n{CONVERSING}\n    app.run(port={{port}}, {options})\n"
    server = launch(source, tls=bool(options))
    with server.connect("/news") as client:
        assert client.recv(timeout=5) == "subscribed"
        server.process.send_signal(signal.SIGINT)
        assert closed_with(client)[0] == 1012
    assert server.process.wait(5) == 0


def test_the_fallback_keeps_nothing_of_what_uvicorn_refuses(launch):
    """Handshakes without a key, which no application hears of, leave no memory behind."""
    count = """
    @app.get("/kept")
    def kept():
        import gc
        gc.collect()
        return str(sum(type(each).__name__ == "Upgrade" for each in gc.get_objects()))

    app.run(port={port})
    """
    server = launch(OTHER_UVICORN + CONVERSING + count)
    for _ in range(10):
        with server.dial() as client:
            client.sendall(
                b"GET /echo HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\n"
                b"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\r\n"
            )
            assert client.recv(1000).split()[1] in (b"400", b"426")
    wait_until(lambda: int(server.ask("/kept")[1]) <= 1, what="the end of the handshakes")


def listening_ports(pid: int) -> set[int]:
    """The TCP ports that a process listens on."""
    inodes = set()
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            target = os.readlink(f"/proc/{pid}/fd/{name}")
        except FileNotFoundError:
            continue
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    ports = set()
    for family in ("tcp", "tcp6"):
        table = Path(f"/proc/{pid}/net/{family}")
        for line in table.read_text().splitlines()[1:] if table.exists() else ():
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                ports.add(int(fields[1].rpartition(":")[2], 16))
    return ports
