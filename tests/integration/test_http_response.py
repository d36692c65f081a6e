"""What a client gets of an HTTP response: through real servers, gunicorn the reference."""

from __future__ import annotations

import hashlib

import pytest

from . import http_servers
from .http_app import DATA
from .http_client import Client, request
from .http_servers import Server

server = http_servers.server
key = http_servers.key
known_failures = http_servers.known_failures

SHA256 = hashlib.sha256(DATA).hexdigest()


class TestFraming:
    """A client can tell a whole body from a part of one."""

    def test_large(self, server):
        """5 MiB with Content-Length arrive unchanged."""
        answer = server.get("/large")
        assert (answer.clean, answer.header("Content-Length")) == (True, str(5 * len(DATA)))
        assert answer.body == DATA * 5

    def test_large_stream(self, server):
        """One MiB from a generator arrives unchanged."""
        answer = server.get("/large-stream")
        assert (answer.clean, answer.header("Transfer-Encoding")) == (True, "chunked")
        assert answer.body == DATA

    def test_empty_body(self, server):
        """An empty response ends, and the connection goes on."""
        with server.connect() as client:
            for _ in range(2):
                answer = client.ask("GET", "/status/200")
                assert (answer.status, answer.body, answer.clean) == (200, b"", True)

    @pytest.mark.parametrize("target", ["/wsgi/empty_generator", "/wsgi/closing-empty"])
    def test_nothing_yielded(self, server, target):
        """An iterable without chunks is an empty body."""
        answer = server.get(target)
        assert (answer.status, answer.body, answer.clean) == (200, b"", True)

    def test_empty_chunk(self, server):
        """An empty chunk does not end the stream."""
        answer = server.get("/wsgi/closing-empty-chunk")
        assert (answer.body, answer.clean) == (b"abcdef", True)

    @pytest.mark.parametrize("name", ["long", "longer"])
    def test_longer_than_content_length(self, server, name):
        """What is over Content-Length is cut, and the connection goes on."""
        with server.connect() as client:
            answer = client.ask("GET", f"/wsgi/closing-{name}")
            assert (answer.body, answer.clean) == (b"abcdef", True)
            assert client.ask("GET", "/number/7").body == b"7"

    def test_shorter_than_content_length(self, server):
        """A body that is too short is not taken for a whole one."""
        answer = server.get("/wsgi/closing-short")
        assert (answer.header("Content-Length"), answer.clean) == ("6", False)

    @pytest.mark.parametrize("code", [204, 304])
    def test_no_body(self, server, code):
        """204 and 304 have no body: nothing stands before the connection's next response."""
        with server.connect() as client:
            for target in (f"/status/{code}", f"/wsgi/status-{code}"):
                answer = client.ask("GET", target)
                assert (answer.status, answer.header("Transfer-Encoding")) == (code, None)
                assert client.ask("GET", "/number/7").body == b"7"

    def test_no_content_length_with_204(self, server):
        """204 has no Content-Length either (RFC 9110 section 8.6)."""
        assert server.get("/status/204").header("Content-Length") is None

    @pytest.mark.parametrize("target", ["/", "/file", "/wsgi/closing-length"])
    def test_head(self, server, target):
        """HEAD has GET's Content-Length, and no body."""
        length = server.get(target).header("Content-Length")
        with server.connect() as client:
            answer = client.ask("HEAD", target)
            assert (answer.status, answer.header("Content-Length")) == (200, length)
            assert client.ask("GET", "/number/7").body == b"7"

    def test_head_of_a_stream(self, server):
        """HEAD of a response without Content-Length has no body either."""
        with server.connect() as client:
            assert client.ask("HEAD", "/wsgi/closing-chunked").status == 200
            assert client.ask("GET", "/number/7").body == b"7"

    def test_http_1_0(self, server):
        """A client of HTTP/1.0 is answered, and the connection closed."""
        with server.connect() as client:
            answer = client.ask("GET", "/", version="1.0")
            assert (answer.status, answer.body) == (200, b"hello")
            assert client.ended()

    def test_http_1_0_stream(self, server):
        """HTTP/1.0 knows no chunks: the end of the connection ends a stream."""
        answer = server.get("/wsgi/closing-chunked", version="1.0")
        assert answer.header("Transfer-Encoding") is None
        assert answer.body == b"abcdef"

    def test_hop_by_hop(self, server):
        """The connection is the server's: the application's fields about it are dropped."""
        with server.connect() as client:
            answer = client.ask("GET", "/wsgi/closing-hop-by-hop")
            assert (answer.body, answer.clean) == (b"abc", True)
            assert answer.header("Keep-Alive") is None
            assert client.ask("GET", "/number/7").body == b"7"


