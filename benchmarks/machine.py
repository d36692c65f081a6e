"""What the machine gives: a core each for server and client, and open files."""

from __future__ import annotations

import os
import resource
from dataclasses import dataclass


@dataclass(frozen=True)
class Cores:
    """Those that may be used, and which of them the server and the client have to themselves."""

    available: frozenset[int] = frozenset()
    pinned: tuple[int, int] | None = None

    @classmethod
    def found(cls, free: bool = False) -> Cores:
        """One for the server and one for the client, where there are two to choose from."""
        if not hasattr(os, "sched_getaffinity"):
            return cls()
        cores = sorted(os.sched_getaffinity(0))
        if free or len(cores) < 2:
            return cls(frozenset(cores))
        return cls(frozenset(cores), (cores[0], cores[1]))

    def place(self, free: bool = False) -> int | None:
        """Put this process, the client, where it belongs; return the server's core.

        :param free: let the system choose this time.
        """
        if self.pinned is None:
            return None
        server, client = self.pinned
        os.sched_setaffinity(0, self.available if free else {client})
        return None if free else server


def allow_files(count: int) -> int:
    """Have this process, and the servers that it starts, open *count* files; the limit there is.

    The soft limit is raised as far as the hard one.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= count:
        return count
    wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (OSError, ValueError):
        return soft  # macOS has a limit of its own below its hard one
    return wanted
