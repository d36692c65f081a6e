"""A chat for those who have given a name: ``uvicorn --port 5000 app:asgi``."""

import flask_login
from flask import Flask, redirect, request
from flask_login import current_user, login_required
from werkzeug import Response

from flask_websockets import WebSocket, WebSockets

app = Flask(__name__)
app.config.update(SECRET_KEY="change this", SESSION_COOKIE_SAMESITE="Lax")
app.config.update(WEBSOCKETS_MAX_CONNECTIONS_PER_USER=10)
websockets = WebSockets(app)


@flask_login.LoginManager(app).user_loader
class User(flask_login.UserMixin):
    def __init__(self, name: str) -> None:
        self.id = name


@websockets.identify
def user() -> str | None:
    return current_user.get_id()


@app.get("/")
def page() -> str:
    return """<!doctype html><link rel="icon" href="data:,"><form id="say"><input></form>
    <form action="/login" method="post"><input name="name"> <button>Log in</button></form>
    <form action="/logout" method="post"><button>Log out</button></form><pre id="log"></pre><script>
      const ws = new WebSocket(location.origin.replace("http", "ws") + "/ws");
      ws.onmessage = ws.onclose = (e) => log.append((e.data || e.reason || "not in") + "\\n");
      say.onsubmit = (e) => { e.preventDefault(); ws.send(say[0].value); };</script>"""


@app.post("/login")
def log_in() -> Response:
    flask_login.login_user(User(request.form["name"]))  # a real one asks for a password
    return redirect("/")


@app.post("/logout")
@login_required
def log_out() -> Response:
    name = current_user.get_id()
    flask_login.logout_user()
    websockets.disconnect(user=name, reason="logged out")
    return redirect("/")


@websockets.route("/ws", max_age=12 * 60 * 60)  # then the page shows its login to us anew
@login_required
def chat(ws: WebSocket) -> None:
    with websockets.subscribe(ws, "members"):
        for text in ws.iter_text():
            websockets.publish(f"{current_user.id}: {text}", "members")


asgi = websockets.asgi_app()