class TestStartAndWrite:
    """PEP 3333's start_response and write."""

    def test_write(self, server):
        """What was written comes before what was returned."""
        answer = server.get("/wsgi/written")
        assert (answer.body, answer.clean) == (b"written, written again, returned", True)

    def test_write_alone(self, server):
        """An application may write all and return nothing."""
        answer = server.get("/wsgi/only_written")
        assert (answer.body, answer.clean) == (b"written", True)

    def test_generator(self, server):
        """start_response may be called when the first chunk is asked for."""
        answer = server.get("/wsgi/generator")
        assert (answer.status, answer.body, answer.clean) == (200, b"generated", True)

    def test_restart(self, server):
        """Before the first byte, exc_info replaces status and headers."""
        answer = server.get("/wsgi/restart")
        assert (answer.status, answer.body) == (503, b"replaced")
        assert answer.all("X-Start") == ["second"]

    def test_restart_after_the_first_byte(self, server, key):
        """After the first byte, start_response raises the error, and the client sees a cut."""
        answer = server.get(f"/wsgi/late_restart?{key}")
        assert (answer.status, answer.clean) == (200, False)
        assert b"last" not in answer.body
        assert server.records(key) == ["raised"]

    def test_start_twice(self, server):
        """start_response twice without exc_info is an error of the application."""
        assert server.get("/wsgi/start_twice").status == 500

    def test_never_started(self, server):
        """So is a body without start_response."""
        assert server.get("/wsgi/never_started").status == 500

    def test_status_without_phrase(self, server):
        """A status of three digits alone."""
        answer = server.get("/wsgi/status-no-phrase")
        assert (answer.status, answer.body, answer.clean) == (200, b"body", True)

    def test_status_with_empty_phrase(self, server):
        """A status and a space."""
        answer = server.get("/wsgi/status-empty-phrase")
        assert (answer.status, answer.body, answer.clean) == (299, b"body", True)

    def test_unknown_status(self, server):
        """A status that no standard names."""
        answer = server.get("/wsgi/status-unknown")
        assert (answer.status, answer.body, answer.clean) == (299, b"body", True)


class TestErrors:
    """A client sees that something went wrong."""

    @pytest.mark.parametrize("target", ["/fails", "/wsgi/raises", "/wsgi/closing-error-first"])
    def test_before_the_start(self, server, target):
        """An error before the first byte is a 500."""
        answer = server.get(target)
        assert answer.status == 500
        assert b"Deliberate" not in answer.body

    def test_after_an_empty_chunk(self, server):
        """An empty chunk does not send the headers (PEP 3333): an error is still a 500."""
        assert server.get("/wsgi/closing-error-after-empty").status == 500

    @pytest.mark.parametrize(
        "target", ["/fails-in-stream", "/wsgi/closing-error", "/wsgi/closing-error-length"]
    )
    def test_in_mid_stream(self, server, target):
        """An error after the first byte cuts the body."""
        answer = server.get(target)
        assert (answer.status, answer.clean) == (200, False)

    def test_the_log_tells_it(self, server):
        """The error of the application is in the server's log, once."""
        before = len(server.process.log())
        server.get("/wsgi/raises")
        http_servers.wait_until(
            lambda: "Deliberate: before start_response" in server.process.log()[before:]
        )
        assert server.process.log()[before:].count("Deliberate: before start_response") == 1

    def test_others_go_on(self, server):
        """After errors the server serves."""
        for target in ("/fails", "/wsgi/raises", "/wsgi/closing-error", "/wsgi/start_twice"):
            server.get(target)
            assert server.get("/").body == b"hello"


class TestHeaders:
    """Header fields go out as the application gave them."""

    def test_order(self, server):
        """Fields of one name keep their order."""
        answer = server.get("/wsgi/repeated")
        assert answer.all("X-Many") == ["1", "3"]
        assert answer.all("X-Other") == ["0", "2"]

    def test_set_cookie(self, server):
        """Several cookies are several fields, in their order."""
        cookies = server.get("/set-cookies").all("Set-Cookie")
        assert [cookie.split("=")[0] for cookie in cookies] == ["zebra", "apple", "mango"]

    def test_latin1(self, server):
        """A Latin-1 character is one byte, both ways."""
        answer = server.get("/latin-1", [("X-Name", "caf\xe9 \xfc\xff")])
        assert (answer.status, answer.header("X-Back")) == (200, "caf\xe9 \xfc\xff")


