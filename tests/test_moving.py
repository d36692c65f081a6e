"""The pages "coming from ...": what stands in their tables is there, and their programs run.

The other packages are no requirement of these tests. What is said of one is tried where a Python
that has it is found: this one, or the one that an environment variable names, as in
``FLASK_SOCKETS_PYTHON=/venvs/old/bin/python``. ``FLASK_WEBSOCKETS_PYTHON`` is the only way to the
older package, which has the name of this one.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import pytest
from flask import Flask
from websockets.exceptions import ConnectionClosedError, InvalidStatus
from websockets.sync.client import ClientConnection, connect

import flask_websockets
from flask_websockets import ConnectionClosed, WebSocket, WebSockets
from flask_websockets.cli import serve_command
from flask_websockets.config import Config
from flask_websockets.testing import ClientConnection as InProcess

from .integration.conftest import ServerProcess, free_port, launch
from .moving_cells import COMMON, find, parse, wrong

ROOT = Path(__file__).parent.parent
HOW_TO = ROOT / "docs" / "how-to"
PROGRAMS = HOW_TO / "moving"
#: Seconds for any wait of a test's own; a loaded machine starts Python slowly.
PATIENCE = 20.0

#: Page to the package that it is about.
PAGES = {
    "from-flask-sock": "flask_sock",
    "from-flask-socketio": "flask_socketio",
    "from-flask-sockets": "flask_sockets",
    "from-older-flask-websockets": "flask_websockets",
}
#: How the "before" of each package is served. ``b`` is its module.
SERVE = {
    "flask_sock": "import flask_sock_before as b; b.app.run(port=PORT)",
    "flask_websockets": "import older_before as b; b.app.run(port=PORT)",
    "flask_sockets": """\
from gevent import pywsgi
from geventwebsocket.handler import WebSocketHandler
import flask_sockets_before as b
server = pywsgi.WSGIServer(("127.0.0.1", PORT), b.app, handler_class=WebSocketHandler)
server.serve_forever()
""",
}
#: Beginnings of cells that are no Python.
SHELL = ("flask ", "gunicorn ", "uvicorn ", "pip ", "python ")


def rows(page: str) -> list[tuple[list[str], list[str]]]:
    """The literals of the first two cells of each row of a page's tables."""
    text = (HOW_TO / f"{page}.rst").read_text()
    found = []
    for table in re.findall(r"^\.\. list-table::\n((?:[ ]+.*\n|\n)+)", text, re.MULTILINE):
        for row in re.split(r"^    \* - ", table, flags=re.MULTILINE)[2:]:  # options, header
            cells = re.split(r"^      - ", row, flags=re.MULTILINE)
            old, new = (
                [" ".join(literal.split()) for literal in re.findall(r"``(.+?)``", cell, re.DOTALL)]
                for cell in cells[:2]
            )
            found.append((old, new))
    return found


def python(cells: list[str]) -> list[str]:
    return [cell for cell in cells if not cell.startswith(SHELL)]


NEW = [
    pytest.param(cell, id=f"{page}: {cell}")
    for page in PAGES
    for _, new in rows(page)
    for cell in new
]


def python_with(package: str) -> str:
    """A Python that has *package*; skips the test where there is none."""
    named = os.environ.get(f"{package.upper()}_PYTHON")
    if named:
        return named
    if package == "flask_websockets" or importlib.util.find_spec(package) is None:
        pytest.skip(f"there is no {package}: name a Python that has it in {package.upper()}_PYTHON")
    return sys.executable


@pytest.fixture
def serve(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Callable[..., ServerProcess]]:
    """Start a server with ``PORT`` in its command, beside the programs of the pages."""
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    servers = []

    def serve(command: list[str], port: int | None = None) -> ServerProcess:
        port = port or free_port()
        filled = [part.replace("PORT", str(port)) for part in command]
        servers.append(ServerProcess(filled, port, tmp_path / f"{len(servers)}.txt", PROGRAMS))
        servers[-1].wait_until_listening()
        return servers[-1]

    yield serve
    for server in servers:
        server.kill()


