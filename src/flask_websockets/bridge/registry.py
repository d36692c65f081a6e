"""Both sides. Who is connected, by address and by user; and what was refused, for the log.

Handshakes take places in their threads; the loop gives them back.
"""

from __future__ import annotations

import ipaddress
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias
from uuid import UUID

from ..protocol import State

if TYPE_CHECKING:
    from .link import Link

logger: logging.Logger = logging.getLogger("flask_websockets")

#: What names a user: 5 and "5" name the same.
User: TypeAlias = str | int | UUID

#: Seconds in which one kind of refusal is logged once: a flood of handshakes must not become a
#: flood of lines.
LOG_EVERY = 60.0

#: Of a path or an address; a path may have kilobytes.
LOGGED_CHARACTERS = 200

#: One customer of an internet provider gets a whole network of IPv6 (RFC 6177).
CUSTOMER_BITS = 64


def address_key(address: str) -> str:
    """Any thread. What an address is counted as: itself, or its network of IPv6."""
    # Some proxies tell the port as well: 192.0.2.1:50001, [2001:db8::1]:50001.
    if address.startswith("["):
        address = address[1:].partition("]")[0]
    elif address.count(":") == 1:
        address = address.partition(":")[0]
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address  # a proxy may give names to its clients
    if isinstance(found, ipaddress.IPv4Address):
        return str(found)
    if found.ipv4_mapped is not None:
        return str(found.ipv4_mapped)
    return str(ipaddress.ip_network((int(found), CUSTOMER_BITS), strict=False))


def user_key(user: object) -> str:
    """Any thread. What a user is counted as.

    :raises TypeError: if it is nothing that names a user.
    """
    if not isinstance(user, (str, int, UUID)) or isinstance(user, bool):
        raise TypeError(
            "A user is named by a str, an int or a UUID, such as the primary key; got "
            f"{type(user).__name__}."
        )
    return str(user)


@dataclass
class Place:
    """What one key holds."""

    #: The connections, in the order of their handshakes.
    links: dict[Link, None] = field(default_factory=dict)
    #: What the key stands for: a user, and the application that named it.
    holder: Any = None


class Places:
    """Any thread. The connections of each address, or of each user.

    Its lock may be taken again by the thread that has it: a signal handler may run in between.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._places: dict[str, Place] = {}  # guarded by _lock
        self._asking: list[set[str]] = []  # guarded by _lock: one for each handshake that asks

    def take(self, key: str, link: Link, limit: int | None, holder: Any = None) -> bool:
        """Count *link* among those of *key*; False if there are *limit* already."""
        with self._lock:
            place = self._places.get(key)
            if place is None:
                place = self._places[key] = Place(holder=holder)
            if limit is not None and len(place.links) >= limit:
                return False
            place.links[link] = None
        link.entry.places.append((self, key))
        return True

    def give_back(self, key: str, link: Link) -> None:
        """Count *link* no more."""
        with self._lock:
            place = self._places.get(key)
            if place is not None:
                place.links.pop(link, None)
                if not place.links:
                    del self._places[key]

    @contextmanager
    def asking(self) -> Iterator[Container[str]]:
        """While a handshake asks whose it is: the keys that were evicted meanwhile."""
        evicted: set[str] = set()
        with self._lock:
            self._asking.append(evicted)
        try:
            yield evicted
        finally:
            with self._lock:
                self._asking = [each for each in self._asking if each is not evicted]

    def evict(self, key: str) -> tuple[Link, ...]:
        """The connections of *key* that are not over; handshakes that ask now will know."""
        with self._lock:
            for evicted in self._asking:
                evicted.add(key)
            place = self._places.get(key)
            links = () if place is None else tuple(place.links)
        return tuple(link for link in links if link.state in (State.CONNECTING, State.OPEN))

    def holders(self) -> list[Any]:
        """What the keys stand for, each once."""
        with self._lock:
            return [place.holder for place in self._places.values()]

    def __len__(self) -> int:
        return len(self._places)


class Registry:
    """Any thread. What one runtime knows of who is connected, and what it has refused."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        #: Places of each address, where they are limited.
        self.addresses: Places = Places()
        #: Places of each user, where somebody says who that is.
        self.users: Places = Places()
        self._clock = clock
        self._lock = threading.RLock()  # as that of Places
        self._refused: Counter[str] = Counter()  # guarded by _lock
        self._quiet: Counter[str] = Counter()  # guarded by _lock: since the last line
        self._logged_at: dict[str, float] = {}  # guarded by _lock

    def count(self, kind: str) -> None:
        """Count one refusal whose caller is told by an exception."""
        with self._lock:
            self._refused[kind] += 1

    def refuse(self, kind: str, message: str, *arguments: object) -> None:
        """Count one refusal, and log it as :meth:`warn` does."""
        self.count(kind)
        self.warn(kind, message, *arguments)

    def warn(self, kind: str, message: str, *arguments: object) -> None:
        """Log the first of its kind, and the next one when a minute has passed."""
        with self._lock:
            now = self._clock()
            if now - self._logged_at.get(kind, -LOG_EVERY) < LOG_EVERY:
                self._quiet[kind] += 1
                return
            self._logged_at[kind] = now
            quiet = self._quiet.pop(kind, 0)
        if quiet:
            message = f"{message} (and %d more since the last such line)"
            arguments = (*arguments, quiet)
        logger.warning(message, *arguments)

    def refused(self, kind: str) -> int:
        """How often *kind* was refused."""
        return self._refused[kind]

    def forget(self, link: Link) -> None:
        """Loop. A connection and its view are over: give its places back."""
        while link.entry.places:
            places, key = link.entry.places.pop()
            places.give_back(key, link)


@dataclass
class Entry:
    """What is known of one connection, for its limits and for the log."""

    #: Whom its handshake asks for places, and tells what it refuses.
    registry: Registry = field(default_factory=Registry)
    #: Its path.
    path: str = "?"
    #: Where it comes from: for the server at first, for the application from the handshake on.
    peer: str = "without an address"
    #: What the server can do beyond ASGI's core.
    extensions: Mapping[str, Any] | None = None
    #: Told on the loop with which HTTP status the handshake is answered; None where the client has
    #: left before.
    on_answer: Callable[[int | None], object] = lambda status: None
    #: Its view's endpoint, from the handshake on.
    endpoint: str = ""
    #: Seconds after which the login is too old that the handshake was checked with.
    max_age: float | None = None
    #: What it holds. The handshake's thread appends; the loop pops when that is over.
    places: list[tuple[Places, str]] = field(default_factory=list)

    def __str__(self) -> str:
        """The connection, for the log: nothing of its query, headers or messages."""
        endpoint = f"endpoint {self.endpoint}, " if self.endpoint else ""
        return f"{_loggable(self.path)} ({endpoint}peer {_loggable(self.peer)})"


def _loggable(text: str) -> str:
    """What a client has chosen, so that it makes no lines of its own in the log."""
    if len(text) > LOGGED_CHARACTERS:
        text = f"{text[:LOGGED_CHARACTERS]}..."
    return text if text.isprintable() else ascii(text)
