"""The law of the house, as one table: module, side, and what it may import.

Checked by reading the source, never by running it. What stands under ``TYPE_CHECKING`` is for
type checkers and counts for nothing here; an import inside a function counts like any other.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import flask_websockets

PACKAGE = "flask_websockets"
ROOT = Path(flask_websockets.__file__).parent

PURE, LOOP, VIEW, BOTH, ANY = "Pure.", "Loop side.", "View side.", "Both sides.", "Any side."


@dataclass(frozen=True)
class Law:
    """One row."""

    #: How the module's docstring begins; None for the façade, which has no code of its own.
    side: str | None
    #: Exactly the modules of this package that it imports.
    imports: set[str] = field(default_factory=set)
    #: Exactly what it imports from other projects, and of the standard library what is WATCHED.
    outside: set[str] = field(default_factory=set)
    #: Why it may have more than MODULE_LINES lines of code.
    long_because: str | None = None


#: A row is permission and description in one: an import that is not in it fails, and so does a
#: permission that nobody uses any more.
THE_LAW = {
    "__init__": Law(
        None,
        {
            *("channels", "counters", "errors", "extension", "signals", "subscription"),
            "websocket",
        },
    ),
    # Pure: values in, values out. No waiting, no threads, no loop.
    "config": Law(PURE, {"environ", "errors"}),
    "counters": Law(PURE),
    "environ": Law(PURE),
    "errors": Law(PURE),
    "protocol": Law(PURE, {"errors"}),
    "rate": Law(PURE),
    # The bridge: the only crossing (I1). It knows neither of the sides that it joins.
    "bridge": Law(
        BOTH,
        {
            *("bridge.door", "bridge.handshake", "bridge.link", "bridge.pipe"),
            *("bridge.tuning", "bridge.registry", "bridge.stacks", "bridge.tasks"),
            "bridge.threads",
        },
    ),
    "bridge.door": Law(
        BOTH,
        {"bridge.handover", "errors"},
        {"anyio", "anyio.lowlevel", "asyncio", "contextvars", "threading"},
    ),
    "bridge.handover": Law(BOTH, set(), {"queue"}),
    "bridge.handshake": Law(
        BOTH,
        {"bridge.link", "errors", "protocol"},
        {"anyio", "anyio.lowlevel", "contextvars", "queue", "threading"},
    ),
    "bridge.link": Law(
        BOTH,
        {
            *("bridge.door", "bridge.handover", "bridge.registry", "bridge.stream", "config"),
            *("errors", "protocol"),
        },
        {"anyio", "anyio.lowlevel", "contextvars", "queue", "threading"},
        long_because="One lock and one order of messages: the thread's half and the loop's half "
        "are read side by side, and neither can be understood alone.",
    ),
    "bridge.pipe": Law(BOTH, {"bridge.door", "errors"}, {"anyio", "queue"}),
    "bridge.tuning": Law(BOTH),
    "bridge.registry": Law(BOTH, {"protocol"}, {"threading"}),
    "bridge.stacks": Law(BOTH),
    "bridge.stream": Law(BOTH, set(), {"anyio", "anyio.streams.memory"}),
    "bridge.tasks": Law(
        BOTH,
        {"bridge.door", "bridge.stacks"},
        {"anyio", "asyncio", "contextvars", "threading", "trio"},
    ),
    "bridge.threads": Law(
        BOTH, {"bridge.handover", "bridge.tuning"}, {"asyncio", "queue", "threading"}
    ),
    # Both sides: one call of the WSGI application, between its thread and the pipe.
    "wsgi": Law(
        BOTH,
        {"bridge", "environ", "protocol"},
        {"asgiref.wsgi", "contextvars", "flask", "werkzeug.exceptions", "werkzeug.wsgi"},
    ),
    # Loop side: coroutines and what they call. Never blocks.
    "asgi": Law(
        LOOP,
        {
            *("bridge", "config", "connection", "environ", "errors", "http", "protocol"),
            *("runtime", "servers.uvicorn", "writer"),
        },
        {"anyio", "contextvars"},
    ),
    "channels": Law(LOOP, {"bridge", "counters"}),
    "connection": Law(
        LOOP,
        {
            *("bridge", "counters", "environ", "protocol", "rate", "running_view"),
            *("servers.uvicorn", "writer"),
        },
        {"anyio"},
    ),
    "writer": Law(
        LOOP,
        {"bridge", "servers.frames", "servers.lean", "servers.uvicorn"},
        {"anyio.lowlevel", "contextvars"},
    ),
    "runtime": Law(
        LOOP,
        {
            *("bridge", "channels", "config", "connection", "counters", "errors", "protocol"),
            *("running_view", "servers.uvicorn"),
        },
        {"anyio"},
    ),
    "running_view": Law(LOOP, {"bridge", "counters"}, {"anyio"}),
    "http": Law(
        LOOP,
        {
            *("bridge", "config", "counters", "environ", "protocol", "servers.responses"),
            *("servers.uvicorn", "wsgi"),
        },
        {"anyio", "anyio.lowlevel", "asgiref.wsgi"},
    ),
    "servers.frames": Law(LOOP, {"bridge", "protocol"}),
    "servers.lean": Law(LOOP, set(), {"asyncio"}),
    "servers.responses": Law(LOOP, {"bridge"}),
    "servers.uvicorn": Law(LOOP, {"bridge", "servers.frames"}, {"asyncio", "contextvars", "h11"}),
    # View side: blocking code in a thread of Flask's. Never touches the loop.
    "views": Law(
        VIEW,
        {
            *("answers", "bridge", "config", "environ", "errors", "protocol", "session"),
            "websocket",
        },
        {"flask", "flask.globals", "flask.signals", "flask.typing", "werkzeug.exceptions"},
    ),
    "session": Law(VIEW, {"bridge", "environ", "protocol"}, {"flask", "flask.globals"}),
    "answers": Law(
        VIEW,
        {"bridge", "environ", "errors", "protocol", "wsgi"},
        {"flask", "werkzeug.exceptions", "werkzeug.routing"},
    ),
    "rights": Law(VIEW, {"bridge", "errors", "protocol"}, {"flask", "werkzeug.exceptions"}),
    "cli": Law(BOTH, {"errors", "servers.serve"}, {"click", "flask", "flask.cli"}),
    "websocket": Law(VIEW, {"bridge", "environ", "errors", "protocol"}, {"flask", "msgpack"}),
    # Both sides: fronts that own a loop and the threads that speak to it.
    "servers": Law(BOTH),
    "servers.werkzeug": Law(
        BOTH,
        {
            *("asgi", "bridge", "connection", "environ", "servers.relay", "servers.uvicorn"),
        },
        {"anyio", "queue", "threading", "uvicorn", "uvicorn.server", "werkzeug.http"},
    ),
    "servers.relay": Law(BOTH, set(), {"threading"}),
    "servers.serve": Law(
        BOTH,
        {
            *("bridge", "config", "errors", "servers.draining", "servers.listen"),
            *("servers.uvicorn", "servers.watchdog", "servers.workers"),
        },
        {
            *("click", "contextvars", "flask", "multiprocessing", "threading", "uvicorn"),
            *("uvicorn.supervisors", "uvicorn.supervisors.statreload", "websockets"),
        },
    ),
    "servers.draining": Law(LOOP, {"config", "servers.watchdog"}, {"asyncio", "uvicorn"}),
    "servers.watchdog": Law(BOTH, set(), {"queue", "threading"}),
    "servers.workers": Law(
        BOTH,
        set(),
        {"multiprocessing", "multiprocessing.connection", "multiprocessing.context"},
    ),
    "servers.listen": Law(ANY),
    "testing": Law(
        BOTH,
        {"asgi", "bridge", "connection", "environ", "errors"},
        {
            *("anyio", "flask", "flask.testing", "threading"),
            *("werkzeug.datastructures", "werkzeug.wrappers"),
        },
        long_because="The client's verbs, and the server that they speak to instead of a socket: "
        "users read it as one page of reference.",
    ),
    # Any side: joins them all. threading for get_ident, main_thread and one lock.
    "signals": Law(ANY, set(), {"blinker"}),
    "subscription": Law(ANY, {"runtime", "channels", "errors", "websocket"}),
    "extension": Law(
        ANY,
        {
            *("answers", "asgi", "bridge", "channels", "cli", "config", "counters", "errors"),
            *("protocol", "rights", "runtime", "session", "signals"),
            *("servers.serve", "servers.werkzeug", "subscription", "testing", "views"),
            "websocket",
        },
        {"flask", "flask.sansio.scaffold", "threading"},
        long_because="The class that users type, one method a verb; half of it is their "
        "documentation, and each method only joins what the other modules do.",
    ),
}

#: Modules that let threads and loops meet. Of another project's, the whole module is meant.
CROSSINGS = {"threading", "_thread", "queue", "concurrent", "multiprocessing"} | {
    *("anyio.from_thread", "anyio.to_thread", "asgiref.sync"),
}
#: Functions that do the same, from whichever object they are taken.
CROSSING_CALLS = {
    *("call_soon_threadsafe", "run_coroutine_threadsafe", "run_sync_soon", "run_in_executor"),
    *("from_thread", "to_thread", "start_blocking_portal", "sync_to_async", "async_to_sync"),
}
MAY_CROSS = {
    *("bridge", "bridge.door", "bridge.handover", "bridge.handshake", "bridge.link", "bridge.pipe"),
    *(
        "bridge.registry",
        "bridge.tasks",
        "bridge.threads",
        "servers.relay",
        "servers.serve",
        "servers.werkzeug",
    ),
    *("servers.watchdog", "servers.workers", "testing"),
}
#: Of those, the fronts, which know both sides.
FRONTS = {"servers.serve", "servers.werkzeug", "testing"}
#: extension.py asks which thread it is on; the rest of threading is not for it.
ASKS_FOR_ITS_THREAD = {"extension": {"get_ident", "main_thread", "Lock"}}

#: views.py wraps Flask's own method of that name, to keep it from running async views.
NAMES_A_CROSSING = {"views": {"async_to_sync"}}

#: Modules of the standard library that a row names.
WATCHED = CROSSINGS | {"asyncio", "contextvars"}

#: Lines of code: what is left without comments, docstrings and blank lines. A module or a
#: function is as long as what happens in it; explaining it more is no reason to split it.
MODULE_LINES = 250
FUNCTION_LINES = 40


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


SOURCES = {name_of(path): path.read_text() for path in sorted(ROOT.rglob("*.py"))}
TREES = {name: ast.parse(source) for name, source in SOURCES.items()}
PACKAGES = {name_of(path) for path in ROOT.rglob("__init__.py")}


def running(node: ast.AST) -> Iterator[ast.AST]:
    """Everything below *node* that runs: all but the bodies of ``if TYPE_CHECKING``."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for other in child.orelse:
                yield other
                yield from running(other)
            continue
        yield child
        yield from running(child)