def serve_after(program: str) -> list[str]:
    command = [sys.executable, "-m", "flask", "--app", program, "websockets", "serve"]
    return [*command, "--port", "PORT"]


# -- the tables -----------------------------------------------------------------------------------


def test_the_tables_are_found():
    """Every page has a table of code on both sides, and this file finds it."""
    for page in PAGES:
        assert sum(bool(old and new) for old, new in rows(page)) >= 8, page


@pytest.mark.parametrize("cell", NEW)
def test_what_to_write_instead(cell):
    """Each cell of a right-hand column is code of which every name and argument is there."""
    if cell.startswith("flask --app"):
        check_command(cell)
        return
    if cell.startswith(SHELL):
        pytest.fail("a command that nobody checks")
    ours = find(COMMON) | {
        "flask_websockets": flask_websockets,
        "websockets": WebSockets,
        "ws": WebSocket,
        "error": ConnectionClosed,
        "client": type(WebSockets(Flask("app")).test_client()),
        "connection": InProcess,
        **{name: getattr(flask_websockets, name) for name in flask_websockets.__all__},
    }
    assert wrong(cell, ours) == []
    if cell.startswith(("@", "app.config")):
        run(cell)


def run(cell: str) -> None:
    """Really register the view, or read the setting."""
    app = Flask("app")
    websockets = WebSockets(app)
    names = {"app": app, "websockets": websockets, "bp": app, "blueprint": app}
    exec(compile(parse(cell), "cell", "exec"), names)
    Config.from_mapping(app.config)  # an unknown setting is a warning, which is an error here


def check_command(cell: str) -> None:
    """The command is one of the package's, and has these options."""
    words = cell.split()
    assert words[:2] == ["flask", "--app"]
    assert words[3:5] == ["websockets", "serve"]
    context = click.Context(serve_command)
    parser = serve_command.make_parser(context)
    parser.parse_args(words[5:])  # raises for an option that is not there


