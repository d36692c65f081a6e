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

import pytest

from .browser import Browser, Page, find_chromium
from .waiting import wait_until

#: Seconds in which a server must answer; a loaded machine starts Python slowly.
START_TIMEOUT = 30.0

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
SCREENSHOTS = ROOT / "docs" / "_static" / "screenshots"
#: CSS pixels of a window.
SIZES = {"desktop": (1200, 800), "phone": (390, 844)}

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


# -- the examples, as somebody sees them ----------------------------------------------------------


@pytest.fixture
def start_example(start_server: Callable[..., ServerProcess]) -> Callable[..., ServerProcess]:
    """Serve ``examples/NAME`` as its README says, on a free port or on a given one."""

    def start(name: str, port: int | None = None) -> ServerProcess:
        command = [sys.executable, "-m", "flask", "--app", str(EXAMPLES / name / "app")]
        command += ["websockets", "serve", "--port", "{port}"]
        return start_server("", command, port=port)

    return start


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with launch(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.fixture(scope="session")
def other_chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with launch(tmp_path_factory.mktemp("other-browser")) as browser:
        yield browser


@pytest.fixture
def browser(chromium: Browser) -> Iterator[Browser]:
    """The system's Chromium."""
    yield chromium
    chromium.close_pages()


@pytest.fixture
def other_browser(other_chromium: Browser) -> Iterator[Browser]:
    """Another process of it, which shares nothing with the first."""
    yield other_chromium
    other_chromium.close_pages()


def launch(directory: Path, *flags: str) -> Browser:
    """Start the system's Chromium; the test is skipped where there is none."""
    if find_chromium() is None:
        pytest.skip("there is no Chromium on this system (chromium, google-chrome)")
    return Browser(directory, *flags)


@pytest.fixture
def photograph(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Page, str], None]:
    """Look at a page on a desktop and on a phone, in light and in dark.

    Nothing may be wider than the window. The pictures are the test's own; ``--screenshots`` writes
    those of the documentation anew.
    """
    kept = SCREENSHOTS if request.config.getoption("--screenshots") else tmp_path
    kept.mkdir(exist_ok=True)

    def photograph(page: Page, name: str) -> None:
        for size, (width, height) in SIZES.items():
            page.resize(width, height)
            for dark in (False, True):
                page.set_dark(dark)
                page.wait_for("document.getAnimations().every(a => a.playState !== 'running')")
                assert page.run("document.documentElement.scrollWidth <= innerWidth"), size
                path = kept / f"{name}-{size}-{'dark' if dark else 'light'}.png"
                page.screenshot(path)
                assert path.read_bytes().startswith(b"\x89PNG")

    return photograph
