"""Any side. The listening sockets of ``serve``: TCP that notices dead peers, and unix sockets."""

from __future__ import annotations

import errno
import os
import socket
import stat
from dataclasses import dataclass

#: How Flask and Werkzeug mark a host that is the path of a unix socket.
UNIX = "unix://"
#: The kernel's queue of connections that nobody has accepted; it cuts it to ``somaxconn``.
BACKLOG = 2048
#: Whoever may enter the directory may connect: a proxy runs as another user.
UNIX_MODE = 0o666

#: Seconds of silence after which the kernel asks whether a peer is still there, the seconds
#: between two questions, and the number of them. WebSockets are pinged more often; this is for
#: HTTP connections.
KEEPALIVE_IDLE, KEEPALIVE_INTERVAL, KEEPALIVE_PROBES = 60, 10, 3


@dataclass(frozen=True)
class Listener:
    """A socket that listens, and how a user names it."""

    socket: socket.socket
    #: The host as the user gave it: a name, an address or a path.
    host: str
    #: 0 for a unix socket.
    port: int
    #: Which file a unix socket is, whatever lies at its path later.
    file: tuple[int, int] | None = None

    @property
    def is_unix(self) -> bool:
        """Whether it is a unix socket."""
        return self.file is not None

    def url(self, scheme: str) -> str:
        """Where it can be reached."""
        if self.is_unix:
            return f"{scheme}+{UNIX}{self.host}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{scheme}://{host}:{self.port}"

    def close(self) -> None:
        """Stop listening. The file of a unix socket goes, if it is still ours."""
        if self.is_unix and _file_at(self.host) == self.file:
            os.unlink(self.host)
        self.socket.close()


def listen(host: str, port: int, user_timeout: float) -> Listener:
    """Listen at an address, or on a unix socket.

    On Linux accepted connections inherit TCP_USER_TIMEOUT (RFC 5482): the kernel gives up a
    peer that has not acknowledged anything, or has had no room for anything, for so long. A
    server's own keepalive cannot: it waits until its goodbye has been taken.

    :param host: a name or address; ``unix://`` and a path for a unix socket.
    :param port: 0 for any that is free.
    :param user_timeout: seconds.
    :raises OSError: if that is not possible; its text says where, and what to do.
    """
    if host.startswith(UNIX):
        return _listen_unix(os.path.abspath(host.removeprefix(UNIX)))
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        if os.name == "posix":  # on Windows it would share the port with whoever has it
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            options = {
                socket.TCP_USER_TIMEOUT: int(user_timeout * 1000),
                socket.TCP_KEEPIDLE: KEEPALIVE_IDLE,
                socket.TCP_KEEPINTVL: KEEPALIVE_INTERVAL,
                socket.TCP_KEEPCNT: KEEPALIVE_PROBES,
            }
            for option, value in options.items():
                listener.setsockopt(socket.IPPROTO_TCP, option, value)
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise _explained(error, f"{host}, port {port}", "choose another port") from None
    listener.setblocking(False)
    return Listener(listener, host, listener.getsockname()[1])


def _listen_unix(path: str) -> Listener:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_stale(path)
        listener.bind(path)
        os.chmod(path, UNIX_MODE)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise _explained(error, UNIX + path, "choose another path") from None
    listener.setblocking(False)
    return Listener(listener, path, 0, _file_at(path))


def _remove_stale(path: str) -> None:
    """Remove a unix socket on which nobody listens any more."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            raise FileExistsError(errno.EEXIST, "there is something that is no socket")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)


def _file_at(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _explained(error: OSError, where: str, advice: str) -> OSError:
    if error.errno == errno.EADDRINUSE:
        text = f"another program listens there: stop it, or {advice}"
    else:
        text = error.strerror or str(error)
    return OSError(error.errno, f"Cannot listen on {where}: {text}.")
