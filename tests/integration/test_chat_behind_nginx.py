"""The chat as it is deployed: browsers, nginx with our file, a unix socket, `serve`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .browser import Browser
from .conftest import ServerProcess, launch
from .test_chat import PAGE_TIMEOUT, join, say, wait_for_texts
from .test_deploy import CHAT, NAME, SCRIPTS, Nginx, Place, a_place, accepts, wait_until_it_is

#: The site's name is this machine's, and its certificate is nobody's.
FLAGS = [f"--host-resolver-rules=MAP {NAME} 127.0.0.1", "--ignore-certificate-errors"]


@pytest.fixture
def place() -> Iterator[Place]:
    with a_place() as place:
        yield place


@pytest.fixture
def visitor(tmp_path) -> Iterator[Browser]:
    with launch(tmp_path, *FLAGS) as browser:
        yield browser


def serve_chat(place: Place) -> ServerProcess:
    path = place.path / "app.sock"
    command = [f"{SCRIPTS}/flask", "--app", str(CHAT / "app"), "websockets", "serve"]
    server = place.run([*command, "--host", f"unix://{path}"], place.path)
    wait_until_it_is(lambda: accepts(path), server)
    return server


class Site:
    """What a browser is sent to."""

    def __init__(self, proxy: Nginx) -> None:
        self._proxy = proxy

    def url(self, path: str = "/") -> str:
        return self._proxy.origin + path


@pytest.mark.browser
def test_the_chat_behind_nginx(place, visitor):
    """Two pages talk through nginx, lose the server, and talk again when there is a new one."""
    site = Site(Nginx(place))
    server = serve_chat(place)
    ada, grace = (join(visitor, site, "lobby", name) for name in ("Ada", "Grace"))
    say(ada, "over TLS")
    for page in (ada, grace):
        wait_for_texts(page, ["over TLS"])
        assert page.run("location.protocol") == "https:"
    server.kill()
    connected = "document.getElementById('status').textContent === 'Connected'"
    for page in (ada, grace):
        page.wait_for(f"!({connected})", PAGE_TIMEOUT)
    serve_chat(place)
    for page in (ada, grace):
        page.wait_for(connected, PAGE_TIMEOUT)
    say(grace, "and back")
    shown = "[...document.querySelectorAll('.message .text')].at(-1)?.innerText"
    for page in (ada, grace):
        page.wait_for(f"{shown} === 'and back'", PAGE_TIMEOUT)
