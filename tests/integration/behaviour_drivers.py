"""The drivers of the behaviour suite: who serves ``behaviour_app``, and who speaks to it.

A driver is all that a test knows of a server: it opens WebSockets, asks HTTP, and reads what
the application noted under the test's key. The servers, and what is known to fail on them, stand in
``known_servers.py``.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from http.cookies import SimpleCookie
from importlib.metadata import version
from json import dumps
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import websockets.exceptions
from websockets.sync.client import ClientConnection as WebsocketsConnection
from websockets.sync.client import connect

from flask_websockets import ConnectionClosed, ConnectionRejected
from flask_websockets.testing import ClientConnection as OurConnection

from .conftest import ServerProcess, free_port
from .known_servers import BY_DEFAULT, SERVER_OF, Server, known
from .waiting import wait_until

#: Seconds that anything may take.
TIMEOUT = 10.0

#: What a test writes into a path and its query as it is to be sent.
SAFE = "/?&=%+"


class Headers(list[tuple[str, str]]):
    """Header fields in their order; names in lower case."""

    def __init__(self, pairs: Iterable[tuple[str, str]]) -> None:
        super().__init__((name.lower(), value) for name, value in pairs)

    def all(self, name: str) -> list[str]:
        return [value for key, value in self if key == name.lower()]

    def one(self, name: str) -> str | None:
        """The value of a header; None if it is absent. One that comes twice is an error."""
        values = self.all(name)
        assert len(values) < 2, f"{name} came {len(values)} times"
        return values[0] if values else None


@dataclass
class Answer:
    """An HTTP response."""

    status: int
    headers: Headers
    body: bytes = b""

    @property
    def text(self) -> str:
        return self.body.decode()

    def json(self) -> Any:
        return json.loads(self.body)


class Rejected(Exception):
    """The handshake was answered with an HTTP response."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(f"The handshake was answered with {answer.status}.")
        self.status = answer.status
        self.headers = answer.headers
        self.body = answer.body
        self.text = answer.text


class Closed(Exception):
    """The server closed the connection."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"The server closed with {code} ({reason}).")
        self.code = code
        self.reason = reason


class Connection:
    """The client's end of a connection. Every wait ends after :data:`TIMEOUT`."""

    #: Of the 101 response.
    headers: Headers
    #: What the server chose.
    subprotocol: str | None
    #: The server's, once a receive has met its close.
    close_code: int | None = None
    close_reason: str | None = None

    def send(self, data: str | bytes) -> None:
        """Send a text message for ``str``, a binary one for ``bytes``."""
        raise NotImplementedError

    def receive(self, timeout: float = TIMEOUT) -> str | bytes:
        """The next message.

        :raises Closed: if the server closed the connection.
        :raises TimeoutError: if nothing came.
        """
        try:
            return self._receive(timeout)
        except Closed as closed:
            self.close_code, self.close_reason = closed.code, closed.reason
            raise

    def close(self, code: int = 1000, reason: str = "") -> None:
        """Say goodbye."""
        raise NotImplementedError

    def _receive(self, timeout: float) -> str | bytes:
        raise NotImplementedError

    def receive_json(self) -> Any:
        """The next message, a text frame, parsed as JSON."""
        data = self.receive()
        assert isinstance(data, str), f"JSON goes in text frames; got {data!r}"
        return json.loads(data)

    def receive_many(self, count: int) -> list[str | bytes]:
        return [self.receive() for _ in range(count)]

    def receive_all(self) -> list[str | bytes]:
        """The messages until the server's close."""
        came = []
        with pytest.raises(Closed):
            while True:
                came.append(self.receive())
        return came

    def closed(self) -> tuple[int | None, str | None]:
        """How the server closed the connection, without another message before."""
        assert self.receive_all() == []
        return self.close_code, self.close_reason

    def still_works(self) -> None:
        """A message goes there and comes back; no other comes before it."""
        self.send("still there")
        assert self.receive() == "still there"


