"""Flask's own promises, and its libraries, through the HTTP adapter: threads, contexts, ends."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import re
import threading
import time
from collections import Counter
from contextlib import AsyncExitStack
from functools import partial

import anyio
import anyio.lowlevel
import flask
import pytest
from asgiref.sync import sync_to_async
from flask import Flask, Response, g, request, session
from werkzeug.middleware.proxy_fix import ProxyFix
from werkzeug.test import create_environ

from flask_websockets import WebSockets

from .asgi_driver import TIMEOUT, wait_until
from .http_driver import Browser, all_at_once, exchange
from .http_driver import request as fetch

variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")


def make(app: Flask, **settings: object):
    app.config.update(settings)
    return WebSockets(app).asgi_app(app)


# -- threads ---------------------------------------------------------------------------------------


def test_threads_are_named_daemons_and_no_more_than_configured(run, app):
    """Many requests at once run on WEBSOCKETS_HTTP_THREADS threads, all of them, no more."""
    seen: set[threading.Thread] = set()
    inside: set[threading.Thread] = set()
    most = 0
    together = threading.Barrier(3)

    @app.get("/")
    def view():
        nonlocal most
        thread = threading.current_thread()
        seen.add(thread)
        inside.add(thread)
        together.wait(TIMEOUT)  # three at a time, or not at all
        most = max(most, len(inside))
        together.wait(TIMEOUT)  # nobody leaves before everybody has counted
        inside.discard(thread)
        return thread.name

    asgi = make(app, WEBSOCKETS_HTTP_THREADS=3)

    async def main():
        answers = await all_at_once(*[partial(fetch, asgi)] * 30)
        assert {answer.status for answer in answers} == {200}

    run(main)
    assert most == len(seen) == 3
    assert all(thread.daemon for thread in seen)
    names = {thread.name for thread in seen}
    assert len(names) == 3
    assert all(re.fullmatch("flask-websockets-http-[1-9][0-9]*", name) for name in names), names


def test_threads_are_used_again(run, app):
    """Requests one after the other need few threads, not one each."""
    app.add_url_rule("/", view_func=lambda: str(threading.get_ident()))
    asgi = make(app)

    async def main():
        seen = Counter([(await fetch(asgi)).body for _ in range(50)])
        # One would do, but a thread may be on its way back yet when the next request comes.
        assert len(seen) <= 5, seen

    run(main)


def test_the_queue_is_first_in_first_out_and_what_is_above_never_runs(run, app, monkeypatch):
    """Queued requests run in their order; a refused one gets 503 and Retry-After, and no view."""
    monkeypatch.setattr("flask_websockets.bridge.threads.QUEUED_PER_THREAD", 4)
    go, started = threading.Event(), []

    @app.get("/<int:number>")
    def view(number):
        started.append(number)
        assert go.wait(TIMEOUT)
        return str(number)

    asgi = make(app, WEBSOCKETS_HTTP_THREADS=1)

    async def main():
        async with AsyncExitStack() as stack:
            peers = []
            for number in range(5):
                peers.append(await stack.enter_async_context(exchange(asgi, path=f"/{number}")))
                # Trio runs its tasks in any order: the next comes when this one is in the queue.
                await wait_until(lambda: peers[-1].reads)
                for _ in range(10):
                    await anyio.lowlevel.checkpoint()
            await wait_until(lambda: started == [0])
            # An upload is turned away as well, and nobody reads it.
            headers = [("content-length", "1000")]
            async with exchange(asgi, "POST", "/5", headers, body=None) as refused_peer:
                refused = await refused_peer.answer()
            assert refused.status == 503
            assert int(refused.header("retry-after")) > 0
            assert int(refused.header("content-length")) == len(refused.body) > 0
            go.set()
            answers = [await peer.answer() for peer in peers]
        assert [answer.text for answer in answers] == list("01234")
        assert started == [0, 1, 2, 3, 4]
        assert (await fetch(asgi, path="/6")).text == "6"  # and there is room again

    run(main)


def test_a_refusal_leaves_no_place_taken(run, app, monkeypatch):
    """However many are refused, after them as many as before find room."""
    monkeypatch.setattr("flask_websockets.bridge.threads.QUEUED_PER_THREAD", 1)
    go = threading.Event()

    @app.get("/")
    def view():
        assert go.wait(TIMEOUT)
        return "here"

    asgi = make(app, WEBSOCKETS_HTTP_THREADS=2)

    async def main():
        statuses: list[int] = []

        async def status():
            statuses.append((await fetch(asgi)).status)

        async with anyio.create_task_group() as tasks:
            for _ in range(30):
                tasks.start_soon(status)
            await wait_until(lambda: len(statuses) == 26)
            assert set(statuses) == {503}
            go.set()
        assert Counter(statuses) == {503: 26, 200: 4}
        # A thread that has answered may be on its way back yet, and still counts.
        with anyio.fail_after(TIMEOUT):
            while True:
                answers = await all_at_once(*[partial(fetch, asgi)] * 4)
                if all(answer.status == 200 for answer in answers):
                    break

    run(main)


# -- context variables -----------------------------------------------------------------------------


def test_the_variables_of_an_asgi_middleware_reach_everything_of_a_request(run, app):
    """View, generator, close callbacks and teardown see them, and each other's; nothing leaks."""
    seen: dict[str, str] = {}
    closed = threading.Event()

    @app.get("/")
    def view():
        seen["view"] = variable.get()
        variable.set("by the view")

        def generate():
            seen["generator"] = variable.get()
            variable.set("by the generator")
            yield "a"
            yield "b"

        response = Response(generate())

        @response.call_on_close
        def close():
            seen["close"] = variable.get()
            closed.set()

        return response

    inner = make(app)

    async def middleware(scope, receive, send):
        async def checked_send(message):
            seen.setdefault("send", variable.get())
            assert variable.get() == "by the middleware"
            await send(message)

        variable.set("by the middleware")
        await inner(scope, receive, checked_send)
        seen["middleware"] = variable.get()

    async def main():
        for _ in range(2):  # in one task, as the requests of one connection
            seen.clear()
            closed.clear()
            assert (await fetch(middleware)).text == "ab"
            await wait_until(closed.is_set)
            assert seen == {
                "view": "by the middleware",
                "generator": "by the view",
                "close": "by the generator",
                "send": "by the middleware",
                "middleware": "by the middleware",
            }

    run(main)


