"""Four ways to serve, a scene on each, and what must be as it was when the scene is over.

``pytest tests/faults`` runs the quick half; ``pytest --faults=all tests/faults`` adds the tests
that are marked ``long``.
"""

from __future__ import annotations

import json
import re
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlencode

import pytest
from websockets.sync.client import ClientConnection, connect

from ..integration.conftest import IMPLEMENTATIONS, free_port
from ..integration.serving import Peer, Served, Start, serving
from ..integration.waiting import wait_until
from .skips import skips_of

T = TypeVar("T")

#: ``flask websockets serve`` takes the implementation that is there; uvicorn is told.
WAYS = ("serve-sansio", "serve-wsproto", "bare-sansio", "bare-wsproto")
#: The kinds of ``serving.KINDS`` that make ``serve`` take an implementation.
KIND_OF = {"sansio": "fast", "wsproto": "plain"}

#: Seconds that anything may take for which nothing is promised.
TIMEOUT = 10.0
#: Seconds beside a promised deadline.
MARGIN = 1.5
#: Seconds that a client may wait which has done nothing wrong, whatever others do.
PATIENCE = 10.0
#: Bytes by which resident memory may have grown for good: pieces that the allocator keeps.
KEPT = 16 * 1024 * 1024

#: Settings of most scenes. Deadlines are short, buffers small.
SETTINGS = {
    "SEND_TIMEOUT": 1,
    "CLOSE_TIMEOUT": 1,
    "INBOX_TIMEOUT": 1,
    "HANDSHAKE_TIMEOUT": 2,
    "OUTBOX_BYTES": 2_000_000,
    "MAX_CONNECTIONS": 100,
    "MAX_PUBLISH_BYTES": 100_000,
}

#: What is nothing when nobody is connected.
AT_REST = (
    *("connections", "view_threads", "view_tasks", "channels", "subscriptions", "pending"),
    *("inbox_messages", "inbox_bytes", "outbox_messages", "outbox_bytes"),
)

#: What a view is told of a peer that left without a goodbye.
GONE = (1005, 1006)

APP = Path(__file__).with_name("app.py").read_text()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--faults", default="", metavar="all", help="run the long half of the fault suite as well"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "long: runs with --faults=all only")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # pytest reads this file late when it is not told of this directory, without the option.
    if config.getoption("--faults", default="") == "all":
        return
    left_out = [item for item in items if item.get_closest_marker("long")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


class Starter:
    """Starts servers, each of them once for all tests that can share it."""

    def __init__(self, start: Start) -> None:
        self._start = start
        self._shared: dict[str, Served] = {}

    def start(
        self,
        way: str,
        *,
        options: Sequence[str] = (),
        settings: Mapping[str, Any] = SETTINGS,
        pings: float | None = None,
    ) -> Served:
        """A server of its own.

        :param options: beside those of the way to serve.
        :param pings: seconds between uvicorn's pings, and for the answer; None for its own 20.
        """
        how, _, implementation = way.partition("-")
        port = free_port()
        if how == "serve":
            if pings is not None:
                # A word for the server's environment, which the tests' own must not have.
                source = f"import os\nos.environ['SHORT_PINGS'] = '{pings}'\n"
            else:
                source = ""
            source += APP.replace("from __future__ import annotations\n", "")
            kind = KIND_OF[implementation]
            return self._start(source, *options, settings=settings, kind=kind)
        command = [sys.executable, "-m", "uvicorn", "--port", str(port), "--no-access-log"]
        command += [*IMPLEMENTATIONS[implementation], *options]
        if pings is not None:
            command += ["--ws-ping-interval", str(pings), "--ws-ping-timeout", str(pings)]
        return self._start(APP, settings=settings, command=[*command, "served:asgi"], port=port)

    def share(self, way: str, **how: Any) -> Served:
        """The server of this way and these settings that others have used before."""
        name = json.dumps([way, how], sort_keys=True)
        server = self._shared.get(name)
        if server is None or server.process.poll() is not None:
            server = self._shared[name] = self.start(way, **how)
        return server


@pytest.fixture(scope="session")
def starter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Starter]:
    with serving(tmp_path_factory.mktemp("faults")) as start:
        yield Starter(start)


