"""A chat with rooms: http://127.0.0.1:5000/kitchen."""

from flask import Flask, render_template

from flask_websockets import WebSocket, WebSockets

app = Flask(__name__)
websockets = WebSockets(app)


@app.get("/<room>")
def page(room: str) -> str:
    return render_template("chat.html", room=room)


@websockets.route("/ws/<room>")
def chat(ws: WebSocket, room: str) -> None:
    with websockets.subscribe(ws, [room]):
        for data in ws.iter_data():
            websockets.publish(data, [room])


asgi = websockets.asgi_app()

if __name__ == "__main__":
    app.run(debug=True)
