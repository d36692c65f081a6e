"""Servers that ``flask websockets serve`` and ``websockets.run()`` start, and their clients."""

from __future__ import annotations

import datetime
import http.client
import importlib.util
import ipaddress
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from websockets.sync.client import ClientConnection, connect, unix_connect

from .conftest import START_TIMEOUT, ServerProcess, free_port
from .raw_client import RawClient
from .waiting import wait_until

#: Seconds that anything may take for which nothing is promised.
TIMEOUT = 10.0

#: Seconds beside WEBSOCKETS_DRAIN_TIMEOUT within which a stopped server is gone.
MARGIN = 1.0

FLASK = str(Path(sys.executable).with_name("flask"))

#: What the five dependencies give, and what the extra ``fast`` gives. ``serve`` takes what is
#: there, so what should not be there is hidden.
KINDS: dict[str, tuple[str, ...]] = {"plain": ("websockets", "uvloop", "httptools"), "fast": ()}

TEXT, BINARY, CLOSE = 0x1, 0x2, 0x8


class Answer(NamedTuple):
    """An HTTP response."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes


class Served(ServerProcess):
    """A server in a session and process group of its own, as a terminal has it."""

    #: The socket's path, where that is what the server listens on.
    unix: Path | None = None
    #: What a client needs to believe the server, where it speaks TLS.
    tls: ssl.SSLContext | None = None

    def open(self) -> socket.socket:
        """A connection, after the TLS handshake if there is one; every wait has a timeout."""
        if self.unix is not None:
            connection = socket.socket(socket.AF_UNIX)
            connection.settimeout(TIMEOUT)
            try:
                connection.connect(str(self.unix))
            except OSError:
                connection.close()
                raise
            return connection
        connection = socket.create_connection(("127.0.0.1", self.port), TIMEOUT)
        if self.tls is not None:
            connection = self.tls.wrap_socket(connection, server_hostname="127.0.0.1")
        return connection

    def connect(self, path: str, **options: Any) -> ClientConnection:
        """A WebSocket. *options* are those of the websockets library."""
        if self.unix is not None:
            return unix_connect(str(self.unix), f"ws://localhost{path}", **options)
        if self.tls is not None:
            return connect(f"wss://127.0.0.1:{self.port}{path}", ssl=self.tls, **options)
        return connect(self.ws_url(path), **options)

    def fetch(
        self,
        path: str,
        *,
        method: str = "GET",
        headers: Mapping[str, str] | None = None,
        body: bytes = b"",
    ) -> Answer:
        """Ask on a connection of its own, which the server is told to close."""
        with self.open() as connection:
            connection.sendall(request_head(method, path, headers, body, close=True) + body)
            return read_answer(connection)

    def banner(self) -> str:
        """What it says at its start, once all of it is there."""
        wait_until(lambda: "CTRL+C" in self.log(), START_TIMEOUT, "the banner")
        return self.log()

    def port_of_banner(self) -> int:
        """The port that the banner names."""

        def named() -> re.Match[str] | None:
            if self.process.poll() is not None:
                raise RuntimeError(f"The server ended with {self.process.poll()}:\n{self.log()}")
            return re.search(r"https?://(?:127\.0\.0\.1|localhost|\[::1\]):(\d+)", self.log())

        return int(wait_until(named, START_TIMEOUT, "the banner")[1])

    def wait_until_listening(self) -> None:
        if self.unix is None:
            super().wait_until_listening()
            return

        def listening() -> bool:
            if self.process.poll() is not None:
                raise RuntimeError(f"The server ended with {self.process.poll()}:\n{self.log()}")
            try:
                self.open().close()
            except OSError:
                return False
            return True

        wait_until(listening, START_TIMEOUT, "the server's socket")

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def signal_group(self, number: int) -> None:
        """What a terminal does with a key: the signal goes to every process in front."""
        os.killpg(self.pid, number)

    def wait(self, timeout: float = TIMEOUT) -> int:
        """The exit code."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"It did not end within {timeout:g} s:\n{self.log()}") from None

    def kill(self) -> None:
        """End it, and whatever it has started and not ended."""
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait(10)


Start = Callable[..., Served]


