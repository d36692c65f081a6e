"""The behaviour suite, views: the accept, what Flask does around a view, sessions and errors."""

from __future__ import annotations

import pytest

from . import behaviour_drivers

pytest_generate_tests = behaviour_drivers.pytest_generate_tests
serving = behaviour_drivers.serving
driver = behaviour_drivers.driver
kind = behaviour_drivers.kind


class TestRoute:
    """``@websockets.route`` is ``@app.route`` for WebSockets."""

    def test_returns_the_function(self, driver):
        """The decorator returns the function that it was given."""
        registered = driver.get("/routes").json()
        assert {"/sync/echo", "/async/echo"} <= registered.keys()
        assert {rule: what for rule, what in registered.items() if what is not True} == {}

    def test_endpoint(self, driver, kind):
        """The endpoint is named after the function."""
        with driver.connect(f"/{kind}/context/x") as ws:
            ws.send("go on")
            assert ws.receive_json()[0]["endpoint"] == f"{kind}_context"

    def test_http_and_websocket(self, driver, kind):
        """The same path may have an HTTP view too."""
        assert driver.get(f"/{kind}/both").text == "http"
        with driver.connect(f"/{kind}/both") as ws:
            assert ws.receive() == "websocket"


class TestContext:
    """request, session, g, current_app and current_user work in a view."""

    def test_before_and_after_the_accept(self, driver, kind):
        """All of them say the same before the accept, after it, and after waiting."""
        driver.post("/user/ann")
        driver.post("/login/bob")
        driver.add_cookie("plain", "biscuit")
        with driver.connect(f"/{kind}/context/x?a=1&b=%C3%BC", headers={"X-Header": "yes"}) as ws:
            ws.send("go on")
            seen = ws.receive_json()
        assert (
            seen
            == [
                {
                    "method": "GET",
                    "path": f"/{kind}/context/x",
                    "args": {"a": "1", "b": "ü"},
                    "header": "yes",
                    "cookie": "biscuit",
                    "endpoint": f"{kind}_context",
                    "g": "seen",
                    "session": "ann",
                    "app": "behaviour",
                    "user": "bob",
                    "environ": True,
                }
            ]
            * 3
        )

    def test_nothing_is_shared(self, driver, serving, kind):
        """Another client that connects meanwhile has a session and a user of its own."""
        other = serving.driver()
        driver.post("/login/ann")
        with driver.connect(f"/{kind}/context/x") as ws:
            other.post("/login/bob")
            with other.connect(f"/{kind}/context/y") as others:
                others.send("go on")
                assert {seen["user"] for seen in others.receive_json()} == {"bob"}
            ws.send("go on")
            assert {seen["user"] for seen in ws.receive_json()} == {"ann"}


class TestAccept:
    """A view takes a connection, in words or by using it."""

    @pytest.mark.parametrize(
        "how", ["accept", "receive", "receive_json", "send", "iteration", "subscribe"]
    )
    def test_by_itself(self, driver, kind, how):
        """The first receive, send, iteration or subscribe accepts, as accept() does."""
        with driver.connect(f"/{kind}/first/{how}") as ws:
            ws.send('"go on"')  # JSON: a receive_json without patience may get it yet
            assert driver.note("accepted")["states"] == [False, True]

    def test_not_before(self, driver, kind):
        """Looking at a connection does not accept it: the view may still refuse."""
        assert driver.rejected(f"/{kind}/untouched").status == driver.status(403)
        note = driver.note("state")
        assert note["state"] == {
            "connected": False,
            "closed": False,
            "close_code": None,
            "close_reason": None,
            "subprotocol": None,
        }
        assert note["environ"] is True

    def test_headers_as_a_mapping(self, driver, kind):
        """accept(headers=) takes a mapping, for the 101 response."""
        with driver.connect(f"/{kind}/accept/mapping") as ws:
            assert ws.headers.one("X-One") == "1"
            assert ws.headers.one("X-Two") == "zwei: drei"

    def test_headers_as_pairs(self, driver, kind):
        """accept(headers=) takes pairs, in which a name may come twice."""
        with driver.connect(f"/{kind}/accept/pairs") as ws:
            assert ws.headers.one("X-One") == "1"
            assert ws.headers.all("X-Two") == ["a", "b"]

    def test_twice(self, driver, kind):
        """A second accept() is an InvalidState; the connection lives on."""
        with driver.connect(f"/{kind}/accept-twice") as ws:
            error = ws.receive_json()
            assert error["type"] == "InvalidState"
            assert "UsageError" in error["kinds"]
            ws.still_works()

    def test_none(self, driver, kind):
        """A view that returns None without touching ws accepts and closes 1000."""
        with driver.connect(f"/{kind}/nothing") as ws:
            assert ws.closed() == (1000, "")
        assert driver.warnings() == []


