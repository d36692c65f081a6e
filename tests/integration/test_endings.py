"""The endings: however a connection ends, its view sees the same on every server."""

from __future__ import annotations

import re
import signal
import socket
from pathlib import Path

import pytest

from . import behaviour_drivers, servers_page
from .behaviour_drivers import OverTheWire, chosen, over_the_wire, started
from .known_servers import KNOWN, SERVER_OF, SERVERS
from .raw_client import RawClient
from .waiting import wait_until

driver = behaviour_drivers.driver
kind = behaviour_drivers.kind

APP = "endings_app:asgi_with_lifespan"

#: What a view is told of a client that left without a code; servers say one or the other.
NO_CODE = (1005, 1006)
#: Messages of 64 KiB, more than sockets and servers hold.
MANY = 120


def pytest_generate_tests(metafunc):
    names = [name for name in chosen(metafunc.config.getoption("--servers")) if name in SERVER_OF]
    for fixture in {"serving", "name"} & set(metafunc.fixturenames):
        metafunc.parametrize(fixture, names, indirect=fixture == "serving", scope="module")


@pytest.fixture(scope="module")
def serving(request, tmp_path_factory):
    with over_the_wire(request.param, tmp_path_factory.mktemp("endings"), APP) as serving:
        yield serving


@pytest.fixture
def server(serving):
    """What is known of the server."""
    return SERVER_OF[serving.name]


@pytest.fixture
def raw(driver):
    """Connect a client that does nothing by itself."""
    clients = []

    def connect(path, **options):
        client = RawClient(driver.port, f"{path}?key={driver.key}", **options)
        clients.append(client)
        assert client.status == 101
        return client

    yield connect
    for client in clients:
        client.close()


def waiting(driver):
    """Messages that the server has not taken from us."""
    return driver.get("/stats").json()["outbox_messages"]


class TestTheViewEnds:
    """A view returns or raises."""

    def test_returns(self, driver, kind):
        """The client gets 1000."""
        with driver.connect(f"/{kind}/nothing") as ws:
            assert ws.closed() == (1000, "")
        assert driver.warnings() == []

    def test_raises(self, driver, kind):
        """The client gets 1011, without a word of the error."""
        with driver.connect(f"/{kind}/raises/late/unhandled") as ws:
            assert ws.closed() == driver.at_client(1011, "")
        assert driver.after_teardown("teardown_request")[0]["error"] == "Deliberate"

    def test_raises_before_the_accept(self, driver, kind):
        """The handshake is answered with 500."""
        assert driver.rejected(f"/{kind}/raises/early/unhandled").status == driver.status(500)

    def test_returns_while_messages_wait(self, driver, server, kind, raw):
        """What was sent before arrives before the goodbye, however long the client takes."""
        client = raw(f"/{kind}/floods/{MANY}", receive_buffer=65_536)
        driver.note("returns")
        if server.backpressure:
            assert waiting(driver) > 0
        else:
            wait_until(lambda: waiting(driver) == 0, what="the server's memory to hold it all")
        assert [int(client.receive()) for _ in range(MANY)] == list(range(MANY))
        assert client.receive() == (1000).to_bytes(2, "big")


class TestTheViewCloses:
    """``ws.close``."""

    def test_code_and_reason(self, driver, kind):
        """The client gets the first close's; the view sees them too; a second does nothing."""
        with driver.connect(f"/{kind}/close?code=4321&reason=why") as ws:
            ws.receive_all()
            assert (ws.close_code, ws.close_reason) == driver.at_client(4321, "why")
        state = driver.note("closed")["state"]
        assert (state["close_code"], state["close_reason"]) == (4321, "why")
        assert driver.warnings() == []

    def test_everything_after_it(self, driver, kind):
        """Each verb raises ConnectionClosed with the view's own code, a receive as well."""
        with driver.connect(f"/{kind}/after-the-end/view") as ws:
            assert ws.closed() == driver.at_client(4001, "ours")
        outcomes = driver.note("tried")["outcomes"]
        for verb in ("send", "receive", "receive in time"):
            assert outcomes[verb] == ["ConnectionClosed", 4001, "ours"]