def test_the_next_request_of_a_connection_sees_nothing_of_the_last(run, app):
    """What a view sets, in a sync or an async view, is gone with its request."""

    @app.get("/sync")
    def sync_view():
        before = variable.get()
        variable.set("leaked")
        return before

    @app.get("/async")
    async def async_view():
        before = variable.get()
        variable.set("leaked")
        await asyncio.sleep(0)
        return before

    asgi = make(app, WEBSOCKETS_HTTP_THREADS=1)  # the same thread for all

    async def main():
        for path in ("/sync", "/async") * 3:
            before = contextvars.copy_context()
            assert (await fetch(asgi, path=path)).text == "unset"
            assert variable.get() == "unset"
            after = contextvars.copy_context()
            assert dict(after.items()) == dict(before.items())  # neither ours nor asgiref's

    run(main)


def test_a_server_within_an_application_context(run, app):
    """Its ``g`` is not everybody's, and teardown functions run for each request."""
    ends: list[object] = []

    @app.teardown_appcontext
    def teardown(error):
        ends.append(error)

    @app.get("/")
    def view():
        g.number = g.get("number", 0) + 1
        return str(g.number)

    asgi = make(app)

    async def main():
        assert [(await fetch(asgi)).text for _ in range(3)] == ["1", "1", "1"]

    with app.app_context():
        run(main)
        assert ends == [None] * 3


def test_call_generator_and_close_run_in_one_thread(run, app):
    """Iterables bound to their thread, such as SQLite's cursors, may be used."""
    threads: dict[str, set[int]] = {}
    closed = threading.Event()

    def note(what):
        threads.setdefault(what, set()).add(threading.get_ident())

    class Chunks:
        def __iter__(self):
            note("iter")
            self._left = 4
            return self

        def __next__(self):
            note("next")
            self._left -= 1
            if self._left < 0:
                raise StopIteration
            return b"x"

        def close(self):
            note("close")
            closed.set()

    def application(environ, start_response):
        note("call")
        start_response("200 OK", [])
        return Chunks()

    app.wsgi_app = application
    asgi = make(app)

    async def main():
        async with exchange(asgi, unread=0) as peer:
            assert (await peer.answer()).body == b"xxxx"
            await wait_until(closed.is_set)
        assert set(threads) == {"call", "iter", "next", "close"}
        (thread,) = set.union(*threads.values())
        assert thread != threading.get_ident()

    run(main)


# -- async views -----------------------------------------------------------------------------------


def test_async_views_run_in_parallel(run, app):
    """Twenty async views meet, each from within its coroutine, with their own request and g."""
    together = threading.Barrier(20)

    @app.get("/<int:number>")
    async def view(number):
        g.number = number
        session["number"] = number
        variable.set(str(number))
        await asyncio.sleep(0.001)
        together.wait(TIMEOUT)
        await asyncio.sleep(0.001)
        return f"{g.number} {session['number']} {variable.get()} {request.path}"

    asgi = make(app)

    async def main():
        answers = await all_at_once(*(partial(fetch, asgi, path=f"/{n}") for n in range(20)))
        assert [a.text for a in answers] == [f"{n} {n} {n} /{n}" for n in range(20)]

    run(main)


def test_an_async_view_that_blocks_harms_nobody(run, app):
    """While an async view blocks its thread, other async and sync views and the loop go on."""
    go, blocked = threading.Event(), threading.Event()

    @app.get("/blocking")
    async def blocking():
        blocked.set()
        assert go.wait(TIMEOUT)
        return "at last"

    @app.get("/async")
    async def other():
        await asyncio.sleep(0.001)
        return "async"

    app.add_url_rule("/sync", view_func=lambda: "sync")
    asgi = make(app)

    async def main():
        async with exchange(asgi, path="/blocking") as peer:
            await wait_until(blocked.is_set)
            for _ in range(5):
                answers = await all_at_once(
                    partial(fetch, asgi, path="/async"), partial(fetch, asgi, path="/sync")
                )
                assert [answer.text for answer in answers] == ["async", "sync"]
            go.set()
            assert (await peer.answer()).text == "at last"

    run(main)


