"""A clock on http://127.0.0.1:5000: ``python app.py``, or ``uvicorn --port 5000 app:asgi``."""

import time
from contextlib import suppress
from threading import Thread

from flask import Flask

from flask_websockets import NotRunning, WebSocket, WebSockets

app = Flask(__name__)
websockets = WebSockets(app)


@app.get("/")
def page() -> str:
    return """<!doctype html><title>Clock</title><h1>…</h1><script>
      const ws = new WebSocket(location.origin.replace("http", "ws") + "/ws");
      ws.onmessage = (event) => document.querySelector("h1").textContent = event.data;
    </script>"""


@websockets.route("/ws")
def clock(ws: WebSocket) -> None:
    with websockets.subscribe(ws, "time"):
        for _ in ws.iter_data():  # listen, so that the connection stays open
            pass


def tell_the_time() -> None:
    with suppress(NotRunning):  # the server has stopped: so does this thread
        while True:
            websockets.publish(time.strftime("%H:%M:%S"), "time")
            time.sleep(1)


Thread(target=tell_the_time, daemon=True).start()
asgi = websockets.asgi_app()
if __name__ == "__main__":
    app.run()
