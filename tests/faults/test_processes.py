"""Publishing from where it is hard to, servers that fork, and a system without threads.

What is done in the process of a server is done in a subprocess of the test's own. Each dumps its
stacks and ends where it comes to a deadlock, so that a test fails, and says where.
"""

from __future__ import annotations

import ast
import json
import os
import re
import resource
import signal
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from ..integration.conftest import free_port
from ..integration.serving import (
    HANDSHAKE,
    Answer,
    Peer,
    Served,
    Start,
    is_there,
    read_answer,
    request_head,
    serving,
)
from ..integration.serving import is_running as process_runs
from ..integration.waiting import wait_until
from .soak import Report, Sample, judge
from .soak_plot import draw
from .test_deaths import DEATHS

ROOT = Path(__file__).parent.parent.parent

#: The implementation of WebSockets, and the name of what ``serve`` finds with it.
KINDS = [pytest.param("fast", id="sansio"), pytest.param("plain", id="wsproto")]

#: Views of a channel, threads that publish into another, and stacks where nothing moves.
SERVED = """
    import faulthandler
    import json
    import os
    import signal
    import threading
    import time
    from dataclasses import asdict

    from flask import Flask, request
    from flask_websockets import WebSockets

    # In a forked child the first has lost its thread; the second is a signal's handler, and ends
    # the process as well.
    faulthandler.dump_traceback_later(90, exit=True)
    faulthandler.register(signal.SIGALRM, chain=True)

    app = Flask(__name__)
    app.config.from_prefixed_env()
    websockets = WebSockets(app)

    @websockets.route("/news")
    def news(ws):
        with websockets.subscribe(ws, "news"):
            ws.send("subscribed")
            for data in ws.iter_data():
                ws.send(data)

    @app.get("/stats")
    def stats():
        return asdict(websockets.stats())

    @app.get("/pid")
    def pid():
        return str(os.getpid())

    busy = threading.Event()

    def publish_much():
        while busy.is_set():
            websockets.publish("noise", "noise")
            time.sleep(0.0005)

    @app.post("/noise")
    def noise():
        "Two threads that are at the door all the time."
        busy.set()
        for _ in range(2):
            threading.Thread(target=publish_much, daemon=True).start()
        return "noise"

    @app.post("/silence")
    def silence():
        busy.clear()
        return "silence"

    @websockets.route("/noise")
    def listen_to_noise(ws):
        with websockets.subscribe(ws, "noise", on_slow="latest"):
            ws.send("subscribed")
            ws.receive()

    asgi = websockets.asgi_app()
"""


def served(*more: str) -> str:
    """The application with *more* of it."""
    return "\n".join(textwrap.dedent(part) for part in (SERVED, *more))


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Start]:
    with serving(tmp_path) as start:
        yield start


def fetch(server: Served, path: str, method: str = "GET") -> Any:
    answer = server.fetch(path, method=method)
    assert answer.status == 200, answer
    return json.loads(answer.body)


def post(server: Served, path: str) -> None:
    assert server.fetch(path, method="POST").status == 200


class Client(Peer):
    """A subscriber of the news that gets everything that is published there."""

    def __init__(self, server: Served, path: str = "/news") -> None:
        super().__init__(server.port, path)
        self.expect("subscribed")

    def expect(self, word: str) -> None:
        assert self.frame()[1].decode() == word

    def echo(self, word: str) -> None:
        """Fail unless its connection works."""
        self.send_text(word)
        self.expect(word)

    def __enter__(self) -> Client:
        return self


def run_script(source: str, *, timeout: float = 40.0) -> str:
    """Run a program to its end, which must be a good one; what it said."""
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", textwrap.dedent(source)],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# -- signal handlers -------------------------------------------------------------------------------

SIGNALS = """
    import asyncio

    errors = []

    def publish(number, frame):
        try:
            websockets.publish("from a signal handler", "news")
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")

    def create_task(number, frame):
        "What the error of the other one says."
        tasks.add(asyncio.create_task(websockets.apublish("from a task", "news")))

    tasks = set()
    signal.signal(signal.SIGUSR1, publish)
    signal.signal(signal.SIGUSR2, create_task)

    @app.get("/errors")
    def show():
        return errors
"""


