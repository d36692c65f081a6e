"""Flask's extensions, hooks, signals and context helpers in WebSocket views, sync and async."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import json
import re
import sys
import textwrap
import threading
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import anyio
import flask
import pytest
from flask import copy_current_request_context, current_app, g, request, session
from flask.sessions import SessionInterface, SessionMixin
from werkzeug.datastructures import CallbackDict

from flask_websockets import (
    ConcurrencyError,
    ConnectionClosed,
    ConnectionRejected,
)

HOW_TO = Path(__file__).parent.parent / "docs" / "how-to"
#: Seconds for any wait of a view's own.
TIMEOUT = 5.0

both = pytest.mark.parametrize("kind", ["sync", "async"])


def add(websockets: Any, kind: str, sync_view: Any, async_view: Any, **options: Any) -> None:
    """Route ``/ws`` to the view of this kind."""
    websockets.route("/ws", endpoint="ws", **options)(
        {"sync": sync_view, "async": async_view}[kind]
    )


def rejected(client: Any, path: str = "/ws", **options: Any) -> Any:
    """The response that a handshake is answered with."""
    with pytest.raises(ConnectionRejected) as caught, client.websocket_connect(path, **options):
        pass
    return caught.value.response


def closed(ws: Any) -> tuple[int, str]:
    """How the server closed the connection."""
    with pytest.raises(ConnectionClosed) as caught:
        ws.receive()
    return caught.value.code, caught.value.reason


def run_documented(page: str) -> dict[str, Any]:
    """Run the Python of a how-to, and return its names."""
    found = re.findall(
        r"^\.\. code-block:: python\n((?:[ ]+.*\n|\n)+)", (HOW_TO / page).read_text(), re.MULTILINE
    )
    source = "\n".join(textwrap.dedent(block) for block in found)
    names: dict[str, Any] = {"__name__": "block"}
    exec(compile(source, page, "exec", dont_inherit=True), names)
    return names


def errors_in(caplog: Any) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]


# -- Flask-Login -----------------------------------------------------------------------------------


@pytest.fixture
def login(app: flask.Flask) -> Any:
    """Flask-Login with users that are only names, and may be locked."""
    flask_login = pytest.importorskip("flask_login")
    manager = flask_login.LoginManager(app)
    manager.locked = set()
    manager.loaded = []

    class User(flask_login.UserMixin):
        def __init__(self, name: str) -> None:
            self.id = name

    @manager.user_loader
    def load(name: str) -> User | None:
        manager.loaded.append(threading.current_thread().name)
        return None if name in manager.locked else User(name)

    @app.post("/login")
    def log_in() -> str:
        flask_login.login_user(User(request.form["name"]), remember="remember" in request.form)
        return "in"

    @app.get("/who")
    def who() -> dict[str, Any]:
        return {"user": flask_login.current_user.get_id(), "session": dict(session)}

    return types.SimpleNamespace(
        manager=manager,
        User=User,
        **{name: getattr(flask_login, name) for name in flask_login.__all__},
    )


def tell_who(login: Any) -> tuple[Any, Any]:
    """Views that say who their user is, before and after the accept."""

    def sync_view(ws):
        before = login.current_user.get_id()
        ws.accept()
        ws.send_json([before, login.current_user.get_id()])
        ws.receive()
        ws.send_json([login.current_user.get_id(), login.login_fresh()])

    async def async_view(ws):
        before = login.current_user.get_id()
        await ws.accept()
        await ws.send_json([before, login.current_user.get_id()])
        await ws.receive()
        await ws.send_json([login.current_user.get_id(), login.login_fresh()])

    return login.login_required(sync_view), login.login_required(async_view)


@both
def test_the_login_of_http_is_the_login_of_websockets(websockets, client, login, kind):
    """Log in over HTTP, and the same client's handshake is that user's, before and after accept."""
    add(websockets, kind, *tell_who(login))
    client.post("/login", data={"name": "ann"})
    with client.websocket_connect("/ws") as ws:
        assert ws.receive_json() == ["ann", "ann"]
        ws.send("go on")
        assert ws.receive_json() == ["ann", True]
    other = websockets.test_client()
    other.post("/login", data={"name": "bob"})
    with other.websocket_connect("/ws") as ws:
        assert ws.receive_json() == ["bob", "bob"]


@both
def test_login_required_answers_an_anonymous_handshake_with_401(websockets, client, login, kind):
    """The view does not run; after a logout it is the same."""
    add(websockets, kind, *tell_who(login))
    assert rejected(client).status_code == 401
    client.post("/login", data={"name": "ann"})
    with client.websocket_connect("/ws") as ws:
        ws.receive()
    with client.session_transaction() as stored:
        del stored["_user_id"]
    assert rejected(client).status_code == 401


@both
def test_login_required_answers_with_the_redirect_of_login_view(websockets, client, login, kind):
    """With a login_view the handshake's answer is the redirect that a page would get."""
    login.manager.login_view = "log_in"
    add(websockets, kind, *tell_who(login))
    response = rejected(client)
    assert (response.status_code, response.location) == (302, "/login?next=%2Fws")
    with client.session_transaction() as stored:
        assert stored["_flashes"] == [("message", "Please log in to access this page.")]


