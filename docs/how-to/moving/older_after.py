"""A room whose members hear each other, with this package."""

from flask import Flask, request

from flask_websockets import WebSocket, WebSockets

app = Flask(__name__)
app.config["WEBSOCKETS_MAX_MESSAGE_BYTES"] = 65536
websockets = WebSockets(app)


@websockets.route("/ws/<room>")
def chat(ws: WebSocket, room: str) -> None:
    with websockets.subscribe(ws, [room]):
        ws.send("welcome")
        for data in ws.iter_data():
            websockets.publish(data, [room])


@app.post("/say/<room>")
def say(room: str) -> tuple[str, int]:
    websockets.publish(request.form["text"], [room])
    return "", 204


if __name__ == "__main__":
    app.run()