def test_variables_in_an_async_view(run, app):
    """The middleware's variable is seen; what the coroutine sets is seen after it."""
    seen = {}
    done = threading.Event()

    @app.before_request
    def before():
        seen["before"] = variable.get()
        variable.set("by before_request")

    @app.get("/")
    async def view():
        seen["view"] = variable.get()
        variable.set("by the view")
        await asyncio.sleep(0)
        return "done"

    @app.after_request
    async def after(response):
        seen["after"] = variable.get()
        return response

    @app.teardown_request
    def teardown(error):
        seen["teardown"] = variable.get()
        done.set()

    inner = make(app)

    async def middleware(scope, receive, send):
        variable.set("by the middleware")
        await inner(scope, receive, send)
        seen["middleware"] = variable.get()

    async def main():
        assert (await fetch(middleware)).text == "done"
        await wait_until(done.is_set)
        assert seen == {
            "before": "by the middleware",
            "view": "by before_request",
            "after": "by the view",
            "teardown": "by the view",
            "middleware": "by the middleware",
        }

    run(main)


def test_sync_to_async_inside_async_views(run, app):
    """Sensitive to threads it runs in the request's own thread, side by side with the others."""
    together = threading.Barrier(8)

    @app.get("/<int:number>")
    async def view(number):
        name = threading.current_thread().name
        g.number = number

        def inside():
            together.wait(TIMEOUT)
            variable.set(f"inside {number}")
            return threading.current_thread().name, request.path, g.number

        sensitive = await sync_to_async(inside)()
        seen = variable.get()
        other = await sync_to_async(lambda: request.path, thread_sensitive=False)()
        return {"view": name, "sensitive": sensitive, "other": other, "variable": seen}

    asgi = make(app)

    async def main():
        answers = await all_at_once(*(partial(fetch, asgi, path=f"/{n}") for n in range(8)))
        threads = set()
        for number, answer in enumerate(answers):
            data = flask.json.loads(answer.body)
            thread, path, seen = data["sensitive"]
            assert (path, seen) == (f"/{number}", number)
            assert data["other"] == f"/{number}"
            assert data["variable"] == f"inside {number}"
            assert thread.startswith("flask-websockets-http-")
            threads.add(thread)
        assert len(threads) == 8

    run(main)


def test_tasks_and_timeouts_inside_an_async_view(run, app):
    """gather, a task group and a timeout work; each view has an asyncio loop that runs."""

    @app.get("/")
    async def view():
        async def number(n):
            await asyncio.sleep(0)
            return n + g.base

        g.base = 10
        numbers = await asyncio.gather(*map(number, range(3)))
        async with asyncio.TaskGroup() as tasks:
            task = tasks.create_task(number(3))
        try:
            async with asyncio.timeout(0.01):
                await asyncio.sleep(TIMEOUT)
        except TimeoutError:
            return [*numbers, task.result(), request.path]

    asgi = make(app)

    async def main():
        for _ in range(3):
            answer = await fetch(asgi)
            assert flask.json.loads(answer.body) == [10, 11, 12, 13, "/"]

    run(main)


def test_an_async_view_that_raises(run, app, caplog):
    """Flask's error handler answers, or its 500, and the next request is none the worse."""

    class Trouble(Exception):
        pass

    @app.errorhandler(Trouble)
    async def trouble(error):
        return "trouble", 418

    @app.get("/trouble")
    async def troubled():
        raise Trouble

    @app.get("/error")
    async def error():
        raise KeyError("x")

    asgi = make(app, WEBSOCKETS_HTTP_THREADS=1)

    async def main():
        for _ in range(2):
            assert (await fetch(asgi, path="/trouble")).status == 418
            assert (await fetch(asgi, path="/error")).status == 500

    run(main)
    assert [record.name for record in caplog.records] == ["tests", "tests"]


# -- contexts of Flask -----------------------------------------------------------------------------


def test_copy_current_request_context_in_a_thread(run, app):
    """A thread that a view starts has the request, even after the response."""
    seen = []
    go, done = threading.Event(), threading.Event()

    @app.post("/<name>")
    def view(name):
        session["name"] = name

        @flask.copy_current_request_context
        def work():
            assert go.wait(TIMEOUT)
            seen.append((request.path, request.args["q"], session["name"], variable.get()))
            done.set()

        variable.set("the view's")
        threading.Thread(target=contextvars.copy_context().run, args=(work,), daemon=True).start()
        return "started"

    asgi = make(app)

    async def main():
        assert (await fetch(asgi, "POST", "/a?q=1")).text == "started"
        assert not seen
        go.set()
        await wait_until(done.is_set)
        assert seen == [("/a", "1", "a", "the view's")]

    run(main)