@both
def test_login_required_lets_variables_and_options_through(websockets, client, login, kind):
    """Converters and subprotocols reach a decorated view as any other."""

    def sync_view(ws, room):
        ws.send_json([room, ws.subprotocol])

    async def async_view(ws, room):
        await ws.send_json([room, ws.subprotocol])

    view = login.login_required({"sync": sync_view, "async": async_view}[kind])
    websockets.route("/ws/<int:room>", subprotocols=["chat"])(view)
    client.post("/login", data={"name": "ann"})
    with client.websocket_connect("/ws/7", subprotocols=["chat"]) as ws:
        assert ws.receive_json() == [7, "chat"]


def test_i3_an_async_view_below_login_required_runs_on_the_servers_loop(websockets, client, login):
    """The decorator's own loop is not used: the view shares the one of all connections."""
    loops = []

    async def view(ws):
        loops.append((asyncio.get_running_loop(), threading.current_thread().name))
        await ws.send(login.current_user.get_id() or "nobody")
        await ws.receive()

    websockets.route("/plain", endpoint="plain")(view)
    websockets.route("/members", endpoint="members")(login.login_required(view))
    client.post("/login", data={"name": "ann"})
    login.manager.loaded.clear()
    with client.websocket_connect("/plain") as one, client.websocket_connect("/members") as other:
        assert one.receive() == other.receive() == "ann"
        assert loops[0] == loops[1]
    # The decorator asks for the user in a thread. The other view itself did, on the loop: its own
    # doing.
    assert len(login.manager.loaded) == 2
    assert login.manager.loaded[1] != loops[1][1]


def login_required_of_the_tutorial(view):
    """As Flask's own tutorial has it, "Blueprints and Views": it takes and passes keywords only."""

    @functools.wraps(view)
    def wrapped_view(**kwargs):
        if "user" not in session:
            return flask.redirect(flask.url_for("login"))
        return view(**kwargs)

    return wrapped_view


@both
@pytest.mark.parametrize("times", [1, 2])
def test_the_decorator_of_flasks_tutorial(app, websockets, client, kind, times):
    """A decorator that passes keywords only gets the connection as one, by the view's own name."""

    def sync_view(connection, room):
        connection.send(f"{session['user']} in {room}")

    async def async_view(connection, room):
        await connection.send(f"{session['user']} in {room}")

    view = {"sync": sync_view, "async": async_view}[kind]
    for _ in range(times):
        view = login_required_of_the_tutorial(view)
    websockets.route("/ws/<room>", endpoint="ws")(view)
    app.add_url_rule("/login", "login", lambda: "log in")

    response = rejected(client, "/ws/hall")
    assert (response.status_code, response.location) == (302, "/login")
    with client.session_transaction() as stored:
        stored["user"] = "ann"
    with client.websocket_connect("/ws/hall") as ws:
        assert ws.receive() == "ann in hall"


@both
def test_a_decorator_that_hides_the_view_passes_ws(websockets, client, kind):
    """Without ``functools.wraps`` nobody knows the view's name for it: it is ``ws``."""

    def hide(view):
        if kind == "sync":
            return lambda **kwargs: view(**kwargs)

        async def hidden(**kwargs):
            await view(**kwargs)

        return hidden

    def sync_view(ws, room):
        ws.send(room)

    async def async_view(ws, room):
        await ws.send(room)

    view = hide({"sync": sync_view, "async": async_view}[kind])
    websockets.route("/ws/<room>", endpoint="ws")(view)
    with client.websocket_connect("/ws/hall") as ws:
        assert ws.receive() == "hall"


@both
@pytest.mark.filterwarnings("ignore:.*utcnow:DeprecationWarning")  # flask_login 0.6.3, login_user
def test_a_remember_cookie_lets_in(websockets, client, login, kind):
    """Without a session the remember cookie is enough; the session that it makes is kept."""
    add(websockets, kind, *tell_who(login))
    client.post("/login", data={"name": "ann", "remember": "yes"})
    client.delete_cookie("session")
    with client.websocket_connect("/ws") as ws:
        assert ws.receive_json() == ["ann", "ann"]
        assert "session=" in ws.handshake_headers["Set-Cookie"]
        ws.send("go on")
        assert ws.receive_json() == ["ann", False]  # a remembered login is not a fresh one
    client.delete_cookie("remember_token")
    assert client.get("/who").json["user"] == "ann"


@both
@pytest.mark.filterwarnings("ignore:.*utcnow:DeprecationWarning")
def test_fresh_login_required(websockets, client, login, kind):
    """The other decorator refuses a remembered login, and lets a fresh one in."""

    def sync_view(ws):
        ws.send("in")

    async def async_view(ws):
        await ws.send("in")

    add(
        websockets,
        kind,
        login.fresh_login_required(sync_view),
        login.fresh_login_required(async_view),
    )
    client.post("/login", data={"name": "ann", "remember": "yes"})
    with client.websocket_connect("/ws") as ws:
        assert ws.receive() == "in"
    client.delete_cookie("session")
    assert rejected(client).status_code == 401


