"""The quick start does what it says: its five snippets, taken from the document and run.

Added mechanically, and nothing else: for those that are a bare route, the first snippet's lines
before its route and those after it; a free port in place of 6969. Under uvicorn the
``app.run(...)`` line becomes ``asgi = websockets.asgi_app()``.
"""

from __future__ import annotations

import ast
import builtins
import json
import re
import signal
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

import flask_websockets

from .browser import Browser
from .conftest import ServerProcess
from .waiting import wait_until

DOCUMENT = Path(__file__).parents[2] / "docs" / "quickstart.rst"

#: Seconds for one message to come, on a loaded machine.
PATIENCE = 10.0
#: Seconds in which a server that got SIGINT must be gone.
EXIT_SECONDS = 3.0

#: Clients that come and go. More than threads that a server may happen to end at that time.
OTHERS = 8

TEXT, BINARY = "täxt", b"\x00binary\xff"


Behaviour = Callable[[ServerProcess, ClientConnection, ClientConnection], None]


# -- the snippets -----------------------------------------------------------------------------


def blocks(document: str, language: str) -> list[str]:
    """The code of each ``code-block`` directive of a language, without its options."""
    found = []
    lines = iter(document.splitlines())
    for line in lines:
        if line.strip() != f".. code-block:: {language}":
            continue
        block: list[str] = []
        for inner in lines:
            if inner.strip() and not inner.startswith(" "):
                break
            if not block and (not inner.strip() or re.match(r"\s+:[\w-]+:", inner)):
                continue
            block.append(inner)
        found.append(textwrap.dedent("\n".join(block)).strip() + "\n")
    return found


def around_the_route(snippet: str) -> tuple[str, str]:
    """What a snippet has before its first function, decorators included, and what after it."""
    function = next(node for node in ast.parse(snippet).body if isinstance(node, ast.FunctionDef))
    lines = snippet.splitlines(keepends=True)
    start = min(node.lineno for node in (function, *function.decorator_list))
    return "".join(lines[: start - 1]), "".join(lines[function.end_lineno :])


def missing_names(source: str) -> list[str]:
    """The names that *source* uses and neither defines, imports nor has built in."""
    used, bound = set(), set(dir(builtins))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.ExceptHandler)):
            bound.add(node.name)
        elif isinstance(node, ast.alias):
            bound.add(node.asname or node.name.split(".")[0])
    return sorted(used - bound)


def completed(snippet: str, first: str) -> str:
    """The program that a reader makes of a snippet."""
    if "app" in missing_names(snippet) or "websockets" in missing_names(snippet):
        before, after = around_the_route(first)
        snippet = f"{before}{snippet}{after}"
    assert missing_names(snippet) == []
    assert snippet.count("6969") == 1
    return snippet.replace("6969", "{port}")


SNIPPETS = blocks(DOCUMENT.read_text(encoding="utf-8"), "python")
PROGRAMS = [completed(snippet, SNIPPETS[0]) for snippet in SNIPPETS]
APP_RUN = re.compile(r"^app\.run\(.*\)$", re.MULTILINE)


# -- what each must do --------------------------------------------------------------------------


def end_of(client: ClientConnection) -> int:
    """Read what is left, and return the close code."""
    with pytest.raises(ConnectionClosed):
        while True:
            client.recv(timeout=PATIENCE)
    assert client.close_code is not None
    return client.close_code


def says_goodbye(server: ServerProcess, text: ClientConnection, binary: ClientConnection) -> None:
    """Any client will be disconnected, since the route does nothing with it."""
    for client, data in ((text, TEXT), (binary, BINARY)):
        try:
            client.send(data)
        except ConnectionClosed:
            pass  # the goodbye was faster
        assert end_of(client) == 1000


def echoes(server: ServerProcess, text: ClientConnection, binary: ClientConnection) -> None:
    """Every message comes back; as a binary frame, for the route calls send_bytes."""
    for _ in range(3):
        text.send(TEXT)
        assert text.recv(timeout=PATIENCE) == TEXT.encode()
        binary.send(BINARY)
        assert binary.recv(timeout=PATIENCE) == BINARY


def answers_json(server: ServerProcess, text: ClientConnection, binary: ClientConnection) -> None:
    """What is JSON comes back; what is none is answered, and the connection goes on."""
    for good, bad in (('{"a": [1]}', TEXT), (b"[2]", BINARY)):
        for client in (text, binary):
            client.send(good)
            assert json.loads(client.recv(timeout=PATIENCE)) == {"received": json.loads(good)}
            client.send(bad)
            assert list(json.loads(client.recv(timeout=PATIENCE))) == ["error"]


def keeps_listening(
    server: ServerProcess, text: ClientConnection, binary: ClientConnection
) -> None:
    """The connection stays open whatever the client says, and its view ends when it leaves."""
    with ExitStack() as others:
        for _ in range(OTHERS):
            answers_only_pings(others.enter_context(connect(url(server))), TEXT)
        threads = server.threads()
    wait_until(lambda: server.threads() <= threads - OTHERS, what="the end of the views")
    answers_only_pings(text, TEXT)
    answers_only_pings(binary, BINARY)


def answers_only_pings(client: ClientConnection, data: str | bytes) -> None:
    client.send(data)
    assert client.ping().wait(PATIENCE)
    with pytest.raises(TimeoutError):
        client.recv(timeout=0)


