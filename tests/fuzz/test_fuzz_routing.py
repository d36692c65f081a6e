"""Random rules and random paths: a handshake ends where Werkzeug's own router says.

The router is asked directly (``url_map.bind(...).match(websocket=True)``), without a request. What
it says, endpoint and arguments, redirect or error, must be what a client gets that comes through
ASGI; and plain HTTP must get what it says of plain HTTP, with 426 for a path that is a WebSocket's.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from urllib.parse import quote

from flask import Blueprint, Flask, Response, request
from hypothesis import example, given
from hypothesis import strategies as st
from werkzeug.exceptions import HTTPException, MethodNotAllowed
from werkzeug.routing import MapAdapter, RequestRedirect, WebsocketMismatch
from werkzeug.urls import iri_to_uri

from flask_websockets import WebSockets

from ..asgi_driver import Message
from ..models.profiles import profile
from .served import DENIAL, Front, front, status_of

UUID = "12345678-1234-5678-1234-567812345678"
HOST = "example.com"

# --- What is generated

#: Parts of rules, and what may stand for them in a path: what fits, and what does not.
PARTS: dict[str, list[str]] = {
    "a": ["a", "A", "b"],
    "b": ["b", ""],
    "é": ["é", "e"],
    "x y": ["x y", "x%20y"],
    "<int:?>": ["0", "7", "-1", "007", "x", "1.5"],
    "<int(min=3):?>": ["3", "2"],
    "<float:?>": ["1.5", "1", ".5"],
    "<string:?>": ["s", "€uro", "a", "with space", "0"],
    "<string(length=2):?>": ["ab", "abc"],
    "<path:?>": ["p", "p/q", "p//q", "p/", "a"],
    "<uuid:?>": [UUID, UUID[:-1], UUID.upper()],
    "<any(a, b):?>": ["a", "b", "c"],
    "pre<string:?>": ["prex", "pre", "x"],
}


@dataclass
class Spec:
    """One rule."""

    parts: tuple[str, ...]
    trailing: bool
    websocket: bool
    on_blueprint: bool = False
    methods: tuple[str, ...] = ("GET",)
    strict_slashes: bool | None = None
    defaults: bool = False
    host: str | None = None
    subdomain: str | None = None

    @property
    def rule(self) -> str:
        named = [part.replace("?", f"v{number}") for number, part in enumerate(self.parts)]
        return "/" + "/".join(named) + ("/" if self.trailing and named else "")

    def options(self, matching: str) -> dict[str, Any]:
        options: dict[str, Any] = {}
        if self.strict_slashes is not None:
            options["strict_slashes"] = self.strict_slashes
        if self.defaults:
            options["defaults"] = {"page": 1}
        if matching == "host" and self.host is not None:
            options["host"] = self.host
        if matching == "subdomain" and self.subdomain is not None:
            options["subdomain"] = self.subdomain
        return options


specs = st.builds(
    Spec,
    parts=st.lists(st.sampled_from(list(PARTS)), max_size=3).map(tuple),
    trailing=st.booleans(),
    websocket=st.sampled_from([True, True, False]),
    on_blueprint=st.booleans(),
    methods=st.sampled_from([("GET",), ("POST",), ("GET", "POST")]),
    strict_slashes=st.sampled_from([None, None, True, False]),
    defaults=st.sampled_from([False, False, True]),
    host=st.sampled_from([HOST, f"<sub>.{HOST}", f"chat.{HOST}"]),
    subdomain=st.sampled_from([None, "chat", "<sub>"]),
)


@dataclass
class Site:
    """One application's rules, and how it matches hosts."""

    specs: list[Spec]
    matching: str = ""
    prefix: str | None = None
    merge_slashes: bool = True
    redirect_defaults: bool = True
    mount: str = ""
    paths: list[tuple[str, str, str]] = field(default_factory=list)  # path, query, host


@st.composite
def sites(draw: st.DrawFn) -> Site:
    site = Site(
        draw(st.lists(specs, min_size=1, max_size=6)),
        draw(st.sampled_from(["", "", "host", "subdomain"])),
        draw(st.sampled_from([None, "/bp"])),
        draw(st.sampled_from([True, True, False])),
        draw(st.booleans()),
        draw(st.sampled_from(["", "", "/mnt", "/é"])),
    )
    for _ in range(draw(st.integers(1, 5))):
        spec = draw(st.sampled_from(site.specs))
        filled = [draw(st.sampled_from(PARTS[part])) for part in spec.parts]
        if draw(st.booleans()):
            filled = [PARTS[part][0] for part in spec.parts]
        path = "/" + "/".join(filled)
        if spec.on_blueprint and site.prefix and draw(st.integers(0, 4)):
            path = site.prefix + (path if path != "/" or spec.rule == "/" else "")
        path += draw(st.sampled_from(["", "/", "/", "//", "/1", "?"])).replace("?", "x")
        if not draw(st.integers(0, 9)):
            path = path.replace("/", "//", 1)
        query = draw(st.sampled_from(["", "", "q=1", "page=1&é"]))
        host = draw(st.sampled_from([HOST, f"chat.{HOST}", f"other.{HOST}"]))
        site.paths.append((path, query, host if site.matching else HOST))
    return site


# --- The application, and the router asked directly


