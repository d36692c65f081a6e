"""What the documentation says is true: its code runs, its tables are the code's own."""

from __future__ import annotations

import ast
import importlib.util
import re
import sqlite3
import sys
import textwrap
import types
from collections.abc import Callable
from dataclasses import fields
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from flask import Flask, redirect, request, session

import flask_websockets
from flask_websockets import WebSocket, WebSockets
from flask_websockets.config import PREFIX, ROUTE_LIMITS, Config
from flask_websockets.protocol import TRANSITIONS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
#: The quick start has a test of its own: its snippets are not meant to stand alone.
PAGES = sorted(page for page in DOCS.rglob("*.rst") if page.name != "quickstart.rst")
EXAMPLES = sorted((ROOT / "examples").glob("*/*.py"))
#: test_tutorial.py has the other steps; what is beside an app.py is a client of its.
PROGRAMS = [*(path for path in EXAMPLES if path.name == "app.py"), DOCS / "tutorial/step4/app.py"]
#: Seconds for any wait of a test's own.
TIMEOUT = 10.0


def blocks(page: Path, language: str = "python") -> list[str]:
    """The code blocks of a page, without their indentation and options."""
    found = re.findall(
        rf"^\.\. code-block:: {language}\n((?:[ ]+.*\n|\n)+)", page.read_text(), re.MULTILINE
    )
    return [re.sub(r"\A(?::.*\n)+", "", textwrap.dedent(block).lstrip("\n")) for block in found]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


