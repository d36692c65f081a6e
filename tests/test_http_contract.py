"""What HTTP relies on of others: asgiref's classes, and the habits of servers.

A release of asgiref that breaks the contract fails here. The servers are imitated, each with the
one habit that a line of the adapter is there for.
"""

from __future__ import annotations

import ast
import inspect
import threading
from importlib.metadata import version

import anyio
import anyio.lowlevel
import pytest
from asgiref.wsgi import WsgiToAsgi, WsgiToAsgiInstance
from flask import Response

from flask_websockets import WebSockets, http, wsgi
from flask_websockets.bridge import Pipe
from flask_websockets.http import HttpAdapter
from flask_websockets.wsgi import Call

from .asgi_driver import TIMEOUT, wait_until
from .http_driver import exchange, http_scope

LOOK = f"asgiref {version('asgiref')} has changed: look at"

CLASSES = [(WsgiToAsgi, HttpAdapter, http), (WsgiToAsgiInstance, Call, wsgi)]

every_class = pytest.mark.parametrize(
    ("theirs", "ours", "module"), CLASSES, ids=[ours.__name__ for _, ours, _ in CLASSES]
)


def application(environ, start_response):
    raise AssertionError("called")


@every_class
def test_they_are_made_with_the_application_alone(theirs, ours, module):
    """The application is the first argument, and the only one that must be given."""
    first, *others = inspect.signature(theirs).parameters.values()
    assert first.name == "wsgi_application", f"{LOOK} {module.__name__}.{ours.__name__}.__init__"
    needed = [each.name for each in others if each.default is inspect.Parameter.empty]
    assert needed == [], f"{LOOK} {module.__name__}.{ours.__name__}.__init__, which gives none"


@every_class
def test_they_keep_the_application(theirs, ours, module):
    """Under the name by which we call it."""
    kept = getattr(theirs(application), "wsgi_application", None)
    assert kept is application, f"{LOOK} wsgi_application in {module.__name__}"


def test_the_state_of_a_response():
    """A new instance has not begun, knows no length, and has no start before start_response."""
    state = vars(WsgiToAsgiInstance(application))
    assert state.get("response_started") is False, f"{LOOK} wsgi.Call._give"
    assert state.get("response_content_length", 0) is None, f"{LOOK} wsgi.Call.write"
    assert not hasattr(WsgiToAsgiInstance(application), "response_start"), (
        f"{LOOK} wsgi.Call.start_response, which takes its presence for a first call"
    )


def test_what_is_overridden_is_theirs():
    """Our methods stand in the place of methods, and nobody else of asgiref's calls them."""
    for name in ("run_wsgi_app", "start_response"):
        assert callable(getattr(WsgiToAsgiInstance, name, None)), f"{LOOK} wsgi.Call.{name}"
    source = inspect.getsource(WsgiToAsgiInstance.__call__)
    assert "await self.run_wsgi_app(" in source, f"{LOOK} wsgi.Call.run_wsgi_app"


def test_start_response_takes_what_pep_3333_says():
    """Status, headers and exc_info, in asgiref's class as in ours."""
    for kind in (WsgiToAsgiInstance, Call):
        parameters = list(inspect.signature(kind.start_response).parameters)
        expected = ["self", "status", "response_headers", "exc_info"]
        assert parameters == expected, f"{LOOK} wsgi.Call.start_response"


def names_of(kind):
    """What a class of ours defines, and what its methods set on ``self``."""
    tree = ast.parse(inspect.getsource(kind))
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    return set(vars(kind)) | {
        node.attr
        for node in attributes
        if isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"
    }


@every_class
def test_nothing_of_ours_hides_anything_of_theirs(theirs, ours, module):
    """A new attribute of asgiref's may have a name that we have given to something else."""
    taken = names_of(ours) & (set(vars(theirs)) | set(vars(theirs(application))))
    expected = {name for name in taken if name.startswith("__")}
    if ours is Call:
        expected |= {"run_wsgi_app", "start_response"}  # overridden
        expected |= {"response_started", "response_content_length"}  # shared
    assert taken == expected, f"{LOOK} {module.__name__}.{ours.__name__}: {taken - expected}"


# -- servers ----------------------------------------------------------------------------------

PIECE = Pipe.PIECE_BYTES

DISCONNECT = {"type": "http.disconnect"}


def piece(body, more=True):
    return {"type": "http.request", "body": body, "more_body": more}


@pytest.fixture
def closed(app):
    """Routes that read no body; set when the endless one's generator has been closed."""
    closed = threading.Event()

    @app.route("/endless", methods=["GET", "POST"])
    def endless():
        def generate():
            try:
                while True:
                    yield b"x" * 1000
            finally:
                closed.set()

        return Response(generate())

    @app.route("/stream", methods=["GET", "POST"])
    def stream():
        return Response(iter([b"a", b"b"]))

    @app.route("/", methods=["GET", "POST"])
    def answer():
        return "answer"

    return closed


