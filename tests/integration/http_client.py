"""An HTTP/1.1 client made of a socket: it sends what it is told, and says how a body ended."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

#: Seconds that one read or write may take.
TIMEOUT = 15.0

Headers = Iterable[tuple[str, str]]


@dataclass
class Answer:
    """One response, its header fields in their order."""

    version: str
    status: int
    headers: list[tuple[str, str]]
    #: The statuses of the 1xx responses that came before it.
    interim: list[int] = field(default_factory=list)
    body: bytes = b""
    #: Whether the framing says that the body is whole.
    clean: bool = False

    def all(self, name: str) -> list[str]:
        return [value for key, value in self.headers if key.lower() == name.lower()]

    def header(self, name: str) -> str | None:
        """The value of a header; None if it is absent. One that comes twice is an error."""
        values = self.all(name)
        assert len(values) < 2, f"{name} came {len(values)} times"
        return values[0] if values else None

    def json(self) -> Any:
        return json.loads(self.body)


def request(
    method: str,
    target: str,
    headers: Headers = (),
    body: bytes | None = None,
    *,
    host: str | None = "localhost",
    version: str = "1.1",
) -> bytes:
    """The bytes of a request; Content-Length only with a body that has no framing of its own."""
    fields = list(headers)
    framed = {"content-length", "transfer-encoding"} & {name.lower() for name, _ in fields}
    if host is not None:
        fields.insert(0, ("Host", host))
    if body is not None and not framed:
        fields.append(("Content-Length", str(len(body))))
    lines = [f"{method} {target} HTTP/{version}", *(f"{name}: {value}" for name, value in fields)]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + (body or b"")


def chunked(*parts: bytes) -> bytes:
    """A chunked body, one chunk for each part."""
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (*parts, b""))


class Client:
    """One connection."""

    def __init__(self, port: int, *, receive_buffer: int | None = None) -> None:
        self.socket = socket.socket()
        self.socket.settimeout(TIMEOUT)
        if receive_buffer is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.connect(("127.0.0.1", port))
        self._received = bytearray()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.socket.close()

    @property
    def port(self) -> int:
        port: int = self.socket.getsockname()[1]
        return port

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def send_until_full(self, length: int) -> None:
        """Send *length* bytes, or as many as the server's side takes without reading."""
        self.socket.settimeout(0.5)
        try:
            while length > 0:
                length -= self.socket.send(b"x" * min(length, 65_536))
        except TimeoutError:
            pass  # nobody takes more
        self.socket.settimeout(TIMEOUT)

    def reset(self) -> None:
        """Leave with a TCP reset, as a process that is killed with unread data does."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def leave(self) -> None:
        """Leave as a browser does whose tab is closed."""
        self.socket.close()

    def ask(
        self,
        method: str,
        target: str,
        headers: Headers = (),
        body: bytes | None = None,
        **options: Any,
    ) -> Answer:
        """Send a request and read the answer."""
        self.send(request(method, target, headers, body, **options))
        return self.answer(method)

    def answer(self, method: str = "GET") -> Answer:
        """Read one response to its end."""
        answer = self.head()
        answer.body = b"".join(self.pieces(answer, method))
        return answer

    def head(self) -> Answer:
        """Read the head of a response, and leave its body."""
        interim = []
        while True:
            answer = self._one_head()
            if answer.status >= 200:
                answer.interim = interim
                return answer
            interim.append(answer.status)

    def interim(self) -> int:
        """Read one 1xx response and return its status."""
        answer = self._one_head()
        assert answer.status < 200
        return answer.status

    def pieces(self, answer: Answer, method: str = "GET") -> Iterator[bytes]:
        """The body as it comes; afterwards ``answer.clean`` says whether it is whole."""
        try:
            if method == "HEAD" or answer.status in (204, 304):
                pass
            elif answer.header("Transfer-Encoding") == "chunked":
                yield from self._chunks()
            elif (length := answer.header("Content-Length")) is not None:
                yield from self._exactly(int(length))
            else:
                while data := self._receive():
                    yield data
            answer.clean = True
        except ConnectionError:
            pass  # cut: the body is not whole

    def ended(self) -> bool:
        """Wait for the server's end of the connection; False if it sends more instead."""
        try:
            return not self._receive()
        except ConnectionError:
            return True

    def _one_head(self) -> Answer:
        start, *lines = self._until(b"\r\n\r\n").decode("latin-1").split("\r\n")
        version, status, *_phrase = start.split(" ", 2)
        pairs = (line.split(":", 1) for line in lines)
        return Answer(version, int(status), [(name, value.strip(" \t")) for name, value in pairs])

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self._until(b"\r\n"), 16):
            yield from self._exactly(size)
            assert self._until(b"\r\n") == b""
        while self._until(b"\r\n"):
            pass  # trailers

    def _exactly(self, length: int) -> Iterator[bytes]:
        while length:
            data = self._receive()
            if not data:
                raise ConnectionError("The connection ended inside a body")
            piece, rest = data[:length], data[length:]
            self._received[:0] = rest
            length -= len(piece)
            yield piece

    def _until(self, end: bytes) -> bytes:
        searched = 0
        while (found := self._received.find(end, searched)) < 0:
            searched = max(0, len(self._received) - len(end))
            data = self.socket.recv(65_536)
            if not data:
                raise ConnectionError(f"The connection ended after {bytes(self._received)!r}")
            self._received += data
        line = bytes(self._received[:found])
        del self._received[: found + len(end)]
        return line

    def _receive(self) -> bytes:
        """What was received already, else one read; empty at the end."""
        if self._received:
            data = bytes(self._received)
            self._received.clear()
            return data
        return self.socket.recv(65_536)