@both
@pytest.mark.filterwarnings("ignore:.*utcnow:DeprecationWarning")
def test_a_remember_cookie_that_is_renewed_each_time(app, websockets, client, login, caplog, kind):
    """REMEMBER_COOKIE_REFRESH_EACH_REQUEST writes to the session in after_request: no error."""
    app.config["REMEMBER_COOKIE_REFRESH_EACH_REQUEST"] = True
    add(websockets, kind, *tell_who(login))
    client.post("/login", data={"name": "ann", "remember": "yes"})
    with client.websocket_connect("/ws") as ws:
        assert ws.receive_json() == ["ann", "ann"]
    assert errors_in(caplog) == []
    assert client.get("/who").json["user"] == "ann"


@both
def test_a_view_can_log_in_before_the_accept(websockets, client, login, kind):
    """login_user changes the session, which goes out with the 101."""

    def sync_view(ws):
        login.login_user(login.User("ann"))
        ws.send(login.current_user.get_id())

    async def async_view(ws):
        login.login_user(login.User("ann"))
        await ws.send(login.current_user.get_id())

    add(websockets, kind, sync_view, async_view)
    with client.websocket_connect("/ws") as ws:
        assert ws.receive() == "ann"
        assert client.get("/who").json["user"] == "ann"


@both
def test_current_user_is_loaded_again_in_a_new_application_context(websockets, client, login, kind):
    """A connection sees that its user was locked: the loader is asked again, in a thread."""

    def look() -> bool:
        with current_app.app_context():
            return login.current_user.is_authenticated

    def sync_view(ws):
        for _ in ws.iter_data():
            ws.send_json([login.current_user.get_id(), look()])

    async def async_view(ws):
        async for _ in ws.iter_data():
            await ws.send_json([login.current_user.get_id(), await asyncio.to_thread(look)])

    add(websockets, kind, login.login_required(sync_view), login.login_required(async_view))
    client.post("/login", data={"name": "ann"})
    with client.websocket_connect("/ws") as ws:
        ws.send("look")
        assert ws.receive_json() == ["ann", True]
        login.manager.locked.add("ann")
        ws.send("look")
        assert ws.receive_json() == ["ann", False]
    assert rejected(client).status_code == 401


def test_the_documented_second_look(app, websockets, client, login, monkeypatch):
    """The how-to's view closes with 4403 once its user is locked."""
    module = types.ModuleType("app")
    module.app, module.websockets = app, websockets  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "app", module)
    run_documented("login.rst")
    assert rejected(client, "/members").status_code == 401
    client.post("/login", data={"name": "ann"})
    with client.websocket_connect("/members") as ws:
        ws.send("hello")
        assert ws.receive() == "hello"
        login.manager.locked.add("ann")
        ws.send("hello?")
        assert closed(ws)[0] == 4403


# -- sessions --------------------------------------------------------------------------------------


def change_the_session(*, late: bool) -> tuple[Any, Any]:
    """Views that change the session before their accept and, if *late*, after it too."""

    def sync_view(ws):
        session["seen"] = "before"
        ws.send(session["seen"])  # accepts
        if late:
            session["seen"] = "after"
        ws.send(session["seen"])
        ws.receive()

    async def async_view(ws):
        session["seen"] = "before"
        await ws.send(session["seen"])
        if late:
            session["seen"] = "after"
        await ws.send(session["seen"])
        await ws.receive()

    return sync_view, async_view


@both
def test_a_session_changed_before_the_accept_is_seen_by_the_next_request(
    app, websockets, client, caplog, kind
):
    """It is a cookie on the 101, while the connection is still open; nothing is in the log."""
    add(websockets, kind, *change_the_session(late=False))
    app.get("/seen")(lambda: session.get("seen", "nothing"))
    with client.websocket_connect("/ws") as ws:
        assert len(ws.handshake_headers.getlist("Set-Cookie")) == 1
        assert ws.receive() == "before"
        assert client.get("/seen").text == "before"
    assert [record for record in caplog.records if record.name == "flask_websockets"] == []


@both
def test_a_session_changed_after_the_accept_is_reported(app, websockets, client, caplog, kind):
    """The view sees its change, the next request does not, and the log says so once."""
    add(websockets, kind, *change_the_session(late=True))
    app.get("/seen")(lambda: session.get("seen", "nothing"))
    with client.websocket_connect("/ws") as ws:
        assert [ws.receive(), ws.receive()] == ["before", "after"]
        ws.send("end")
        assert closed(ws) == (1000, "")
    assert client.get("/seen").text == "before"
    reports = [record for record in caplog.records if record.name == "flask_websockets"]
    assert [record.levelname for record in reports] == ["WARNING"]
    assert (
        "changed after the WebSocket on /ws (endpoint ws, peer 127.0.0.1) was accepted"
        in reports[0].getMessage()
    )


@both
def test_an_untouched_session_sets_no_cookie(websockets, client, caplog, kind):
    """Reading the session is no change."""

    def sync_view(ws):
        ws.send(session.get("seen", "nothing"))

    async def async_view(ws):
        await ws.send(session.get("seen", "nothing"))

    add(websockets, kind, sync_view, async_view)
    with client.websocket_connect("/ws") as ws:
        assert ws.receive() == "nothing"
        assert "Set-Cookie" not in ws.handshake_headers
    assert caplog.records == []


