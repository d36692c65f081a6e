"""The main job: examples/chat, through real servers, with real clients and real browsers."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote
from urllib.request import urlopen

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from .browser import Browser, Page
from .conftest import IMPLEMENTATIONS, ServerProcess, free_port
from .waiting import wait_until

CHAT = Path(__file__).parents[2] / "examples" / "chat"
#: Seconds for one message to come.
TIMEOUT = 10.0
#: Seconds for what a page shows; its pause before a new connection may double a few times.
PAGE_TIMEOUT = 30.0


@pytest.fixture
def start_chat(start_server, implementation) -> Callable[..., ServerProcess]:
    """Start the example as its first line says, once with each implementation."""

    def start(port: int | None = None) -> ServerProcess:
        command = [sys.executable, "-m", "uvicorn", "--app-dir", str(CHAT), "app:asgi"]
        command += ["--port", "{port}", *IMPLEMENTATIONS[implementation]]
        return start_server("", command, port=port)

    return start


@pytest.fixture
def chat(start_chat) -> Iterator[ServerProcess]:
    """The running example. Whatever a guest did, no view of it may end by an error."""
    server = start_chat()
    yield server
    server.stop()
    assert "Traceback" not in server.log()


class Guest:
    """Somebody in a room, who reads message by message."""

    def __init__(self, connection: ClientConnection) -> None:
        self.connection = connection
        self.me = self.read("welcome")["who"]
        joined = self.read("join")
        assert joined["who"] == self.me
        self.people = dict(joined["people"])

    def read(self, kind: str) -> dict[str, Any]:
        """The next message, which must be of this kind."""
        message = json.loads(self.connection.recv(timeout=TIMEOUT))
        assert message["type"] == kind, message
        return message

    def say(self, text: str) -> None:
        self.connection.send(json.dumps({"text": text}))


@contextmanager
def guest(server: ServerProcess, room: str, name: str) -> Iterator[Guest]:
    with connect(server.ws_url(f"/ws/{quote(room)}?name={quote(name)}"), proxy=None) as connection:
        yield Guest(connection)


def fetch(server: ServerProcess, path: str) -> str:
    with urlopen(server.url(path), timeout=TIMEOUT) as response:
        return response.read().decode()


def test_sixty_lines():
    """The example has at most 60 lines of Python, blank ones included."""
    assert len((CHAT / "app.py").read_text().splitlines()) <= 60


def test_two_guests_in_one_room(chat):
    """Two guests see their own and each other's messages, with name and time, in one order."""
    with guest(chat, "lobby", "Ada") as ada, guest(chat, "lobby", "Grace") as grace:
        assert ada.read("join")["who"] == grace.me
        for speaker, text in ((ada, "Morning"), (grace, "Good morning"), (ada, "Tea? 🍵")):
            speaker.say(text)
            seen = [somebody.read("message") for somebody in (ada, grace)]
            assert seen[0] == seen[1]
            assert seen[0]["who"] == speaker.me
            assert seen[0]["text"] == text
            assert abs(seen[0]["time"] - time.time()) < 60
        assert (ada.me["name"], grace.me["name"]) == ("Ada", "Grace")


def test_rooms_are_separate(chat):
    """What is said in one room is not heard in another."""
    with guest(chat, "lobby", "Ada") as ada, guest(chat, "kitchen", "Grace") as grace:
        ada.say("for the lobby")
        assert ada.read("message")["text"] == "for the lobby"
        grace.say("for the kitchen")
        # Had the lobby's message come here, then before this one.
        assert grace.read("message")["text"] == "for the kitchen"
        ada.say("once more")
        assert ada.read("message")["text"] == "once more"


def test_joins_and_leaves(chat):
    """Who joins and who leaves is announced, with everybody who is there now."""
    with guest(chat, "lobby", "Ada") as ada:
        assert list(ada.people.values()) == ["Ada"]
        with guest(chat, "lobby", "Grace") as grace:
            assert sorted(grace.people.values()) == ["Ada", "Grace"]
            joined = ada.read("join")
            assert joined["who"] == grace.me
            assert dict(joined["people"]) == grace.people
        left = ada.read("leave")
        assert left["who"] == grace.me
        assert dict(left["people"]) == ada.people
        with guest(chat, "lobby", "Grace"):
            assert ada.read("join")["who"]["id"] != grace.me["id"]


def test_a_guest_who_vanishes_has_left(chat):
    """A connection that ends without a close frame is a leave as well."""
    with guest(chat, "lobby", "Ada") as ada, guest(chat, "lobby", "Grace") as grace:
        ada.read("join")
        grace.connection.socket.shutdown(2)
        assert ada.read("leave")["who"] == grace.me


#: What is no message: no JSON, no object, no text, an empty one, one that is too long.
BAD_MESSAGES: tuple[str | bytes, ...] = (
    "{",
    "",
    b"\xff\xfe",
    "[]",
    "null",
    "{}",
    '{"text": 5}',
    '{"text": ["a"]}',
    '{"text": " \\n "}',
    json.dumps({"text": "x" * 1001}),
    "[" * 10_000,
    "9" * 10_000,
)


