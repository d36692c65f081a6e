"""What the isolation test serves: views that look at everything that belongs to one connection.

Every connection, and every HTTP request among them, has a token of its own: in its query string,
in a header, in its session's cookie. Whatever the application sees of a connection is compared
with the token in the environ that the server made for it, in each hook, in the view, again after
each wait, and in the threads and tasks that the view starts. What does not fit is a leak, and is
kept for ``/results``.

``serve`` is what should be leak-proof; the ``leak_*`` factories break it on purpose, each in one
way, so that the test can tell that a leak is seen.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import asdict
from typing import Any
from urllib.parse import parse_qs

from flask import (
    Flask,
    Response,
    abort,
    copy_current_request_context,
    flash,
    g,
    get_flashed_messages,
    has_app_context,
    has_request_context,
    request,
    session,
)
from flask.ctx import _AppCtxGlobals
from flask.sessions import SecureCookieSessionInterface

from flask_websockets import AsyncWebSocket, WebSocket, WebSockets

SECRET = "of the tests"
#: Seconds after which a view stops waiting for a test that has failed.
PATIENCE = 20.0

#: Set by the views alone: nothing of it may be there when another connection begins.
OF_THE_VIEW: ContextVar[str | None] = ContextVar("OF_THE_VIEW", default=None)
#: Set by the ASGI middleware in the connection's task: every view sees its own.
OF_THE_MIDDLEWARE: ContextVar[str | None] = ContextVar("OF_THE_MIDDLEWARE", default=None)


class Deliberate(Exception):
    """An error that the test asked for."""


class Book:
    """What was seen. Every method may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        #: The first of each kind; all of them are counted. Guarded by _lock.
        self._kept: dict[tuple[str, str], dict[str, str]] = {}
        self._counts: Counter[str] = Counter()  # guarded by _lock
        self._checks: Counter[str] = Counter()  # guarded by _lock

    def count(self, name: str) -> None:
        with self._lock:
            self._counts[name] += 1

    def compare(self, where: str, **pairs: tuple[object, object]) -> None:
        """Compare what was seen with what was expected, by name."""
        leaks = [
            {"where": where, "what": what, "seen": repr(seen), "expected": repr(expected)}
            for what, (seen, expected) in pairs.items()
            if seen != expected
        ]
        with self._lock:
            self._checks[where] += 1
            for leak in leaks:
                self._counts["leaks"] += 1
                self._counts[f"leaks of {leak['what']}"] += 1
                self._kept.setdefault((where, leak["what"]), leak)

    def report(self) -> dict[str, Any]:
        with self._lock:
            return {
                "leaks": list(self._kept.values()),
                "counts": dict(self._counts),
                "checks": dict(self._checks),
            }


def token_of(query: str) -> str:
    return parse_qs(query).get("token", ["none"])[0]


def make(
    app_changes: Callable[[Flask], None] = lambda app: None,
) -> Callable[..., Any]:
    """The ASGI application."""
    app = Flask(__name__)
    app.secret_key = SECRET
    app.config["WEBSOCKETS_CLOSE_TIMEOUT"] = 1  # for async views that wait for something else
    app.logger.disabled = True  # views that fail on purpose: their tracebacks are no news
    websockets = WebSockets(app)
    book = Book()
    add_hooks(app, book)
    add_sync_views(websockets, book)
    add_async_views(websockets, book)
    add_http_views(app, websockets, book)
    app_changes(app)
    return with_context_variable(websockets.asgi_app(), book)


