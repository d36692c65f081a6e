"""examples/mixed through real servers: a plain view and an async one behind one login."""

from __future__ import annotations

import http.client
import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from email.message import Message
from pathlib import Path
from urllib.parse import urlencode

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from .browser import Browser, Page
from .conftest import IMPLEMENTATIONS, ServerProcess, free_port

MIXED = Path(__file__).parents[2] / "examples" / "mixed"
#: Seconds for one message to come.
TIMEOUT = 20.0
#: Seconds for what a page shows; its pause before a new connection may double a few times.
PAGE_TIMEOUT = 30.0
NOTES, PULSE = "/members/notes", "/members/pulse"

both = pytest.mark.parametrize("path", [NOTES, PULSE])


@pytest.fixture(scope="module", params=IMPLEMENTATIONS)
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """The example with uvicorn, once with each implementation: no test leaves anything in it."""
    directory, port = tmp_path_factory.mktemp("mixed"), free_port()
    command = [sys.executable, "-m", "uvicorn", "--app-dir", str(MIXED), "app:asgi"]
    command += ["--port", str(port), *IMPLEMENTATIONS[request.param]]
    server = ServerProcess(command, port, directory / "log.txt", directory)
    try:
        server.wait_until_listening()
        yield server
    finally:
        server.kill()
    assert "Traceback" not in server.log()


def ask(
    server: ServerProcess, method: str, path: str, cookie: str = "", **form: str
) -> tuple[int, Message, str]:
    """Make a request, and return its status, headers and body."""
    headers = {"Content-Type": "application/x-www-form-urlencoded", "Cookie": cookie}
    with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=TIMEOUT)) as client:
        client.request(method, path, urlencode(form), headers)
        answer = client.getresponse()
        return answer.status, answer.headers, answer.read().decode()


def post(server: ServerProcess, path: str, cookie: str = "", **form: str) -> str:
    """Post a form, and return the session's cookie."""
    status, headers, _ = ask(server, "POST", path, cookie, **form)
    assert (status, headers["Location"]) == (302, "/")
    return headers["Set-Cookie"].partition(";")[0]


def log_in(server: ServerProcess, name: str, cookie: str = "") -> str:
    return post(server, "/", cookie, name=name)


def log_out(server: ServerProcess, cookie: str) -> str:
    return post(server, "/members/logout", cookie)


def enter(
    server: ServerProcess, cookie: str, path: str = NOTES, origin: str | None = None
) -> ClientConnection:
    headers = {"Cookie": cookie}
    return connect(
        server.ws_url(path),
        origin=origin,
        additional_headers=headers,
        open_timeout=TIMEOUT,
        proxy=None,
    )


def receive_until(ws: ClientConnection, expected: list[str]) -> None:
    """Receive until this comes; beats come in between."""
    deadline = time.monotonic() + TIMEOUT
    while json.loads(ws.recv(timeout=TIMEOUT)) != expected:
        assert time.monotonic() < deadline, f"{expected} did not come"


def closed(ws: ClientConnection) -> tuple[int, str]:
    """How the server closed the connection, whatever came before."""
    deadline = time.monotonic() + TIMEOUT
    with pytest.raises(ConnectionClosed) as closed:
        while time.monotonic() < deadline:
            ws.recv(timeout=TIMEOUT)
    assert closed.value.rcvd is not None
    return closed.value.rcvd.code, closed.value.rcvd.reason


# -- the server ----------------------------------------------------------------------------------


def test_sixty_lines():
    """The example has at most 60 lines of Python, blank ones included."""
    assert sum(len(path.read_text().splitlines()) for path in MIXED.rglob("*.py")) <= 60


@both
def test_who_has_not_logged_in_stays_out(server, path):
    """401 without a login; 403 with one, for a page of another origin."""
    with pytest.raises(InvalidStatus) as refused, enter(server, "", path):
        pass
    assert refused.value.response.status_code == 401
    cookie = log_in(server, "ann")
    with pytest.raises(InvalidStatus) as refused, enter(server, cookie, path, "https://evil.test"):
        pass
    assert refused.value.response.status_code == 403
    with enter(server, cookie, path, server.url().rstrip("/")) as ann:
        ann.send("hello")
        receive_until(ann, ["ann", "hello"])


def test_a_page_may_ask_by_http(server):
    """What tells a page whether its login holds: the same page, which names the member."""
    assert 'data-member=""' in ask(server, "GET", "/")[2]
    cookie = log_in(server, "ann")
    assert 'data-member="ann"' in ask(server, "GET", "/", cookie)[2]
    assert 'data-member=""' in ask(server, "GET", "/", log_out(server, cookie))[2]