def test_bad_messages(chat):
    """What is no message gets its sender, and nobody else, an error; the connection lives."""
    with guest(chat, "lobby", "Ada") as ada, guest(chat, "lobby", "Mallory") as mallory:
        ada.read("join")
        for number, bad in enumerate(BAD_MESSAGES):
            mallory.connection.send(bad)
            assert mallory.read("error")["text"], bad
            mallory.say(f"still here, {number}")
            assert mallory.read("message")["text"] == f"still here, {number}"
            assert ada.read("message")["text"] == f"still here, {number}"


def test_an_error_says_what_was_expected(chat):
    """The error names what was expected: JSON, or a text of so many characters."""
    with guest(chat, "lobby", "Mallory") as mallory:
        mallory.connection.send("{")
        assert "Expected JSON; got 1 characters" in mallory.read("error")["text"]
        mallory.say("x" * 1001)
        assert mallory.read("error")["text"] == 'Expected {"text": "1 to 1000 characters"}'


def test_the_longest_message(chat):
    """The limit is one of characters: 1,000 emoji pass, in the longest encoding that there is."""
    with guest(chat, "lobby", "Ada") as ada:
        ada.connection.send(json.dumps({"text": "🍵" * 1000}, ensure_ascii=True))
        assert ada.read("message")["text"] == "🍵" * 1000


def test_a_huge_message_closes_its_sender_only(chat):
    """A message above the limit in bytes ends its connection with 1009, and no other one."""
    with guest(chat, "lobby", "Ada") as ada, guest(chat, "lobby", "Mallory") as mallory:
        ada.read("join")
        mallory.connection.send("x" * 100_000)
        with pytest.raises(ConnectionClosed) as closed:
            mallory.connection.recv(timeout=TIMEOUT)
        assert closed.value.rcvd.code == 1009
        assert ada.read("leave")["who"] == mallory.me
        ada.say("quiet again")
        assert ada.read("message")["text"] == "quiet again"


def test_names(chat):
    """A name is cut to its length and has only characters that can be seen; some name there is."""
    for asked, given in {
        "": "Guest",
        "  ": "Guest",
        "x" * 100: "x" * 24,
        "A\u202edA\n": "AdA",
        "<b>": "<b>",
    }.items():
        with guest(chat, "lobby", asked) as somebody:
            assert somebody.me["name"] == given


def test_html_stays_text(chat):
    """Markup goes through as it is, and a room's name is escaped in the page."""
    markup = "<img src=x onerror=alert(1)> & <b>"
    with guest(chat, "lobby", "Ada") as ada:
        ada.say(markup)
        assert ada.read("message")["text"] == markup
    page = fetch(chat, "/room/" + quote("<img src=x onerror=1>\"'"))
    assert "<img src=x" not in page
    assert "&lt;img src=x onerror=1&gt;&#34;&#39;" in page


def test_index(chat):
    """The first page links to the rooms, those that guests opened too, and counts who is there."""
    assert "1 here" not in fetch(chat, "/")
    with guest(chat, "book club", "Ada"):
        page = fetch(chat, "/")
        assert '"/room/lobby"' in page
        assert '"/room/book%20club"' in page
        assert page.count("1 here") == 1
    wait_until(lambda: "book club" not in fetch(chat, "/"), TIMEOUT, "the room's end")


def test_nothing_is_loaded_from_elsewhere(chat):
    """Page, style and script name no other host."""
    for path in ("/", "/room/lobby", "/static/chat.css", "/static/chat.js", "/static/icon.svg"):
        text = fetch(chat, path).replace("http://www.w3.org/2000/svg", "")
        assert "//www" not in text
        assert "http:" not in text
        assert "https:" not in text


def test_app_run(start_server, implementation, monkeypatch, tmp_path):
    """``python app.py`` serves the same on Flask's development server, and ends by Ctrl-C."""
    if implementation == "wsproto":
        # uvicorn takes the websockets library wherever it finds it, and wsproto otherwise.
        (tmp_path / "websockets.py").write_text("raise ImportError")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    port = free_port()
    monkeypatch.setenv("PORT", str(port))
    server = start_server("", [sys.executable, str(CHAT / "app.py")], port=port)
    assert "Pick a room" in fetch(server, "/")
    with guest(server, "lobby", "Ada") as ada, guest(server, "lobby", "Grace") as grace:
        assert ada.read("join")["who"] == grace.me
        grace.say("Good morning")
        assert ada.read("message") == grace.read("message")
        grace.connection.send("{")
        assert "JSON" in grace.read("error")["text"]
        grace.connection.close()
        assert ada.read("leave")["who"] == grace.me
        code, _ = server.stop(signal.SIGINT)
    assert code == 0
    assert "Traceback" not in server.log()


# -- with browsers -------------------------------------------------------------------------------