@both
def test_after_request_may_write_to_the_session(app, websockets, client, caplog, kind):
    """It does so for every page; for an accepted WebSocket it is no error, and is not saved."""

    @app.after_request
    def after(response):
        session["visits"] = session.get("visits", 0) + 1
        return response

    def sync_view(ws):
        ws.send("in")

    async def async_view(ws):
        await ws.send("in")

    add(websockets, kind, sync_view, async_view)
    app.get("/visits")(lambda: str(session.get("visits", 0)))
    assert client.get("/visits").text == "0"
    with client.websocket_connect("/ws") as ws:
        assert ws.receive() == "in"
        assert closed(ws) == (1000, "")
    assert errors_in(caplog) == []
    assert client.get("/visits").text == "1"


class Stored(CallbackDict, SessionMixin):  # type: ignore[type-arg]
    """A session of the store below."""

    def __init__(self, sid: str, data: dict[str, Any]) -> None:
        def changed(_: Any) -> None:
            self.modified = True

        super().__init__(data, changed)
        self.sid = sid
        self.modified = False


class Store(SessionInterface):
    """Server-side sessions in a dict, as in a database: the cookie is only a key."""

    def __init__(self) -> None:
        self.rows: dict[str, str] = {}
        self.saves: list[tuple[dict[str, Any], str]] = []

    def open_session(self, app: Any, request: Any) -> Stored:
        sid = request.cookies.get("sid") or f"row{len(self.rows)}"
        return Stored(sid, json.loads(self.rows.get(sid, "{}")))

    def save_session(self, app: Any, session: Any, response: Any) -> None:
        self.saves.append((dict(session), threading.current_thread().name))
        if session.modified:
            self.rows[session.sid] = json.dumps(session)
            response.set_cookie("sid", session.sid)


@pytest.fixture
def store(app: flask.Flask) -> Store:
    app.session_interface = store = Store()

    @app.get("/set/<value>")
    def set_value(value: str) -> str:
        session["value"] = value
        return value

    return store


@both
@pytest.mark.parametrize("late", [False, True], ids=["before", "before and after"])
def test_a_server_side_session_is_saved_once(websockets, client, store, caplog, kind, late):
    """At the accept, in a thread, and never at the end: newer data of HTTP stays."""
    add(websockets, kind, *change_the_session(late=late))
    client.get("/set/old")
    store.saves.clear()
    with client.websocket_connect("/ws") as ws:
        assert ws.receive() == "before"
        assert [saved for saved, _ in store.saves] == [{"value": "old", "seen": "before"}]
        assert ws.receive() == ("after" if late else "before")
        client.get("/set/new")
        ws.send("end")
        assert closed(ws) == (1000, "")
    assert [saved["value"] for saved, _ in store.saves] == ["old", "new"]
    assert store.saves[0][1].startswith("flask-websockets-view")
    assert json.loads(store.rows["row0"]) == {"value": "new", "seen": "before"}
    assert ("changed after the WebSocket" in caplog.text) == late


@both
@pytest.mark.parametrize("how", ["nothing", "close", "raise", "abort"])
def test_a_server_side_session_is_saved_once_however_it_ends(
    websockets, client, store, caplog, kind, how
):
    """A view that does nothing, closes, fails or aborts after its accept: one save."""

    def end() -> None:
        if how == "raise":
            raise KeyError("of the test")
        if how == "abort":
            flask.abort(409)

    def sync_view(ws):
        session["seen"] = how
        if how != "nothing":
            ws.accept()
        if how == "close":
            ws.close(3000)
        end()

    async def async_view(ws):
        session["seen"] = how
        if how != "nothing":
            await ws.accept()
        if how == "close":
            await ws.close(3000)
        end()

    add(websockets, kind, sync_view, async_view)
    with client.websocket_connect("/ws") as ws:
        codes = {"nothing": 1000, "close": 3000, "raise": 1011, "abort": 4409}
        assert closed(ws)[0] == codes[how]
    assert [saved for saved, _ in store.saves] == [{"seen": how}]
    assert "changed after the WebSocket" not in caplog.text


@both
def test_a_refused_handshake_saves_a_server_side_session_once(websockets, client, store, kind):
    """A refusal is a response: Flask saves the session with it."""

    def sync_view(ws):
        session["tries"] = session.get("tries", 0) + 1
        flask.abort(401)

    async def async_view(ws):
        session["tries"] = session.get("tries", 0) + 1
        flask.abort(401)

    add(websockets, kind, sync_view, async_view)
    assert "sid=row0" in rejected(client).headers["Set-Cookie"]
    assert rejected(client).status_code == 401
    assert [saved for saved, _ in store.saves] == [{"tries": 1}, {"tries": 2}]


@both
def test_after_request_sees_a_server_side_session_as_it_is(app, websockets, client, store, kind):
    """The interface's own class and attributes, for an accepted WebSocket as for a page."""
    seen = []

    @app.after_request
    def after(response):
        seen.append((getattr(session, "sid", None), session.get("seen")))
        return response

    def sync_view(ws):
        session["seen"] = "yes"
        ws.send("in")

    async def async_view(ws):
        session["seen"] = "yes"
        await ws.send("in")

    add(websockets, kind, sync_view, async_view)
    client.get("/set/old")
    with client.websocket_connect("/ws") as ws:
        assert ws.receive() == "in"
        assert closed(ws) == (1000, "")
    assert seen == [("row0", None), ("row0", "yes")]


