"""Pure. The token bucket: how fast a peer may send."""

from __future__ import annotations

import math


class TokenBucket:
    """So much at once, and then so much a second.

    It holds what comes in one second, but one at least, and is full at first. What costs more
    than it holds passes when it is full, and leaves a debt: a rate is an average.

    :param rate: tokens that come in a second.
    :param now: the time, in seconds of whatever clock.
    """

    def __init__(self, rate: float, now: float) -> None:
        self._rate = rate
        self._size = max(1.0, rate)
        self._tokens = self._size
        self._filled_at = now

    def wait(self, cost: float, now: float) -> float:
        """Take *cost* tokens, if they are there.

        :returns: 0.0 if they are taken; else the seconds until they can be.
        """
        self._tokens = min(self._size, self._tokens + (now - self._filled_at) * self._rate)
        self._filled_at = now
        missing = min(cost, self._size) - self._tokens
        if missing <= 0:
            self._tokens -= cost
            return 0.0
        # What floating point rounds away must not make anybody wait for no time at all.
        return max(missing / self._rate, math.ulp(now))


class RateLimit:
    """What one peer may send in a second: messages, and their bytes.

    :param messages: a second; None for no limit.
    :param size: bytes a second; None for no limit.
    :param now: the time, in seconds of whatever clock.
    """

    def __init__(self, messages: float | None, size: float | None, now: float) -> None:
        self._messages = None if messages is None else TokenBucket(messages, now)
        self._bytes = None if size is None else TokenBucket(size, now)
        self._message_taken = False  # of one that still waits for its bytes

    def wait(self, size: int, now: float) -> float:
        """Let one message of *size* bytes pass, if it may.

        :returns: 0.0 if it may pass now; else the seconds until it may, at least.
        """
        if self._messages is not None and not self._message_taken:
            seconds = self._messages.wait(1, now)
            if seconds:
                return seconds
        self._message_taken = True
        if self._bytes is not None:
            seconds = self._bytes.wait(size, now)
            if seconds:
                return seconds
        self._message_taken = False
        return 0.0
