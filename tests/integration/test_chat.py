"""The main job: examples/chat, through real servers, with real clients and real browsers."""

from __future__ import annotations

import itertools
import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode
from urllib.request import urlopen

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from .browser import Browser, Page
from .conftest import IMPLEMENTATIONS, ServerProcess
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
        welcome = self.receive()
        while welcome["type"] != "welcome":  # what came before is in it, as for the page
            welcome = self.receive()
        self.me = welcome["who"]
        self.said = welcome["said"]
        came = self.read("people")
        assert came["who"] == self.me
        self.people = came["people"]

    def receive(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(self.connection.recv(timeout=TIMEOUT))
        return message

    def read(self, kind: str) -> dict[str, Any]:
        """The next message, which must be of this kind."""
        message = self.receive()
        assert message["type"] == kind, message
        return message

    def say(self, text: str) -> None:
        self.connection.send(text)


def named(server: ServerProcess, room: str, name: str) -> str:
    """The cookie of a session with this name, as the page's form gets it."""
    data = urlencode({"name": name}).encode()
    with urlopen(server.url(f"/room/{quote(room)}"), data, timeout=TIMEOUT) as response:
        cookie: str = response.headers["Set-Cookie"].partition(";")[0]
    return cookie


@contextmanager
def guest(server: ServerProcess, room: str, name: str = "", cookie: str = "") -> Iterator[Guest]:
    headers = {"Cookie": cookie or named(server, room, name)} if name or cookie else {}
    url = server.ws_url(f"/ws/{quote(room)}")
    with connect(url, additional_headers=headers, proxy=None) as connection:
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
        assert ada.read("people")["who"] == grace.me
        for speaker, text in ((ada, "Morning"), (grace, "Good morning"), (ada, "Tea? 🍵")):
            speaker.say(text)
            seen = [somebody.read("message") for somebody in (ada, grace)]
            assert seen[0] == seen[1]
            assert seen[0]["who"] == speaker.me
            assert seen[0]["text"] == text
            assert abs(seen[0]["time"] - time.time()) < 60
        assert (ada.me["name"], grace.me["name"]) == ("Ada", "Grace")


def test_rooms_are_separate(chat):
    """What is said in one room is not heard in another, nor kept for it."""
    with guest(chat, "lobby", "Ada") as ada, guest(chat, "kitchen", "Grace") as grace:
        ada.say("for the lobby")
        assert ada.read("message")["text"] == "for the lobby"
        grace.say("for the kitchen")
        # Had the lobby's message come here, then before this one.
        assert grace.read("message")["text"] == "for the kitchen"
        ada.say("once more")
        assert ada.read("message")["text"] == "once more"
    with guest(chat, "kitchen") as late:
        assert [message["text"] for message in late.said] == ["for the kitchen"]


def test_joins_and_leaves(chat):
    """Who joins and who leaves is announced, with everybody who is there now."""
    with guest(chat, "lobby", "Ada") as ada:
        assert ada.people == [ada.me]
        with guest(chat, "lobby", "Grace") as grace:
            assert grace.people == [ada.me, grace.me]
            joined = ada.read("people")
            assert (joined["who"], joined["people"]) == (grace.me, grace.people)
        left = ada.read("people")
        assert (left["who"], left["people"]) == (grace.me, [ada.me])
        with guest(chat, "lobby", "Grace"):
            assert ada.read("people")["who"]["id"] != grace.me["id"]


def test_a_guest_who_vanishes_has_left(chat):
    """A connection that ends without a close frame is a leave as well."""
    with guest(chat, "lobby", "Ada") as ada, guest(chat, "lobby", "Grace") as grace:
        ada.read("people")
        grace.connection.socket.shutdown(2)
        assert ada.read("people")["people"] == [ada.me]


def test_who_comes_misses_nothing(chat):
    """Whoever joins while others talk gets each message once: kept, or published since."""
    enough = threading.Event()

    def talk(ada: Guest) -> None:
        for number in itertools.count():
            if enough.is_set():
                break
            ada.say(str(number))
            while ada.receive()["text"] != str(number):
                pass  # somebody came or left

    def listen() -> list[int]:
        with guest(chat, "lobby") as late:
            heard = [message["text"] for message in late.said]
            while len(heard) < len(late.said) + 3:
                message = late.receive()
                heard += [message["text"]] if message["type"] == "message" else []
        return [int(text) for text in heard]

    with guest(chat, "lobby", "Ada") as ada, ThreadPoolExecutor(1) as pool:
        talking = pool.submit(talk, ada)
        try:
            for _ in range(20):
                heard = listen()
                assert heard == list(range(heard[0], heard[-1] + 1))
        finally:
            enough.set()
        talking.result(TIMEOUT)
    assert heard[-1] >= 20


def test_the_last_messages_are_kept(chat):
    """Of all rooms together the last 200; somebody who comes back is known by the session."""
    cookie = named(chat, "lobby", "Ada")
    with guest(chat, "lobby", cookie=cookie) as ada:
        for number in range(210):
            ada.say(str(number))
            ada.read("message")
    with guest(chat, "lobby") as late:
        assert [message["text"] for message in late.said] == [str(n) for n in range(10, 210)]
        assert late.me["name"] == "Guest"


def test_a_session_is_one_person(chat):
    """Two tabs have one id, which their cookie keeps, and a name that is read in the handshake."""
    cookie = named(chat, "lobby", "Ada")
    with connect(
        chat.ws_url("/ws/lobby"), additional_headers={"Cookie": cookie}, proxy=None
    ) as connection:
        cookie = connection.response.headers["Set-Cookie"].partition(";")[0]
        ada = Guest(connection)
        with guest(chat, "lobby", cookie=cookie) as other_tab:
            assert other_tab.me == ada.me


def test_typing(chat):
    """An empty text says to everybody that its sender is typing, and is not kept."""
    with guest(chat, "lobby", "Ada") as ada, guest(chat, "lobby", "Grace") as grace:
        ada.read("people")
        grace.say("")
        for somebody in (ada, grace):
            assert somebody.read("typing")["who"] == grace.me
    with guest(chat, "lobby") as late:
        assert late.said == []


#: What is no message: an empty one, one that is too long, bytes, and such as are no text at all.
BAD_MESSAGES: tuple[str | bytes, ...] = (" \n ", "x" * 1001, b"bytes", b"\xff\xfe", b"")


def test_bad_messages(chat):
    """What is no message gets its sender, and nobody else, an error; the connection lives."""
    with guest(chat, "lobby", "Ada") as ada, guest(chat, "lobby", "Mallory") as mallory:
        ada.read("people")
        for number, bad in enumerate(BAD_MESSAGES):
            mallory.connection.send(bad)
            assert mallory.read("error")["text"] == "Write 1 to 1000 characters", bad
            mallory.say(f"still here, {number}")
            assert mallory.read("message")["text"] == f"still here, {number}"
            assert ada.read("message")["text"] == f"still here, {number}"


def test_the_longest_message(chat):
    """The limit is one of characters: 1,000 emoji pass."""
    with guest(chat, "lobby", "Ada") as ada:
        ada.say("🍵" * 1000)
        assert ada.read("message")["text"] == "🍵" * 1000


def test_a_huge_message_closes_its_sender_only(chat):
    """A message above the limit in bytes ends its connection with 1009, and no other one."""
    with guest(chat, "lobby", "Ada") as ada, guest(chat, "lobby", "Mallory") as mallory:
        ada.read("people")
        with suppress(ConnectionClosed):
            mallory.connection.send("x" * 17_000_000)
        with pytest.raises(ConnectionClosed) as closed:
            mallory.connection.recv(timeout=TIMEOUT)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1009
        assert ada.read("people")["people"] == [ada.me]
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


def test_flask_run(start_server, implementation, monkeypatch, tmp_path):
    """``flask run`` serves the same on Flask's development server, and ends by Ctrl-C."""
    if implementation == "wsproto":
        # uvicorn takes the websockets library wherever it finds it, and wsproto otherwise.
        (tmp_path / "websockets.py").write_text("raise ImportError")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    command = [sys.executable, "-m", "flask", "--app", str(CHAT / "app"), "run", "--port", "{port}"]
    server = start_server("", command)
    assert "Pick a room" in fetch(server, "/")
    with guest(server, "lobby", "Ada") as ada, guest(server, "lobby", "Grace") as grace:
        assert ada.read("people")["who"] == grace.me
        grace.say("Good morning")
        assert ada.read("message") == grace.read("message")
        grace.say(" ")
        assert "characters" in grace.read("error")["text"]
        grace.connection.close()
        assert ada.read("people")["people"] == [ada.me]
        code, _ = server.stop(signal.SIGINT)
    assert code == 0
    assert "Traceback" not in server.log()


# -- with browsers -------------------------------------------------------------------------------


CONNECTED = "document.getElementById('status').textContent === 'Connected'"


def join(browser: Browser, server: ServerProcess, room: str, name: str, **size: int) -> Page:
    """Open a room and go in under a name, with the keyboard alone."""
    page = browser.open(server.url(f"/room/{room}"), **size)
    page.wait_for("document.activeElement.id === 'name'", PAGE_TIMEOUT)
    page.run("document.activeElement.select()")
    page.type(name)
    page.press("Enter", "\r")
    page.wait_for(CONNECTED, PAGE_TIMEOUT)
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


NAMES = "[...document.querySelectorAll('#people .name')].map(e => e.textContent).join()"
NOTICE = "[...document.querySelectorAll('.notice > span')].at(-1)?.textContent"
TYPING = "document.getElementById('typing').textContent"


@pytest.mark.browser
def test_two_pages_see_each_other(browser, other_browser, chat):
    """Two browsers in one room see each other's names, messages, typing; and markup as text."""
    ada = join(browser, chat, "lobby", "Ada Lovelace")
    grace = join(other_browser, chat, "lobby", "Grace", width=390, height=780)
    ada.wait_for(f"{NAMES} === 'Ada Lovelace,Grace'", PAGE_TIMEOUT)
    grace.wait_for(f"{NAMES} === 'Grace,Ada Lovelace'", PAGE_TIMEOUT)
    ada.wait_for(f"{NOTICE} === 'Grace joined'", PAGE_TIMEOUT)
    markup = "<img src=x onerror=\"document.title='taken'\"> & <b>"
    said = ["Morning", markup, "Tea?"]
    for number, text in enumerate(said, 1):
        speaker, listener = (grace, ada) if number % 2 else (ada, grace)
        speaker.type(text)
        listener.wait_for(f"{TYPING}.endsWith(' is typing')", PAGE_TIMEOUT)
        assert speaker.run(TYPING) == ""
        speaker.press("Enter", "\r")
        for page in (ada, grace):
            wait_for_texts(page, said[:number])
            page.wait_for(f"{TYPING} === ''", PAGE_TIMEOUT)
    names = "[...document.querySelectorAll('.message strong')].map(e => e.textContent).join()"
    assert ada.run(names) == "Grace,You,Grace"
    assert grace.run(names) == "You,Ada Lovelace,You"
    for page in (ada, grace):
        assert page.run("document.querySelectorAll('.log img, .log b').length") == 0
        assert page.run("document.title") == "#lobby · Chat"
        assert page.errors == []


@pytest.mark.browser
@pytest.mark.parametrize("implementation", ["sansio"])
def test_whoever_comes_later_reads_what_was_said(browser, other_browser, chat):
    """The page shows what was said before, and to those who reload it what they said themselves."""
    ada = join(browser, chat, "lobby", "Ada")
    for number, text in enumerate(said := ["one", "two", "three"], 1):
        say(ada, text)
        wait_for_texts(ada, said[:number])
    grace = join(other_browser, chat, "lobby", "Grace")
    wait_for_texts(grace, said)
    ada.go(chat.url("/room/lobby"))  # no name is asked for: the session has it
    ada.wait_for(CONNECTED, PAGE_TIMEOUT)
    wait_for_texts(ada, said)
    assert ada.run("document.querySelectorAll('.message.mine').length") == 3
    say(grace, "four")
    for page in (ada, grace):
        wait_for_texts(page, [*said, "four"])
        assert page.errors == []


@pytest.mark.browser
@pytest.mark.parametrize("implementation", ["sansio"])
def test_another_name(browser, other_browser, chat):
    """Who takes another name stays the same person, in the room and in a second tab."""
    ada = join(browser, chat, "lobby", "Ada")
    grace = join(other_browser, chat, "lobby", "Grace")
    tab = browser.open(chat.url("/room/lobby"), beside=ada)
    tab.wait_for(f"{NAMES} === 'Ada,Grace'", PAGE_TIMEOUT)
    tab.run("document.getElementById('rename').click()")
    tab.run("document.activeElement.select()")
    tab.type("Countess")
    tab.press("Enter", "\r")
    for page in (grace, ada, tab):
        page.wait_for(f"{NOTICE} === 'Ada is Countess now'", PAGE_TIMEOUT)
    grace.wait_for(f"{NAMES} === 'Grace,Countess'", PAGE_TIMEOUT)
    tab.wait_for(CONNECTED, PAGE_TIMEOUT)
    say(tab, "It is me")
    for page in (grace, ada, tab):
        wait_for_texts(page, ["It is me"])
        assert page.errors == []


@pytest.mark.browser
@pytest.mark.parametrize("implementation", ["sansio"])
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
@pytest.mark.parametrize("implementation", ["sansio"])
def test_a_page_that_is_left_leaves_the_room(browser, chat):
    """Who goes to another page has left, although browsers keep pages; who goes back is back."""
    page = join(browser, chat, "lobby", "Grace")
    with guest(chat, "lobby", "Ada") as ada:
        page.go("about:blank")
        assert ada.read("people")["people"] == [ada.me]
        page.back()
        assert [who["name"] for who in ada.read("people")["people"]] == ["Ada", "Grace"]
        ada.say("Good to see you again")
        wait_for_texts(page, ["Good to see you again"])
        assert page.errors == []


@pytest.mark.browser
@pytest.mark.parametrize(
    ("implementation", "key"), [("sansio", "a key that stays"), ("sansio", ""), ("wsproto", "")]
)
def test_a_page_comes_back_after_the_server_did(browser, start_chat, monkeypatch, key):
    """A page that lost its server says so, keeps all there is, and gives its name again."""
    if key:
        monkeypatch.setenv("FLASK_SECRET_KEY", key)
    server = start_chat()
    page = join(browser, server, "lobby", "Ada")
    say(page, "before")
    wait_for_texts(page, ["before"])
    page.type("written meanwhile")
    server.kill()
    page.wait_for("document.getElementById('status').textContent === 'Offline'", PAGE_TIMEOUT)
    assert page.run("document.getElementById('send').disabled")
    page.press("Enter", "\r")
    server = start_chat(server.port)
    with guest(server, "lobby", "Grace") as grace:
        grace.say("while you were away")
        page.wait_for(CONNECTED, PAGE_TIMEOUT)
        page.wait_for(f"{NAMES} === 'Ada,Grace'", PAGE_TIMEOUT)
        wait_for_texts(page, ["before", "while you were away"])
        page.press("Enter", "\r")
        wait_for_texts(page, ["before", "while you were away", "written meanwhile"])


@pytest.mark.browser
@pytest.mark.parametrize("implementation", ["sansio"])
def test_opening_a_room(browser, chat):
    """The first page opens a room under the name that was typed, made fit for an address."""
    page = browser.open(chat.url())
    page.run("document.getElementById('open-name').focus()")
    page.type("Book Club/2 ")
    page.press("Enter", "\r")
    page.wait_for("location.pathname === '/room/book-club-2'", PAGE_TIMEOUT)
    page.wait_for("document.readyState === 'complete'", PAGE_TIMEOUT)
    assert page.errors == []
