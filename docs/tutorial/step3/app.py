from collections import Counter
from threading import Lock

from flask import Flask, abort, redirect, render_template, request, url_for
from werkzeug import Response

from flask_websockets import WebSocket, WebSockets

app = Flask(__name__)
websockets = WebSockets(app)
CHOICES = ["Coffee", "Tea", "Hot chocolate", "Water"]
votes: Counter[str] = Counter()
lock = Lock()  # held while counting and publishing: the last message is the newest


@app.get("/")
def page() -> str:
    return render_template("poll.html", choices=CHOICES, votes=votes)


@app.post("/vote")
def vote() -> Response:
    choice = request.form["choice"]
    if choice not in CHOICES:
        abort(400, "There is no such choice.")
    with lock:
        votes[choice] += 1
        websockets.publish_json(votes, "poll")
    return redirect(url_for("page"))


@websockets.route("/ws")
def live(ws: WebSocket) -> None:
    with websockets.subscribe(ws, "poll"):
        with lock:
            websockets.publish_json(votes, "poll")
        ws.wait_closed()