@pytest.fixture(scope="module", params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    """Every scenario is tried on each way to serve."""
    name: str = request.param
    return name


@pytest.fixture(autouse=True)
def known_skips(request: pytest.FixtureRequest) -> None:
    """Expect the failure of a case that stands in ``skips.py``."""
    if "way" in request.fixturenames:
        name: str = request.getfixturevalue("way")
        case = f"{request.path.name}::{request.node.name}".replace(f"[{name}-", "[")
        for skip in skips_of(case.replace(f"[{name}]", ""), name):
            marker = pytest.mark.xfail(
                raises=(AssertionError, TimeoutError),
                strict=True,
                reason=f"{skip.reason}; what helps: {skip.helps}",
            )
            request.node.add_marker(marker)


class Bystander(threading.Thread):
    """A client that does nothing wrong: it says a word, and hears it again, until the end."""

    def __init__(self, server: Served) -> None:
        super().__init__(name="bystander", daemon=True)
        self._stack = ExitStack()
        self._client = self._stack.enter_context(
            server.connect("/echo", ping_interval=None, close_timeout=2, compression=None)
        )
        assert self._client.recv(timeout=TIMEOUT) == "ready"
        self._enough = threading.Event()
        #: What went wrong; None if nothing did.
        self.error: BaseException | None = None
        #: The longest that it had to wait, in seconds.
        self.longest = 0.0
        #: The words that it has heard again.
        self.heard = 0

    def run(self) -> None:
        try:
            last = False
            while not last:
                last = self._enough.wait(0.02)
                started = time.monotonic()
                word = f"word {self.heard}"
                self._client.send(word)
                assert self._client.recv(timeout=PATIENCE) == word
                self.longest = max(self.longest, time.monotonic() - started)
                self.heard += 1
        except BaseException as error:
            self.error = error
        finally:
            self._stack.close()

    def leave(self) -> None:
        """A last word, then hang up; fail if anything was amiss."""
        self._enough.set()
        self.join(2 * PATIENCE)
        assert not self.is_alive()
        assert self.error is None, f"A client that did nothing wrong: {self.error!r}"
        assert self.longest < PATIENCE


class Scene:
    """A server, somebody on it who must not notice anything, and what is opened in a test.

    :param server: it is quiet.
    :param way: one of :data:`WAYS`.
    """

    def __init__(self, server: Served, way: str) -> None:
        self.server = server
        self.way = way
        #: Bytes by which resident memory may have grown in the end.
        self.kept = KEPT
        #: Tracebacks that the log may have in the end.
        self.tracebacks = 0
        self._stack = ExitStack()
        self._log_before = len(server.log())
        self._before = wait_until(self._quiet, what="a quiet server")
        self._bystander = Bystander(server)
        self._bystander.start()

    # -- what a test opens ------------------------------------------------------------------------

    def enter(self, opened: AbstractContextManager[T]) -> T:
        """Close it when the scene is over."""
        return self._stack.enter_context(opened)

    def peer(
        self, view: str, key: str, *, port: int | None = None, ready: bool = True, **options: Any
    ) -> Peer:
        """A client made of a socket, whose view is there."""
        peer = Peer(port or self.server.port, path(view, key), **options)
        self._stack.callback(peer.close)
        assert peer.status == 101, peer.head
        if ready:
            assert peer.frame()[1] == b"ready"
        return peer

    def client(
        self, view: str, key: str, *, port: int | None = None, ready: bool = True, **query: str
    ) -> ClientConnection:
        """A client that answers pings, also through a proxy."""
        url = f"ws://127.0.0.1:{port or self.server.port}{path(view, key, **query)}"
        # Its own pings would be a fault in a fault; a goodbye may have nowhere to arrive.
        client = self.enter(
            connect(url, ping_interval=None, close_timeout=0.1, compression=None, max_size=None)
        )
        self._stack.callback(_vanish, client)
        if ready:
            assert client.recv(timeout=TIMEOUT) == "ready"
        return client

    # -- what a test asks -------------------------------------------------------------------------

    def stats(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.server.fetch("/stats").body)
        return found

    def grown(self, counter: str) -> int:
        """By how much a counter has grown since the beginning."""
        grown: int = self.stats()[counter] - self._before[counter]
        return grown

    def later(self, where: str) -> None:
        """Post it when the scene is over, if not before: no view waits for ever."""
        self._stack.callback(self.post, where)

    def descriptors_grown(self) -> int:
        """Descriptors that were not there before, but for the bystander's."""
        return self.grown("descriptors") - 1

    def post(self, where: str, body: bytes = b"") -> bytes:
        answer = self.server.fetch(where, method="POST", body=body)
        assert answer.status == 200
        return answer.body

    def note(self, key: str, *what: str, timeout: float = TIMEOUT) -> dict[str, Any]:
        """What a view noted, once it has."""

        def found() -> dict[str, Any] | None:
            notes = json.loads(self.server.fetch(f"/notes/{key}").body)
            return next((each for each in notes if each["what"] in what), None)

        noted: dict[str, Any] = wait_until(found, timeout, f"a note of {key}: {what}")
        return noted

    def ended(self, key: str, *, since: float, within: float) -> int:
        """The code with which a view was unblocked, which must have been in time."""
        note = self.note(key, "ended", "raised", "returned", timeout=within + MARGIN + 2)
        assert note["what"] == "ended", note
        seconds = note["at"] - since
        assert seconds <= within + MARGIN, f"{key} was unblocked after {seconds:.2f} s"
        code: int = note["code"]
        return code

    def log(self) -> str:
        """What was logged since the beginning."""
        return self.server.log()[self._log_before :]

    # -- the end ----------------------------------------------------------------------------------

    def close(self) -> None:
        """Close what is open."""
        self._stack.close()

    def check(self) -> None:
        """The server serves, nobody has noticed anything, and everything is as it was."""
        assert self.server.process.poll() is None, self.server.log()
        self._bystander.leave()
        try:
            wait_until(lambda: not self._left(), TIMEOUT)
        except TimeoutError:
            raise AssertionError(f"Not as it was before: {self._left()}") from None
        assert self.log().count("Traceback") == self.tracebacks, self.log()

    def _quiet(self) -> dict[str, Any] | None:
        now = self.stats()
        return None if any(now[name] for name in AT_REST) else now

    def _left(self) -> dict[str, int]:
        """What is there, and was not at the beginning."""
        now, before = self.stats(), self._before
        left = {name: now[name] for name in AT_REST}
        left["descriptors"] = now["descriptors"] - before["descriptors"]
        threads = [each["threads"] - each["http_threads"] for each in (now, before)]
        left["threads"] = threads[0] - threads[1]
        if (resident := now["resident"] - before["resident"]) > self.kept:
            left["resident"] = resident
        return {name: value for name, value in left.items() if value > 0}


def _vanish(client: ClientConnection) -> None:
    """Hang up without a goodbye."""
    with suppress(OSError):
        client.socket.shutdown(socket.SHUT_RDWR)


def path(view: str, key: str, **query: str) -> str:
    return f"/{view}?{urlencode({'key': key, **query})}"


@pytest.fixture
def key() -> Callable[[str], str]:
    """Names that no other test has."""
    mark = uuid.uuid4().hex[:8]
    return lambda name: re.sub(r"\W+", "-", f"{name} {mark}")


OpenScene = Callable[[Served, str], Scene]


@pytest.fixture
def open_scene() -> Iterator[OpenScene]:
    """Open scenes on servers of the test's own; they must have survived."""
    scenes: list[Scene] = []

    def open_scene(server: Served, way: str) -> Scene:
        scenes.append(Scene(server, way))
        return scenes[-1]

    yield open_scene
    for scene in scenes:
        scene.close()
    for scene in scenes:
        try:
            scene.check()
        except (AssertionError, TimeoutError) as error:
            # A case of skips.py may fail with those; what it leaves behind is another matter.
            raise RuntimeError(f"{scene.way}: {error}") from error


@pytest.fixture
def scene(way: str, starter: Starter, open_scene: OpenScene, request: Any) -> Scene:
    """A scene on the server that a module's tests share."""
    how: dict[str, Any] = getattr(request.module, "SERVED", {})
    return open_scene(starter.share(way, **how), way)


@pytest.fixture
def scenes(starter: Starter, open_scene: OpenScene, request: Any) -> list[Scene]:
    """A scene on each way to serve, for what is mostly waiting."""
    how: dict[str, Any] = getattr(request.module, "SERVED", {})
    return [open_scene(starter.share(way, **how), way) for way in WAYS]


def at_once(check: Callable[[Scene], None], scenes: Sequence[Scene]) -> None:
    """Check all scenes side by side."""
    with ThreadPoolExecutor(len(scenes)) as pool:
        for _ in pool.map(check, scenes):
            pass  # the first error comes out here


def sync_and_async(view: str) -> Sequence[str]:
    """Both kinds of a view."""
    return view, f"async/{view}"
