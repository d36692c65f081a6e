"""What a server's process says of itself: its memory and its threads."""

from __future__ import annotations

import threading


def resident() -> dict[str, int | None]:
    """Bytes of resident memory, None where the system does not tell, and threads."""
    try:
        with open("/proc/self/status") as status:
            fields = dict(line.split(":", 1) for line in status)
        memory, threads = int(fields["VmRSS"].split()[0]) * 1024, int(fields["Threads"])
    except (OSError, KeyError):
        return {"resident": None, "threads": threading.active_count()}
    return {"resident": memory, "threads": threads}
