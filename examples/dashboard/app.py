"""The server's own numbers, live: ``python app.py``, or ``flask --app app websockets serve``."""

from collections import deque
from contextlib import suppress
from threading import Lock, Thread, active_count
from time import monotonic, process_time, sleep

from flask import Flask, render_template

from flask_websockets import NotRunning, WebSocket, WebSockets

app = Flask(__name__)
websockets = WebSockets(app)
asgi = websockets.asgi_app()
INTERVAL = 0.5  # seconds
history: deque[dict[str, float]] = deque(maxlen=240)  # two minutes
lock = Lock()  # held while a sample is kept and published: who comes gets it once


@app.get("/")
def page() -> str:
    return render_template("dashboard.html", samples=history.maxlen)


@websockets.route("/ws")
def watch(ws: WebSocket) -> None:
    with websockets.subscribe(ws, "numbers", on_slow="latest"):
        with lock:
            ws.send_json(list(history))  # a list replaces what the page has, the rest is added
        ws.wait_closed()


def readings() -> dict[str, float]:
    """What only grows: the difference of two of them is a rate."""
    stats = websockets.stats()
    counts = {"handshakes": stats.connections_total, "deliveries": stats.delivered}
    return {"time": monotonic(), "cpu": process_time(), **counts}


def measure() -> None:
    before = readings()
    with suppress(NotRunning):  # the server has stopped: so does this thread
        while True:
            sleep(INTERVAL)
            now = readings()
            passed = now["time"] - before["time"]
            sample = {name: (now[name] - before[name]) / passed for name in now}
            sample |= {"late": passed - INTERVAL, "threads": active_count()}
            sample["connections"] = websockets.stats().connections
            before = now
            with lock:
                history.append(sample)
                websockets.publish_json(sample, "numbers")


Thread(target=measure, daemon=True).start()
if __name__ == "__main__":
    app.run()
