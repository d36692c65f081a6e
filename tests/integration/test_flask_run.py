"""``flask run``, the command itself: reloaders, debugger, certificates, sockets, its end."""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import socket
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from urllib.parse import urlencode

import pytest
from websockets.exceptions import InvalidHandshake
from websockets.sync.client import ClientConnection

import flask_websockets

from .test_app_run import (
    CHECKS,
    CONVERSING,
    Launched,
    check_echo,
    check_endings,
    check_handshake,
    check_http_beside,
    check_refusals,
    closed_with,
    launch,
    launching,
    listening_ports,
)
from .waiting import wait_until

__all__ = ["launch"]  # a fixture

FLASK = str(Path(sysconfig.get_path("scripts"), "flask"))
RUN = (FLASK, "--app", "served", "run", "--port", "{port}")
DEBUG = (FLASK, "--app", "served", "--debug", "run", "--port", "{port}")

#: Seconds that a reload may take: the stat reloader looks once a second, open connections have
#: another one, and a loaded machine starts Python slowly.
RELOAD_TIMEOUT = 30.0


# -- the command -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command, env",
    [
        pytest.param(RUN, {}, id="app"),
        pytest.param((*RUN, "--without-threads"), {}, id="without-threads"),
        pytest.param((FLASK, "run", "--port", "{port}"), {"FLASK_APP": "served"}, id="FLASK_APP"),
        pytest.param(
            (FLASK, "run", "--debug", "--no-reload", "--port", "{port}"),
            {"FLASK_APP": "served:app"},
            id="debug",
        ),
    ],
)
def test_flask_run(launch, command, env):
    """However the application is named, WebSockets are served beside HTTP, on one loop."""
    # app.run of a module that the command imports is Flask's to ignore.
    server = launch(f"{CONVERSING}\n    app.run(port=1)\n", *command, env=env)
    for check in (check_echo, check_endings, check_refusals, check_http_beside, check_handshake):
        check(server)
    assert "Traceback" not in server.log()
    assert server.stop(signal.SIGINT, 10)[0] == 0
    assert not server.processes()


FACTORY = """
    from flask import Flask
    from flask_websockets import WebSockets

    websockets = WebSockets()

    @websockets.route("/echo/<name>")
    def echo(ws, name):
        for data in ws.iter_data():
            ws.send(f"{name}: {data}")

    def create_app(name="nobody"):
        app = Flask(__name__)
        app.get("/")(lambda: name)
        websockets.init_app(app)
        return app
"""


@pytest.mark.parametrize("call", ["", "('ann')"])
def test_an_application_factory(launch, call):
    """``flask run`` finds create_app, with arguments or without."""
    name = f"served:create_app{call}"
    server = launch(FACTORY, FLASK, "--app", name, "run", "--port", "{port}")
    assert server.ask("/") == (200, b"ann" if call else b"nobody")
    with server.connect("/echo/bob") as client:
        client.send("hello")
        assert client.recv(timeout=5) == "bob: hello"


def test_a_host_by_name_and_no_debugger(launch):
    """Options of the command that concern HTTP alone work as they do without WebSockets."""
    server = launch(RELOADED, *DEBUG, "--no-reload", "--no-debugger", "--host", "localhost")
    with server.connect("/news") as client:
        assert client.recv(timeout=5) == "0"
        status, body = server.ask("/boom")
        assert (status, b"EVALEX" in body) == (500, False)
        client.send("still there")
        assert client.recv(timeout=5) == "still there"


# -- TLS and unix sockets --------------------------------------------------------------------------

PEM = ("--cert", "cert.pem", "--key", "key.pem")
ADHOC = ("--cert", "adhoc")

SERVED = {
    "tls": (PEM, ()),
    "tls-no-threads": ((*PEM, "--without-threads"), ("websockets",)),
    "adhoc": (ADHOC, ("websockets",)),
    "adhoc-no-threads": ((*ADHOC, "--without-threads"), ()),
    "unix": (("--host", "unix://{path}"), ("websockets",)),
    "unix-no-threads": (("--host", "unix://{path}", "--without-threads"), ()),
}