class TestFlask:
    """What Flask's users do every day."""

    def test_redirect(self, server):
        """A redirect has its Location."""
        answer = server.get("/redirect")
        assert (answer.status, answer.header("Location")) == (302, "/elsewhere?a=b")

    def test_options(self, server):
        """Flask answers OPTIONS by itself."""
        answer = server.ask("OPTIONS", "/body")
        allowed = {method.strip() for method in (answer.header("Allow") or "").split(",")}
        assert (answer.status, answer.body, answer.clean) == (200, b"", True)
        assert allowed == {"OPTIONS", "POST", "PUT", "PATCH", "DELETE"}

    def test_not_found_and_not_allowed(self, server):
        """404 and 405 are Flask's."""
        assert server.get("/nowhere").status == 404
        assert server.ask("DELETE", "/").status == 405

    def test_session(self, server):
        """The session's cookie goes round."""
        answer = server.get("/session")
        for visit in ("2", "3"):
            cookie = (answer.header("Set-Cookie") or "").split(";")[0]
            answer = server.get("/session", [("Cookie", cookie)])
            assert answer.body.decode() == visit

    def test_after_this_request(self, server):
        """It changes this response, and no other."""
        assert server.get("/after").header("X-After") == "this request"
        assert server.get("/").header("X-After") is None

    def test_stream_with_context(self, server):
        """A generator sees its request to the end."""
        answer = server.get("/with-context?first=1&second=2")
        assert (answer.body, answer.clean) == (b"first=1;second=2;", True)


@pytest.mark.parametrize("target", ["/file", "/disk-file"])
class TestSendFile:
    """send_file, of an object and of a file on disk."""

    def test_whole(self, server, target):
        """A file arrives unchanged."""
        answer = server.get(target)
        assert (answer.status, answer.clean) == (200, True)
        assert hashlib.sha256(answer.body).hexdigest() == SHA256

    def test_range(self, server, target):
        """A range is a 206 with that part."""
        with server.connect() as client:
            answer = client.ask("GET", target, [("Range", "bytes=1000-1099")])
            assert (answer.status, answer.body) == (206, DATA[1000:1100])
            assert answer.header("Content-Range") == f"bytes 1000-1099/{len(DATA)}"
            answer = client.ask("GET", target, [("Range", "bytes=-5")])
            assert (answer.status, answer.body) == (206, DATA[-5:])

    def test_range_not_satisfiable(self, server, target):
        """A range behind the end is a 416."""
        answer = server.get(target, [("Range", f"bytes={len(DATA)}-")])
        assert answer.status == 416

    def test_not_modified(self, server, target):
        """A known ETag is a 304 without body."""
        etag = server.get(target).header("ETag") or ""
        with server.connect() as client:
            answer = client.ask("GET", target, [("If-None-Match", etag)])
            assert (answer.status, answer.body, answer.header("ETag")) == (304, b"", etag)
            assert client.ask("GET", "/number/7").body == b"7"


