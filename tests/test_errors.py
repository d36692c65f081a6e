"""The tree of errors."""

from __future__ import annotations

import inspect
import re

import pytest
from werkzeug.test import TestResponse

from flask_websockets import errors
from flask_websockets.errors import ConnectionClosed, ConnectionRejected, WebSocketsError

#: A line of the tree: what it hangs on, its name, and in brackets a base beside the tree's or
#: the arguments.
TREE_LINE = re.compile(
    r"^ {4}((?:│   |    )*)(?:[├└]── )?([A-Z]\w+)(?: ?\(([^)]*)\))?", re.MULTILINE
)


def documented_tree() -> dict[str, tuple[str, ...]]:
    """The names of the errors with those of their bases, as the docstring draws them."""
    found: dict[str, tuple[str, ...]] = {}
    above: list[str] = []
    text = inspect.cleandoc(errors.__doc__ or "").partition("::\n")[2]
    for match in TREE_LINE.finditer(text):
        depth = 0 if "── " not in match[0] else len(match[1]) // 4 + 1
        name, brackets = match[2], match[3] or ""
        del above[depth:]
        bases = above[-1:] if above else ["Exception"]
        if brackets.endswith("Error"):
            bases = [*bases, brackets]
        found[name] = tuple(bases)
        above.append(name)
    return found


def classes() -> dict[str, type[Exception]]:
    return {
        name: value
        for name, value in vars(errors).items()
        if inspect.isclass(value) and value.__module__ == errors.__name__
    }


class TestTree:
    """The docstring and the classes."""

    def test_docstring_matches_the_classes(self):
        """The tree that is drawn is the tree that is there, base by base."""
        found = {
            name: tuple(base.__name__ for base in value.__bases__)
            for name, value in classes().items()
        }
        assert documented_tree() == found

    def test_documented_arguments(self):
        """Where the tree names arguments, the class takes them."""
        text = errors.__doc__ or ""
        for name in ("ConnectionClosed", "ConnectionRejected"):
            (arguments,) = re.findall(rf"{name}\(([^)]*)\)", text)
            assert list(inspect.signature(getattr(errors, name)).parameters) == arguments.split(
                ", "
            )

    def test_all_is_complete_and_sorted(self):
        """``__all__`` names every error."""
        assert errors.__all__ == sorted(classes())

    @pytest.mark.parametrize("error", classes().values(), ids=classes())
    def test_every_error_is_ours_and_explained(self, error):
        """Every error is a WebSocketsError, and says in its own docstring what it means."""
        assert issubclass(error, WebSocketsError)
        assert error.__dict__["__doc__"].strip().endswith(".")

    @pytest.mark.parametrize("name", ["InvalidMessage", "ConfigurationError"])
    def test_bad_values_are_value_errors(self, name):
        """``except ValueError`` catches what is a bad value."""
        with pytest.raises(ValueError, match="bad"):
            raise getattr(errors, name)("bad")

    def test_connection_closed_is_no_usage_error(self):
        """The end of a conversation is nobody's fault."""
        assert not issubclass(ConnectionClosed, errors.UsageError)
        assert not issubclass(ConnectionClosed, OSError)


class TestConnectionClosed:
    """The end of a conversation."""

    def test_code_and_reason(self):
        """Both are there, in attributes and in the message."""
        error = ConnectionClosed(4001, "go away")
        assert (error.code, error.reason) == (4001, "go away")
        assert str(error) == "The connection is closed: 4001 (go away)."

    def test_without_a_reason(self):
        """No reason is an empty one, and no brackets."""
        error = ConnectionClosed(1006)
        assert (error.code, error.reason) == (1006, "")
        assert str(error) == "The connection is closed: 1006."


class TestConnectionRejected:
    """A refused handshake."""

    def test_response(self, app_response):
        """The response is there, and its status in the message."""
        error = ConnectionRejected(app_response)
        assert error.response is app_response
        assert str(error) == "The handshake was answered with 418 I'M A TEAPOT: short and stout"

    @pytest.mark.parametrize(
        ("answer", "said"),
        [
            (
                (
                    "<title>403 Forbidden</title>\n<h1>Forbidden</h1>\n<p>Not &quot;you&quot;.</p>",
                    403,
                ),
                '403 FORBIDDEN: Not "you".',
            ),
            (("not\n  today", 503), "503 SERVICE UNAVAILABLE: not today"),
            (("x" * 1000, 400), "400 BAD REQUEST: " + "x" * 200),
            (
                ("<p>Go on</p>", 302, {"Location": "/login?next=/ws"}),
                "302 FOUND to /login?next=/ws",
            ),
        ],
        ids=["page", "text", "long", "redirect"],
    )
    def test_what_it_says(self, answer, said):
        """An error page's sentence or a redirect's target: why a test was refused."""
        from flask import Flask

        app = Flask(__name__)
        app.add_url_rule("/", "view", lambda: answer)
        error = ConnectionRejected(app.test_client().get("/"))
        assert str(error) == f"The handshake was answered with {said}"

    @pytest.fixture
    def app_response(self) -> TestResponse:
        from flask import Flask

        app = Flask(__name__)
        app.add_url_rule("/", view_func=lambda: ("short and stout", 418))
        return app.test_client().get("/")
