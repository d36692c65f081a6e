"""Uploads with a live bar on http://127.0.0.1:5000: ``uvicorn --port 5000 app:asgi``."""

from collections.abc import Iterator
from hashlib import sha256

from flask import Flask, Response, request

from flask_websockets import WebSocket, WebSockets

app = Flask(__name__)
websockets = WebSockets(app)


@app.get("/")
def page() -> str:
    return """<!doctype html><title>Upload</title><link rel="icon" href="data:,">
    <h1>Upload a file</h1> <input type="file"> <progress value="0" max="1"></progress> <pre></pre>
    <a href="/numbers.csv">or download a long one</a>
    <script>
      const [bar, text] = document.querySelectorAll("progress, pre");
      document.querySelector("input").onchange = (event) => {
        const [file] = event.target.files, id = crypto.randomUUID();
        const ws = new WebSocket(`${location.origin.replace("http", "ws")}/progress/${id}`);
        ws.onmessage = (message) => bar.value = JSON.parse(message.data).received / file.size;
        ws.addEventListener("message", async () => {  // the first one: it listens
          const answer = await fetch(`/files/${id}`, { method: "POST", body: file });
          [bar.value, text.textContent] = [1, await answer.text()];
          ws.close();
        }, { once: true });
      };
    </script>"""


@websockets.route("/progress/<upload>")
def progress(ws: WebSocket, upload: str) -> None:
    with websockets.subscribe(ws, upload):
        ws.send_json({"received": 0})  # from here on the page misses nothing
        ws.wait_closed()


@app.post("/files/<upload>")
def receive(upload: str) -> dict[str, object]:
    digest, received = sha256(), 0
    while piece := request.stream.read(1024 * 1024):  # as it comes: nothing is kept
        digest.update(piece)
        received += len(piece)
        websockets.publish_json({"received": received}, upload)
    return {"bytes": received, "sha256": digest.hexdigest()}


@app.get("/numbers.csv")
def numbers() -> Response:
    def lines() -> Iterator[str]:
        for number in range(1_000_000):  # pauses while the client is slow, ends when it leaves
            yield f"{number},{number * number}\n"

    return Response(lines(), mimetype="text/csv")


asgi = websockets.asgi_app()
