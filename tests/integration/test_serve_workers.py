"""``serve`` in several processes: workers, the reloader, and how each finds the application."""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from websockets.exceptions import ConnectionClosed

from .conftest import START_TIMEOUT, free_port
from .serving import (
    FLASK,
    MARGIN,
    TEXT,
    TIMEOUT,
    Peer,
    Served,
    Start,
    group_of,
    is_running,
    run_flask,
    serving,
    state_of,
)
from .waiting import wait_until

APP = """
    import multiprocessing
    import os
    import time

    from flask import Flask
    from flask_websockets import ConnectionClosed, WebSockets

    with open("imports.txt", "a") as imports:
        print(os.getpid(), file=imports)

    app = Flask(__name__)
    app.config.from_prefixed_env()
    websockets = WebSockets(app)

    @app.get("/pid")
    def pid():
        return str(os.getpid())

    @websockets.route("/pid")
    def pid_of_view(ws):
        ws.send(str(os.getpid()))
        for data in ws.iter_data():
            ws.send(data)

    @websockets.route("/hold")
    def hold(ws):
        "Outlives its connection until there is a file."
        ws.send(str(os.getpid()))
        try:
            ws.receive()
        except ConnectionClosed:
            while not os.path.exists("release"):
                time.sleep(0.02)
        print("held by", os.getpid())

    @websockets.route("/sleep")
    def sleep(ws):
        ws.send(str(os.getpid()))
        time.sleep(600)
"""

FACTORY = """
    import os

    from flask import Flask
    from flask_websockets import WebSockets

    websockets = WebSockets()

    @websockets.route("/pid")
    def pid_of_view(ws):
        ws.send(str(os.getpid()))
        for data in ws.iter_data():
            ws.send(data)

    def create_app(word="default"):
        app = Flask(__name__)
        app.config.from_prefixed_env()
        websockets.init_app(app)

        @app.get("/word")
        def answer():
            return word

        return app
"""

TWO = ("--workers", "2", "--separate-channels")


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Start]:
    with serving(tmp_path) as start:
        yield start


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """Closes what a test opens."""
    with ExitStack() as stack:
        yield stack


@contextmanager
def stopped(pids: set[int]) -> Iterator[None]:
    """Processes that do nothing for a moment, so that others have to."""
    try:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        wait_until(lambda: {state_of(pid) for pid in pids} <= {"T"}, what="the stop")
        yield
    finally:
        for pid in pids:
            if is_running(pid):
                os.kill(pid, signal.SIGCONT)


def answering(server: Served) -> int:
    """The process that answers a request."""
    if server.process.poll() is not None:
        raise RuntimeError(f"The server ended with {server.process.poll()}:\n{server.log()}")
    try:
        return int(server.fetch("/pid").body)
    except (OSError, ValueError):
        return 0  # its worker has died just now


def workers_of(server: Served, count: int = 2) -> list[int]:
    """The worker processes, found one by one: those that are known are stopped meanwhile."""
    found: set[int] = set()

    def another() -> int:
        pid = answering(server)
        return pid if pid not in found else 0

    while len(found) < count:
        with stopped(found):
            found.add(wait_until(another, START_TIMEOUT, "a worker's answer"))
    return sorted(found)


def opened_at(server: Served, stack: ExitStack, pid: int, others: set[int], path: str) -> Peer:
    """A connection that one worker serves."""
    with stopped(others):
        peer = stack.enter_context(Peer(server.port, path))
        assert peer.frame() == (TEXT, str(pid).encode())
    return peer


def imports_of(server: Served) -> list[str]:
    return (server._log_path.parent / "imports.txt").read_text().split()


def check_gone(server: Served) -> None:
    """Nothing of the server's session is left."""
    wait_until(lambda: not group_of(server), 5, "the end of every process")


# -- workers --------------------------------------------------------------------------------------


def test_several_workers_need_a_word(tmp_path):
    """Without --separate-channels it says what workers would not share, and exits with 2."""
    done = run_flask(tmp_path, APP, "websockets", "serve", "--workers", "2", "--port", "0")
    assert done.returncode == 2
    assert "--separate-channels" in done.stderr
    for word in ("channels", "limits", "counters"):
        assert word in done.stderr.lower()
    assert "Traceback" not in done.stderr


