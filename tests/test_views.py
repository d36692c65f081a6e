"""A WebSocket view is a WSGI call that has not returned yet (I3)."""

from __future__ import annotations

import logging
import threading

import pytest
from flask import Blueprint, Flask, Response, abort, g, got_request_exception, request, session
from flask.sessions import SecureCookieSessionInterface
from werkzeug.exceptions import HTTPException
from werkzeug.middleware.proxy_fix import ProxyFix

from flask_websockets import (
    ConnectionClosed,
    ConnectionRejected,
    UsageError,
    WebSocket,
    WebSockets,
)


def rejected(client, path, **options):
    """The response that a handshake is answered with."""
    with pytest.raises(ConnectionRejected) as caught, client.websocket_connect(path, **options):
        pass
    return caught.value.response


def closed(ws):
    """How the server closed the connection."""
    with pytest.raises(ConnectionClosed) as caught:
        ws.receive()
    return caught.value.code, caught.value.reason


def test_i3_a_view_runs_inside_a_request_context(app, websockets, client):
    """request, g, session, converters and url_for work in a view as in any other."""

    @app.before_request
    def before():
        g.seen = "before"

    @websockets.route("/room/<room>/<int:number>")
    def view(ws, room, number):
        path, query = request.path, request.args["q"]
        ws.send_json([room, number, g.seen, session.get("user"), path, query, request.method])
        ws.send(app.url_for("view", room="a", number=1))

    with client.session_transaction() as stored:
        stored["user"] = "ann"
    with client.websocket_connect("/room/blue/7?q=x") as ws:
        path = "/room/blue/7"
        assert ws.receive_json() == ["blue", 7, "before", "ann", path, "x", "GET"]
        assert ws.receive() == "ws://localhost/room/a/1"


def test_i3_hooks_run_once_in_one_thread(app, websockets, client):
    """before_request, the view, after_request and both teardowns run once, in one thread."""
    seen = []

    def note(name):
        seen.append((name, threading.current_thread().name))

    app.before_request(lambda: note("before"))
    app.teardown_request(lambda error: note("teardown request"))
    app.teardown_appcontext(lambda error: note("teardown app"))

    @app.after_request
    def after(response):
        note("after")
        return response

    @websockets.route("/ws")
    def view(ws):
        note("view")
        ws.receive()

    with client.websocket_connect("/ws") as ws:
        ws.send("go")
    names = [name for name, _ in seen]
    assert names == ["before", "view", "after", "teardown request", "teardown app"]
    assert {thread for _, thread in seen} == {"flask-websockets-view /ws"}


def test_i3_the_handshake_goes_through_middleware(app, websockets, client):
    """Middleware around wsgi_app sees the handshake, ProxyFix included."""
    app.wsgi_app = ProxyFix(app.wsgi_app, x_for=1, x_host=1, x_proto=1)

    @websockets.route("/ws")
    def view(ws):
        ws.send_json([request.remote_addr, request.host, request.is_secure, request.url])

    headers = {
        "X-Forwarded-For": "203.0.113.7",
        "X-Forwarded-Host": "app.example.com",
        "X-Forwarded-Proto": "https",
        "Origin": "https://app.example.com",
    }
    with client.websocket_connect("/ws", headers=headers) as ws:
        url = "https://app.example.com/ws"
        assert ws.receive_json() == ["203.0.113.7", "app.example.com", True, url]


@pytest.mark.parametrize("status", [401, 404, 418, 503])
def test_abort_answers_the_handshake(websockets, client, status):
    """abort() before the accept becomes the HTTP response to the handshake."""

    @websockets.route("/ws")
    def view(ws):
        abort(status)

    assert rejected(client, "/ws").status_code == status


def test_before_request_answers_the_handshake(app, websockets, client):
    """What before_request returns is the response; the view does not run."""
    app.before_request(lambda: ("log in first", 401, {"X-Reason": "login"}))
    ran = []

    @websockets.route("/ws")
    def view(ws):
        ran.append(True)

    response = rejected(client, "/ws")
    assert (response.status_code, response.text) == (401, "log in first")
    assert response.headers["X-Reason"] == "login"
    assert not ran


