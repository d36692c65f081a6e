"""Loop side. uvicorn's server, as ``serve`` runs it: has everybody leave before it stops."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import Awaitable, Callable
from types import FrameType
from typing import Any

import uvicorn

from ..config import Config
from .watchdog import Watchdog

#: The least that uvicorn gives HTTP requests at the end; at 0 it would not look at all.
LEAST_GRACE = 0.1
#: Seconds in which a client may answer the last goodbye.
GOODBYE_SECONDS = 0.5

#: The server's own, which uvicorn sets up.
logger: logging.Logger = logging.getLogger("uvicorn.error")


class DrainingServer(uvicorn.Server):
    """uvicorn's server with a drain before its shutdown, and an exit code of 0 after it.

    :param drain: has everybody leave within so many seconds.
    :param parent: the process whose worker this is.
    :param on_started: called when connections are accepted.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        settings: Config,
        drain: Callable[[float], Awaitable[None]],
        watchdog: Watchdog,
        parent: int | None,
        on_started: Callable[[], None],
    ) -> None:
        super().__init__(config)
        #: A signal came.
        self.should_exit: bool = False
        self._settings = settings
        self._drain = drain
        self._watchdog = watchdog
        self._parent = parent
        self._on_started = on_started

    async def startup(self, sockets: Any = None) -> None:
        """Start, with a limit for TLS handshakes, and say so."""
        await super().startup([])
        config, loop = self.config, asyncio.get_running_loop()
        protocol: Any = config.http_protocol_class
        patience = self._settings.handshake_timeout if config.ssl else None
        for listener in sockets or ():
            server = await loop.create_server(
                lambda: protocol(
                    config=config,
                    server_state=self.server_state,
                    app_state=self.lifespan.state,
                ),
                sock=listener,
                ssl=config.ssl,
                backlog=config.backlog,
                ssl_handshake_timeout=patience,
            )
            self.servers.append(server)
        self._on_started()

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second. A worker does not outlive its parent."""
        if self._parent is not None and os.getppid() != self._parent and not self.should_exit:
            self.should_exit = True
            self._watchdog.tell()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: Any = None) -> None:
        """Drain, then do what uvicorn does, both within the drain timeout."""
        timeout = self._settings.drain_timeout
        deadline = time.monotonic() + timeout
        logger.info("Draining: %g s at most (WEBSOCKETS_DRAIN_TIMEOUT)", timeout)
        await self._drain(timeout)
        left: Any = max(LEAST_GRACE, deadline - time.monotonic())
        self.config.timeout_graceful_shutdown = left
        hanging_up = asyncio.create_task(self._hang_up(time.monotonic() + left - LEAST_GRACE))
        await super().shutdown(sockets)
        hanging_up.cancel()

    async def _hang_up(self, deadline: float) -> None:
        """Cut connections on which all is said: TLS would wait for the peer's own goodbye.

        At the deadline cut them all: what is cut ends more quietly than what is cancelled.
        """
        while True:
            await asyncio.sleep(min(GOODBYE_SECONDS, max(0.01, deadline - time.monotonic())))
            is_over = time.monotonic() >= deadline
            for connection in tuple(self.server_state.connections):
                transport: Any = connection.transport
                if is_over or (transport.is_closing() and not transport.get_write_buffer_size()):
                    transport.abort()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Signal handler. uvicorn's own would raise the signal once more at the end."""
        if self._parent is not None and (sig == signal.SIGINT or self.should_exit):
            return  # a terminal and systemd tell the workers, too; the parent counts
        self.should_exit = True
        self._watchdog.tell()
