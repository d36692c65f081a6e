"""``app.run(...)``: Werkzeug's server hands its sockets over; nothing else changes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import urllib.error
import urllib.request

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from .conftest import wait_until
from .raw_client import RawClient

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
    for path, code in (("/return", 1000), ("/raise", 1011)):
        with connect(server.ws_url(path)) as client:
            with pytest.raises(ConnectionClosed) as caught:
                client.recv(timeout=5)
            assert (caught.value.rcvd.code, caught.value.rcvd.reason) == (code, "")
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