@pytest.mark.parametrize("kind", KINDS)
def test_a_signal_handler_on_the_loops_thread(serve: Start, kind: str) -> None:
    """In the main thread of ``serve`` publish names what to do, and that works."""
    server = serve(served(SIGNALS), kind=kind)
    with Client(server) as client, Client(server, "/noise"):
        post(server, "/noise")
        errors: list[str] = []

        def one_more() -> bool:
            seen = len(errors)
            errors[:] = fetch(server, "/errors")
            return len(errors) > seen

        for _ in range(50):
            server.signal(signal.SIGUSR1)
            wait_until(one_more, what="the handler's error")
        assert len(errors) == 50
        assert all(error.startswith("WrongThread: ") for error in errors)
        assert "asyncio.create_task(websockets.apublish(...))" in errors[0]
        for _ in range(20):
            server.signal(signal.SIGUSR2)
            client.expect("from a task")
        post(server, "/silence")
        client.echo("still here")


def test_a_signal_handler_that_interrupts_a_publish() -> None:
    """In a main thread that is not the loop's it may publish, in whatever it interrupts."""
    said = run_script(
        """
        import faulthandler, signal, threading, time
        import uvicorn
        from flask import Flask
        from flask_websockets import WebSockets

        faulthandler.dump_traceback_later(30, exit=True)
        app = Flask("app")
        app.config["WEBSOCKETS_MAX_PENDING_PUBLISHES"] = 50
        app.config["WEBSOCKETS_MAX_PUBLISH_BYTES"] = 10
        websockets = WebSockets(app)
        up = threading.Event()
        app.get("/")(lambda: "ok")
        asgi = websockets.asgi_app()

        class Server(uvicorn.Server):
            async def startup(self, sockets=None):
                await super().startup(sockets)
                up.set()

        server = Server(uvicorn.Config(asgi, port=0, log_level="error"))
        thread = threading.Thread(target=server.run)
        thread.start()
        assert up.wait(20)
        handled = refused = 0

        def publish_everything():
            global refused
            websockets.publish("a word", "news")
            try:
                websockets.publish("what is too much", "news")
            except ValueError:
                refused += 1  # not exact: the handler may come in between

        def on_signal(number, frame):
            global handled
            handled += 1
            publish_everything()

        signal.signal(signal.SIGALRM, on_signal)
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
        deadline = time.monotonic() + 20
        own = 0
        while handled < 500 and time.monotonic() < deadline:
            own += 1
            publish_everything()
        signal.setitimer(signal.ITIMER_REAL, 0)
        while websockets.stats().pending:
            time.sleep(0.001)
        stats = websockets.stats()
        assert handled >= 500, handled
        assert stats.published == own + handled, (stats, own, handled)
        assert stats.refused_publishes == own + handled, (stats, own, handled)
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()
        print("done")
        """
    )
    assert said == "done\n"


def test_a_signal_handler_that_interrupts_the_count() -> None:
    """What the handler's publish counts does not wait for what it interrupts: the same thread."""
    said = run_script(
        """
        import faulthandler, signal
        from flask_websockets.bridge import Registry

        faulthandler.dump_traceback_later(10, exit=True)

        class Name(str):
            "The signal comes when somebody looks for it."

            def __hash__(self):
                signal.raise_signal(signal.SIGUSR1)
                return super().__hash__()

        def clock():
            signal.raise_signal(signal.SIGUSR1)
            return 0.0

        def on_signal(number, frame):
            registry.count("refused_publishes")
            registry.users.evict("somebody")

        signal.signal(signal.SIGUSR1, on_signal)
        registry = Registry(clock)
        registry.refuse("refused_full", "No room for %s", "anybody")
        registry.users.evict(Name("somebody"))
        assert registry.refused("refused_publishes") >= 2
        print("done")
        """
    )
    assert said == "done\n"


# -- forks -----------------------------------------------------------------------------------------

