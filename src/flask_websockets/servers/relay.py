"""Both sides. A thread that carries bytes between two sockets, for the development server.

asyncio takes no ``ssl.SSLSocket`` over: what comes through one is carried to a socket pair,
whose other end the loop has. So much memory as :data:`CHUNK` lies between the two, each way.
"""

from __future__ import annotations

import selectors
import socket
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any

#: Bytes that are read at once.
CHUNK = 64 * 1024

#: What a socket that does not block says instead of waiting.
_NOT_NOW = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


#: Those that run. Each step on it is one of the interpreter's.
_threads: set[threading.Thread] = set()


class HandedOverTLS(ssl.SSLSocket):
    """The TLS connection of a Werkzeug handler, which has nothing to say on it any more.

    The handler holds the very object, which cannot leave its TLS state to another: so the
    object itself becomes one that swallows what the handler does, until :func:`relay` is done.
    """

    __slots__ = ()

    def recv_into(self, *args: Any, **options: Any) -> int:
        return 0  # the end

    def send(self, data: Any, flags: int = 0) -> int:
        return memoryview(data).nbytes

    def sendall(self, data: Any, flags: int = 0) -> None:
        pass

    def shutdown(self, how: int) -> None:
        pass

    def close(self) -> None:
        pass


class _DoneTLS(HandedOverTLS):
    """The same when the relay is done: still dumb, for a handler that comes late, but it closes."""

    __slots__ = ()

    def close(self) -> None:
        ssl.SSLSocket.close(self)


def start_relay(
    outer: socket.socket,
    inner: socket.socket,
    patience: float,
    rest: bytes = b"",
    on_end: Callable[[], object] = lambda: None,
) -> None:
    """Any thread. Carry bytes both ways on a thread of its own, and close both at the end.

    :param outer: the client's connection.
    :param inner: the loop's.
    :param patience: seconds after which a client that takes nothing is cut.
    :param rest: what was read from *outer* already.
    :param on_end: called in the thread when it is over.
    """

    def run() -> None:
        try:
            _relay(outer, inner, patience, rest)
        finally:
            on_end()
            _threads.discard(threading.current_thread())

    outer.setblocking(False)
    inner.setblocking(False)
    thread = threading.Thread(target=run, name="flask-websockets-relay", daemon=True)
    _threads.add(thread)
    thread.start()


def await_relays(timeout: float) -> None:
    """Any thread. Wait until what the loop has said last is carried to the clients."""
    deadline = time.monotonic() + timeout
    for thread in tuple(_threads):
        thread.join(max(0, deadline - time.monotonic()))


class _Way:
    """One direction."""

    def __init__(self, source: socket.socket, sink: socket.socket, rest: bytes = b"") -> None:
        self._receive, self._send = _receive_of(source), _send_of(sink)
        self._carried = memoryview(rest)
        self.ended = False  # the source has said its last, and the sink has it

    @property
    def loaded(self) -> bool:
        """Whether something waits for the sink."""
        return bool(self._carried)

    @property
    def wants(self) -> bool:
        """Whether there is room for what the source says."""
        return not self._carried and not self.ended

    def carry(self) -> bool:
        """Do what can be done without waiting; False if that is nothing.

        :raises OSError: if one of the two is gone.
        """
        try:
            if self._carried:
                self._carried = self._carried[self._send(self._carried) :]
                return True
            if not self.ended:
                self._carried = memoryview(self._receive(CHUNK))
                self.ended = not self._carried
                return True
        except _NOT_NOW:
            pass
        return False


def _receive_of(sock: socket.socket) -> Any:
    if isinstance(sock, ssl.SSLSocket):
        return lambda size: ssl.SSLSocket.recv(sock, size)
    return sock.recv


def _send_of(sock: socket.socket) -> Any:
    if isinstance(sock, ssl.SSLSocket):
        return lambda data: ssl.SSLSocket.send(sock, data)
    return sock.send


def _relay(outer: socket.socket, inner: socket.socket, patience: float, rest: bytes) -> None:
    """Relay thread."""
    there, back = _Way(outer, inner, rest), _Way(inner, outer)
    with ExitStack() as stack:
        stack.callback(_close, outer)
        stack.callback(_close, inner)
        selector = stack.enter_context(selectors.DefaultSelector())
        stack.enter_context(suppress(OSError))  # a peer that is gone is how it ends
        # The loop's end closes when all is said; the client's may be half-closed before.
        while not back.ended:
            was_open = not there.ended
            if there.carry() | back.carry():
                if was_open and there.ended:
                    inner.shutdown(socket.SHUT_WR)
                continue
            _watch(selector, outer, reads=there.wants, writes=back.loaded)
            _watch(selector, inner, reads=back.wants, writes=there.loaded)
            # A loop that gives up its end cannot be told from one that waits: nobody reads it.
            if not selector.select(patience if back.loaded else None):
                return


def _watch(
    selector: selectors.BaseSelector, sock: socket.socket, *, reads: bool, writes: bool
) -> None:
    events = selectors.EVENT_READ * reads | selectors.EVENT_WRITE * writes
    if sock in selector.get_map():
        selector.unregister(sock)
    if events:
        selector.register(sock, events)


def _close(sock: socket.socket) -> None:
    if isinstance(sock, HandedOverTLS):
        sock.__class__ = _DoneTLS
    sock.close()