def test_a_logout_closes_the_users_connections(server):
    """All of ann's connections are closed with 4401, sync and async; bob's are not."""
    cookies = {name: log_in(server, name) for name in ("ann", "bob")}
    with ExitStack() as stack:
        anns, bobs = (
            [stack.enter_context(enter(server, cookies[name], path)) for path in (NOTES, PULSE)]
            for name in ("ann", "bob")
        )
        anns.append(stack.enter_context(enter(server, log_in(server, "ann"))))  # her other browser
        for ws, name in ((ws, name) for name, all in (("ann", anns), ("bob", bobs)) for ws in all):
            ws.send("hello")
            receive_until(ws, [name, "hello"])  # what comes back to its sender says: it is in
        gone = log_out(server, cookies["ann"])
        assert [closed(ws) for ws in anns] == [(4401, "logged out")] * 3
        for ws in bobs:
            ws.send("coffee")
            receive_until(ws, ["bob", "coffee"])
    for path in (NOTES, PULSE):
        with pytest.raises(InvalidStatus), enter(server, gone, path):
            pass


def test_a_user_has_so_many_connections(monkeypatch, start_server):
    """Settings come from the environment: the eleventh is answered 429, and not another user's."""
    monkeypatch.setenv("FLASK_WEBSOCKETS_MAX_CONNECTIONS_PER_USER", "10")
    command = [sys.executable, "-m", "flask", "--app", str(MIXED / "app"), "websockets", "serve"]
    server = start_server("", [*command, "--port", "{port}"])
    cookies = {name: log_in(server, name) for name in ("ann", "bob")}
    with ExitStack() as stack:
        for number in range(10):
            stack.enter_context(enter(server, cookies["ann"], (NOTES, PULSE)[number % 2]))
        with pytest.raises(InvalidStatus) as refused, enter(server, cookies["ann"]):
            pass
        assert refused.value.response.status_code == 429
        assert int(refused.value.response.headers["Retry-After"]) > 0
        bob = stack.enter_context(enter(server, cookies["bob"]))
        bob.send("in")
        assert json.loads(bob.recv(timeout=TIMEOUT)) == ["bob", "in"]


@both
def test_who_logs_in_again_is_in_again(server, path):
    """A logout ends the connections that there are, and not the user."""
    cookie = log_in(server, "ann")
    with enter(server, cookie, path) as ann:
        gone = log_out(server, cookie)
        assert closed(ann) == (4401, "logged out")
    with enter(server, log_in(server, "ann", gone), path) as ann:
        ann.send("hello")
        receive_until(ann, ["ann", "hello"])


def test_the_login_lasts_for_half_a_day(monkeypatch):
    """The routes' connections are closed when they are so old, and the page has to come again."""
    monkeypatch.syspath_prepend(str(MIXED))
    monkeypatch.delitem(sys.modules, "app", raising=False)
    module = importlib.import_module("app")
    monkeypatch.delitem(sys.modules, "app")
    routes = [module.app.view_functions[f"members.{name}"] for name in ("notes", "pulse")]
    assert [view.websocket_route.is_async for view in routes] == [False, True]
    assert [view.websocket_route.max_age for view in routes] == [12 * 60 * 60] * 2


def test_everybody_is_heard_each_second(server):
    """Who says nothing beats, to all; a sign comes at once, between two beats."""
    with (
        enter(server, log_in(server, "ann"), PULSE) as ann,
        enter(server, log_in(server, "bob"), PULSE) as bob,
    ):
        for ws in (ann, bob):
            for _ in range(2):
                receive_until(ws, ["ann", None])
            receive_until(ws, ["bob", None])
        for sign in ("hello", "coffee", "hooray"):
            ann.send(sign)
            receive_until(bob, ["ann", sign])


#: What each view is sent, and how it says goodbye.
BAD_NOTES: dict[str | bytes, tuple[int, str]] = dict.fromkeys(
    ("", " \n ", b"text", b"\xff\xfe"), (4400, "A note is text, and not empty.")
) | {"x" * 2001: (1009, "a message may have 2000 bytes")}
BAD_SIGNS: dict[str | bytes, tuple[int, str]] = dict.fromkeys(
    ("", "Hello", "null", b"hello", b"\xff\xfe"), (4400, 'Expected "hello", "coffee" or "hooray".')
) | {"x" * 2001: (1009, "a message may have 2000 bytes")}


@pytest.mark.parametrize(("path", "bad"), [(NOTES, BAD_NOTES), (PULSE, BAD_SIGNS)])
def test_bad_messages(server, path, bad):
    """What a view does not take ends its sender's connection, with a reason, and no other one."""
    cookies = {name: log_in(server, name) for name in ("ann", "mallory")}
    with enter(server, cookies["ann"], path) as ann:
        for message, goodbye in bad.items():
            with enter(server, cookies["mallory"], path) as mallory:
                mallory.send(message)
                assert closed(mallory) == goodbye, message
            ann.send("coffee")
            receive_until(ann, ["ann", "coffee"])


