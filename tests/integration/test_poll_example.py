"""examples/poll: votes come by HTTP, with JavaScript or without, and every page shows them."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from threading import Event, Thread
from types import ModuleType
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest
from websockets.sync.client import connect

from flask_websockets import NotRunning
from flask_websockets.testing import ClientConnection

from .browser import Browser, Page
from .conftest import ServerProcess, launch

POLL = Path(__file__).parents[2] / "examples" / "poll"
#: Seconds for one message to come.
TIMEOUT = 10.0
#: Seconds for what a page shows; its pause before a new connection may double a few times.
PAGE_TIMEOUT = 30.0
#: What a page has drawn: each choice's votes, the width of its bar in percent, and the total.
SHOWN = """JSON.stringify([
  ...[...document.querySelectorAll("button")].map((button) => [
    button.value,
    Number(button.querySelector("b").textContent),
    Math.round(100 * parseFloat(getComputedStyle(button, "::before").width) / button.clientWidth),
  ]),
  Number(document.querySelector("#total").textContent),
])"""


@pytest.fixture
def poll(monkeypatch) -> Iterator[ModuleType]:
    """The example, imported anew."""
    spec = importlib.util.spec_from_file_location("poll_example", POLL / "app.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "poll_example", module)  # Flask looks there for the page
    spec.loader.exec_module(module)
    module.app.testing = True
    yield module
    assert module.pages == set(), "a page that has left is still counted"


def receive_until(ws: ClientConnection, votes: dict[str, int], watching: int) -> None:
    """Receive until a message says this; each wait has the connection's timeout."""
    while ws.receive_json() != {"votes": votes, "watching": watching}:
        pass


# -- the server ----------------------------------------------------------------------------------


def test_sixty_lines():
    """The example has at most 60 lines of Python, blank ones included."""
    assert len((POLL / "app.py").read_text().splitlines()) <= 60


def test_a_vote_reaches_every_page(poll):
    """A POST sends the browser back to the page, and the votes to all who watch."""
    client = poll.websockets.test_client()
    with (
        client.websocket_connect("/ws", timeout=TIMEOUT) as one,
        client.websocket_connect("/ws", timeout=TIMEOUT) as other,
    ):
        with client.post("/vote", data={"choice": "Tea"}) as answer:
            assert answer.status_code in (302, 303)
            assert answer.location == "/"
        for ws in (one, other):
            receive_until(ws, {"Tea": 1}, watching=2)


def test_who_comes_late_gets_all_votes(poll):
    """The first message says what this session voted, the next all votes."""
    client = poll.websockets.test_client()
    for choice in ("Tea", "Water"):
        poll.websockets.test_client().post("/vote", data={"choice": choice})
    client.post("/vote", data={"choice": "Tea"})
    with client.websocket_connect("/ws", timeout=TIMEOUT) as ws:
        assert ws.receive_json() == {"mine": "Tea"}
        assert ws.receive_json() == {"votes": {"Tea": 2, "Water": 1}, "watching": 1}
    with client.get("/") as page:
        assert 'value="Tea" style="--count: 2"' in page.text
        assert "--total: 3" in page.text


def test_one_vote_for_each_session(poll):
    """Who votes again moves their vote; the session of a handshake is the same as of a POST."""
    client = poll.websockets.test_client()
    with client.websocket_connect("/ws", timeout=TIMEOUT) as ws:
        assert ws.receive_json() == {"mine": None}
        for choice in ("Tea", "Tea", "Water"):
            client.post("/vote", data={"choice": choice})
        receive_until(ws, {"Water": 1}, watching=1)
    assert len(poll.ballots) == 1


def test_who_leaves_is_not_counted(poll):
    """The others are told when a page comes and when it goes."""
    client = poll.websockets.test_client()
    with client.websocket_connect("/ws", timeout=TIMEOUT) as stays:
        with client.websocket_connect("/ws", timeout=TIMEOUT):
            receive_until(stays, {}, watching=2)
        receive_until(stays, {}, watching=1)


def test_a_view_may_end_with_its_server(poll, monkeypatch):
    """A view that ends because the server has stopped does not fail when it says so."""

    def stopped(*args: object) -> None:
        raise NotRunning("The server has stopped.")

    client = poll.websockets.test_client()
    with client.websocket_connect("/ws", timeout=TIMEOUT) as ws:
        receive_until(ws, {}, watching=1)
        monkeypatch.setattr(poll.websockets, "publish_json", stopped)
    assert poll.pages == set()


