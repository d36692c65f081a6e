"""A job, in a process of its own, which tells the server's subscribers how far it is."""

import json
import os
from urllib.request import Request, urlopen

SERVER = os.environ.get("SERVER", "http://127.0.0.1:8000")
HEADERS = {"Authorization": f"Bearer {os.environ['PUBLISH_TOKEN']}"}


def publish_json(data: object, channel: str) -> None:
    url = f"{SERVER}/internal/publish/{channel}"
    with urlopen(Request(url, json.dumps(data).encode(), HEADERS), timeout=5):
        pass  # an answer of 400 and above is an HTTPError


for percent in range(0, 101, 25):
    publish_json({"job": "resize", "percent": percent}, "jobs")