@both
def test_flashed_messages(app, websockets, client, kind):
    """A message flashed before the accept is shown by the next page, once."""

    def sync_view(ws):
        flask.flash("welcome")
        ws.accept()

    async def async_view(ws):
        flask.flash("welcome")
        await ws.accept()

    add(websockets, kind, sync_view, async_view)
    app.get("/flashed")(lambda: flask.get_flashed_messages())
    with client.websocket_connect("/ws") as ws:
        assert closed(ws)[0] == 1000
    assert client.get("/flashed").json == ["welcome"]
    assert client.get("/flashed").json == []


# -- Flask-WTF -------------------------------------------------------------------------------------


@pytest.fixture
def csrf(app: flask.Flask) -> Any:
    """CSRF protection for every form, and one form."""
    flask_wtf = pytest.importorskip("flask_wtf")
    flask_wtf.CSRFProtect(app)
    app.post("/form")(lambda: "accepted")
    return flask_wtf.csrf


@both
def test_csrf_protection_lets_handshakes_pass_and_guards_forms(websockets, client, csrf, kind):
    """A handshake needs no token; a form without one is refused, with one that a view gave not."""

    def sync_view(ws):
        token = csrf.generate_csrf()
        ws.send(token)
        ws.receive()

    async def async_view(ws):
        token = csrf.generate_csrf()
        await ws.send(token)
        await ws.receive()

    add(websockets, kind, sync_view, async_view)
    assert client.post("/form").status_code == 400
    with client.websocket_connect("/ws") as ws:
        token = ws.receive()
        assert client.post("/form").status_code == 400
        assert client.post("/form", data={"csrf_token": token}).text == "accepted"
        assert client.post("/form", headers={"X-CSRFToken": token}).text == "accepted"
    other = websockets.test_client()
    assert other.post("/form", data={"csrf_token": token}).status_code == 400


@both
def test_the_origin_protects_a_websocket_beside_csrf_protection(websockets, client, csrf, kind):
    """What the token does for forms the Origin does for handshakes."""

    def sync_view(ws):
        ws.send("in")

    async def async_view(ws):
        await ws.send("in")

    add(websockets, kind, sync_view, async_view)
    assert rejected(client, headers={"Origin": "https://evil.example"}).status_code == 403
    with client.websocket_connect("/ws", headers={"Origin": "http://localhost"}) as ws:
        assert ws.receive() == "in"


# -- Flask-SQLAlchemy ------------------------------------------------------------------------------

#: Connections that the database's pool has; one more is an error after POOL_TIMEOUT seconds.
POOL_SIZE = 2
POOL_TIMEOUT = 0.2
#: WebSockets that are open and silent: more than the pool has connections.
IDLE = 6


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The how-to's program on a file, with a small pool: its names as attributes."""
    pytest.importorskip("flask_sqlalchemy")
    monkeypatch.setenv("FLASK_SQLALCHEMY_DATABASE_URI", f"sqlite:///{tmp_path / 'notes.db'}")
    options = {"pool_size": POOL_SIZE, "max_overflow": 0, "pool_timeout": POOL_TIMEOUT}
    monkeypatch.setenv("FLASK_SQLALCHEMY_ENGINE_OPTIONS", json.dumps(options))
    made = types.SimpleNamespace(**run_documented("database.rst"))
    made.app.secret_key = "not a secret"
    with made.app.app_context():
        made.db.create_all()
        made.engine = made.db.engine
    made.client = made.websockets.test_client()
    yield made
    made.engine.dispose()


def read(database: Any) -> int:
    """A query in the view's own context, as a handshake makes it."""
    count: int = database.db.session.query(database.Note).count()
    return count


PATHS = {"sync": "/notes", "async": "/async-notes"}


@both
def test_idle_sockets_hold_no_database_connection(database, kind):
    """More silent clients than the pool has connections, and all connections are in the pool."""
    held = []

    @database.app.before_request
    def query_in_the_handshake():
        read(database)
        held.append(database.engine.pool.checkedout())

    with ExitStack() as stack:
        clients = []
        for _ in range(IDLE):
            # The view accepts at its first receive, behind the line that gives back what the
            # handshake has taken.
            clients.append(stack.enter_context(database.client.websocket_connect(PATHS[kind])))
            assert database.engine.pool.checkedout() == 0
        assert held == [1] * IDLE
        ids = []
        for turn in range(2):
            for number, ws in enumerate(clients):
                ws.send(f"note {turn} of {number}")
                ids.append(ws.receive_json()["id"])
                # The answer comes after the block that has given the connection back.
                assert database.engine.pool.checkedout() == 0
        assert ids == list(range(1, 2 * IDLE + 1))
        with database.app.app_context():
            assert read(database) == 2 * IDLE