def tells_the_time(server: ServerProcess, text: ClientConnection, binary: ClientConnection) -> None:
    """Every client hears the server's time, again and again."""
    text.send(TEXT)
    binary.send(BINARY)
    for client in (text, binary):
        heard = [client.recv(timeout=PATIENCE) for _ in range(2)]
        assert all(isinstance(message, str) for message in heard)
        first, second = map(float, heard)
        assert first < second <= time.time()
        assert time.time() - first < 2 * PATIENCE


BEHAVIOURS = [says_goodbye, echoes, answers_json, keeps_listening, tells_the_time]
SNIPPET = pytest.mark.parametrize(
    ("program", "behaviour"),
    list(zip(PROGRAMS, BEHAVIOURS, strict=True)),
    ids=[behaviour.__name__ for behaviour in BEHAVIOURS],
)


def url(server: ServerProcess) -> str:
    return f"ws://localhost:{server.port}/ws"


@pytest.fixture(autouse=True)
def _interruptible() -> Iterator[None]:
    # A shell starts background jobs with SIGINT ignored, and children inherit that. They do not
    # inherit a handler: they begin with the default action.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def talk_and_interrupt(server: ServerProcess, behaviour: Behaviour) -> None:
    """Two clients find what the quick start promises, and Ctrl-C ends the server under them."""
    with connect(url(server)) as text, connect(url(server)) as binary:
        behaviour(server, text, binary)
        code, seconds = server.stop(signal.SIGINT)
        assert seconds < EXIT_SECONDS
        assert code == 0, server.log()
        end_of(text)
        end_of(binary)
    # The publisher's thread ends by NotRunning, which Python reports; nothing else fails.
    publishes = behaviour is tells_the_time
    log = server.log()
    assert log.count("Traceback") == publishes, log
    assert log.count("(publish_server_time)") == publishes, log
    assert ("flask_websockets.errors.NotRunning: " in log) == publishes, log


@SNIPPET
def test_under_app_run(
    development_server: Callable[[str], ServerProcess], program: str, behaviour: Behaviour
) -> None:
    """Pasted and started with Python, the snippet does what the quick start says."""
    talk_and_interrupt(development_server(program), behaviour)


@SNIPPET
def test_under_uvicorn(
    uvicorn_server: Callable[[str], ServerProcess], program: str, behaviour: Behaviour
) -> None:
    """Served by uvicorn, the same snippet does the same."""
    program, replaced = APP_RUN.subn("asgi = websockets.asgi_app()", program)
    assert replaced == 1
    talk_and_interrupt(uvicorn_server(program), behaviour)


@pytest.mark.browser
def test_the_lines_for_the_console(
    browser: Browser, development_server: Callable[[str], ServerProcess]
) -> None:
    """On the page that is not there they make a client, for the first two programs."""
    (lines,) = blocks(DOCUMENT.read_text(encoding="utf-8"), "javascript")
    said = "(said = [], console.log = (...words) => said.push(words.join(' ')), 1)"
    expected = {says_goodbye: "closed 1000", echoes: "hello"}
    for program, behaviour in zip(PROGRAMS, BEHAVIOURS, strict=True):
        if behaviour in expected:
            server = development_server(program)
            page = browser.open(f"http://localhost:{server.port}")
            page.run(said)
            page.run(f"{{ {lines.replace('6969', str(server.port))} }} 1")
            if behaviour is echoes:
                page.wait_for("ws.readyState === 1")
                page.run('ws.send("hello"), 1')
            page.wait_for("said.length > 0")
            assert page.run("said[0]") == expected[behaviour]
            server.stop(signal.SIGINT)


class TestExtraction:
    """What is run is what is written."""

    def test_five_snippets(self):
        """The document has five Python snippets, three of them a bare route."""
        assert [len(snippet.splitlines()) for snippet in SNIPPETS] == [11, 4, 11, 5, 24]
        assert [snippet.splitlines()[0] for snippet in SNIPPETS] == [
            "from flask import Flask",
            '@websockets.route("/ws")',
            "from flask_websockets import InvalidMessage",
            '@websockets.route("/ws")',
            "import time",
        ]

    def test_what_is_added(self):
        """The first snippet, around the routes."""
        before = (
            "from flask import Flask\nfrom flask_websockets import WebSocket, WebSockets\n\n"
            "app = Flask(__name__)\nwebsockets = WebSockets(app)\n\n"
        )
        after = '\napp.run(host="localhost", port=6969)\n'
        full, echo, answer, subscribe, publisher = SNIPPETS
        assert full.startswith(before)
        assert full.endswith(after)
        assert [program.replace("{port}", "6969") for program in PROGRAMS] == [
            full,
            before + echo + after,
            before + answer + after,
            before + subscribe + after,
            publisher,
        ]

    def test_every_missing_name_is_public(self):
        """A reader can import what a snippet leaves out."""
        for snippet in SNIPPETS:
            names = set(missing_names(snippet)) - {"websockets"}
            assert names <= set(flask_websockets.__all__)

    def test_every_line_is_run(self):
        """Each line of a snippet is in its program, in its order."""
        for snippet, program in zip(SNIPPETS, PROGRAMS, strict=True):
            lines = iter(program.replace("{port}", "6969").splitlines())
            assert all(line in lines for line in snippet.splitlines())
