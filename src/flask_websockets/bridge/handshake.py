"""Both sides. How an async view on the loop and its handshake's thread take turns (I3)."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Coroutine
from functools import partial
from queue import SimpleQueue
from typing import Any

import anyio
import anyio.lowlevel

from ..errors import InvalidState
from ..protocol import Action, State, transition
from .link import Finish, Link


class _Order:
    """What an async view wants of its handshake's thread."""

    def __init__(self, run: Callable[[], None]) -> None:
        self.run = run
        self.done = anyio.Event()  # loop only
        self.error: Exception | None = None  # loop only, before done


class Handshake:
    """One handshake: what the route finds in the environ.

    Flask's part of a handshake blocks, and runs in a thread. An async view runs on the loop.
    Until the view has accepted or has ended, the thread waits for what it wants: to accept,
    which saves the session, or to answer in its place. Then the WSGI call ends, and only then
    does the view go on: never do both run at once.
    """

    def __init__(self, link: Link, offered: list[str], context: contextvars.Context) -> None:
        self.link = link
        link.view_thread = threading.get_ident()
        self.offered = offered  # subprotocols
        self.context = context  # in which the WSGI call runs
        #: The async view's own function, below its decorators. Set by the route.
        self.function: object = None
        #: What is left to do when an accepted async view has ended. Set before it goes on.
        self.finish: Callable[[Any, BaseException | None], BaseException | None] | None = None
        #: Called in the thread before Flask would save the session. Set by the route.
        self.before_save: Callable[[], None] | None = None
        #: Called in the thread when the WSGI call of an accepted async view has ended.
        self.on_call_end: Callable[[], None] | None = None
        self._orders: SimpleQueue[_Order | tuple[Any, BaseException | None]] = SimpleQueue()
        self._accepting: _Order | None = None  # loop only
        self._started = self._accepted = False  # the thread's
        self._goes_on = False  # loop only: accepted, and the WSGI call has ended

    # -- the handshake's thread -------------------------------------------------------------------

    def start(self, view: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        """Thread. Start an async view on the loop, in a copy of this thread's context.

        :raises InvalidState: if a view was started already, for a middleware that calls twice.
        """
        if self._started:
            raise InvalidState("This handshake's view was started already; it runs only once.")
        self._started = True
        run = partial(self._perform, view)
        self.link.post(self.link.start_async, (run, contextvars.copy_context()))

    def serve(self) -> tuple[Any, BaseException | None] | None:
        """Thread. Wait until the view has accepted, or has ended.

        :returns: None, or what the view returned and raised.
        """
        while True:
            order = self._orders.get()
            if not isinstance(order, _Order):
                return order
            try:
                order.run()
            except Exception as error:
                self.link.report(self._answered, error)
            else:
                self._accepted = True
                return None

    def end_call(self) -> None:
        """Thread. The WSGI call has ended: an accepted view may go on."""
        on_call_end, self.on_call_end, self.before_save = self.on_call_end, None, None
        if self._accepted:
            try:
                if on_call_end is not None:
                    on_call_end()
            finally:
                self.link.report(self._answered, None)

    @property
    def goes_on(self) -> bool:
        """Thread. Whether the connection outlives the WSGI call."""
        return self._accepted

    # -- loop -------------------------------------------------------------------------------------

    @property
    def pending(self) -> bool:
        """Loop. Whether an async view has to wait for the handshake before it does anything."""
        return not self._goes_on and (
            self._accepting is not None or self.link.state is State.CONNECTING
        )

    async def accept(self, run: Callable[[], None]) -> None:
        """Loop. Have the thread run what accepts the connection, and end its WSGI call.

        :raises InvalidState: if the connection is accepted already.
        :raises ConnectionClosed: if it is over.
        """
        while self._accepting is not None:  # another task of the view is at it
            await self._accepting.done.wait()
        if self.link.state is not State.CONNECTING:
            await anyio.lowlevel.checkpoint()
            transition(self.link.state, Action.ACCEPT, self.link.code, self.link.reason)
        self._accepting = order = _Order(run)
        self._orders.put(order)
        await order.done.wait()
        if order.error is not None:
            raise order.error

    def _answered(self, error: Exception | None) -> None:
        order, self._accepting = self._accepting, None
        self._goes_on = error is None
        if order is not None:
            order.error = error
            order.done.set()

    async def _perform(self, view: Callable[[], Coroutine[Any, Any, Any]]) -> Finish:
        """Loop. Run the view, and say what is left to do."""
        returned, error = None, None
        try:
            returned = await view()
        except anyio.get_cancelled_exc_class():
            pass  # its connection is over, or the server stops: no fault of the view's
        except BaseException as raised:  # SystemExit as well: the task ends here (I5)
            error = raised
        while self._accepting is not None:
            # The thread is at it, and has to be told how the view ended. asyncio's own way to
            # cancel knows no shield.
            try:
                with anyio.CancelScope(shield=True):
                    await self._accepting.done.wait()
            except anyio.get_cancelled_exc_class():
                pass
        if not self._goes_on:
            self._orders.put((returned, error))
            return None
        # They lead to the request and its environ, and so back here: not kept in a circle.
        finish, self.finish = self.finish, None
        if finish is None:
            return None
        return partial(self.context.run, finish, returned, error)