class TestReturnValue:
    """What a view returns answers the handshake, if it is not answered yet."""

    @pytest.mark.parametrize("status", [301, 302, 400, 401, 404, 418, 429, 500, 503])
    def test_rejects(self, driver, kind, status):
        """A returned response refuses, with its status, headers and body."""
        answer = driver.rejected(f"/{kind}/returns/{status}")
        assert answer.status == driver.status(status)
        if driver.denial_responses:
            assert answer.headers.one("X-Returned") == "yes"
            assert answer.text == "the body"
        assert driver.warnings() == []

    @pytest.mark.parametrize("status", [100, 101, 103, 200, 201, 204])
    def test_no_refusal(self, driver, kind, status):
        """A 1xx or 2xx is no refusal: 500, and the log says what was expected."""
        answer = driver.rejected(f"/{kind}/returns/{status}")
        assert answer.status == driver.status(500)
        assert "the body" not in answer.text
        [warning] = driver.warnings()
        assert str(status) in warning
        assert "expected" in warning

    def test_too_late(self, driver, kind):
        """After the accept a returned value is ignored, with a warning that says where."""
        with driver.connect(f"/{kind}/returns-late") as ws:
            assert ws.closed() == (1000, "")
        [warning] = driver.warnings()
        assert f"/{kind}/returns-late" in warning
        assert "str" in warning

    def test_close_refuses(self, driver, kind):
        """A close() before the accept is a 403."""
        assert driver.rejected(f"/{kind}/close-early").status == 403
        assert driver.warnings() == []


class TestHooks:
    """Flask's hooks run around a view as around any other."""

    @pytest.mark.parametrize(
        ("what", "status"), [("value", 401), ("abort", 403), ("handled", 409), ("unhandled", 500)]
    )
    def test_before_request_refuses(self, driver, kind, what, status):
        """Its value, its abort() and its error answer the handshake; the view does not run."""
        answer = driver.rejected(f"/{kind}/thread", headers={"X-Before": what})
        assert answer.status == driver.status(status)
        assert driver.after_teardown("view") == []
        if not driver.denial_responses:
            return
        assert answer.headers.one("X-After") == "seen"
        if what == "value":
            assert answer.text == "log in first"
            assert answer.headers.one("X-Reason") == "login"
        if what == "handled":
            assert answer.text == "an error handler chose this"

    def test_after_request_sees_a_refusal(self, driver, kind):
        """after_request runs once on the denial response, and its headers go out with it."""
        answer = driver.rejected(f"/{kind}/returns/429")
        if driver.denial_responses:
            assert answer.headers.one("X-After") == "seen"
        [note] = driver.after_teardown("after_request")
        assert note["status"] == 429

    def test_each_once(self, driver, kind):
        """For an accepted view each hook runs once, the teardowns with no error."""
        with driver.connect(f"/{kind}/thread") as ws:
            driver.note("view")
            assert driver.notes("teardown_request", "teardown_appcontext") == []
            ws.send("go on")
        names = [note["what"] for note in driver.after_teardown()]
        assert sorted(names) == [
            "after_request",
            "before_request",
            "session saved",
            "teardown_appcontext",
            "teardown_request",
            "view",
        ]
        assert driver.note("teardown_request")["error"] is None
        assert driver.note("teardown_appcontext")["error"] is None

    def test_sync_view_has_one_thread(self, driver):
        """A sync view and all its hooks run on one thread."""
        with driver.connect("/sync/thread") as ws:
            ws.send("go on")
        assert len({note["thread"] for note in driver.after_teardown()}) == 1

    def test_async_view_has_the_loop(self, driver):
        """An async view runs on the loop, where no hook may run: they may block."""
        with driver.connect("/async/thread") as ws:
            ws.send("go on")
        notes = driver.after_teardown()
        loop = {note["thread"] for note in notes if note["what"] == "view"}
        hooks = {note["thread"] for note in notes if note["what"] != "view"}
        assert len(loop) == 1
        assert not loop & hooks

    def test_async_views_share_the_loop(self, driver):
        """Two async views run on one thread, the loop's."""
        with driver.connect("/async/thread") as first, driver.connect("/async/thread") as second:
            first.send("go on")
            second.send("go on")
        views = driver.after_teardown("view", count=2)
        assert len(views) == 2
        assert len({note["thread"] for note in views}) == 1

    def test_login_required(self, driver, kind):
        """@login_required below the route refuses strangers, and lets users in."""
        assert driver.rejected(f"/{kind}/private").status == driver.status(401)
        driver.post("/login/ann")
        with driver.connect(f"/{kind}/private") as ws:
            assert ws.receive() == "ann"
            assert ws.closed() == (1000, "")