class Driver:
    """One test's way to a server: a browser's profile, with a cookie jar of its own."""

    #: Whether the server passes on the response to a handshake; else the client gets 403.
    denial_responses = True
    #: Whether a client gets every code, and the reason, of the application's close.
    close_code = close_reason = True
    #: Whether a view gets the code and the reason of the client's close.
    client_code = client_reason = True

    def __init__(self) -> None:
        self.key = uuid.uuid4().hex

    def connect(
        self,
        path: str,
        *,
        headers: Mapping[str, str] | None = None,
        subprotocols: Sequence[str] = (),
        origin: str | None = None,
        host: str | None = None,
    ) -> AbstractContextManager[Connection]:
        """Open a WebSocket. Leaving the block closes it.

        :param host: the host, and port, that the client believes in.
        :raises Rejected: on entering, if the handshake is refused.
        """
        sent = {"X-Test-Key": self.key, **(headers or {})}
        if origin is not None:
            sent["Origin"] = origin
        return self._connected(quote(path, safe=SAFE), sent, subprotocols, host)

    def rejected(self, path: str, **options: Any) -> Answer:
        """The response that refuses a handshake; its status as the client gets it."""
        with pytest.raises(Rejected) as caught, self.connect(path, **options):
            pass
        return Answer(caught.value.status, caught.value.headers, caught.value.body)

    def status(self, status: int) -> int:
        """What a client sees when the application refuses with *status*."""
        return status if self.denial_responses else 403

    def at_client(self, code: int, reason: str) -> tuple[int, str]:
        """What a client sees when the application closes with *code* and *reason*."""
        if not self.close_code and 1000 < code < 3000:
            code += 3000  # the next best, as the reference of the close codes says
        return code, reason if self.close_reason else ""

    def at_view(self, code: int, reason: str) -> tuple[int, str]:
        """What a view sees when the client closes with *code* and *reason*."""
        return code if self.client_code else 1006, reason if self.client_reason else ""

    def get(self, path: str, **options: Any) -> Answer:
        return self.request("GET", quote(path, safe=SAFE), **options)

    def post(self, path: str, **options: Any) -> Answer:
        """Post; ``json=`` is the body."""
        return self.request("POST", quote(path, safe=SAFE), **options)

    def request(
        self,
        method: str,
        path: str,
        *,
        headers: Mapping[str, str] | None = None,
        host: str | None = None,
        json: Any = None,
    ) -> Answer:
        raise NotImplementedError

    def add_cookie(self, name: str, value: str) -> None:
        raise NotImplementedError

    def _connected(
        self,
        path: str,
        headers: Mapping[str, str],
        subprotocols: Sequence[str],
        host: str | None,
    ) -> AbstractContextManager[Connection]:
        raise NotImplementedError

    # -- what happened in the server -------------------------------------------------------------

    def notes(self, *kinds: str) -> list[dict[str, Any]]:
        """What was noted so far, of these kinds or all."""
        came = self.get(f"/notes/{self.key}").json()
        return [note for note in came if not kinds or note["what"] in kinds]

    def note(self, kind: str) -> dict[str, Any]:
        """Wait for the one note of a kind."""
        found = wait_until(lambda: self.notes(kind), TIMEOUT, f"the note {kind!r}")
        assert len(found) == 1, f"expected one note {kind!r}; got {found}"
        only: dict[str, Any] = found[0]
        return only

    def after_teardown(self, *kinds: str, count: int = 1) -> list[dict[str, Any]]:
        """Wait for the teardown of *count* WebSockets; the notes of these kinds, or all."""
        wait_until(lambda: len(self.notes("teardown_appcontext")) >= count, TIMEOUT, "the teardown")
        return self.notes(*kinds)

    def warnings(self) -> list[str]:
        """The messages logged as warnings or worse, until a WebSocket was torn down."""
        return [
            note["message"]
            for note in self.after_teardown("logged")
            if note["level"] in ("WARNING", "ERROR", "CRITICAL")
        ]


# --- The test client -----------------------------------------------------------------------------


class InProcess(Driver):
    """``websockets.test_client()``."""

    def __init__(self) -> None:
        super().__init__()
        # Imported here: it takes the extension's log records.
        from .behaviour_app import websockets

        self._client = websockets.test_client()

    @contextmanager
    def _connected(
        self,
        path: str,
        headers: Mapping[str, str],
        subprotocols: Sequence[str],
        host: str | None,
    ) -> Iterator[Connection]:
        connection = self._client.websocket_connect(
            path,
            headers=headers,
            subprotocols=subprotocols,
            base_url=_base_url(host),
            timeout=TIMEOUT,
        )
        with ExitStack() as stack:
            try:
                stack.enter_context(connection)
            except ConnectionRejected as error:
                response = error.response
                raise Rejected(
                    Answer(response.status_code, Headers(response.headers), response.data)
                ) from None
            yield _InProcessConnection(connection)

    def request(
        self,
        method: str,
        path: str,
        *,
        headers: Mapping[str, str] | None = None,
        host: str | None = None,
        json: Any = None,
    ) -> Answer:
        response = self._client.open(
            path,
            method=method,
            headers={"X-Test-Key": self.key, **(headers or {})},
            base_url=_base_url(host),
            json=json,
        )
        with response:
            return Answer(response.status_code, Headers(response.headers), response.data)

    def add_cookie(self, name: str, value: str) -> None:
        self._client.set_cookie(name, value)


