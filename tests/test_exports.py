"""Public names are a promise."""

from __future__ import annotations

import importlib.resources
import inspect
import pkgutil
import types

import pytest
from blinker import NamedSignal

import flask_websockets
from flask_websockets import errors

MODULES = [
    "flask_websockets",
    *(
        module.name
        for module in pkgutil.walk_packages(flask_websockets.__path__, "flask_websockets.")
    ),
]
WITH_ALL = [name for name in MODULES if hasattr(importlib.import_module(name), "__all__")]


def test_the_promise():
    """The public names, written out: a change here is a change for users."""
    assert flask_websockets.__all__ == [
        "AsyncWebSocket",
        "ConcurrencyError",
        "ConfigurationError",
        "ConnectionClosed",
        "ConnectionRejected",
        "InvalidMessage",
        "InvalidState",
        "NotRunning",
        "PublishResult",
        "Stats",
        "Subscription",
        "UsageError",
        "WebSocket",
        "WebSockets",
        "WebSocketsError",
        "WrongThread",
        "draining",
    ]


def test_every_error_is_public():
    """What a user may meet, a user may catch by name."""
    assert set(errors.__all__) <= set(flask_websockets.__all__)


def test_modules_with_all():
    """The façade, the errors and the bridge say what they offer."""
    assert {"flask_websockets", "flask_websockets.errors", "flask_websockets.bridge"} <= set(
        WITH_ALL
    )


@pytest.mark.parametrize("name", WITH_ALL)
def test_all_is_sorted(name):
    """``__all__`` is sorted and names nothing twice."""
    names = importlib.import_module(name).__all__
    assert names == sorted(set(names))


@pytest.mark.parametrize("name", WITH_ALL)
def test_all_is_complete(name):
    """``__all__`` names what a package imports for others, and what a module defines for them."""
    module = importlib.import_module(name)
    is_package = hasattr(module, "__path__")
    found = {
        key
        for key, value in vars(module).items()
        if not key.startswith("_")
        and not isinstance(value, types.ModuleType)
        and (is_package or getattr(value, "__module__", None) == name)
    }
    assert set(module.__all__) == found


@pytest.mark.parametrize("name", flask_websockets.__all__)
def test_public_names_are_documented(name):
    """Every public class has a docstring of its own, and so has every public method."""
    value = getattr(flask_websockets, name)
    if isinstance(value, NamedSignal):
        assert "The sender" in value.__doc__
        return
    assert value.__dict__["__doc__"]
    for key, member in vars(value).items():
        if key.startswith("_"):
            continue
        function = member.fget if isinstance(member, property) else inspect.unwrap(member)
        if inspect.isfunction(function):
            assert function.__doc__, f"{name}.{key} has no docstring"


def test_typed():
    """The package says that it is typed."""
    assert importlib.resources.files("flask_websockets").joinpath("py.typed").is_file()