def absolute(name: str, node: ast.ImportFrom) -> str:
    """The module that an import takes from, from the top."""
    if not node.level:
        return node.module or ""
    package = [PACKAGE, *(part for part in name.split(".") if part != "__init__")]
    if name not in PACKAGES:
        package.pop()
    package = package[: len(package) - node.level + 1]
    return ".".join([*package, node.module] if node.module else package)


def imported(name: str, tree: ast.AST) -> set[str]:
    """The modules that the module *name* imports at run time, by their full names."""
    found: set[str] = set()
    for node in running(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = absolute(name, node)
            for alias in node.names:
                whole = f"{module}.{alias.name}"
                is_module = whole in CROSSINGS or whole.removeprefix(f"{PACKAGE}.") in SOURCES
                found.add(whole if is_module else module)
    return found


def inside(name: str) -> set[str]:
    """The modules of this package among them."""
    found = {
        module.removeprefix(f"{PACKAGE}.") if module != PACKAGE else "__init__"
        for module in imported(name, TREES[name])
        if module.split(".")[0] == PACKAGE
    }
    assert found <= set(SOURCES), f"{name} imports what is not there: {found - set(SOURCES)}"
    return found


def watched(name: str) -> set[str]:
    """Those of other projects, and those of the standard library that a row names."""
    return {
        module
        for module in imported(name, TREES[name])
        if module.split(".")[0] != PACKAGE
        and (module.split(".")[0] in WATCHED or module.split(".")[0] not in sys.stdlib_module_names)
    }


def crosses(module: str) -> bool:
    return any(module == known or module.startswith(f"{known}.") for known in CROSSINGS)


def reached(name: str) -> set[str]:
    """The modules that *name* imports, and those that these import, and so on."""
    found: set[str] = set()
    waiting = {name}
    while waiting:
        for module in THE_LAW[waiting.pop()].imports - found:
            found.add(module)
            waiting.add(module)
    return found


def on(*sides: str) -> list[str]:
    return [name for name, law in THE_LAW.items() if law.side in sides]


def is_coroutine_code(node: ast.AST) -> bool:
    return isinstance(node, (ast.AsyncFunctionDef, ast.AsyncFor, ast.AsyncWith, ast.Await)) or (
        isinstance(node, ast.comprehension) and bool(node.is_async)
    )


class TestTable:
    """The table describes what is there."""

    def test_every_module_has_a_row(self):
        """A new module says first where it belongs; a row of a module that is gone goes too."""
        assert set(THE_LAW) == set(SOURCES)

    @pytest.mark.parametrize("name", THE_LAW)
    def test_imports_within_the_package(self, name):
        """A module imports the modules of its row, and no others."""
        assert inside(name) == THE_LAW[name].imports

    @pytest.mark.parametrize("name", THE_LAW)
    def test_imports_from_outside(self, name):
        """A module imports from other projects what its row says, and nothing else."""
        assert watched(name) == THE_LAW[name].outside

    @pytest.mark.parametrize("name", [name for name in THE_LAW if name != "__init__"])
    def test_docstring_begins_with_the_side(self, name):
        """You never have to ask where code runs."""
        docstring = ast.get_docstring(TREES[name]) or ""
        assert docstring.startswith(f"{THE_LAW[name].side} ")


class TestSides:
    """What the rows themselves must keep to; the table cannot permit it."""

    @pytest.mark.parametrize("name", on(PURE))
    def test_pure(self, name):
        """Pure modules have no coroutines, no loop, no threads, and know only pure modules."""
        assert THE_LAW[name].outside == set()
        assert THE_LAW[name].imports <= set(on(PURE))
        assert [node.lineno for node in running(TREES[name]) if is_coroutine_code(node)] == []

    def test_pure_modules_are_these(self):
        """Nobody makes a module impure by changing its row alone."""
        assert set(on(PURE)) == {"config", "counters", "environ", "errors", "protocol", "rate"}

    @pytest.mark.parametrize("name", [name for name in THE_LAW if name not in MAY_CROSS])
    def test_only_the_crossings_cross(self, name):
        """Only the bridge and the fronts move work between threads (I1)."""
        found = {module for module in watched(name) if crosses(module)}
        if name in ASKS_FOR_ITS_THREAD:
            found -= {"threading"}
        assert found == set()
        calls = {node.attr for node in running(TREES[name]) if isinstance(node, ast.Attribute)}
        calls |= {node.id for node in running(TREES[name]) if isinstance(node, ast.Name)}
        assert calls & CROSSING_CALLS == NAMES_A_CROSSING.get(name, set())

    @pytest.mark.parametrize("name", ASKS_FOR_ITS_THREAD)
    def test_who_may_ask_for_its_thread(self, name):
        """The module uses of threading what it is allowed to, and starts no thread."""
        found = set()
        for node in running(TREES[name]):
            if isinstance(node, ast.ImportFrom):
                assert node.module != "threading", "import threading whole, so that this sees it"
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "threading":
                found.add(node.attr)
        assert found == ASKS_FOR_ITS_THREAD[name]

    @pytest.mark.parametrize("name", on(LOOP))
    def test_loop_does_not_know_the_view(self, name):
        """No module of the loop's side reaches one of the view's, by whichever way."""
        assert reached(name) & set(on(VIEW, ANY)) == set()

    @pytest.mark.parametrize("name", on(VIEW))
    def test_view_does_not_know_the_loop(self, name):
        """No module of the view's side reaches one of the loop's, by whichever way."""
        assert reached(name) & set(on(LOOP, ANY)) == set()

    @pytest.mark.parametrize("name", sorted(MAY_CROSS - FRONTS))
    def test_bridge_knows_neither_side(self, name):
        """The bridge reaches pure modules and itself."""
        reachable = reached(name)
        assert all(module in on(PURE) or module.startswith("bridge") for module in reachable)

    def test_sides_are_these(self):
        """Nobody makes a module two-sided by changing its row alone."""
        assert set(on(LOOP)) == {
            *("asgi", "channels", "connection", "http", "running_view", "runtime"),
            *("servers.draining", "servers.frames", "servers.lean", "servers.responses"),
            *("servers.uvicorn", "writer"),
        }
        assert set(on(VIEW)) == {"answers", "rights", "session", "views", "websocket"}
        assert set(on(ANY)) == {"extension", "servers.listen", "signals", "subscription"}

    def test_no_circle(self):
        """The modules can be put in an order in which each imports earlier ones only."""
        waiting = {name: set(law.imports) for name, law in THE_LAW.items()}
        while ready := [name for name, imports in waiting.items() if not imports]:
            for name in ready:
                del waiting[name]
            for imports in waiting.values():
                imports.difference_update(ready)
        assert waiting == {}


def docstring_lines(node: ast.AST) -> set[int]:
    if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        return set()
    if ast.get_docstring(node, clean=False) is None:
        return set()
    return set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))