def test_two_workers(serve, stack):
    """Both answer; one that is killed is replaced, and the other does not notice."""
    server = serve(APP, "--port", "0", *TWO, port=0, wait=False)
    server.port = server.port_of_banner()
    first, second = workers_of(server)
    assert server.pid not in (first, second)
    assert "2 workers" in server.banner()
    kept = opened_at(server, stack, first, {second}, "/pid")
    lost = opened_at(server, stack, second, {first}, "/pid")
    os.kill(second, signal.SIGKILL)
    assert lost.socket.recv(1) == b""
    kept.send_text("still here")
    assert kept.frame() == (TEXT, b"still here")
    wait_until(lambda: not is_running(second))
    again = workers_of(server)
    assert first in again
    assert second not in again
    new = opened_at(server, stack, *[pid for pid in again if pid != first], {first}, "/pid")

    server.signal(signal.SIGTERM)
    assert [peer.goodbye() for peer in (kept, new)] == [1012, 1012]
    assert server.wait(5) == 0, "the drain timeout is 20 s"
    check_gone(server)
    assert "Traceback" not in server.log()


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="only Linux pins")
def test_pinned_workers(serve):
    """Each has one of the cores that serve may use, in turn, and so has one that replaces it."""
    cores = sorted(os.sched_getaffinity(0))
    expected = [{cores[number % len(cores)]} for number in range(2)]
    server = serve(APP, *TWO, "--pin-workers")
    first, second = workers_of(server)
    found = {pid: os.sched_getaffinity(pid) for pid in (first, second)}
    assert sorted(map(sorted, found.values())) == sorted(map(sorted, expected))
    assert os.sched_getaffinity(server.pid) == set(cores)
    os.kill(second, signal.SIGKILL)
    wait_until(lambda: not is_running(second))
    [new] = [pid for pid in workers_of(server) if pid != first]
    assert os.sched_getaffinity(new) == found[second]
    server.signal(signal.SIGTERM)
    assert server.wait(5) == 0
    check_gone(server)


def test_a_worker_that_cannot_be_replaced_now(serve):
    """The parent has no descriptor left: it tries again, and ends as ever when it is told to."""
    server = serve(APP, *TWO)
    first, second = workers_of(server)
    limits = resource.prlimit(server.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (8, limits[1]))
    os.kill(second, signal.SIGKILL)
    wait_until(lambda: "could not be started" in server.log(), 10, "the error")
    assert is_running(first)
    resource.prlimit(server.pid, resource.RLIMIT_NOFILE, limits)
    assert first in workers_of(server)
    server.signal(signal.SIGTERM)
    assert server.wait(5) == 0
    check_gone(server)
    assert "Traceback" not in server.log()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_for_all_of_them(serve, number, stack):
    """A terminal's CTRL+C reaches every process, and is one signal: everybody drains."""
    server = serve(APP, *TWO)
    first, second = workers_of(server)
    peers = [
        opened_at(server, stack, first, {second}, "/hold"),
        opened_at(server, stack, second, {first}, "/hold"),
    ]
    server.signal_group(number)
    assert [peer.goodbye() for peer in peers] == [1012, 1012]
    assert is_running(first) and is_running(second)
    (server._log_path.parent / "release").touch()
    assert server.wait(5) == 0, "the drain timeout is 20 s"
    for pid in (first, second):
        assert f"held by {pid}" in server.log()
    check_gone(server)
    assert "Traceback" not in server.log()


def test_workers_that_do_not_end(serve, stack):
    """The drain timeout holds for all of them together, with one view in time.sleep(600) each."""
    server = serve(APP, *TWO, settings={"DRAIN_TIMEOUT": 2})
    first, second = workers_of(server)
    peers = [
        opened_at(server, stack, first, {second}, "/sleep"),
        opened_at(server, stack, second, {first}, "/sleep"),
    ]
    started = time.monotonic()
    server.signal(signal.SIGTERM)
    assert [peer.goodbye() for peer in peers] == [1012, 1012]
    code = server.wait()
    seconds = time.monotonic() - started
    assert (code, seconds <= 2 + MARGIN) == (0, True), f"{code} after {seconds:.2f} s"
    check_gone(server)


def test_a_second_signal_ends_the_workers(serve, stack):
    """All of them, at once."""
    server = serve(APP, *TWO, settings={"DRAIN_TIMEOUT": 30, "CLOSE_TIMEOUT": 30})
    peer = stack.enter_context(Peer(server.port, "/hold"))
    assert peer.frame()[0] == TEXT
    server.signal(signal.SIGTERM)
    assert peer.goodbye() == 1012
    server.signal(signal.SIGTERM)
    server.wait(5)
    check_gone(server)