def test_error_handlers_choose_the_status(app, websockets, client):
    """An exception before the accept goes to Flask's error handlers."""

    @app.errorhandler(KeyError)
    def on_key_error(error):
        return "no such key", 409

    @websockets.route("/ws")
    def view(ws):
        raise KeyError("x")

    assert rejected(client, "/ws").status_code == 409


def test_an_unhandled_exception_answers_500(app, websockets, client, caplog):
    """Without a handler it is 500, logged once by Flask."""

    @websockets.route("/ws")
    def view(ws):
        raise RuntimeError("broken")

    assert rejected(client, "/ws").status_code == 500
    assert [record.message for record in caplog.records if record.exc_info] == [
        "Exception on /ws [GET]"
    ]


def test_a_returned_response_rejects(app, websockets, client):
    """A response that the view returns before the accept answers the handshake."""

    @app.after_request
    def after(response):
        response.headers["X-After"] = "seen"
        return response

    @websockets.route("/ws")
    def view(ws):
        return Response("later", status=429, headers={"Retry-After": "7"})

    response = rejected(client, "/ws")
    assert (response.status_code, response.headers["Retry-After"]) == (429, "7")
    assert response.headers["X-After"] == "seen"


def test_a_returned_success_is_an_error(websockets, client, caplog):
    """A 2xx is no refusal: the client gets 500, the log says what was expected."""

    @websockets.route("/ws")
    def view(ws):
        return "hello"

    assert rejected(client, "/ws").status_code == 500
    assert "expected a status of 3xx to 5xx" in caplog.text


def test_i6_an_endless_answer_is_an_error(app, websockets, client):
    """A refusal is held in memory, so its size is bounded; the generator is closed."""
    closed_generator = []

    def endless():
        try:
            while True:
                yield b"x" * 65536
        finally:
            closed_generator.append(True)

    @websockets.route("/ws")
    def view(ws):
        return Response(endless(), status=403)

    with pytest.raises(ValueError, match="at most 1048576"), client.websocket_connect("/ws"):
        pass
    assert closed_generator == [True]


def test_no_such_route_is_404(websockets, client):
    """A handshake for a path that nobody serves is answered by Flask."""
    assert rejected(client, "/nowhere").status_code == 404


def test_i12_a_view_that_returns_closes_1000(websockets, client):
    """A view that returns None without touching ws accepts and closes 1000."""

    @websockets.route("/ws")
    def view(ws):
        pass

    with client.websocket_connect("/ws") as ws:
        assert closed(ws) == (1000, "")


def test_i12_a_view_that_raises_closes_1011(app, websockets, client, caplog):
    """After the accept an error closes 1011, without a word about it to the client."""
    signalled = []

    @websockets.route("/ws")
    def view(ws):
        ws.accept()
        raise RuntimeError("the secret")

    with (
        got_request_exception.connected_to(
            lambda sender, exception: signalled.append(exception), app
        ),
        client.websocket_connect("/ws") as ws,
    ):
        assert closed(ws) == (1011, "")
    assert [str(error) for error in signalled] == ["the secret"]
    assert [record.message for record in caplog.records if record.exc_info] == [
        "Exception on /ws [GET]"
    ]


def test_i5_a_view_that_exits_closes_1011(websockets, client):
    """SystemExit ends the view's thread, and the connection with 1011."""

    @websockets.route("/ws")
    def view(ws):
        ws.accept()
        raise SystemExit(3)

    with pytest.raises(SystemExit), client.websocket_connect("/ws") as ws:
        assert closed(ws) == (1011, "")


@pytest.mark.parametrize(("status", "code"), [(404, 4404), (403, 4403)])
def test_an_http_exception_after_the_accept(websockets, client, status, code):
    """abort() after the accept closes with 4000 + status and the status's name."""

    @websockets.route("/ws")
    def view(ws):
        ws.accept()
        abort(status)

    with client.websocket_connect("/ws") as ws:
        assert closed(ws)[0] == code


