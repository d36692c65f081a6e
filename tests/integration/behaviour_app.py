"""What the behaviour suite serves: every view twice, at ``/sync/...`` and at ``/async/...``.

A sync view is the async one without its awaits: so the sync twins are made of the async views'
own source, and what is written here once is true of both. What happens in the server is noted
under the key that a test sends as ``X-Test-Key``, and ``/notes/KEY`` tells it.
"""

from __future__ import annotations

import ast
import asyncio
import dataclasses
import inspect
import logging
import textwrap
import threading
import uuid
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import anyio
from flask import (
    Blueprint,
    Flask,
    Response,
    abort,
    current_app,
    g,
    got_request_exception,
    has_app_context,
    jsonify,
    request,
    session,
    url_for,
)
from flask.sessions import SecureCookieSessionInterface
from flask.typing import ResponseReturnValue
from flask_login import LoginManager, UserMixin, current_user, login_required, login_user
from werkzeug.middleware.proxy_fix import ProxyFix

from flask_websockets import (
    AsyncWebSocket,
    ConcurrencyError,
    ConnectionClosed,
    InvalidMessage,
    WebSocket,
    WebSockets,
    WrongThread,
)

#: Seconds after which a view stops waiting for a test that has failed.
PATIENCE = 20.0
#: Seconds for which a view waits for what does not come.
SHORT = 0.05

app = Flask("behaviour")
app.config.update(
    SECRET_KEY="of the tests",
    WEBSOCKETS_ALLOWED_ORIGINS=["https://app.allowed.test", "https://*.wild.test"],
    WEBSOCKETS_CLOSE_TIMEOUT=2,
)
websockets = WebSockets(app)
app.wsgi_app = ProxyFix(app.wsgi_app, x_proto=1, x_host=1)  # type: ignore[method-assign]


class Deliberate(Exception):
    """An error that a test asked for."""


class Handled(Exception):
    """An error that has an error handler."""


# --- What the tests learn of ----------------------------------------------------------------

NOTES: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
#: The last test's key, for what happens outside of any request.
latest_key = ""


def current_key() -> str:
    key: str = g.get("key", latest_key) if has_app_context() else latest_key
    return key


def note(what: str, **details: Any) -> None:
    if key := current_key():
        NOTES[key].append({"what": what, "thread": threading.get_ident(), **details})


class NotedRecords(logging.Handler):
    """What is logged by the application and by the extension."""

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[0] if record.exc_info else None
        note(
            "logged",
            level=record.levelname,
            message=record.getMessage(),
            error=error.__name__ if error else None,
        )


class NotedSessions(SecureCookieSessionInterface):
    """Flask's own sessions; each save is noted."""

    def save_session(self, app: Flask, session: Any, response: Response) -> None:
        note("session saved")
        super().save_session(app, session, response)


for logger in (logging.getLogger("flask_websockets"), logging.getLogger(app.name)):
    logger.addHandler(NotedRecords())
    # A server's log is to have what the server says; daphne prints what the root logger gets.
    logger.propagate = bool(__package__)
app.session_interface = NotedSessions()


@app.before_request
def before_request() -> ResponseReturnValue | None:
    global latest_key
    # The requests by which a test asks leave no notes.
    g.key = request.headers.get("X-Test-Key", "") if "Upgrade" in request.headers else ""
    latest_key = g.key or latest_key
    g.before = "seen"
    note("before_request")
    match request.headers.get("X-Before"):
        case "value":
            return "log in first", 401, {"X-Reason": "login"}
        case "abort":
            abort(403)
        case "handled":
            raise Handled
        case "unhandled":
            raise Deliberate("the secret")
    return None


@app.after_request
def after_request(response: Response) -> Response:
    note("after_request", status=response.status_code)
    response.headers["X-After"] = "seen"
    return response


@app.teardown_request
def teardown_request(error: BaseException | None) -> None:
    note("teardown_request", error=type(error).__name__ if error else None)


@app.teardown_appcontext
def teardown_appcontext(error: BaseException | None) -> None:
    note("teardown_appcontext", error=type(error).__name__ if error else None)


@app.errorhandler(Handled)
def on_handled(error: Handled) -> ResponseReturnValue:
    return "an error handler chose this", 409


def on_exception(sender: Flask, exception: BaseException) -> None:
    note("got_request_exception", error=type(exception).__name__)


got_request_exception.connect(on_exception, app)