FORKS = """
    import asyncio
    import traceback
    import warnings

    # 3.12 and later warn of forks beside threads, which is what this is about.
    warnings.simplefilter("ignore", DeprecationWarning)

    def attempt(function, *arguments):
        started = time.monotonic()
        try:
            result = repr(function(*arguments))
        except BaseException as error:
            result = f"{type(error).__name__}: {error}"
        return result, time.monotonic() - started

    @app.post("/fork")
    def fork():
        "What publishing came to in a child of the running server."
        reading, writing = os.pipe()
        if (pid := os.fork()) == 0:
            try:
                signal.alarm(5)
                said = [
                    attempt(websockets.publish, "from the child", "news"),
                    attempt(websockets.publish, "x" * 2_000_000, "news"),
                    attempt(asyncio.run, websockets.apublish("from the child", "news")),
                    attempt(websockets.stats),
                    attempt(websockets.drain),
                ]
                os.write(writing, json.dumps(said).encode())
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            said = pipe.read()
        os.waitpid(pid, 0)
        return said, 200, {"Content-Type": "application/json"}
"""


@pytest.mark.parametrize("kind", KINDS)
def test_a_child_of_a_running_server(serve: Start, kind: str) -> None:
    """In a forked child publish raises NotRunning at once, and the parent notices nothing."""
    server = serve(served(FORKS), kind=kind)
    with Client(server) as client, Client(server, "/noise"):
        post(server, "/noise")  # a fork in the middle of whatever a publish does
        for _ in range(20):
            published, too_much, awaited, stats, drained = fetch(server, "/fork", "POST")
            for result, seconds in (published, awaited):
                assert result.startswith("NotRunning: ")
                assert "forked" in result
                assert seconds < 1
            assert too_much[0].startswith("ValueError: ")
            assert "connections=0" in stats[0]
            assert drained == ["None", drained[1]]
            client.echo("the parent lives")
        post(server, "/silence")
    # The child's sockets were its parent's, and nobody but the parent has spoken on them.
    wait_until(lambda: fetch(server, "/stats")["connections"] == 0, what="the end of both")


CHILDREN = """
    import multiprocessing

    def work(queue):
        signal.alarm(5)
        try:
            websockets.publish("from the child", "news")
        except Exception as error:
            queue.put([type(error).__name__, str(error)])
        else:
            queue.put(["published", str(websockets.stats().published)])

    @app.post("/child/<method>")
    def child(method):
        context = multiprocessing.get_context(method)
        queue = context.Queue()
        process = context.Process(target=work, args=(queue,))
        process.start()
        said = queue.get(timeout=20)
        process.join(20)
        queue.close()
        return [*said, process.exitcode]
"""


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_children_of_multiprocessing(serve: Start, method: str) -> None:
    """A forked child is told so; one that imports anew has no server, and no subscribers."""
    silence = "\nimport warnings\nwarnings.simplefilter('ignore', DeprecationWarning)\n"
    server = serve(served(CHILDREN, silence))
    with Client(server) as client:
        name, text, code = fetch(server, f"/child/{method}", "POST")
        assert code == 0
        if method == "fork":
            assert name == "NotRunning"
            assert "forked" in text
        else:
            assert (name, text) == ("published", "0")
        client.echo("the parent lives")


# -- before, after, beside -------------------------------------------------------------------------


