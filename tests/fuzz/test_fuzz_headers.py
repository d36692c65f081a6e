"""What an application puts into a handshake's answer: what is valid arrives, the rest raises.

Two readers that know nothing of us judge what the server is given: wsproto and h11, byte for byte.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from flask import Flask, Response
from h11 import CLIENT, SERVER, Data, EndOfMessage, InformationalResponse, Request
from h11 import Connection as HTTPConnection
from h11 import Response as HTTPResponse
from hypothesis import example, given
from hypothesis import strategies as st
from wsproto import ConnectionType, WSConnection
from wsproto.events import AcceptConnection
from wsproto.events import Request as Handshake

from flask_websockets import ConnectionClosed, WebSockets

from ..asgi_driver import Message
from ..models.profiles import profile
from .served import DENIAL, Front, front, make_app, status_of

TOKEN = "!#$%&'*+-.^_`|~0123456789abcxyzABCXYZ"
#: Headers that belong to the server in an accept, by RFC 6455 and RFC 9110.
FORBIDDEN = {
    *("connection", "upgrade", "transfer-encoding", "content-length"),
    *("sec-websocket-accept", "sec-websocket-protocol", "sec-websocket-extensions"),
}

tokens = st.text(TOKEN, min_size=1, max_size=8)
names = st.one_of(
    tokens.map("x-{}".format),
    tokens.map("x-{}".format),
    st.sampled_from([*sorted(FORBIDDEN), "Set-Cookie", "Sec-WebSocket-Version", "Server", "Date"]),
    st.sampled_from(["", "a b", "a:", "é", "x\r\n", "x\0", "x\n y", "(", "\ud800"]),
    st.text(max_size=5),
)
values = st.one_of(
    st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=10),
    st.text(st.characters(min_codepoint=0, max_codepoint=255), max_size=6),
    st.sampled_from(["", " x ", "\t", "a\r\nSet-Cookie: b=c", "a\r", "a\n", "\0", "€", "\ud800"]),
    st.text(max_size=5),
)
header_lists = st.lists(st.tuples(names, values), max_size=4)


def is_token(text: str) -> bool:
    return bool(text) and all(character in TOKEN + _LETTERS for character in text)


_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


def is_value(text: str) -> bool:
    """RFC 9110 section 5.5: visible characters, obs-text, space and tab."""
    return all(c in "\t" or "\x20" <= c <= "\x7e" or "\x80" <= c <= "\xff" for c in text)


class Site:
    """An application whose view and middleware do what the test says."""

    def __init__(self, server: Front, **settings: Any) -> None:
        self.server = server
        self.app: Flask
        self.websockets: WebSockets
        self.app, self.websockets = make_app(**settings)
        self.act: Callable[[Any], Any] = lambda ws: None
        self.raised: BaseException | None = None

        @self.websockets.route("/", subprotocols=["v1", "v2", "~"])
        def view(ws: Any) -> Any:
            try:
                return self.act(ws)
            except (TypeError, ValueError, ConnectionClosed) as error:
                self.raised = error
                return Response(status=403)

        self.asgi = self.websockets.asgi_app(self.app)

    def shake(self, act: Callable[[Any], Any], **scope: Any) -> list[Message]:
        """What a handshake is answered with whose view does *act*."""
        self.act, self.raised = act, None
        return self.server.handshake(
            self.asgi,
            {
                "type": "websocket",
                "path": "/",
                "headers": [(b"host", b"localhost")],
                "extensions": DENIAL,
                **scope,
            },
        )

    def clean(self) -> None:
        lines, self.server.errors.lines = self.server.errors.lines, []
        assert lines == []


def check_bytes(headers: Iterable[tuple[bytes, bytes]]) -> None:
    """What ASGI wants, and what no server may be given."""
    for name, value in headers:
        assert type(name) is type(value) is bytes
        assert re.fullmatch(rb"[!#$%&'*+\-.^_`|~0-9a-z]+", name), name
        assert not re.search(rb"[\r\n\0]", value), value


def test_headers_of_an_accept() -> None:
    """Valid ones come out of a handshake as they went in; others raise, and nothing is sent."""
    with front() as server:
        site = Site(server)

        @profile(250)
        @given(header_lists, st.booleans())
        @example([("Set-Cookie", "a=b"), ("set-cookie", "c=d")], False)
        @example([("X", "a\r\nSet-Cookie: b=c")], False)
        @example([("X", "a ")], False)
        def fuzz(headers: list[tuple[str, str]], as_mapping: bool) -> None:
            given = dict(headers) if as_mapping else headers
            pairs = list(given.items()) if isinstance(given, dict) else given
            said = site.shake(lambda ws: ws.accept(headers=given))
            valid = all(
                is_token(name) and is_value(value) and name.lower() not in FORBIDDEN
                for name, value in pairs
            )
            if not valid:
                assert isinstance(site.raised, ValueError)
                assert status_of(said) == 403
            else:
                assert site.raised is None
                assert status_of(said) == 101
                check_bytes(said[0]["headers"])
                # White space around a value is no part of it (RFC 9110 section 5.5).
                expected = [
                    (name.lower().encode(), value.strip(" \t").encode("latin-1"))
                    for name, value in pairs
                ]
                assert said[0]["headers"] == expected
                assert read_accept(said[0]) == expected
            site.clean()

        fuzz()
        server.stop(site.asgi)


def read_accept(message: Message) -> list[tuple[bytes, bytes]]:
    """The headers of an accept, as a client reads them that wsproto has answered."""
    shaking = WSConnection(ConnectionType.CLIENT)
    request = shaking.send(Handshake(host="localhost", target="/"))
    answering = WSConnection(ConnectionType.SERVER)
    answering.receive_data(request)
    [_] = answering.events()
    answer = answering.send(AcceptConnection(extra_headers=message["headers"]))
    reader = HTTPConnection(CLIENT)
    reader.send(
        Request(
            method="GET",
            target="/",
            headers=[("host", "x"), ("connection", "upgrade"), ("upgrade", "websocket")],
        )
    )
    reader.receive_data(answer)
    event = reader.next_event()
    assert isinstance(event, InformationalResponse) and event.status_code == 101
    own = {b"connection", b"upgrade", b"sec-websocket-accept"}
    return [(bytes(n), bytes(v)) for n, v in event.headers if bytes(n) not in own]


def test_headers_of_a_denial() -> None:
    """Whatever Flask makes of a response's headers, a server can send, and a client can read."""
    with front() as server:
        site = Site(server)

        @profile(150)
        @given(header_lists, st.integers(300, 599), st.binary(max_size=20))
        @example([("Location", "/é€")], 302, b"")
        @example([("X", "€")], 403, b"no")
        def fuzz(headers: list[tuple[str, str]], status: int, body: bytes) -> None:
            def act(_: Any) -> Response:
                response = Response(body, status)
                for name, value in headers:
                    response.headers.add(name, value)  # raises ValueError for a line break
                return response

            said = site.shake(act)
            if site.raised is not None:
                assert isinstance(site.raised, ValueError) and status_of(said) == 403
            else:
                found = status_of(said)
                # What can be sent is sent, and what cannot is an error of the application's.
                assert found == status or (found == 500 and not are_plain(headers))
                check_denial(said)
            server.errors.lines.clear()

        fuzz()
        server.stop(site.asgi)