def join(browser: Browser, server: ServerProcess, room: str, name: str, **size: int) -> Page:
    """Open a room and go in under a name, with the keyboard alone."""
    page = browser.open(server.url(f"/room/{room}"), **size)
    page.wait_for("document.activeElement.id === 'name'", PAGE_TIMEOUT)
    page.run("document.activeElement.select()")
    page.type(name)
    page.press("Enter", "\r")
    page.wait_for("document.getElementById('status').textContent === 'Connected'", PAGE_TIMEOUT)
    return page


def say(page: Page, text: str) -> None:
    """Write a message where the page has put the focus."""
    assert page.run("document.activeElement.id") == "text"
    page.type(text)
    page.press("Enter", "\r")


def wait_for_texts(page: Page, texts: list[str]) -> None:
    """Wait until these are the messages that the page shows."""
    shown = "JSON.stringify([...document.querySelectorAll('.message .text')].map(e => e.innerText))"
    page.wait_for(f"{shown} === JSON.stringify({json.dumps(texts)})", PAGE_TIMEOUT)


@pytest.mark.browser
def test_two_pages_see_each_other(browser, chat):
    """Two pages in one room see each other's names and messages, and markup as text."""
    ada = join(browser, chat, "lobby", "Ada Lovelace")
    grace = join(browser, chat, "lobby", "Grace", width=390, height=780)
    people = "[...document.querySelectorAll('#people .name')].map(e => e.textContent).join()"
    ada.wait_for(f"{people} === 'Ada Lovelace,Grace'", PAGE_TIMEOUT)
    grace.wait_for(f"{people} === 'Grace,Ada Lovelace'", PAGE_TIMEOUT)
    ada.wait_for("document.querySelector('.notice').textContent.startsWith('Grace joined')")
    markup = "<img src=x onerror=\"document.title='taken'\"> & <b>"
    said = ["Morning", markup, "Tea?"]
    for number, text in enumerate(said, 1):
        say(grace if number % 2 else ada, text)
        for page in (ada, grace):
            wait_for_texts(page, said[:number])
    names = "[...document.querySelectorAll('.message strong')].map(e => e.textContent).join()"
    assert ada.run(names) == "Grace,You,Grace"
    assert grace.run(names) == "You,Ada Lovelace,You"
    for page in (ada, grace):
        assert page.run("document.querySelectorAll('.log img, .log b').length") == 0
        assert page.run("document.title") == "#lobby · Chat"
        assert page.errors == []


@pytest.mark.browser
def test_how_it_looks(browser, other_browser, chat, photograph):
    """A conversation between two browsers fits any window, in light and in dark."""
    ada = join(browser, chat, "lobby", "Ada Lovelace")
    grace = join(other_browser, chat, "lobby", "Grace Hopper")
    said = ["Is anybody here?", "I am. Tea?", "With pleasure.", "In the kitchen, then."]
    for number, text in enumerate(said, 1):
        say(grace if number % 2 else ada, text)
        for page in (ada, grace):
            wait_for_texts(page, said[:number])
    photograph(ada, "chat")
    assert ada.errors == grace.errors == []


@pytest.mark.browser
def test_a_page_that_is_left_leaves_the_room(browser, chat):
    """Who goes to another page has left, although browsers keep pages; who goes back is back."""
    page = join(browser, chat, "lobby", "Grace")
    with guest(chat, "lobby", "Ada") as ada:
        page.go("about:blank")
        assert ada.read("leave")["who"]["name"] == "Grace"
        page.back()
        assert ada.read("join")["who"]["name"] == "Grace"
        ada.say("Good to see you again")
        wait_for_texts(page, ["Good to see you again"])
        assert page.errors == []


@pytest.mark.browser
def test_a_page_comes_back_after_the_server_did(browser, start_chat):
    """A page that lost its server says so, keeps what is being written, and connects again."""
    server = start_chat()
    page = join(browser, server, "lobby", "Ada")
    page.type("written before")
    server.kill()
    page.wait_for("document.getElementById('status').textContent === 'Offline'", PAGE_TIMEOUT)
    assert page.run("document.getElementById('send').disabled")
    page.press("Enter", "\r")
    start_chat(server.port)
    page.wait_for("document.getElementById('status').textContent === 'Connected'", PAGE_TIMEOUT)
    page.wait_for("document.querySelector('.notice').textContent.startsWith('You are back')")
    page.press("Enter", "\r")
    wait_for_texts(page, ["written before"])


@pytest.mark.browser
def test_opening_a_room(browser, chat):
    """The first page opens a room under the name that was typed, made fit for an address."""
    page = browser.open(chat.url())
    page.run("document.getElementById('open-name').focus()")
    page.type("Book Club/2 ")
    page.press("Enter", "\r")
    page.wait_for("location.pathname === '/room/book-club-2'", PAGE_TIMEOUT)
    page.wait_for("document.readyState === 'complete'", PAGE_TIMEOUT)
    assert page.errors == []