def test_before_the_start_and_after_the_stop() -> None:
    """Nothing happens before a server runs; after it publish raises; then comes another one."""
    said = run_script(
        """
        import asyncio, faulthandler, threading, time
        import uvicorn
        from flask import Flask
        from flask_websockets import NotRunning, WebSockets
        from websockets.sync.client import connect

        faulthandler.dump_traceback_later(30, exit=True)
        app = Flask("app")
        websockets = WebSockets(app)
        asgi = websockets.asgi_app()

        @websockets.route("/news")
        def news(ws):
            with websockets.subscribe(ws, "news"):
                ws.send("subscribed")
                ws.receive()

        def outcome(**how):
            try:
                return websockets.publish("a word", "news", **how)
            except Exception as error:
                return type(error).__name__

        class Server(uvicorn.Server):
            async def startup(self, sockets=None):
                await super().startup(sockets)
                self.port = self.servers[0].sockets[0].getsockname()[1]
                up.set()

        before = [outcome() for _ in range(10_001)]  # no queue that could be full
        assert set(before) == {None}
        for turn in range(2):
            up = threading.Event()
            server = Server(uvicorn.Config(asgi, port=0, log_level="error"))
            thread = threading.Thread(target=server.run)
            thread.start()
            assert up.wait(20)
            with connect(f"ws://127.0.0.1:{server.port}/news") as client:
                assert client.recv(timeout=10) == "subscribed"
                assert outcome() is None
                assert client.recv(timeout=10) == "a word"
                # A loop in another thread, such as that of an async Flask view.

                async def elsewhere():
                    websockets.publish("from another loop", "news")
                    try:
                        await websockets.apublish("a word", "news")
                    except Exception as error:
                        return f"{type(error).__name__}: {error}"

                said = asyncio.run(elsewhere())
                assert said.startswith("WrongThread: ") and "Call publish there" in said, said
                assert client.recv(timeout=10) == "from another loop"
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()
            assert outcome() == "NotRunning", outcome()
            # What could not be sent anyway is still told as before.
            assert outcome(encode_json=True, encode_msgpack=True) == "UsageError"
        print("done")
        """
    )
    assert said == "done\n"


# -- gunicorn --------------------------------------------------------------------------------------

#: Its master calls the hooks; what it says of itself goes to the log.
GUNICORN = """
    import threading
    from dataclasses import asdict

    def pre_fork(server, worker):
        "In the master, which has imported the application (--preload)."
        from served import websockets

        websockets.publish("from the master", "news")
        threads = [thread for thread in threading.enumerate() if "flask" in thread.name]
        print("the master has", len(threads), sum(asdict(websockets.stats()).values()), flush=True)
"""

#: A view that says which worker it is in, and has it do everything.
WORKER = """
    @websockets.route("/worker")
    def worker(ws):
        own = str(os.getpid())
        with websockets.subscribe(ws, own):
            ws.send(own)
            assert ws.receive() == "publish"
            websockets.publish(f"published by {own}", own)
            ws.wait_closed(10)
"""

#: What it is called, and the package that has it.
WORKERS = {
    "asgi": "gunicorn",
    "uvicorn_worker.UvicornWorker": "uvicorn_worker",
}


@pytest.mark.parametrize("worker", WORKERS)
def test_gunicorn_preload(serve: Start, tmp_path: Path, worker: str) -> None:
    """Each forked worker works by itself, one that comes later as well; the master has nothing."""
    if not is_there(WORKERS[worker]):
        pytest.skip(f"{WORKERS[worker]} is not installed")
    settings = tmp_path / "gunicorn.conf.py"
    settings.write_text(textwrap.dedent(GUNICORN))
    command = [sys.executable, "-m", "gunicorn", "--preload", "-w", "2", "-k", worker]
    port = free_port()
    command += ["-c", str(settings), "-b", f"127.0.0.1:{port}", "served:asgi"]
    server = serve(served(WORKER), command=command, port=port)

    def ask_every_worker(expected: int, gone: str = "") -> set[str]:
        """Connect until *expected* workers were met, and have each of them do everything."""
        met: set[str] = set()

        def next_worker() -> bool:
            peer = Peer(server.port, "/worker")
            with peer:
                pid = peer.frame()[1].decode()
                # What it publishes reaches its own subscribers: the runtime is this process's.
                peer.send_text("publish")
                assert peer.frame()[1].decode() == f"published by {pid}"
            if pid != gone:
                met.add(pid)
            return len(met) >= expected

        wait_until(next_worker, 20, f"{expected} workers")
        # HTTP has threads of its own in each of them.
        asked: set[str] = set()

        def next_answer() -> bool:
            asked.add(server.fetch("/pid").body.decode())
            return asked >= met

        wait_until(next_answer, 20, f"HTTP of {expected} workers")
        return met

    first = ask_every_worker(2)
    assert str(server.pid) not in first
    # The master starts another one, by a fork as late as this.
    killed = first.pop()
    os.kill(int(killed), signal.SIGKILL)
    wait_until(lambda: not process_runs(int(killed)), what="the end of the worker")
    second = ask_every_worker(2, gone=killed)
    assert first < second
    said = re.findall(r"the master has (\d+) (\d+)", server.log())
    assert len(said) == 3
    assert set(said) == {("0", "0")}, "a thread, or a count, in the master"
    assert "Traceback" not in server.log()


