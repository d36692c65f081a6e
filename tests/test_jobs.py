"""A job in another process publishes through the server, as the page about publishing says."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from websockets.sync.client import ClientConnection, connect

from .integration.conftest import ServerProcess, free_port
from .integration.waiting import wait_until

PROGRAMS = Path(__file__).parent.parent / "docs" / "how-to" / "jobs"
TOKEN = "a token of the test's"
TIMEOUT = 10.0


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ServerProcess]:
    monkeypatch.setenv("PUBLISH_TOKEN", TOKEN)
    port = free_port()
    command = [sys.executable, "-m", "flask", "--app", str(PROGRAMS / "app"), "websockets", "serve"]
    server = ServerProcess([*command, "--port", str(port)], port, tmp_path / "log.txt", tmp_path)
    try:
        server.wait_until_listening()
        monkeypatch.setenv("SERVER", server.url("").rstrip("/"))
        yield server
        assert server.stop()[0] == 0
        assert "Traceback" not in server.log()
    finally:
        server.kill()


def run_job() -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(PROGRAMS / "job.py")]
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)


def post(server: ServerProcess, channel: str, token: str, text: str) -> int:
    """The status of a publish through the server."""
    # urllib sends a header's characters as latin-1; the server is to see UTF-8.
    header = f"Bearer {token}".encode().decode("latin-1")
    url = server.url(f"/internal/publish/{channel}")
    try:
        request = Request(url, text.encode(), {"Authorization": header})
        with urlopen(request, timeout=TIMEOUT) as answer:
            status: int = answer.status
    except HTTPError as error:
        with error:
            status = error.code
    return status


@contextmanager
def subscribed(server: ServerProcess) -> Iterator[ClientConnection]:
    """A subscriber of the jobs: the accept comes before the subscription."""
    with connect(server.ws_url("/jobs"), proxy=None) as subscriber:

        def heard() -> bool:
            post(server, "jobs", TOKEN, "probe")
            with suppress(TimeoutError):
                subscriber.recv(timeout=0.1)
                return True
            return False

        wait_until(heard, TIMEOUT, "a subscriber")
        post(server, "jobs", TOKEN, "the last one")
        while subscriber.recv(timeout=TIMEOUT) != "the last one":
            pass
        yield subscriber


def test_a_job_is_heard(server, monkeypatch):
    """Subscribers get what a job in another process publishes, in its order, and no stranger's."""
    with subscribed(server) as subscriber:
        monkeypatch.setenv("PUBLISH_TOKEN", "another one")
        refused = run_job()
        assert refused.returncode == 1
        assert "HTTP Error 401" in refused.stderr
        monkeypatch.setenv("PUBLISH_TOKEN", TOKEN)
        done = run_job()
        assert (done.returncode, done.stderr) == (0, "")
        heard = [json.loads(subscriber.recv(timeout=TIMEOUT)) for _ in range(5)]
    assert heard == [{"job": "resize", "percent": percent} for percent in (0, 25, 50, 75, 100)]


@pytest.mark.parametrize(
    ("channel", "token", "status"),
    [
        ("news", TOKEN, 204),
        ("nwes", TOKEN, 404),
        ("news", "", 401),
        ("news", "ä", 401),
        ("nwes", "", 401),
    ],
)
def test_what_the_view_answers(server, channel, token, status):
    """Without the token nobody learns which channels there are."""
    assert post(server, channel, token, "text") == status


def test_without_a_server(monkeypatch):
    """A job hears at once that there is no server."""
    monkeypatch.setenv("PUBLISH_TOKEN", TOKEN)
    monkeypatch.setenv("SERVER", f"http://127.0.0.1:{free_port()}")
    alone = run_job()
    assert alone.returncode == 1
    assert "urllib.error.URLError" in alone.stderr


def test_where_no_server_has_started(server):
    """In another process ``publish`` itself reaches nobody, and raises nothing."""
    code = "from app import websockets; websockets.publish('lost', 'jobs'); print('done')"
    command = [sys.executable, "-c", code]
    with subscribed(server) as subscriber:
        shell = subprocess.run(
            command, cwd=PROGRAMS, capture_output=True, text=True, timeout=TIMEOUT, check=True
        )
        assert (shell.stdout, shell.stderr) == ("done\n", "")
        assert run_job().returncode == 0
        assert json.loads(subscriber.recv(timeout=TIMEOUT))["percent"] == 0
