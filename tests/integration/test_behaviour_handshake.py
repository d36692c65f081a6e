"""The behaviour suite, the handshake: routing, URLs, subprotocols, origins."""

from __future__ import annotations

import pytest

from . import behaviour_drivers

pytest_generate_tests = behaviour_drivers.pytest_generate_tests
serving = behaviour_drivers.serving
driver = behaviour_drivers.driver
kind = behaviour_drivers.kind


class TestRouting:
    """WebSocket routes are Flask routes."""

    @pytest.mark.parametrize("path", ["/nowhere", "/sync", "/sync/room/blue/x", "/async/pages/x"])
    def test_unknown_path(self, driver, path):
        """A handshake for a path that nobody serves is a 404, by Flask."""
        answer = driver.rejected(path)
        assert answer.status == driver.status(404)
        if driver.denial_responses:
            assert answer.headers.one("X-After") == "seen"

    def test_websocket_to_an_http_path(self, driver):
        """A handshake for a path with HTTP views only is a 400."""
        assert driver.rejected("/").status == driver.status(400)

    def test_http_to_a_websocket_path(self, driver, kind):
        """A plain GET of a path with a WebSocket view only is a 426 that says: upgrade."""
        answer = driver.get(f"/{kind}/echo")
        assert answer.status == 426
        assert answer.headers.one("Upgrade").lower() == "websocket"

    def test_unknown_http_path(self, driver):
        """A plain GET of a path that nobody serves stays a 404."""
        assert driver.get("/sync/nowhere").status == 404

    @pytest.mark.parametrize(
        ("path", "arguments"),
        [
            ("/room/blue/7", ["blue", 7]),
            ("/room/a%20b/0", ["a b", 0]),
            ("/room/bl%C3%BC/7", ["blü", 7]),
            ("/room/100%25/7", ["100%", 7]),
            ("/files/a/b/c.txt", "a/b/c.txt"),
        ],
    )
    def test_converters(self, driver, kind, path, arguments):
        """The rule's variables come converted and decoded."""
        with driver.connect(f"/{kind}{path}") as ws:
            assert ws.receive_json() == arguments

    def test_defaults(self, driver, kind):
        """defaults= gives what a second route of the view leaves out."""
        with driver.connect(f"/{kind}/pages") as ws:
            assert ws.receive_json() == 1
        with driver.connect(f"/{kind}/pages/7") as ws:
            assert ws.receive_json() == 7

    @pytest.mark.parametrize(("path", "view"), [("in", ""), ("older", "_too")])
    def test_blueprint(self, driver, kind, path, view):
        """blueprint=, and the older bp=, give the blueprint's prefix, name and hooks."""
        endpoint = f"blueprint.{kind}_in_a_blueprint{view}"
        with driver.connect(f"/blueprint/{kind}/{path}") as ws:
            assert ws.receive_json() == ["blueprint", endpoint]
        assert driver.note("blueprint's before_request")["endpoint"] == endpoint


class TestURLs:
    """``url_for`` knows what is a WebSocket."""

    @pytest.mark.parametrize(
        ("host", "headers", "seen"),
        [
            ("example.com", {}, "://example.com"),
            ("example.com:8000", {}, "://example.com:8000"),
            (
                "internal:5000",
                {"X-Forwarded-Proto": "https", "X-Forwarded-Host": "app.example.com"},
                "s://app.example.com",
            ),
        ],
    )
    @pytest.mark.parametrize("where", ["sync", "async", "http"])
    def test_url_for(self, driver, where, host, headers, seen):
        """ws:// for WebSocket endpoints and http:// for others; wss:// and https:// behind TLS."""
        expected = {
            "sync": f"ws{seen}/sync/room/a%20b/7",
            "async": f"ws{seen}/async/room/a%20b/7",
            "blueprint": f"ws{seen}/blueprint/sync/in",
            "other": f"ws{seen}/sync/other-name",
            "http": f"http{seen}/",
        }
        if where == "http":
            assert driver.get("/urls", headers=headers, host=host).json() == expected
            return
        with driver.connect(f"/{where}/urls", headers=headers, host=host) as ws:
            assert ws.receive_json() == expected


class TestSubprotocols:
    """The route supports v2 and v1, and prefers what the client prefers."""

    @pytest.mark.parametrize(
        ("offered", "chosen"),
        [
            (["v1"], "v1"),
            (["v2", "v1"], "v2"),
            (["v1", "v2"], "v1"),
            (["v9", "v2", "v1"], "v2"),
            (["v9"], None),
            (["V1"], None),
            ([], None),
        ],
    )
    @pytest.mark.parametrize("how", ["?", "?accept=plain"])
    def test_negotiation(self, driver, kind, offered, chosen, how):
        """The first of the client's that the route supports; none in common, none chosen."""
        with driver.connect(f"/{kind}/subprotocols{how}", subprotocols=offered) as ws:
            assert ws.subprotocol == chosen
            # ws.subprotocol tells it before the accept as well as after it.
            assert ws.receive_json() == [chosen, chosen]

    @pytest.mark.parametrize("chosen", ["v1", "v2", "v9"])
    def test_explicit(self, driver, kind, chosen):
        """accept(subprotocol) takes any that the client offered."""
        path = f"/{kind}/subprotocols?accept={chosen}"
        with driver.connect(path, subprotocols=["v9", "v2", "v1"]) as ws:
            assert ws.subprotocol == chosen
            assert ws.receive_json() == ["v2", chosen]

    def test_route_without(self, driver, kind):
        """A route that names none chooses none."""
        with driver.connect(f"/{kind}/echo", subprotocols=["v1"]) as ws:
            assert ws.subprotocol is None
            ws.still_works()