def count_teardowns(app: Flask) -> Counter[str]:
    """Count the calls of each teardown function, and what they were told."""
    counted: Counter[str] = Counter()

    @app.teardown_request
    def of_the_request(error):
        counted["request"] += 1
        if error is not None:
            counted[f"request {type(error).__name__}"] += 1

    @app.teardown_appcontext
    def of_the_context(error):
        counted["appcontext"] += 1

    return counted


BOTH_TEARDOWNS = {"request": 1, "appcontext": 1}


def teardowns_of_flask(app: Flask, counted: Counter[str], path: str, chunks: int) -> Counter[str]:
    """What is torn down when a plain call of Flask reads so many *chunks* and closes.

    Some releases of Flask tear a context down after the view, and once more after the stream.
    """
    counted.clear()
    body = app.wsgi_app(create_environ(path, method="POST"), lambda *_: None)
    for _ in zip(range(chunks), body, strict=False):
        pass
    body.close()
    result = Counter(counted)
    counted.clear()
    return result


def test_stream_with_context(run, app):
    """The generator has request, session and g; the last teardown comes after the stream's end."""
    counted = count_teardowns(app)
    at_the_end = Counter()

    @app.post("/<name>")
    def view(name):
        g.name = session["name"] = name

        @flask.stream_with_context
        def generate():
            yield f"{g.name} "
            yield f"{session['name']} "
            yield f"{request.path} {request.args['q']} "
            yield request.get_data(as_text=True)
            at_the_end.update(counted)

        return generate()

    expected = teardowns_of_flask(app, counted, "/a?q=1", 100)
    at_the_end.clear()
    asgi = make(app)

    async def main():
        answer = await fetch(asgi, "POST", "/a?q=1", [("content-length", "4")], b"body")
        assert answer.text == "a a /a 1 body"
        assert answer.header("set-cookie")
        await wait_until(lambda: counted == expected)
        assert at_the_end == expected - Counter(BOTH_TEARDOWNS)

    run(main)


def test_stream_with_context_when_the_client_leaves(run, app):
    """Its generator is closed, inside its contexts, and the last teardown comes after that."""
    counted = count_teardowns(app)
    at_the_end = []

    @app.post("/<name>")
    def view(name):
        g.name = name

        @flask.stream_with_context
        def generate():
            try:
                while True:
                    yield "x" * 10_000
            finally:
                at_the_end.append((g.name, request.path, counted.copy(), threading.get_ident()))

        response = Response(generate())
        response.call_on_close(lambda: at_the_end.append("closed"))
        return response

    expected = teardowns_of_flask(app, counted, "/a", 2)
    at_the_end.clear()
    asgi = make(app, WEBSOCKETS_HTTP_THREADS=1)

    async def main():
        async with exchange(asgi, "POST", "/a", unread=1) as peer:
            assert await peer.get_status() == 200
            assert await peer.read()
            peer.leave()
            await wait_until(lambda: len(at_the_end) == 2)
        name, path, before, thread = at_the_end[0]
        assert (name, path) == ("a", "/a")
        assert before["request"] == before["appcontext"] == expected["request"] - 1
        assert thread != threading.get_ident()
        assert at_the_end[1] == "closed"
        # The only thread serves the next request when all of the first is done.
        assert (await fetch(asgi, path="/")).status == 404
        await wait_until(lambda: counted == expected + Counter(BOTH_TEARDOWNS))

    run(main)


def test_after_this_request(run, app):
    """It changes the response of its own request, from a sync and from an async view."""

    def add_header():
        @flask.after_this_request
        def change(response):
            response.headers.add("X-After", request.path)
            return response

    @app.get("/sync")
    def sync_view():
        add_header()
        return ""

    @app.get("/async")
    async def async_view():
        await asyncio.sleep(0)
        add_header()
        return ""

    app.add_url_rule("/none", view_func=lambda: "")
    asgi = make(app, WEBSOCKETS_HTTP_THREADS=1)

    async def main():
        for path, expected in (("/sync", ["/sync"]), ("/async", ["/async"]), ("/none", [])):
            assert (await fetch(asgi, path=path)).all("x-after") == expected

    run(main)


@pytest.mark.parametrize("kind", ["plain", "error", "stream", "abort", "async", "unknown", "HEAD"])
def test_teardown_comes_once(run, app, kind):
    """Each teardown function is called once for a request, however that ends."""
    counted = count_teardowns(app)
    app.add_url_rule("/plain", "plain", lambda: "")
    app.add_url_rule("/abort", "abort", lambda: flask.abort(404))
    app.add_url_rule("/stream", "stream", lambda: (str(n) for n in range(3)))

    @app.get("/error")
    def error():
        raise KeyError

    @app.get("/async")
    async def async_view():
        return ""

    asgi = make(app)

    async def main():
        method, path = ("HEAD", "/plain") if kind == "HEAD" else ("GET", f"/{kind}")
        await fetch(asgi, method, path)
        await wait_until(lambda: counted["request"] and counted["appcontext"])
        # The same thread serves the next request only after all of the first is done.
        await fetch(asgi, path="/again")
        await wait_until(lambda: counted["appcontext"] >= 2)
        expected = {"request": 2, "appcontext": 2}
        assert counted == (expected | {"request KeyError": 1} if kind == "error" else expected)

    run(main)