def _base_url(host: str | None) -> str | None:
    return None if host is None else f"http://{host}"


class _InProcessConnection(Connection):
    def __init__(self, connection: OurConnection) -> None:
        self._connection = connection
        self.headers = Headers(connection.handshake_headers)
        self.subprotocol = connection.accepted_subprotocol

    def send(self, data: str | bytes) -> None:
        self._connection.send(data)

    def close(self, code: int = 1000, reason: str = "") -> None:
        self._connection.close(code, reason)

    def _receive(self, timeout: float) -> str | bytes:
        try:
            return self._connection.receive(timeout)
        except ConnectionClosed as error:
            raise Closed(error.code, error.reason) from None


# --- Real servers -------------------------------------------------------------------------------


class OverTheWire(Driver):
    """A server in a process of its own; the websockets library and ``http.client`` speak to it."""

    def __init__(self, port: int, server: Server) -> None:
        super().__init__()
        self.port = port
        self.denial_responses = server.denial_responses
        self.close_code, self.close_reason = server.close_code, server.close_reason
        self.client_code, self.client_reason = server.client_code, server.client_reason
        self._cookies: dict[str, str] = {}

    @contextmanager
    def _connected(
        self,
        path: str,
        headers: Mapping[str, str],
        subprotocols: Sequence[str],
        host: str | None,
    ) -> Iterator[Connection]:
        address = ("127.0.0.1", self.port)
        uri = f"ws://{host or f'127.0.0.1:{self.port}'}{path}"
        with socket.create_connection(address, TIMEOUT) as sock, ExitStack() as stack:
            sock.settimeout(None)
            try:
                connection = stack.enter_context(
                    connect(
                        uri,
                        sock=sock,
                        subprotocols=list(subprotocols) or None,
                        additional_headers=[*headers.items(), *self._cookie_header()],
                        open_timeout=TIMEOUT,
                        close_timeout=TIMEOUT,
                    )
                )
            except websockets.exceptions.InvalidStatus as error:
                response = error.response
                came = Headers(response.headers.raw_items())
                self._keep_cookies(came)
                raise Rejected(
                    Answer(response.status_code, came, bytes(response.body or b""))
                ) from None
            made = _WireConnection(connection)
            self._keep_cookies(made.headers)
            yield made

    def request(
        self,
        method: str,
        path: str,
        *,
        headers: Mapping[str, str] | None = None,
        host: str | None = None,
        json: Any = None,
    ) -> Answer:
        sent = {"X-Test-Key": self.key, **dict(self._cookie_header()), **(headers or {})}
        if host is not None:
            sent["Host"] = host
        body = None
        if json is not None:
            sent["Content-Type"] = "application/json"
            body = dumps(json)
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT)
        try:
            connection.request(method, path, body, sent)
            response = connection.getresponse()
            answer = Answer(response.status, Headers(response.getheaders()), response.read())
        finally:
            connection.close()
        self._keep_cookies(answer.headers)
        return answer

    def add_cookie(self, name: str, value: str) -> None:
        self._cookies[name] = value

    def _cookie_header(self) -> list[tuple[str, str]]:
        pairs = "; ".join(f"{name}={value}" for name, value in self._cookies.items())
        return [("Cookie", pairs)] if pairs else []

    def _keep_cookies(self, headers: Headers) -> None:
        for header in headers.all("Set-Cookie"):
            for name, morsel in SimpleCookie(header).items():
                self._cookies[name] = morsel.value


class _WireConnection(Connection):
    def __init__(self, connection: WebsocketsConnection) -> None:
        self._connection = connection
        assert connection.response is not None
        self.headers = Headers(connection.response.headers.raw_items())
        self.subprotocol = connection.subprotocol

    def send(self, data: str | bytes) -> None:
        self._connection.send(data)

    def close(self, code: int = 1000, reason: str = "") -> None:
        self._connection.close(code, reason)

    def _receive(self, timeout: float) -> str | bytes:
        try:
            return self._connection.recv(timeout)
        except websockets.exceptions.ConnectionClosed as error:
            if error.rcvd is None:
                raise Closed(1006, "") from None
            raise Closed(error.rcvd.code, error.rcvd.reason) from None