@pytest.fixture(scope="module", params=SERVED)
def served(request, tmp_path_factory) -> Iterator[Launched]:
    """One server for all the checks: what one leaves behind the next one sees."""
    options, without = SERVED[request.param]
    with launching(tmp_path_factory.mktemp("flask")) as launch:
        yield launch(
            CONVERSING,
            *RUN,
            *options,
            without=without,
            tls="--cert" in options,
            unix="--host" in options,
        )


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__[6:])
def test_served(served, check):
    """``flask run`` with a certificate or a unix socket, with threads and without."""
    check(served)
    assert "Traceback" not in served.log()


@pytest.mark.parametrize("options", [PEM, ("--host", "unix://{path}")], ids=["tls", "unix"])
def test_the_end_is_told_everywhere(launch, options):
    """CTRL+C closes with 1012 through a certificate and through a unix socket as well."""
    server = launch(CONVERSING, *RUN, *options, tls="--cert" in options, unix="--host" in options)
    with server.connect("/news") as client:
        assert client.recv(timeout=5) == "subscribed"
        server.process.send_signal(signal.SIGINT)
        assert closed_with(client)[0] == 1012
    assert server.process.wait(5) == 0


# -- reloading -------------------------------------------------------------------------------------

RELOADED = """
    import os
    import threading
    import time
    from dataclasses import asdict

    from flask import Flask
    from flask_websockets import NotRunning, WebSockets

    VERSION = 0
    app = Flask(__name__)
    websockets = WebSockets(app)

    @app.get("/")
    def page():
        return {
            "version": VERSION,
            "pid": os.getpid(),
            "threads": sorted(thread.name for thread in threading.enumerate()),
            "stats": asdict(websockets.stats()),
        }

    @app.get("/publish")
    def publish():
        websockets.publish(f"news {VERSION}", "news")
        return "published"

    @app.get("/boom")
    def boom():
        answer = 6 * 7
        raise RuntimeError("boom")

    @websockets.route("/news")
    def news(ws):
        with websockets.subscribe(ws, "news"):
            ws.send(str(VERSION))
            for data in ws.iter_data():
                ws.send(data)

    @websockets.route("/async")
    async def news_async(ws):
        async with websockets.subscribe(ws, ["news", "more"]):
            await ws.send(str(VERSION))
            async for data in ws.iter_data():
                await ws.send(data)

    @websockets.route("/stuck")
    def stuck(ws):
        with websockets.subscribe(ws, "news"):
            ws.send(str(VERSION))
            time.sleep(600)

    def publish_for_ever():
        while True:
            try:
                websockets.publish("tick", "ticks")
            except NotRunning:
                return
            time.sleep(0.02)

    @websockets.route("/publisher")
    def publisher(ws):
        threading.Thread(target=publish_for_ever, name="publisher", daemon=False).start()
        with websockets.subscribe(ws, "ticks"):
            ws.send(str(VERSION))
            for _ in ws.iter_data():
                pass

    @websockets.route("/raise")
    def raise_(ws):
        ws.accept()
        raise RuntimeError("in the view")
"""


@functools.cache
def inotify_works(directory: Path) -> bool:
    """Whether watchdog hears of a file that changes there: in some containers it does not."""
    from watchdog.events import FileSystemEventHandler
    from watchdog.observers import Observer

    heard = threading.Event()

    class Listener(FileSystemEventHandler):
        def on_any_event(self, event):
            heard.set()

    observer = Observer()
    observer.schedule(Listener(), str(directory))
    observer.start()
    try:
        (directory / "probe").write_text("changed")
        return heard.wait(3)
    finally:
        observer.stop()
        observer.join()


@pytest.fixture
def reloader(request, tmp_path) -> tuple[str, ...]:
    """The libraries that the server must not find to get the reloader of that name."""
    if request.param == "stat":
        return ("watchdog",)
    pytest.importorskip("watchdog")
    if not inotify_works(tmp_path):
        pytest.skip("inotify tells nothing of changed files here")
    return ()


#: What watchdog's reloader need not watch here, as fnmatch's patterns: others read and write there,
#: and the kernel has room for so many events only.
ELSEWHERE = [
    f"{path}*"
    for path in (sys.prefix, sys.base_prefix, Path(flask_websockets.__file__).parent.parent)
]
#: For Werkzeug up to 3.1.9 with watchdog from 7 on, the full name: its own "*.py" matches nothing.
WATCHED = ("--extra-files", "served.py", "--exclude-patterns", os.pathsep.join(ELSEWHERE))


def page_of(server: Launched) -> dict:
    return server.json("/")