class User(UserMixin):
    def __init__(self, name: str) -> None:
        self.id = name


login_manager = LoginManager(app)
login_manager.user_loader(User)


@app.get("/notes/<key>")
def notes(key: str) -> Response:
    return jsonify(NOTES[key])


@app.get("/stats")
def stats() -> Response:
    return jsonify(dataclasses.asdict(websockets.stats()))


# --- Twins -----------------------------------------------------------------------------------

#: The rules, and whether ``route`` returned the function that it was given, or raised.
REGISTERED: dict[str, bool | str] = {}

_SYNC_NAMES = {
    "apublish": "publish",
    "apublish_json": "publish_json",
    "aunsubscribe": "unsubscribe",
}


class _WithoutAwaits(ast.NodeTransformer):
    """Make a sync view of an async one."""

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.AST:
        return self._as(ast.FunctionDef, node)

    def visit_AsyncFor(self, node: ast.AsyncFor) -> ast.AST:
        return self._as(ast.For, node)

    def visit_AsyncWith(self, node: ast.AsyncWith) -> ast.AST:
        return self._as(ast.With, node)

    def visit_Await(self, node: ast.Await) -> ast.AST:
        return self.generic_visit(node).value  # type: ignore[attr-defined, no-any-return]

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self.generic_visit(node)
        node.attr = _SYNC_NAMES.get(node.attr, node.attr)
        return node

    def _as(self, kind: type[ast.AST], node: ast.AST) -> ast.AST:
        self.generic_visit(node)
        return ast.copy_location(kind(**dict(ast.iter_fields(node))), node)


