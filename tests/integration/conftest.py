"""Real servers for real clients: each test starts its own, on a free port, as a subprocess."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

#: Seconds in which a server must answer; a loaded machine starts Python slowly.
START_TIMEOUT = 30.0

#: What the five dependencies give, and what the extra ``fast`` gives.
IMPLEMENTATIONS = {
    "wsproto": ["--ws", "wsproto", "--http", "h11", "--loop", "asyncio"],
    "sansio": ["--ws", "websockets-sansio", "--http", "httptools", "--loop", "uvloop"],
}


@pytest.fixture(autouse=True, scope="session")
def interruptible() -> None:
    """A shell's background job ignores SIGINT, and so would every server that a test starts."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until(condition: Callable[[], Any], timeout: float = 10.0, what: str = "condition") -> Any:
    """Poll *condition* until it is true, and return its value; fail after *timeout* seconds."""
    deadline = time.monotonic() + timeout
    while True:
        if value := condition():
            return value
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not come true within {timeout:g} s")
        time.sleep(0.02)


class ServerProcess:
    """A server that runs as a subprocess on 127.0.0.1."""

    def __init__(self, command: list[str], port: int, log_path: Path, cwd: Path) -> None:
        self.port = port
        self._log_path = log_path
        with log_path.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )

    def wait_until_listening(self) -> None:
        def listening() -> bool:
            if self.process.poll() is not None:
                raise RuntimeError(f"The server ended with {self.process.poll()}:\n{self.log()}")
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
            except OSError:
                return False
            return True

        wait_until(listening, START_TIMEOUT, "the server's port")

    @property
    def pid(self) -> int:
        return self.process.pid

    def url(self, path: str = "/") -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def ws_url(self, path: str = "/") -> str:
        return f"ws://127.0.0.1:{self.port}{path}"

    def log(self) -> str:
        return self._log_path.read_text(errors="replace")

    def threads(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/task"))

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def resident_bytes(self) -> int:
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def stop(self, sig: int = signal.SIGTERM, timeout: float = 15.0) -> tuple[int, float]:
        """Signal the server; return its exit code and the seconds that it took to end."""
        started = time.monotonic()
        if self.process.poll() is None:
            self.process.send_signal(sig)
        code = self.process.wait(timeout)
        return code, time.monotonic() - started

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> str:
    """The name of uvicorn's WebSocket implementation: every test runs on both."""
    name: str = request.param
    return name


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[Callable[..., ServerProcess]]:
    """Start ``command``, with ``{port}`` in it, beside ``served.py`` made of *source*."""
    servers: list[ServerProcess] = []

    def start(
        source: str,
        command: list[str],
        *,
        port: int | None = None,
        beside: dict[str, str] | None = None,
    ) -> ServerProcess:
        number = len(servers)
        directory = tmp_path / f"server{number}"
        directory.mkdir()
        port = port or free_port()
        for name, text in (beside or {}).items():
            (directory / name).write_text(text)
        (directory / "served.py").write_text(textwrap.dedent(source).replace("{port}", str(port)))
        filled = [part.replace("{port}", str(port)) for part in command]
        server = ServerProcess(filled, port, directory / "log.txt", directory)
        servers.append(server)
        server.wait_until_listening()
        return server

    yield start
    for server in servers:
        server.kill()


@pytest.fixture
def uvicorn_server(
    start_server: Callable[..., ServerProcess], implementation: str
) -> Callable[..., ServerProcess]:
    """Serve ``asgi`` of a module with uvicorn, once with each implementation."""

    def start(source: str, *options: str) -> ServerProcess:
        command = [sys.executable, "-m", "uvicorn", "--port", "{port}", "--no-access-log"]
        command += [*IMPLEMENTATIONS[implementation], *options, "served:asgi"]
        return start_server(source, command)

    return start


@pytest.fixture
def development_server(
    start_server: Callable[..., ServerProcess], implementation: str
) -> Callable[..., ServerProcess]:
    """Run a module whose last line is ``app.run(port={port})``, once with each implementation."""

    def start(source: str) -> ServerProcess:
        # uvicorn takes the websockets library wherever it finds it, and wsproto otherwise.
        hidden = {"websockets.py": "raise ImportError"} if implementation == "wsproto" else {}
        return start_server(source, [sys.executable, "served.py"], beside=hidden)

    return start
