"""Any side. ``Subscription``: a connection's stay in channels, as a ``with`` block."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self

from .channels import Backlog, Hub, OnSlow
from .errors import WrongThread
from .runtime import Runtime
from .websocket import AsyncWebSocket, WebSocket


class Subscription:
    """A connection's subscription to channels, for the length of a ``with`` block.

    ``async with`` in an async view. What :meth:`WebSockets.subscribe` returns.
    """

    #: The channels' names.
    channels: tuple[str, ...]

    def __init__(
        self,
        ws: WebSocket | AsyncWebSocket,
        channels: Sequence[str],
        on_slow: OnSlow,
        runtime_of: Callable[[WebSocket | AsyncWebSocket], Runtime],
    ) -> None:
        self.channels = tuple(channels)
        self._ws = ws
        self._on_slow = on_slow
        self._runtime_of = runtime_of
        self._entered = False
        self._hub: Hub | None = None  # set on entering
        self._backlog: Backlog | None = None  # made on entering, if this one may drop

    def __del__(self) -> None:
        if not self._entered:
            warnings.warn(
                f"The subscription to {', '.join(map(repr, self.channels))} was never entered, so "
                "nothing was subscribed: write `with websockets.subscribe(...):`, in an async "
                "view `async with`.",
                RuntimeWarning,
                stacklevel=2,
            )

    @property
    def dropped(self) -> int:
        """Messages dropped so far because the peer did not keep up.

        Those of channels that an outer block has subscribed to count there.
        """
        return 0 if self._backlog is None else self._backlog.dropped

    def __enter__(self) -> Self:
        """Subscribe. What is published from here on is not missed.

        :raises ConnectionClosed: if the connection is over.
        :raises UsageError: above ``WEBSOCKETS_MAX_CHANNELS_PER_CONNECTION``; then nothing is
            subscribed. Also for a connection of another :class:`WebSockets` object.
        :raises TimeoutError: if the loop does not take it within ``WEBSOCKETS_SEND_TIMEOUT``
            seconds, because ``WEBSOCKETS_MAX_PENDING_PUBLISHES`` are waiting already; then nothing
            is subscribed. Not in an async view, which is on the loop.
        :raises NotRunning: if the server has stopped.
        :raises WrongThread: for an async view's connection.
        """
        ws, self._entered = self._ws, True
        if not isinstance(ws, WebSocket):
            raise WrongThread("In an async view, subscribe with async with: this one would block.")
        ws._accept_if_connecting()
        ws.link.join(self.channels, self._subscribe())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Unsubscribe, from what no outer block has subscribed to."""
        self._leave()

    async def __aenter__(self) -> Self:
        """Subscribe, in an async view. See :meth:`__enter__`."""
        ws, self._entered = self._ws, True
        if not isinstance(ws, AsyncWebSocket):
            raise WrongThread("async with is for async views; in a plain one, subscribe with with.")
        await ws._accept_if_connecting()
        ws.link.join_here(self.channels, self._subscribe())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Unsubscribe, in an async view."""
        self._leave()
        self._ws.link.catch_up()

    def _subscribe(self) -> Callable[[Any], None]:
        if self._hub is None:
            self._hub = self._runtime_of(self._ws).hub
            self._backlog = self._hub.backlog(self._ws.link, self._on_slow)
        return partial(self._hub.subscribe, backlog=self._backlog)

    def _leave(self) -> None:
        if self._hub is not None:
            self._ws.link.leave(self.channels, self._hub.unsubscribe, entirely=False)
