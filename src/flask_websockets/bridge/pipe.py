"""Both sides. The pipe: what the body of one HTTP request and its response go through."""

from __future__ import annotations

import logging
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import TypeVar

import anyio

from ..errors import NotRunning
from .door import Door, Event

T = TypeVar("T")

logger: logging.Logger = logging.getLogger("flask_websockets")


class Pipe:
    """One HTTP request between its thread and the loop, a window of bytes in each direction.

    The loop feeds a piece of the body ahead, and a window once the view asks for it; the view's
    chunks go to the loop as they come. Each side waits only when the other is so far behind.
    Must be made on the loop.
    """

    #: Bytes of the body that the view has not read, and of the response that the server has not
    #: taken; above it the one or the other waits. Four times what a server reads or buffers at
    #: a time (uvicorn: 64 KiB): with less, each piece would cost a switch of threads.
    WINDOW_BYTES = 262_144
    #: The same in pieces and chunks, which weigh something however small they are.
    WINDOW_PIECES = 1_024
    #: Bytes that are sent at a time, each with its own deadline. Smaller chunks are joined.
    PIECE_BYTES = 65_536

    def __init__(self, door: Door) -> None:
        self._door = door  # set once
        # The body. An empty piece is its end, None says that no more will come.
        self._pieces: SimpleQueue[bytes | None] = SimpleQueue()  # the loop puts, the thread gets
        self._room = self.PIECE_BYTES  # loop only: bytes that may lie unread
        self._wanted: anyio.Event | None = None  # loop only: made by who waits for it
        self._discards = False  # loop only: nobody will read what still comes
        self._incomplete = False  # loop only: a piece went nowhere
        self._unread = 0  # loop only: bytes
        self._has_asked = False  # thread only
        self._at_end = False  # thread only
        self._read = 0  # thread only: bytes that the loop does not know of
        self._read_pieces = 0  # thread only: the same in pieces
        # The response.
        self._chunks: list[bytes] = []  # loop only
        self._last = False  # loop only: the last chunk is among them
        self._error: Exception | None = None  # loop only
        self._arrived: Event | None = None  # loop only: made by who waits for it
        #: Loop only. Called with a response that comes in one chunk, before ``get`` returns it.
        self.on_whole: Callable[[bytes], None] | None = None
        self._got = 0  # loop only: chunks that get() has returned and nobody has taken
        # Bytes and chunks; the loop puts.
        self._taken: SimpleQueue[tuple[int, int] | None] = SimpleQueue()
        self._untaken = 0  # thread only: bytes
        self._untaken_chunks = 0  # thread only
        self._put_last = False  # thread only
        self.broken: bool = False  # thread only: it has met that nobody is at the other end
        self.silent: bool = False  # set by the thread: the client sent nothing for too long
        self.closed: bool = False  # set by the loop, which is at the other end no more

    # -- the thread ---------------------------------------------------------------------------

    def read(self, timeout: float) -> bytes:
        """Thread. The next piece of the body, as soon as there is one; empty at the end.

        :param timeout: seconds to wait at most.
        :raises BrokenPipeError: if the client left before the end.
        :raises TimeoutError: if it sent nothing for so long.
        """
        if self._at_end:
            return b""
        if not self._has_asked:
            self._has_asked = True
            self._post_or_break(self._ask, 0)
        try:
            piece = None if self.broken else self._pieces.get(timeout=timeout)
        except Empty:
            self.silent = True
            raise TimeoutError(f"The client sent nothing for {timeout:g} s.") from None
        if piece is None:
            self.broken = True
            raise BrokenPipeError("The client left before the end of its request.")
        self._at_end = not piece
        self._read += len(piece)
        self._read_pieces += 1
        # Not for each piece, or each would ring. The loop waits with a window unread, and when
        # that has been read, this has been told.
        if self._read >= self.WINDOW_BYTES // 2 or self._read_pieces >= self.WINDOW_PIECES // 2:
            self._post_or_break(self._ask, self._read)
            self._read = self._read_pieces = 0
        return piece

    def put(self, chunk: bytes, *, last: bool) -> None:
        """Thread. Give a chunk to the server; wait while a window of them is not taken.

        :raises BrokenPipeError: if nobody takes them any more: the client or the server is gone.
        """
        if self.broken:
            raise BrokenPipeError("Nobody reads the response any more.")
        self._put_last = last
        self._post_or_break(self._arrive, (chunk, last))
        self._untaken += len(chunk)
        self._untaken_chunks += 1
        # The loop answers for each chunk, and close() for good: this wait has an end. With room
        # left it still looks, or a generator would not learn that its client has left.
        while not last and (self._window_is_full or not self._taken.empty()):
            taken = self._taken.get()
            if taken is None:
                self.broken = True
                raise BrokenPipeError("Nobody reads the response any more.")
            self._untaken -= taken[0]
            self._untaken_chunks -= taken[1]

    @property
    def _window_is_full(self) -> bool:
        return self._untaken >= self.WINDOW_BYTES or self._untaken_chunks >= self.WINDOW_PIECES

    def fail(self, error: Exception) -> None:
        """Thread. The application raised: the request's task raises it too, or it is logged."""
        if not self._put_last:
            try:
                return self._door.post(self._fail, error)
            except NotRunning:
                pass  # nobody is left to raise it
        _log(error)

    def _post_or_break(self, command: Callable[[T], object], argument: T) -> None:
        try:
            self._door.post(command, argument)
        except NotRunning as error:
            self.broken = True
            raise BrokenPipeError("The server has stopped.") from error

    # -- the loop -----------------------------------------------------------------------------

    async def wanted(self) -> None:
        """Loop. Wait until there is room for more of the body."""
        while not self._discards and (
            self._unread >= self._room or self._pieces.qsize() >= self.WINDOW_PIECES
        ):
            self._wanted = anyio.Event()
            await self._wanted.wait()

    def feed(self, piece: bytes) -> None:
        """Loop. A piece of the body has come."""
        if not piece:
            return
        if self._discards:
            self._incomplete = True
        else:
            self._unread += len(piece)
            self._pieces.put(piece)

    def end(self) -> None:
        """Loop. The body is complete."""
        self._pieces.put(None if self._incomplete else b"")

    def hold(self) -> None:
        """Loop. Bring in nothing until the view asks: the client waits to be asked."""
        self._room = 0

    def read_ahead(self) -> None:
        """Loop. Bring in a window of the body whether the view asks for it or not."""
        self._ask(0)

    def answer(self, body: bytes) -> None:
        """Loop. Give a whole response in the application's stead, which is not called."""
        self._arrive((body, True))

    def discard(self) -> None:
        """Loop. The response is complete: let the rest of the body come in and go nowhere."""
        self._discards = True
        self._ask(0)

    async def get(self) -> tuple[bytes, bool]:
        """Loop. What the view has given of its response since, and whether that was all.

        :raises Exception: what the application raised, after everything that it gave before.
        """
        while not self._chunks:
            if self._error is not None:
                error, self._error = self._error, None
                raise error
            self._arrived = self._door.event()
            await self._arrived.wait()
        count, size = 0, 0
        while count < len(self._chunks) and size < self.PIECE_BYTES:
            size += len(self._chunks[count])
            count += 1
        self._got += count
        chunks = self._chunks[:count]
        del self._chunks[:count]
        chunk = chunks[0] if count == 1 else b"".join(chunks)
        return chunk, self._last and not self._chunks

    def taken(self, count: int) -> None:
        """Loop. The server has taken so many bytes, and whatever ``get`` returned."""
        self._taken.put((count, self._got))
        self._got = 0

    def close(self) -> None:
        """Loop. Nobody is here any more; the thread learns of it where it reads or puts."""
        self.closed, self.on_whole = True, None
        self._pieces.put(None)
        self._taken.put(None)
        if self._error is not None:
            _log(self._error)  # it came, and the client left before anybody raised it

    def _ask(self, read: int) -> None:
        self._unread -= read
        self._room = self.WINDOW_BYTES
        if self._wanted is not None:
            self._wanted.set()

    def _arrive(self, put: tuple[bytes, bool]) -> None:
        chunk, self._last = put
        if self._last and self.on_whole is not None and not self._got and not self._chunks:
            self.on_whole(chunk)
        self._chunks.append(chunk)
        if self._arrived is not None:
            self._arrived.set()

    def _fail(self, error: Exception) -> None:
        if self.closed:
            return _log(error)
        self._error = error
        if self._arrived is not None:
            self._arrived.set()


def _log(error: Exception) -> None:
    logger.error("The application failed after its client was served or had left", exc_info=error)
