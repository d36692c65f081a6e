"""What the explanations say of threads, messages and figures is true."""

from __future__ import annotations

import ast
import json
import re
import select
import socket
import sys
import textwrap
import threading
import types
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from flask import Flask, abort
from sqlalchemy import create_engine
from sqlalchemy.orm import scoped_session, sessionmaker

from flask_websockets import AsyncWebSocket, ConnectionClosed, Stats, WebSocket, WebSockets

from .integration.browser import Browser
from .integration.conftest import launch
from .integration.serving import TIMEOUT, Served, Start, request_head, serving
from .integration.waiting import wait_until

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "flask_websockets"
EXPLANATIONS = ROOT / "docs" / "explanation"
PAGES = sorted(EXPLANATIONS.glob("*.rst"))


def text_of(page: str) -> str:
    return (EXPLANATIONS / f"{page}.rst").read_text()


def blocks(page: str, language: str = "python") -> list[str]:
    """The code blocks of a page."""
    mark = rf"^\.\. code-block:: {language}\n\n"
    found = re.findall(rf"{mark}((?:    .*\n|\n)+)", text_of(page), re.M)
    return [textwrap.dedent(block) for block in found]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Start]:
    with serving(tmp_path) as start:
        yield start


@pytest.fixture
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with launch(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


# -- what is named exists -------------------------------------------------------------------------


def named_tests(page: str) -> set[tuple[str, str]]:
    return set(re.findall(r"``tests/([\w/]+\.py)::([\w:]+)``", text_of(page)))


def has_test(file: str, name: str) -> bool:
    """Whether a file of tests has one of that name."""
    path = ROOT / "tests" / file
    *owners, function = name.split("::")
    body: list[ast.stmt] = ast.parse(path.read_text()).body if path.exists() else []
    for owner in owners:
        classes = [node for node in body if isinstance(node, ast.ClassDef) and node.name == owner]
        body = classes[0].body if classes else []
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    return any(isinstance(node, functions) and node.name == function for node in body)


@pytest.mark.parametrize(("page", "least"), [("threads", 6), ("delivery", 15), ("why", 1)])
def test_named_tests_exist(page, least):
    """Each test that a page names for what it says is there."""
    named = named_tests(page)
    assert len(named) >= least
    assert [f"{file}::{name}" for file, name in sorted(named) if not has_test(file, name)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_line_is_too_long(page):
    """100 columns, as in the code."""
    lines = [line for line in page.read_text().splitlines() if len(line) > 100]
    # Neither a test's id nor an option can be broken.
    assert [
        line for line in lines if not re.fullmatch(r" +(?:- )?(?:``tests/\S+``,?|:alt: .+)", line)
    ] == []


def last_cells(text: str) -> list[str]:
    """The last cell of each row of the tables."""
    rows = re.findall(r"^    \* - (?:.*\n)(?: {6,}.*\n)+", text, re.M)
    return [re.split(r"^      -", row, flags=re.M)[-1] for row in rows]


def test_counters_and_codes_of_the_delivery_page():
    """Each counter it names is one of the statistics, each close code one of the reference."""
    text = text_of("delivery")
    tables = text.partition("At each bound\n---")[2].partition("What is not promised, and")[0]
    counters = set(re.findall(r"(?<![:`])`(\w+)`(?!`)", " ".join(last_cells(tables))))
    assert len(counters) > 12
    assert counters <= {field.name for field in fields(Stats)}
    reference = (ROOT / "docs" / "reference" / "close-codes.rst").read_text()
    known = set(re.findall(r"\b[14]\d{3}\b", reference))
    ends = tables.partition("How it ends\n---")[2]
    named = set(re.findall(r"\b([14]\d{3})\b", ends))
    assert len(named) > 8
    assert named <= known


# -- where a message goes -------------------------------------------------------------------------


def steps() -> list[str]:
    """The steps of a message, each with all its lines."""
    section = text_of("architecture").partition("Where does a message go?\n---")[2]
    section = section.partition("In a few sentences")[0]
    return re.findall(r"^\d+\. \*\*.+(?:\n   .+)*", section, re.M)


def test_there_are_eight_steps():
    """In the text and in the picture, from one to eight."""
    assert [step[0] for step in steps()] == [*"12345678"]
    numbers = [
        element.text
        for element in ElementTree.parse(EXPLANATIONS / "architecture.svg").iter()
        if element.get("class") == "number"
    ]
    assert numbers == [*"12345678"]


def test_the_steps_name_modules_and_methods():
    """Each step but the server's names what does it, and there is such a method there."""
    for step in steps()[1:]:
        named = re.findall(r"`([a-z.]+)\.([A-Z]\w+)\.(\w+)`", step)
        assert named, step
        for module, owner, method in named:
            tree = ast.parse((PACKAGE / f"{module.replace('.', '/')}.py").read_text())
            (found,) = [
                node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == owner
            ]
            assert method in {getattr(node, "name", None) for node in found.body}, step


def test_the_picture_is_for_light_and_dark():
    """Each colour of its style has another one in the dark."""
    text = (EXPLANATIONS / "architecture.svg").read_text()
    light, dark = text[: text.index("</style>")].split("@media (prefers-color-scheme: dark)")
    coloured = re.findall(r"([.\w-]+) \{[^}]*#[0-9a-f]{6}", light)
    assert set(coloured) == set(re.findall(r"([.\w-]+) \{[^}]*#[0-9a-f]{6}", dark))
    assert len(coloured) > 5


# -- figures --------------------------------------------------------------------------------------


def test_the_promises_are_the_benchmarks():
    """The table of the page is the one that the benchmark's own page has, row by row."""
    text = (ROOT / "benchmarks" / "README.md").read_text()
    section = text[text.index("### Promises\n\n`python -m") : text.index("### With wsproto")]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    measured = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines]
    page = text_of("performance")
    table = page.partition(".. promises\n")[2].partition(".. end of promises")[0]
    shown = [
        tuple(cell.strip() for cell in row.split("\n      - "))
        for row in re.findall(r"^    \* - ((?:.+\n      - )+.+)$", table, re.M)
    ]
    assert len(measured) > 20
    assert shown == measured


# -- threads --------------------------------------------------------------------------------------


def names_of_threads() -> dict[str, re.Pattern[str]]:
    """What the page calls the threads, and what their names look like."""
    table = text_of("threads").partition("Which threads there are")[2].partition("Tested by")[0]
    found = {}
    for cell in re.findall(r"^    \* - (``.+``)$", table, re.M):
        for name in re.findall(r"``(.+?)``", cell):
            pattern = re.escape(name).replace("PATH", r"/\S*")
            found[name] = re.compile(re.sub(r"(?<![A-Za-z])N(?![A-Za-z])", r"\\d+", pattern))
    return found


def explained(threads: list[str]) -> set[str]:
    """The page's names for threads; each must have one."""
    found = set()
    for thread in threads:
        names = [name for name, look in names_of_threads().items() if look.fullmatch(thread)]
        assert len(names) == 1, thread
        found.add(names[0])
    return found


SERVED = """
    import asyncio
    import threading
    import time

    from flask import Flask, jsonify
    from flask_websockets import WebSockets

    app = Flask(__name__)
    app.config.from_prefixed_env()
    websockets = WebSockets(app)
    finished = threading.Event()


    @websockets.identify
    def user():
        return "Ann"


    @websockets.recheck(every=60)
    def may_stay(user):
        return True


    @app.get("/threads")
    def threads():
        return jsonify([thread.name for thread in threading.enumerate()])


    @app.get("/async-threads")
    async def async_threads():
        return threads()


    @app.get("/finished")
    def is_finished():
        return jsonify(finished.is_set())


    @app.get("/finish")
    def finish():
        finished.set()
        return "so be it"


    @app.get("/stream")
    def stream():
        def tick():
            while True:
                yield "data: tick\\n\\n"
                time.sleep(0.05)

        return app.response_class(tick(), mimetype="text/event-stream")


    @websockets.route("/plain/<name>")
    def plain(ws, name):
        ws.send("here")
        for data in ws.iter_data():
            ws.send(data)


    @websockets.route("/async")
    async def on_the_loop(ws):
        await asyncio.to_thread(len, "")
        await ws.send("here")
        await ws.wait_closed()


    @websockets.route("/compute")
    def compute(ws):
        ws.send("computing")
        while not finished.is_set():
            pass
        ws.send("done")


    @websockets.route("/async-compute")
    async def compute_on_the_loop(ws):
        await ws.send("computing")
        time.sleep(0.5)
        finished.set()


    if __name__ == "__main__":
        app.run(port={port})
"""


def threads_of(server: Served, path: str = "/threads") -> list[str]:
    threads: list[str] = json.loads(server.fetch(path).body)
    return threads


def test_the_threads_of_serve(serve):
    """Two plain views, an async one and HTTP: each thread has a row, and the view its own."""
    server = serve(SERVED)
    with (
        server.connect("/plain/one") as one,
        server.connect("/plain/two") as two,
        server.connect("/async") as other,
    ):
        for ws in (one, two, other):
            assert ws.recv(timeout=TIMEOUT) == "here"
        gone = "flask-websockets-view /async"  # the handshake's
        wait_until(lambda: gone not in threads_of(server), TIMEOUT, "the end of a handshake")
        threads = threads_of(server)
        assert [name for name in threads if "-view " in name] == [
            "flask-websockets-view /plain/one",
            "flask-websockets-view /plain/two",
        ]
        assert explained(threads) == {
            "MainThread",
            "flask-websockets-view PATH",
            "flask-websockets-http-N",
            "flask-websockets-rounds",
            "flask-websockets-watchdog",
            "flask-websockets-last-words",
            "uvloop_N",
        }
        assert "ThreadPoolExecutor-N_0" in explained(threads_of(server, "/async-threads"))


def test_the_threads_of_app_run(serve):
    """The loop has a thread of its own there, and HTTP has Werkzeug's."""
    server = serve(SERVED, command=(sys.executable, "served.py"))
    with server.connect("/plain/one") as one, server.connect("/async") as other:
        for ws in (one, other):
            assert ws.recv(timeout=TIMEOUT) == "here"
        assert explained(threads_of(server)) - {"flask-websockets-view PATH"} == {
            "MainThread",
            "flask-websockets-loop",
            "flask-websockets-rounds",
            "Thread-N (process_request_thread)",
            "asyncio_N",
        }


def test_every_name_of_a_thread_is_explained():
    """The page has each name that the code gives to a thread, and invents none."""
    source = "".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    starts = r"Thread\([^\n]*name=f?|name = f|name=f?|name, yields = f|_thread\(run, |LoopThread\("
    given = set(re.findall(rf'(?:{starts})"(flask-websockets-[a-z]+)', source))
    # The watchdog's two are named in one loop.
    given |= {"flask-websockets-watchdog", "flask-websockets-last-words"}
    names = {name for name in names_of_threads() if name.startswith("flask-websockets-")}
    assert {re.sub(r"[ -](?:PATH|N)$", "", name) for name in names} == given
    assert source.count('"flask-websockets-') == len(given) - 1


def test_a_plain_view_that_computes_stops_nobody(serve):
    """While it does, HTTP is answered and another view echoes."""
    server = serve(SERVED)
    with server.connect("/compute") as busy, server.connect("/plain/one") as other:
        assert busy.recv(timeout=TIMEOUT) == "computing"
        assert other.recv(timeout=TIMEOUT) == "here"
        other.send("still?")
        assert other.recv(timeout=TIMEOUT) == "still?"
        assert server.fetch("/finish").body == b"so be it"
        assert busy.recv(timeout=TIMEOUT) == "done"


def test_an_async_view_that_computes_stops_everybody(serve):
    """A request that comes meanwhile is answered when it has finished, not before."""
    server = serve(SERVED)
    with server.connect("/async-compute") as busy:
        assert busy.recv(timeout=TIMEOUT) == "computing"
        assert json.loads(server.fetch("/finished").body) is True


def test_a_stream_of_events_takes_an_http_thread(serve):
    """With as many streams as threads a page waits until one ends; a WebSocket does not."""
    server = serve(SERVED, settings={"HTTP_THREADS": 2})

    def ask(path: str) -> socket.socket:
        connection = server.open()
        connection.sendall(request_head("GET", path))
        return connection

    with ask("/stream") as first, ask("/stream") as second:
        for stream in (first, second):
            assert b"200 OK" in stream.recv(1000)
        with ask("/finished") as page, server.connect("/plain/one") as ws:
            assert ws.recv(timeout=TIMEOUT) == "here"
            ws.send("and we?")
            assert ws.recv(timeout=TIMEOUT) == "and we?"
            assert select.select([page], [], [], 0.5)[0] == []
            first.close()
            assert b"200 OK" in page.recv(1000)


def test_what_belongs_to_a_thread(app, websockets, client):
    """threading.local and scoped_session: a plain view's own, and one for all async views."""
    local = threading.local()
    engine = create_engine("sqlite://")
    sessions = scoped_session(sessionmaker(engine))

    def look() -> dict[str, Any]:
        local.visits = getattr(local, "visits", 0) + 1
        return {"visits": local.visits, "session": id(sessions())}

    @websockets.route("/plain")
    def plain(ws: WebSocket) -> None:
        for _ in ws.iter_data():
            ws.send_json(look())
        sessions.remove()

    @websockets.route("/async")
    async def on_the_loop(ws: AsyncWebSocket) -> None:
        async for _ in ws.iter_data():
            await ws.send_json(look())

    def looks(path: str) -> list[dict[str, Any]]:
        with (
            client.websocket_connect(path, timeout=TIMEOUT) as one,
            client.websocket_connect(path, timeout=TIMEOUT) as other,
        ):
            found = []
            for ws in (one, one, other):
                ws.send("look")
                found.append(ws.receive_json())
            return found

    first, second, others = looks("/plain")
    assert [found["visits"] for found in (first, second, others)] == [1, 2, 1]
    assert first["session"] == second["session"] != others["session"]
    first, second, others = looks("/async")
    assert [found["visits"] for found in (first, second, others)] == [1, 2, 3]
    assert first["session"] == second["session"] == others["session"]
    engine.dispose()


# -- messages -------------------------------------------------------------------------------------


@pytest.fixture
def documented(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], dict[str, Any]]:
    """Run the block of the page of delivery that has a route, with the module ``app`` beside it."""

    def run(route: str) -> dict[str, Any]:
        module = types.ModuleType("app")
        module.app = Flask("app")  # type: ignore[attr-defined]
        module.websockets = WebSockets(module.app)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "app", module)
        (code,) = [block for block in blocks("delivery") if f'route("{route}")' in block]
        namespace: dict[str, Any] = {"__name__": "block"}
        exec(compile(code, "delivery", "exec", dont_inherit=True), namespace)
        namespace["client"] = module.websockets.test_client()  # type: ignore[attr-defined]
        return namespace

    return run


