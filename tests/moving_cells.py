"""Are there the names that the tables of the pages "coming from ..." use?

A program too, for the other package's Python, which may be older and has nothing of this project:
``python moving_cells.py PACKAGE``, with a list of cells as JSON on its standard input. It prints
what is wrong with them as JSON.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import inspect
import json
import re
import sys

#: What stands for what in the left-hand column: module and class or function; None for the module.
OLD = {
    "flask_sock": {
        "Sock": ("flask_sock", "Sock"),
        "sock": ("flask_sock", "Sock"),
        "ws": ("simple_websocket", "Server"),
        "ConnectionClosed": ("simple_websocket", "ConnectionClosed"),
        "error": ("simple_websocket", "ConnectionClosed"),
    },
    "flask_socketio": {
        "SocketIO": ("flask_socketio", "SocketIO"),
        "socketio": ("flask_socketio", "SocketIO"),
        "Namespace": ("flask_socketio", "Namespace"),
        "client": ("flask_socketio", "SocketIOTestClient"),
        **{
            name: ("flask_socketio", name)
            for name in (
                [
                    "emit",
                    "send",
                    "call",
                    "join_room",
                    "leave_room",
                    "close_room",
                    "rooms",
                    "disconnect",
                ]
            )
        },
    },
    "flask_sockets": {
        "Sockets": ("flask_sockets", "Sockets"),
        "sockets": ("flask_sockets", "Sockets"),
        "ws": ("geventwebsocket.websocket", "WebSocket"),
        "WebSocketError": ("geventwebsocket.exceptions", "WebSocketError"),
        "gevent": ("gevent", None),
    },
    "flask_websockets": {
        "WebSockets": ("flask_websockets", "WebSockets"),
        "websockets": ("flask_websockets", "WebSockets"),
        "ws": ("flask_websockets", "WebSocket"),
    },
}
#: What both columns may use beside it.
COMMON = {
    "app": ("flask", "Flask"),
    "bp": ("flask", "Blueprint"),
    "request": ("flask", "Request"),
    "session": ("flask.sessions", "SecureCookieSession"),
    "abort": ("flask", "abort"),
    "Thread": ("threading", "Thread"),
    "sleep": ("time", "sleep"),
    "suppress": ("contextlib", "suppress"),
    "json": ("json", None),
}


def find(names):
    """The objects that the names stand for."""
    found = {}
    for name, (module, attribute) in names.items():
        imported = importlib.import_module(module)
        found[name] = imported if attribute is None else getattr(imported, attribute)
    return found


def parse(cell):
    """The cell's code, made whole where it is the head of a block."""
    if cell.startswith("@"):
        cell += "\ndef view(*arguments): pass"
    elif cell.startswith("except "):
        cell = f"try: pass\n{cell} pass"
    elif cell.endswith(":"):
        cell += " pass"
    return ast.parse(cell)


def is_method(owner, name):
    """Whether a call through an instance leaves the first parameter out."""
    return inspect.isclass(owner) and not isinstance(
        inspect.getattr_static(owner, name), (staticmethod, classmethod)
    )


def has(owner, name):
    """Whether there is such an attribute, or one that the class's own code sets."""
    if hasattr(owner, name):
        return True
    if not inspect.isclass(owner):
        return False
    sources = [inspect.getsource(base) for base in owner.__mro__ if base.__module__ != "builtins"]
    return any(re.search(rf"\bself\.{name}\b( =|:)", source) for source in sources)


def wrong(cell, names):
    """What is wrong with a cell of Python code, given what its names stand for."""
    try:
        tree = parse(cell)
    except SyntaxError as error:
        return [f"{cell!r} does not compile: {error}"]
    said = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owner = node.value.id
            if owner not in names:
                said.append(f"{cell!r}: nobody knows {owner}")
            elif not has(names[owner], node.attr):
                said.append(f"{cell!r}: {owner} has no {node.attr}")
        if isinstance(node, ast.Call):
            said += wrong_call(cell, node, names)
    return said


def wrong_call(cell, node, names):
    """What is wrong with a call: its function's name, or its arguments."""
    called, first = None, 0
    if isinstance(node.func, ast.Name):
        called = names.get(node.func.id, getattr(builtins, node.func.id, None))
        if called is None:
            return [f"{cell!r}: nobody knows {node.func.id}"]
    elif isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
        owner = names.get(node.func.value.id)
        called = getattr(owner, node.func.attr, None)
        if called is not None:
            first = is_method(owner, node.func.attr)
    if called is None:
        return []  # said already
    try:
        signature = inspect.signature(called)
    except (TypeError, ValueError):
        return []  # a builtin that does not tell
    arguments = [None] * (first + len(node.args))
    keywords = {keyword.arg: None for keyword in node.keywords if keyword.arg}
    try:
        signature.bind(*arguments, **keywords)
    except TypeError as error:
        return [f"{cell!r}: {error}"]
    return []


def main():
    names = find({**COMMON, **OLD[sys.argv[1]]})
    json.dump([said for cell in json.load(sys.stdin) for said in wrong(cell, names)], sys.stdout)


if __name__ == "__main__":
    main()