async def call(asgi, receive, send, path="/", method="GET", headers=()):
    """One request; the application must come back."""
    with anyio.fail_after(TIMEOUT):
        await asgi(http_scope(method, path, headers), receive, send)


def test_i5_a_client_that_leaves_in_its_upload_is_seen(run, websockets, closed):
    """A view that reads nothing, and a body that waits: the news lies behind it."""
    asgi = websockets.asgi_app()

    async def main():
        headers = [("content-length", "1000000")]
        async with exchange(asgi, "POST", "/endless", headers, body=None) as opened:
            opened.put_body(b"x" * PIECE, more=True)
            assert await opened.get_status() == 200
            await opened.read()
            opened.leave()
        await wait_until(closed.is_set)

    run(main)


@pytest.mark.parametrize("path", ["/", "/stream"])
def test_the_end_of_the_response_comes_behind_the_body(run, websockets, closed, path):
    """hypercorn takes the last chunk when there is room behind the body that nobody reads."""
    asgi = websockets.asgi_app()

    async def main():
        pieces = [piece(b"x" * PIECE)] * 20 + [piece(b"", more=False), DISCONNECT]
        received, sent = anyio.Event(), []

        async def receive():
            if len(pieces) == 1:
                received.set()
            await anyio.lowlevel.checkpoint()
            return pieces.pop(0) if len(pieces) > 1 else pieces[0]

        async def send(message):
            if message["type"] == "http.response.body" and not message.get("more_body"):
                await received.wait()
            sent.append(message)

        headers = [("content-length", str(20 * PIECE))]
        await call(asgi, receive, send, path, "POST", headers)
        assert sent[-1].get("more_body") is False
        assert websockets.stats().send_timeouts == 0

    run(main)


@pytest.mark.parametrize("path", ["/", "/stream"])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_the_last_send_is_not_cut_short(run, websockets, closed, path, method):
    """hypercorn says that the exchange is over while it still takes the last chunk."""
    asgi = websockets.asgi_app()

    async def main():
        over, sent = anyio.Event(), []
        messages = [piece(b"x" * 10)] if method == "POST" else [piece(b"", more=False)]

        async def receive():
            if messages:
                return messages.pop(0)
            await over.wait()
            return DISCONNECT

        async def send(message):
            if message["type"] == "http.response.body" and not message.get("more_body"):
                over.set()
                for _ in range(10):
                    await anyio.lowlevel.checkpoint()
            sent.append(message)

        headers = [("content-length", "1000")] if method == "POST" else []
        await call(asgi, receive, send, path, method, headers)
        assert sent[-1].get("more_body") is False

    run(main)


@pytest.mark.parametrize("stuck", ["http.response.start", "http.response.body"])
@pytest.mark.parametrize("path", ["/", "/endless"])
def test_i11_a_client_that_takes_nothing_is_given_up(app, run, closed, monkeypatch, stuck, path):
    """A send that does not return ends after WEBSOCKETS_SEND_TIMEOUT, is counted, and closes."""
    monkeypatch.setattr(http, "END_TIMEOUT", 0.05)
    app.config["WEBSOCKETS_SEND_TIMEOUT"] = 0.1
    websockets = WebSockets(app)
    asgi = websockets.asgi_app()

    async def main():
        messages = [piece(b"", more=False)]

        async def receive():
            if messages:
                return messages.pop(0)
            return await anyio.sleep_forever()

        async def send(message):
            if message["type"] == stuck:
                await anyio.sleep_forever()

        await call(asgi, receive, send, path)
        assert websockets.stats().send_timeouts == 1
        if path == "/endless":
            await wait_until(closed.is_set)

    run(main)


def test_an_error_of_send_is_raised_as_itself(run, websockets, closed):
    """And not in a group; the thread is let go."""
    asgi = websockets.asgi_app()

    async def main():
        error, messages, sent = ValueError("of the server"), [piece(b"", more=False)], []

        async def receive():
            return messages.pop() if messages else await anyio.sleep_forever()

        async def send(message):
            sent.append(message)
            await anyio.lowlevel.checkpoint()
            if len(sent) == 3:
                raise error

        with pytest.raises(ValueError) as caught:
            await call(asgi, receive, send, "/endless")
        assert caught.value is error
        await wait_until(closed.is_set)

    run(main)


def test_i5_a_task_that_is_cancelled_lets_its_thread_go(run, websockets, closed):
    """A server that stops cancels the request; the generator is closed at its next chunk."""
    asgi = websockets.asgi_app()

    async def main():
        sent = []

        async def receive():
            return await anyio.sleep_forever() if sent else piece(b"", more=False)

        async def send(message):
            sent.append(message)
            await anyio.lowlevel.checkpoint()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(call, asgi, receive, send, "/endless")
            await wait_until(lambda: len(sent) > 3)
            assert not closed.is_set()
            tasks.cancel_scope.cancel()
        await wait_until(closed.is_set)

    run(main)