MADE_HERE = """
from flask import Flask
from flask_websockets import WebSockets

app = Flask(__name__)
websockets = WebSockets(app)
"""


def test_an_order_is_stored_once(documented):
    """A client that repeats what was not answered, on another connection too, has one order."""
    page = documented("/orders")
    order = {"id": "one", "item": "tea"}
    with page["client"].websocket_connect("/orders", timeout=TIMEOUT) as ws:
        for _ in range(2):
            ws.send_json(order)
            assert ws.receive_json() == {"stored": "one"}
        ws.send_json({"id": "two", "item": "milk"})
        assert ws.receive_json() == {"stored": "two"}
        ws.send_json({"id": "lost", "item": "sugar"})  # and its answer is not waited for
    with page["client"].websocket_connect("/orders", timeout=TIMEOUT) as ws:
        ws.send_json({"id": "lost", "item": "sugar"})
        assert ws.receive_json() == {"stored": "lost"}
    rows = page["database"].execute("SELECT * FROM orders ORDER BY item").fetchall()
    page["database"].close()
    assert rows == [("two", "milk"), ("lost", "sugar"), ("one", "tea")]


def test_nothing_is_missed_and_nothing_comes_twice(documented):
    """Three threads write while a client follows the page's rules and loses its connection."""
    page = documented("/news")
    client, total = page["client"], 600
    rows = iter(range(total))
    failures: list[BaseException] = []

    def write() -> None:
        writer = page["app"].test_client()
        try:
            for number in rows:
                assert writer.post("/news", data={"text": f"{number}"}).status_code == 200
        except BaseException as error:
            failures.append(error)

    writers = [threading.Thread(target=write) for _ in range(3)]
    shown: list[int] = []
    connections = 0
    for writer in writers:
        writer.start()
    try:
        while len(shown) < total and not failures:
            connections += 1
            seen = shown[-1] if shown else 0
            with client.websocket_connect(f"/news?seen={seen}", timeout=TIMEOUT) as ws:
                caught_up = False
                for _ in range(25):  # messages; then the connection is lost
                    message = ws.receive_json()
                    if isinstance(message, list):
                        shown += [news["id"] for news in message]
                        caught_up = True
                    elif caught_up:
                        shown.append(message["id"])
                    if len(shown) >= total:
                        break
    finally:
        for writer in writers:
            writer.join(TIMEOUT)
    page["database"].close()
    assert failures == []
    assert connections > 3
    assert shown == list(range(1, total + 1))