PYTHON = [
    pytest.param(block, id=f"{name_of(page)}-{number}")
    for page in PAGES
    for number, block in enumerate(blocks(page))
]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], types.ModuleType]:
    """Import a program by its path, anew, under a name that nothing else has."""

    def load(path: Path) -> types.ModuleType:
        name = f"docs_{path.parent.name}_{path.stem}"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)  # Flask looks there for the templates
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def documented_app(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The module ``app`` that the pages import from: enough of one for all of them."""
    module = types.ModuleType("app")
    app = module.app = Flask("app")  # type: ignore[attr-defined]
    websockets = module.websockets = WebSockets(app)  # type: ignore[attr-defined]
    app.secret_key = "not a secret"

    @app.post("/login")
    def login():
        session["user"] = request.form["name"]
        return redirect("/")

    def view(ws: WebSocket) -> None:
        if "user" in session:
            ws.send(f"hello, {session['user']}")
        for data in ws.iter_data():
            if data == "bye":
                return
            ws.send(data)

    def chat(ws: WebSocket, room: str) -> None:
        with websockets.subscribe(ws, [room]):
            for data in ws.iter_data():
                websockets.publish(data, [room])

    websockets.route("/ws", endpoint="documented_view")(view)
    websockets.route("/ws/<room>", endpoint="documented_chat")(chat)
    monkeypatch.setitem(sys.modules, "app", module)
    return module


def test_blocks_are_found():
    """The pages have code, and this file finds it all."""
    marks = sum(page.read_text().count(".. code-block:: python") for page in PAGES)
    assert len(PYTHON) == marks > 10


@pytest.mark.parametrize("code", PYTHON)
def test_code_blocks_run(code, documented_app):
    """Every Python block compiles and, with the module ``app`` beside it, runs."""
    names: dict[str, Any] = {"__name__": "block"}
    exec(compile(code, "block", "exec", dont_inherit=True), names)
    for value in names.values():
        if isinstance(value, sqlite3.Connection):
            value.close()  # from Python 3.13 on it warns of one that is left open


def test_what_comes_by_a_form_is_seen_by_all(documented_app):
    """The how-to's list of headlines: who is there sees what is new, who comes later sees all."""
    exec(compile(blocks(DOCS / "how-to/publish.rst")[0], "block", "exec", dont_inherit=True), {})
    client = documented_app.websockets.test_client()
    with client.websocket_connect("/live") as first:
        assert first.receive_json() == []
        assert client.post("/news", data={"headline": "one"}).status_code == 204
        assert first.receive_json() == ["one"]
        with client.websocket_connect("/live") as second:
            assert first.receive_json() == second.receive_json() == ["one"]


def test_documented_tests_pass(documented_app):
    """The tests that the how-to shows pass against an application that does what they expect."""
    ran = 0
    for code in blocks(DOCS / "how-to" / "test-views.rst"):
        namespace = {"__name__": "block"}
        exec(compile(code, "test-views", "exec", dont_inherit=True), namespace)
        for name, test in namespace.items():
            if name.startswith("test_"):
                test()
                ran += 1
    assert ran == 6


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_included_files_exist(page):
    """What a page includes is there, and so are the place's marks in it."""
    for target, options in re.findall(
        r"^\.\. literalinclude:: (\S+)\n((?: +:.*\n)*)", page.read_text(), re.MULTILINE
    ):
        included = page.parent / target
        assert included.is_file(), target
        for option, value in re.findall(r":([\w-]+): (.*)", options):
            if option in ("start-at", "end-at", "start-after", "end-before"):
                assert value in included.read_text()
            elif option == "pyobject":
                assert f"def {value}(" in included.read_text()


def settings_table() -> types.ModuleType:
    """The Sphinx extension that makes the reference's table of settings."""
    pytest.importorskip("sphinx", reason="tox -e docs needs it as well")
    path = DOCS / "_ext" / "settings.py"
    spec = importlib.util.spec_from_file_location("docs_settings", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def setting_names() -> set[str]:
    return {PREFIX + field.name.upper() for field in fields(Config)}


def test_the_table_of_settings_is_made_of_the_source():
    """Every setting has its row, with a default that reads as Python, and with words."""
    module = settings_table()
    made = module.settings()
    assert ".. settings::" in (DOCS / "reference" / "configuration.rst").read_text()
    assert [setting.name for setting in made] == [
        PREFIX + field.name.upper() for field in fields(Config)
    ]
    for setting, field in zip(made, fields(Config), strict=True):
        default = ast.literal_eval(module.literal(setting.default))
        assert default == field.default
        assert type(default) is type(field.default)
        assert setting.text.endswith("."), setting
        assert setting.for_routes == (field.name in ROUTE_LIMITS)


@pytest.mark.parametrize("field", fields(Config), ids=lambda field: field.name)
def test_numbers_have_units(field):
    """Whatever is a number says of what, in the table."""
    (setting,) = (
        each for each in settings_table().settings() if each.name == PREFIX + field.name.upper()
    )
    is_number = field.type.startswith(("int", "float"))
    assert bool(setting.unit) == is_number
    if field.type == "float":
        assert setting.unit == "seconds"
    if field.name.endswith("_bytes"):
        assert setting.unit.startswith("bytes")


@pytest.mark.parametrize("path", [*PAGES, ROOT / "CHANGES.md", *PROGRAMS], ids=name_of)
def test_no_setting_is_invented(path):
    """Whatever setting is named anywhere, there is one of that name."""
    named = set(re.findall(r"\bWEBSOCKETS_[A-Z_]+[A-Z]\b", path.read_text()))
    assert named <= setting_names()


def test_every_public_name_is_in_the_reference():
    """The API reference documents every public name, and none that is not."""
    text = (DOCS / "reference" / "api.rst").read_text()
    documented = re.findall(r"^\.\. auto\w+:: ([\w.]+)", text, re.MULTILINE)
    public = [name for name in documented if "." not in name]
    assert sorted(public) == sorted(flask_websockets.__all__)


def test_the_states_are_those_of_the_code():
    """The picture of the connection's states is the table of protocol.py."""
    text = (DOCS / "explanation" / "architecture.rst").read_text()
    drawn = re.findall(r"^    (\w+) +--(\w+)-+> (\w+)$", text, re.MULTILINE)
    assert sorted(drawn) == sorted(
        (state.value, action.value, following.value)
        for state, actions in TRANSITIONS.items()
        for action, following in actions.items()
    )


def test_every_module_is_in_the_architecture():
    """The table of modules is the list of files, and names each one's side."""
    package = ROOT / "src" / "flask_websockets"
    text = (DOCS / "explanation" / "architecture.rst").read_text()
    rows = dict(re.findall(r"^    \* - ``([\w/]+\.py)``\n      - (\S+)$", text, re.MULTILINE))
    modules = {str(path.relative_to(package)): path for path in package.rglob("*.py")}
    # A folder's __init__ only gathers what is in the folder.
    listed = {name for name in modules if not name.endswith("/__init__.py")}
    assert set(rows) == listed
    for name in listed - {"__init__.py"}:
        docstring = ast.get_docstring(ast.parse(modules[name].read_text())) or ""
        assert docstring.lower().startswith(rows[name]), f"{name} does not begin with its side"


@pytest.mark.parametrize("page", sorted((DOCS / "explanation").glob("*.rst")), ids=name_of)
def test_named_functions_exist(page):
    """Each ``Class.method`` that an explanation names is one of the code's."""
    classes: dict[str, ast.ClassDef] = {}
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                classes[node.name] = node
    for owner, member in re.findall(r"`(?:[\w.]+\.)?([A-Z]\w+)\.(\w+)`", page.read_text()):
        members = {getattr(node, "name", None) for node in classes[owner].body}
        assert member in members, f"{owner}.{member}"


@pytest.mark.parametrize("path", EXAMPLES, ids=name_of)
def test_examples_are_short(path):
    """An example has at most 60 lines."""
    assert len(path.read_text().splitlines()) <= 60


@pytest.mark.parametrize("path", PROGRAMS, ids=name_of)
def test_examples_import(path, load):
    """An example can be imported, and offers an application for either kind of server."""
    module = load(path)
    assert isinstance(module.app, Flask)
    assert isinstance(module.websockets, WebSockets)
    assert callable(module.asgi)


def test_echo(load):
    """examples/echo sends back what it gets, and has a page."""
    client = load(ROOT / "examples" / "echo" / "app.py").websockets.test_client()
    with client.get("/") as page:
        assert "new WebSocket" in page.text
    with client.websocket_connect("/ws", timeout=TIMEOUT) as ws:
        for data in ("text", b"binary"):
            ws.send(data)
            assert ws.receive() == data


def test_clock(load):
    """examples/clock tells everybody the time, again and again, and has a page."""
    client = load(ROOT / "examples" / "clock" / "app.py").websockets.test_client()
    with client.get("/") as page:
        assert "new WebSocket" in page.text
    with (
        client.websocket_connect("/ws", timeout=TIMEOUT) as one,
        client.websocket_connect("/ws", timeout=TIMEOUT) as other,
    ):
        for ws in (one, other, one):
            assert re.fullmatch(r"\d\d:\d\d:\d\d", ws.receive())


def test_upload(load):
    """examples/upload tells how far an upload is, what came, and sends a long file in lines."""
    client = load(ROOT / "examples" / "upload" / "app.py").websockets.test_client()
    with client.get("/") as page:
        assert "new WebSocket" in page.text
    data = bytes(range(256)) * 10_000
    with client.websocket_connect("/progress/one", timeout=TIMEOUT) as ws:
        assert ws.receive_json() == {"received": 0}
        with client.post("/files/one", data=data) as answer:
            assert answer.json == {"bytes": len(data), "sha256": sha256(data).hexdigest()}
        told = [ws.receive_json()["received"] for _ in range(3)]
        assert told == [1024 * 1024, 2 * 1024 * 1024, len(data)]
    with client.get("/numbers.csv") as answer:
        assert next(answer.iter_encoded()) == b"0,0\n"
