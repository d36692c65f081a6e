"""Any side. The signals that an application can listen to, beside Flask's own."""

from __future__ import annotations

from blinker import NamedSignal, Namespace

_signals = Namespace()

draining: NamedSignal = _signals.signal(
    "websockets-draining",
    """Sent before the first connection is closed, when the server is about to stop or
    :meth:`WebSockets.drain` was called.

    The sender is the Flask application. Receivers run in a thread, in an application context,
    for a quarter of the drain's timeout at most. What they publish reaches everybody before the
    close frame. See :doc:`../how-to/shut-down`.
    """,
)
