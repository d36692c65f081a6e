"""Loop side. The hub: who is subscribed to what, and how a message reaches all of them.

It needs no lock, because it has one thread (I7): nothing here awaits between looking and
changing, and fan-out walks a snapshot.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from .bridge import ASGIMessage, Link
from .counters import Counters

logger = logging.getLogger("flask_websockets")

#: RFC 6455 registry: "try again later". The peer may come back when it can keep up.
SLOW_CONSUMER = (1013, "slow consumer")


@dataclass(frozen=True)
class PublishResult:
    """What became of a message that was published on the loop."""

    #: Connections of this process that the message was queued for. Not: that it has reached.
    local: int


@dataclass(frozen=True)
class Publication:
    """One message on its way to its channels."""

    message: ASGIMessage
    size: int
    channels: Sequence[str]
    excluded: Collection[Link]


class Hub:
    """Every subscription of one runtime. Loop only, all of it."""

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        # Dicts for sets: they keep the order of arrival, so every run is the same run.
        self._channels: dict[str, dict[Link, None]] = {}
        self._subscribed: dict[Link, dict[str, None]] = {}

    @property
    def channels(self) -> int:
        """How many channels have a subscriber."""
        return len(self._channels)

    @property
    def subscriptions(self) -> int:
        """How many pairs of subscriber and channel there are."""
        return sum(map(len, tuple(self._subscribed.values())))

    def subscribe(self, request: tuple[Link, Sequence[str]]) -> None:
        """Add a subscriber to channels that it is not subscribed to."""
        link, names = request
        if link.deaf:
            return  # its connection ended while the request was at the door
        own = self._subscribed.setdefault(link, {})
        for name in names:
            own[name] = None
            self._channels.setdefault(name, {})[link] = None

    def unsubscribe(self, request: tuple[Link, Sequence[str]]) -> None:
        """Take a subscriber out of channels; nothing happens where it is in none."""
        link, names = request
        own = self._subscribed.get(link, {})
        for name in names:
            own.pop(name, None)
            if (subscribers := self._channels.get(name)) is not None:
                subscribers.pop(link, None)
                if not subscribers:
                    del self._channels[name]
        if not own:
            self._subscribed.pop(link, None)

    def forget(self, link: Link) -> None:
        """Take a subscriber out of everything."""
        if link in self._subscribed:
            self.unsubscribe((link, tuple(self._subscribed[link])))

    def publish(self, publication: Publication) -> PublishResult:
        """Queue one message for each subscriber of the channels, once for each of them.

        A subscriber whose outbox is full is closed with 1013; the others do not wait for it.
        """
        recipients: dict[Link, None] = {}
        for name in publication.channels:
            recipients.update(self._channels.get(name, {}))
        for link in publication.excluded:
            recipients.pop(link, None)
        message, size = publication.message, publication.size
        # A deaf link's connection is over, and its task has not come to forgetting it yet.
        listening = [link for link in recipients if not link.deaf]
        slow = [link for link in listening if not link.offer(message, size)]
        for link in slow:
            self._counters.closed_slow += 1
            logger.warning(
                "A subscriber does not keep up and is closed with 1013: its outbox is full "
                "(WEBSOCKETS_OUTBOX_MESSAGES, WEBSOCKETS_OUTBOX_BYTES)."
            )
            link.expel(*SLOW_CONSUMER)
            self.forget(link)
        local = len(listening) - len(slow)
        self._counters.published += 1
        self._counters.delivered += local
        return PublishResult(local)