@both
def test_a_naive_view_holds_a_connection_for_each_socket(database, kind, caplog):
    """Why the pattern is needed: clients that are silent empty the pool, and the next one fails."""

    def naive(ws):
        for _ in ws.iter_text():
            ws.send_json(read(database))

    async def async_naive(ws):
        async for _ in ws.iter_text():
            await ws.send_json(await asyncio.to_thread(read, database))

    add(database.websockets, kind, naive, async_naive)
    with ExitStack() as stack:
        for number in range(POOL_SIZE):
            ws = stack.enter_context(database.client.websocket_connect("/ws"))
            ws.send("read")
            assert ws.receive_json() == 0
            assert database.engine.pool.checkedout() == number + 1
        one_more = stack.enter_context(database.client.websocket_connect("/ws"))
        one_more.send("read")
        assert closed(one_more) == (1011, "")
    assert "QueuePool limit" in caplog.text
    # Flask-SQLAlchemy's teardown gives them back at the end, in a thread.
    assert database.engine.pool.checkedout() == 0


@both
def test_an_error_in_the_block_gives_the_connection_back(database, kind):
    """A message that the database refuses ends the view, and loses no connection."""

    def fail() -> None:
        with current_app.app_context():
            database.db.session.add(database.Note(text=None))
            database.db.session.commit()  # not null: IntegrityError

    def sync_view(ws):
        for _ in ws.iter_text():
            fail()

    async def async_view(ws):
        async for _ in ws.iter_text():
            await asyncio.to_thread(fail)

    add(database.websockets, kind, sync_view, async_view)
    for _ in range(POOL_SIZE + 1):
        with database.client.websocket_connect("/ws") as ws:
            ws.send("fail")
            assert closed(ws) == (1011, "")
        assert database.engine.pool.checkedout() == 0


@both
def test_the_block_sees_the_request_and_a_g_of_its_own(database, kind):
    """In the block request and session are the view's, g is new, and the view's g comes back."""

    def look() -> list[Any]:
        with current_app.app_context():
            mine = getattr(g, "mine", None)
            g.mine = "of the block"
            return [request.args["q"], session["user"], mine]

    def sync_view(ws):
        g.mine = "of the view"
        ws.send_json([*look(), g.mine])

    async def async_view(ws):
        g.mine = "of the view"
        await ws.send_json([*await asyncio.to_thread(look), g.mine])

    add(database.websockets, kind, sync_view, async_view)
    with database.client.session_transaction() as stored:
        stored["user"] = "ann"
    with database.client.websocket_connect("/ws?q=x") as ws:
        assert ws.receive_json() == ["x", "ann", None, "of the view"]


# -- hooks and signals -----------------------------------------------------------------------------


@both
def test_async_hooks(app, websockets, client, kind):
    """async def before_request, after_request and teardown_request run once, in their order."""
    seen = []

    @app.before_request
    async def before():
        await asyncio.sleep(0)
        g.before = "seen"
        seen.append("before")
        if "refuse" in request.args:
            return "no", 403
        return None

    @app.after_request
    async def after(response):
        await asyncio.sleep(0)
        seen.append("after")
        return response

    @app.teardown_request
    async def teardown(error):
        await asyncio.sleep(0)
        seen.append("teardown")

    def sync_view(ws):
        seen.append("view")
        ws.send(g.before)

    async def async_view(ws):
        seen.append("view")
        await ws.send(g.before)

    add(websockets, kind, sync_view, async_view)
    assert rejected(client, "/ws?refuse=1").status_code == 403
    assert seen == ["before", "after", "teardown"]
    seen.clear()
    with client.websocket_connect("/ws") as ws:
        assert ws.receive() == "seen"
        assert closed(ws) == (1000, "")
    assert seen == ["before", "view", "after", "teardown"]


SIGNALS = (
    "request_started",
    "request_finished",
    "got_request_exception",
    "request_tearing_down",
    "appcontext_pushed",
    "appcontext_tearing_down",
    "appcontext_popped",
)


@pytest.fixture
def signals(app: flask.Flask) -> Iterator[list[tuple[str, str, Any]]]:
    """What Flask signals about this application: name, thread, exception."""
    seen: list[tuple[str, str, Any]] = []

    def note(name: str) -> Callable[..., None]:
        def receive(sender: Any, **values: Any) -> None:
            error = values.get("exception", values.get("exc"))
            seen.append((name, threading.current_thread().name, error))

        return receive

    with ExitStack() as stack:
        for name in SIGNALS:
            stack.enter_context(getattr(flask, name).connected_to(note(name), app))
        yield seen


@both
@pytest.mark.parametrize("outcome", ["good", "refused", "early", "late", "left"])
def test_every_signal_comes_once(app, websockets, client, signals, caplog, kind, outcome):
    """Of an accepted, a refused and a failing view; none on the loop, with the view's error."""
    on_loop = []

    def sync_view(ws):
        if outcome == "refused":
            flask.abort(401)
        if outcome == "early":
            raise KeyError("early")
        ws.send("in")
        if outcome == "late":
            raise KeyError("late")
        if outcome == "left":
            ws.receive()

    async def async_view(ws):
        on_loop.append(threading.current_thread().name)
        if outcome == "refused":
            flask.abort(401)
        if outcome == "early":
            raise KeyError("early")
        await ws.send("in")
        if outcome == "late":
            raise KeyError("late")
        if outcome == "left":
            await ws.receive()

    add(websockets, kind, sync_view, async_view)
    if outcome in ("refused", "early"):
        assert rejected(client).status_code == {"refused": 401, "early": 500}[outcome]
    else:
        with client.websocket_connect("/ws") as ws:
            assert ws.receive() == "in"
            if outcome != "left":
                assert closed(ws)[0] == {"good": 1000, "late": 1011}[outcome]
    # Flask sends no got_request_exception for abort(): it is an answer.
    failed = outcome in ("early", "late")
    expected = set(SIGNALS) - (set() if failed else {"got_request_exception"})
    assert sorted(name for name, _, _ in signals) == sorted(expected)
    assert signals[0][0] == "appcontext_pushed"
    assert signals[-1][0] == "appcontext_popped"
    assert {thread for _, thread, _ in signals}.isdisjoint(on_loop)
    errors = {name: repr(error) for name, _, error in signals if error is not None}
    if failed:
        assert errors["got_request_exception"] == repr(KeyError(outcome))
    # Flask tears down with the error only where nothing has answered it.
    assert set(errors) <= {
        "got_request_exception",
        "request_tearing_down",
        "appcontext_tearing_down",
    }
    assert len(errors_in(caplog)) == failed


