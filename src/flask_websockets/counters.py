"""Pure. What the runtime counts, and the picture of it that a user reads."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Counters:
    """Totals since the runtime started. Written on the loop only, read from anywhere."""

    view_threads: int = 0  # loop only; what there is now, no total
    view_tasks: int = 0  # loop only; likewise
    connections: int = 0  # loop only
    http_refused: int = 0  # loop only
    body_timeouts: int = 0  # loop only
    handshake_timeouts: int = 0  # loop only
    published: int = 0  # loop only
    delivered: int = 0  # loop only
    closed_slow: int = 0  # loop only
    dropped_oldest: int = 0  # loop only
    dropped_newest: int = 0  # loop only
    dropped_latest: int = 0  # loop only
    inbox_dropped: int = 0  # loop only
    inbox_closed: int = 0  # loop only
    rate_slowed: int = 0  # loop only
    expired: int = 0  # loop only
    disconnected: int = 0  # loop only
    send_timeouts: int = 0  # loop only
    aborted: int = 0  # loop only
    stuck_views: int = 0  # loop only


#: What the registry counts, because threads refuse as well as the loop.
REFUSALS = (
    *("refused_full", "refused_address", "refused_user", "refused_handshakes"),
    *("refused_threads", "refused_draining", "refused_origin", "refused_subscribes"),
    *("refused_publishes", "oversized", "rate_closed"),
)


@dataclass(frozen=True)
class Stats:
    """A picture of one :class:`WebSockets` object at one moment.

    The first group is what is there now, the second counts since the server started.
    """

    #: Connections whose task runs: in the handshake, open or closing.
    connections: int
    #: Threads that run views, of connections that are over included. An async view has one in
    #: its handshake and at its teardown only.
    view_threads: int
    #: Async views that run, of connections that are over included.
    view_tasks: int
    #: Threads for HTTP, idle ones included.
    http_threads: int
    #: Channels with at least one subscriber.
    channels: int
    #: Pairs of a connection and a channel it is subscribed to.
    subscriptions: int
    #: What waits at the door for the loop: sends, publishes, subscriptions.
    pending: int
    #: Received messages that views have not taken, in all inboxes.
    inbox_messages: int
    #: Their bytes.
    inbox_bytes: int
    #: Messages that servers have not taken, in all outboxes.
    outbox_messages: int
    #: Their bytes.
    outbox_bytes: int

    #: Connections that were accepted.
    connections_total: int
    #: Handshakes answered 503 because of ``WEBSOCKETS_MAX_CONNECTIONS``.
    refused_full: int
    #: Handshakes answered 429 because of ``WEBSOCKETS_MAX_CONNECTIONS_PER_ADDRESS``.
    refused_address: int
    #: Handshakes answered 429 because of ``WEBSOCKETS_MAX_CONNECTIONS_PER_USER``.
    refused_user: int
    #: Handshakes answered 503 because ``WEBSOCKETS_MAX_HANDSHAKES`` were under way for
    #: ``WEBSOCKETS_HANDSHAKE_TIMEOUT``.
    refused_handshakes: int
    #: Handshakes answered 503 because the system has no thread left.
    refused_threads: int
    #: Handshakes answered 503 because the server drains.
    refused_draining: int
    #: Handshakes answered 403 because of the page that they came from.
    refused_origin: int
    #: Subscribes that raised: too many channels, a name that is too long, a loop that is behind.
    refused_subscribes: int
    #: Publishes that raised: too large, a name that is too long, a loop that is behind.
    refused_publishes: int
    #: HTTP requests answered 503 because too many wait for a thread, or none is left.
    http_refused: int
    #: HTTP requests whose client sent nothing of its body for a minute; the view's read raised 408.
    body_timeouts: int
    #: Handshakes answered 503 because the view neither accepted nor refused in time.
    handshake_timeouts: int
    #: Publishes that the hub has distributed.
    published: int
    #: Published messages put into a subscriber's outbox, those dropped there later included.
    delivered: int
    #: Subscribers closed with 1013 because their outbox was full.
    closed_slow: int
    #: Messages dropped by ``on_slow="drop_oldest"``.
    dropped_oldest: int
    #: Messages dropped by ``on_slow="drop_newest"``.
    dropped_newest: int
    #: Messages that ``on_slow="latest"`` replaced by a newer one, or found no room for.
    dropped_latest: int
    #: Received messages dropped by ``WEBSOCKETS_INBOX_FULL = "drop_newest"``.
    inbox_dropped: int
    #: Connections closed with 1013 because the view did not take what was received.
    inbox_closed: int
    #: Connections closed with 1009.
    oversized: int
    #: Connections closed with 1008 because the peer sent too much in too short a time.
    rate_closed: int
    #: Messages that waited because of it, by ``WEBSOCKETS_RATE_EXCEEDED = "slow_down"``.
    rate_slowed: int
    #: Connections closed with 4401 because they had the age of their route's ``max_age``.
    expired: int
    #: Connections ended by ``disconnect``, or because of what ``recheck`` said.
    disconnected: int
    #: Connections cut because the peer did not take a message, or the client a piece of an HTTP
    #: response, for ``WEBSOCKETS_SEND_TIMEOUT``.
    send_timeouts: int
    #: Transports aborted because the peer would not let them close.
    aborted: int
    #: Views that were still running ``WEBSOCKETS_CLOSE_TIMEOUT`` after their connection's end.
    stuck_views: int