def test_an_http_exception_without_a_code(websockets, client):
    """abort(response) after the accept takes the response's status."""

    @websockets.route("/ws")
    def view(ws):
        ws.accept()
        abort(Response("x", status=409))

    with client.websocket_connect("/ws") as ws:
        assert closed(ws)[0] == 4409


def test_the_test_client_raises_what_the_view_raised(app, websockets, client):
    """With app.testing an exception comes out of the test client, as in Flask."""
    app.testing = True

    @websockets.route("/early")
    def early(ws):
        raise KeyError("early")

    @websockets.route("/late")
    def late(ws):
        ws.accept()
        raise KeyError("late")

    with pytest.raises(KeyError, match="early"), client.websocket_connect("/early"):
        pass
    with pytest.raises(KeyError, match="late"), client.websocket_connect("/late"):
        pass


def test_a_test_that_waits_is_told_what_the_view_raised(app, websockets, client):
    """What ended the wait is the cause of what the wait raises; again when the block is left."""
    app.testing = True

    @websockets.route("/ws")
    def view(ws):
        ws.receive()
        raise KeyError("late")

    with pytest.raises(KeyError, match="late"), client.websocket_connect("/ws") as ws:
        ws.send("x")
        with pytest.raises(ConnectionClosed, match="1011") as closed:
            ws.receive()
        assert isinstance(closed.value.__cause__, KeyError)


@pytest.mark.parametrize("raises", [True, False])
def test_without_testing_the_test_is_told_of_it(websockets, client, raises):
    """What a view raised is in the log alone then; only where it may have raised."""

    @websockets.route("/ws")
    def view(ws):
        ws.accept()
        if raises:
            raise KeyError("late")

    with client.websocket_connect("/ws") as ws, pytest.raises(ConnectionClosed) as closed:
        ws.receive()
    assert closed.value.__cause__ is None
    notes = getattr(closed.value, "__notes__", [])
    assert [note.endswith("with app.testing = True it is raised here.") for note in notes] == (
        [True] if raises else []
    )


def test_a_close_that_no_error_explains_has_no_cause(app, websockets, client):
    """A view may say 1011 itself, and go on: the test waits for its end, but not for ever."""
    app.testing = True
    received = threading.Event()

    @websockets.route("/ws")
    def view(ws):
        ws.accept()
        ws.close(1011, "not today")
        assert received.wait(10)

    with client.websocket_connect("/ws", timeout=0.5) as ws:
        with pytest.raises(ConnectionClosed, match="not today") as closed:
            ws.receive()
        received.set()
        assert closed.value.__cause__ is None


def test_an_uncaught_connection_closed_is_a_normal_end(app, websockets, client, caplog):
    """A view need not catch ConnectionClosed; teardown sees no error."""
    torn_down = []
    app.teardown_request(torn_down.append)

    @websockets.route("/ws")
    def view(ws):
        while True:
            ws.receive()

    with client.websocket_connect("/ws") as ws:
        ws.send("x")
    assert torn_down == [None]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_somebody_elses_connection_closed_is_an_error(websockets, client):
    """A dead connection used by mistake does not silently close the view's own."""
    others = []

    @websockets.route("/first")
    def first(ws):
        others.append(ws)
        ws.accept()

    @websockets.route("/second")
    def second(ws):
        ws.accept()
        others[0].send("x")

    with client.websocket_connect("/first") as ws:
        assert closed(ws)[0] == 1000
    with client.websocket_connect("/second") as ws:
        assert closed(ws)[0] == 1011


def test_a_value_returned_after_the_accept_is_ignored_with_a_warning(websockets, client, caplog):
    """Nobody could get it, and the log says so."""

    @websockets.route("/ws")
    def view(ws):
        ws.accept()
        return "too late"

    with client.websocket_connect("/ws") as ws:
        assert closed(ws) == (1000, "")
    assert "returned str after its connection was accepted" in caplog.text


