"""What is known of the servers: how each is started, what it can do, and what cannot pass on it.

The behaviour suite and the endings run on all of them with ``pytest --servers=all``, and
``docs/reference/servers.rst`` is made of this file: ``python -m tests.integration.servers_page``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Server:
    """One server, with one way to run it."""

    #: With the way to run it, if there are several.
    title: str
    #: How well it is looked after: a key of :data:`TIERS`.
    tier: str
    #: What is installed, and the version that all this was found with.
    distribution: str
    version: str
    #: What to type; ``{app}`` is the application.
    run: str
    #: What speaks WebSocket inside it.
    library: str
    #: The drivers of the suite, and how each differs: options of the command.
    variants: Mapping[str, Sequence[str]]
    #: What every driver adds: the port, and whatever keeps a test short.
    test_options: Sequence[str] = ()
    #: For the interpreter that runs the server; a warning that is its own is named here.
    interpreter_options: Sequence[str] = ()

    # -- what the tests rely on, and check ---------------------------------------------------------

    #: A response to the handshake reaches the client (``websocket.http.response``); else 403.
    denial_responses: bool = True
    #: Headers of the 101 response reach the client, a session's Set-Cookie among them.
    accept_headers: bool = True
    #: Every code of the application's close reaches the client; else 1000 and 3000 to 4999 do.
    close_code: bool = True
    #: The reason of the application's close reaches the client.
    close_reason: bool = True
    #: The code and the reason of the client's close reach the view; else 1006, and none.
    client_code: bool = True
    client_reason: bool = True
    #: It makes the application wait for a client that does not take what is sent.
    backpressure: bool = True
    #: It tells the application that it starts.
    lifespan: bool = True
    #: It takes the client's offer to compress (permessage-deflate) unless told otherwise.
    compression: bool = False
    #: What a client is told when the server gets SIGTERM; 1006 is no goodbye at all.
    sigterm_code: int = 1012
    #: A view is told then as well, before the process is gone.
    sigterm_views: bool = True
    #: Seconds in which the process is gone then, when clients answer and views return.
    sigterm_seconds: float = 5.0
    #: MiB that it lets a message have unless told otherwise, or means to.
    message_mib: int = 16
    #: Options that bound what a fault may cost, each set to a second.
    fault_options: Sequence[str] = ()
    #: Options that make it ping often, and the seconds in which a missing answer would be noticed.
    ping_options: Sequence[str] = ()
    ping_seconds: float = 1.3

    # -- for the page ------------------------------------------------------------------------------

    #: How often it pings, and how long it waits for the answer.
    pings: str = "never"
    #: What else to know, a sentence or two each.
    notes: Sequence[str] = ()

    def command(self, driver: str, app: str) -> list[str]:
        """What one of the drivers runs with ``python -m``, with ``{port}`` in it."""
        *words, last = self.run.split()
        assert last == "{app}"
        return [*words, *self.variants[driver], *self.test_options, app]


#: How well a server is looked after.
TIERS = {
    "first": "What we develop and measure on, and what ``flask websockets serve`` runs.",
    "tested": "It does what an application needs; what differs is in the tables.",
    "caveats": "Something that an application may rely on is missing: look before you choose.",
    "best effort": "It works, but much is missing that we cannot make up for.",
}

UVICORN_TESTS = ["--port", "{port}", "--no-access-log", "--timeout-graceful-shutdown", "3"]
UVICORN_FAULTS = ["--timeout-graceful-shutdown", "1"]
UVICORN_FAST_PINGS = ["--ws-ping-interval", "0.5", "--ws-ping-timeout", "0.5"]
GUNICORN_TESTS = ["--no-control-socket", "-b", "127.0.0.1:{port}", "--graceful-timeout", "3"]
HYPERCORN_TESTS = ["--bind", "127.0.0.1:{port}", "--graceful-timeout", "3"]
UVICORN_PINGS = "every 20 s, 20 s for the answer"
HYPERCORN_FAULTS = ["--graceful-timeout", "1", "--keep-alive", "1"]
HYPERCORN_FAST_PINGS = ["--websocket-ping-interval", "1"]
HYPERCORN_PINGS = "never (``websocket_ping_interval``); answers are not awaited"
HYPERCORN_NOTES = [
    "It serves WebSockets over HTTP/2 as well.",
    "A view cannot tell why a client left: it finds 1006, whatever the client said.",
    "A client that means harm can fill its memory (see `Faults`_): not where strangers connect.",
]

SERVERS = [
    Server(
        "uvicorn (websockets-sansio)",
        tier="first",
        distribution="uvicorn",
        version="0.54.0",
        run="uvicorn --ws websockets-sansio {app}",
        library="websockets",
        variants={
            "uvicorn-sansio": ["--http", "httptools", "--loop", "uvloop"],
            "uvicorn-sansio-h11": ["--http", "h11", "--loop", "asyncio"],
        },
        test_options=UVICORN_TESTS,
        fault_options=UVICORN_FAULTS,
        ping_options=UVICORN_FAST_PINGS,
        compression=True,
        pings=UVICORN_PINGS,
        notes=[
            "uvicorn's default where ``websockets`` is installed, as by the extra `fast`.",
            "Set ``--timeout-graceful-shutdown``: without it SIGTERM waits for every client and "
            "every request.",
            "A handshake with a header line above 8 kB, or with more than 128 headers, hangs "
            "without an answer. ``flask websockets serve`` cuts it.",
        ],
    ),
    Server(
        "uvicorn (wsproto)",
        tier="tested",
        distribution="uvicorn",
        version="0.54.0",
        run="uvicorn --ws wsproto {app}",
        library="wsproto",
        variants={
            "uvicorn-wsproto": ["--http", "h11", "--loop", "asyncio"],
            "uvicorn-wsproto-httptools": ["--http", "httptools", "--loop", "uvloop"],
        },
        test_options=UVICORN_TESTS,
        fault_options=UVICORN_FAULTS,
        ping_options=UVICORN_FAST_PINGS,
        compression=True,
        pings=UVICORN_PINGS,
        notes=[
            "uvicorn's default where ``websockets`` is not installed; it is pure Python.",
            "A client that violates the protocol is cut without a close frame.",
            "Add ``--ws-per-message-deflate false`` if strangers may connect (see `Faults`_).",
        ],
    ),
    Server(
        "uvicorn (websockets)",
        tier="tested",
        distribution="uvicorn",
        version="0.54.0",
        run="uvicorn --ws websockets {app}",
        library="websockets, its old API",
        variants={
            "uvicorn-websockets": ["--http", "httptools", "--loop", "asyncio"],
            "uvicorn-websockets-h11": ["--http", "h11", "--loop", "uvloop"],
        },
        test_options=UVICORN_TESTS,
        fault_options=UVICORN_FAULTS,
        ping_options=UVICORN_FAST_PINGS,
        # That it is deprecated: uvicorn's announcement, the library's, and what follows from it.
        interpreter_options=[
            *["-W", "ignore:The `websockets` implementation is deprecated:UserWarning"],
            *["-W", "ignore:websockets.legacy is deprecated:DeprecationWarning"],
            *["-W", "ignore:remove second argument of ws_handler:DeprecationWarning"],
        ],
        compression=True,
        pings=UVICORN_PINGS,
        notes=[
            "uvicorn and the library call it deprecated: there is no reason to choose it.",
            "A client that says goodbye but keeps its TCP connection keeps the view for 10 s; so "
            "does one that sends too much.",
        ],
    ),
    Server(
        "hypercorn (asyncio)",
        tier="caveats",
        distribution="hypercorn",
        version="0.18.0",
        run="hypercorn -k asyncio -w 1 {app}",
        library="wsproto",
        variants={"hypercorn-asyncio": []},
        test_options=HYPERCORN_TESTS,
        fault_options=HYPERCORN_FAULTS,
        ping_options=HYPERCORN_FAST_PINGS,
        client_code=False,
        client_reason=False,
        compression=True,
        sigterm_code=1011,
        sigterm_seconds=8.0,
        pings=HYPERCORN_PINGS,
        notes=[
            *HYPERCORN_NOTES,
            "At SIGTERM connections stay for ``--graceful-timeout``, then they are closed.",
            "With Python 3.12 and newer it does not end at all while a connection is open.",
        ],
    ),
    Server(
        "hypercorn (trio)",
        tier="best effort",
        distribution="hypercorn",
        version="0.18.0",
        run="hypercorn -k trio -w 1 {app}",
        library="wsproto",
        variants={"hypercorn-trio": []},
        test_options=HYPERCORN_TESTS,
        fault_options=HYPERCORN_FAULTS,
        ping_options=HYPERCORN_FAST_PINGS,
        client_code=False,
        client_reason=False,
        compression=True,
        sigterm_code=1006,
        sigterm_seconds=8.0,
        pings=HYPERCORN_PINGS,
        notes=[
            *HYPERCORN_NOTES,
            "Any client can end it, with a header that is no ASCII.",
            "Not with ``-w 0``: that one does not listen to SIGTERM.",
        ],
    ),
    Server(
        "gunicorn (its own worker)",
        tier="tested",
        distribution="gunicorn",
        version="27.0.1",
        run="gunicorn -k asgi -w 1 {app}",
        library="its own",
        variants={"gunicorn-asgi": []},
        test_options=GUNICORN_TESTS,
        fault_options=["--graceful-timeout", "1"],
        denial_responses=False,
        client_reason=False,
        sigterm_code=1006,
        sigterm_views=False,
        sigterm_seconds=8.0,
        notes=[
            "At SIGTERM connections stay for ``--graceful-timeout``; then the master kills the "
            "worker, before that has told the application anything.",
        ],
    ),
    Server(
        "gunicorn (uvicorn's worker)",
        tier="tested",
        distribution="uvicorn-worker",
        version="0.4.0",
        run="gunicorn -k uvicorn_worker.UvicornWorker -w 1 {app}",
        library="as uvicorn",
        variants={"gunicorn-uvicorn": []},
        test_options=GUNICORN_TESTS,
        fault_options=["--graceful-timeout", "1"],
        compression=True,
        pings=UVICORN_PINGS,
        notes=["uvicorn below gunicorn's master; it is configured by a class, not by options."],
    ),
    Server(
        "granian",
        tier="caveats",
        distribution="granian",
        version="2.8.7",
        run="granian --interface asgi --workers 1 {app}",
        library="tungstenite",
        variants={"granian": []},
        test_options=["--port", "{port}"],
        fault_options=[
            *["--workers-kill-timeout", "1"],
            *["--http1-header-read-timeout", "1000"],
        ],
        message_mib=64,
        accept_headers=False,
        client_reason=False,
        sigterm_code=1006,
        notes=[
            "2.7.4 or newer: in older ones a client could end the worker (CVE-2026-42544).",
        ],
    ),
    Server(
        "daphne",
        tier="best effort",
        distribution="daphne",
        version="4.2.3",
        run="daphne {app}",
        library="autobahn",
        variants={"daphne": []},
        test_options=["-p", "{port}", "-v", "0"],
        ping_options=["--ping-interval", "1", "--ping-timeout", "1"],
        ping_seconds=2.5,
        message_mib=1,
        denial_responses=False,
        accept_headers=False,
        close_code=False,
        close_reason=False,
        client_reason=False,
        backpressure=False,
        lifespan=False,
        sigterm_code=1006,
        sigterm_views=False,
        pings="every 20 s, 30 s for the answer",
        notes=[
            "4.2.2 or newer: older ones had no limit of a message's size (CVE-2026-44545).",
            "A message of a client may have 1 MiB (``--websocket-max-message-size``).",
            "An empty message is lost.",
            "What a slow client does not take, and what a fast one sends, fills its memory (see "
            "`Faults`_): neither the outbox nor ``WEBSOCKETS_SEND_TIMEOUT`` is ever met.",
        ],
    ),
]

#: The server of each driver.
SERVER_OF = {driver: server for server in SERVERS for driver in server.variants}

#: The drivers of a plain ``pytest``: the package's own client, and what its extras install.
BY_DEFAULT = ["client", "uvicorn-wsproto", "uvicorn-sansio"]


class Known(NamedTuple):
    """Cases that cannot pass on a server; one that starts to pass fails the suite."""

    #: A regular expression that the whole name of a test has to match, class and parameters
    #: included, the driver left out: ``TestClose.test_states\\[sync\\]``.
    case: str
    #: The drivers on which it cannot, as one expression.
    drivers: str
    version: str
    reason: str
    #: It passes now and then, by a race within the server: it is not run there.
    races: bool = False
    #: For a fault: what helps, an option of the server's or of ours, or what to do instead.
    helps: str = ""


#: What helps, where that is the same on several servers.
FREE_AT_LEAST = (
    "the view, its thread and its place are free all the same; a proxy in front lets go of such "
    "clients (nginx: send_timeout)"
)
A_PROXY = "a proxy in front (nginx: client_header_timeout)"
NO_LIMIT = "it has no limit of the time for a request's head; each costs a descriptor"

KNOWN = [
    Known(
        r"TestAccept\.test_headers_as_a_mapping.*|TestAccept\.test_headers_as_pairs.*"
        r"|TestSession\.test_changed_before_the_accept.*",
        "granian",
        "2.8.7",
        "src/asgi/io.rs reads nothing of websocket.accept but the subprotocol",
    ),
    Known(
        r"TestAccept\.test_headers_as_a_mapping.*|TestAccept\.test_headers_as_pairs.*"
        r"|TestSession\.test_changed_before_the_accept.*",
        "daphne",
        "4.2.3",
        "WebSocketProtocol.handle_reply reads nothing of websocket.accept but the subprotocol",
    ),
    Known(
        r"TestReceive\.test_empty.*|TestSend\.test_types.*",
        "daphne",
        "4.2.3",
        "WebSocketProtocol.handle_reply drops a message without content",
    ),
    Known(
        r"TestOrigin\.test_may_not\[(sync|async)-no origin\]",
        "daphne",
        "4.2.3",
        "autobahn answers 400 to an Origin that is no URL, before the application is asked",
    ),
    # -- faults ------------------------------------------------------------------------------------
    Known(
        r"TestNeverReads\.test_descriptor",
        "uvicorn-websockets.*",
        "0.54.0",
        "the library waits for its transport to flush, as long as the client keeps the connection",
        helps=FREE_AT_LEAST,
    ),
    Known(
        r"TestNeverReads\.test_descriptor",
        "hypercorn-.*",
        "0.18.0",
        "TCPServer._close waits for its transport to flush, as long as the client keeps the "
        "connection",
        helps=FREE_AT_LEAST,
    ),
    Known(
        r"TestNeverReads\.test_descriptor",
        "gunicorn-asgi",
        "27.0.1",
        "the transport is closed, not aborted, and waits to flush as long as the client keeps the "
        "connection",
        helps=FREE_AT_LEAST,
    ),
    Known(
        r"TestNeverReads\.test_descriptor",
        "granian",
        "2.8.7",
        "a send that waits for the client is not given up when the application returns",
        helps=FREE_AT_LEAST,
    ),
    Known(
        r"TestNeverReads\.test_unblocked|TestNeverReads\.test_memory",
        "daphne",
        "4.2.3",
        "its send returns at once, whatever the client takes: the view is never told to wait, "
        "nothing waits in the outbox, so that neither its bounds nor ``on_slow`` are ever met, "
        "and all of it lies in daphne's memory (two floods of 96 MiB: 191 MiB)",
        helps="its pings: a client that does not read does not answer them either, and is cut. "
        "``--ping-interval 5 --ping-timeout 5`` bounds the memory by what a view sends in 10 s",
    ),
    Known(
        r"TestDeafView\.test_memory",
        "daphne",
        "4.2.3",
        "it does not stop reading while the application does not receive: what comes lies in its "
        "memory as long as a view does not keep up, and for a second after our close (830 MiB in "
        "1.5 s)",
        helps="``WEBSOCKETS_MAX_BYTES_PER_SECOND``: it ends such a client before (34 MiB)",
    ),
    Known(
        r"TestMessages\.test_endless|TestMessages\.test_tiny_fragments",
        "uvicorn-websockets.*",
        "0.54.0",
        "it sends 1009, stops reading, and tells the view nothing for 10 s, though the client has "
        "gone",
        helps="``--ws websockets-sansio``",
    ),
    Known(
        r"TestMessages\.test_memory",
        "hypercorn-.*",
        "0.18.0",
        "WebsocketBuffer.extend keeps what is above the limit: after its 1009 hypercorn goes on "
        "reading into the same buffer, without a limit",
        helps="nothing on hypercorn: choose another if strangers may connect",
    ),
    Known(
        r"TestFrames\.test_bomb",
        "uvicorn-wsproto.*",
        "0.54.0",
        "all that has come is inflated before uvicorn looks at the size: 64 MiB in a message "
        "of 64 kB took 184 MiB",
        helps="``--ws-per-message-deflate false``, or ``--ws websockets-sansio``",
    ),
    Known(
        r"TestFrames\.test_bomb",
        "hypercorn-.*",
        "0.18.0",
        "all that has come is inflated before hypercorn looks at the size: 64 MiB in a "
        "message of 64 kB took 187 MiB; there is no option against compression",
        helps="a proxy that takes the header ``Sec-WebSocket-Extensions`` out of handshakes",
    ),
    Known(
        r"TestHandshakes\.test_odd\[(30,000 bytes|200 headers|a huge header)\]",
        "uvicorn-sansio.*",
        "0.54.0",
        "it does not look at what the library says of a head that is too large, and never answers",
        helps="``flask websockets serve``, which cuts it; or a proxy with limits of its own",
    ),
    Known(
        r"TestHandshakes\.test_odd\[(30,000 bytes|200 headers|a huge header)\]",
        "gunicorn-uvicorn",
        "0.4.0",
        "as uvicorn (websockets-sansio)",
        helps="a proxy with limits of its own",
    ),
    Known(
        r"TestHandshakes\.test_no_ascii",
        "hypercorn-trio",
        "0.18.0",
        "nothing between wsproto's UnicodeDecodeError and the nursery of the whole server catches "
        "it: hypercorn ends, and every connection with it",
        helps="``-k asyncio``, where that connection alone ends",
    ),
    Known(
        r"TestHandshakes\.test_words_before_the_answer.*",
        "hypercorn-trio",
        "0.18.0",
        "either hypercorn ends, with every connection (its issue 225), or the view keeps its "
        "thread and its place for ever",
        races=True,
        helps="``-k asyncio``, where the second is all",
    ),
    Known(
        r"TestHandshakes\.test_words_before_the_answer",
        "hypercorn-asyncio",
        "0.18.0",
        "WSStream answers 400 and never says websocket.disconnect: the view keeps its thread and "
        "its place for ever",
        helps="``max_age=`` on the routes: then they end; and "
        "``WEBSOCKETS_MAX_CONNECTIONS_PER_ADDRESS``",
    ),
    Known(
        r"TestHandshakes\.test_slow\[.*",
        "uvicorn-.*",
        "0.54.0",
        NO_LIMIT,
        helps="``flask websockets serve``, which cuts it after "
        f"``WEBSOCKETS_HANDSHAKE_TIMEOUT``; or {A_PROXY}",
    ),
    Known(r"TestHandshakes\.test_slow\[.*", "gunicorn-asgi", "27.0.1", NO_LIMIT, helps=A_PROXY),
    Known(r"TestHandshakes\.test_slow\[.*", "gunicorn-uvicorn", "0.4.0", NO_LIMIT, helps=A_PROXY),
    Known(r"TestHandshakes\.test_slow\[.*", "daphne", "4.2.3", NO_LIMIT, helps=A_PROXY),
    Known(
        r"TestHandshakes\.test_slow\[nothing\]",
        "granian",
        "2.8.7",
        "``--http1-header-read-timeout`` counts from the first byte",
        helps=A_PROXY,
    ),
    Known(
        r"TestSigterm\.test_a_peer_that_never_reads",
        "hypercorn-asyncio",
        "0.18.0",
        "TCPServer._close waits for its transport to flush, beyond ``--graceful-timeout``",
        helps="a supervisor that kills it, such as systemd with TimeoutStopSec",
    ),
]


class Fault(NamedTuple):
    """A line of the table of faults: it passes on a server where none of its tests is known."""

    #: What happens.
    what: str
    #: What has to come of it.
    passes: str
    #: The tests of ``test_behaviour_faults``.
    tests: Sequence[str]


FAULTS = [
    Fault(
        "A client is killed",
        "its view is unblocked within a second, its subscriptions are gone",
        ["TestVanishes.test_killed"],
    ),
    Fault(
        "A client never reads what a view sends",
        "the view gets ConnectionClosed after ``WEBSOCKETS_SEND_TIMEOUT``",
        ["TestNeverReads.test_unblocked"],
    ),
    Fault(
        "Its memory",
        "the outbox bounds it",
        ["TestNeverReads.test_memory"],
    ),
    Fault(
        "Its descriptor",
        "is closed within a second, whatever the client does",
        ["TestNeverReads.test_descriptor"],
    ),
    Fault(
        "A view is busy while a message waits, pings go on",
        "the connection stays",
        ["TestDeafView.test_busy"],
    ),
    Fault(
        "A view never receives, and its client floods it",
        "1013 after ``WEBSOCKETS_INBOX_TIMEOUT``; the inbox is bounded",
        ["TestDeafView.test_closed"],
    ),
    Fault(
        "Its memory",
        "what the client sends meanwhile waits with the client",
        ["TestDeafView.test_memory"],
    ),
    Fault(
        "A message above ``WEBSOCKETS_MAX_MESSAGE_BYTES``",
        "1009",
        ["TestMessages.test_too_large"],
    ),
    Fault(
        "A message without an end, and 50,000 fragments of a byte",
        "cut at the server's limit; the views are unblocked",
        ["TestMessages.test_endless", "TestMessages.test_tiny_fragments"],
    ),
    Fault(
        "Their memory",
        "the server's limit bounds it",
        ["TestMessages.test_memory"],
    ),
    Fault(
        "A length of 1 GiB, or of 2^63 - 1, is announced",
        "nothing is held for it",
        ["TestMessages.test_announced"],
    ),
    Fault(
        "Bad frames: 2^63, UTF-8, opcodes, RSV bits, no mask",
        "the connection ends; the view sees ConnectionClosed alone",
        ["TestFrames.test_bad"],
    ),
    Fault(
        "A deflate bomb, 64 kB that inflate to 64 MiB",
        "memory grows by less than twice the largest message",
        ["TestFrames.test_bomb"],
    ),
    Fault(
        "A handshake with a huge header, 2500 subprotocols, a bad key",
        "is answered or cut at once",
        ["TestHandshakes.test_odd"],
    ),
    Fault(
        "A handshake with bytes that are no ASCII",
        "is answered or cut; nobody else notices",
        ["TestHandshakes.test_no_ascii"],
    ),
    Fault(
        "A client sends before the handshake is answered",
        "its view ends when it goes; nobody else notices",
        [
            "TestHandshakes.test_words_before_the_answer",
            "TestHandshakes.test_words_before_the_answer_hurt_nobody",
        ],
    ),
    Fault(
        "A handshake that does not go on",
        "is cut after the time of the server's option",
        ["TestHandshakes.test_slow"],
    ),
    Fault(
        "Any of these",
        "the others are served meanwhile, over HTTP too, and nothing is left when the client goes",
        [
            "TestNeverReads.test_hurts_nobody",
            "TestFrames.test_bomb_hurts_nobody",
            "TestHandshakes.test_odd_hurts_nobody",
            "TestHandshakes.test_slow_hurts_nobody",
        ],
    ),
    Fault(
        "Handshakes above ``WEBSOCKETS_MAX_CONNECTIONS``",
        "503, or 403 where refusals are bare; no thread is taken, HTTP is served",
        ["TestHandshakes.test_above_the_limit"],
    ),
    Fault(
        "`websockets.disconnect(user=...)`",
        "4401 to all of his connections, and to nobody else",
        ["TestDisconnect.test_all_of_a_user"],
    ),
    Fault(
        "`websockets.drain()`, from an HTTP view",
        "1012 to everybody, 4012 where that cannot be sent; handshakes are refused, HTTP is served",
        ["TestDrain.test_drain"],
    ),
    Fault(
        "SIGTERM while a view sleeps",
        "it ends in the time of the server's option, and 2 s",
        ["TestSigterm.test_a_view_that_sleeps"],
    ),
    Fault(
        "SIGTERM while clients do not read",
        "likewise",
        ["TestSigterm.test_a_peer_that_never_reads"],
    ),
]


def known(case: str, driver: str) -> Iterator[Known]:
    """Why a case cannot pass on a driver, if it cannot."""
    for each in KNOWN:
        if re.fullmatch(each.drivers, driver) and re.fullmatch(each.case, case):
            yield each