def wait_for_version(server: Launched, version: int) -> dict:
    """The page, once it is the new code's."""

    def reloaded() -> dict | None:
        try:
            status, body = server.ask("/")
        except (OSError, IndexError):  # the old one's end
            return None
        page = json.loads(body) if status == 200 else {"version": None}
        return page if page["version"] == version else None

    return wait_until(reloaded, RELOAD_TIMEOUT, f"version {version} of the page")


def edit(server: Launched, version: int) -> None:
    """Have the code say another version."""
    path = server.directory / "served.py"
    # In place, as watchdog tells of a file that was moved there under both of its names.
    path.write_text(re.sub(r"^VERSION = .*$", f"VERSION = {version}", path.read_text(), flags=re.M))


def check_reloads(server: Launched) -> None:
    """A reload with sockets open, one into code that does not run, and one out of it again."""
    first = page_of(server)
    with server.connect("/news") as client, server.connect("/stuck") as stuck:
        assert client.recv(timeout=5) == stuck.recv(timeout=5) == "0"
        edit(server, 1)
        assert closed_with(client)[0] == 1012
        assert closed_with(stuck)[0] == 1012
    second = wait_for_version(server, 1)
    assert second["pid"] != first["pid"]
    with server.connect("/news") as client:
        assert client.recv(timeout=5) == "1"
        server.ask("/publish")
        assert client.recv(timeout=5) == "news 1"
        edit(server, "1 +")
        assert closed_with(client)[0] == 1012

    def broken() -> bool:
        try:
            return server.ask("/")[0] == 500
        except (OSError, IndexError):
            return False

    wait_until(broken, RELOAD_TIMEOUT, "the page of the error")
    with pytest.raises((InvalidHandshake, OSError, EOFError)), server.connect("/news"):
        pass
    edit(server, 2)
    third = wait_for_version(server, 2)
    with server.connect("/news") as client:
        assert client.recv(timeout=5) == "2"
    assert server.processes() == {server.pid, third["pid"]}


def interrupt(server: Launched) -> None:
    """CTRL+C in a terminal: every process of the foreground gets it."""
    for pid in server.processes():
        os.kill(pid, signal.SIGINT)


@pytest.mark.parametrize("reloader", ["stat", "watchdog"], indirect=True)
def test_flask_run_debug_reloads(launch, reloader):
    """``flask run --debug``: an edit closes with 1012, and the new code answers."""
    server = launch(RELOADED, *DEBUG, *WATCHED, without=reloader)
    check_reloads(server)
    interrupt(server)
    server.process.wait(10)
    wait_until(lambda: not server.processes(), what="the end of all processes")


@pytest.mark.parametrize("reloader", ["watchdog"], indirect=True)
def test_app_run_reloads_with_watchdog(launch, reloader):
    """``app.run(debug=True)`` with watchdog's reloader; tests of app.run have the other one."""
    options = f"debug=True, extra_files=['served.py'], exclude_patterns={ELSEWHERE}"
    server = launch(f"{RELOADED}\n    app.run(port={{port}}, {options})\n", without=reloader)
    with server.connect("/news") as client:
        assert client.recv(timeout=5) == "0"
        edit(server, 1)
        assert closed_with(client)[0] == 1012
    wait_for_version(server, 1)
    with server.connect("/news") as client:
        assert client.recv(timeout=5) == "1"


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("to", ["parent", "all"])
def test_nothing_is_orphaned(launch, sent, to):
    """Whichever process is told to end, with views stuck and a publisher: all of them end."""
    server = launch(RELOADED, *DEBUG, without=("watchdog",))
    with ExitStack() as stack:
        for path in ("/news", "/stuck", "/publisher"):
            client = stack.enter_context(server.connect(path))
            assert client.recv(timeout=5) == "0"
        assert len(server.processes()) == 2
        for pid in [server.pid] if to == "parent" else server.processes():
            os.kill(pid, sent)
        server.process.wait(10)
        wait_until(lambda: not server.processes(), what="the end of all processes")
        wait_until(lambda: nobody_listens(server.port), what="the end of the port")