@both
def test_hooks_of_an_async_view_run_in_threads(app, websockets, client, kind):
    """before_request, after_request and both teardowns: once each, and never on the loop."""
    seen = []
    loop_threads = []

    def note(name):
        seen.append((name, threading.current_thread().name))

    app.before_request(lambda: note("before"))
    app.teardown_request(lambda error: note("teardown request"))
    app.teardown_appcontext(lambda error: note("teardown app"))

    @app.after_request
    def after(response):
        note("after")
        return response

    def sync_view(ws):
        ws.receive()

    async def async_view(ws):
        loop_threads.append(threading.current_thread().name)
        await ws.receive()

    add(websockets, kind, sync_view, async_view)
    with client.websocket_connect("/ws") as ws:
        ws.send("go")
        assert closed(ws) == (1000, "")
    assert [name for name, _ in seen] == ["before", "after", "teardown request", "teardown app"]
    assert not {thread for _, thread in seen} & set(loop_threads)


# -- threads and tasks of a view's own -------------------------------------------------------------


def test_copy_current_request_context_in_a_thread(app, websockets, client):
    """The thread has request and session, a g of its own, and ws."""

    @websockets.route("/ws")
    def view(ws):
        g.mine = "of the view"
        results = []

        @copy_current_request_context
        def work():
            results.append(getattr(g, "mine", None))
            g.mine = "of the thread"
            ws.send_json([request.args["q"], session["user"], current_app.name, g.mine])

        ws.accept()
        thread = threading.Thread(target=work)
        thread.start()
        thread.join(TIMEOUT)
        ws.send_json([*results, g.mine])

    with client.session_transaction() as stored:
        stored["user"] = "ann"
    with client.websocket_connect("/ws?q=x") as ws:
        assert ws.receive_json() == ["x", "ann", "tests", "of the thread"]
        assert ws.receive_json() == [None, "of the view"]
        assert closed(ws) == (1000, "")


def test_a_copied_context_in_a_thread_shares_g(websockets, client):
    """contextvars.copy_context() takes the view's own contexts along, g included."""

    @websockets.route("/ws")
    def view(ws):
        g.mine = "of the view"

        def work():
            ws.send_json([request.args["q"], g.mine])
            g.mine = "of the thread"

        ws.accept()
        thread = threading.Thread(target=contextvars.copy_context().run, args=(work,))
        thread.start()
        thread.join(TIMEOUT)
        ws.send(g.mine)

    with client.websocket_connect("/ws?q=x") as ws:
        assert ws.receive_json() == ["x", "of the view"]
        assert ws.receive() == "of the thread"


def test_a_thread_that_outlives_its_view(websockets, client):
    """What it still has of the request works; what it sends raises ConnectionClosed."""
    go_on, outcome = threading.Event(), []

    @websockets.route("/ws")
    def view(ws):
        @copy_current_request_context
        def work():
            assert go_on.wait(TIMEOUT)
            outcome.append(request.args["q"])
            try:
                ws.send("too late")
            except ConnectionClosed as error:
                outcome.append(error.code)

        ws.accept()
        threads.append(threading.Thread(target=work))
        threads[0].start()

    threads: list[threading.Thread] = []
    with client.websocket_connect("/ws?q=x") as ws:
        assert closed(ws) == (1000, "")
    go_on.set()
    threads[0].join(TIMEOUT)
    assert outcome == ["x", 1000]


def test_a_thread_pool_sends(websockets, client):
    """Many threads send on one connection: every message comes once, each thread's in order."""
    threads, messages = 8, 50

    @websockets.route("/ws")
    def view(ws):
        ws.accept()
        together = threading.Barrier(threads)

        def work(thread):
            together.wait(TIMEOUT)
            for number in range(messages):
                ws.send_json([thread, number])

        with ThreadPoolExecutor(threads) as pool:
            # One copy for each thread: a context cannot be entered twice at once.
            futures = [
                pool.submit(copy_current_request_context(work), thread) for thread in range(threads)
            ]
            for future in futures:
                future.result(TIMEOUT)
        ws.send("done")

    with client.websocket_connect("/ws") as ws:
        came: dict[int, list[int]] = {thread: [] for thread in range(threads)}
        while (data := ws.receive()) != "done":
            thread, number = json.loads(data)
            came[thread].append(number)
    assert came == {thread: list(range(messages)) for thread in range(threads)}


