"""What a crowd costs those beside it: their rate, with it and without it, in one run."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import Any

import uvloop
from picows import WSMsgType, ws_connect

from .bystanders import FILLS, Ready, slow_peer, stats_of
from .client import MODES, Fault, Load, Mode, WsMeasurement
from .idle import Crowd
from .servers import serve

#: Views that wait in receive.
PARKED = 5_000
#: Those that read, beside one that does not.
OTHERS = 999


async def beside_parked(
    port: int, seconds: float, parked: int, mode: Mode = MODES["echo-50"]
) -> WsMeasurement:
    """The load of *mode* while *parked* other views wait in receive."""
    crowd = Crowd(port, "/parked")
    try:
        if parked:
            await crowd.open(parked)
        measurement = await Load(mode).run(port, seconds)
        await crowd.pause(0)  # none was closed
    finally:
        crowd.close()
    return measurement


async def fill(port: int, load: Load, stack: AsyncExitStack) -> None:
    """Connect one subscriber that reads nothing, and fill its outbox to the last message."""
    peer = await asyncio.to_thread(slow_peer, port, "stuck")
    stack.callback(peer.close)
    listener = Ready(load)
    publisher, _ = await ws_connect(lambda: listener, f"ws://127.0.0.1:{port}/publish")
    stack.callback(publisher.disconnect, graceful=False)
    stack.callback(setattr, load, "closing", True)
    await load.drain()
    # Large messages fill what lies before the outbox, then small ones the outbox.
    for _ in range(FILLS):
        publisher.send(WSMsgType.TEXT, b"fill")
        await load.pause(0.005)
        if (await stats_of(port))["dropped_oldest"] > 10:
            break
    else:
        raise Fault("The outbox of the stuck one did not fill.")
    load.pending += 1
    publisher.send(WSMsgType.TEXT, b"small")
    await load.drain()


async def beside_stuck(
    port: int, seconds: float, stuck: bool, others: int = OTHERS
) -> WsMeasurement:
    """The fan-out to *others*, while one more subscriber reads nothing, or without it."""
    load = Load(Mode("/fan-out", others, in_flight=3, fan_out=True))
    async with AsyncExitStack() as stack:
        stack.callback(load.abandon)
        await load.open(port)
        await load.check()
        if stuck:
            await fill(port, load, stack)
        before, sent = await stats_of(port), load.connections[0].sent
        measurement = await load.measured(seconds)
        after, sent = await stats_of(port), load.connections[0].sent - sent
        await load.end()
    dropped = after["dropped_oldest"] - before["dropped_oldest"]
    if dropped != (sent if stuck else 0):
        raise Fault(f"Of {sent} messages {dropped} were dropped for the stuck one.")
    return measurement


def _measured(without: WsMeasurement, beside: WsMeasurement) -> dict[str, Any]:
    return {
        "without": without.rate,
        "with": beside.rate,
        "client_without": without.client_cpu,
        "client_with": beside.client_cpu,
    }


def measure_parked(ws: str, core: int | None, seconds: float) -> dict[str, Any]:
    found = []
    for parked in (0, PARKED):
        with serve("benchmarks.servers:ours", ws, core) as port:
            found.append(uvloop.run(beside_parked(port, seconds, parked)))
    return _measured(*found)


def measure_stuck(ws: str, core: int | None, seconds: float) -> dict[str, Any]:
    found = []
    for stuck in (False, True):
        with serve("benchmarks.bystanders_app:slow_subscribers", ws, core) as port:
            found.append(uvloop.run(beside_stuck(port, seconds, stuck)))
    return _measured(*found)


#: Modes whose figure is a rate.
CROWD_MODES = {"echo-50-parked": measure_parked, "fan-out-1000-stuck": measure_stuck}


def crowd_table(results: dict[str, dict[str, Any]]) -> str:
    lines = ["mode                with/without  of the runs     without/s     with/s  client CPU"]
    for mode, result in results.items():
        medians, ratios = result["medians"], result["ratios"]
        line = f"{mode:19} {result['ratio']:12.2f}  {min(ratios):.2f} to {max(ratios):.2f}  "
        line += "".join(f"{medians[name]:11,.0f}" for name in ("without", "with"))
        line += "  " + " ".join(f"{medians[f'client_{name}']:4.0%}" for name in ("without", "with"))
        lines.append(line)
    return "\n".join(lines)
