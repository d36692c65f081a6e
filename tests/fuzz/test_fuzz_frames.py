"""Frames of every kind on a raw socket, against a real server, beside a client that behaves.

A parser of a few lines says what of a stream a view must get (RFC 6455, section 5): so many
messages, and then nothing, a close, or an error. The view echoes; what comes back is compared.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import struct
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from websockets.sync.client import connect

from ..integration.conftest import ServerProcess
from ..integration.raw_client import RawClient
from ..integration.waiting import wait_until
from ..models.profiles import profile

#: Seconds that anything may take for which nothing is promised.
TIMEOUT = 5.0
#: The server's own limit, and the smaller one of the application.
SERVER_BYTES, MESSAGE_BYTES = 4096, 2048

APP = f"""
    import traceback
    from flask import Flask
    from flask_websockets import ConnectionClosed, InvalidMessage, WebSockets

    app = Flask(__name__)
    app.config.update(WEBSOCKETS_MAX_MESSAGE_BYTES={MESSAGE_BYTES}, WEBSOCKETS_CLOSE_TIMEOUT=2)
    websockets = WebSockets(app)
    wrong = []

    @websockets.route("/<kind>")
    def view(ws, kind):
        try:
            if kind == "json":
                while True:
                    ws.send_json(ws.receive_json())
            for data in getattr(ws, "iter_" + kind)():
                ws.send(data)
        except ConnectionClosed:
            raise
        except InvalidMessage:
            pass
        except BaseException:
            wrong.append(traceback.format_exc())
            raise

    @websockets.route("/async/<kind>")
    async def aview(ws, kind):
        try:
            async for data in getattr(ws, "iter_" + kind)():
                await ws.send(data)
        except ConnectionClosed:
            raise
        except InvalidMessage:
            pass
        except BaseException:
            wrong.append(traceback.format_exc())
            raise

    @app.get("/report")
    def report():
        stats = websockets.stats()
        return {{"wrong": wrong, "connections": stats.connections, "threads": stats.view_threads}}

    asgi = websockets.asgi_app()