@pytest.mark.parametrize("page", PAGES)
def test_what_was_written_before(page):
    """Each cell of a left-hand column is code of which every name is in the package it is of."""
    package = PAGES[page]
    cells = [cell for old, _ in rows(page) for cell in python(old)]
    command = [python_with(package), str(Path(__file__).with_name("moving_cells.py")), package]
    result = subprocess.run(
        command, input=json.dumps(cells), capture_output=True, text=True, timeout=PATIENCE
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == []


# -- the programs, before and after ----------------------------------------------------------------


def post(server: ServerProcess, path: str, **form: str) -> urllib.request.addinfourl:
    data = urllib.parse.urlencode(form).encode()
    response = urllib.request.urlopen(server.url(path), data, timeout=PATIENCE)
    response.read()
    return response


def check_rooms(server: ServerProcess) -> None:
    """What is said in a room, by a member or over HTTP, comes to its members and nobody else."""

    @contextmanager
    def join(room: str) -> Iterator[ClientConnection]:
        url = server.ws_url(f"/ws/{room}")
        with connect(url, open_timeout=PATIENCE, close_timeout=PATIENCE, proxy=None) as ws:
            assert ws.recv(timeout=PATIENCE) == "welcome"
            yield ws

    with join("tea") as ann, join("tea") as bob, join("garden") as eve:
        ann.send("tea?")
        assert [ws.recv(timeout=PATIENCE) for ws in (ann, bob)] == ["tea?"] * 2
        post(server, "/say/tea", text="dinner!")
        assert [ws.recv(timeout=PATIENCE) for ws in (ann, bob)] == ["dinner!"] * 2
        eve.send("nobody here")
        assert eve.recv(timeout=PATIENCE) == "nobody here"
        bob.close()
        ann.send("gone?")
        assert ann.recv(timeout=PATIENCE) == "gone?"


def check_names(server: ServerProcess) -> None:
    """The same, with the names of who says it."""

    @contextmanager
    def join(name: str) -> Iterator[ClientConnection]:
        url = server.ws_url(f"/ws/tea?name={name}")
        with connect(url, open_timeout=PATIENCE, close_timeout=PATIENCE, proxy=None) as ws:
            assert json.loads(ws.recv(timeout=PATIENCE)) == {"welcome": name}
            yield ws

    with join("ann") as ann, join("bob") as bob:
        ann.send("tea?")
        for ws in (ann, bob):
            assert json.loads(ws.recv(timeout=PATIENCE)) == {"name": "ann", "text": "tea?"}
        post(server, "/say/tea", text="dinner!")
        for ws in (ann, bob):
            said = {"name": "the house", "text": "dinner!"}
            assert json.loads(ws.recv(timeout=PATIENCE)) == said
        bob.close()
        ann.send("gone?")
        assert json.loads(ann.recv(timeout=PATIENCE))["text"] == "gone?"


SCENARIOS = {
    "flask_sock": check_names,
    "flask_sockets": check_rooms,
    "flask_websockets": check_rooms,
}


def name_of_program(package: str) -> str:
    return "older" if package == "flask_websockets" else package


@pytest.mark.parametrize("package", SCENARIOS)
def test_before(package, serve):
    """The program that a page begins with does what it is for, with the package it is for."""
    SCENARIOS[package](serve([python_with(package), "-c", SERVE[package]]))


@pytest.mark.parametrize("package", SCENARIOS)
def test_after(package, serve):
    """The program that a page ends with does the same, for the same clients."""
    SCENARIOS[package](serve(serve_after(f"{name_of_program(package)}_after")))


BEFORE_SOCKETIO = """
import time
import flask_socketio_before as b

def client(name):
    http = b.app.test_client()
    http.post("/login", data={"name": name})
    return b.socketio.test_client(b.app, flask_test_client=http)

def events(client):
    return [(e["name"], e["args"][0]) for e in client.get_received() if e["name"] != "news"]

assert not b.socketio.test_client(b.app).is_connected()
ann, bob = client("ann"), client("bob")
ann.emit("join", {"room": "kitchen"})
bob.emit("join", {"room": "kitchen"})
assert ann.emit("say", {"room": "kitchen", "text": "tea?"}, callback=True) == "said"
ann.emit("whisper", {"to": "bob", "text": "psst"})
said = ("said", {"name": "ann", "text": "tea?"})
assert events(ann) == [("joined", {"name": "ann"}), ("joined", {"name": "bob"}), said]
whispered = ("whispered", {"name": "ann", "text": "psst"})
assert events(bob) == [("joined", {"name": "bob"}), said, whispered]
deadline = time.monotonic() + 10
while not any(e["name"] == "news" for e in bob.get_received()):
    assert time.monotonic() < deadline, "no news"
    time.sleep(0.05)
"""


def test_before_socketio():
    """The Flask-SocketIO program has rooms, acknowledgements, private messages and news."""
    result = subprocess.run(
        [python_with("flask_socketio"), "-c", BEFORE_SOCKETIO],
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        **{"cwd": PROGRAMS, "capture_output": True, "text": True, "timeout": 2 * PATIENCE},
    )
    assert result.returncode == 0, result.stderr


def cookie_of(server: ServerProcess, name: str) -> str:
    """The session of somebody who has logged in."""

    class Stay(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, *arguments: Any) -> None:
            return None

    data = urllib.parse.urlencode({"name": name}).encode()
    try:
        urllib.request.build_opener(Stay).open(server.url("/login"), data, PATIENCE)
    except urllib.error.HTTPError as redirect:
        with redirect:
            cookie: str = redirect.headers["Set-Cookie"].partition(";")[0]
            return cookie
    raise AssertionError("the login did not redirect")


def test_after_socketio(serve):
    """Its successor has the same, and an answer for what it does not know."""
    server = serve(serve_after("flask_socketio_after"))

    def join(name: str) -> ClientConnection:
        headers = {"Cookie": cookie_of(server, name)}
        return connect(
            server.ws_url("/ws/kitchen"),
            additional_headers=headers,
            close_timeout=PATIENCE,
            proxy=None,
        )

    def events(ws: ClientConnection) -> Iterator[tuple[str, Any]]:
        while True:
            message = json.loads(ws.recv(timeout=PATIENCE))
            yield message["event"], message["data"]

    def without_news(ws: ClientConnection) -> Iterator[tuple[str, Any]]:
        return (event for event in events(ws) if event[0] != "news")

    with pytest.raises(InvalidStatus, match="401"):
        connect(server.ws_url("/ws/kitchen"), proxy=None)
    with join("ann") as ann:
        to_ann = without_news(ann)
        assert next(to_ann) == ("joined", {"name": "ann"})
        with join("bob") as bob:
            to_bob = without_news(bob)
            assert next(to_ann) == next(to_bob) == ("joined", {"name": "bob"})
            ann.send(json.dumps({"event": "say", "text": "tea?", "id": 7}))
            said = ("said", {"name": "ann", "text": "tea?"})
            assert next(to_ann) == next(to_bob) == said
            assert next(to_ann) == ("ack", 7)
            ann.send(json.dumps({"event": "whisper", "to": "bob", "text": "psst"}))
            assert next(to_bob) == ("whispered", {"name": "ann", "text": "psst"})
            assert next(data for event, data in events(bob) if event == "news")["number"] > 0
            bob.send(json.dumps({"event": "say", "text": ["no", "text"], "id": 1}))
            with pytest.raises(ConnectionClosedError) as closed:
                for _ in range(1000):
                    bob.recv(timeout=PATIENCE)
            assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (1008, "unknown event")
    assert "Traceback" not in server.log()


@pytest.mark.browser
def test_the_page_after_socketio(serve, tmp_path):
    """The page without Socket.IO's client sends, gets its acknowledgement, and comes back."""
    command = serve_after("flask_socketio_after")
    server = serve(command)
    with launch(tmp_path) as browser:
        page = browser.open(server.url())
        page.run(
            "fetch('/login', {method: 'POST', body: new URLSearchParams({name: 'ann'})})"
            ".then(() => location.reload())"
        )
        page.wait_for("document.querySelector('li')?.textContent === 'ann is here'")
        page.run("text.value = '<b>tea?'; form.requestSubmit()")
        page.wait_for("document.querySelector('li:last-child').textContent === 'ann: <b>tea?'")
        page.wait_for("text.value === ''")
        page.wait_for("/^Kitchen [0-9]+$/.test(document.title)")
        server.kill()
        page.wait_for("socket.emit('say', {text: 'lost'}) === false")
        serve(command, server.port)
        page.wait_for("document.querySelectorAll('li').length === 3")
        assert page.run("document.querySelector('li:last-child').textContent") == "ann is here"


# -- what is said of the others --------------------------------------------------------------------


def test_flask_sockets_needs_an_old_flask(monkeypatch):
    """With a Flask of today its blueprints raise, and its routes match no handshake."""
    sockets_module = pytest.importorskip("flask_sockets")
    app = Flask("app")
    sockets = sockets_module.Sockets(app)
    sockets.add_url_rule("/ws", None, lambda ws: None)
    environ = {
        **{"HTTP_CONNECTION": "Upgrade", "HTTP_UPGRADE": "websocket", "wsgi.websocket": object()},
        **{"REQUEST_METHOD": "GET", "PATH_INFO": "/ws", "SERVER_NAME": "localhost"},
        **{"SERVER_PORT": "80", "wsgi.url_scheme": "http"},
    }
    with pytest.raises(Exception) as mismatch:
        app.wsgi_app(environ, lambda *arguments: None)
    assert type(mismatch.value).__name__ == "WebsocketMismatch"
    with pytest.raises(TypeError):
        sockets.register_blueprint(Flask("other"))


def test_the_programs_are_short():
    """Each program is one that a reader takes in at a glance, and its code compiles."""
    programs = sorted(PROGRAMS.glob("*.py"))
    assert len(programs) == 2 * len(PAGES)
    for program in programs:
        ast.parse(program.read_text())
        assert len(program.read_text().splitlines()) <= 70, program.name