# -- a system that has no thread left --------------------------------------------------------------

#: A thread's stack, and what is left to the server when the limit is set: enough for whatever
#: else it does, and too little for the stack.
STACK, SPARE = 64 * 2**20, 24 * 2**20

FEW_THREADS = f"""
    from flask_websockets import draining

    threading.stack_size({STACK})

    @websockets.route("/async/news")
    async def async_news(ws):
        async with websockets.subscribe(ws, "news"):
            await ws.send("subscribed")
            async for data in ws.iter_data():
                await ws.send(data)

    @app.post("/publish")
    def publish():
        websockets.publish("published", "news")
        return "published"

    @draining.connect_via(app)
    def goodbye(app, **extra):
        print("goodbye", flush=True)
"""


class NoThreads:
    """A server for which no thread can be started: there is no room for another stack."""

    def __init__(self, server: Served) -> None:
        self._pid = server.pid
        self._before = resource.prlimit(server.pid, resource.RLIMIT_AS)

    def __enter__(self) -> NoThreads:
        status = Path(f"/proc/{self._pid}/status").read_text()
        size = int(status.partition("VmSize:")[2].split()[0]) * 1024
        resource.prlimit(self._pid, resource.RLIMIT_AS, (size + SPARE, self._before[1]))
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(ProcessLookupError):  # a test may have stopped it
            resource.prlimit(self._pid, resource.RLIMIT_AS, self._before)


def handshake(server: Served, path: str) -> Answer:
    """The answer of a handshake that is refused."""
    with server.open() as connection:
        connection.sendall(request_head("GET", path, HANDSHAKE))
        return read_answer(connection)


def last_threads(server: Served) -> list[Peer]:
    """Clients that take the stacks which ended threads have left; the one after them is refused."""
    clients: list[Peer] = []
    while True:
        client = Peer(server.port, "/news")
        if client.status == 503:
            client.close()
            return clients
        clients.append(client)
        assert len(clients) < 10


needs_limits = pytest.mark.skipif(
    not hasattr(resource, "prlimit"), reason="only Linux sets the limits of another process"
)


@needs_limits
@pytest.mark.parametrize("kind", KINDS)
def test_a_system_without_threads(serve: Start, kind: str) -> None:
    """A handshake gets 503, those that are there notice nothing, and later all is well again."""
    server = serve(served(FEW_THREADS), kind=kind)
    with Client(server) as plain, Client(server, "/async/news") as task:
        leaving = Client(server, "/async/news")
        # Until now nobody has asked for HTTP, which has no thread yet.
        with NoThreads(server):
            others = last_threads(server)
            for path in ("/news", "/async/news", "/news"):
                answer = handshake(server, path)
                assert (answer.status, answer.body) == (503, b"No thread is left.\n")
                assert int(answer.headers["Retry-After"]) > 0
            assert server.fetch("/stats").status == 503
            for client in (plain, task):
                client.echo("still here")
            # The end of an async view needs a thread too, and does without.
            leaving.close()
            wait_until(lambda: "runs on the event loop" in server.log(), what="its teardown")
        stats = fetch(server, "/stats")
        assert (stats["refused_threads"], stats["http_refused"]) == (1 + 3, 1)
        views = 1 + len(others)
        assert (stats["connections"], stats["view_threads"]) == (views + 1, views)
        with Client(server) as late:
            post(server, "/publish")
            for client in (plain, task, late):
                client.expect("published")
                client.echo("still here")
        for other in others:
            other.close()
    said = [line for line in server.log().splitlines() if "has no thread left" in line]
    assert len(said) == 1, "once a minute"
    assert "/news" in said[0]
    assert "127.0.0.1" in said[0]


