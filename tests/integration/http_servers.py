"""The servers of the HTTP suite, and what is known to fail on them."""

from __future__ import annotations

import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from .conftest import ServerProcess, free_port
from .http_client import Answer, Client, Headers
from .waiting import wait_until

UVICORN = ["uvicorn", "--port", "{port}", "--no-access-log", "--timeout-graceful-shutdown", "3"]
# Without workers hypercorn serves in the process that was started.
HYPERCORN = ["hypercorn", "-w", "0", "--bind", "127.0.0.1:{port}", "--graceful-timeout", "3"]
GUNICORN = ["gunicorn", "--no-control-socket", "-b", "127.0.0.1:{port}", "--graceful-timeout", "3"]

#: gunicorn serves the WSGI application itself: the reference.
COMMANDS = {
    "gunicorn": [*GUNICORN, "-k", "gthread", "--threads", "40", "http_app:app"],
    "uvicorn-httptools": [*UVICORN, "--http", "httptools", "--loop", "uvloop", "http_app:asgi"],
    "uvicorn-h11": [*UVICORN, "--http", "h11", "--loop", "asyncio", "http_app:asgi"],
    "hypercorn-asyncio": [*HYPERCORN, "-k", "asyncio", "http_app:asgi"],
    "hypercorn-trio": [*HYPERCORN, "-k", "trio", "http_app:asgi"],
}


class Known(NamedTuple):
    """A case that cannot pass on a server; one that starts to pass fails the suite."""

    case: str
    server: str
    version: str
    reason: str
    #: It passes now and then, by a race within the server: it is not run there.
    races: bool = False


#: Where the reference is wrong, and where a server leaves the application no choice.
KNOWN = [
    Known(
        "test_no_100_before_413",
        "gunicorn",
        "27.0.1",
        "gunicorn.http.wsgi.create sends the 100 before it calls the application",
    ),
    Known("test_raw_target[REQUEST_URI]", "gunicorn", "27.0.1", "it gives RAW_URI alone"),
    Known("test_split_cookies", "gunicorn", "27.0.1", "it joins every field with a comma"),
    Known(
        "test_100_copies",
        "gunicorn",
        "27.0.1",
        "its limit_request_fields of 100 counts all fields, Host too",
    ),
    Known("test_restart", "gunicorn", "27.0.1", "Response.process_headers adds to the old ones"),
    Known("test_after_an_empty_chunk", "gunicorn", "27.0.1", "write(b'') sends the headers"),
    Known("test_context_variables", "gunicorn", "27.0.1", "a thread's context serves them all"),
    Known(
        "test_context_variables_of_a_pipeline",
        "gunicorn",
        "27.0.1",
        "a thread's context serves them all",
    ),
    Known(
        "test_cut_upload_is_not_whole",
        "gunicorn",
        "27.0.1",
        "LengthReader gives a short body without error, or raises ConnectionResetError",
    ),
    Known(
        "test_upload[reset]", "gunicorn", "27.0.1", "ConnectionResetError may reach the view", True
    ),
    Known("test_chunked_upload", "gunicorn", "27.0.1", "NoMoreData or an OSError reaches the view"),
    Known(
        "test_http_1_0_stream",
        "uvicorn-httptools",
        "0.54.0",
        "RequestResponseCycle.send chunks whatever has no Content-Length, for HTTP/1.0 too",
    ),
    *(
        Known(
            "test_no_100_before_413",
            server,
            "0.18.0",
            "H11Protocol._handle_events sends the 100 as soon as the head is parsed",
        )
        for server in ("hypercorn-asyncio", "hypercorn-trio")
    ),
]


class Server:
    """One of the servers, and the questions that a test asks it."""

    def __init__(self, name: str, process: ServerProcess) -> None:
        self.name = name
        self.process = process

    @property
    def port(self) -> int:
        return self.process.port

    @property
    def is_reference(self) -> bool:
        return self.name == "gunicorn"

    def connect(self, **options: Any) -> Client:
        return Client(self.port, **options)

    def ask(
        self,
        method: str,
        target: str,
        headers: Headers = (),
        body: bytes | None = None,
        **options: Any,
    ) -> Answer:
        """One request on a connection of its own."""
        with self.connect() as client:
            return client.ask(method, target, headers, body, **options)

    def get(self, target: str, headers: Headers = (), **options: Any) -> Answer:
        return self.ask("GET", target, headers, **options)

    def records(self, key: str) -> list[str]:
        recorded: list[str] = self.get(f"/records/{key}").json()
        return recorded

    def wait_for(self, key: str, what: str) -> list[str]:
        """Wait for a record, and return all that came until then."""

        def recorded() -> list[str] | None:
            records = self.records(key)
            return records if what in records else None

        came: list[str] = wait_until(recorded, what=f"the record {what!r}")
        return came

    def release(self, key: str) -> None:
        assert self.ask("POST", f"/release/{key}", body=b"").status == 200


def settled(read: Callable[[], int], quiet: float = 1.0) -> int:
    """Wait until a figure above 0 has not changed for *quiet* seconds, and return it."""
    last, since = 0, time.monotonic()

    def unchanged() -> bool:
        nonlocal last, since
        if (now := read()) != last:
            last, since = now, time.monotonic()
        return last > 0 and time.monotonic() - since > quiet

    wait_until(unchanged, 30.0, "a figure that does not change")
    return last


@pytest.fixture(scope="module", params=COMMANDS)
def server(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Iterator[Server]:
    """Each server once for a module: its cases share it, and tell their records by keys."""
    directory: Path = tmp_path_factory.mktemp(request.param)
    shutil.copy(Path(__file__).with_name("http_app.py"), directory)
    port = free_port()
    command = [part.replace("{port}", str(port)) for part in COMMANDS[request.param]]
    process = ServerProcess(
        [sys.executable, "-m", *command], port, directory / "log.txt", directory
    )
    try:
        process.wait_until_listening()
        yield Server(request.param, process)
        process.stop()
    finally:
        process.kill()


@pytest.fixture
def key() -> str:
    """The key of a test's records."""
    return uuid.uuid4().hex


@pytest.fixture(autouse=True)
def known_failures(request: pytest.FixtureRequest, server: Server) -> None:
    """Expect the failure of a case that is in the table for this server."""
    name = request.node.name
    case = name.replace(f"{server.name}-", "").replace(f"-{server.name}", "")
    for known in KNOWN:
        if known.server == server.name and known.case in (request.node.originalname, case):
            reason = f"{known.server} {known.version}: {known.reason}"
            if known.races:
                pytest.skip(reason)
            request.node.add_marker(pytest.mark.xfail(strict=True, reason=reason))
