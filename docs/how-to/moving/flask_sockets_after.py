"""A room whose members hear each other, with flask-websockets."""

from flask import Blueprint, Flask, request

from flask_websockets import WebSocket, WebSockets

app = Flask(__name__)
websockets = WebSockets(app)
ws = Blueprint("ws", __name__)


@websockets.route("/ws/<room>", blueprint=ws)
def chat(ws: WebSocket, room: str) -> None:
    with websockets.subscribe(ws, room):
        ws.send("welcome")
        for data in ws.iter_data():
            websockets.publish(data, room)


@app.post("/say/<room>")
def say(room: str) -> tuple[str, int]:
    websockets.publish(request.form["text"], room)
    return "", 204


app.register_blueprint(ws)

if __name__ == "__main__":
    app.run()