class Served:
    """The application of a site."""

    def __init__(self, site: Site, server: Front) -> None:
        self.site = site
        self.server = server
        self.app = Flask("routing", static_folder=None, **self._options())
        if site.matching == "subdomain":
            self.app.config["SERVER_NAME"] = HOST
        self.app.url_map.merge_slashes = site.merge_slashes
        self.app.url_map.redirect_defaults = site.redirect_defaults
        self.websockets = WebSockets(self.app)
        blueprint = Blueprint("bp", __name__, url_prefix=site.prefix)
        self.reached: list[tuple[str | None, Any]] = []
        for number, spec in enumerate(site.specs):
            target = blueprint if spec.on_blueprint else None
            options = spec.options(site.matching)
            if spec.websocket:
                self.websockets.route(
                    spec.rule, endpoint=f"e{number}", blueprint=target, **options
                )(self.view)
            else:
                (target or self.app).add_url_rule(
                    spec.rule, f"e{number}", self.page, methods=spec.methods, **options
                )
        self.app.register_blueprint(blueprint)
        self.asgi = self.websockets.asgi_app()

    def _options(self) -> dict[str, Any]:
        if not self.site.matching:
            return {}
        return {f"{self.site.matching}_matching": True}

    def view(self, ws: Any, **arguments: Any) -> None:
        assert request.view_args == arguments
        self.reached.append((request.endpoint, arguments))
        ws.accept()

    def page(self, **arguments: Any) -> Response:
        self.reached.append((request.endpoint, arguments))
        return Response(json.dumps([request.endpoint]))

    def adapter(self, host: str, path: str, query: str, scheme: str) -> MapAdapter:
        server_name, subdomain = host, None
        if self.site.matching == "subdomain":
            server_name = HOST
            subdomain = host[: -len(HOST)].rstrip(".")
        return self.app.url_map.bind(
            server_name,
            script_name=self.site.mount or "/",
            subdomain=subdomain,
            url_scheme=scheme,
            path_info=path,
            query_args=query,
        )

    def scope(self, kind: str, path: str, query: str, host: str, **more: Any) -> Message:
        full = self.site.mount + path
        return {
            "type": kind,
            "path": full,
            "raw_path": quote(full).encode(),
            "root_path": self.site.mount,
            "query_string": quote(query, safe="=&").encode(),
            "headers": [(b"host", host.encode())],
            "extensions": DENIAL,
            **more,
        }

    # -- both sides --------------------------------------------------------------------------------

    def compare_handshake(self, path: str, query: str, host: str) -> None:
        adapter = self.adapter(host, path, quote(query, safe="=&"), "ws")
        expected = outcome(partial(adapter.match, method="GET", websocket=True))
        self.reached.clear()
        said = self.server.handshake(self.asgi, self.scope("websocket", path, query, host))
        assert self.found(status_of(said), said[0]) == expected

    def compare_request(self, method: str, path: str, query: str, host: str) -> None:
        adapter = self.adapter(host, path, quote(query, safe="=&"), "http")

        def match() -> Any:
            try:
                return adapter.match(method=method, websocket=False)
            except MethodNotAllowed as error:
                try:
                    adapter.match(method="GET", websocket=False)
                except WebsocketMismatch:
                    raise  # the path is a WebSocket's
                except HTTPException:
                    pass
                raise error

        expected = outcome(match, mismatch=426)
        self.reached.clear()
        said = self.server.ask(
            self.asgi,
            self.scope("http", path, query, host, method=method),
            {"type": "http.request"},
        )
        status = said[0]["status"]
        assert self.found(101 if status == 200 else status, said[0]) == expected
        if status == 426:
            assert dict(said[0]["headers"])[b"upgrade"] == b"websocket"

    def found(self, status: int, start: Message) -> Any:
        if status == 101:
            [reached] = self.reached
            return reached
        assert self.reached == []
        if status == 308:
            return status, dict(start["headers"])[b"location"].decode()
        return status


def outcome(match: Callable[[], Any], mismatch: int = 400) -> Any:
    """What the router says: endpoint and arguments, a redirect's target, or a status."""
    try:
        return tuple(match())
    except RequestRedirect as redirect:
        return redirect.code, iri_to_uri(redirect.new_url)  # as Werkzeug's responses do
    except WebsocketMismatch:
        return mismatch
    except HTTPException as error:
        return error.code


def site(*specs: Spec, paths: list[str], **options: Any) -> Site:
    return Site(list(specs), paths=[(path, "", HOST) for path in paths], **options)


def test_a_handshake_ends_where_the_router_says() -> None:
    """Endpoint, arguments, redirects and errors, for WebSockets and for plain HTTP."""
    with front() as server:

        @profile(150)
        @given(sites())
        @example(site(Spec(("a",), True, True), paths=["/a", "/a/", "//a", "/a//"]))
        @example(site(Spec(("a",), False, True), Spec(("a",), False, False), paths=["/a", "/a/"]))
        @example(
            site(Spec((), False, True), Spec((), False, False, methods=("POST",)), paths=["/"])
        )
        @example(site(Spec(("<path:?>",), True, True), paths=["/é", "/x//y"], mount="/é"))
        def fuzz(site: Site) -> None:
            served = Served(site, server)
            for path, query, host in site.paths:
                served.compare_handshake(path, query, host)
                for method in ("GET", "POST"):
                    served.compare_request(method, path, query, host)
            server.stop(served.asgi)
            lines, server.errors.lines = server.errors.lines, []
            assert lines == []

        fuzz()


def test_most_outcomes_are_met() -> None:
    """The sites are worth asking: each outcome of the router comes up."""
    met: dict[Any, int] = {}
    with front() as server:

        @profile(60)
        @given(sites())
        def fuzz(site: Site) -> None:
            served = Served(site, server)
            for path, query, host in site.paths:
                adapter = served.adapter(host, path, query, "ws")
                found = outcome(partial(adapter.match, method="GET", websocket=True))
                kind = found if isinstance(found, int) else found[0] == 308 or "match"
                met[kind] = met.get(kind, 0) + 1

        fuzz()
    assert min(met.get("match", 0), met.get(404, 0), met.get(True, 0), met.get(400, 0)) > 3, met