@needs_limits
@pytest.mark.parametrize("kind", KINDS)
def test_a_stop_without_threads(serve: Start, kind: str) -> None:
    """SIGTERM tells everybody 1012 and ends the process, although it can start no thread."""
    server = serve(served(FEW_THREADS), kind=kind, settings={"DRAIN_TIMEOUT": 5})
    with Client(server) as plain, Client(server, "/async/news") as task, NoThreads(server):
        others = last_threads(server)
        server.signal(signal.SIGTERM)
        for client in (plain, task):
            assert client.goodbye() == 1012
        for other in others:
            other.close()
        assert server.wait(5 + 2) == 0
    assert "Traceback" not in server.log()
    assert "goodbye" not in server.log(), "there was a thread for the receivers of the signal"


# -- the soak, and the page about all this ---------------------------------------------------------


def report_of(*resident: float) -> Report:
    """A run of an hour in which all went well, with these MiB of memory, evenly spread."""
    rest = {"threads": 3, "descriptors": 9}
    died = Counter({kind.__name__: 10 for kind in DEATHS})
    report = Report("wsproto", seconds=3600, died=died, before=rest, after=dict(rest))
    for number, megabytes in enumerate(resident, 1):
        at, memory = 3600 * number / len(resident), int(megabytes * 2**20)
        report.samples.append(Sample(at, memory, 9, 20, 6, 5, 0.001, 0.002, 0.1, 0.1))
    return report


def test_a_soak_that_went_well() -> None:
    """Memory that goes up and down, or grows before the end of the warm-up, is no failure."""
    report = report_of(40, 52, *[50, 52, 49, 51, 50] * 4)
    judge(report)
    assert report.failures == []


@pytest.mark.parametrize(
    ("change", "failure"),
    [
        ({"samples": report_of(*range(50, 80)).samples}, "memory grew by 4"),
        ({"samples": []}, "samples are too few"),
        ({"after": {"threads": 4, "descriptors": 9}}, "threads: 3 before, 4 after"),
        ({"after": {"threads": 3, "descriptors": 10}}, "descriptors: 9 before, 10 after"),
        ({"troubles": ["5 s, talker 1: TimeoutError()"]}, "talker 1"),
        ({"died": Counter(kind.__name__ for kind in DEATHS[1:])}, "nobody died by"),
    ],
    ids=["memory", "samples", "threads", "descriptors", "troubles", "deaths"],
)
def test_a_soak_that_did_not(change: dict[str, Any], failure: str) -> None:
    """Whatever is not as it was, or was not tried, fails the run."""
    report = report_of(*[50] * 30)
    for name, value in change.items():
        setattr(report, name, value)
    judge(report)
    assert len(report.failures) == 1
    assert failure in report.failures[0]


def test_the_picture_of_a_soak() -> None:
    """It is well-formed, has a line for each chart, and every point lies in its chart."""
    report = report_of(*range(50, 60))
    picture = ElementTree.fromstring(
        draw({**vars(report), "samples": [vars(sample) for sample in report.samples]})
    )
    lines = picture.findall("{http://www.w3.org/2000/svg}polyline")
    assert len(lines) == 5
    width, height = float(picture.attrib["width"]), float(picture.attrib["height"])
    for line in lines:
        points = [point.split(",") for point in line.attrib["points"].split()]
        assert len(points) == 10
        assert all(0 <= float(x) <= width and 0 <= float(y) <= height for x, y in points)


def test_the_promises_have_tests() -> None:
    """Each test that docs/explanation/reliability names exists, under that name."""
    text = (ROOT / "docs" / "explanation" / "reliability.rst").read_text()
    named = set(re.findall(r"``tests/([\w/]+\.py)::([\w:]+)``", text))
    assert len(named) > 20
    missing = []
    for file, name in sorted(named):
        path = ROOT / "tests" / file
        *owners, function = name.split("::")
        body: list[ast.stmt] = ast.parse(path.read_text()).body if path.exists() else []
        for owner in owners:
            body = next(
                (n.body for n in body if isinstance(n, ast.ClassDef) and n.name == owner), []
            )
        functions = (ast.FunctionDef, ast.AsyncFunctionDef)
        if not any(isinstance(node, functions) and node.name == function for node in body):
            missing.append(f"{file}::{name}")
    assert missing == []