def test_http_and_websocket_share_a_path(app, websockets, client):
    """The same path may have an HTTP view too."""

    @app.get("/both")
    def http():
        return "http"

    @websockets.route("/both")
    def ws_view(ws):
        ws.send("websocket")

    assert client.get("/both").text == "http"
    with client.websocket_connect("/both") as ws:
        assert ws.receive() == "websocket"


def test_under_wsgi_only_a_view_says_what_to_do(app, websockets):
    """A handshake that reaches the view over plain WSGI is answered 426."""

    @websockets.route("/ws")
    def view(ws):
        pass

    headers = {"Upgrade": "websocket", "Connection": "Upgrade"}
    response = app.test_client().get("/ws", headers=headers)
    assert response.status_code == 426
    assert response.headers["Upgrade"] == "websocket"
    assert "asgi_app()" in response.text


# -- registration ---------------------------------------------------------------------------


def test_route_returns_the_function(websockets):
    """The decorator returns the function it was given."""

    def view(ws: WebSocket) -> None:
        pass

    assert websockets.route("/ws")(view) is view


def test_routes_made_before_init_app(app):
    """Routes are kept for the applications that come later, as many as come."""
    websockets = WebSockets()

    @websockets.route("/ws", endpoint="other")
    def view(ws):
        ws.send("here")

    other = Flask("other")
    websockets.init_app(app)
    websockets.init_app(other)
    for each in (app, other):
        assert "other" in each.view_functions
        with websockets.test_client(each).websocket_connect("/ws") as ws:
            assert ws.receive() == "here"


@pytest.mark.parametrize("keyword", ["blueprint", "bp"])
def test_blueprints(app, websockets, client, keyword):
    """A route on a blueprint has its prefix, its hooks and its endpoint."""
    blueprint = Blueprint("chat", __name__, url_prefix="/chat")
    seen = []
    blueprint.before_request(lambda: seen.append(request.endpoint))

    @websockets.route("/ws", **{keyword: blueprint})
    def view(ws):
        ws.send("here")

    app.register_blueprint(blueprint)
    with client.websocket_connect("/chat/ws") as ws:
        assert ws.receive() == "here"
    assert seen == ["chat.view"]


def test_setting_up_twice_is_an_error(app, websockets):
    """One application has one WebSockets object."""
    with pytest.raises(UsageError, match="already"):
        WebSockets(app)


def test_asgi_app_of_an_unknown_application(websockets):
    """asgi_app says when it was not told of the application."""
    with pytest.raises(UsageError, match="init_app"):
        websockets.asgi_app(Flask("other"))
    with pytest.raises(UsageError, match="Name the application"):
        WebSockets().asgi_app()


# -- the handshake ----------------------------------------------------------------------------


def test_a_foreign_origin_is_refused(websockets, client, caplog):
    """A page of another origin gets 403, and the log says what to set."""

    @websockets.route("/ws")
    def view(ws):
        ws.send("in")

    headers = {"Origin": "https://evil.example.com"}
    assert rejected(client, "/ws", headers=headers).status_code == 403
    assert "WEBSOCKETS_ALLOWED_ORIGINS" in caplog.text
    with client.websocket_connect("/ws", headers={"Origin": "http://localhost"}) as ws:
        assert ws.receive() == "in"


def test_origins_of_a_route(websockets, client):
    """origins= widens one route."""

    @websockets.route("/ws", origins=["https://*.example.com"])
    def view(ws):
        ws.send("in")

    with client.websocket_connect("/ws", headers={"Origin": "https://a.example.com"}) as ws:
        assert ws.receive() == "in"
    response = rejected(client, "/ws", headers={"Origin": "https://example.org"})
    assert response.status_code == 403


