"""A members' room, with a login, a plain view and an async one. Run ``python app.py``."""

import flask_login
from flask import Blueprint, Flask, redirect, render_template, request
from werkzeug import Response
from werkzeug.security import gen_salt

from flask_websockets import AsyncWebSocket, WebSocket, WebSockets

app = Flask(__name__)
app.config.update(SECRET_KEY=gen_salt(32), SESSION_COOKIE_SAMESITE="Lax")
app.config.from_prefixed_env()  # with FLASK_SECRET_KEY set, logins outlast a restart
websockets = WebSockets(app)
websockets.identify(lambda: flask_login.current_user.get_id())
asgi = websockets.asgi_app()
members = Blueprint("members", __name__, url_prefix="/members")
members.before_request(flask_login.login_required(lambda: None))  # for HTTP and WebSockets alike


@flask_login.LoginManager(app).user_loader
class User(flask_login.UserMixin):
    def __init__(self, name: str) -> None:
        self.id = name.strip()[:24] or "Guest"


@app.route("/", methods=["GET", "POST"])
def page() -> Response | str:
    if request.method == "GET":
        return render_template("mixed.html")
    flask_login.login_user(User(request.form["name"]))  # a real one asks for a password
    return redirect("/")


@members.post("/logout")
def log_out() -> Response:
    name = flask_login.current_user.get_id()
    flask_login.logout_user()
    websockets.disconnect(user=name, reason="logged out")
    return redirect("/")


@websockets.route("/notes", blueprint=members, max_age=12 * 60 * 60, max_message_bytes=2000)
def notes(ws: WebSocket) -> None:  # on a thread of its own: it may block
    with websockets.subscribe(ws, "notes"):
        while isinstance(text := ws.receive(), str) and text.strip():
            websockets.publish_json([flask_login.current_user.id, text.strip()], "notes")
        ws.close(4400, "A note is text, and not empty.")


@websockets.route("/pulse", blueprint=members, max_age=12 * 60 * 60, max_message_bytes=2000)
async def pulse(ws: AsyncWebSocket) -> None:  # on the server's loop: it awaits two things at once
    async with websockets.subscribe(ws, "pulse", on_slow="drop_oldest"):
        while (sign := await ws.receive(timeout=1)) in (None, "hello", "coffee", "hooray"):
            await websockets.apublish_json([flask_login.current_user.id, sign], "pulse")
        await ws.close(4400, 'Expected "hello", "coffee" or "hooray".')


app.register_blueprint(members)
if __name__ == "__main__":
    app.run()