def are_plain(headers: list[tuple[str, str]]) -> bool:
    """Whether all may be sent as they are, and none speaks of the connection or the body."""
    return all(
        is_token(name) and is_value(value) and name.lower() not in FORBIDDEN
        for name, value in headers
    )


def check_denial(said: list[Message]) -> None:
    """wsproto writes a denial through h11: so does this, to its end."""
    check_bytes(said[0]["headers"])
    writer = HTTPConnection(SERVER)
    writer.receive_data(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    writer.next_event()
    writer.send(HTTPResponse(status_code=said[0]["status"], headers=said[0]["headers"]))
    if said[0]["status"] not in (204, 304):
        writer.send(Data(data=said[1]["body"]))
    writer.send(EndOfMessage())


def test_headers_of_a_middleware() -> None:
    """A WSGI middleware that answers itself can say what it likes: what is wrong is a 500."""
    with front() as server:
        site = Site(server)
        answer: list[Any] = []

        def middleware(environ: Any, start_response: Any) -> list[bytes]:
            start_response(answer[0], answer[1])
            return [b"no"]

        site.app.wsgi_app = middleware  # type: ignore[method-assign]

        @profile(150)
        @given(
            header_lists,
            st.one_of(
                st.integers(300, 599).map("{} X".format),
                st.sampled_from(
                    ["", "x", "403", "403 ", "40 X", "4030 X", "200 OK", "101 X", "-1 X", "999 X"]
                ),
            ),
        )
        @example([], "")
        @example([], "no status")
        @example([("X", "\ud800")], "403 X")
        @example([("X", "a\0b")], "403 X")
        @example([("Content-Length", "50")], "403 X")
        @example([("X", "a\r\nSet-Cookie: b=c")], "403 X")
        def fuzz(headers: list[tuple[str, str]], status: str) -> None:
            answer[:] = [status, headers]
            said = site.shake(lambda ws: None)
            found = status_of(said)
            is_refusal = re.fullmatch("[3-5][0-9][0-9]( .*)?", status)
            if is_refusal and are_plain(headers):
                assert found == int(status[:3])
            elif not is_refusal:
                assert found == 500
            else:
                assert found in (500, int(status[:3]))
            check_denial(said)
            server.errors.lines.clear()

        fuzz()
        server.stop(site.asgi)


offers = st.one_of(
    st.lists(st.sampled_from(["v1", "v2", "v3", "~", "V1", "", " v2 "]), max_size=5),
    st.lists(st.text(max_size=4), max_size=4),
)


def test_subprotocols() -> None:
    """The first of the client's that the route speaks; an explicit one only if it was offered."""
    with front() as server:
        site = Site(server)

        @profile(200)
        @given(
            offers, st.one_of(st.none(), st.text(max_size=4), st.sampled_from(["v1", "v3", "~"]))
        )
        @example(["v1\r\nX-Evil: 1"], "v1\r\nX-Evil: 1")
        @example(["é"], "é")
        def fuzz(offered: list[str], wanted: str | None) -> None:
            before: list[Any] = []

            def act(ws: Any) -> None:
                before.append(ws.subprotocol)
                ws.accept(wanted)
                before.append(ws.subprotocol)

            said = site.shake(act, subprotocols=offered)
            stripped = [name.strip() for name in offered]
            common = next((name for name in stripped if name in ("v1", "v2", "~")), None)
            assert before[0] == common
            if wanted is not None and not (is_token(wanted) and wanted in stripped):
                assert isinstance(site.raised, ValueError) and status_of(said) == 403
            else:
                assert status_of(said) == 101
                assert said[0]["subprotocol"] == before[1] == (wanted or common)
            site.clean()

        fuzz()
        server.stop(site.asgi)
