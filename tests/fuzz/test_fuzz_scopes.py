"""Whatever a server says of a request: one whole answer, and no error of ours."""

from __future__ import annotations

import threading
from typing import Any
from wsgiref.validate import check_environ  # type: ignore[attr-defined, unused-ignore]

from flask import Flask, request
from hypothesis import example, given
from hypothesis import strategies as st

from flask_websockets import WebSockets

from ..asgi_driver import Message
from ..models.profiles import profile
from ..test_environ_properties import http_scopes, scope_headers, websocket_scopes
from .served import DENIAL, Front, front, make_app, status_of

#: What servers give where the specification names another type, or another value.
odd = {
    "headers": st.one_of(
        scope_headers,
        scope_headers.map(lambda pairs: [list(pair) for pair in pairs]),
        scope_headers.map(tuple),
        st.lists(st.tuples(st.just(b"x-many"), st.binary(max_size=3)), min_size=90, max_size=120),
        st.lists(st.tuples(st.just(b"cookie"), st.just(b"a=" + b"b" * 5000)), max_size=20),
        st.builds(lambda: [(b"x-huge", b"x" * 70_000)]),  # in a strategy's repr a call, not a value
        st.lists(
            st.tuples(
                st.sampled_from(
                    [
                        *(b"host", b"origin", b"upgrade", b"connection", b"content-length"),
                        *(b"transfer-encoding", b"x-forwarded-for", b"forwarded", b"cookie"),
                        *(b"sec-websocket-key", b"sec-websocket-version", b"te", b"expect"),
                    ]
                ),
                st.one_of(
                    st.sampled_from(
                        [
                            *(b"", b"localhost", b"localhost:80", b"[::1]", b"[::1", b"a b", b"::"),
                            *(b"http://localhost", b"null", b"websocket", b"chunked", b"gzip"),
                            *(b"-1", b"5", b"1e3", b"\xff\xfe", b"a@b", b"x:99999", b"*"),
                        ]
                    ),
                    st.binary(max_size=20).map(lambda raw: raw.strip(b" \t\r\n\0")),
                ),
            ),
            max_size=6,
        ),
    ),
    "client": st.sampled_from([None, ["::1", 5], ("", 0), ["/tmp/x.sock", None], ("%eth0", 1)]),
    "server": st.sampled_from([None, ["::1", 5], ("", 0), ["/tmp/x.sock", None], ("h", None)]),
    "extensions": st.sampled_from([None, {}, DENIAL, {**DENIAL, "tls": {}}]),
    "state": st.sampled_from([None, {}, {"other": 1}]),
    "raw_path": st.one_of(st.none(), st.binary(max_size=12), st.just(b"")),
    "http_version": st.sampled_from(["1.0", "1.1", "2", "3"]),
    "asgi": st.sampled_from([{"version": "2.0"}, {"version": "3.0", "spec_version": "2.5"}, {}]),
}
subprotocols = st.one_of(
    st.none(),
    st.lists(st.text(max_size=6), max_size=5),
    st.lists(st.sampled_from(["v1", " v1", "V1", "", "v2 ", "\xff", "a,b", "\0"]), max_size=5),
    st.just(("v2", "v1")),
    st.builds(lambda: ["x"] * 2500),
)


def spoilt(scopes: st.SearchStrategy[Message], **more: Any) -> st.SearchStrategy[Message]:
    changes = st.fixed_dictionaries({}, optional={**odd, **more})
    return st.builds(lambda scope, change: {**scope, **change}, scopes, changes).filter(_can_be)


def _can_be(scope: Message) -> bool:
    """Whether a server could say so: no parser lets a target with a line break pass.

    Werkzeug redirects to what it finds there as it is, and then raises, with any server.
    """
    query = scope.get("query_string", b"").decode("latin-1")
    return not any(c in "\r\n" for c in scope.get("root_path", "") + query)


class Site:
    """An application that looks at all of its request."""

    def __init__(self, server: Front) -> None:
        self.app: Flask
        self.websockets: WebSockets
        self.app, self.websockets = make_app()
        self.asgi = self.websockets.asgi_app(self.app)
        self.server = server
        self.seen: list[BaseException | None] = []

        @self.app.route("/", defaults={"rest": ""}, methods=["GET", "POST", "PUT"])
        @self.app.route("/<path:rest>", methods=["GET", "POST", "PUT"])
        def page(rest: str) -> str:
            self.look()
            return rest

        @self.websockets.route("/", defaults={"rest": ""}, subprotocols=["v1", "v2"])
        @self.websockets.route("/<path:rest>", subprotocols=["v1", "v2"])
        def view(ws: Any, rest: str) -> None:
            self.look()
            assert ws.subprotocol in (None, "v1", "v2")
            ws.accept()

    def look(self) -> None:
        environ = dict(request.environ)
        environ.pop("CONTENT_LENGTH", None)  # the client's, as it is
        check_environ(environ)
        assert request.path.startswith("/")
        assert request.headers is not None and request.cookies is not None
        assert request.remote_addr is None or type(request.remote_addr) is str
        assert request.url and request.base_url

    def clean(self) -> None:
        lines, self.server.errors.lines = self.server.errors.lines, []
        assert lines == []


def test_handshakes() -> None:
    """A WebSocket scope of any shape is accepted or refused, once, and without an error."""
    with front() as server:
        site = Site(server)

        @profile(250)
        @given(spoilt(websocket_scopes, subprotocols=subprotocols))
        @example({"type": "websocket", "path": "/"})
        @example({"type": "websocket", "path": "", "headers": []})
        def fuzz(scope: Message) -> None:
            server.errors.lines.clear()
            said = server.handshake(site.asgi, scope)
            status = status_of(said)
            assert status in (101, 308, 400, 403, 404), said
            offered = [name.strip() for name in scope.get("subprotocols") or ()]
            if status == 101:
                chosen = said[0].get("subprotocol")
                assert chosen == next((n for n in offered if n in ("v1", "v2")), None)
            site.clean()

        fuzz()
        server.stop(site.asgi)
    assert_no_view_thread()


def test_requests() -> None:
    """A HTTP scope of any shape is answered, once and whole, and without an error."""
    with front() as server:
        site = Site(server)

        @profile(250)
        @given(spoilt(http_scopes), st.binary(max_size=20))
        @example({"type": "http", "method": "GET", "path": ""}, b"")
        def fuzz(scope: Message, body: bytes) -> None:
            server.errors.lines.clear()
            said = server.ask(
                site.asgi, scope, {"type": "http.request", "body": body, "more_body": False}
            )
            start, *bodies = said
            assert start["type"] == "http.response.start"
            assert start["status"] in (200, 301, 308, 400, 404, 405), said
            assert {message["type"] for message in bodies} == {"http.response.body"}
            assert [bool(message.get("more_body")) for message in bodies] == [
                *[True] * (len(bodies) - 1),
                False,
            ]
            for name, value in start["headers"]:
                assert type(name) is type(value) is bytes and name == name.lower()
            site.clean()

        fuzz()
        server.stop(site.asgi)


def assert_no_view_thread() -> None:
    for thread in threading.enumerate():
        if thread.name.startswith("flask-websockets-view"):
            thread.join(5)
            assert not thread.is_alive()