def test_subprotocols(websockets, client):
    """The first of the client's that the route supports; told before the accept."""

    @websockets.route("/ws", subprotocols=["v2", "v1"])
    def view(ws):
        before = ws.subprotocol
        ws.send_json([before, ws.subprotocol])

    for offered, chosen in ((["v1", "v2"], "v1"), (["x", "v2"], "v2"), (["x"], None), ([], None)):
        with client.websocket_connect("/ws", subprotocols=offered) as ws:
            assert ws.accepted_subprotocol == chosen
            assert ws.receive_json() == [chosen, chosen]


def test_an_unoffered_subprotocol_is_refused_in_the_view(websockets, client):
    """accept(subprotocol=) takes only what was offered, and no line breaks."""

    @websockets.route("/ws")
    def view(ws):
        for name in ("other", "a\r\nX-Evil: 1"):
            with pytest.raises(ValueError):
                ws.accept(name)
        ws.accept("v1")

    with client.websocket_connect("/ws", subprotocols=["v1"]) as ws:
        assert ws.accepted_subprotocol == "v1"


def test_accept_headers(websockets, client):
    """accept(headers=) puts headers on the 101; what may not be sent raises in the view."""

    @websockets.route("/ws")
    def view(ws):
        for bad in ({"X": "a\r\nb"}, {"X Y": "z"}, {"Upgrade": "other"}):
            with pytest.raises(ValueError):
                ws.accept(headers=bad)
        ws.accept(headers={"X-Custom": "yes"})

    with client.websocket_connect("/ws") as ws:
        assert ws.handshake_headers["X-Custom"] == "yes"


def test_a_session_changed_before_the_accept_goes_out_with_it(app, websockets, client):
    """Set-Cookie is on the 101, once."""

    @websockets.route("/ws")
    def view(ws):
        session["user"] = "ann"
        ws.accept()

    @app.get("/who")
    def who():
        return session.get("user", "nobody")

    assert client.get("/who").text == "nobody"
    with client.websocket_connect("/ws") as ws:
        assert len(ws.handshake_headers.getlist("Set-Cookie")) == 1
    assert client.get("/who").text == "ann"


def test_a_session_is_saved_at_the_accept_and_never_again(app, websockets, client, caplog):
    """A later change is reported, and a server-side session is not written hours later."""
    saved = []

    class Interface(SecureCookieSessionInterface):
        def save_session(self, app, session, response):
            saved.append(dict(session))
            super().save_session(app, session, response)

    app.session_interface = Interface()
    seen_after = []

    @app.after_request
    def after(response):
        seen_after.append(session.get("user"))
        return response

    @websockets.route("/ws")
    def view(ws):
        session["user"] = "ann"
        ws.accept()
        session["user"] = "eve"

    with client.websocket_connect("/ws") as ws:
        assert closed(ws)[0] == 1000
    assert saved == [{"user": "ann"}]
    assert seen_after == ["eve"]
    assert (
        "changed after the WebSocket on /ws (endpoint view, peer 127.0.0.1) was accepted"
        in caplog.text
    )


def test_a_rejected_handshake_saves_the_session_as_a_response_does(app, websockets, client):
    """Without an accept Flask saves the session itself."""

    @websockets.route("/ws")
    def view(ws):
        session["tries"] = session.get("tries", 0) + 1
        abort(401)

    assert "session=" in rejected(client, "/ws").headers["Set-Cookie"]
    with client.session_transaction() as stored:
        assert stored["tries"] == 1


def test_errors_of_after_request_do_not_change_the_close(app, websockets, client):
    """after_request of an accepted view sees a response that nobody gets."""

    @app.after_request
    def after(response):
        raise RuntimeError("too late to matter")

    @websockets.route("/ws")
    def view(ws):
        ws.accept()

    with client.websocket_connect("/ws") as ws:
        assert closed(ws) == (1000, "")


def test_a_http_exception_handler_sees_the_refusal(app, websockets, client):
    """A handler for HTTPException answers for abort() in a view."""

    @app.errorhandler(HTTPException)
    def on_http_exception(error):
        return {"error": error.name}, error.code

    @websockets.route("/ws")
    def view(ws):
        abort(410)

    assert rejected(client, "/ws").json == {"error": "Gone"}