def twins(
    rule: str, *, endpoint: str | None = None, **options: Any
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register an async view below ``/async``, and its sync twin below ``/sync``.

    Above the view's other decorators; endpoints are ``async_NAME`` and ``sync_NAME``.
    """

    def register(view: Callable[..., Any]) -> Callable[..., Any]:
        if not hasattr(view, "twin"):
            view.twin = _sync_twin(view)  # type: ignore[attr-defined]
            view.twin.__name__ = f"sync_{view.__name__}"  # type: ignore[attr-defined]
            view.__name__ = f"async_{view.__name__}"
        for kind, twin in (("async", view), ("sync", view.twin)):  # type: ignore[attr-defined]
            name = f"{kind}_{endpoint}" if endpoint else None
            try:
                returned = websockets.route(f"/{kind}{rule}", endpoint=name, **options)(twin)
                REGISTERED[f"/{kind}{rule}"] = returned is twin
            except Exception as error:  # fails the tests of this route, not all of them
                REGISTERED[f"/{kind}{rule}"] = repr(error)
        return view

    return register


def _sync_twin(view: Callable[..., Any]) -> Callable[..., Any]:
    lines, first = inspect.getsourcelines(view)
    tree = ast.parse(textwrap.dedent("".join(lines)))
    ast.increment_lineno(tree, first - 1)  # a traceback leads to the line that is written here
    definition = tree.body[0]
    assert isinstance(definition, ast.AsyncFunctionDef)
    definition.decorator_list = [
        each
        for each in definition.decorator_list
        if not (isinstance(each, ast.Call) and ast.unparse(each.func) == "twins")
    ]
    made: dict[str, Any] = {}
    code = compile(ast.fix_missing_locations(_WithoutAwaits().visit(tree)), __file__, "exec")
    exec(code, view.__globals__, made)
    twin: Callable[..., Any] = made[definition.name]
    return twin


def described(error: BaseException) -> dict[str, Any]:
    """An error, for the client: its type, the types above it and its message."""
    names = [kind.__name__ for kind in type(error).__mro__]
    return {"type": names[0], "kinds": names, "message": str(error)}


def state_of(ws: WebSocket | AsyncWebSocket) -> dict[str, Any]:
    return {
        "connected": ws.connected,
        "closed": ws.closed,
        "close_code": ws.close_code,
        "close_reason": ws.close_reason,
        "subprotocol": ws.subprotocol,
    }


def context_of(ws: WebSocket | AsyncWebSocket) -> dict[str, Any]:
    return {
        "method": request.method,
        "path": request.path,
        "args": dict(request.args),
        "header": request.headers.get("X-Header"),
        "cookie": request.cookies.get("plain"),
        "endpoint": request.endpoint,
        "g": g.before,
        "session": session.get("user"),
        "app": current_app.name,
        "user": current_user.get_id(),
        "environ": ws.environ is request.environ,
    }


# --- The accept ------------------------------------------------------------------------------


@twins("/nothing")
async def nothing(ws: AsyncWebSocket) -> None:
    pass


@twins("/first/<how>")
async def first(ws: AsyncWebSocket, how: str) -> None:
    before = ws.connected
    if how == "receive":
        await ws.receive(timeout=0)
    elif how == "receive_json":
        try:
            await ws.receive_json(timeout=0)
        except TimeoutError:
            pass
    elif how == "send":
        await ws.send("first")
    elif how == "iteration":
        async for _ in ws.iter_data():
            break
    elif how == "subscribe":
        async with websockets.subscribe(ws, "first"):
            pass
    elif how == "accept":
        await ws.accept()
    note("accepted", states=[before, ws.connected])
    await ws.receive()


@twins("/untouched")
async def untouched(ws: AsyncWebSocket) -> ResponseReturnValue:
    note("state", state=state_of(ws), environ=ws.environ is request.environ)
    return "no", 403


@twins("/accept/<form>")
async def accept(ws: AsyncWebSocket, form: str) -> None:
    headers: Any = {"X-One": "1", "X-Two": "zwei: drei"}
    if form == "pairs":
        headers = [("X-One", "1"), ("X-Two", "a"), ("X-Two", "b")]
    await ws.accept(headers=headers)
    await ws.receive()


@twins("/accept-twice")
async def accept_twice(ws: AsyncWebSocket) -> None:
    await ws.accept()
    try:
        await ws.accept()
    except Exception as error:
        await ws.send_json(described(error))
    async for data in ws.iter_data():
        await ws.send(data)


@twins("/returns/<int:status>")
async def returns(ws: AsyncWebSocket, status: int) -> Response:
    return Response("the body", status, {"X-Returned": "yes"})


@twins("/returns-late")
async def returns_late(ws: AsyncWebSocket) -> str:
    await ws.accept()
    return "too late"


@twins("/close-early")
async def close_early(ws: AsyncWebSocket) -> None:
    await ws.close()


@twins("/raises/<when>/<what>")
async def raises(ws: AsyncWebSocket, when: str, what: str) -> None:
    if when == "late":
        await ws.accept()
    if what == "handled":
        raise Handled
    if what == "unhandled":
        raise Deliberate("the secret")
    abort(int(what))


@twins("/context/<word>")
async def context(ws: AsyncWebSocket, word: str) -> None:
    seen = [context_of(ws)]
    await ws.accept()
    seen.append(context_of(ws))
    await ws.receive()
    seen.append(context_of(ws))
    await ws.send_json(seen)


@twins("/thread")
async def thread(ws: AsyncWebSocket) -> None:
    note("view")
    await ws.receive()


@twins("/private")
@login_required
async def private(ws: AsyncWebSocket) -> None:
    await ws.send(current_user.get_id())


@twins("/session/<when>")
async def use_session(ws: AsyncWebSocket, when: str) -> ResponseReturnValue | None:
    if when != "late":
        session["user"] = when
    if when == "refused":
        return "no", 403
    await ws.accept()
    if when == "late":
        session["user"] = when
    await ws.receive()
    return None


@twins("/session-read")
async def read_session(ws: AsyncWebSocket) -> None:
    await ws.send_json(session.get("user"))


# --- Messages --------------------------------------------------------------------------------


@twins("/echo")
async def echo(ws: AsyncWebSocket) -> None:
    async for data in ws.iter_data():
        await ws.send(data)


@twins("/iterate/<how>")
async def iterate(ws: AsyncWebSocket, how: str) -> None:
    came: list[Any] = []
    try:
        if how == "data":
            async for data in ws.iter_data():
                came.append(data)
        elif how == "text":
            async for data in ws.iter_text():
                came.append(data)
        elif how == "bytes":
            async for data in ws.iter_bytes():
                came.append(data)
        else:
            async for data in ws.iter_json():
                came.append(data)
    except ValueError as error:  # InvalidMessage is one
        await ws.send_json([*came, described(error)])
        async for data in ws.iter_data():
            await ws.send(data)
    shown = [each if how == "json" else repr(each) for each in came]
    note("iterated", came=shown, state=state_of(ws))


@twins("/receive-in-time")
async def receive_in_time(ws: AsyncWebSocket) -> None:
    await ws.accept()
    seen = [await ws.receive(timeout=SHORT)]
    try:
        seen.append(await ws.receive_json(timeout=SHORT))
    except TimeoutError as error:
        seen.append(type(error).__name__)
    await ws.send_json(seen)
    await ws.send_json(await ws.receive(timeout=PATIENCE))
    await ws.send_json(await ws.receive_json(timeout=PATIENCE))
    try:
        await ws.receive_json(timeout=PATIENCE)
    except InvalidMessage as error:
        await ws.send_json(described(error))
    async for data in ws.iter_data():
        await ws.send(data)


@twins("/send-everything")
async def send_everything(ws: AsyncWebSocket) -> None:
    await ws.send("täxt")
    await ws.send(b"bytes")
    await ws.send(bytearray(b"array"))
    await ws.send(memoryview(b"view"))
    await ws.send("")
    await ws.send_text("täxt")
    await ws.send_bytes(b"bytes")
    await ws.send_bytes("täxt")
    await ws.send_json({"ä": [1, None], "id": uuid.UUID(int=7)})
    await ws.send_json(None)
    await ws.send_msgpack({"ä": [1, None, b"x"]})


@twins("/close")
async def close(ws: AsyncWebSocket) -> None:
    await ws.accept()
    for number in range(20):
        await ws.send(str(number))
    if "code" in request.args:
        await ws.close(int(request.args["code"]), request.args["reason"])
        await ws.close(4999, "the second close")
    else:
        await ws.close()
    note("closed", state=state_of(ws))


@twins("/states")
async def states(ws: AsyncWebSocket) -> None:
    seen = [state_of(ws)]
    await ws.accept()
    seen.append(state_of(ws))
    await ws.send_json(seen)
    try:
        await ws.receive()
    except ConnectionClosed as error:
        note("closed", code=error.code, reason=error.reason, state=state_of(ws))


@twins("/receive-for-ever")
async def receive_for_ever(ws: AsyncWebSocket) -> None:
    while True:
        await ws.receive()


@twins("/wait-closed")
async def wait_closed(ws: AsyncWebSocket) -> None:
    await ws.accept()
    await ws.send_json(await ws.wait_closed(timeout=SHORT))
    over = await ws.wait_closed(timeout=PATIENCE)
    note("waited", over=over, again=await ws.wait_closed())


#: What a view may still try when its connection is over.
VERBS: dict[str, Callable[[Any], Any]] = {
    "accept": lambda ws: ws.accept(),
    "receive": lambda ws: ws.receive(),
    "receive in time": lambda ws: ws.receive(timeout=SHORT),
    "receive_json": lambda ws: ws.receive_json(),
    "send": lambda ws: ws.send("x"),
    "send_text": lambda ws: ws.send_text("x"),
    "send_bytes": lambda ws: ws.send_bytes(b"x"),
    "send_json": lambda ws: ws.send_json("x"),
    "send_msgpack": lambda ws: ws.send_msgpack("x"),
    "close": lambda ws: ws.close(4005, "later"),
    "wait_closed": lambda ws: ws.wait_closed(),
}


@twins("/after-the-end/<side>")
async def after_the_end(ws: AsyncWebSocket, side: str) -> None:
    await ws.accept()
    if side == "view":
        await ws.close(4001, "ours")
    else:
        await ws.wait_closed(timeout=PATIENCE)
    outcomes: dict[str, Any] = {}
    for name, verb in VERBS.items():
        try:
            outcomes[name] = ["returned", await verb(ws)]
        except ConnectionClosed as error:
            outcomes[name] = ["ConnectionClosed", error.code, error.reason]
        except Exception as error:
            outcomes[name] = [repr(error)]
    try:
        async with websockets.subscribe(ws, "late"):
            outcomes["subscribe"] = ["entered"]
    except ConnectionClosed as error:
        outcomes["subscribe"] = ["ConnectionClosed", error.code, error.reason]
    outcomes["iter_data"] = []
    async for data in ws.iter_data():
        outcomes["iter_data"].append(data)
    await websockets.aunsubscribe(ws, "late")
    note("tried", outcomes=outcomes, state=state_of(ws))


#: Mistakes in a view, each an error there and nothing else.
MISTAKES: dict[str, Callable[[Any], Any]] = {
    "send(1)": lambda ws: ws.send(1),
    "send(None)": lambda ws: ws.send(None),
    "send_text(bytes)": lambda ws: ws.send_text(b"x"),
    "send_bytes(list)": lambda ws: ws.send_bytes([1]),
    "send_json(object)": lambda ws: ws.send_json(object()),
    "send_msgpack(object)": lambda ws: ws.send_msgpack(object()),
    "send(surrogate)": lambda ws: ws.send("\ud800"),
    "receive('1')": lambda ws: ws.receive(timeout="1"),
    "receive(-1)": lambda ws: ws.receive(timeout=-1),
    "receive(nan)": lambda ws: ws.receive(timeout=float("nan")),
    "receive_json(-1)": lambda ws: ws.receive_json(timeout=-1),
    "wait_closed('1')": lambda ws: ws.wait_closed(timeout="1"),
    "wait_closed(-1)": lambda ws: ws.wait_closed(timeout=-1),
    "close('1000')": lambda ws: ws.close("1000"),
    "close(True)": lambda ws: ws.close(True),
    "close(None)": lambda ws: ws.close(None),
    "close(bytes reason)": lambda ws: ws.close(1000, b"bye"),
    **{
        f"close({code})": lambda ws, code=code: ws.close(code)  # type: ignore[misc]
        for code in (-1, 0, 999, 1004, 1005, 1006, 1015, 1016, 2999, 5000, 65536)
    },
    "close(124 bytes)": lambda ws: ws.close(1000, "x" * 124),
    "close(62 umlauts)": lambda ws: ws.close(1000, "ü" * 62),
    "accept(1)": lambda ws: ws.accept(1),
    "accept(not offered)": lambda ws: ws.accept("v3"),
    "accept(no token)": lambda ws: ws.accept("v 1"),
    "accept(empty)": lambda ws: ws.accept(""),
    "accept(header of bytes)": lambda ws: ws.accept(headers=[(b"X-A", b"1")]),
    "accept(header of int)": lambda ws: ws.accept(headers={"X-A": 1}),
    "accept(headers=1)": lambda ws: ws.accept(headers=1),
    "accept(LF in a value)": lambda ws: ws.accept(headers={"X-A": "1\nX-Evil: 1"}),
    "accept(CRLF in a value)": lambda ws: ws.accept(headers={"X-A": "1\r\nX-Evil: 1"}),
    "accept(NUL in a value)": lambda ws: ws.accept(headers={"X-A": "1\0"}),
    "accept(CRLF in a name)": lambda ws: ws.accept(headers={"X-A\r\nX-Evil": "1"}),
    "accept(space in a name)": lambda ws: ws.accept(headers=[("X A", "1")]),
    "accept(not Latin-1)": lambda ws: ws.accept(headers={"X-A": "€"}),
    "accept(the server's header)": lambda ws: ws.accept(headers={"Upgrade": "h2c"}),
}


@twins("/mistakes/<path:name>")
async def mistakes(ws: AsyncWebSocket, name: str) -> None:
    if not name.startswith("accept"):
        await ws.accept()
    try:
        await MISTAKES[name](ws)
        told = {"type": "nothing was raised"}
    except Exception as error:
        told = described(error)
    await ws.send_json(told)
    async for data in ws.iter_data():
        await ws.send(data)


@websockets.route("/sync/two-receivers")
def sync_two_receivers(ws: WebSocket) -> None:
    def receive_first() -> None:
        while (data := received(ws)) is None:
            pass
        ws.send(f"the first got {data}")

    def received(ws: WebSocket) -> Any:
        try:
            return ws.receive(timeout=PATIENCE)
        except ConcurrencyError:
            return None  # the view was there just now

    ws.accept()
    other = threading.Thread(target=receive_first, daemon=True)
    other.start()
    try:
        while True:
            ws.receive(timeout=0.01)
    except ConcurrencyError as error:
        ws.send_json(described(error))
    other.join(PATIENCE)


@websockets.route("/async/two-receivers")
async def async_two_receivers(ws: AsyncWebSocket) -> None:
    async def receive_first() -> None:
        data = await ws.receive(timeout=PATIENCE)
        await ws.send(f"the first got {data!s}")

    await ws.accept()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(receive_first)
        await anyio.wait_all_tasks_blocked()
        try:
            await ws.receive(timeout=PATIENCE)
        except ConcurrencyError as error:
            await ws.send_json(described(error))


#: Senders at the same time, and what each sends.
SENDERS, EACH = 4, 25


@websockets.route("/sync/many-senders")
def sync_many_senders(ws: WebSocket) -> None:
    def send(sender: int) -> None:
        for number in range(EACH):
            ws.send_json([sender, number])

    ws.accept()
    threads = [threading.Thread(target=send, args=(sender,)) for sender in range(SENDERS)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(PATIENCE)


@websockets.route("/async/many-senders")
async def async_many_senders(ws: AsyncWebSocket) -> None:
    async def send(sender: int) -> None:
        for number in range(EACH):
            await ws.send_json([sender, number])
            await anyio.sleep(0)

    async with anyio.create_task_group() as tasks:
        for sender in range(SENDERS):
            tasks.start_soon(send, sender)


@websockets.route("/async/for-ever", close_timeout=0.2)
async def for_ever(ws: AsyncWebSocket) -> None:
    await ws.accept()
    try:
        await anyio.sleep_forever()
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.sleep(0)
        note("finally")


@twins("/small-messages", max_message_bytes=1000)
async def small_messages(ws: AsyncWebSocket) -> None:
    async for data in ws.iter_data():
        await ws.send(data)


@twins("/small-buffers", inbox_bytes=1000, outbox_bytes=1000)
async def small_buffers(ws: AsyncWebSocket) -> None:
    async for data in ws.iter_data():
        await ws.send(data)


# --- Channels --------------------------------------------------------------------------------

#: The connections of members, by test and name.
MEMBERS: dict[tuple[str, str], WebSocket | AsyncWebSocket] = {}


@twins("/member/<name>/<path:channels>")
async def member(ws: AsyncWebSocket, name: str, channels: str) -> None:
    """A subscriber; channels are separated by ``/``. What it receives it sends back."""
    async with websockets.subscribe(ws, channels.split("/")):
        MEMBERS[current_key(), name] = ws
        await ws.send("subscribed")
        async for data in ws.iter_data():
            await ws.send(data)


@twins("/policy/<on_slow>/<channel>")
async def policy(ws: AsyncWebSocket, on_slow: Any, channel: str) -> None:
    """A subscriber with a policy, which sends and publishes what it receives."""
    async with websockets.subscribe(ws, channel, on_slow=on_slow) as subscription:
        await ws.send_json(subscription.dropped)
        async for data in ws.iter_data():
            await ws.send(f"sent {data!s}")
            await websockets.apublish(f"published {data!s}", channel)
        note("dropped", count=subscription.dropped)


@twins("/levels")
async def levels(ws: AsyncWebSocket) -> None:
    a, b = f"{current_key()}-a", f"{current_key()}-b"
    async with websockets.subscribe(ws, [a]):
        async with websockets.subscribe(ws, (name for name in [a, b])):
            await websockets.apublish("1", [a, b])
            await websockets.apublish("2", b)
        await websockets.apublish("3", a)
        await websockets.apublish("no", b)
    await websockets.apublish("no", [a, b])
    await ws.send("end")


@twins("/unsubscribe")
async def unsubscribe(ws: AsyncWebSocket) -> None:
    a, b = f"{current_key()}-a", f"{current_key()}-b"
    async with websockets.subscribe(ws, [a, b]), websockets.subscribe(ws, a):
        await websockets.apublish("1", a)
        await websockets.aunsubscribe(ws, [a, "never subscribed"])
        await websockets.apublish("no", a)
        await websockets.apublish("2", b)
        async with websockets.subscribe(ws, a):
            await websockets.apublish("3", a)
    await websockets.apublish("no", [a, b])
    await ws.send("end")


@twins("/body-raises")
async def body_raises(ws: AsyncWebSocket) -> None:
    room = current_key()
    for error in (Deliberate, ConnectionClosed(1000), GeneratorExit, KeyboardInterrupt):
        try:
            async with websockets.subscribe(ws, room):
                raise error
        except BaseException as raised:
            await ws.send(type(raised).__name__)
        await websockets.apublish("no", room)
    await ws.send("end")


@twins("/at-once/<int:count>")
async def at_once(ws: AsyncWebSocket, count: int) -> None:
    async with websockets.subscribe(ws, current_key()):
        for number in range(count):
            await websockets.apublish(str(number), current_key())
    await ws.send("end")


@twins("/publish-here/<path:channels>")
async def publish_here(ws: AsyncWebSocket, channels: str) -> None:
    names = channels.split("/")
    results: list[Any] = [
        await websockets.apublish("text", names),
        await websockets.apublish(b"bytes", names),
        await websockets.apublish({"n": 1}, names, encode_json=True),
        await websockets.apublish({"n": 1}, names, encode_msgpack=True),
        await websockets.apublish_json([1], names),
        await websockets.apublish("nobody", names, exclude=list(MEMBERS.values())),
        await websockets.apublish_json("nobody", names, exclude=MEMBERS.values()),
    ]
    shown = [
        None if result is None else [type(result).__name__, result.local] for result in results
    ]
    await ws.send_json(shown)


PUBLISH_MISTAKES: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "data of int": ((1, "room"), {}),
    "data of None": ((None, "room"), {}),
    "surrogate": (("\ud800", "room"), {}),
    "channels of int": (("x", 5), {}),
    "a channel of int": (("x", ["room", 1]), {}),
    "a channel of bytes": (("x", [b"room"]), {}),
    "channels of None": (("x", None), {}),
    "exclude of int": (("x", "room"), {"exclude": 5}),
    "exclude of a name": (("x", "room"), {"exclude": "somebody"}),
    "no JSON": ((object(), "room"), {"encode_json": True}),
    "no MessagePack": ((object(), "room"), {"encode_msgpack": True}),
    "two encodings": (("x", "room"), {"encode_json": True, "encode_msgpack": True}),
}


@twins("/publish-mistakes/<name>")
async def publish_mistakes(ws: AsyncWebSocket, name: str) -> None:
    arguments, options = PUBLISH_MISTAKES[name]
    async with websockets.subscribe(ws, "room"):
        try:
            await websockets.apublish(*arguments, **options)
            told = {"type": "nothing was raised"}
        except Exception as error:
            told = described(error)
        await ws.send_json(told)
        async for data in ws.iter_data():
            await ws.send(data)


SUBSCRIBE_MISTAKES: dict[str, tuple[Any, dict[str, Any]]] = {
    "channels of int": (5, {}),
    "channels of None": (None, {}),
    "a channel of int": (["fine", 1], {}),
    "a channel of bytes": ([b"room"], {}),
    "on_slow of another name": ("fine", {"on_slow": "wait"}),
    "on_slow of None": ("fine", {"on_slow": None}),
    "too many channels": (["fine", "two", "three"], {}),
}


@twins("/subscribe-mistakes/<name>", max_channels_per_connection=2)
async def subscribe_mistakes(ws: AsyncWebSocket, name: str) -> None:
    channels, options = SUBSCRIBE_MISTAKES[name]
    await ws.accept()
    try:
        async with websockets.subscribe(ws, channels, **options):
            told = {"type": "nothing was raised"}
    except Exception as error:
        told = described(error)
    await ws.send_json(told)
    await websockets.apublish("no", "fine")
    async for data in ws.iter_data():
        await ws.send(data)


@websockets.route("/async/wrong-thread/<what>")
async def async_wrong_thread(ws: AsyncWebSocket, what: str) -> None:
    """What may block, on the loop."""
    try:
        if what == "publish":
            websockets.publish("x", "room")
        elif what == "publish_json":
            websockets.publish_json("x", "room")
        else:
            with websockets.subscribe(ws, "room"):
                pass
    except WrongThread as error:
        await ws.send_json(described(error))


@websockets.route("/sync/wrong-thread/<what>")
def sync_wrong_thread(ws: WebSocket, what: str) -> None:
    """What belongs to the loop, in a thread."""

    async def enter() -> None:
        async with websockets.subscribe(ws, "room"):
            pass

    ws.accept()
    try:
        if what == "publish":
            asyncio.run(websockets.apublish("x", "room"))
        elif what == "publish_json":
            asyncio.run(websockets.apublish_json("x", "room"))
        else:
            asyncio.run(enter())
    except WrongThread as error:
        ws.send_json(described(error))


def publish_as_asked() -> ResponseReturnValue:
    """Publish what a request's JSON says, and tell what ``publish`` returned."""
    asked = request.get_json()
    data = asked["data"].encode() if asked.get("binary") else asked["data"]
    options, key = dict(asked.get("options", {})), request.headers["X-Test-Key"]
    if isinstance(name := options.get("exclude"), str):
        options["exclude"] = MEMBERS[key, name]
    elif "exclude" in options:
        options["exclude"] = [MEMBERS[key, name] for name in options["exclude"]]
    return jsonify(returned=repr(websockets.publish(data, asked["channels"], **options)))


@app.post("/publish/view")
def publish_in_a_view() -> ResponseReturnValue:
    return publish_as_asked()


@app.post("/publish/async-view")
async def publish_in_an_async_view() -> ResponseReturnValue:
    await asyncio.sleep(0)
    return publish_as_asked()


@app.post("/publish/thread")
def publish_in_a_thread() -> ResponseReturnValue:
    """From a thread without any context of Flask's."""
    asked, returned = request.get_json(), []
    thread = threading.Thread(
        target=lambda: returned.append(websockets.publish_json(asked["data"], asked["channels"]))
    )
    thread.start()
    thread.join(PATIENCE)
    return jsonify(returned=repr(returned[0]))


@app.post("/publish/burst")
def publish_burst() -> ResponseReturnValue:
    """Several publishers at once, each with numbered messages."""
    asked = request.get_json()

    def run(publisher: int) -> None:
        for number in range(asked["count"]):
            websockets.publish_json([publisher, number], asked["channels"])

    threads = [threading.Thread(target=run, args=(each,)) for each in range(asked["publishers"])]
    for each in threads:
        each.start()
    for each in threads:
        each.join(PATIENCE)
    return "", 204


# --- The handshake ---------------------------------------------------------------------------


@twins("/subprotocols", subprotocols=["v2", "v1"])
async def subprotocols(ws: AsyncWebSocket) -> None:
    before = ws.subprotocol
    if request.args.get("accept") == "plain":
        await ws.accept()
    elif "accept" in request.args:
        await ws.accept(request.args["accept"])
    await ws.send_json([before, ws.subprotocol])
    await ws.receive()


@twins("/room/<room>/<int:number>")
async def room(ws: AsyncWebSocket, room: str, number: int) -> None:
    await ws.send_json([room, number])


@twins("/files/<path:name>")
async def files(ws: AsyncWebSocket, name: str) -> None:
    await ws.send_json(name)


@twins("/pages", defaults={"page": 1})
@twins("/pages/<int:page>")
async def pages(ws: AsyncWebSocket, page: int) -> None:
    await ws.send_json(page)


@twins("/other-name", endpoint="another_name")
async def other_name(ws: AsyncWebSocket) -> None:
    pass


@twins("/both")
async def both(ws: AsyncWebSocket) -> None:
    await ws.send("websocket")


@twins("/open", origins=["*"])
async def open_to_all(ws: AsyncWebSocket) -> None:
    await ws.send("in")


@twins("/partner", origins=["https://partner.test"])
async def partner(ws: AsyncWebSocket) -> None:
    await ws.send("in")


@twins("/urls")
async def urls(ws: AsyncWebSocket) -> None:
    await ws.send_json(all_urls())


def all_urls() -> dict[str, str]:
    """What a view sees of the URLs around it."""
    return {
        "sync": url_for("sync_room", room="a b", number=7),
        "async": url_for("async_room", room="a b", number=7),
        "blueprint": url_for("blueprint.sync_in_a_blueprint"),
        "other": url_for("sync_another_name"),
        "http": url_for("index", _external=True),
    }


blueprint = Blueprint("blueprint", __name__, url_prefix="/blueprint")


@blueprint.before_request
def before_blueprint() -> None:
    note("blueprint's before_request", endpoint=request.endpoint)


@twins("/in", blueprint=blueprint)
async def in_a_blueprint(ws: AsyncWebSocket) -> None:
    await ws.send_json([request.blueprint, request.endpoint])


@twins("/older", bp=blueprint)
async def in_a_blueprint_too(ws: AsyncWebSocket) -> None:
    await ws.send_json([request.blueprint, request.endpoint])


app.register_blueprint(blueprint)


@app.get("/")
def index() -> str:
    return "hello"


@app.get("/sync/both")
def sync_both_http() -> str:
    return "http"


@app.get("/async/both")
def async_both_http() -> str:
    return "http"


@app.get("/urls")
def urls_in_http() -> Response:
    return jsonify(all_urls())


@app.get("/routes")
def routes() -> Response:
    return jsonify(REGISTERED)


@app.get("/user")
def get_user() -> Response:
    return jsonify(session.get("user"))


@app.post("/user/<name>")
def set_user(name: str) -> ResponseReturnValue:
    session["user"] = name
    return "", 204


@app.post("/login/<name>")
def login(name: str) -> ResponseReturnValue:
    login_user(User(name))
    return "", 204


asgi = websockets.asgi_app()