def nobody_listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def tasks(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


#: Who is connected when the code changes.
GUESTS = ("/news", "/news", "/stuck", "/stuck", "/async", "/publisher")


def gauges(page: dict) -> dict[str, int]:
    names = ("connections", "view_threads", "view_tasks", "channels", "subscriptions", "pending")
    return {name: page["stats"][name] for name in names}


def lasting(page: dict) -> list[str]:
    """The threads that are there between requests; Werkzeug has one more for each of those."""
    return sorted(name for name in page["threads"] if "process_request_thread" not in name)


def descriptors_at_rest(page: dict) -> int:
    """How many a process has when its requests are over."""
    pid, count = page["pid"], len(lasting(page))
    wait_until(lambda: tasks(pid) == count, what="the end of the requests' threads")
    return descriptors(pid)


@pytest.mark.slow
@pytest.mark.timeout(20 * RELOAD_TIMEOUT)
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_twenty_reloads(launch, sent):
    """With sockets open, views stuck and a publisher: the page is back, and nothing is left."""
    reloads = 20 if sent == signal.SIGINT else 3
    server = launch(RELOADED, *DEBUG, without=("watchdog",))
    page = page_of(server)
    parent = (tasks(server.pid), descriptors(server.pid))
    threads, open_files = lasting(page), descriptors_at_rest(page)
    assert not any(gauges(page).values())
    seen = {page["pid"]}
    for version in range(1, reloads + 1):
        with ExitStack() as stack:
            clients: list[ClientConnection] = []
            for path in GUESTS:
                clients.append(stack.enter_context(server.connect(path)))
                assert clients[-1].recv(timeout=10) == str(version - 1)
            clients[0].send("still there")
            assert clients[0].recv(timeout=10) == "still there"
            # "/news" twice, "/stuck" twice, "/async" on two channels, and "/publisher".
            assert gauges(page_of(server))["subscriptions"] == 7
            edit(server, version)
            for client, path in zip(clients, GUESTS, strict=True):
                assert closed_with(client)[0] == 1012, (version, path)
        page = wait_for_version(server, version)
        assert page["pid"] not in seen
        seen.add(page["pid"])
        assert server.processes() == {server.pid, page["pid"]}
        assert listening_ports(page["pid"]) == {server.port}
        assert lasting(page) == threads
        assert not any(gauges(page).values())
        assert descriptors_at_rest(page) <= open_files
    assert (tasks(server.pid), descriptors(server.pid)) == parent
    assert "Traceback" not in server.log()
    assert server.log().count("Detected change in") == reloads
    with ExitStack() as stack:
        for path in GUESTS:
            client = stack.enter_context(server.connect(path))
            assert client.recv(timeout=10) == str(reloads)
        server.process.send_signal(sent)
        server.process.wait(10)
        wait_until(lambda: not server.processes(), what="the end of all processes")
        wait_until(lambda: nobody_listens(server.port), what="the end of the port")


def test_a_reload_waits_for_nobody_who_does_not_read(launch):
    """A client that takes nothing costs a reload its second, and not more."""
    flood = """
    @websockets.route("/flood")
    def flood(ws):
        while True:
            ws.send("x" * 65536)
    """
    server = launch(f"{RELOADED}\n{flood}", *DEBUG, without=("watchdog",))
    with server.connect("/news") as client, server.dial() as silent:
        assert client.recv(timeout=5) == "0"
        silent.sendall(
            b"GET /flood HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade\r\n"
            b"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )
        wait_until(lambda: page_of(server)["stats"]["outbox_bytes"] > 0, what="a full outbox")
        old = page_of(server)["pid"]
        edit(server, 1)
        assert closed_with(client)[0] == 1012
        told = time.monotonic()
        wait_until(lambda: old not in server.processes(), what="the end of the old process")
        assert time.monotonic() - told < 1.0 + 2.0  # of which the margin is for the machine
    wait_for_version(server, 1)


# -- the debugger ----------------------------------------------------------------------------------


@pytest.mark.parametrize("pin", ["off", "123-456-789"])
@pytest.mark.parametrize("threads", ["--with-threads", "--without-threads"])
def test_the_debugger(launch, pin, threads):
    """Its page has a console that can be used, while WebSockets are open."""
    server = launch(RELOADED, *DEBUG, "--no-reload", threads, env={"WERKZEUG_DEBUG_PIN": pin})
    with server.connect("/news") as client:
        assert client.recv(timeout=5) == "0"
        status, body = server.ask("/boom")
        page = body.decode()
        assert status == 500
        assert "EVALEX = true" in page
        assert "RuntimeError: boom" in page
        secret = re.search(r'SECRET = "(\w+)"', page)[1]
        frame = re.findall(r'id="frame-(\d+)"', page)[-1]  # that of the view

        def debug(cookie: str = "", **arguments: str) -> tuple[int, bytes]:
            query = urlencode({"__debugger__": "yes", "s": secret, **arguments})
            return server.ask(f"/boom?{query}", *([f"Cookie: {cookie}"] if cookie else []))

        def evaluate(expression: str, cookie: str = "") -> str:
            status, body = debug(cookie, cmd=expression, frm=frame)
            assert status == 200
            return body.decode()

        cookie = ""
        if pin != "off":
            locked_status, locked = debug(cmd="answer", frm=frame)
            assert (locked_status, b">42<" in locked) == (500, False)  # the page's own error again
            cookie = authenticate(server, secret, pin)
        assert ">42<" in evaluate("answer", cookie)
        # The console is in the process that the connection is in.
        assert ">1<" in evaluate("websockets.stats().subscriptions", cookie)
        evaluate("websockets.publish('from the console', 'news')", cookie)
        assert client.recv(timeout=5) == "from the console"
        client.send("still there")
        assert client.recv(timeout=5) == "still there"
    # A view's exception has no page: it goes to the terminal, and into the close reason.
    with server.connect("/raise") as client:
        assert closed_with(client) == (1011, "RuntimeError: in the view")
    wait_until(lambda: "RuntimeError: in the view" in server.log())
    assert server.log().count("RuntimeError: in the view") == 1


def authenticate(server: Launched, secret: str, pin: str) -> str:
    """The cookie that the debugger gives for its PIN."""
    query = urlencode({"__debugger__": "yes", "cmd": "pinauth", "pin": pin, "s": secret})
    with server.dial() as client:
        client.sendall(f"GET /?{query} HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n".encode())
        answer = b""
        while part := client.recv(65536):
            answer += part
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["auth"] is True
    return re.search(r"Set-Cookie: ([^;]+)", answer.decode("latin-1"))[1]


# -- applications without WebSockets ---------------------------------------------------------------

PLAIN = """
    import threading
    from flask import Flask
    {imports}

    app = Flask(__name__)
    {extension}

    @app.get("/")
    def page():
        return sorted(thread.name for thread in threading.enumerate())
"""


@pytest.mark.parametrize("uses", ["nothing", "import", "extension"])
def test_http_alone_has_no_loop(launch, uses):
    """Without a handshake there is no loop thread, and no descriptor of one."""
    source = PLAIN.format(
        imports="" if uses == "nothing" else "import flask_websockets",
        extension="flask_websockets.WebSockets(app)" if uses == "extension" else "",
    )
    server = launch(source, *RUN)
    for _ in range(5):
        # The main thread and those of requests, of which the last one's may still be ending.
        threads = server.json("/")
        others = [name for name in threads if not name.endswith("(process_request_thread)")]
        assert others == ["MainThread"]
    # What asks for a WebSocket is answered, and that needs no loop either without the extension.
    if uses != "extension":
        with pytest.raises(InvalidHandshake), server.connect("/"):
            pass
        assert not [name for name in server.json("/") if name.startswith("flask-websockets")]
    # Werkzeug has a selector of its own for a moment, at the end of a request.
    wait_until(lambda: not selectors_of(server.pid), 10, "no selector")


def descriptors_of(pid: int) -> list[str]:
    return os.listdir(f"/proc/{pid}/fd")


def selectors_of(pid: int) -> list[str]:
    targets = []
    for descriptor in descriptors_of(pid):
        with suppress(FileNotFoundError):  # it was closed since
            targets.append(os.readlink(f"/proc/{pid}/fd/{descriptor}"))
    return [target for target in targets if "eventpoll" in target]


def test_a_loop_starts_with_the_first_handshake(launch):
    """And not before, in the process that serves; the reloader's parent has none at all."""
    server = launch(RELOADED, *DEBUG, without=("watchdog",))
    before = page_of(server)["threads"]
    assert not [name for name in before if name.startswith("flask-websockets")]
    alone = tasks(server.pid)
    for _ in range(2):
        with server.connect("/news") as client:
            assert client.recv(timeout=5) == "0"
            threads = page_of(server)["threads"]
            assert threads.count("flask-websockets-loop") == 1
    assert tasks(server.pid) == alone == 1