def test_a_stopped_worker_is_killed_in_the_end(serve, stack):
    """One that does not even hear the signal does not keep the rest."""
    server = serve(APP, *TWO, settings={"DRAIN_TIMEOUT": 1})
    first = workers_of(server)[0]
    with stopped({first}):
        started = time.monotonic()
        server.signal(signal.SIGTERM)
        code = server.wait()
        seconds = time.monotonic() - started
    assert (code, seconds <= 1 + MARGIN) == (0, True), f"{code} after {seconds:.2f} s"
    check_gone(server)


def test_workers_that_cannot_start(serve):
    """An application that cannot be imported in a worker ends it all, with an error."""
    broken = """
    if multiprocessing.parent_process() is not None:
        raise RuntimeError("the worker has no database")
    """
    server = serve(APP + broken, *TWO, wait=False)
    assert server.wait(START_TIMEOUT) not in (0, None)
    assert "the worker has no database" in server.log()
    assert len(imports_of(server)) <= 3, "the parent and each worker, once"
    check_gone(server)


def test_a_parent_that_is_killed(serve):
    """Its workers do not go on without it."""
    server = serve(APP, *TWO)
    workers_of(server)
    server.process.kill()
    server.process.wait(TIMEOUT)
    wait_until(lambda: not group_of(server), 10, "the end of the workers")


def test_workers_share_a_unix_socket(serve, tmp_path):
    """Each accepts from the one socket that the parent made, and at the end its file is gone."""
    unix = tmp_path / "app.sock"
    server = serve(APP, "--host", f"unix://{unix}", *TWO, unix=unix)
    assert len(set(workers_of(server))) == 2
    assert server.stop()[0] == 0
    assert not unix.exists()


# -- websockets.run(workers=2) --------------------------------------------------------------------


def script(source: str, call: str, guarded: bool = True) -> str:
    guard = '    if __name__ == "__main__":\n        ' if guarded else "    "
    return f"{source}\n{guard}{call}\n"


def test_run_with_workers(serve, stack):
    """The application is found again in the script, and the guard keeps it from starting anew."""
    call = "websockets.run(port={port}, workers=2, separate_channels=True)"
    server = serve(script(APP, call), command=[sys.executable, "served.py"])
    first, second = workers_of(server)
    peer = opened_at(server, stack, first, {second}, "/pid")
    assert len(imports_of(server)) == 3
    server.signal(signal.SIGTERM)
    assert peer.goodbye() == 1012
    assert server.wait(5) == 0
    check_gone(server)


@pytest.mark.slow  # with all the others
def test_run_as_a_module(serve):
    """python -m works as well."""
    call = "websockets.run(port={port}, workers=2, separate_channels=True)"
    server = serve(script(APP, call), command=[sys.executable, "-m", "served"])
    workers_of(server)
    assert server.stop()[0] == 0
    check_gone(server)


def test_run_with_workers_and_without_a_guard(serve):
    """The workers would start workers: it ends with an error that says what is missing."""
    call = "websockets.run(port={port}, workers=2, separate_channels=True)"
    server = serve(script(APP, call, False), command=[sys.executable, "served.py"], wait=False)
    assert server.wait(START_TIMEOUT) not in (0, None)
    assert "__main__" in server.log()
    assert len(imports_of(server)) <= 3, "the parent and each worker, once"
    check_gone(server)


@pytest.mark.parametrize("options", ["workers=2, separate_channels=True", "reload=True"])
def test_run_with_an_app_that_nobody_can_import(serve, options):
    """It says so, and names the command that can."""
    call = f"websockets.run(create_app(), port={{port}}, {options})"
    server = serve(script(FACTORY, call), command=[sys.executable, "served.py"], wait=False)
    assert server.wait(START_TIMEOUT) == 1
    assert "UsageError" in server.log()
    assert "websockets serve" in server.log()


# -- the reloader ---------------------------------------------------------------------------------

WORD = """
    @app.get("/word")
    def word():
        return "first"
"""


def rewrite(server: Served, old: str, new: str, module: str = "served", seconds: float = 5) -> None:
    """Change a file. It is so many seconds younger: some file systems have coarse times."""
    path = server._log_path.parent / f"{module}.py"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    later = time.time() + seconds
    os.utime(path, (later, later))