def test_two_threads_receiving_is_an_error(websockets, client):
    """One of them gets ConcurrencyError, the other one the message."""

    @websockets.route("/ws")
    def view(ws):
        ws.accept()
        together = threading.Barrier(2)

        def work(_):
            together.wait(TIMEOUT)
            try:
                return ws.receive(TIMEOUT)
            except ConcurrencyError:
                ws.send("concurrency")  # only now does the client send anything
                return "concurrency"

        with ThreadPoolExecutor(2) as pool:
            ws.send_json(sorted(pool.map(work, range(2))))

    with client.websocket_connect("/ws") as ws:
        assert ws.receive() == "concurrency"
        ws.send("message")
        assert ws.receive_json() == ["concurrency", "message"]


def test_two_tasks_receiving_is_an_error(websockets, client):
    """In an async view it is the same for two tasks."""

    @websockets.route("/ws")
    async def view(ws):
        await ws.accept()

        async def work():
            try:
                return await ws.receive(TIMEOUT)
            except ConcurrencyError:
                await ws.send("concurrency")
                return "concurrency"

        await ws.send_json(sorted(await asyncio.gather(work(), work())))

    with client.websocket_connect("/ws") as ws:
        assert ws.receive() == "concurrency"
        ws.send("message")
        assert ws.receive_json() == ["concurrency", "message"]


def test_tasks_send(websockets, client):
    """asyncio.create_task and an anyio task group: every message once, each task's in order."""
    tasks, messages = 8, 50

    @websockets.route("/ws")
    async def view(ws):
        g.mine = "of the view"

        async def work(task):
            assert (request.path, g.mine) == ("/ws", "of the view")
            for number in range(messages):
                await ws.send_json([task, number])
                await anyio.sleep(0)

        await ws.accept()
        half = tasks // 2
        created = [asyncio.create_task(work(task)) for task in range(half)]
        async with anyio.create_task_group() as group:
            for task in range(half, tasks):
                group.start_soon(work, task)
        await asyncio.gather(*created)
        await ws.send("done")

    with client.websocket_connect("/ws") as ws:
        came: dict[int, list[int]] = {task: [] for task in range(tasks)}
        while (data := ws.receive()) != "done":
            task, number = json.loads(data)
            came[task].append(number)
    assert came == {task: list(range(messages)) for task in range(tasks)}


def test_a_failing_task_group_is_the_views_error(app, websockets, client, caplog):
    """An error in a task group closes 1011, and Flask logs the group once."""

    @websockets.route("/ws")
    async def view(ws):
        await ws.accept()

        async def work():
            raise KeyError("of a task")

        async with anyio.create_task_group() as group:
            group.start_soon(work)

    with client.websocket_connect("/ws") as ws:
        assert closed(ws) == (1011, "")
    assert len(errors_in(caplog)) == 1
    assert "of a task" in caplog.text


def test_a_thread_of_an_async_view_has_its_contexts(websockets, client):
    """asyncio.to_thread and anyio.to_thread: request, session, current_app, and the view's g."""

    @websockets.route("/ws")
    async def view(ws):
        g.mine = []

        def work(name):
            g.mine.append(name)
            here = threading.current_thread() is not loop_thread
            return [request.args["q"], session["user"], current_app.name, here]

        loop_thread = threading.current_thread()
        first = await asyncio.to_thread(work, "asyncio")
        await ws.send_json(first)
        await ws.send_json(await anyio.to_thread.run_sync(work, "anyio"))
        await ws.send_json(g.mine)

    with client.session_transaction() as stored:
        stored["user"] = "ann"
    with client.websocket_connect("/ws?q=x") as ws:
        assert ws.receive_json() == ws.receive_json() == ["x", "ann", "tests", True]
        assert ws.receive_json() == ["asyncio", "anyio"]


def test_a_task_may_change_the_session_before_the_accept(app, websockets, client):
    """The session of a task, and of a thread, is the view's."""

    @websockets.route("/ws")
    async def view(ws):
        async def work():
            session["task"] = "yes"

        await asyncio.create_task(work())
        await asyncio.to_thread(session.update, {"thread": "yes"})
        await ws.accept()

    app.get("/session")(lambda: dict(session))
    with client.websocket_connect("/ws") as ws:
        assert closed(ws) == (1000, "")
    assert client.get("/session").json == {"task": "yes", "thread": "yes"}


def test_a_task_may_change_the_session_while_its_view_is_accepted(app, websockets, client, caplog):
    """A change during after_request is one after the accept: seen by the view, and reported."""
    running, changed = threading.Event(), threading.Event()

    @app.after_request
    def after(response):
        running.set()
        assert changed.wait(TIMEOUT)
        return response

    @websockets.route("/ws")
    async def view(ws):
        async def work():
            try:
                assert await asyncio.to_thread(running.wait, TIMEOUT)
                session["task"] = "changed"
            finally:
                changed.set()

        task = asyncio.create_task(work())
        await ws.accept()
        await task
        await ws.send(session.get("task", "lost"))

    with client.websocket_connect("/ws") as ws:
        assert ws.receive() == "changed"
        assert closed(ws) == (1000, "")
    assert (
        "changed after the WebSocket on /ws (endpoint view, peer 127.0.0.1) was accepted"
        in caplog.text
    )