class TestClose:
    """close() of the iterable is called at the end, once, where the iterable was made."""

    def closed(self, server: Server, key: str) -> list[str]:
        """Wait for the record, and see that none follows it."""
        server.wait_for(key, "closed")
        server.get("/")
        records = server.records(key)
        assert (records.count("closed"), records[-1]) == (1, "closed")
        return records

    @pytest.mark.parametrize("name", ["length", "chunked", "empty"])
    def test_iterable(self, server, key, name):
        """With and without Content-Length, after the last chunk."""
        server.get(f"/wsgi/closing-{name}?{key}")
        assert self.closed(server, key).count("chunk") == (0 if name == "empty" else 2)

    @pytest.mark.parametrize("name", ["long", "longer", "short", "empty-chunk"])
    def test_odd_bodies(self, server, key, name):
        """Also where the body is not what the headers said."""
        server.get(f"/wsgi/closing-{name}?{key}")
        self.closed(server, key)

    @pytest.mark.parametrize("name", ["error", "error-length", "error-first"])
    def test_after_an_error(self, server, key, name):
        """Also where the iterable raised."""
        server.get(f"/wsgi/closing-{name}?{key}")
        assert "error" in self.closed(server, key)

    @pytest.mark.parametrize("name", ["length", "chunked"])
    def test_head(self, server, key, name):
        """Also for HEAD."""
        server.ask("HEAD", f"/wsgi/closing-{name}?{key}")
        self.closed(server, key)

    def test_before_the_next(self, server, key):
        """Each response of a connection gets its own."""
        with server.connect() as client:
            for _ in range(5):
                client.ask("GET", f"/wsgi/closing-length?{key}")
        server.wait_for(key, "closed")
        http_servers.wait_until(lambda: server.records(key).count("closed") == 5)

    def test_call_on_close(self, server, key):
        """Flask's call_on_close, after the teardown of the request."""
        assert server.get(f"/closing/plain/{key}").body == b"onetwo"
        assert self.closed(server, key) == ["teardown", "closed"]

    def test_call_on_close_on_head(self, server, key):
        """The same for HEAD."""
        server.ask("HEAD", f"/closing/plain/{key}")
        assert self.closed(server, key) == ["teardown", "closed"]

    def test_call_on_close_of_a_stream(self, server, key):
        """A generator ends first."""
        assert server.get(f"/closing/stream/{key}").body == b"onetwo"
        ended = ["ran to its end", "generator closed", "closed"]
        assert self.closed(server, key) == ["teardown", *ended]

    def test_call_on_close_after_an_error(self, server, key):
        """A generator that raises, too."""
        assert not server.get(f"/closing/error/{key}").clean
        assert self.closed(server, key) == ["teardown", "generator closed", "closed"]

    def test_send_file(self, server, key):
        """The file is closed, once: Werkzeug hands it to the server without call_on_close."""
        assert server.get(f"/closing/file/{key}").body == DATA
        server.wait_for(key, "file closed")
        server.get("/")
        assert server.records(key) == ["teardown", "file closed"]

    def test_send_file_on_head(self, server, key):
        """The file is closed though HEAD does not read it."""
        server.ask("HEAD", f"/closing/file/{key}")
        assert sorted(self.closed(server, key)[:-1]) == ["file closed", "teardown"]

    def test_stream_with_context(self, server, key):
        """The request's teardown comes when its generator has ended, before call_on_close."""
        assert server.get(f"/closing/context/{key}").body == b"onetwo"
        ended = ["ran to its end", "generator closed", "teardown", "closed"]
        assert self.closed(server, key)[-4:] == ended


class TestConnection:
    """One connection serves one request after the other."""

    def test_keep_alive(self, server):
        """50 requests on one connection are all answered."""
        with server.connect() as client:
            for number in range(50):
                answer = client.ask("GET", f"/number/{number}")
                assert (answer.status, answer.body) == (200, str(number).encode())

    def test_context_variables(self, server):
        """No request finds what another left in a context variable.

        More requests than threads: one thread at least serves two.
        """
        with server.connect() as client:
            found = [client.ask("GET", "/context-variable").body for _ in range(50)]
        assert set(found) == {b"0"}

    def test_context_variables_of_a_pipeline(self, server):
        """Nor where the requests come at once."""
        with server.connect() as client:
            client.send(request("GET", "/context-variable") * 50)
            assert {client.answer().body for _ in range(50)} == {b"0"}

    def test_pipelined(self, server):
        """Requests that come at once are answered in their order."""
        with server.connect() as client:
            numbers = [b"%d" % number for number in range(10)]
            client.send(b"".join(request("GET", f"/number/{int(number)}") for number in numbers))
            assert [client.answer().body for _ in numbers] == numbers

    def test_pipelined_bodies(self, server):
        """Each request of a pipeline has its own body."""
        with server.connect() as client:
            bodies = [b"x" * length for length in (0, 1, 1000, 70_000, 2)]
            client.send(b"".join(request("POST", "/body", body=body) for body in bodies))
            lengths = [client.answer().json()["length"] for _ in bodies]
            assert lengths == [len(body) for body in bodies]

    def test_connection_close(self, server):
        """A client that says close is answered, and the connection closed."""
        with server.connect() as client:
            answer = client.ask("GET", "/", [("Connection", "close")])
            assert (answer.body, answer.header("Connection")) == (b"hello", "close")
            assert client.ended()

    def test_request_in_pieces(self, server):
        """A request may come byte by byte."""
        with server.connect() as client:
            for byte in request("POST", "/body", body=b"12345"):
                client.send(bytes([byte]))
            assert client.answer().json()["length"] == 5

    def test_garbage(self, server):
        """What is no HTTP is refused or cut, and others go on."""
        with Client(server.port) as client:
            client.send(b"\x00\x01 no HTTP\r\n\r\n")
            try:
                assert client.answer().status == 400
            except ConnectionError:
                pass
        assert server.get("/").body == b"hello"