"""

# --- What is sent

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA


@dataclass
class Frame:
    """One frame as a client may write it, rightly or wrongly."""

    opcode: int
    payload: bytes = b""
    fin: bool = True
    rsv: int = 0
    mask: bytes | None = b"\1\2\3\4"
    #: The length that it claims; None for its own.
    claims: int | None = None
    #: Bytes of the length: 1, 2 or 8; None for as few as it takes.
    form: int | None = None

    def encode(self) -> bytes:
        length = len(self.payload) if self.claims is None else self.claims
        form = self.form or (1 if length < 126 else 2 if length < 65536 else 8)
        masked = 0x80 if self.mask is not None else 0
        head = bytes([self.fin << 7 | self.rsv << 4 | self.opcode])
        if form == 1:
            head += bytes([masked | min(length, 125)])
        elif form == 2:
            head += bytes([masked | 126]) + struct.pack("!H", min(length, 0xFFFF))
        else:
            head += bytes([masked | 127]) + struct.pack("!Q", length)
        if self.mask is None:
            return head + self.payload
        return head + self.mask + unmask(self.payload, self.mask)


def unmask(data: bytes, mask: bytes) -> bytes:
    return bytes(byte ^ mask[index % 4] for index, byte in enumerate(data))


payloads = st.one_of(
    st.text(max_size=12).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.binary(max_size=12),
    st.sampled_from([b"", b"x" * 125, b"x" * 126, b"x" * 2048, b"x" * 2049, b"x" * 5000]),
    st.sampled_from(["é€😀".encode()[:-1], b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b'{"a": 1}']),
)
masks = st.binary(min_size=4, max_size=4)
good = st.one_of(
    st.builds(Frame, st.sampled_from([TEXT, BINARY]), st.text(max_size=9).map(str.encode)),
    st.builds(Frame, st.just(BINARY), payloads, mask=masks),
    st.builds(Frame, st.sampled_from([PING, PONG]), st.binary(max_size=9), mask=masks),
)
fragments = st.builds(
    lambda opcode, parts, mask: [
        Frame(opcode if not number else CONTINUATION, part, number == len(parts) - 1, mask=mask)
        for number, part in enumerate(parts)
    ],
    st.sampled_from([TEXT, BINARY]),
    st.lists(st.one_of(st.just("é€".encode()), st.binary(max_size=5)), min_size=1, max_size=4),
    masks,
)
closes = st.builds(
    Frame,
    st.just(CLOSE),
    st.one_of(
        st.sampled_from([b"", b"\3", b"\3\xe8", b"\3\xe8bye", b"\3\xed", b"\3\xe8\xff", b"\0\1"]),
        st.builds(
            lambda code, reason: struct.pack("!H", code) + reason.encode(),
            st.integers(0, 5001),
            st.text(max_size=5),
        ),
    ),
)
bad = st.builds(
    Frame,
    st.one_of(st.sampled_from([CONTINUATION, TEXT, BINARY, CLOSE, PING]), st.integers(0, 15)),
    payloads,
    fin=st.sampled_from([True, True, False]),
    rsv=st.sampled_from([0, 0, 0, 1, 4, 7]),
    mask=st.one_of(masks, masks, st.none()),
    claims=st.sampled_from([None, None, None, 0, 1, 200, 70_000, 2**31, 2**63 - 1, 2**63]),
    form=st.sampled_from([None, None, 1, 2, 8]),
)
streams = st.lists(
    st.one_of(good.map(lambda frame: [frame]), fragments, good.map(lambda frame: [frame])),
    max_size=5,
).flatmap(
    lambda begun: st.one_of(
        st.just([]), bad.map(lambda frame: [frame]), closes.map(lambda frame: [frame])
    ).map(lambda last: [frame for frames in [*begun, last] for frame in frames])
)

# --- What must come of it


@dataclass
class Outcome:
    """What a view must get of a stream, and how it ends.

    open: at the end of a frame, and of a message; inside: within one; closed: by the client;
    error: it breaks the protocol; uncertain: servers differ in what they let pass.
    """

    messages: list[str | bytes]
    end: str = "open"


def parse(data: bytes) -> Outcome:
    """RFC 6455, section 5, as a reader of it would write it down."""
    outcome = Outcome([])
    kind, parts = 0, b""
    while data:
        if len(data) < 2:
            outcome.end = "inside"
            return outcome
        fin, rsv, opcode = data[0] >> 7, data[0] >> 4 & 7, data[0] & 15
        masked, length, offset = data[1] >> 7, data[1] & 127, 2
        is_control = opcode >= 8
        if (
            rsv
            or not masked
            or opcode not in (CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG)
            or (is_control and (not fin or length > 125))
            or (opcode == CONTINUATION and not kind)
            or (opcode in (TEXT, BINARY) and kind)
        ):
            # One whose end has not come may be waited for before it is judged.
            is_whole = length < 126 and length <= len(data) - 2 - 4 * masked
            outcome.end = "error" if is_whole else "uncertain"
            return outcome
        if length > 125:
            size = 2 if length == 126 else 8
            if len(data) < 2 + size:
                outcome.end = "inside"
                return outcome
            shortest = 126 if size == 2 else 65536
            length, offset = int.from_bytes(data[2 : 2 + size], "big"), 2 + size
            if length < shortest or length >= 2**63:
                outcome.end = "uncertain"  # not all insist on the shortest form
                return outcome
        if not is_control and len(parts) + length > MESSAGE_BYTES:
            outcome.end = "uncertain"  # too large: 1009, once that is known
            return outcome
        frame = data[offset : offset + 4 + length]
        if len(frame) < 4 + length:
            outcome.end = "inside"
            return outcome
        payload, data = unmask(frame[4:], frame[:4]), data[offset + 4 + length :]
        if opcode == CLOSE:
            outcome.end = "closed"
            return outcome
        if is_control:
            continue
        kind, parts = kind or opcode, parts + payload
        if fin:
            try:
                outcome.messages.append(parts.decode() if kind == TEXT else parts)
            except UnicodeDecodeError:
                outcome.end = "error"
                return outcome
            kind, parts = 0, b""
        elif kind == TEXT:
            try:
                parts.decode()
            except UnicodeDecodeError:
                outcome.end = "uncertain"  # some say so at once, some at the end of the message
                return outcome
    outcome.end = "inside" if kind else "open"
    return outcome


def test_the_parser_knows_the_rules() -> None:
    """A message in three fragments around a ping, and each kind of end."""
    whole = [
        Frame(TEXT, b"\xe2\x82", False),
        Frame(PING, b"x"),
        Frame(CONTINUATION, b"\xac"),
        Frame(BINARY, b"\0"),
    ]
    data = b"".join(frame.encode() for frame in whole)
    assert parse(data).messages[-1:] == [] and parse(data).end == "uncertain"
    whole[0].payload, whole[2].payload = b"a", b"b"
    data = b"".join(frame.encode() for frame in whole)
    assert parse(data) == Outcome(["ab", b"\0"])
    assert parse(data[:-1]) == Outcome(["ab"], "inside")
    assert parse(data + Frame(CLOSE).encode()).end == "closed"
    assert parse(data + Frame(TEXT, mask=None).encode()).end == "error"
    assert parse(data + Frame(CONTINUATION).encode()).end == "error"
    assert parse(data + Frame(TEXT, b"\xff").encode()).end == "error"


# --- The raw client


def server_frames(connection: socket.socket) -> Iterator[tuple[int, bytes]]:
    """What the server sends, up to the end of the connection."""
    data = b""

    def need(count: int) -> bool:
        nonlocal data
        while len(data) < count:
            try:
                more = connection.recv(65536)
            except ConnectionError:
                return False
            if not more:
                return False
            data += more
        return True

    while need(2):
        opcode, length, offset = data[0] & 15, data[1] & 127, 2
        assert data[0] & 0xF0 == 0x80 and not data[1] & 0x80
        if length > 125:
            size = 2 if length == 126 else 8
            assert need(2 + size)
            length, offset = int.from_bytes(data[2 : 2 + size], "big"), 2 + size
        assert need(offset + length)
        payload, data = data[offset : offset + length], data[offset + length :]
        yield opcode, payload


def echoed(frames: Iterator[tuple[int, bytes]], stop: bytes | None = None) -> list[str | bytes]:
    """The data frames up to the end of the connection, its close, or a text that says *stop*."""
    found: list[str | bytes] = []
    for opcode, payload in frames:
        if opcode == CLOSE:
            assert len(payload) != 1
            break
        if opcode == TEXT:
            if payload == stop:
                return found
            found.append(payload.decode())
        elif opcode == BINARY:
            found.append(payload)
    assert stop is None, "the server closed the connection"
    return found


def send(connection: socket.socket, data: bytes, cuts: list[int]) -> None:
    """Send *data* in pieces; the server may have closed meanwhile."""
    edges = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    with contextlib.suppress(ConnectionError):
        for start, end in itertools.pairwise(edges):
            connection.sendall(data[start:end])


@pytest.fixture
def server(uvicorn_server: Callable[..., ServerProcess]) -> ServerProcess:
    return uvicorn_server(APP, "--ws-max-size", str(SERVER_BYTES), "--log-level", "info")


def report(server: ServerProcess) -> Any:
    with urllib.request.urlopen(server.url("/report"), timeout=TIMEOUT) as answer:
        return json.load(answer)


@pytest.mark.parametrize("kind", ["", "async/"], ids=["sync", "async"])
def test_frames(server: ServerProcess, kind: str) -> None:
    """The view gets what the parser says, no error but ours; another client notices nothing."""
    with connect(server.ws_url("/data")) as witness:

        @profile(80, shrink=False)
        @given(streams, st.lists(st.integers(0, 400), max_size=4), st.sampled_from(["fin", "rst"]))
        @example([Frame(TEXT, b"a"), Frame(PING), Frame(TEXT, b"b")], [1, 2, 3, 7], "fin")
        @example([Frame(TEXT, b"a"), Frame(TEXT, b"\xff")], [], "fin")
        @example([Frame(BINARY, b"x" * 2049)], [], "fin")
        @example([Frame(BINARY, b"x", claims=2**63, form=8)], [], "rst")
        @example([Frame(BINARY, b"x" * 9, claims=3)], [], "fin")
        def fuzz(frames: list[Frame], cuts: list[int], leaves: str) -> None:
            data = b"".join(frame.encode() for frame in frames)
            expected = parse(data)
            client = RawClient(server.port, f"/{kind}data")
            assert client.status == 101
            with client:
                client.socket.settimeout(TIMEOUT)
                send(client.socket, data, cuts)
                back = server_frames(client.socket)
                if expected.end == "open":
                    send(client.socket, Frame(TEXT, b"that was all").encode(), [])
                    assert echoed(back, b"that was all") == expected.messages
                elif expected.end in ("closed", "error"):
                    found = echoed(back)  # the last echoes may have come too late
                    assert found == expected.messages[: len(found)]
                if leaves == "rst":
                    client.reset()
            witness.send(data[:100])
            assert witness.recv(TIMEOUT) == data[:100]

        fuzz()
    check(server)


@pytest.mark.parametrize("kind", ["text", "bytes", "json", "async/text"])
def test_whatever_the_view_wants(server: ServerProcess, kind: str) -> None:
    """Views that want text, bytes or JSON of any stream meet no error but ours."""
    with connect(server.ws_url("/data")) as witness:

        @profile(30)
        @given(streams, st.booleans())
        @example([Frame(BINARY, b"\xff")], True)
        @example([Frame(TEXT, b"[" * 2000)], True)
        @example([Frame(TEXT, b"\xf0\x9f\x98\x80")], True)
        @example([Frame(TEXT, b'"\\ud800"')], True)
        @example([Frame(TEXT, b"NaN")], False)
        def fuzz(frames: list[Frame], waits: bool) -> None:
            with RawClient(server.port, f"/{kind}") as client:
                assert client.status == 101
                frames = [*frames, Frame(CLOSE, b"\3\xe8")] if waits else frames
                send(client.socket, b"".join(frame.encode() for frame in frames), [])
                if waits and parse(b"".join(f.encode() for f in frames)).end == "closed":
                    echoed(server_frames(client.socket))
            witness.send(kind)
            assert witness.recv(TIMEOUT) == kind

        fuzz()
    check(server)


#: Methods of uvicorn's that call the ones of the same names, in which it raised.
EXTENDED = ("in handle_cont", "in handle_ping", "in send_receive_event_to_app", "in handle_message")


def check(server: ServerProcess) -> None:
    """Nothing is left, and nobody has met an error but ours."""
    wait_until(lambda: report(server)["connections"] == 0, TIMEOUT, "no connection")
    found = report(server)
    assert found["wrong"] == []
    wait_until(lambda: report(server)["threads"] == 0, TIMEOUT, "no view")
    # Paths in tracebacks; uvicorn has its own, some through methods of its that we extend.
    ours = [line for line in server.log().splitlines() if "flask_websockets/" in line]
    assert [line for line in ours if not line.endswith(EXTENDED)] == []
    assert server.process.poll() is None