@contextmanager
def serving(directory: Path) -> Iterator[Start]:
    """Start servers, each in a directory of its own; what is left of them is killed at the end."""
    servers: list[Served] = []

    def start(
        source: str,
        *options: str,
        kind: str = "fast",
        app: str | None = "served",
        module: str = "served",
        settings: Mapping[str, Any] | None = None,
        command: Iterable[str] | None = None,
        port: int | None = None,
        unix: Path | None = None,
        tls: ssl.SSLContext | None = None,
        wait: bool = True,
    ) -> Served:
        """Serve *source* with ``flask websockets serve``, or with *command*.

        :param kind: the implementations that are there, one of :data:`KINDS`.
        :param app: the value of ``--app``; None for none.
        :param settings: ``WEBSOCKETS_*`` settings, for an app that reads its environment.
        :param port: the port that *options* name; a free one, which they then need not name.
        """
        home = directory / f"served{len(servers)}"
        home.mkdir()
        if port is None:
            port = free_port()
            if unix is None:
                options = ("--port", str(port), *options)
        text = textwrap.dedent(source).replace("{port}", str(port))
        (home / f"{module}.py").write_text(text)
        for hidden in KINDS[kind]:
            (home / f"{hidden}.py").write_text("raise ImportError('hidden by the test')\n")
        if command is None:
            named = () if app is None else ("--app", app)
            command = (FLASK, *named, "websockets", "serve", *options)
        variables = [
            f"FLASK_WEBSOCKETS_{key}={value!r}".replace("'", '"')
            for key, value in (settings or {}).items()
        ]
        # What a view prints is in a buffer, as it is where nobody has set PYTHONUNBUFFERED.
        path = os.pathsep.join([".", *filter(None, [os.environ.get("PYTHONPATH")])])
        shell = ["setsid", "env", "-u", "PYTHONUNBUFFERED", f"PYTHONPATH={path}", *variables]
        server = Served([*shell, *command], port, home / "log.txt", home)
        server.unix, server.tls = unix, tls
        servers.append(server)
        if wait:
            server.wait_until_listening()
        return server

    try:
        yield start
    finally:
        for server in servers:
            server.kill()


def request_head(
    method: str,
    path: str,
    headers: Mapping[str, str] | None = None,
    body: bytes = b"",
    *,
    close: bool = False,
) -> bytes:
    """The head of an HTTP request."""
    lines = {"Host": "localhost", **(headers or {})}
    if body:
        lines.setdefault("Content-Length", str(len(body)))
    if close:
        lines["Connection"] = "close"
    text = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"{method} {path} HTTP/1.1\r\n{text}\r\n".encode("latin-1")


#: What makes a request a WebSocket handshake (RFC 6455, section 4.1).
HANDSHAKE = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
}


def read_answer(connection: socket.socket) -> Answer:
    """Read one response; the connection stays open if the server leaves it so."""
    response = http.client.HTTPResponse(connection)
    try:
        response.begin()
        return Answer(response.status, response.headers, response.read())
    finally:
        response.close()


def seconds_until_cut(connection: socket.socket, since: float, patience: float) -> float:
    """Seconds from *since* to the end of a connection; what comes before it is thrown away.

    :raises TimeoutError: if it is not cut within *patience* seconds.
    """
    while True:
        left = since + patience - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"The connection was not cut within {patience:g} s.")
        connection.settimeout(left)
        try:
            if not connection.recv(65536):
                break
        except ConnectionError:
            break
        except TimeoutError:
            continue
    return time.monotonic() - since


class Peer(RawClient):
    """A client that does only what it is told to."""

    def frame(self) -> tuple[int, bytes]:
        """The server's next frame: its opcode and its data."""
        first, length = self._read(2)
        if length > 125:
            length = int.from_bytes(self._read(2 if length == 126 else 8), "big")
        return first & 0xF, self._read(length)

    def messages_until_close(self) -> tuple[list[bytes], int]:
        """The messages up to the server's close, and its code."""
        messages = []
        while (frame := self.frame())[0] != CLOSE:
            messages.append(frame[1])
        return messages, int.from_bytes(frame[1][:2], "big")

    def goodbye(self) -> int:
        """The code of the server's close, which has to be what comes next; answer it."""
        messages, code = self.messages_until_close()
        assert messages == [], f"{len(messages)} messages came before the close"
        data = code.to_bytes(2, "big")
        self.socket.sendall(bytes((0x80 | CLOSE, 0x80 | len(data), 0, 0, 0, 0)) + data)
        return code


def run_flask(directory: Path, source: str, *arguments: str, timeout: float = START_TIMEOUT) -> Any:
    """Run ``flask`` on *source* to its end; it is not expected to serve."""
    (directory / "served.py").write_text(textwrap.dedent(source))
    return subprocess.run(
        [FLASK, "--app", "served", *arguments],
        cwd=directory,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def state_of(pid: int) -> str:
    """How the kernel calls a process's state: R, S, T, Z; nothing if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def is_there(module: str) -> bool:
    """Whether the tests run with an optional package."""
    return importlib.util.find_spec(module) is not None


def is_running(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    return state_of(pid) not in ("", "Z")


def group_of(server: Served) -> set[int]:
    """The processes of a server's session that still run: itself, and what it has started."""
    members = set()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[3]) == server.pid and fields[0] != "Z":
            members.add(int(entry.name))
    return members


class Certificate(NamedTuple):
    """Files of a certificate for 127.0.0.1, and what a client needs to believe it."""

    cert: str
    key: str
    context: ssl.SSLContext


def make_certificate(directory: Path, name: str = "localhost") -> Certificate:
    """A self-signed certificate, valid for an hour."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    addresses = [
        x509.DNSName("localhost"),
        x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
    ]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName(addresses), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    cert_file, key_file = directory / f"{name}.crt", directory / f"{name}.key"
    cert_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    key_file.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    context = ssl.create_default_context(cafile=str(cert_file))
    # The websockets library's threaded client reads and writes in two threads, which OpenSSL does
    # not take well with TLS 1.3 (Python 3.11): it hangs now and then.
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    return Certificate(str(cert_file), str(key_file), context)