def test_names(server):
    """A name is cut to its length, and some name there is; none at all is a bad request."""
    for asked, given in {"": "Guest", "  ": "Guest", "x" * 99: "x" * 24, " <b> ": "<b>"}.items():
        with enter(server, log_in(server, asked)) as ws:
            ws.send("in")
            assert json.loads(ws.recv(timeout=TIMEOUT)) == [given, "in"]
    assert ask(server, "POST", "/")[0] == 400
    status, _, page = ask(server, "GET", "/", log_in(server, '"><img src=x>'))
    assert status == 200
    assert "<img src=x" not in page
    assert 'data-member="&#34;&gt;&lt;img src=x&gt;"' in page


def test_the_cookie_is_for_the_own_site(server):
    """Other sites' pages do not send it, and scripts do not see it; only a POST logs out."""
    _, headers, _ = ask(server, "POST", "/", name="ann")
    assert {"HttpOnly", "SameSite=Lax"} <= set(headers["Set-Cookie"].split("; "))
    cookie = headers["Set-Cookie"].partition(";")[0]
    assert ask(server, "GET", "/members/logout", cookie)[0] == 405
    assert ask(server, "POST", "/members/logout")[0] == 401


# -- with browsers -------------------------------------------------------------------------------


def visit(browser: Browser, server: ServerProcess, name: str, **size: int) -> Page:
    """Log in with the keyboard, and wait until both panels are connected."""
    page = browser.open(server.url(), **size)
    come_in(page, name)
    return page


def come_in(page: Page, name: str) -> None:
    page.wait_for("document.activeElement.id === 'name'", PAGE_TIMEOUT)
    page.run("document.activeElement.select()")
    page.type(name)
    page.press("Enter", "\r")
    wait_for_states(page, "live")


def wait_for_states(page: Page, state: str) -> None:
    states = "[...document.querySelectorAll('section')].map((each) => each.dataset.state).join()"
    page.wait_for(f"{states} === '{state},{state}'", PAGE_TIMEOUT)


def wait_for_notes(page: Page, *texts: str) -> None:
    """Wait until these are the notes that the page shows."""
    shown = "[...document.querySelectorAll('#notes .text')].map((each) => each.textContent)"
    page.wait_for(f"JSON.stringify({shown}) === JSON.stringify({json.dumps(texts)})", PAGE_TIMEOUT)


def wait_for_people(page: Page, *names: str) -> None:
    """Wait until these are the members that the page hears."""
    shown = "[...document.querySelectorAll('#pulse li b')].map((each) => each.textContent)"
    page.wait_for(f"JSON.stringify({shown}) === JSON.stringify({json.dumps(names)})", PAGE_TIMEOUT)


def wait_for_login(page: Page, why: str) -> None:
    """Wait until the page has the login in place of the room, and says why."""
    page.wait_for("document.querySelector('#door').checkVisibility()", PAGE_TIMEOUT)
    assert not page.run("document.querySelector('#room').checkVisibility()")
    assert page.run("document.querySelector('#why').textContent") == why


def write(page: Page, text: str) -> None:
    """Post a note with the keyboard."""
    page.run("document.querySelector('#note').focus()")
    page.type(text)
    page.press("Enter", "\r")


def press(page: Page, selector: str) -> None:
    """Press a button with the keyboard."""
    page.run(f"document.querySelector({json.dumps(selector)}).focus()")
    page.press("Enter", "\r")


def wait_for_sign(page: Page, name: str, text: str) -> None:
    lines = "[...document.querySelectorAll('#pulse li')]"
    name = json.dumps(name)
    line = f"{lines}.find((each) => each.querySelector('b').textContent === {name})"
    page.wait_for(f"{line}.querySelector('.sign').textContent === '{text}'", PAGE_TIMEOUT)


@pytest.fixture
def served(start_server, start_example, monkeypatch) -> Callable[..., ServerProcess]:
    """Serve the example; with a key that stays, or with a new one at each start."""

    def start(port: int | None = None, key: str = "") -> ServerProcess:
        if key:
            monkeypatch.setenv("FLASK_SECRET_KEY", key)
        else:
            monkeypatch.delenv("FLASK_SECRET_KEY", raising=False)
        return start_example("mixed", port)

    return start


