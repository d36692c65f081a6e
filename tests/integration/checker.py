"""Replays what real clients logged on one channel, and says what the promises do not allow.

It knows nothing of the package under test: it is given messages and times, and returns faults.
Each message must be unique, so that a log can be read without knowing who sent what.

The promises:

* nothing is lost that was published after a subscriber was told that it is subscribed, and
  before it asked to leave; what it has got has no holes;
* nothing arrives twice, and nothing after the subscriber was told that it has left;
* there is one order in which all subscribers get their messages;
* each publisher's messages keep the order in which they were published.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise


@dataclass(frozen=True)
class Published:
    """One publish call that has returned. Times are of a clock that all processes share."""

    message: str
    began: float
    returned: float


@dataclass
class Subscriber:
    """What one client saw during one subscription, in the client's own words."""

    name: str
    received: list[str] = field(default_factory=list)
    #: What came after it was told that it has left.
    received_after_leaving: list[str] = field(default_factory=list)
    #: When it was told that it is subscribed; None if it never was.
    subscribed_at: float | None = None
    #: When it asked to leave, all that came before "left" being in ``received``; None if it
    #: went without a word, which promises nothing about what was on its way.
    leaving_at: float | None = None


@dataclass(frozen=True)
class Fault:
    """One thing that the promises do not allow."""

    #: "lost", "doubled", "unknown", "late", "publisher's order" or "one order".
    kind: str
    subscriber: str
    messages: tuple[str, ...]


def check(
    publishers: Mapping[str, Sequence[Published]], subscribers: Sequence[Subscriber]
) -> list[Fault]:
    """Every fault in the logs of one channel, each once; none if all promises were kept."""
    places = {
        call.message: (publisher, number)
        for publisher, calls in publishers.items()
        for number, call in enumerate(calls)
    }
    if len(places) != sum(map(len, publishers.values())):
        raise ValueError("Two published messages are the same; the logs cannot be replayed.")
    faults: dict[Fault, None] = {}  # a dict for a set: it keeps the order of discovery
    clean: dict[str, list[str]] = {}
    for subscriber in subscribers:
        if subscriber.name in clean:
            raise ValueError(f"Two subscribers are called {subscriber.name}.")
        clean[subscriber.name] = received = list(dict.fromkeys(subscriber.received))
        for fault in (
            *_doubled(subscriber),
            *_late(subscriber),
            *_unknown(subscriber, places),
            *_promised_and_lost(subscriber, publishers),
            *_publishers_order(subscriber.name, received, places),
        ):
            faults[fault] = None
    for fault in (*_one_order(clean), *_holes(clean, publishers)):
        faults[fault] = None
    return list(faults)


def _doubled(subscriber: Subscriber) -> Iterator[Fault]:
    seen = set()
    for message in subscriber.received:
        if message in seen:
            yield Fault("doubled", subscriber.name, (message,))
        seen.add(message)


def _late(subscriber: Subscriber) -> Iterator[Fault]:
    for message in subscriber.received_after_leaving:
        yield Fault("late", subscriber.name, (message,))


def _unknown(subscriber: Subscriber, places: Mapping[str, object]) -> Iterator[Fault]:
    for message in subscriber.received:
        if message not in places:
            yield Fault("unknown", subscriber.name, (message,))


def _promised_and_lost(
    subscriber: Subscriber, publishers: Mapping[str, Sequence[Published]]
) -> Iterator[Fault]:
    """By the clock: the call began after the subscription was confirmed, and returned in time."""
    if subscriber.subscribed_at is None or subscriber.leaving_at is None:
        return
    got = set(subscriber.received)
    for calls in publishers.values():
        for call in calls:
            if (
                call.began > subscriber.subscribed_at
                and call.returned < subscriber.leaving_at
                and call.message not in got
            ):
                yield Fault("lost", subscriber.name, (call.message,))


def _publishers_order(
    name: str, received: list[str], places: Mapping[str, tuple[str, int]]
) -> Iterator[Fault]:
    last: dict[str, tuple[int, str]] = {}
    for message in received:
        if message not in places:
            continue
        publisher, number = places[message]
        if publisher in last and number < last[publisher][0]:
            yield Fault("publisher's order", name, (last[publisher][1], message))
        else:
            last[publisher] = number, message


def _one_order(logs: Mapping[str, list[str]]) -> Iterator[Fault]:
    """All logs together, each a chain of "before", must not run in a circle.

    Two logs that agree with each other pairwise may still contradict a third.
    """
    before: TopologicalSorter[str] = TopologicalSorter()
    for received in logs.values():
        for first, second in pairwise(received):
            before.add(second, first)
    try:
        before.prepare()
    except CycleError as error:
        yield Fault("one order", "", tuple(error.args[1]))


def _holes(
    logs: Mapping[str, list[str]], publishers: Mapping[str, Sequence[Published]]
) -> Iterator[Fault]:
    """By the order, without any clock: a subscription is one stretch of what was published.

    Whoever got two messages got all those that others got between them, and all those that
    their publisher published between them.
    """
    neighbours: dict[tuple[str, str], list[str]] = {}
    for name, received in logs.items():
        for pair in pairwise(received):
            neighbours.setdefault(pair, []).append(name)
    got = {name: set(received) for name, received in logs.items()}
    for log in logs.values():
        place = {message: number for number, message in enumerate(log)}
        for (first, second), names in neighbours.items():
            if first in place and second in place:
                between = log[place[first] + 1 : place[second]]
                yield from _missing(names, between, got)
    for calls in publishers.values():
        messages = [call.message for call in calls]
        for name in logs:
            places = [n for n, message in enumerate(messages) if message in got[name]]
            if places:
                yield from _missing([name], messages[places[0] : places[-1]], got)


def _missing(names: list[str], between: list[str], got: Mapping[str, set[str]]) -> Iterator[Fault]:
    for message in between:
        for name in names:
            if message not in got[name]:
                yield Fault("lost", name, (message,))
