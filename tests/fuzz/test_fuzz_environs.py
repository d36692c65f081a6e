"""A WSGI server's environs: the application with the extension answers as Flask does without it.

But for one thing: what Flask would have a WebSocket view do over plain WSGI is a 426.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from io import BytesIO
from typing import Any

from flask import Flask, Response, request
from hypothesis import example, given
from hypothesis import strategies as st
from werkzeug.test import run_wsgi_app

from flask_websockets import WebSockets
from flask_websockets.environ import WEBSOCKET

from ..models.profiles import profile

Answer = tuple[str, list[tuple[str, str]], bytes]


def make(with_extension: bool) -> Flask:
    """The same application, with WebSocket views of ours, or with Flask's own rules for them."""
    app = Flask("environs")
    app.config["PROPAGATE_EXCEPTIONS"] = False

    @app.route("/", methods=["GET", "POST"])
    @app.route("/both", methods=["GET", "PUT"])
    @app.route("/<int:number>/")
    def page(number: int = 0) -> Response:
        body = request.get_data() if request.content_length is not None else b""
        return Response(json.dumps([number, request.path, request.method, body.decode("latin-1")]))

    rules = ["/ws", "/both", "/<name>/slash/"]
    if with_extension:
        websockets = WebSockets(app)
        for number, rule in enumerate(rules):
            websockets.route(rule, endpoint=f"ws{number}")(_never)
    else:
        for number, rule in enumerate(rules):
            app.add_url_rule(rule, f"ws{number}", _is_websocket, websocket=True)
    return app


def _never(ws: Any, name: str = "") -> None:
    raise AssertionError("there is no WebSocket over plain WSGI")


def _is_websocket(name: str = "") -> Response:
    return Response(status=299)


headers = st.fixed_dictionaries(
    {},
    optional={
        "HTTP_UPGRADE": st.sampled_from(
            ["websocket", "WebSocket", "h2c", "", "websocket, x", "\xff"]
        ),
        "HTTP_CONNECTION": st.sampled_from(
            ["Upgrade", "upgrade", "keep-alive, Upgrade", "close", "", "\xff", ","]
        ),
        "HTTP_SEC_WEBSOCKET_KEY": st.sampled_from(["dGhlIHNhbXBsZSBub25jZQ==", "", "x", "\xff"]),
        "HTTP_SEC_WEBSOCKET_VERSION": st.sampled_from(["13", "8", "", "x"]),
        "HTTP_SEC_WEBSOCKET_PROTOCOL": st.text(max_size=5),
        "HTTP_ORIGIN": st.sampled_from(["http://localhost", "null", "http://evil", "\xff", ""]),
        "HTTP_HOST": st.sampled_from(["localhost", "localhost:80", "", "a b", "[::1", "\xff", "*"]),
        "HTTP_COOKIE": st.text(st.characters(max_codepoint=255), max_size=8),
        "CONTENT_LENGTH": st.sampled_from(["", "0", "3", "-1", "x", "99999999999999999999"]),
        "CONTENT_TYPE": st.sampled_from(["", "text/plain", "application/json", "\xff", ";"]),
        "HTTP_TRANSFER_ENCODING": st.sampled_from(["chunked", "gzip", ""]),
    },
)
wsgi_text = st.text(st.characters(max_codepoint=255, exclude_characters="\r\n"), max_size=6)
variables = st.fixed_dictionaries(
    {
        "REQUEST_METHOD": st.sampled_from(["GET", "POST", "PUT", "HEAD", "OPTIONS", "BREW", "get"]),
        "PATH_INFO": st.one_of(
            st.sampled_from(
                [
                    *("/", "", "/ws", "/ws/", "//ws", "/both", "/both/", "/1", "/1/", "/none"),
                    *("/a/slash", "/a/slash/", "/\xc3\xa9/slash", "/\xff/slash/", "/\0/slash"),
                ]
            ),
            wsgi_text.map("/{}".format),
        ),
    },
    optional={
        "SCRIPT_NAME": st.sampled_from(["", "/mnt", "/\xc3\xa9"]),
        "QUERY_STRING": wsgi_text,
        "SERVER_PROTOCOL": st.sampled_from(["HTTP/1.0", "HTTP/1.1", "HTTP/2", ""]),
        "REMOTE_ADDR": st.sampled_from(["", "::1", "127.0.0.1", "unix:"]),
        "REMOTE_PORT": st.sampled_from(["", "1", "x"]),
        "wsgi.url_scheme": st.sampled_from(["http", "https"]),
        "wsgi.input": st.binary(max_size=5).map(BytesIO),
        "wsgi.multithread": st.booleans(),
        "werkzeug.socket": st.none(),
        "REQUEST_URI": wsgi_text,
        "RAW_URI": wsgi_text,
    },
)


def ask(app: Flask, environ: dict[str, Any]) -> Answer:
    full = {
        "SERVER_NAME": "localhost",
        "SERVER_PORT": "80",
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": "http",
        "wsgi.input": BytesIO(),
        "wsgi.errors": None,
        "wsgi.multithread": True,
        "wsgi.multiprocess": False,
        "wsgi.run_once": False,
        **environ,
    }
    if "wsgi.input" in environ:
        full["wsgi.input"] = BytesIO(environ["wsgi.input"].getvalue())
    chunks: Iterable[bytes]
    chunks, status, headers = run_wsgi_app(app.wsgi_app, full, buffered=True)
    assert WEBSOCKET not in full
    return status, sorted(headers.to_wsgi_list()), b"".join(chunks)


@profile(400)
@given(st.builds(lambda one, other: {**one, **other}, variables, headers))
@example({"REQUEST_METHOD": "GET", "PATH_INFO": "/ws"})
@example({"REQUEST_METHOD": "POST", "PATH_INFO": "/both"})
@example(
    {
        "REQUEST_METHOD": "GET",
        "PATH_INFO": "/ws",
        "HTTP_CONNECTION": "Upgrade",
        "HTTP_UPGRADE": "websocket",
    }
)
def test_an_answer_is_flasks_own(environ: dict[str, Any]) -> None:
    """Status, headers and body are the same; a WebSocket view is a 426 with its Upgrade."""
    expected, found = ask(PLAIN, environ), ask(OURS, environ)
    if expected[0].startswith("299") or _is_mismatch(environ):
        assert found[0].startswith("426")
        assert ("Upgrade", "websocket") in found[1]
    else:
        assert found == expected


def _is_mismatch(environ: dict[str, Any]) -> bool:
    """Whether the path is a WebSocket's alone, and the request is plain HTTP."""
    from werkzeug.exceptions import HTTPException
    from werkzeug.routing import WebsocketMismatch

    upgrades = (
        "upgrade" in environ.get("HTTP_CONNECTION", "").lower()
        and environ.get("HTTP_UPGRADE", "").lower() == "websocket"
    )
    if upgrades:
        return False
    path = environ["PATH_INFO"].encode("latin-1").decode("utf-8", "replace")
    try:
        PLAIN.url_map.bind("localhost", path_info=path or "/").match(method="GET", websocket=False)
    except WebsocketMismatch:
        return True
    except HTTPException:
        pass
    return False


PLAIN, OURS = make(False), make(True)