def test_a_row_that_is_written_in_between_comes_by_both_ways(documented):
    """The view has subscribed and not read yet: live first, which the page ignores, then listed."""
    page = documented("/news")
    websockets, news = page["websockets"], {"id": 1, "text": "in between"}
    with ExitStack() as stack:
        with page["writing"]:
            ws = stack.enter_context(page["client"].websocket_connect("/news", timeout=TIMEOUT))
            wait_until(lambda: websockets.stats().subscriptions == 1, TIMEOUT, "the subscription")
            page["database"].execute("INSERT INTO news (text) VALUES ('in between')")
            websockets.publish_json(news, "news")
            assert ws.receive_json() == news
        assert ws.receive_json() == [news]
    page["database"].close()


@pytest.mark.browser
def test_the_page_follows_the_rules(serve, browser, tmp_path):
    """In a browser: it shows each row once, and after a restart what it has missed meanwhile."""
    (source,) = [block for block in blocks("delivery") if 'route("/news")' in block]
    (script,) = blocks("delivery", "javascript")
    for before, after in {
        "from app import app, websockets": MADE_HERE,
        ":memory:": str(tmp_path / "news.db"),
        "CREATE TABLE": "CREATE TABLE IF NOT EXISTS",
    }.items():
        assert before in source
        source = source.replace(before, after)
    html = f"<script>const ids = [], show = (news) => ids.push(news.id);{script}connect()</script>"
    source += f'\n\n@app.get("/")\ndef page():\n    return {html!r}\n'

    def announce(server: Served) -> None:
        form = {"Content-Type": "application/x-www-form-urlencoded"}
        assert server.fetch("/news", method="POST", headers=form, body=b"text=x").status == 200

    server = serve(source)
    announce(server)
    page = browser.open(server.url())
    page.wait_for("ids.join() === '1'", TIMEOUT)
    announce(server)
    page.wait_for("ids.join() === '1,2'", TIMEOUT)
    server.kill()
    again = serve(source, "--port", str(server.port), port=server.port)
    announce(again)
    page.wait_for("ids.join() === '1,2,3'", 2 * TIMEOUT)
    announce(again)
    page.wait_for("ids.join() === '1,2,3,4'", TIMEOUT)


@pytest.mark.parametrize("error", ["raise", "abort"])
def test_what_was_sent_before_an_error_goes_out(websockets, client, error):
    """All of it arrives, and then the close: 1011, or 4000 and the status."""

    @websockets.route("/")
    def view(ws: WebSocket) -> None:
        for number in range(500):
            ws.send(f"{number}")
        if error == "abort":
            abort(404)
        raise ValueError("on purpose")

    with client.websocket_connect("/", timeout=TIMEOUT) as ws:
        assert [ws.receive() for _ in range(500)] == [f"{number}" for number in range(500)]
        with pytest.raises(ConnectionClosed) as closed:
            ws.receive()
    assert closed.value.code == (4404 if error == "abort" else 1011)
