"""examples/login through real servers: who has no name stays out, who logs out is closed."""

from __future__ import annotations

import http.client
import importlib
import sys
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from urllib.parse import urlencode

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from .conftest import IMPLEMENTATIONS, ServerProcess

LOGIN = Path(__file__).parents[2] / "examples" / "login"
TIMEOUT = 20.0


@pytest.fixture
def server(start_server: Callable[..., ServerProcess], implementation: str) -> ServerProcess:
    """The example as its first line says, once with each implementation."""
    command = [sys.executable, "-m", "uvicorn", "--app-dir", str(LOGIN), "app:asgi"]
    return start_server("", [*command, "--port", "{port}", *IMPLEMENTATIONS[implementation]])


def post(server: ServerProcess, path: str, cookie: str = "", **form: str) -> str:
    """Post a form, and return the session's cookie."""
    headers = {"Content-Type": "application/x-www-form-urlencoded", "Cookie": cookie}
    with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=TIMEOUT)) as client:
        client.request("POST", path, urlencode(form), headers)
        answer = client.getresponse()
        assert (answer.status, answer.headers["Location"]) == (302, "/")
        return answer.headers["Set-Cookie"].partition(";")[0]


def enter(server: ServerProcess, cookie: str, origin: str | None = None) -> ClientConnection:
    headers = {"Cookie": cookie}
    return connect(
        server.ws_url("/ws"),
        origin=origin,
        additional_headers=headers,
        open_timeout=TIMEOUT,
        proxy=None,
    )


def test_who_has_not_logged_in_stays_out(server):
    """401 without a login; 403 with one, for a page of another origin."""
    with pytest.raises(InvalidStatus) as refused, enter(server, ""):
        pass
    assert refused.value.response.status_code == 401
    cookie = post(server, "/login", name="ann")
    with pytest.raises(InvalidStatus) as refused, enter(server, cookie, "https://evil.example"):
        pass
    assert refused.value.response.status_code == 403
    with enter(server, cookie, server.url().rstrip("/")) as ann:
        ann.send("in")
        assert ann.recv(timeout=TIMEOUT) == "ann: in"


def test_a_logout_closes_the_users_connections(server):
    """All of ann's connections are closed with 4401, and bob's is not."""
    cookies = {name: post(server, "/login", name=name) for name in ("ann", "bob")}
    with (
        enter(server, cookies["ann"]) as ann,
        enter(server, cookies["ann"]) as also_ann,
        enter(server, cookies["bob"]) as bob,
    ):
        for ws, name in ((ann, "ann"), (also_ann, "ann"), (bob, "bob")):
            ws.send("hello")
            # What comes back to its own sender says that the sender is in.
            while ws.recv(timeout=TIMEOUT) != f"{name}: hello":
                pass
        gone = post(server, "/logout", cookies["ann"])
        for ws in (ann, also_ann):
            with pytest.raises(ConnectionClosed) as closed:
                while True:
                    ws.recv(timeout=TIMEOUT)
            assert closed.value.rcvd is not None
            assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (4401, "logged out")
        bob.send("still here")
        while bob.recv(timeout=TIMEOUT) != "bob: still here":
            pass
    with pytest.raises(InvalidStatus), enter(server, gone):
        pass


def test_a_user_has_ten_connections(server):
    """The eleventh is answered 429; another user has places of his own."""
    cookies = {name: post(server, "/login", name=name) for name in ("ann", "bob")}
    with ExitStack() as stack:
        for _ in range(10):
            stack.enter_context(enter(server, cookies["ann"]))
        with pytest.raises(InvalidStatus) as refused, enter(server, cookies["ann"]):
            pass
        assert refused.value.response.status_code == 429
        assert int(refused.value.response.headers["Retry-After"]) > 0
        bob = stack.enter_context(enter(server, cookies["bob"]))
        bob.send("in")
        assert bob.recv(timeout=TIMEOUT) == "bob: in"


def test_who_logs_in_again_is_in_again(server):
    """A logout ends the connections that there are, and not the user."""
    cookie = post(server, "/login", name="ann")
    with enter(server, cookie) as ann:
        gone = post(server, "/logout", cookie)
        with pytest.raises(ConnectionClosed, match="logged out"):
            ann.recv(timeout=TIMEOUT)
    with enter(server, post(server, "/login", gone, name="ann")) as ann:
        ann.send("again")
        assert ann.recv(timeout=TIMEOUT) == "ann: again"


def test_the_login_lasts_for_half_a_day(monkeypatch):
    """The route's connections are closed when they are so old, and the page has to come again."""
    monkeypatch.syspath_prepend(str(LOGIN))
    monkeypatch.delitem(sys.modules, "app", raising=False)
    module = importlib.import_module("app")
    monkeypatch.delitem(sys.modules, "app")
    assert module.app.view_functions["chat"].websocket_route.max_age == 12 * 60 * 60


@pytest.mark.browser
def test_in_a_browser(browser, server):
    """The page's cookie opens its WebSocket; a logout elsewhere closes it."""
    page = browser.open(server.url("/"))
    log = "document.querySelector('#log').textContent"
    page.wait_for(f"{log}.includes('not in')", TIMEOUT)
    page.run("document.querySelector('input[name=name]').value = 'ann'")
    page.run("document.querySelector('form[action=\"/login\"]').submit()")
    page.wait_for(f"typeof ws === 'object' && ws.readyState === 1 && !{log}.length", TIMEOUT)
    page.run("say[0].value = 'hello'; say.requestSubmit()")
    page.wait_for(f"{log}.includes('ann: hello')", TIMEOUT)
    page.run("fetch('/logout', { method: 'POST' })")
    page.wait_for(f"{log}.includes('logged out')", TIMEOUT)