class TestTheClientCloses:
    """A close frame from the client."""

    @pytest.mark.parametrize("view", ["waits", "talks"])
    def test_code_and_reason(self, driver, kind, view):
        """The view gets what the server tells, at every receive and send that follows."""
        with driver.connect(f"/{kind}/{view}") as ws:
            ws.receive()
            ws.close(4321, "why")
        ends = driver.note("ended")["ends"]
        assert ends == [list(driver.at_view(4321, "why"))] * len(ends)
        assert driver.warnings() == []

    def test_without_a_code(self, driver, kind, raw):
        """The view gets 1005 or 1006."""
        client = raw(f"/{kind}/waits")
        client.receive()
        client.socket.sendall(bytes((0x88, 0x80, 0, 0, 0, 0)))
        client.receive()  # the server's answer; a client that is done hangs up
        client.close()
        ends = driver.note("ended")["ends"]
        assert ends[0][0] in NO_CODE
        assert ends == [ends[0]] * len(ends)


class TestTheClientVanishes:
    """No close frame from the client."""

    @pytest.mark.parametrize("how", ["reset", "gone", "no more to say"])
    @pytest.mark.parametrize("view", ["waits", "talks"])
    def test_vanishes(self, driver, kind, raw, view, how):
        """The view gets 1005 or 1006, at every receive and send that follows."""
        client = raw(f"/{kind}/{view}")
        client.receive()
        if how == "reset":
            client.reset()
        elif how == "gone":
            client.close()
        else:
            client.socket.shutdown(socket.SHUT_WR)
        ends = driver.note("ended")["ends"]
        assert ends[0][0] in NO_CODE
        assert ends == [ends[0]] * len(ends)
        assert driver.warnings() == []


class TestTheServerEnds:
    """SIGTERM."""

    def test_sigterm(self, name, tmp_path):
        """Clients get the server's code, views get ConnectionClosed, and the process is gone."""
        server = SERVER_OF[name]
        with started(name, APP, tmp_path) as process:
            driver = OverTheWire(process.port, server)
            with (
                driver.connect("/sync/until-the-end?key=sync") as first,
                driver.connect("/async/until-the-end?key=async") as second,
            ):
                assert (first.receive(), second.receive()) == ("ready", "ready")
                process.process.send_signal(signal.SIGTERM)
                codes = {first.closed()[0], second.closed()[0]}
            process.process.wait(server.sigterm_seconds)
        assert codes == {server.sigterm_code}
        if server.sigterm_views:
            ends = {path.stem: path.read_text() for path in tmp_path.glob("*.end")}
            assert ends.keys() == {"sync", "async"}
            assert "None" not in ends.values()


class TestFacts:
    """What the page of the servers says of each."""

    def test_lifespan(self, driver, server):
        """Whether the server says that it has started."""
        told = ["lifespan.startup"] if server.lifespan else []
        assert driver.get("/lifespan").json() == told

    def test_accept_headers(self, driver, server):
        """Whether headers of the 101 response reach the client."""
        with driver.connect("/sync/accept/mapping") as ws:
            assert (ws.headers.one("X-One") == "1") is server.accept_headers

    def test_compression(self, driver, server):
        """Whether it takes the offer to compress that every browser makes."""
        with driver.connect("/sync/waits") as ws:
            chosen = ws.headers.one("Sec-WebSocket-Extensions") or ""
        assert ("permessage-deflate" in chosen) is server.compression


class TestThePage:
    """docs/reference/servers."""

    def test_is_current(self):
        """What is known of the servers is what the reference says."""
        assert servers_page.PATH.read_text() == servers_page.page(), (
            "run python -m tests.integration.servers_page"
        )

    def test_versions(self):
        """The versions that it names are those that the servers' environment installs."""
        requirements = Path(__file__).parents[1].joinpath("servers.txt").read_text()
        pinned = dict(re.findall(r"^([a-z-]+)==(\S+)$", requirements, re.MULTILINE))
        assert pinned == {server.distribution: server.version for server in SERVERS}

    @pytest.mark.parametrize("skip", KNOWN, ids=lambda skip: skip.case)
    def test_known_skips(self, skip):
        """Each names drivers that there are, and the version that was tested."""
        servers = servers_page.servers_of(skip.drivers)
        assert {server.version for server in servers} == {skip.version}
