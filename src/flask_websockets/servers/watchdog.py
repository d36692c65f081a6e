"""Both sides. The thread that ends a process which was told to end, and does not (I9)."""

from __future__ import annotations

import logging
import os
import threading
from queue import Empty, SimpleQueue

#: The server's own, which uvicorn sets up.
logger: logging.Logger = logging.getLogger("uvicorn.error")


class Watchdog:
    """Ends the process when its shutdown takes longer than it may (I9).

    A loop that a view blocks, a thread that is no daemon, an executor that is waited for: each
    would keep a process that was told to end. The second signal ends it at once.

    :param patience: seconds that it has from the first signal on.
    :param code: its exit code then.
    """

    def __init__(self, patience: float, code: int = 0) -> None:
        self._patience = patience
        self._code = code
        # A signal handler may put into it whatever the main thread is doing.
        self._told: SimpleQueue[bool] = SimpleQueue()
        threading.Thread(target=self._run, name="flask-websockets-watchdog", daemon=True).start()

    def tell(self) -> None:
        """Signal handler. The process is to end."""
        self._told.put(True)

    def call_off(self) -> None:
        """Any thread. The server has ended; what follows has all the time that it wants."""
        self._told.put(False)

    def _run(self) -> None:
        if not self._told.get():
            return
        try:
            if self._told.get(timeout=self._patience):
                os._exit(1)
        except Empty:
            names = [
                thread.name
                for thread in threading.enumerate()
                if not thread.daemon and thread is not threading.main_thread()
            ]
            logger.error(
                "The process ends now, though not everything in it has; threads that are no "
                "daemons: %s",
                ", ".join(names) or "none",
            )
            os._exit(self._code)