def code_lines(source: str) -> set[int]:
    """The numbers of the lines of *source* without comments, docstrings and blank lines."""
    lines: set[int] = set()
    nothing = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.ENDMARKER}
    nothing |= {tokenize.INDENT, tokenize.DEDENT}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in nothing:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        lines -= docstring_lines(node)
    return lines


class TestSize:
    """The core fits in a head."""

    @pytest.mark.parametrize("name", THE_LAW)
    def test_module(self, name):
        """A module has at most 250 lines of code, or its row says why not."""
        lines, reason = len(code_lines(SOURCES[name])), THE_LAW[name].long_because
        if lines <= MODULE_LINES:
            assert reason is None, f"{name} has {lines} lines: it needs no excuse any more"
        else:
            assert reason, f"{name} has {lines} lines of code: split it, or say why not"

    @pytest.mark.parametrize("name", THE_LAW)
    def test_functions(self, name):
        """A function has at most 40 lines of code."""
        code, long = code_lines(SOURCES[name]), {}
        for node in ast.walk(TREES[name]):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = code & set(range(node.lineno, (node.end_lineno or 0) + 1))
                if len(lines) > FUNCTION_LINES:
                    long[node.name] = len(lines)
        assert long == {}

    def test_names(self):
        """No module and no class is named for a drawer that takes everything."""
        vague = re.compile(r"util|helper|manager|misc|common|handle|process", re.IGNORECASE)
        names = set(SOURCES)
        for tree in TREES.values():
            names |= {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
        assert [name for name in names if vague.search(name)] == []


class TestTheReader:
    """The reading itself, on sources made up for it."""

    def test_type_checking_does_not_count(self):
        """An import for type checkers is none; its ``else`` is one."""
        tree = ast.parse(
            "if TYPE_CHECKING:\n    import threading\nelse:\n    import queue\n"
            "if typing.TYPE_CHECKING:\n    import anyio\n"
        )
        assert imported("views", tree) == {"queue"}

    def test_an_import_anywhere_counts(self):
        """In a function, in a try, in a class."""
        tree = ast.parse(
            "def f():\n    import a.b\nclass C:\n    from c import d\n"
            "try:\n    import e\nexcept ImportError:\n    pass\n"
        )
        assert imported("views", tree) == {"a.b", "c", "e"}

    @pytest.mark.parametrize(
        ("name", "source", "expected"),
        [
            ("views", "from .bridge import Link", {"flask_websockets.bridge"}),
            ("bridge.door", "from ..errors import X", {"flask_websockets.errors"}),
            ("bridge.link", "from .door import Door", {"flask_websockets.bridge.door"}),
            ("bridge", "from .door import Door", {"flask_websockets.bridge.door"}),
            (
                "asgi",
                "from .servers import uvicorn",
                {"flask_websockets.servers.uvicorn"},
            ),
            ("__init__", "from .errors import X", {"flask_websockets.errors"}),
            ("asgi", "from anyio import to_thread", {"anyio.to_thread"}),
            ("asgi", "from anyio import Event, to_thread", {"anyio", "anyio.to_thread"}),
        ],
    )
    def test_relative_imports(self, name, source, expected):
        """A relative import is followed to the module it means."""
        assert imported(name, ast.parse(source)) == expected

    def test_code_lines(self):
        """Comments, docstrings and blank lines are no code; a long string is."""
        source = (
            '"""Doc.\n\nMore.\n"""\n\n# why\nx = """a\n\nb"""  # so\n\ndef f():\n    "d"\n    f()\n'
        )
        assert code_lines(source) == {7, 8, 9, 11, 13}