@dataclass
class Serving:
    """A server for the tests of a module, each of which gets a driver of its own."""

    name: str
    driver: Callable[[], Driver]
    #: What the server wrote, when it has stopped.
    log: Callable[[], str] = field(default=lambda: "")


@contextmanager
def in_process(directory: Path) -> Iterator[Serving]:
    yield Serving("client", InProcess)


@contextmanager
def over_the_wire(name: str, directory: Path, app: str = "behaviour_app:asgi") -> Iterator[Serving]:
    """A server of the matrix, started beside the application."""
    with started(name, app, directory) as process:
        server, port = SERVER_OF[name], process.port
        yield Serving(name, lambda: OverTheWire(port, server), process.log)
        process.stop()
        # What a view raises is noted, not printed: this is somebody else's.
        log = process.log()
        assert "Traceback" not in log and "Exception" not in log, log


@contextmanager
def started(name: str, app: str, directory: Path) -> Iterator[ServerProcess]:
    """The process of a server of the matrix that serves *app*, of a module beside this one."""
    for module in {"behaviour_app", app.split(":")[0]}:
        shutil.copy(Path(__file__).with_name(f"{module}.py"), directory)
    server, port = SERVER_OF[name], free_port()
    # Not installed is a failure: whoever asks for a server wants it tested.
    version(server.distribution)
    command = [part.replace("{port}", str(port)) for part in server.command(name, app)]
    # Warnings are errors in the server as well.
    interpreter = [sys.executable, "-W", "error", *server.interpreter_options, "-m"]
    process = ServerProcess([*interpreter, *command], port, directory / "log.txt", directory)
    try:
        process.wait_until_listening()
        yield process
    finally:
        workers = children(process.pid)
        process.kill()
        for pid in workers:  # those of a server that was killed have nobody left
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def children(pid: int) -> list[int]:
    """The processes below one that runs, at any depth."""
    found = []
    with suppress(FileNotFoundError, ProcessLookupError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += [int(child) for child in (task / "children").read_text().split()]
    return [*found, *(deeper for child in found for deeper in children(child))]


DRIVERS: dict[str, Callable[[Path], AbstractContextManager[Serving]]] = {
    "client": in_process,
    **{name: partial(over_the_wire, name) for name in SERVER_OF},
}


# --- Fixtures, which a module of the suite takes by name -----------------------------------------


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a module that has this function on the servers of ``--servers``."""
    if "serving" in metafunc.fixturenames:
        names = chosen(metafunc.config.getoption("--servers"))
        metafunc.parametrize("serving", names, indirect=True, scope="module")


def chosen(servers: str) -> list[str]:
    """The drivers that ``--servers`` names.

    :raises pytest.UsageError: if there is no such driver.
    """
    if not servers:
        return BY_DEFAULT
    names = list(DRIVERS) if servers == "all" else servers.split(",")
    if unknown := [name for name in names if name not in DRIVERS]:
        raise pytest.UsageError(
            f"--servers: expected all, or some of {', '.join(DRIVERS)}; got {', '.join(unknown)}"
        )
    return names


@pytest.fixture(scope="module")
def serving(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Iterator[Serving]:
    """Each server once for a module; its tests tell their notes by their keys."""
    with DRIVERS[request.param](tmp_path_factory.mktemp("behaviour")) as serving:
        yield serving


@pytest.fixture
def driver(request: pytest.FixtureRequest, serving: Serving) -> Driver:
    """A way to the server; the failure of a case that is known there is expected."""
    expect_known(request.node, serving.name)
    return serving.driver()


def expect_known(test: pytest.Item, driver: str) -> None:
    """Expect the failure of a test that is known to fail on a driver."""
    case = test.name.replace(f"[{driver}-", "[").replace(f"[{driver}]", "")
    if isinstance(test.parent, pytest.Class):
        case = f"{test.parent.name}.{case}"
    for each in known(case, driver):
        reason = f"{driver} {each.version}: {each.reason}"
        if each.races:
            pytest.skip(reason)
        test.add_marker(pytest.mark.xfail(strict=True, reason=reason))


@pytest.fixture(params=["sync", "async"])
def kind(request: pytest.FixtureRequest) -> str:
    """The two kinds of views; every path begins with one."""
    name: str = request.param
    return name
