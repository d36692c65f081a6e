"""Devices for app.py, which shake: ``SENSORS_TOKEN=... python devices.py``."""

import argparse
import asyncio
import json
import sys
from itertools import count
from math import sin
from os import environ
from random import gauss, uniform

from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

SAMPLES = 800  # in a reading, which makes 4 kB of it
HEADERS = {"Authorization": f"Bearer {environ.get('SENSORS_TOKEN', '')}"}


async def device(number: int, url: str, rate: float) -> None:
    speed, load = uniform(0.01, 0.05), uniform(0.2, 0.8)
    async for ws in connect(f"{url}/ingest/{number}", additional_headers=HEADERS):
        try:
            for turn in count():  # connect() tries again, later and later, when this one is lost
                load = min(max(load + gauss(0, 0.03), 0.1), 1)
                wave = [sin(speed * n + turn) + 0.3 * sin(5.3 * speed * n) for n in range(SAMPLES)]
                await ws.send(json.dumps({"wave": [int(700 * load * sample) for sample in wave]}))
                await asyncio.sleep(uniform(0.5, 1.5) / rate)
        except ConnectionClosed:
            continue


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", nargs="?", default="ws://127.0.0.1:8000")
    parser.add_argument("--devices", type=int, default=50, help="up to 200")
    parser.add_argument("--rate", type=float, default=10, help="readings a second, of each")
    options = parser.parse_args()
    async with asyncio.TaskGroup() as tasks:
        for number in range(options.devices):
            tasks.create_task(device(number, options.url.rstrip("/"), options.rate))


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except* InvalidStatus as refused:
        why = "401: is SENSORS_TOKEN the server's? 404: it takes 200 devices"
        sys.exit(f"{refused.exceptions[0]} ({why})")
    except* KeyboardInterrupt:
        pass
