"""A WebSocket client made of a socket: for peers that do not read, do not answer, or vanish."""

from __future__ import annotations

import socket
import struct

TIMEOUT = 10.0


class RawClient:
    """Does the handshake, and then nothing by itself: no pong, no close, no reading."""

    def __init__(self, port: int, path: str, *, receive_buffer: int | None = None) -> None:
        self.socket = socket.socket()
        self.socket.settimeout(TIMEOUT)
        if receive_buffer is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.connect(("127.0.0.1", port))
        self.socket.sendall(
            f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: Upgrade\r\n"
            "Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n".encode()
        )
        head = b""
        while b"\r\n\r\n" not in head:
            byte = self.socket.recv(1)  # no more than the head: the rest stays in the socket
            if not byte:
                break
            head += byte
        self.head = head.decode("latin-1")
        self.status = int(self.head.split(" ", 2)[1])

    def send_text(self, text: str) -> None:
        """Send one short masked text frame."""
        data = text.encode()
        assert len(data) < 126
        # A mask of zeros is a mask, and leaves the data readable (RFC 6455, section 5.3).
        self.socket.sendall(bytes((0x81, 0x80 | len(data), 0, 0, 0, 0)) + data)

    def receive(self) -> bytes:
        """Read one frame's data."""
        length = self._read(2)[1]
        if length > 125:
            length = int.from_bytes(self._read(2 if length == 126 else 8), "big")
        return self._read(length)

    def _read(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            part = self.socket.recv(count - len(data))
            assert part, "the server closed the connection"
            data += part
        return data

    def reset(self) -> None:
        """Vanish with a TCP reset."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> RawClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
