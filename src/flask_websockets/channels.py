"""Loop side. The hub: who is subscribed to what, and how a message reaches all of them.

It needs no lock, because it has one thread (I7): nothing here awaits between looking and
changing, and fan-out walks a snapshot.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from .bridge import ASGIMessage, Link, Ticket
from .counters import Counters

#: What a full outbox does to a published message, for the subscriptions that drop.
Dropping = Literal["drop_oldest", "drop_newest", "latest"]
OnSlow = Literal["close"] | Dropping

_COUNTERS: dict[Dropping, str] = {
    "drop_oldest": "dropped_oldest",
    "drop_newest": "dropped_newest",
    "latest": "dropped_latest",
}

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


class Backlog:
    """What waits of one subscription in its connection's outbox, and may be dropped. Loop only.

    :param on_slow: what happens when the outbox is full.
    """

    def __init__(self, link: Link, on_slow: Dropping, counters: Counters) -> None:
        self._link = link
        self._on_slow = on_slow
        self._counters = counters
        #: Messages that were dropped.
        self.dropped: int = 0  # loop only; threads read it
        # Oldest first. Under "latest" a channel has one ticket, its key; else tickets are theirs.
        self._waiting: dict[Ticket | str, Ticket] = {}

    def offer(self, message: ASGIMessage, size: int, channel: str) -> bool:
        """Queue one message; False if it is dropped for want of room."""
        victims = self._victims(size, channel)
        if victims is None:
            self._count()
            return False
        for victim in victims:
            del self._waiting[self._key(victim, channel)]
            self._link.drop(victim)
            self._count()
        taken = partial(self._taken, channel)
        ticket = self._link.write_droppable(message, size, taken)
        if ticket is not None:
            self._waiting[self._key(ticket, channel)] = ticket
        return True

    def _victims(self, size: int, channel: str) -> list[Ticket] | None:
        """The waiting messages that a new one takes the place of; None if that is no use."""
        victims: list[Ticket] = []
        if self._on_slow == "latest":
            victims = [self._waiting[channel]] if channel in self._waiting else []
        freed = sum(ticket.size for ticket in victims)
        has_room = self._link.has_room(size, len(victims), freed)
        if self._on_slow == "drop_oldest" and not has_room:
            for ticket in self._waiting.values():
                victims.append(ticket)
                freed += ticket.size
                has_room = self._link.has_room(size, len(victims), freed)
                if has_room:
                    break
        return victims if has_room else None

    def _key(self, ticket: Ticket, channel: str) -> Ticket | str:
        return channel if self._on_slow == "latest" else ticket

    def _taken(self, channel: str, ticket: Ticket) -> None:
        """The writer has taken a message."""
        del self._waiting[self._key(ticket, channel)]

    def _count(self) -> None:
        self.dropped += 1
        counter = _COUNTERS[self._on_slow]
        setattr(self._counters, counter, getattr(self._counters, counter) + 1)


class Hub:
    """Every subscription of one runtime. Loop only, all of it."""

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        # Dicts for sets: they keep the order of arrival, so every run is the same run.
        # A subscription that drops nothing, and closes its connection instead, needs no backlog.
        self._channels: dict[str, dict[Link, Backlog | None]] = {}
        self._subscribed: dict[Link, dict[str, None]] = {}

    @property
    def channels(self) -> int:
        """How many channels have a subscriber."""
        return len(self._channels)

    @property
    def subscriptions(self) -> int:
        """How many pairs of subscriber and channel there are."""
        return sum(map(len, tuple(self._subscribed.values())))

    def backlog(self, link: Link, on_slow: OnSlow) -> Backlog | None:
        """Any thread. What a subscription needs for its policy."""
        return None if on_slow == "close" else Backlog(link, on_slow, self._counters)

    def subscribe(
        self, request: tuple[Link, Sequence[str]], backlog: Backlog | None = None
    ) -> None:
        """Add a subscriber to channels that it is not subscribed to."""
        link, names = request
        if link.deaf:
            return  # its connection ended while the request was at the door
        own = self._subscribed.setdefault(link, {})
        for name in names:
            own[name] = None
            self._channels.setdefault(name, {})[link] = backlog

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

        A subscriber whose outbox is full is dealt with as its subscription says; the others do
        not wait for it.
        """
        # From the last named to the first: where two reach one subscriber, the first holds.
        recipients: dict[Link, Backlog | None] = {}
        for name in reversed(publication.channels):
            recipients.update(self._channels.get(name, {}))
        for link in publication.excluded:
            recipients.pop(link, None)
        message, size = publication.message, publication.size
        local, slow = 0, []
        for link, backlog in recipients.items():
            if link.deaf:
                pass  # its connection is over, and its task has not come to forgetting it yet
            elif backlog is not None:
                local += backlog.offer(message, size, self._channel(link, publication.channels))
            elif link.offer(message, size):
                local += 1
            else:
                slow.append(link)
        for link in slow:
            if not link.expel(*SLOW_CONSUMER):
                continue  # its view has closed meanwhile
            self._counters.closed_slow += 1
            link.entry.registry.warn(
                "closed_slow",
                "The subscriber on %s does not keep up and is closed with 1013: its outbox is full "
                "(WEBSOCKETS_OUTBOX_MESSAGES, WEBSOCKETS_OUTBOX_BYTES)",
                link.entry,
            )
            self.forget(link)
        self._counters.published += 1
        self._counters.delivered += local
        return PublishResult(local)

    def _channel(self, link: Link, names: Sequence[str]) -> str:
        """The first of the channels that a subscriber is subscribed to."""
        return next(name for name in names if link in self._channels.get(name, ()))
