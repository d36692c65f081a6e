"""A live poll: ``python app.py``, or ``flask --app app websockets serve``."""

from collections import Counter
from contextlib import suppress
from secrets import token_hex
from threading import Lock

from flask import Flask, abort, redirect, render_template, request, session, url_for
from werkzeug import Response

from flask_websockets import NotRunning, WebSocket, WebSockets

app = Flask(__name__)
app.secret_key = token_hex()  # a new one at each start, as the ballots are gone then
websockets = WebSockets(app)
asgi = websockets.asgi_app()
CHOICES = ["Coffee", "Tea", "Hot chocolate", "Water"]
ballots: dict[str, str] = {}  # voter -> choice
pages: set[WebSocket] = set()
lock = Lock()  # held while counting and publishing: the last message is the newest


def publish_votes() -> None:
    with lock, suppress(NotRunning):  # a server that stops has nobody left to tell
        votes = Counter(ballots.copy().values())
        websockets.publish_json({"votes": votes, "watching": len(pages)}, "poll")


@app.get("/")
def page() -> str:
    return render_template("poll.html", choices=CHOICES, votes=Counter(ballots.copy().values()))


@app.post("/vote")
def vote() -> Response:
    choice = request.form["choice"]
    if choice not in CHOICES:
        abort(400, "There is no such choice.")
    me = session.setdefault("voter", token_hex(8))
    ballots[me] = choice
    publish_votes()
    return redirect(url_for("page"))


@websockets.route("/ws")
def live(ws: WebSocket) -> None:
    me = session.setdefault("voter", token_hex(8))
    ws.send_json({"mine": ballots.get(me)})  # to this page alone
    pages.add(ws)
    try:
        with websockets.subscribe(ws, "poll", on_slow="latest"):
            publish_votes()
            ws.wait_closed()
    finally:
        pages.remove(ws)
        publish_votes()


if __name__ == "__main__":
    app.run()