def test_teardown_comes_once_when_the_client_leaves_before_the_answer(run, app):
    """A view that nobody waits for any more runs to its end, and is torn down once."""
    counted = count_teardowns(app)
    go, entered, closed = threading.Event(), threading.Event(), []

    @app.get("/")
    def view():
        entered.set()
        assert go.wait(TIMEOUT)
        response = Response("late")
        response.call_on_close(lambda: closed.append(1))
        return response

    asgi = make(app)

    async def main():
        async with exchange(asgi) as peer:
            await wait_until(entered.is_set)
            peer.leave()
            go.set()
            await wait_until(lambda: closed and counted == BOTH_TEARDOWNS)
        await fetch(asgi, path="/again")
        assert closed == [1]

    run(main)
    assert counted == {"request": 2, "appcontext": 2}


def test_a_client_that_leaves_during_its_upload(run, app, caplog):
    """The view's read ends it without a traceback, and teardown comes once."""
    counted = count_teardowns(app)
    reading = threading.Event()

    @app.post("/")
    def view():
        reading.set()
        return str(len(request.get_data()))

    asgi = make(app)

    async def main():
        headers = [("content-length", "100")]
        async with exchange(asgi, "POST", headers=headers, body=None) as peer:
            peer.put_body(b"x" * 10, more=True)
            await wait_until(reading.is_set)
            peer.leave()
            await wait_until(lambda: counted["request"] and counted["appcontext"])
        assert (await fetch(asgi, path="/again")).status == 404

    run(main)
    assert counted["request"] == counted["appcontext"] == 2
    assert caplog.records == []


def test_close_callbacks_come_in_their_order_after_the_generator(run, app):
    """The iterable is closed first, then the callbacks in the order in which they were added."""
    order = []

    @app.get("/")
    def view():
        def generate():
            try:
                yield "x"
            finally:
                order.append("generator")

        response = Response(generate())
        for number in range(3):
            response.call_on_close(lambda number=number: order.append(number))
        return response

    asgi = make(app)

    async def main():
        assert (await fetch(asgi)).text == "x"
        await wait_until(lambda: len(order) == 4)
        assert order == ["generator", 0, 1, 2]

    run(main)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/", ["request_started", "request_finished", "request_tearing_down"]),
        ("/async", ["request_started", "request_finished", "request_tearing_down"]),
        (
            "/error",
            [
                "request_started",
                "got_request_exception",
                "request_finished",
                "request_tearing_down",
            ],
        ),
    ],
)
def test_the_request_signals(run, app, path, expected):
    """Each comes once, in its order, in the request's thread, with the application as sender."""
    seen = []
    app.add_url_rule("/", view_func=lambda: "")

    @app.get("/error")
    def error():
        raise KeyError("x")

    @app.get("/async")
    async def async_view():
        return ""

    def note(name, sender, **_):
        seen.append((name, sender, threading.current_thread().name))

    receivers = {name: partial(note, name) for name in expected}
    for name in expected:
        getattr(flask, name).connect(receivers[name], app)
    asgi = make(app)

    async def main():
        await fetch(asgi, path=path)
        await wait_until(lambda: seen and seen[-1][0] == "request_tearing_down")

    run(main)
    assert [(name, sender) for name, sender, _ in seen] == [(name, app) for name in expected]
    (thread,) = {thread for _, _, thread in seen}
    assert thread.startswith("flask-websockets-http-")


# -- libraries -------------------------------------------------------------------------------------


@pytest.fixture
def database(app, tmp_path):
    """Flask-SQLAlchemy on a file, with a pool that a leak of connections soon empties."""
    flask_sqlalchemy = pytest.importorskip("flask_sqlalchemy")
    from sqlalchemy.pool import QueuePool

    app.config["SQLALCHEMY_DATABASE_URI"] = f"sqlite:///{tmp_path / 'test.db'}"
    app.config["SQLALCHEMY_ENGINE_OPTIONS"] = {
        "poolclass": QueuePool,
        "pool_size": 10,
        "max_overflow": 0,
        "pool_timeout": TIMEOUT,
        "connect_args": {"timeout": TIMEOUT},
    }
    db = flask_sqlalchemy.SQLAlchemy(app)

    class Item(db.Model):
        id = db.Column(db.Integer, primary_key=True)
        name = db.Column(db.String, nullable=False)

    db.Item = Item
    with app.app_context():
        db.create_all()
        db.session.add_all([Item(id=1, name="first"), Item(id=2, name="second")])
        db.session.commit()
        engine = db.engine
    yield db
    engine.dispose()


