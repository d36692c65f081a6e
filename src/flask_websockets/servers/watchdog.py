"""Both sides. The thread that ends a process which was told to end, and does not (I9)."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue

#: Seconds for the last words of a process. They may hang: nobody may read the log any more.
LAST_WORDS = 0.1

#: The server's own, which uvicorn sets up.
logger: logging.Logger = logging.getLogger("uvicorn.error")


class Watchdog:
    """Ends the process when its shutdown takes longer than it may.

    A loop that a view blocks, a thread that is no daemon, an executor that is waited for: each
    would keep a process that was told to end. The second signal ends it at once.

    :param patience: seconds that it has from the first signal on.
    :param code: its exit code then.
    :param on_exit: called before it ends, if there is time.
    """

    def __init__(
        self, patience: float, code: int = 0, on_exit: Callable[[], object] = lambda: None
    ) -> None:
        self._patience = patience
        self._code = code
        self._on_exit = on_exit
        # A signal handler may put into it whatever the main thread is doing.
        self._told: SimpleQueue[bool] = SimpleQueue()
        self._words: SimpleQueue[str | None] = SimpleQueue()
        self._said = threading.Event()
        # Both now: a process that ends starts no threads, from Python 3.12 on.
        for run, name in ((self._run, "watchdog"), (self._say, "last-words")):
            threading.Thread(target=run, name=f"flask-websockets-{name}", daemon=True).start()

    def tell(self) -> None:
        """Signal handler. The process is to end."""
        self._told.put(True)

    def call_off(self) -> None:
        """Any thread. The server has ended; what follows has all the time that it wants."""
        self._told.put(False)

    def _run(self) -> None:
        """Watchdog's thread. Waits for nothing that has no limit, once it was told."""
        if not self._told.get():
            self._words.put(None)
            return
        try:
            if not self._told.get(timeout=self._patience):
                self._words.put(None)
                return
            code, words = 1, "A second signal: the process ends now"
        except Empty:
            names = [
                thread.name
                for thread in threading.enumerate()
                if not thread.daemon and thread is not threading.main_thread()
            ]
            code, words = (
                self._code,
                "The process ends now, though not everything in it has; threads that are no "
                f"daemons: {', '.join(names) or 'none'}",
            )
        self._words.put(words)
        self._said.wait(LAST_WORDS)
        os._exit(code)

    def _say(self) -> None:
        """A thread of its own. What may hang at a log that nobody reads."""
        words = self._words.get()
        if words is None:
            return
        with suppress(Exception):  # nobody is left to tell
            self._on_exit()
        with suppress(Exception):
            sys.stdout.flush()
        logger.error(words)
        self._said.set()