PROXY = {"X-Forwarded-Proto": "https", "X-Forwarded-Host": "app.proxied.test"}

#: Host, Origin, more headers.
SAME_ORIGIN = {
    "no Origin": ("example.com", None, {}),
    "same": ("example.com", "http://example.com", {}),
    "same with a port": ("example.com:8000", "http://example.com:8000", {}),
    "upper case": ("example.com", "http://EXAMPLE.Com", {}),
    "the default port is named": ("example.com", "http://example.com:80", {}),
    "the default port is left out": ("example.com:80", "http://example.com", {}),
    "TLS ended before the server": ("example.com", "https://example.com", {}),
    "TLS ended, port named": ("example.com", "https://example.com:443", {}),
    "IPv6": ("[::1]:8000", "http://[::1]:8000", {}),
    "behind ProxyFix": ("internal:5000", "https://app.proxied.test", PROXY),
    "behind ProxyFix, port named": ("internal:5000", "https://app.proxied.test:443", PROXY),
    "allowed": ("example.com", "https://app.allowed.test", {}),
    "allowed, upper case": ("example.com", "https://APP.allowed.test", {}),
    "allowed, port named": ("example.com", "https://app.allowed.test:443", {}),
    "wildcard": ("example.com", "https://a.wild.test", {}),
    "wildcard, deep": ("example.com", "https://a.b.wild.test", {}),
}
FOREIGN = {
    "another host": ("example.com", "http://evil.test", {}),
    "another port": ("example.com:8000", "http://example.com:8001", {}),
    "no port": ("example.com:8000", "http://example.com", {}),
    "a port": ("example.com", "http://example.com:8000", {}),
    "https names port 443": ("example.com:8000", "https://example.com", {}),
    "a subdomain": ("example.com", "http://www.example.com", {}),
    "a longer host": ("example.com", "http://example.com.evil.test", {}),
    "a host in a user": ("example.com", "http://example.com@evil.test", {}),
    "null": ("example.com", "null", {}),
    "a file": ("example.com", "file://", {}),
    "no origin": ("example.com", "example.com", {}),
    "an extension": ("example.com", "moz-extension://example.com", {}),
    "the host behind ProxyFix": ("internal:5000", "http://internal:5000", PROXY),
    "allowed with another scheme": ("example.com", "http://app.allowed.test", {}),
    "allowed with another port": ("example.com", "https://app.allowed.test:8443", {}),
    "allowed as a part": ("example.com", "https://evil-app.allowed.test", {}),
    "wildcard without a subdomain": ("example.com", "https://wild.test", {}),
    "wildcard as a part": ("example.com", "https://evilwild.test", {}),
    "another route's": ("example.com", "https://partner.test", {}),
}


class TestOrigin:
    """Pages of other origins are kept out, unless the application says otherwise."""

    @pytest.mark.parametrize("name", SAME_ORIGIN)
    def test_may(self, driver, kind, name):
        """The same origin, what is allowed, and a client that is no browser."""
        host, origin, headers = SAME_ORIGIN[name]
        path = f"/{kind}/echo"
        with driver.connect(path, host=host, origin=origin, headers=headers) as ws:
            ws.still_works()
        assert driver.warnings() == []

    @pytest.mark.parametrize("name", FOREIGN)
    def test_may_not(self, driver, kind, name):
        """A foreign origin is a 403, and the log says what to set, at most once a minute."""
        host, origin, headers = FOREIGN[name]
        answer = driver.rejected(f"/{kind}/thread", host=host, origin=origin, headers=headers)
        assert answer.status == 403
        warnings = driver.warnings()
        assert len(warnings) <= 1
        for warning in warnings:
            assert "WEBSOCKETS_ALLOWED_ORIGINS" in warning
            assert "origins=" in warning
        assert driver.notes("view") == [], "the view does not run"

    @pytest.mark.parametrize("origin", ["https://anywhere.test", "null", "http://example.com:1"])
    def test_open_route(self, driver, kind, origin):
        """origins=["*"] lets every page in."""
        with driver.connect(f"/{kind}/open", host="example.com", origin=origin) as ws:
            assert ws.receive() == "in"

    def test_route(self, driver, kind):
        """origins= widens one route: the pages named, and the application's own as ever."""
        for origin in ("https://partner.test", "http://example.com"):
            with driver.connect(f"/{kind}/partner", host="example.com", origin=origin) as ws:
                assert ws.receive() == "in"
        answer = driver.rejected(
            f"/{kind}/partner", host="example.com", origin="https://stranger.test"
        )
        assert answer.status == 403
