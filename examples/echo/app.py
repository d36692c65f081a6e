"""Echo on http://127.0.0.1:5000: ``python app.py``, or ``uvicorn --port 5000 app:asgi``."""

from flask import Flask

from flask_websockets import WebSocket, WebSockets

app = Flask(__name__)
websockets = WebSockets(app)

PAGE = """<!doctype html><title>Echo</title>
<form><input placeholder="Say something" autofocus></form>
<pre></pre>
<script>
  const ws = new WebSocket(location.origin.replace("http", "ws") + "/ws");
  const input = document.querySelector("input");
  document.querySelector("form").onsubmit = (event) => {
    event.preventDefault();
    ws.send(input.value);
    input.value = "";
  };
  ws.onmessage = (event) => document.querySelector("pre").append(event.data + "\\n");
</script>"""


@app.get("/")
def page() -> str:
    return PAGE


@websockets.route("/ws")
def echo(ws: WebSocket) -> None:
    for data in ws.iter_data():
        ws.send(data)


asgi = websockets.asgi_app()

if __name__ == "__main__":
    app.run()
