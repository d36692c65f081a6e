"""A room whose members hear each other, with flask-websockets."""

from flask import Flask, request

from flask_websockets import WebSocket, WebSockets

app = Flask(__name__)
app.config["WEBSOCKETS_MAX_MESSAGE_BYTES"] = 65536
websockets = WebSockets(app)


@websockets.route("/ws/<room>")
def chat(ws: WebSocket, room: str) -> None:
    name = request.args.get("name", "guest")
    with websockets.subscribe(ws, room):
        ws.send_json({"welcome": name})
        for text in ws.iter_text():
            websockets.publish_json({"name": name, "text": text}, room)


@app.post("/say/<room>")
def say(room: str) -> tuple[str, int]:
    websockets.publish_json({"name": "the house", "text": request.form["text"]}, room)
    return "", 204


if __name__ == "__main__":
    app.run()
