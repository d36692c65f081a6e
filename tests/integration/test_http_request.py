"""What an application learns of an HTTP request: through real servers, gunicorn the reference."""

from __future__ import annotations

import contextlib
import hashlib
from io import BytesIO

import pytest
from werkzeug.datastructures import FileStorage
from werkzeug.test import encode_multipart

from . import http_servers
from .http_app import DATA
from .http_client import chunked, request

server = http_servers.server
key = http_servers.key
known_failures = http_servers.known_failures

SHA256 = hashlib.sha256(DATA).hexdigest()
CHUNKED = ("Transfer-Encoding", "chunked")
FORM = ("Content-Type", "application/x-www-form-urlencoded")

#: How an application may read wsgi.input, and the pieces that DATA comes in.
WAYS = {
    "read": 1,
    "read-n": -(-len(DATA) // 70_001),
    "readline": 65_536,
    "readline-n": 2 * 65_536,
    "readlines": 65_536,
    "iteration": 65_536,
}


def environ(server, target="/", headers=(), **options):
    """The environ's strings for a request below /wsgi/environ."""
    return server.get(f"/wsgi/environ{target}", headers, **options).json()


class TestBody:
    """Bodies reach the view whole, however they are framed and read."""

    def test_methods(self, server):
        """POST, PUT, PATCH and DELETE carry a body."""
        for method in ("POST", "PUT", "PATCH", "DELETE"):
            answer = server.ask(method, "/body", body=b"12345").json()
            assert (answer["method"], answer["length"]) == (method, 5)

    def test_no_body(self, server):
        """A POST without body, and one with Content-Length 0, reads as empty."""
        assert server.ask("POST", "/body", body=b"").json()["length"] == 0
        assert server.ask("POST", "/body").json()["length"] == 0

    def test_input_terminated(self, server):
        """wsgi.input_terminated is True: wsgi.input ends where the body does."""
        assert server.ask("POST", "/body", body=b"12345").json()["terminated"] is True

    def test_content_length(self, server):
        """The view sees the length, and none for a chunked body."""
        assert server.ask("POST", "/body", body=b"12345").json()["content_length"] == 5
        answer = server.ask("POST", "/body", [CHUNKED], chunked(b"12345"))
        assert answer.json()["content_length"] is None

    def test_large_body(self, server):
        """One MiB arrives unchanged."""
        answer = server.ask("POST", "/body", body=DATA).json()
        assert (answer["length"], answer["sha256"]) == (len(DATA), SHA256)

    def test_large_chunked_body(self, server):
        """One MiB in chunks of all sizes arrives unchanged."""
        parts, start = [], 0
        while start < len(DATA):
            parts.append(DATA[start : start + 1 + len(parts) * 37])
            start += len(parts[-1])
        answer = server.ask("POST", "/body", [CHUNKED], chunked(*parts)).json()
        assert (answer["length"], answer["sha256"]) == (len(DATA), SHA256)

    def test_chunk_extensions_and_trailers(self, server):
        """Neither becomes part of the body."""
        body = b"5;name=value\r\nhello\r\n0\r\nX-Trailer: yes\r\n\r\n"
        answer = server.ask("POST", "/body", [CHUNKED], body).json()
        assert answer["sha256"] == hashlib.sha256(b"hello").hexdigest()

    @pytest.mark.parametrize("way", WAYS)
    def test_ways_to_read(self, server, way):
        """Every method of wsgi.input gives the whole body, and nothing after its end."""
        answer = server.ask("POST", f"/wsgi/reading?{way}", body=DATA).json()
        assert answer == {
            "pieces": WAYS[way],
            "after": 0,
            "length": len(DATA),
            "sha256": SHA256,
        }

    @pytest.mark.parametrize("way", WAYS)
    def test_ways_to_read_chunks(self, server, way):
        """The same for a chunked body, whose lines the chunks cut."""
        parts = [DATA[start : start + 9_999] for start in range(0, len(DATA), 9_999)]
        answer = server.ask("POST", f"/wsgi/reading?{way}", [CHUNKED], chunked(*parts)).json()
        assert answer == {
            "pieces": WAYS[way],
            "after": 0,
            "length": len(DATA),
            "sha256": SHA256,
        }

    def test_form(self, server):
        """A form with Content-Length is parsed."""
        answer = server.ask("POST", "/form", [FORM], b"name=v%C3%A4lue&more=1")
        assert answer.json()["fields"] == {"name": "välue", "more": "1"}

    def test_chunked_form(self, server):
        """A form in chunks is parsed."""
        body = chunked(b"name=v%C3", b"%A4lue&mo", b"re=1")
        answer = server.ask("POST", "/form", [FORM, CHUNKED], body)
        assert answer.json()["fields"] == {"name": "välue", "more": "1"}

    @pytest.mark.parametrize("framing", ["length", "chunked"])
    def test_upload(self, server, framing):
        """A form with a file of one MiB, over the size at which Werkzeug spools to disk."""
        upload = FileStorage(stream=BytesIO(DATA), filename="data.txt", name="upload")
        boundary, body = encode_multipart({"name": "value", "upload": upload})
        headers = [("Content-Type", f"multipart/form-data; boundary={boundary}")]
        if framing == "chunked":
            headers.append(CHUNKED)
            body = chunked(body[:100_000], body[100_000:])
        answer = server.ask("POST", "/form", headers, body).json()
        assert answer["fields"] == {"name": "value"}
        assert answer["files"] == {"upload": {"length": len(DATA), "sha256": SHA256}}

    def test_unread_body_is_no_request(self, server):
        """What a view leaves unread is not taken for the connection's next request."""
        smuggled = request("GET", "/number/1")
        with server.connect() as client:
            assert client.ask("POST", "/unread", body=smuggled * 20).body == b"not read"
            try:
                answer = client.ask("GET", "/number/2")
            except ConnectionError:
                return  # closing the connection is right too
            assert answer.body == b"2"

    def test_request_behind_an_unread_body(self, server):
        """After a MiB that was not read the connection goes on or ends: it never hangs.

        Many rounds: it is a race between the end of the response and the rest of the body.
        """
        body = request("GET", "/number/1") * 30_000
        for _ in range(100):
            with server.connect() as client, contextlib.suppress(ConnectionError):
                assert client.ask("POST", "/unread", body=body).body == b"not read"
                assert client.ask("GET", "/number/2").body == b"2"

    def test_large_unread_body(self, server, key):
        """A view that reads nothing answers, though the upload fills every buffer on its way."""
        with server.connect() as client:
            client.send(request("POST", f"/unread/{key}", [("Content-Length", "50000000")]))
            server.wait_for(key, "entered")
            client.send_until_full(20_000_000)
            server.release(key)
            assert client.answer().body == b"not read"
            server.wait_for(key, "closed")
        assert server.get("/").body == b"hello"


class TestEarly:
    """The view starts, and may answer, before the upload ends."""

    def test_view_starts_early(self, server, key):
        """A view runs while its body is still on the way."""
        with server.connect() as client:
            client.send(request("POST", f"/early/{key}", [("Content-Length", "10")], b"12345"))
            server.wait_for(key, "entered")
            client.send(b"67890")
            assert client.answer().json()["length"] == 10

    def test_413_before_the_body(self, server, key):
        """The answer comes though no byte of the body was sent."""
        with server.connect() as client:
            client.send(request("POST", f"/limited/{key}", [("Content-Length", "10000000")]))
            assert client.answer().status == 413
        assert server.records(key) == []

    def test_413_during_the_body(self, server, key):
        """The answer comes though only a part of the body was sent."""
        with server.connect() as client:
            length = ("Content-Length", "10000000")
            client.send(request("POST", f"/limited/{key}", [length], b"x" * 2000))
            assert client.answer().status == 413
        assert server.records(key) == []

    def test_413_in_a_chunked_body(self, server, key):
        """A body without length is refused when it has grown too long."""
        with server.connect() as client:
            body = b"7d0\r\n" + b"x" * 2000 + b"\r\n"
            client.send(request("POST", f"/limited/{key}", [CHUNKED], body))
            assert client.answer().status == 413
        assert server.records(key) == []

    def test_100_when_the_view_reads(self, server):
        """A client that expects 100-continue gets it, and then its answer."""
        with server.connect() as client:
            headers = [("Expect", "100-continue"), ("Content-Length", "5")]
            client.send(request("POST", "/body", headers))
            assert client.interim() == 100
            client.send(b"12345")
            answer = client.answer()
            assert (answer.status, answer.json()["length"]) == (200, 5)

    def test_no_100_before_413(self, server, key):
        """A client whose upload is refused is not told to go on with it."""
        with server.connect() as client:
            headers = [("Expect", "100-continue"), ("Content-Length", "10000000")]
            client.send(request("POST", f"/limited/{key}", headers))
            answer = client.answer()
            assert (answer.interim, answer.status) == ([], 413)


class TestTarget:
    """Path and query keep their bytes."""

    def test_unicode(self, server):
        """Percent-encoded UTF-8 is text in the view."""
        assert server.get("/path/%E2%82%AC/caf%C3%A9").body.decode() == "€/café"

    def test_invalid_utf8(self, server):
        """Bytes that are no UTF-8 are kept, as PEP 3333 spells bytes."""
        assert environ(server, "/%ff%fe%E9")["PATH_INFO"] == "/wsgi/environ/\xff\xfe\xe9"

    def test_utf8_spelled_as_latin1(self, server):
        """PATH_INFO holds the bytes of UTF-8, each as a Latin-1 character."""
        assert environ(server, "/%C3%A9")["PATH_INFO"] == "/wsgi/environ/\xc3\xa9"

    @pytest.mark.parametrize(
        ("sent", "path"),
        [
            ("/a%2Fb", "/a/b"),
            ("/100%25", "/100%"),
            ("/%2541", "/%41"),
            ("/a%20b+c", "/a b+c"),
            ("/a//b/../c/.", "/a//b/../c/."),
            ("/%3Fno=query", "/?no=query"),
            ("/semi;colon=1", "/semi;colon=1"),
            ("/broken%zz%4", "/broken%zz%4"),
            ("/nul%00%0D%0A", "/nul\0\r\n"),
        ],
    )
    def test_decoded_once(self, server, sent, path):
        """Percent-encoding is undone once, and nothing else is."""
        assert environ(server, sent)["PATH_INFO"] == f"/wsgi/environ{path}"

    @pytest.mark.parametrize("name", ["RAW_URI", "REQUEST_URI"])
    def test_raw_target(self, server, name):
        """RAW_URI and REQUEST_URI are the target as it was sent."""
        target = "/a%2Fb%ff/c%20d?x=%2F&y=%C3%A9"
        assert environ(server, target)[name] == f"/wsgi/environ{target}"

    def test_query_string(self, server):
        """QUERY_STRING is what stood after the question mark, not decoded."""
        answer = server.get("/query?a=%C3%A9&b=%ff&c=1+2&a=?&&d").json()
        assert answer["raw"] == "a=%C3%A9&b=%ff&c=1+2&a=?&&d"
        assert answer["args"]["c"] == "1 2"

    def test_no_query_string(self, server):
        """Without a query QUERY_STRING is empty, but there."""
        assert environ(server)["QUERY_STRING"] == ""


class TestEnviron:
    """The environ of PEP 3333, and what gunicorn's users know beside it."""

    def test_addresses(self, server):
        """REMOTE_ADDR and REMOTE_PORT are the client's, SERVER_PORT the server's: all str."""
        with server.connect() as client:
            found = client.ask("GET", "/wsgi/environ").json()
            assert found["REMOTE_ADDR"] == "127.0.0.1"
            assert found["REMOTE_PORT"] == str(client.port)
        assert found["SERVER_NAME"] == "127.0.0.1"
        assert found["SERVER_PORT"] == str(server.port)

    def test_request_line(self, server):
        """Method, scheme and protocol."""
        found = environ(server)
        assert found["REQUEST_METHOD"] == "GET"
        assert found["SERVER_PROTOCOL"] == "HTTP/1.1"
        assert found["wsgi.url_scheme"] == "http"
        assert found["SCRIPT_NAME"] == ""
        assert environ(server, version="1.0")["SERVER_PROTOCOL"] == "HTTP/1.0"

    def test_content_type_and_length(self, server):
        """They stand without HTTP_, as in CGI."""
        headers = [("Content-Type", "text/odd; a=b")]
        found = server.ask("POST", "/wsgi/environ", headers, b"123").json()
        assert (found["CONTENT_TYPE"], found["CONTENT_LENGTH"]) == ("text/odd; a=b", "3")
        assert not {"HTTP_CONTENT_TYPE", "HTTP_CONTENT_LENGTH"} & set(found)

    def test_host(self, server):
        """request.url and request.host come from the Host header."""
        answer = server.get("/url?a=b", host="shop.example:8080").json()
        assert answer == {
            "url": "http://shop.example:8080/url?a=b",
            "host": "shop.example:8080",
            "root": "http://shop.example:8080/",
        }

    def test_no_host(self, server):
        """Without a Host header, as HTTP/1.0 allows, the server's own name stands in."""
        answer = server.get("/url", host=None, version="1.0").json()
        assert answer["host"] == f"127.0.0.1:{server.port}"

    @pytest.mark.parametrize("method", ["GET", "POST", "HEAD"])
    def test_wsgiref_validate(self, server, method):
        """wsgiref.validate accepts the environ, and the way the application is run."""
        body = b"body" if method == "POST" else None
        before = len(server.process.log())
        answer = server.ask(method, "/wsgi/validated/path", body=body)
        assert (answer.status, answer.clean) == (200, True)
        if method != "HEAD":
            assert answer.body == b"ok" + (body or b"")
        # It complains of an iterator without close() where nobody can catch it.
        assert "Error" not in server.process.log()[before:]


class TestHeaders:
    """Header fields keep their values, and cannot pose as others."""

    def test_underscore(self, server):
        """X_Forwarded_For does not become HTTP_X_FORWARDED_FOR (CVE-2015-0219)."""
        found = environ(server, headers=[("X_Forwarded_For", "6.6.6.6")])
        assert "HTTP_X_FORWARDED_FOR" not in found
        headers = [("X-Forwarded-For", "1.1.1.1"), ("X_Forwarded_For", "6.6.6.6")]
        assert environ(server, headers=headers)["HTTP_X_FORWARDED_FOR"] == "1.1.1.1"
        assert environ(server, headers=headers[::-1])["HTTP_X_FORWARDED_FOR"] == "1.1.1.1"

    def test_latin1(self, server):
        """A byte above 127 is one Latin-1 character."""
        assert environ(server, headers=[("X-Name", "caf\xe9")])["HTTP_X_NAME"] == "caf\xe9"

    def test_empty_value(self, server):
        """A header without value is there, and empty."""
        assert environ(server, headers=[("X-Name", "")])["HTTP_X_NAME"] == ""

    def test_white_space(self, server):
        """White space around a value goes, inside it stays."""
        assert environ(server, headers=[("X-Name", " \t a  b \t")])["HTTP_X_NAME"] == "a  b"

    def test_repeated(self, server):
        """Fields of one name join with a comma, in their order."""
        headers = [("X-Name", "1"), ("X-Other", "2"), ("x-name", "3")]
        assert environ(server, headers=headers)["HTTP_X_NAME"].replace(" ", "") == "1,3"

    def test_split_cookies(self, server):
        """Cookie fields join with a semicolon, as an HTTP/2 proxy may split them."""
        headers = [("Cookie", "a=1"), ("Cookie", "b=2")]
        assert server.get("/cookies", headers).json() == {"a": "1", "b": "2"}

    def test_cookies(self, server):
        """Cookies in one field."""
        assert server.get("/cookies", [("Cookie", "a=1; b=2")]).json() == {"a": "1", "b": "2"}

    def test_100_copies(self, server, key):
        """100 fields of one name pass."""
        answer = server.get(f"/wsgi/touch?{key}", [("X-Many", "1")] * 100)
        assert (answer.status, answer.body.replace(b" ", b"")) == (200, b",".join([b"1"] * 100))
        assert server.records(key) == ["called"]

    def test_101_copies(self, server, key):
        """More are refused, and the application is not called (CVE-2025-14550)."""
        answer = server.get(f"/wsgi/touch?{key}", [("X-Many", "1")] * 101)
        assert answer.status == (431 if server.is_reference else 400)
        assert server.records(key) == []
        assert server.get("/").body == b"hello"

    def test_101_names(self, server, key):
        """Ours limits the copies, not the number of fields."""
        headers = [(f"X-Name-{number}", "1") for number in range(101)]
        answer = server.get(f"/wsgi/touch?{key}", headers)
        assert answer.status == (431 if server.is_reference else 200)