def word_of(server: Served) -> bytes:
    try:
        return server.fetch("/word").body
    except OSError:
        return b""  # between the old process and the new one


def wait_for_new_code(server: Served, word: bytes, module: str = "served") -> None:
    """Until it answers. A change that came too early is saved once more, as people do.

    uvicorn (0.54) looks what is there a quarter of a second after each start, and takes that for
    what it has started.
    """
    path = server._log_path.parent / f"{module}.py"
    deadline = time.monotonic() + START_TIMEOUT
    while True:
        try:
            wait_until(lambda: word_of(server) == word, 3, "the new code")
        except TimeoutError:
            if time.monotonic() > deadline:
                raise
            later = path.stat().st_mtime + 5
            os.utime(path, (later, later))
        else:
            return


def test_reload(serve, stack):
    """The new code answers on the same port; connections and stuck views end within moments."""
    server = serve(APP + WORD, "--reload")
    assert word_of(server) == b"first"
    peer = stack.enter_context(Peer(server.port, "/pid"))
    pid = int(peer.frame()[1])
    sleeper = stack.enter_context(Peer(server.port, "/sleep"))
    assert sleeper.frame()[0] == TEXT
    rewrite(server, '"first"', '"second"')
    assert {peer.goodbye(), sleeper.goodbye()} == {1012}
    wait_for_new_code(server, b"second")
    wait_until(lambda: not is_running(pid), 5, "the end of the old process")
    with server.connect("/pid") as client:
        assert int(client.recv(timeout=TIMEOUT)) != pid
        client.send("hello")
        assert client.recv(timeout=TIMEOUT) == "hello"
        server.signal(signal.SIGTERM)
        with pytest.raises(ConnectionClosed):
            client.recv(timeout=TIMEOUT)
    assert server.wait(5) == 0
    check_gone(server)


def test_reload_after_a_mistake(serve):
    """Code that cannot be imported is waited out: the next change brings the page back."""
    server = serve(APP + WORD, "--reload")
    assert word_of(server) == b"first"
    rewrite(server, '"first"', '"second')
    wait_until(lambda: "SyntaxError" in server.log(), START_TIMEOUT, "the error")
    assert server.process.poll() is None
    rewrite(server, '"second', '"third"', seconds=10)
    wait_for_new_code(server, b"third")
    server.signal_group(signal.SIGINT)
    assert server.wait(5) == 0
    check_gone(server)


@pytest.mark.slow  # with all the others
def test_run_with_reload(serve):
    """websockets.run(reload=True) in a script."""
    call = "websockets.run(port={port}, reload=True)"
    server = serve(script(APP + WORD, call), command=[sys.executable, "served.py"])
    assert word_of(server) == b"first"
    rewrite(server, '"first"', '"second"')
    wait_for_new_code(server, b"second")
    assert server.stop()[0] == 0
    check_gone(server)


# -- how the application is found -----------------------------------------------------------------

WAYS = {
    "call": ("served:create_app('argument')", "served", b"argument"),
    "discovery": ("served", "served", b"default"),
    "wsgi": (None, "wsgi", b"default"),
}
MODES = {"serve": (), "workers": TWO, "reload": ("--reload",)}
BOTH = [*((way, "serve") for way in WAYS), *((way, "workers") for way in ("call", "wsgi"))]


@pytest.mark.parametrize(("way", "mode"), [*BOTH, ("call", "reload"), ("wsgi", "reload")])
def test_application_factories(serve, way, mode):
    """--app as Flask understands it, in this process and in those that it starts."""
    app, module, word = WAYS[way]
    server = serve(FACTORY, *MODES[mode], app=app, module=module)
    assert server.fetch("/word").body == word
    with server.connect("/pid") as client:
        assert int(client.recv(timeout=TIMEOUT)) > 0
        client.send("hello")
        assert client.recv(timeout=TIMEOUT) == "hello"
    if mode == "reload":
        rewrite(server, "return word", "return word.upper()", module)
        wait_for_new_code(server, word.upper(), module)
    assert server.stop()[0] == 0
    check_gone(server)


def test_the_environment_names_the_application(serve):
    """FLASK_APP instead of --app."""
    port = free_port()
    command = ["env", "FLASK_APP=served:create_app('x')", FLASK, "websockets", "serve"]
    server = serve(FACTORY, command=[*command, "--port", str(port)], port=port)
    assert server.fetch("/word").body == b"x"
    assert server.stop()[0] == 0
    check_gone(server)
