"""examples/dashboard: a thread's numbers, on every page, with those of the last two minutes."""

from __future__ import annotations

import json

import pytest
from websockets.sync.client import connect

#: Seconds for one message to come; there are two a second.
TIMEOUT = 10.0
#: Seconds for what a page shows; its pause before a new connection may double a few times.
PAGE_TIMEOUT = 30.0
NAMES = {"time", "cpu", "handshakes", "deliveries", "late", "threads", "connections"}


def test_history_comes_first_and_once(start_example):
    """Who comes later gets what was before, and then each sample once."""
    server = start_example("dashboard")
    with connect(server.ws_url("/ws"), proxy=None) as first:
        seen = json.loads(first.recv(timeout=TIMEOUT))
        assert isinstance(seen, list)
        seen += [json.loads(first.recv(timeout=TIMEOUT)) for _ in range(3)]
        assert all(set(sample) == NAMES for sample in seen)
        with connect(server.ws_url("/ws"), proxy=None) as second:
            received = json.loads(second.recv(timeout=TIMEOUT))
            while not isinstance(received, list):  # published between its subscribe and its list
                received = json.loads(second.recv(timeout=TIMEOUT))
            assert received[: len(seen)] == seen
            received += [json.loads(second.recv(timeout=TIMEOUT)) for _ in range(2)]
            while len(seen) < len(received):
                seen.append(json.loads(first.recv(timeout=TIMEOUT)))
            assert received == seen
            assert received[-1]["connections"] == 2
            assert received[-1]["threads"] >= 3
            assert all(sample["cpu"] >= 0 and sample["time"] == 1 for sample in received)
    code, _ = server.stop()
    assert code == 0
    assert "Traceback" not in server.log()


@pytest.mark.browser
def test_in_two_browsers(start_example, browser, other_browser, photograph):
    """Both draw the same numbers; connections that one opens are seen by the other."""
    server = start_example("dashboard")
    here, there = browser.open(server.url()), other_browser.open(server.url())
    connections = "Number(document.querySelector('[data-name=connections] b').textContent)"
    for page in (here, there):
        page.wait_for(f"{connections} === 2", PAGE_TIMEOUT)
    here.run("document.querySelector('#more').click()")
    for page in (here, there):
        page.wait_for(f"{connections} === 22", PAGE_TIMEOUT)
        page.wait_for("samples.length >= 20", PAGE_TIMEOUT)
        assert page.run("document.querySelectorAll('.line[d^=M]').length") == 6
    photograph(here, "dashboard")
    here.run("document.querySelector('#fewer').click()")
    there.wait_for(f"{connections} === 2", PAGE_TIMEOUT)
    assert here.errors == there.errors == []


@pytest.mark.browser
def test_it_comes_back(start_example, browser):
    """A page that has lost its server says so, and draws the new one's numbers."""
    server = start_example("dashboard")
    page = browser.open(server.url())
    page.wait_for("samples.length >= 4", PAGE_TIMEOUT)
    server.kill()
    page.wait_for("document.querySelector('output').dataset.state === 'lost'", PAGE_TIMEOUT)
    start_example("dashboard", server.port)
    page.wait_for("document.querySelector('output').dataset.state === 'live'", PAGE_TIMEOUT)
    page.wait_for("samples.length >= 2", PAGE_TIMEOUT)


@pytest.mark.browser
def test_the_page_has_a_bound(start_example, browser):
    """It opens 200 connections at most, and closes all of them."""
    server = start_example("dashboard")
    page = browser.open(server.url())
    page.wait_for("samples.length >= 1", PAGE_TIMEOUT)
    page.run("for (let n = 0; n < 30 && !more.disabled; n++) more.click()")
    assert page.run("others.size") == 200
    page.wait_for("[...others].every((ws) => ws.readyState === 1)", PAGE_TIMEOUT)
    page.run("fewer.click()")
    page.wait_for("others.size === 0 && fewer.disabled && !more.disabled", PAGE_TIMEOUT)
    assert page.errors == []