def test_sqlalchemy_gives_every_connection_back(run, app, database):
    """After many parallel requests of all sorts the pool has all its connections."""
    db, Item = database, database.Item

    @app.post("/add/<name>")
    def add(name):
        db.session.add(Item(name=name))
        db.session.commit()
        return str(db.session.query(Item).filter_by(name=name).count())

    @app.get("/read")
    def read():
        return db.session.get(Item, 1).name

    @app.get("/error")
    def error():
        db.session.add(Item(name="never committed"))
        db.session.flush()
        raise KeyError("x")

    @app.get("/abort")
    def aborted():
        db.session.get(Item, 1)
        flask.abort(409)

    @app.get("/async")
    async def async_read():
        await asyncio.sleep(0)
        return db.session.get(Item, 2).name

    @app.get("/stream")
    def stream():
        @flask.stream_with_context
        def generate():
            for item in db.session.query(Item).filter(Item.id < 3).order_by(Item.id):
                yield item.name
            yield "!"

        return generate()

    asgi = make(app, WEBSOCKETS_HTTP_THREADS=20)
    expected = {
        "/read": (200, "first"),
        "/error": (500, None),
        "/abort": (409, None),
        "/async": (200, "second"),
        "/stream": (200, "firstsecond!"),
    }

    async def main():
        for turn in range(2):
            calls = [(path, partial(fetch, asgi, path=path)) for path in expected] * 8
            calls += [
                ("/add", partial(fetch, asgi, "POST", f"/add/{turn}-{number}"))
                for number in range(10)
            ]
            answers = await all_at_once(*(call for _, call in calls))
            for (path, _), answer in zip(calls, answers, strict=True):
                status, text = expected.get(path, (200, "1"))
                assert answer.status == status, (path, answer)
                assert text is None or answer.text == text, path
            with app.app_context():
                pool = db.engine.pool
            await wait_until(lambda pool=pool: pool.checkedout() == 0)
        with app.app_context():
            assert db.session.query(Item).count() == 2 + 20
            db.session.remove()

    run(main)


def test_sqlalchemy_when_the_client_leaves_a_stream(run, app, database):
    """A stream that reads the database gives its connection back when nobody reads it."""
    db, Item = database, database.Item

    @app.get("/")
    def stream():
        @flask.stream_with_context
        def generate():
            while True:
                yield db.session.get(Item, 1).name * 2000

        return generate()

    asgi = make(app)

    async def main():
        with app.app_context():
            pool = db.engine.pool
        for _ in range(15):  # more than the pool has
            async with exchange(asgi, unread=1) as peer:
                assert await peer.get_status() == 200
                assert (await peer.read()).startswith(b"first")
                assert pool.checkedout() >= 1
                peer.leave()
            await wait_until(lambda: pool.checkedout() == 0)

    run(main)


def test_sqlalchemy_shares_no_object_between_requests(run, app, database):
    """Each request has a session and objects of its own, and sees only its own changes."""
    db, Item = database, database.Item
    together = threading.Barrier(8)

    @app.get("/<int:number>")
    def view(number):
        item = db.session.get(Item, 1)
        item.name = f"of {number}"
        mine = id(item), id(db.session())
        together.wait(TIMEOUT)
        name = db.session.get(Item, 1).name
        together.wait(TIMEOUT)  # all objects live up to here: no id is used twice
        db.session.rollback()
        return {"name": name, "item": mine[0], "session": mine[1]}

    asgi = make(app)

    async def main():
        answers = await all_at_once(*(partial(fetch, asgi, path=f"/{n}") for n in range(8)))
        data = [flask.json.loads(answer.body) for answer in answers]
        assert [one["name"] for one in data] == [f"of {number}" for number in range(8)]
        assert len({one["item"] for one in data}) == 8
        assert len({one["session"] for one in data}) == 8

    run(main)


@pytest.fixture
def login(app):
    """Flask-Login with one page for everybody and one for users."""
    flask_login = pytest.importorskip("flask_login")
    manager = flask_login.LoginManager(app)

    class User(flask_login.UserMixin):
        def __init__(self, name):
            self.id = name

    manager.user_loader(User)

    @app.post("/login")
    def log_in():
        flask_login.login_user(User(request.form["name"]))
        flask.flash(f"Welcome, {request.form['name']}")
        return flask.redirect("/private")

    @app.post("/logout")
    @flask_login.login_required
    def log_out():
        flask_login.logout_user()
        return "bye"

    @app.get("/private")
    @flask_login.login_required
    def private():
        return {"user": flask_login.current_user.id, "flashed": flask.get_flashed_messages()}

    return flask_login


def test_login_and_logout(run, app, login):
    """401 without a login, the user's own page with it, 401 after the logout."""
    asgi = make(app)

    async def main():
        browser = Browser(asgi)
        assert (await browser.get("/private")).status == 401
        answer = await browser.post("/login", name="ada")
        assert (answer.status, answer.header("location")) == (302, "/private")
        expected = {"user": "ada", "flashed": ["Welcome, ada"]}
        assert flask.json.loads((await browser.get("/private")).body) == expected
        expected["flashed"] = []  # a message flashes once
        assert flask.json.loads((await browser.get("/private")).body) == expected
        assert (await Browser(asgi).get("/private")).status == 401
        assert (await browser.post("/logout")).text == "bye"
        assert (await browser.get("/private")).status == 401

    run(main)