@pytest.mark.parametrize("data", [{}, {"choice": ""}, {"choice": "<b>Soup"}, {"choices": "Tea"}])
def test_other_choices_are_refused(poll, data):
    """What is no choice is answered 400, counted for nothing, and sent to nobody."""
    client = poll.websockets.test_client()
    with client.websocket_connect("/ws", timeout=TIMEOUT) as ws:
        receive_until(ws, {}, watching=1)
        poll.app.testing = False  # with it, what is missing in a form raises in the test
        with client.post("/vote", data=data) as answer:
            assert answer.status_code == 400
            assert "Soup" not in answer.text
        client.post("/vote", data={"choice": "Tea"})
        assert ws.receive_json() == {"votes": {"Tea": 1}, "watching": 1}


def test_the_last_message_is_the_newest(poll, monkeypatch):
    """Who has counted publishes before anybody else counts, however long it takes."""
    first, overtaken = Event(), Event()
    published = []

    def publish_json(message: dict[str, Any], channel: str) -> None:
        if not first.is_set():
            first.set()
            overtaken.wait(0.3)  # in which the other would come by if nothing held it up
        published.append(message["votes"])
        overtaken.set()

    def vote(choice: str) -> Thread:
        client = poll.websockets.test_client()
        thread = Thread(target=client.post, args=["/vote"], kwargs={"data": {"choice": choice}})
        thread.start()
        return thread

    monkeypatch.setattr(poll.websockets, "publish_json", publish_json)
    threads = [vote("Tea")]
    assert first.wait(TIMEOUT)
    threads.append(vote("Water"))
    for thread in threads:
        thread.join(TIMEOUT)
        assert not thread.is_alive()
    assert published == [{"Tea": 1}, {"Tea": 1, "Water": 1}]


def test_many_vote_at_once(poll):
    """However many vote while pages come, every page gets to know of every vote."""

    def vote(number: int) -> None:
        client = poll.websockets.test_client()
        client.post("/vote", data={"choice": poll.CHOICES[number % 4]})

    threads = [Thread(target=vote, args=(number,)) for number in range(40)]
    client = poll.websockets.test_client()
    with ExitStack() as stack:
        pages = []
        for number, thread in enumerate(threads):
            thread.start()
            if number % 10 == 0:
                connection = client.websocket_connect("/ws", timeout=TIMEOUT)
                pages.append(stack.enter_context(connection))
        for thread in threads:
            thread.join(TIMEOUT)
            assert not thread.is_alive()
        for ws in pages:
            receive_until(ws, dict.fromkeys(poll.CHOICES, 10), watching=4)


# -- with browsers -------------------------------------------------------------------------------


def cast(server: ServerProcess, choice: str) -> None:
    """Vote as somebody new."""
    data = urlencode({"choice": choice}).encode()
    with urlopen(server.url("/vote"), data, timeout=TIMEOUT) as answer:
        assert answer.status == 200


def wait_for_votes(page: Page, *votes: int) -> None:
    """Wait until the page shows these votes, and bars as long as they are."""
    names = ("Coffee", "Tea", "Hot chocolate", "Water")
    total = sum(votes)
    rows: list[Any] = [
        [name, count, round(100 * count / (total or 1))]
        for name, count in zip(names, votes, strict=True)
    ]
    expected = json.dumps(json.dumps([*rows, total], separators=(",", ":")))
    page.wait_for(f"{SHOWN} === {expected}", PAGE_TIMEOUT)


def wait_for_state(page: Page, state: str) -> None:
    page.wait_for(f"document.querySelector('output').dataset.state === '{state}'", PAGE_TIMEOUT)


def wait_for_watching(page: Page, number: int) -> None:
    page.wait_for(f"document.querySelector('#watching').textContent === '{number}'", PAGE_TIMEOUT)


def vote(page: Page, choice: str) -> None:
    """Vote with the keyboard."""
    page.run(f"document.querySelector('button[value={json.dumps(choice)}]').focus()")
    page.press("Enter", "\r")


