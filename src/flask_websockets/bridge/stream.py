"""Both sides. One of anyio's memory streams, of which nothing is made before it is used."""

from __future__ import annotations

import math
from typing import Generic, TypeVar

import anyio
from anyio.streams.memory import (
    MemoryObjectReceiveStream,
    MemoryObjectSendStream,
    MemoryObjectStreamStatistics,
)

T = TypeVar("T")


class Stream(Generic[T]):
    """Loop. What waits, first in first out. Nobody waits for it here, and it has no bound.

    A message for a view that waits, and one for a server that can take it, never lie in a stream;
    most connections need none.
    """

    __slots__ = ("_closed", "_inlet", "_outlet")

    def __init__(self) -> None:
        self._inlet: MemoryObjectSendStream[T] | None = None
        self._outlet: MemoryObjectReceiveStream[T] | None = None
        self._closed = False

    def put(self, item: T) -> None:
        """Put one more behind the others.

        :raises ClosedResourceError: if it is closed.
        """
        if self._inlet is None:
            if self._closed:
                raise anyio.ClosedResourceError
            self._inlet, self._outlet = anyio.create_memory_object_stream[T](math.inf)
        self._inlet.send_nowait(item)

    def take(self) -> T:
        """Take the first.

        :raises WouldBlock: if there is none.
        :raises ClosedResourceError: if it is closed.
        """
        if self._outlet is None:
            raise anyio.ClosedResourceError if self._closed else anyio.WouldBlock
        return self._outlet.receive_nowait()

    def close(self) -> None:
        """Close both ends; what lies there is lost. Idempotent."""
        self._closed = True
        if self._inlet is not None and self._outlet is not None:
            self._inlet.close()
            self._outlet.close()

    def statistics(self) -> MemoryObjectStreamStatistics:
        """Any thread. What lies there, as anyio reports it."""
        if self._outlet is None:
            return MemoryObjectStreamStatistics(0, math.inf, 0, 0, 0, 0)
        return self._outlet.statistics()