def with_context_variable(asgi: Callable[..., Any], book: Book) -> Callable[..., Any]:
    """Middleware that sets a variable, and expects that a view has set nothing out here."""

    async def middleware(scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return await asgi(scope, receive, send)
        token = token_of(scope["query_string"].decode())
        OF_THE_MIDDLEWARE.set(token)
        try:
            await asgi(scope, receive, send)
        finally:
            book.compare(
                "the middleware, at the end",
                middleware=(OF_THE_MIDDLEWARE.get(), token),
                variable=(OF_THE_VIEW.get(), None),
                contexts=(has_app_context() or has_request_context(), False),
            )

    return middleware


# -- looking ---------------------------------------------------------------------------------------


def look_at_the_request(book: Book, where: str, token: str) -> None:
    """What every context of a connection has, a copied one as well."""
    book.compare(
        where,
        request=(request.args.get("token"), token),
        headers=(request.headers.get("X-Token"), token),
        attribute=(getattr(request, "isolation_token", None), token),
        session=(session.get("token"), token),
        note=(session.get("note", token), token),
        middleware=(OF_THE_MIDDLEWARE.get(), token),
    )


def look(book: Book, where: str, token: str) -> None:
    """Everything, once the view has set what is its own."""
    look_at_the_request(book, where, token)
    book.compare(
        where,
        g=(getattr(g, "token", None), token),
        view_g=(getattr(g, "of_the_view", None), token),
        variable=(OF_THE_VIEW.get(), token),
    )


def enter(book: Book, kind: str, environ: dict[str, Any]) -> str:
    """The beginning of every view: it is clean; from here on it is marked."""
    token = token_of(environ["QUERY_STRING"])
    look_at_the_request(book, "the view's beginning", token)
    book.compare(
        "the view's beginning",
        g=(g.token, token),
        view_g=(hasattr(g, "of_the_view"), False),
        variable=(OF_THE_VIEW.get(), None),
    )
    g.of_the_view = token
    OF_THE_VIEW.set(token)
    book.count(f"entered {kind}")
    return token


def add_hooks(app: Flask, book: Book) -> None:
    def own() -> str:
        return token_of(request.environ["QUERY_STRING"])

    def counts() -> bool:
        return bool(request.path != "/results")

    @app.before_request
    def before() -> None:
        if not counts():
            return
        token = own()
        book.compare(
            "before_request",
            g=(sorted(g), []),
            attribute=(getattr(request, "isolation_token", None), None),
            variable=(OF_THE_VIEW.get(), None),
            session=(session.get("token"), token),
            note=("note" in session, False),
            middleware=(OF_THE_MIDDLEWARE.get(), token),
        )
        g.token = token
        request.isolation_token = token  # type: ignore[attr-defined]

    @app.errorhandler(Deliberate)
    def failed(error: Deliberate) -> tuple[str, int]:
        look_at_the_request(book, "the error handler", own())
        book.compare("the error handler", error=(str(error), own()))
        return own(), 500

    @app.after_request
    def after(response: Response) -> Response:
        if counts():
            token = own()
            look_at_the_request(book, "after_request", token)
            # The view of a plain 404 has set none, that of another connection another.
            seen = getattr(g, "of_the_view", token)
            book.compare("after_request", g=(g.token, token), view_g=(seen, token))
        return response

    @app.teardown_request
    def teardown(error: BaseException | None) -> None:
        # A copied request context is torn down as well, with a g of its own.
        if counts() and hasattr(g, "token"):
            token = own()
            look_at_the_request(book, "teardown_request", token)
            seen = getattr(g, "of_the_view", token)
            book.compare("teardown_request", g=(g.token, token), view_g=(seen, token))
            if isinstance(error, Deliberate):
                book.compare("teardown_request", error=(str(error), token))
            book.count("torn down")


# -- sync views ------------------------------------------------------------------------------------


def add_sync_views(websockets: WebSockets, book: Book) -> None:
    pool = ThreadPoolExecutor(4)  # its threads serve all connections, one after the other

    def view(kind: str) -> Callable[[Callable[..., Any]], None]:
        def add(function: Callable[..., Any]) -> None:
            def entered(ws: WebSocket) -> Any:
                return function(ws, enter(book, f"sync {kind}", ws.environ))

            websockets.route(f"/sync/{kind}", endpoint=f"sync_{kind}")(entered)

        return add

    @view("echo")
    def echo(ws: WebSocket, token: str) -> None:
        ws.send(token)
        for data in ws.iter_text():
            look(book, "a sync view, after a receive", token)
            book.compare("a sync view, after a receive", message=(data, token))
            ws.send(token)

    @view("early")
    def early(ws: WebSocket, token: str) -> None:
        raise Deliberate(token)

    @view("late")
    def late(ws: WebSocket, token: str) -> None:
        ws.send(token)
        ws.receive(PATIENCE)
        look(book, "a sync view, before it fails", token)
        raise Deliberate(token)

    @view("abort")
    def refuse(ws: WebSocket, token: str) -> None:
        abort(418)

    @view("abort_late")
    def refuse_late(ws: WebSocket, token: str) -> None:
        ws.send(token)
        abort(409)

    @view("response")
    def response(ws: WebSocket, token: str) -> Response:
        return Response(token, 402)

    @view("leave")
    def leave(ws: WebSocket, token: str) -> None:
        ws.send(token)
        ws.wait_closed(PATIENCE)
        look(book, "a sync view whose client has left", token)

    @view("state")
    def state(ws: WebSocket, token: str) -> None:
        session["note"] = token
        flash(token)
        book.compare("a sync view", flashed=(get_flashed_messages(), [token]))
        ws.send(token)
        for _ in ws.iter_text():
            look(book, "a sync view with a changed session", token)
            ws.send(session["note"])

    @view("spawn")
    def spawn(ws: WebSocket, token: str) -> None:
        ws.accept()

        def in_its_context() -> None:
            look(book, "a thread in a copied context", token)
            OF_THE_VIEW.set("of a thread")  # stays there
            ws.send(token)

        @copy_current_request_context
        def in_a_request_context() -> None:
            look_in_a_thread()

        def look_in_a_thread() -> None:
            book.compare(
                "a thread in a request context",
                request=(request.args.get("token"), token),
                session=(session.get("token"), token),
                g=(sorted(g), []),
                variable=(OF_THE_VIEW.get(), None),
                middleware=(OF_THE_MIDDLEWARE.get(), None),
            )
            g.token_of_a_thread = token
            ws.send(token)

        def bare() -> None:
            book.compare(
                "a thread of a pool",
                contexts=(has_app_context() or has_request_context(), False),
                variable=(OF_THE_VIEW.get(), None),
            )
            ws.send(token)

        thread = threading.Thread(target=contextvars.copy_context().run, args=(in_its_context,))
        thread.start()
        futures = [pool.submit(in_a_request_context), pool.submit(bare)]
        thread.join(PATIENCE)
        for future in futures:
            future.result(PATIENCE)
        look(book, "a sync view, after its threads", token)
        ws.receive(PATIENCE)
        look(book, "a sync view, after its threads", token)


# -- async views -----------------------------------------------------------------------------------


def add_async_views(websockets: WebSockets, book: Book) -> None:
    def view(kind: str) -> Callable[[Callable[..., Any]], None]:
        def add(function: Callable[..., Any]) -> None:
            async def entered(ws: AsyncWebSocket) -> Any:
                return await function(ws, enter(book, f"async {kind}", ws.environ))

            websockets.route(f"/async/{kind}", endpoint=f"async_{kind}")(entered)

        return add

    @view("echo")
    async def echo(ws: AsyncWebSocket, token: str) -> None:
        await ws.send(token)
        look(book, "an async view, after a send", token)
        async for data in ws.iter_text():
            look(book, "an async view, after a receive", token)
            book.compare("an async view, after a receive", message=(data, token))
            await asyncio.sleep(0)
            look(book, "an async view, after a sleep", token)
            await ws.send(token)

    @view("early")
    async def early(ws: AsyncWebSocket, token: str) -> None:
        await asyncio.sleep(0)
        raise Deliberate(token)

    @view("late")
    async def late(ws: AsyncWebSocket, token: str) -> None:
        await ws.send(token)
        await ws.receive(PATIENCE)
        look(book, "an async view, before it fails", token)
        raise Deliberate(token)

    @view("abort")
    async def refuse(ws: AsyncWebSocket, token: str) -> None:
        await asyncio.sleep(0)
        abort(418)

    @view("abort_late")
    async def refuse_late(ws: AsyncWebSocket, token: str) -> None:
        await ws.send(token)
        abort(409)

    @view("response")
    async def response(ws: AsyncWebSocket, token: str) -> Response:
        await asyncio.sleep(0)
        look(book, "an async view, before its accept", token)
        return Response(token, 402)

    @view("leave")
    async def leave(ws: AsyncWebSocket, token: str) -> None:
        try:
            await ws.send(token)
            await asyncio.sleep(PATIENCE)  # until it is cancelled
        finally:
            look(book, "an async view whose client has left", token)
            await asyncio.sleep(0)
            look(book, "an async view whose client has left", token)

    @view("state")
    async def state(ws: AsyncWebSocket, token: str) -> None:
        session["note"] = token
        flash(token)
        book.compare("an async view", flashed=(get_flashed_messages(), [token]))
        await ws.send(token)
        async for _ in ws.iter_text():
            look(book, "an async view with a changed session", token)
            await ws.send(session["note"])

    @view("spawn")
    async def spawn(ws: AsyncWebSocket, token: str) -> None:
        await ws.accept()

        async def task() -> None:
            look(book, "a task", token)
            await ws.send(token)
            OF_THE_VIEW.set("of a task")  # stays there

        def thread() -> str:
            look(book, "a thread of an async view", token)
            OF_THE_VIEW.set("of a thread")
            return token

        first = asyncio.create_task(task())
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(task())
        await first
        await ws.send(await asyncio.to_thread(thread))
        look(book, "an async view, after its tasks", token)
        await ws.receive(PATIENCE)
        look(book, "an async view, after its tasks", token)


# -- HTTP ------------------------------------------------------------------------------------------


def add_http_views(app: Flask, websockets: WebSockets, book: Book) -> None:
    @app.get("/http/sync")
    def sync_view() -> str:
        token = enter(book, "http sync", request.environ)
        look(book, "an HTTP view", token)
        return token

    @app.get("/http/async")
    async def async_view() -> str:
        token = enter(book, "http async", request.environ)
        await asyncio.sleep(0)
        look(book, "an async HTTP view", token)
        return token

    @app.get("/http/early")
    def failing_view() -> str:
        raise Deliberate(enter(book, "http early", request.environ))

    @app.get("/results")
    def results() -> dict[str, Any]:
        return {**book.report(), "stats": asdict(websockets.stats())}


# -- what to serve ---------------------------------------------------------------------------------


def serve() -> Callable[..., Any]:
    """As it should be."""
    return make()


def leak_context() -> Callable[..., Any]:
    """One context for all calls of the application: what a view sets is there for the next."""

    def change(app: Flask) -> None:
        shared, inner, turn = contextvars.copy_context(), app.wsgi_app, threading.Lock()

        def wsgi_app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
            with turn:  # a context can be entered once at a time
                return shared.run(inner, environ, start_response)

        app.wsgi_app = wsgi_app  # type: ignore[method-assign]

    return make(change)


def leak_g() -> Callable[..., Any]:
    """One g for all connections."""

    def change(app: Flask) -> None:
        shared = _AppCtxGlobals()
        app.app_ctx_globals_class = lambda: shared  # type: ignore[assignment, misc]

    return make(change)


def leak_session() -> Callable[..., Any]:
    """The session of whoever came first."""

    class Interface(SecureCookieSessionInterface):
        first: Any = None

        def open_session(self, app: Flask, request: Any) -> Any:
            opened = super().open_session(app, request)
            if opened and self.first is None:
                self.first = opened
            return self.first if opened else opened

    def change(app: Flask) -> None:
        app.session_interface = Interface()

    return make(change)


def leak_request() -> Callable[..., Any]:
    """The request of whoever came first, with the environ of each."""

    def change(app: Flask) -> None:
        seen: list[str] = []
        kind = app.request_class

        class Request(kind):  # type: ignore[valid-type, misc]
            def __init__(self, environ: dict[str, Any], *arguments: Any, **options: Any) -> None:
                if "HTTP_X_TOKEN" in environ:
                    seen.append(environ["HTTP_X_TOKEN"])
                    environ = {**environ, "HTTP_X_TOKEN": seen[0]}
                super().__init__(environ, *arguments, **options)

        app.request_class = Request

    return make(change)


def leak_between() -> Callable[..., Any]:
    """After a receive, the view finds itself in the context of whoever came first."""
    first: list[contextvars.Context] = []
    original = globals()["look"]

    def look_elsewhere(book: Book, where: str, token: str) -> None:
        if not first:
            first.append(contextvars.copy_context())
        first[0].copy().run(original, book, where, token)

    globals()["look"] = look_elsewhere
    return make()