def test_parallel_users_do_not_mix(run, app, login):
    """Many users inside one view at once: each is who they are, before and after the meeting."""
    together = threading.Barrier(20)

    @app.get("/meet")
    @login.login_required
    def meet():
        before = login.current_user.id
        together.wait(TIMEOUT)
        return f"{before} {login.current_user.id}"

    @app.get("/meet-async")
    @login.login_required
    async def meet_async():
        before = login.current_user.id
        together.wait(TIMEOUT)
        await asyncio.sleep(0)
        return f"{before} {login.current_user.id}"

    asgi = make(app)

    async def main():
        browsers = [Browser(asgi) for _ in range(20)]
        await all_at_once(
            *(partial(browser.post, "/login", name=f"u{n}") for n, browser in enumerate(browsers))
        )
        for path in ("/meet", "/meet-async"):
            answers = await all_at_once(*(partial(browser.get, path) for browser in browsers))
            assert [answer.text for answer in answers] == [f"u{n} u{n}" for n in range(20)]

    run(main)


def test_the_session_cookie(run, app):
    """A session lives in its cookie from request to request, and can be cleared."""

    @app.get("/count")
    def count():
        session["count"] = session.get("count", 0) + 1
        return str(session["count"])

    @app.get("/clear")
    def clear():
        session.clear()
        return ""

    @app.get("/two")
    def two():
        response = Response()
        response.set_cookie("a", "1")
        response.set_cookie("b", "2")
        session["two"] = True
        return response

    asgi = make(app)

    async def main():
        browser, other = Browser(asgi), Browser(asgi)
        assert [(await browser.get("/count")).text for _ in range(3)] == ["1", "2", "3"]
        assert (await other.get("/count")).text == "1"
        cookies = (await browser.get("/two")).all("set-cookie")
        assert [cookie.partition("=")[0] for cookie in cookies] == ["a", "b", "session"]
        assert set(browser.cookies) == {"a", "b", "session"}
        await browser.get("/clear")
        assert set(browser.cookies) == {"a", "b"}
        assert (await browser.get("/count")).text == "1"

    run(main)


def test_proxy_fix(run, app):
    """Behind a proxy the application knows its client, scheme, host and prefix."""

    @app.get("/where")
    def where():
        return [
            request.remote_addr,
            request.scheme,
            request.host,
            request.script_root,
            request.url,
            flask.url_for("where", _external=True),
        ]

    app.wsgi_app = ProxyFix(app.wsgi_app, x_for=1, x_proto=1, x_host=1, x_prefix=1)
    asgi = make(app)
    headers = [
        ("x-forwarded-for", "6.6.6.6, 192.0.2.7"),
        ("x-forwarded-proto", "https"),
        ("x-forwarded-host", "app.example.com"),
        ("x-forwarded-prefix", "/mounted"),
        ("x_forwarded_for", "192.0.2.66"),  # a smuggler
    ]

    async def main():
        answer = await fetch(asgi, path="/where", headers=headers)
        url = "https://app.example.com/mounted/where"
        assert flask.json.loads(answer.body) == [
            "192.0.2.7",
            "https",
            "app.example.com",
            "/mounted",
            url,
            url,
        ]
        plain = flask.json.loads((await fetch(asgi, path="/where")).body)
        assert plain[:4] == ["127.0.0.1", "http", "localhost", ""]

    run(main)


# -- errors ----------------------------------------------------------------------------------------


def test_a_view_that_raises_is_logged_once(run, app, caplog):
    """Flask's 500, one record of Flask's logger, and no word of ours."""

    @app.get("/")
    def view():
        raise KeyError("x")

    asgi = make(app)

    async def main():
        answer = await fetch(asgi)
        assert answer.status == 500
        assert b"Internal Server Error" in answer.body
        assert b"Traceback" not in answer.body

    run(main)
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("tests", logging.ERROR)
    assert record.exc_info[0] is KeyError


class Body:
    """A response body that says when it was closed, and may raise on the way."""

    def __init__(self, *chunks, closing=None):
        self.closed = 0
        self._chunks = iter(chunks)
        self._closing = closing

    def __iter__(self):
        return self

    def __next__(self):
        chunk = next(self._chunks)
        if isinstance(chunk, BaseException):
            raise chunk
        return chunk

    def close(self):
        self.closed += 1
        if self._closing is not None:
            raise self._closing


class Trouble(Exception):
    pass


#: What must not reach the loop as it is: it would end the server, or pass for a cancellation.
FATAL = [SystemExit, KeyboardInterrupt, asyncio.CancelledError, GeneratorExit]


def serve_raw(app, application):
    """Serve a bare WSGI application; what it raises is collected, and raised as Guarded."""
    app.wsgi_app = application
    asgi = make(app)
    raised: list[BaseException] = []

    async def guard(scope, receive, send):
        try:
            await asgi(scope, receive, send)
        except BaseException as error:
            # A KeyboardInterrupt would end pytest, a CancelledError the task in silence.
            raised.append(error)

    return guard, raised