@pytest.mark.browser
def test_two_browsers(browser, other_browser, served):
    """Both panels of one browser reach the other's: notes as text, once; signs, and who is here."""
    server = served()
    ada, grace = visit(browser, server, "Ada"), visit(other_browser, server, "Grace")
    wait_for_people(ada, "Ada", "Grace")
    wait_for_people(grace, "Grace", "Ada")  # oneself first
    markup = "<img src=x onerror=\"document.title='taken'\"> & <b>"
    write(ada, "Lunch at one?")
    wait_for_notes(grace, "Lunch at one?")
    write(grace, markup)
    for page in (ada, grace):
        wait_for_notes(page, "Lunch at one?", markup)
        assert page.run("document.querySelectorAll('#notes img, #notes .text b').length") == 0
        assert page.run("document.title") == "Members' room"
    press(grace, "#pulse button[value=coffee]")
    for page in (ada, grace):
        wait_for_sign(page, "Grace", "Coffee?")
    grace.go("about:blank")
    wait_for_people(ada, "Ada")
    assert ada.errors == grace.errors == []


@pytest.mark.browser
def test_a_logout_reaches_every_browser(browser, other_browser, served):
    """Who logs out in one browser is shown the login in each; the other member's page goes on."""
    server = served()
    ada, also_ada = visit(browser, server, "Ada"), visit(other_browser, server, "Ada")
    grace = visit(other_browser, server, "Grace")
    wait_for_people(grace, "Grace", "Ada")
    press(ada, "header button")
    ada.wait_for("document.activeElement.id === 'name'", PAGE_TIMEOUT)  # the server's own answer
    wait_for_login(also_ada, "You were logged out.")
    wait_for_people(grace, "Grace")
    write(grace, "Still here")
    wait_for_notes(grace, "Still here")
    for page in (ada, also_ada):
        come_in(page, "Ada")
    wait_for_people(grace, "Grace", "Ada")
    write(also_ada, "Back again")
    wait_for_notes(grace, "Still here", "Back again")
    assert ada.errors == also_ada.errors == grace.errors == []


@pytest.mark.browser
def test_a_page_comes_back_with_a_key_that_stays(browser, other_browser, served):
    """The server was killed: both panels say so, come back, and show nothing twice."""
    key = "the same for all of this test"
    server = served(key=key)
    ada, grace = visit(browser, server, "Ada"), visit(other_browser, server, "Grace")
    write(ada, "Before")
    wait_for_notes(grace, "Before")
    wait_for_people(grace, "Grace", "Ada")
    server.kill()
    for page in (ada, grace):
        wait_for_states(page, "lost")
    write(ada, "After")  # cannot be sent, and stays
    assert ada.run("document.querySelector('#note').value") == "After"
    served(server.port, key=key)
    for page in (ada, grace):
        wait_for_states(page, "live")
    ada.run("document.querySelector('#note').focus()")
    ada.press("Enter", "\r")
    for page in (ada, grace):
        wait_for_notes(page, "Before", "After")
    wait_for_people(ada, "Ada", "Grace")
    wait_for_people(grace, "Grace", "Ada")


@pytest.mark.browser
def test_a_new_key_ends_all_logins(browser, served):
    """The server was started with another key: the page shows the login, and that works."""
    server = served()
    page = visit(browser, server, "Ada")
    server.kill()
    wait_for_states(page, "lost")
    served(server.port)
    wait_for_login(page, "Your login is over.")
    come_in(page, "Ada")
    wait_for_people(page, "Ada")


@pytest.mark.browser
def test_how_it_looks(browser, other_browser, served, photograph):
    """The room and the login fit any window, in light and in dark."""
    server = served()
    ada = visit(browser, server, "Ada Lovelace")
    grace = visit(other_browser, server, "Grace Hopper")
    alan = visit(other_browser, server, "Alan Turing")
    said: list[tuple[Page, str]] = [
        (grace, "The new compiler is on the staging server. It found two bugs before breakfast."),
        (ada, "Splendid. I have the numbers for the engine, shall we look at them at two?"),
        (alan, "At two. I bring the paper tape, somebody else brings the cake."),
        (grace, "Cake it is."),
    ]
    for number, (page, text) in enumerate(said, 1):
        write(page, text)
        wait_for_notes(ada, *(text for _, text in said[:number]))
    wait_for_people(ada, "Ada Lovelace", "Alan Turing", "Grace Hopper")
    press(alan, "#pulse button[value=hello]")
    press(grace, "#pulse button[value=coffee]")
    wait_for_sign(ada, "Grace Hopper", "Coffee?")
    photograph(ada, "mixed")
    for page in (ada, visit_door(browser, server)):
        page.resize(320, 568)
        assert page.run("document.documentElement.scrollWidth <= innerWidth")
        assert page.errors == []


def visit_door(browser: Browser, server: ServerProcess) -> Page:
    page = browser.open(server.url())
    page.wait_for("document.activeElement.id === 'name'", PAGE_TIMEOUT)
    return page
