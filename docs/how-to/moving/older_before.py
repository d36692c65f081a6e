"""A room whose members hear each other, with flask-websockets 0.1.2."""

from flask import Flask, request

from flask_websockets import WebSocket, WebSockets

app = Flask(__name__)
app.config["SOCK_SERVER_OPTIONS"] = {"ping_interval": 25, "max_message_size": 65536}
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