@pytest.mark.parametrize("kind", [Trouble, *FATAL])
@pytest.mark.parametrize("where", ["call", "first chunk", "no start", "after start"])
def test_an_error_before_the_start(run, app, kind, where):
    """The server's task raises it, as an ordinary exception; nothing has gone to the client."""
    error = kind("x")
    body = Body(error)

    def application(environ, start_response):
        if where == "call":
            raise error
        if where == "no start":
            return Body()
        start_response("200 OK", [])
        if where == "after start":
            raise error
        return body

    guard, raised = serve_raw(app, application)

    async def main():
        async with exchange(guard) as peer:
            with anyio.fail_after(TIMEOUT):
                await peer.returned.wait()
            with pytest.raises(anyio.EndOfStream):
                await peer.get()

    run(main)
    check_raised(raised, None if where == "no start" else error)
    assert body.closed == (where == "first chunk")


@pytest.mark.parametrize("kind", [Trouble, *FATAL])
def test_an_error_in_mid_stream(run, app, kind):
    """What came before it arrives, the body has no end, and the server's task raises it."""
    error = kind("x")
    body = Body(b"one", b"two", error)

    def application(environ, start_response):
        start_response("200 OK", [])
        return body

    guard, raised = serve_raw(app, application)

    async def main():
        async with exchange(guard) as peer:
            with anyio.fail_after(TIMEOUT):
                await peer.returned.wait()
            assert await peer.get_status() == 200
            received, more = b"", True
            while True:
                try:
                    message = await peer.get()
                except anyio.EndOfStream:
                    break
                received += message["body"]
                more = message["more_body"]
            assert received == b"onetwo"
            assert more

    run(main)
    check_raised(raised, error)
    assert body.closed == 1


def check_raised(raised, error):
    """One ordinary exception was raised, the application's own if that is one."""
    (caught,) = raised
    assert isinstance(caught, Exception), repr(caught)
    if isinstance(error, Exception):
        assert caught is error
    elif error is not None:  # whoever reads the log finds what it was
        assert type(error).__name__ in f"{caught!r} {caught.__cause__!r} {caught.__context__!r}"


@pytest.mark.parametrize("kind", [Trouble, *FATAL])
def test_an_error_in_close(run, app, kind, caplog):
    """The response is whole, the log names the error, and the server goes on."""
    body = Body(b"one", b"two", closing=kind("x"))

    def application(environ, start_response):
        start_response("200 OK", [])
        return body

    guard, raised = serve_raw(app, application)

    def logged():
        return [record for record in caplog.records if record.name == "flask_websockets"]

    async def main():
        for count in (1, 2):
            async with exchange(guard) as peer:
                answer = await peer.answer()
                assert (answer.status, answer.body) == (200, b"onetwo")
                await wait_until(lambda count=count: body.closed == count)
            body._chunks = iter([b"one", b"two"])
        await wait_until(lambda: len(logged()) == 2)

    run(main)
    assert raised == []
    assert {record.levelno for record in logged()} == {logging.ERROR}
    for record in logged():
        assert f"{kind.__name__}: x" in logging.Formatter().formatException(record.exc_info)


@pytest.mark.parametrize("kind", FATAL)
def test_a_fatal_error_in_a_flask_view(run, app, kind):
    """It is no end of the server: the thread lives, and the next request is answered."""
    counted = count_teardowns(app)
    error = kind("x")

    @app.get("/fatal")
    def fatal():
        raise error

    app.add_url_rule("/", view_func=lambda: "here")
    guard, raised = serve_raw(app, app.wsgi_app)

    async def main():
        async with exchange(guard, path="/fatal") as peer:
            with anyio.fail_after(TIMEOUT):
                await peer.returned.wait()
        check_raised(raised, error)
        await wait_until(lambda: counted["request"] == counted["appcontext"] == 1)
        for _ in range(3):
            assert (await fetch(guard)).text == "here"

    app.config["WEBSOCKETS_HTTP_THREADS"] = 1
    run(main)
    assert len(raised) == 1


def test_an_error_after_the_client_left(run, app):
    """A generator that fails over its own end does no harm: its error is raised or logged."""
    body = Body(*[b"x" * 10_000] * 1000, closing=Trouble("x"))

    def application(environ, start_response):
        start_response("200 OK", [])
        return body

    guard, raised = serve_raw(app, application)

    async def main():
        async with exchange(guard, unread=1) as peer:
            assert await peer.get_status() == 200
            peer.leave()
            await wait_until(lambda: body.closed == 1)
        app.wsgi_app = Flask("other").wsgi_app
        assert (await fetch(guard)).status == 404

    run(main)
    assert all(isinstance(error, Exception) for error in raised)


def test_views_that_sleep_run_side_by_side(run, app):
    """Twenty views of 0.1 s are asleep at the same time: each waits until all are there."""
    asleep = threading.Barrier(20)

    @app.get("/")
    def view():
        asleep.wait(TIMEOUT)
        time.sleep(0.1)
        return "awake"

    asgi = make(app)

    async def main():
        answers = await all_at_once(*[partial(fetch, asgi)] * 20)
        assert {answer.text for answer in answers} == {"awake"}

    run(main)