def marked(page: Page) -> list[str]:
    """The choices that the page shows as one's own."""
    pressed = "[...document.querySelectorAll('button[aria-pressed=true]')]"
    return page.run(f"{pressed}.map((button) => button.value)")


def wait_for_mark(page: Page, choice: str) -> None:
    page.wait_for(
        "[...document.querySelectorAll('button[aria-pressed=true]')]"
        f".map((button) => button.value).join() === {json.dumps(choice)}",
        PAGE_TIMEOUT,
    )


@pytest.mark.browser
def test_two_browsers(browser, other_browser, start_example):
    """A vote in one browser moves the bars in the other, and one's own is marked."""
    server = start_example("poll")
    ada, grace = browser.open(server.url()), other_browser.open(server.url())
    for page in (ada, grace):
        wait_for_state(page, "live")
        wait_for_watching(page, 2)
        wait_for_votes(page, 0, 0, 0, 0)
    vote(ada, "Tea")
    wait_for_votes(grace, 0, 1, 0, 0)
    vote(grace, "Hot chocolate")
    wait_for_votes(ada, 0, 1, 1, 0)
    wait_for_mark(ada, "Tea")
    vote(ada, "Hot chocolate")
    wait_for_votes(grace, 0, 0, 2, 0)
    wait_for_mark(ada, "Hot chocolate")
    grace.go(server.url())  # loaded again, it knows the votes and its own
    wait_for_votes(grace, 0, 0, 2, 0)
    wait_for_mark(grace, "Hot chocolate")
    for page in (ada, grace):
        assert page.run("location.pathname") == "/"
        assert page.errors == []


@pytest.mark.browser
def test_the_page_is_worth_looking_at(browser, start_example, photograph):
    """With votes in it, nothing overflows on a desktop or a phone, in light or in dark."""
    server = start_example("poll")
    voters = {"Coffee": 11, "Tea": 7, "Hot chocolate": 4, "Water": 1}
    for choice, number in voters.items():
        for _ in range(number):
            cast(server, choice)
    page = browser.open(server.url())
    with ExitStack() as others:
        for _ in range(16):
            # They read nothing, and a goodbye is read after all that came before it.
            address = server.ws_url("/ws")
            others.enter_context(connect(address, proxy=None, max_queue=None))
        wait_for_watching(page, 17)
        vote(page, "Tea")
        wait_for_votes(page, 11, 8, 4, 1)
        wait_for_mark(page, "Tea")
        page.run("document.activeElement.blur()")
        photograph(page, "poll")
        page.resize(320, 568)
        assert page.run("document.documentElement.scrollWidth <= innerWidth")
    assert page.errors == []


@pytest.mark.browser
def test_a_page_comes_back_after_the_server_did(browser, start_example):
    """A page that lost its server says so, connects again, and shows the new server's votes."""
    server = start_example("poll")
    page = browser.open(server.url())
    wait_for_state(page, "live")
    vote(page, "Water")
    wait_for_votes(page, 0, 0, 0, 1)
    wait_for_mark(page, "Water")
    server.kill()
    wait_for_state(page, "lost")
    vote(page, "Tea")
    wait_for_votes(page, 0, 0, 0, 1)  # it keeps what it knew
    start_example("poll", server.port)
    wait_for_state(page, "live")
    wait_for_votes(page, 0, 0, 0, 0)
    assert marked(page) == []
    vote(page, "Tea")  # with the session that the new handshake began
    wait_for_votes(page, 0, 1, 0, 0)
    vote(page, "Coffee")
    wait_for_votes(page, 1, 0, 0, 0)


@pytest.mark.browser
def test_without_javascript(tmp_path, start_example):
    """The form is a form: the browser posts it, and the page that comes back has the vote."""
    server = start_example("poll")
    with launch(tmp_path, "--blink-settings=scriptEnabled=false") as browser:
        page = visit_without_script(browser, server)
        vote(page, "Tea")
        wait_for_votes(page, 0, 1, 0, 0)
        assert page.run("document.querySelector('output').checkVisibility()") is False
        assert page.errors == []


def visit_without_script(browser: Browser, server: ServerProcess) -> Page:
    page = browser.open(server.url())
    wait_for_votes(page, 0, 0, 0, 0)
    assert page.run("document.querySelector('output').textContent") == "", "its script has run"
    return page