class TestSession:
    """The session is read and written as in any view, until the accept."""

    def test_read(self, driver, kind):
        """A view reads what an HTTP view wrote, and sends no Set-Cookie for that."""
        driver.post("/user/ann")
        with driver.connect(f"/{kind}/session-read") as ws:
            assert ws.headers.all("Set-Cookie") == []
            assert ws.receive_json() == "ann"

    def test_changed_before_the_accept(self, driver, kind):
        """A change goes out as Set-Cookie on the 101, and the next request sees it."""
        with driver.connect(f"/{kind}/session/early") as ws:
            assert ws.headers.one("Set-Cookie").startswith("session=")
            assert driver.get("/user").json() == "early"
            ws.send("go on")
        assert driver.warnings() == []

    def test_changed_before_a_refusal(self, driver, kind):
        """A change goes out with the response that refuses."""
        answer = driver.rejected(f"/{kind}/session/refused")
        if driver.denial_responses:
            assert answer.headers.one("Set-Cookie").startswith("session=")
            assert driver.get("/user").json() == "refused"
        else:
            assert answer.headers.all("Set-Cookie") == []

    def test_changed_after_the_accept(self, driver, kind):
        """A later change cannot reach the client: the log says so, and where."""
        driver.post("/user/ann")
        with driver.connect(f"/{kind}/session/late") as ws:
            assert ws.headers.all("Set-Cookie") == []
            ws.send("go on")
        [warning] = driver.warnings()
        assert f"/{kind}/session/late" in warning
        assert "session" in warning
        assert driver.get("/user").json() == "ann"

    @pytest.mark.parametrize("when", ["early", "late"])
    def test_saved_once(self, driver, kind, when):
        """The session is saved at the accept, and never again at the end."""
        with driver.connect(f"/{kind}/session/{when}") as ws:
            assert len(driver.notes("session saved")) == 1
            ws.send("go on")
        assert len(driver.after_teardown("session saved")) == 1


class TestErrors:
    """What a view raises: before the accept Flask answers, after it the connection ends."""

    def test_handled_before_the_accept(self, driver, kind):
        """An error handler chooses the status and the body."""
        answer = driver.rejected(f"/{kind}/raises/early/handled")
        assert answer.status == driver.status(409)
        if driver.denial_responses:
            assert answer.text == "an error handler chose this"
        assert driver.after_teardown("got_request_exception") == []
        assert driver.warnings() == []

    @pytest.mark.parametrize("status", [400, 401, 403, 404, 418, 429, 503])
    def test_abort_before_the_accept(self, driver, kind, status):
        """abort() answers the handshake."""
        answer = driver.rejected(f"/{kind}/raises/early/{status}")
        assert answer.status == driver.status(status)
        assert driver.warnings() == []

    def test_unhandled_before_the_accept(self, driver, kind):
        """Without an error handler it is 500, without a word of the error."""
        answer = driver.rejected(f"/{kind}/raises/early/unhandled")
        assert answer.status == driver.status(500)
        assert "secret" not in answer.text

    def test_unhandled_after_the_accept(self, driver, kind):
        """The connection is closed with 1011, and no word of the error in the reason."""
        with driver.connect(f"/{kind}/raises/late/unhandled") as ws:
            code, reason = ws.closed()
        assert code == driver.at_client(1011, "")[0]
        assert "secret" not in reason
        assert "Traceback" not in reason
        assert "Deliberate" not in reason

    @pytest.mark.parametrize("when", ["early", "late"])
    def test_told_once(self, driver, kind, when):
        """Flask logs an unhandled error once, signals it once and gives it to the teardowns."""
        if when == "early":
            driver.rejected(f"/{kind}/raises/early/unhandled")
        else:
            with driver.connect(f"/{kind}/raises/late/unhandled") as ws:
                ws.closed()
        [record] = driver.after_teardown("logged")
        assert (record["level"], record["error"]) == ("ERROR", "Deliberate")
        assert f"/{kind}/raises/{when}/unhandled" in record["message"]
        assert driver.note("got_request_exception")["error"] == "Deliberate"
        assert driver.note("teardown_request")["error"] == "Deliberate"
        assert driver.note("teardown_appcontext")["error"] == "Deliberate"

    @pytest.mark.parametrize("status", [401, 403, 404, 418, 503])
    def test_abort_after_the_accept(self, driver, kind, status):
        """An HTTPException closes with 4000 + its status; it is no error."""
        with driver.connect(f"/{kind}/raises/late/{status}") as ws:
            assert ws.closed()[0] == 4000 + status
        assert driver.after_teardown("got_request_exception") == []
        assert driver.warnings() == []

    def test_handled_after_the_accept(self, driver, kind):
        """An error handler's response comes too late: 1011."""
        with driver.connect(f"/{kind}/raises/late/handled") as ws:
            assert ws.closed() == driver.at_client(1011, "")
        assert driver.after_teardown("got_request_exception") == []

    def test_connection_closed_is_a_normal_end(self, driver, kind):
        """An uncaught ConnectionClosed is neither logged nor given to the teardowns."""
        with driver.connect(f"/{kind}/receive-for-ever") as ws:
            ws.send("x")
        assert driver.warnings() == []
        assert driver.notes("got_request_exception") == []
        assert driver.note("teardown_request")["error"] is None
        assert driver.note("teardown_appcontext")["error"] is None
