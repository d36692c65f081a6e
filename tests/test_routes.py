"""Routes: what Flask's users know of rules, blueprints and factories is true of WebSockets."""

from __future__ import annotations

import inspect
import io
import json
import uuid
from functools import partial
from types import SimpleNamespace
from wsgiref.simple_server import ServerHandler

import pytest
from flask import Blueprint, Flask, abort, current_app, g, jsonify, request, session, url_for
from flask.views import View
from werkzeug.exceptions import HTTPException, NotFound
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.middleware.proxy_fix import ProxyFix
from werkzeug.routing import BaseConverter

from flask_websockets import (
    AsyncWebSocket,
    ConnectionClosed,
    ConnectionRejected,
    UsageError,
    WebSocket,
    WebSockets,
)

from .asgi_driver import connection
from .http_driver import request as http_request

HANDSHAKE = {"Upgrade": "websocket", "Connection": "Upgrade"}
#: Those that Flask's own views may have.
METHODS = ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS"]


def tell(ws: WebSocket, **arguments: object) -> None:
    """Say which view this is, and what its rule gave it."""
    ws.send_json([request.endpoint, arguments])


def rejected(client, path, **options):
    """The response that a handshake is answered with."""
    with pytest.raises(ConnectionRejected) as caught, client.websocket_connect(path, **options):
        pass
    return caught.value.response


def told(client, path, **options):
    """The first message on a connection, which is JSON."""
    with client.websocket_connect(path, **options) as ws:
        return ws.receive_json()


# -- the decorator ----------------------------------------------------------------------------


def test_the_decorator_returns_what_it_was_given(websockets):
    """The function stays what it is: the same object, with its signature, called like it."""

    def sync_view(ws: WebSocket, room: str, number: int = 3) -> str:
        return f"{ws}{room}{number}"

    async def async_view(ws: AsyncWebSocket, room: str) -> None:
        """Never called."""

    before = inspect.signature(sync_view)
    assert websockets.route("/sync/<room>")(sync_view) is sync_view
    assert websockets.route("/async/<room>")(async_view) is async_view
    assert inspect.signature(sync_view) == before
    assert sync_view("a", "b") == "ab3"
    assert inspect.iscoroutinefunction(async_view)


def test_the_view_function_is_named_after_the_view(app, websockets):
    """Flask's view function has the view's name and docstring: tools that list them find it."""
    websockets.route("/ws")(tell)
    assert app.view_functions["tell"].__name__ == "tell"
    assert app.view_functions["tell"].__doc__ == tell.__doc__
    assert app.view_functions["tell"].__module__ == __name__


def test_endpoints_are_named_after_functions_or_by_hand(websockets, client):
    """As in Flask: the function's name, or endpoint=."""
    websockets.route("/a")(tell)
    websockets.route("/b", endpoint="other")(tell)
    assert told(client, "/a") == ["tell", {}]
    assert told(client, "/b") == ["other", {}]


def test_a_view_without_a_name_needs_an_endpoint(websockets, client):
    """A partial has no name; with endpoint= it is a view like any other."""

    def view(ws, greeting, name):
        ws.send_json([greeting, name])

    websockets.route("/<name>", endpoint="hello")(partial(view, greeting="hello"))
    assert told(client, "/ann") == ["hello", "ann"]


def test_a_bound_method_is_a_view(websockets, client):
    """An object's method can be registered by a call of the decorator."""

    class Game:
        def play(self, ws: WebSocket, player: str) -> None:
            ws.send_json([type(self).__name__, player])

    websockets.route("/play/<player>")(Game().play)
    assert told(client, "/play/ann") == ["Game", "ann"]


def test_one_view_with_two_rules(app, websockets, client):
    """Decorators stack, as Flask's do: one endpoint, two rules, the first of them with a default.

    The pattern is from Flask's own documentation of ``defaults``.
    """

    @websockets.route("/users/", defaults={"page": 1})
    @websockets.route("/users/page/<int:page>")
    def users(ws: WebSocket, page: int) -> None:
        ws.send_json([request.endpoint, page])

    assert told(client, "/users/") == ["users", 1]
    assert told(client, "/users/page/7") == ["users", 7]
    with app.test_request_context():
        assert url_for("users", page=1) == "ws://localhost/users/"
        assert url_for("users", page=2) == "ws://localhost/users/page/2"
    # Each page has one URL; Flask sends the second one of the first page there.
    response = rejected(client, "/users/page/1")
    assert (response.status_code, response.location) == (308, "ws://localhost/users/")


def test_one_view_at_two_endpoints(websockets, client):
    """The same function under two names, each with its own options."""
    websockets.route("/a", endpoint="a", subprotocols=["v1"])(tell)
    websockets.route("/b", endpoint="b")(tell)
    with client.websocket_connect("/a", subprotocols=["v1"]) as ws:
        assert (ws.accepted_subprotocol, ws.receive_json()) == ("v1", ["a", {}])
    with client.websocket_connect("/b", subprotocols=["v1"]) as ws:
        assert (ws.accepted_subprotocol, ws.receive_json()) == (None, ["b", {}])


def test_an_endpoint_used_twice_is_flasks_error(app, websockets):
    """Two functions under one name are an AssertionError, for WebSocket and HTTP views alike."""
    websockets.route("/a", endpoint="one")(tell)
    with pytest.raises(AssertionError, match="overwriting an existing endpoint function: one"):
        websockets.route("/b", endpoint="one")(lambda ws: None)
    with pytest.raises(AssertionError, match="overwriting an existing endpoint function: one"):
        app.get("/c", endpoint="one")(lambda: "")
    app.get("/d", endpoint="two")(lambda: "")
    with pytest.raises(AssertionError, match="overwriting an existing endpoint function: two"):
        websockets.route("/e", endpoint="two")(tell)


def test_a_rule_without_a_slash_is_werkzeugs_error(websockets):
    """What Flask refuses in a rule, it refuses here."""
    with pytest.raises(ValueError, match="slash"):
        websockets.route("ws")(tell)


def test_class_based_views_answer_http_beside(app, websockets, client):
    """A class-based HTTP view and a WebSocket view do not disturb each other."""

    class Index(View):
        def dispatch_request(self):
            return "index"

    app.add_url_rule("/", view_func=Index.as_view("index"))
    websockets.route("/")(tell)
    assert client.get("/").text == "index"
    assert told(client, "/") == ["tell", {}]


# -- rules ------------------------------------------------------------------------------------

IDENTIFIER = "6f1f4aa8-9a3c-4d7c-8f4e-0d7b2f3c1a11"


@pytest.mark.parametrize(
    ("rule", "path", "value"),
    [
        ("/<x>", "/caf%C3%A9%20noir", "café noir"),
        ("/<int:x>", "/42", 42),
        ("/<int(signed=True):x>", "/-42", -42),
        ("/<float:x>", "/4.5", 4.5),
        ("/<path:x>", "/a/b/c", "a/b/c"),
        ("/<uuid:x>", f"/{IDENTIFIER}", uuid.UUID(IDENTIFIER)),
        ("/<any(red, blue):x>", "/blue", "blue"),
        ("/<string(length=2):x>", "/de", "de"),
    ],
)
def test_converters(websockets, client, rule, path, value):
    """A view gets what the rule's converter makes of the path."""
    got = []

    @websockets.route(rule)
    def view(ws, x):
        got.append(x)

    with client.websocket_connect(path):
        pass
    assert got == [value]
    assert type(got[0]) is type(value)


@pytest.mark.parametrize(
    ("rule", "path"), [("/<int:x>", "/a"), ("/<any(red, blue):x>", "/green"), ("/<x>", "/a/b")]
)
def test_what_no_converter_takes_is_404(websockets, client, rule, path):
    """A path that fits no rule is not found."""
    websockets.route(rule)(tell)
    assert rejected(client, path).status_code == 404


def test_a_converter_of_the_applications_own(app, websockets, client):
    """A custom converter works both ways: into the view and into the URL."""

    class ListConverter(BaseConverter):
        def to_python(self, value):
            return value.split("+")

        def to_url(self, value):
            return "+".join(value)

    app.url_map.converters["list"] = ListConverter

    @websockets.route("/rooms/<list:rooms>")
    def view(ws, rooms):
        ws.send_json([rooms, url_for("view", rooms=["c", "d"])])

    assert told(client, "/rooms/a+b") == [["a", "b"], "ws://localhost/rooms/c+d"]


def test_defaults(websockets, client):
    """A default fills in for a variable that the rule does not have."""
    websockets.route("/lobby", endpoint="lobby", defaults={"room": "lobby"})(tell)
    websockets.route("/room/<room>", endpoint="room", defaults={"limit": 10})(tell)
    assert told(client, "/lobby") == ["lobby", {"room": "lobby"}]
    assert told(client, "/room/blue") == ["room", {"room": "blue", "limit": 10}]


def test_a_missing_slash_is_a_redirect(websockets, client):
    """A rule that ends in a slash redirects a handshake without it, as Flask does it."""
    websockets.route("/ws/")(tell)
    assert told(client, "/ws/") == ["tell", {}]
    response = rejected(client, "/ws?x=1")
    assert (response.status_code, response.location) == (308, "ws://localhost/ws/?x=1")


def test_strict_slashes_off(websockets, client):
    """strict_slashes=False takes both."""
    websockets.route("/ws/", strict_slashes=False)(tell)
    assert told(client, "/ws/") == told(client, "/ws") == ["tell", {}]


def test_a_slash_too_many_is_404(websockets, client):
    """A rule without a slash at its end does not match one with it."""
    websockets.route("/ws")(tell)
    assert rejected(client, "/ws/").status_code == 404


def test_double_slashes_are_merged_by_a_redirect(websockets, client):
    """Werkzeug's merge_slashes redirects a handshake like a request."""
    websockets.route("/a/ws")(tell)
    response = rejected(client, "/a//ws")
    assert (response.status_code, response.location) == (308, "ws://localhost/a/ws")


def test_url_values_and_defaults_of_a_blueprint(app, websockets, client):
    """url_value_preprocessor and url_defaults see WebSocket endpoints: languages in the URL."""
    blueprint = Blueprint("site", __name__, url_prefix="/<lang>")

    @blueprint.url_value_preprocessor
    def take_language(endpoint, values):
        g.lang = values.pop("lang")

    @blueprint.url_defaults
    def add_language(endpoint, values):
        values.setdefault("lang", g.lang)

    @websockets.route("/ws/<room>", blueprint=blueprint)
    def chat(ws, room):
        ws.send_json([g.lang, room, url_for(".chat", room="other")])

    app.register_blueprint(blueprint)
    assert told(client, "/de/ws/blue") == ["de", "blue", "ws://localhost/de/ws/other"]


# -- blueprints -------------------------------------------------------------------------------


@pytest.mark.parametrize("keyword", ["blueprint", "bp"])
def test_nested_blueprints(app, websockets, client, keyword):
    """A route of a nested blueprint has all the prefixes, names and hooks, outermost first."""
    outer = Blueprint("outer", __name__, url_prefix="/outer")
    inner = Blueprint("inner", __name__, url_prefix="/<room>")
    seen = []
    app.before_request(lambda: seen.append("app"))
    outer.before_request(lambda: seen.append("outer"))
    inner.before_request(lambda: seen.append("inner"))

    @websockets.route("/ws", **{keyword: inner})
    def chat(ws, room):
        ws.send_json([request.endpoint, request.blueprints, room, url_for(".chat", room="b")])

    outer.register_blueprint(inner)
    app.register_blueprint(outer)
    url = "ws://localhost/outer/b/ws"
    name = "outer.inner.chat"
    assert told(client, "/outer/a/ws") == [name, ["outer.inner", "outer"], "a", url]
    assert seen == ["app", "outer", "inner"]


def test_a_prefix_given_at_the_registration(app, websockets, client):
    """One blueprint twice, under two names and prefixes."""
    blueprint = Blueprint("chat", __name__)
    websockets.route("/ws", blueprint=blueprint)(tell)
    app.register_blueprint(blueprint, url_prefix="/one")
    app.register_blueprint(blueprint, url_prefix="/two", name="second")
    assert told(client, "/one/ws") == ["chat.tell", {}]
    assert told(client, "/two/ws") == ["second.tell", {}]


def test_a_blueprint_can_refuse(app, websockets, client):
    """A blueprint's before_request and error handler answer for its own routes alone."""
    members = Blueprint("members", __name__, url_prefix="/members")
    members.before_request(lambda: abort(401))
    members.register_error_handler(401, lambda error: ("log in first", 401))
    websockets.route("/ws", blueprint=members)(tell)
    websockets.route("/ws", endpoint="free")(tell)
    app.register_blueprint(members)
    response = rejected(client, "/members/ws")
    assert (response.status_code, response.text) == (401, "log in first")
    assert told(client, "/ws") == ["free", {}]


def test_one_blueprint_in_two_applications(websockets, app):
    """A blueprint's routes belong to whichever applications register it."""
    blueprint = Blueprint("chat", __name__)
    websockets.route("/ws", blueprint=blueprint)(tell)
    other = Flask("other")
    websockets.init_app(other)
    other.register_blueprint(blueprint, url_prefix="/prefix")
    assert told(websockets.test_client(other), "/prefix/ws") == ["chat.tell", {}]
    assert rejected(websockets.test_client(app), "/ws").status_code == 404


def test_a_blueprint_registered_before_init_app(app):
    """Blueprints and the extension come to the application in any order."""
    websockets = WebSockets()
    blueprint = Blueprint("chat", __name__)
    websockets.route("/ws", blueprint=blueprint)(tell)
    app.register_blueprint(blueprint)
    websockets.init_app(app)
    assert told(websockets.test_client(), "/ws") == ["chat.tell", {}]


def test_both_names_of_the_parameter_are_an_error(websockets):
    """blueprint= and bp= are the same; whoever gives both means something else."""
    blueprint = Blueprint("chat", __name__)
    with pytest.raises(UsageError, match="blueprint= and bp= are the same"):
        websockets.route("/ws", blueprint=blueprint, bp=blueprint)


def test_a_route_on_a_registered_blueprint_is_flasks_error(app, websockets):
    """It would come too late for the application; Flask says so itself."""
    blueprint = Blueprint("chat", __name__)
    app.register_blueprint(blueprint)
    with pytest.raises(AssertionError, match="can no longer be called on the blueprint"):
        websockets.route("/ws", blueprint=blueprint)(tell)


# -- application factories --------------------------------------------------------------------


def test_routes_before_and_after_init_app(app):
    """A module-level object takes routes at any time before the first request."""
    websockets = WebSockets()
    websockets.route("/before", endpoint="before")(tell)
    websockets.init_app(app)
    websockets.route("/after", endpoint="after")(tell)
    client = websockets.test_client()
    assert told(client, "/before") == ["before", {}]
    assert told(client, "/after") == ["after", {}]


def test_a_factory_makes_applications_that_differ():
    """Two applications of one factory: the same routes, each with its own configuration."""
    websockets = WebSockets()

    @websockets.route("/ws")
    def view(ws):
        ws.send_json([current_app.name, current_app.config["GREETING"]])

    def create_app(name, **config):
        app = Flask(name)
        app.config.update(config)
        websockets.init_app(app)
        return app

    one = create_app("one", GREETING="hello", WEBSOCKETS_ALLOWED_ORIGINS="https://one.example")
    two = create_app("two", GREETING="hallo", WEBSOCKETS_ALLOWED_ORIGINS="https://two.example")
    origin = {"Origin": "https://one.example"}
    assert told(websockets.test_client(one), "/ws", headers=origin) == ["one", "hello"]
    assert rejected(websockets.test_client(two), "/ws", headers=origin).status_code == 403
    assert told(websockets.test_client(two), "/ws") == ["two", "hallo"]


def test_a_factory_that_makes_its_own_blueprint():
    """A blueprint made within the factory can be made again for the next application."""
    websockets = WebSockets()

    def create_app(name):
        app = Flask(name)
        websockets.init_app(app)
        blueprint = Blueprint("chat", __name__)

        @websockets.route("/ws", blueprint=blueprint)
        def view(ws):
            ws.send_json([name, current_app.name])

        app.register_blueprint(blueprint)
        return app

    apps = [create_app("one"), create_app("two")]
    clients = [websockets.test_client(app) for app in apps]
    assert [told(client, "/ws") for client in clients] == [["one", "one"], ["two", "two"]]


def test_a_factory_that_adds_routes_to_its_application_alone():
    """blueprint= takes the application too: the route is its own, and nobody else's."""
    websockets = WebSockets()

    def create_app(name):
        app = Flask(name)
        websockets.init_app(app)

        @websockets.route(f"/{name}", blueprint=app)
        def view(ws):
            ws.send_json([name, current_app.name])

        return app

    one, two = create_app("one"), create_app("two")
    assert told(websockets.test_client(one), "/one") == ["one", "one"]
    assert told(websockets.test_client(two), "/two") == ["two", "two"]
    assert rejected(websockets.test_client(two), "/one").status_code == 404


def test_a_factory_with_an_object_of_its_own():
    """WebSockets(app) within the factory: everything is made anew."""

    def create_app(name):
        app = Flask(name)
        websockets = WebSockets(app)

        @websockets.route("/ws")
        def view(ws):
            ws.send_json(name)

        return websockets

    one, two = create_app("one"), create_app("two")
    assert told(one.test_client(), "/ws") == "one"
    assert told(two.test_client(), "/ws") == "two"


def test_a_route_after_the_first_request_is_flasks_error(app, websockets, client):
    """It would work in some workers and not in others; Flask says so itself."""
    client.get("/")
    with pytest.raises(AssertionError, match="can no longer be called on the application"):
        websockets.route("/ws")(tell)


def test_several_applications_must_be_named(websockets, app):
    """With two applications, asgi_app() and test_client() have to be told which."""
    websockets.init_app(Flask("other"))
    for needs_a_name in (websockets.asgi_app, websockets.test_client):
        with pytest.raises(UsageError, match="this object has 2"):
            needs_a_name()


# -- several applications in one process ------------------------------------------------------


def make_news(name, websockets):
    """An application that subscribes its connections, and publishes what is posted to it."""
    app = Flask(name)
    websockets.init_app(app)

    @websockets.route("/news", blueprint=app)
    def news(ws):
        with websockets.subscribe(ws, "news"):
            ws.send(f"subscribed to {current_app.name}")
            ws.receive()

    @app.post("/publish")
    def publish():
        websockets.publish(request.get_data(as_text=True), "news")
        return current_app.name

    return websockets.asgi_app(app)


def test_applications_of_one_object_share_its_channels(run):
    """Two ASGI applications on one loop: what one publishes, the other's subscribers get."""
    websockets = WebSockets()
    one, two = make_news("one", websockets), make_news("two", websockets)

    async def main():
        async with connection(one, "/news") as at_one, connection(two, "/news") as at_two:
            for peer, name in ((at_one, "one"), (at_two, "two")):
                assert await peer.get_status() == 101
                assert (await peer.get())["text"] == f"subscribed to {name}"
            for asgi, name in ((one, "one"), (two, "two")):
                assert (await http_request(asgi, "POST", "/publish", body=b"hello")).text == name
                assert (await at_one.get())["text"] == "hello"
                assert (await at_two.get())["text"] == "hello"
            assert websockets.stats().connections == 2
            assert websockets.stats().channels == 1

    run(main)


def test_channels_of_two_objects_are_separate(run):
    """The same name of a channel, and nothing in common."""
    first, second = WebSockets(), WebSockets()
    one, two = make_news("one", first), make_news("two", second)

    async def main():
        async with connection(one, "/news") as at_one, connection(two, "/news") as at_two:
            for peer in (at_one, at_two):
                assert await peer.get_status() == 101
                await peer.get()
            await http_request(two, "POST", "/publish", body=b"for two")
            await http_request(one, "POST", "/publish", body=b"for one")
            # Each gets its own as the first thing, whatever was published before.
            assert (await at_one.get())["text"] == "for one"
            assert (await at_two.get())["text"] == "for two"
            assert (first.stats().connections, second.stats().connections) == (1, 1)

    run(main)


def test_test_clients_of_one_object_share_its_channels(websockets, app):
    """The same for tests: two applications, two clients, one set of channels."""

    def listen(ws):
        with websockets.subscribe(ws, "news"):
            ws.send("subscribed")
            ws.receive()

    websockets.route("/news", endpoint="news")(listen)
    other = Flask("other")
    websockets.init_app(other)
    clients = [websockets.test_client(each) for each in (app, other)]
    with clients[0].websocket_connect("/news") as one, clients[1].websocket_connect("/news") as two:
        assert one.receive() == two.receive() == "subscribed"
        websockets.publish("hello", "news")
        assert one.receive() == two.receive() == "hello"


def test_an_unsubscribed_object_cannot_subscribe_a_foreign_connection(websockets, client):
    """A connection belongs to the object that serves it; another one says so."""
    stranger = WebSockets(Flask("stranger"))

    @websockets.route("/ws")
    def view(ws):
        with pytest.raises(UsageError, match="another WebSockets object"):
            stranger.subscribe(ws, "news").__enter__()
        ws.send("still open")

    with client.websocket_connect("/ws") as ws:
        assert ws.receive() == "still open"


# -- hosts and subdomains ---------------------------------------------------------------------


def test_host_matching():
    """With host matching each host has its routes, and a host may have variables."""
    app = Flask("hosts", host_matching=True, static_host="static.example.com")
    websockets = WebSockets(app)
    websockets.route("/ws", endpoint="main", host="example.com")(tell)
    websockets.route("/ws", endpoint="tenant", host="<tenant>.example.com")(tell)
    app.add_url_rule("/ws", "page", lambda: "page", host="example.com")
    client = websockets.test_client()
    assert told(client, "/ws", base_url="http://example.com") == ["main", {}]
    assert told(client, "/ws", base_url="https://ann.example.com") == ["tenant", {"tenant": "ann"}]
    assert rejected(client, "/ws", base_url="http://example.org").status_code == 404
    assert client.get("/ws", base_url="http://example.com").text == "page"
    assert client.get("/ws", base_url="http://ann.example.com").status_code == 426
    with app.test_request_context(base_url="https://example.com"):
        assert url_for("tenant", tenant="bob") == "wss://bob.example.com/ws"
        assert url_for("main") == "wss://example.com/ws"


def test_subdomain_matching():
    """With subdomain matching a route belongs to its subdomain, and to that alone."""
    app = Flask("subdomains", subdomain_matching=True)
    app.config["SERVER_NAME"] = "example.com"
    websockets = WebSockets(app)
    blueprint = Blueprint("api", __name__, subdomain="api")
    websockets.route("/ws", endpoint="main")(tell)
    websockets.route("/ws", endpoint="tenant", subdomain="<tenant>")(tell)
    websockets.route("/ws", endpoint="chat", blueprint=blueprint)(tell)
    app.register_blueprint(blueprint)
    client = websockets.test_client()
    assert told(client, "/ws") == ["main", {}]
    assert told(client, "/ws", base_url="http://api.example.com") == ["api.chat", {}]
    assert told(client, "/ws", subdomain="ann") == ["tenant", {"tenant": "ann"}]
    assert client.get("/ws", base_url="http://api.example.com").status_code == 426
    with app.test_request_context():
        assert url_for("api.chat") == "ws://api.example.com/ws"
        assert url_for("tenant", tenant="bob") == "ws://bob.example.com/ws"


# -- one path for HTTP and WebSocket ----------------------------------------------------------


@pytest.fixture
def shared_path(app, websockets):
    """/chat: a page and a form at it, and a WebSocket."""

    @app.route("/chat", methods=["GET", "POST"])
    def page():
        return f"page by {request.method}"

    websockets.route("/chat", endpoint="chat")(tell)


def test_the_request_decides_on_a_shared_path(shared_path, client):
    """An upgrade comes to the WebSocket view, everything else to the HTTP view."""
    assert told(client, "/chat") == ["chat", {}]
    assert client.get("/chat").text == "page by GET"
    assert client.post("/chat").text == "page by POST"
    assert client.head("/chat").status_code == 200
    assert set(client.options("/chat").headers["Allow"].split(", ")) >= {"GET", "POST"}
    assert client.put("/chat").status_code == 405
    # Whatever asks for another protocol, or only half, is an ordinary request.
    for headers in ({"Upgrade": "h2c", "Connection": "Upgrade"}, {"Upgrade": "websocket"}):
        assert client.get("/chat", headers=headers).text == "page by GET"


def test_urls_of_a_shared_path(app, shared_path):
    """The endpoint says which of both is meant."""
    with app.test_request_context():
        assert url_for("page") == "/chat"
        assert url_for("chat") == "ws://localhost/chat"


def test_a_shared_path_on_a_blueprint_and_its_application(app, websockets, client):
    """The function may even have the same name, where the blueprint makes another one of it."""
    blueprint = Blueprint("live", __name__)

    @app.get("/chat")
    def chat():
        return "page"

    @websockets.route("/chat", blueprint=blueprint)
    def chat(ws):  # noqa: F811
        ws.send_json(request.endpoint)

    app.register_blueprint(blueprint)
    assert client.get("/chat").text == "page"
    assert told(client, "/chat") == "live.chat"


def test_a_shared_path_needs_two_endpoints(app, websockets):
    """Two functions of one name on one application are Flask's AssertionError, as ever."""
    app.get("/chat", endpoint="chat")(lambda: "page")
    with pytest.raises(AssertionError, match="overwriting an existing endpoint function: chat"):
        websockets.route("/chat", endpoint="chat")(tell)


# -- URLs -------------------------------------------------------------------------------------


@pytest.fixture
def urls(app, websockets):
    """HTTP, sync and async views say which URLs they build for both kinds of endpoint."""

    def build():
        return {
            "ws": url_for("ws_view", room="a b"),
            "relative": url_for("ws_view", room="a b", _external=False),
            "page": url_for("page"),
            "external": url_for("page", _external=True),
            "here": request.url,
        }

    @websockets.route("/ws/<room>")
    def ws_view(ws, room):
        ws.send_json(build())

    @websockets.route("/async")
    async def async_view(ws):
        await ws.send_json(build())

    @app.get("/page")
    def page():
        return jsonify(build())


def from_each(client, **options):
    """What the HTTP view says, and what the WebSocket views say, without their own URLs."""
    answers = [
        client.get("/page", **options).json,
        told(client, "/ws/x", **options),
        told(client, "/async", **options),
    ]
    return [{key: answer[key] for key in answer if key != "here"} for answer in answers]


@pytest.mark.parametrize(
    ("base_url", "ws", "page", "external"),
    [
        ("http://localhost", "ws://localhost/ws/a%20b", "/page", "http://localhost/page"),
        ("https://localhost", "wss://localhost/ws/a%20b", "/page", "https://localhost/page"),
        ("http://localhost:8000", "ws://localhost:8000/ws/a%20b", "/page", None),
        ("https://localhost:8443", "wss://localhost:8443/ws/a%20b", "/page", None),
        ("https://example.com/shop", "wss://example.com/shop/ws/a%20b", "/shop/page", None),
    ],
)
def test_url_for_in_each_kind_of_view(urls, client, base_url, ws, page, external):
    """ws:// or wss://, always absolute, for WebSockets; http:// or https:// for pages."""
    expected = {
        "ws": ws,
        "relative": ws,
        "page": page,
        "external": external or f"{base_url}/page",
    }
    assert from_each(client, base_url=base_url) == [expected] * 3


@pytest.mark.parametrize(
    ("forwarded", "root", "secure"),
    [
        ({}, "localhost", False),
        ({"X-Forwarded-Proto": "https"}, "localhost", True),
        ({"X-Forwarded-Host": "app.example.com"}, "app.example.com", False),
        (
            {"X-Forwarded-Proto": "https", "X-Forwarded-Host": "app.example.com"},
            "app.example.com",
            True,
        ),
        (
            {
                "X-Forwarded-Proto": "https",
                "X-Forwarded-Host": "app.example.com:8443",
                "X-Forwarded-Prefix": "/shop",
            },
            "app.example.com:8443/shop",
            True,
        ),
    ],
)
def test_url_for_behind_proxy_fix(app, urls, client, forwarded, root, secure):
    """ProxyFix counts for WebSocket views, and in both kinds of URL."""
    app.wsgi_app = ProxyFix(app.wsgi_app, x_for=1, x_proto=1, x_host=1, x_prefix=1)
    prefix = root.partition("/")[1:]
    expected = {
        "ws": f"{'wss' if secure else 'ws'}://{root}/ws/a%20b",
        "relative": f"{'wss' if secure else 'ws'}://{root}/ws/a%20b",
        "page": "".join(prefix) + "/page",
        "external": f"{'https' if secure else 'http'}://{root}/page",
    }
    assert from_each(client, headers=forwarded) == [expected] * 3


def test_the_requests_own_url_is_that_of_http(urls, client):
    """request.url, request.scheme and is_secure are what Flask's users and hooks know."""
    assert told(client, "/ws/x?q=1", base_url="https://localhost")["here"] == (
        "https://localhost/ws/x?q=1"
    )


@pytest.mark.parametrize(("preferred", "scheme"), [("http", "ws"), ("https", "wss")])
def test_url_for_outside_of_a_request(app, websockets, preferred, scheme):
    """With SERVER_NAME an application context is enough; PREFERRED_URL_SCHEME decides."""
    app.config.update(SERVER_NAME="example.com", PREFERRED_URL_SCHEME=preferred)
    websockets.route("/ws/<room>", endpoint="chat")(tell)
    with app.app_context():
        assert url_for("chat", room="a") == f"{scheme}://example.com/ws/a"


# -- mounts -----------------------------------------------------------------------------------


def mount(apps, *, keeps_path=True):
    """An ASGI front that mounts applications under prefixes.

    :param keeps_path: Starlette's way, and the specification's: the path stays whole beside
        the root path. Others take the prefix off.
    """

    async def front(scope, receive, send):
        for prefix, asgi in apps.items():
            if scope["path"].startswith(f"{prefix}/"):
                below = dict(scope, root_path=scope.get("root_path", "") + prefix)
                if not keeps_path:
                    below["path"] = scope["path"].removeprefix(prefix)
                    below.pop("raw_path", None)
                return await asgi(below, receive, send)
        raise AssertionError(scope["path"])

    return front


def place():
    """Where a view finds itself, and what it calls the others."""
    return {
        "script": request.script_root,
        "path": request.path,
        "url": request.url,
        "ws": url_for("ws_view"),
        "page": url_for("page"),
    }


def add_place(app, websockets):
    @websockets.route("/ws", blueprint=app)
    def ws_view(ws):
        ws.send_json({**place(), "app": current_app.name})

    @app.get("/page")
    def page():
        return jsonify(app=current_app.name, **place())


def expected_place(name, prefix, path):
    return {
        "app": name,
        "script": prefix,
        "path": path,
        "url": f"http://localhost{prefix}{path}",
        "ws": f"ws://localhost{prefix}/ws",
        "page": f"{prefix}/page",
    }


@pytest.mark.parametrize("keeps_path", [True, False], ids=["whole path", "path below"])
def test_mounted_by_an_asgi_front(run, keeps_path):
    """Two applications under two prefixes, one of them deep: the scope's root_path counts."""
    websockets = WebSockets()
    apps = {}
    for prefix in ("/one", "/outer/two"):
        app = Flask(prefix)
        websockets.init_app(app)
        add_place(app, websockets)
        apps[prefix] = websockets.asgi_app(app)
    front = mount(apps, keeps_path=keeps_path)

    async def main():
        for prefix in apps:
            async with connection(front, f"{prefix}/ws") as peer:
                assert await peer.get_status() == 101
                answer = json.loads((await peer.get())["text"])
                assert answer == expected_place(prefix, prefix, "/ws")
            response = await http_request(front, "GET", f"{prefix}/page")
            assert json.loads(response.body) == expected_place(prefix, prefix, "/page")
            assert (await http_request(front, "GET", f"{prefix}/ws")).status == 426
            async with connection(front, f"{prefix}/nowhere") as peer:
                assert await peer.get_status() == 404

    run(main)


@pytest.mark.parametrize("shared", [True, False], ids=["one object", "two objects"])
def test_mounted_by_dispatcher_middleware(shared):
    """Werkzeug's DispatcherMiddleware within wsgi_app: a WebSocket reaches the mounted Flask."""
    front, admin = Flask("front"), Flask("admin")
    websockets = WebSockets()
    websockets.init_app(front)
    of_admin = websockets if shared else WebSockets()
    of_admin.init_app(admin)
    add_place(front, websockets)
    add_place(admin, of_admin)
    front.wsgi_app = DispatcherMiddleware(front.wsgi_app, {"/admin": admin.wsgi_app})
    client = websockets.test_client(front)
    assert told(client, "/ws") == expected_place("front", "", "/ws")
    assert told(client, "/admin/ws") == expected_place("admin", "/admin", "/ws")
    assert client.get("/admin/page").json == expected_place("admin", "/admin", "/page")
    assert rejected(client, "/admin/nowhere").status_code == 404
    assert rejected(client, "/admin/page").status_code == 400
    assert client.get("/admin/ws").status_code == 426


def test_channels_through_dispatcher_middleware():
    """Mounted applications share the channels of their object."""
    front, admin = Flask("front"), Flask("admin")
    websockets = WebSockets()

    @websockets.route("/news")
    def news(ws):
        with websockets.subscribe(ws, "news"):
            ws.send(current_app.name)
            ws.receive()

    websockets.init_app(front)
    websockets.init_app(admin)
    front.wsgi_app = DispatcherMiddleware(front.wsgi_app, {"/admin": admin.wsgi_app})
    client = websockets.test_client(front)
    with client.websocket_connect("/news") as one, client.websocket_connect("/admin/news") as two:
        assert (one.receive(), two.receive()) == ("front", "admin")
        websockets.publish("hello", "news")
        assert one.receive() == two.receive() == "hello"


def test_a_prefix_by_dispatcher_middleware(app, websockets, client):
    """A prefix that the proxy leaves on: the application lives below it, and 404 beside it."""
    add_place(app, websockets)
    app.wsgi_app = DispatcherMiddleware(NotFound(), {"/shop": app.wsgi_app})
    assert told(client, "/shop/ws") == expected_place("tests", "/shop", "/ws")
    assert rejected(client, "/ws").status_code == 404


# -- what is no WebSocket ---------------------------------------------------------------------


def test_an_unknown_path_is_404(app, websockets, client):
    """The answer is the application's own 404."""
    app.register_error_handler(404, lambda error: ("nothing here", 404))
    response = rejected(client, "/nowhere")
    assert (response.status_code, response.text) == (404, "nothing here")


def test_a_handshake_at_an_http_only_path_is_400(app, websockets, client):
    """Flask's WebsocketMismatch, which says what is missing; the HTTP view does not run."""
    ran = []
    app.get("/page")(lambda: ran.append(True) or "page")
    response = rejected(client, "/page")
    assert response.status_code == 400
    assert "no WebSocket view: @websockets.route(...) makes one." in response.text
    assert not ran
    assert client.get("/page").text == "page"


@pytest.mark.parametrize("debug", [True, False])
def test_a_handshake_at_an_http_only_path_is_told_in_debug_mode(
    app, websockets, client, caplog, debug
):
    """A page sees no more than that it failed: who writes the application reads the log."""
    app.debug = debug
    app.get("/page")(lambda: "page")
    assert rejected(client, "/page").status_code == 400
    told = "A handshake came to /page (peer 127.0.0.1). There is an HTTP view here"
    assert (told in caplog.text) is debug


@pytest.mark.parametrize("kind", ["sync", "async", "http"])
def test_a_path_writes_no_lines_into_the_log(app, websockets, client, caplog, kind):
    """A line break that a client puts into it is shown as one, in whatever is logged of it."""
    app.debug = True

    @websockets.route("/sync/<path:rest>")
    def view(ws, rest):
        ws.accept()
        session["late"] = "lost"
        return "for nobody"

    @websockets.route("/async/<path:rest>")
    async def async_view(ws, rest):
        await ws.accept()
        session["late"] = "lost"
        return "for nobody"

    app.get("/http/<path:rest>")(lambda rest: rest)
    try:
        with client.websocket_connect(f"/{kind}/%0Aforged") as ws, pytest.raises(ConnectionClosed):
            ws.receive()
    except ConnectionRejected:
        assert kind == "http"
    told = [record.getMessage() for record in caplog.records if "forged" in record.getMessage()]
    assert len(told) == (1 if kind == "http" else 2)
    for message in told:
        assert f"'/{kind}/\\nforged'" in message
        assert "\n" not in message


def test_a_handshake_at_an_http_only_path_goes_to_the_error_handler(app, websockets, client):
    """A handler for 400 answers it, like any other bad request."""
    app.get("/page", endpoint="page")(lambda: "page")
    app.register_error_handler(400, lambda error: (f"bad: {type(error).__name__}", 400))
    response = rejected(client, "/page")
    assert (response.status_code, response.text) == (400, "bad: WebsocketMismatch")


@pytest.mark.parametrize("method", METHODS)
def test_plain_http_to_a_websocket_path_is_426(run, app, method):
    """Under ASGI, whatever the method: upgrade, and to what. The view does not run."""
    websockets = WebSockets(app)
    ran = []
    websockets.route("/ws/<room>", endpoint="chat")(lambda ws, room: ran.append(room))

    async def main():
        answer = await http_request(websockets.asgi_app(), method, "/ws/blue")
        assert answer.status == 426
        assert answer.header("upgrade") == "websocket"
        assert bool(answer.body) == (method != "HEAD")
        assert (await http_request(websockets.asgi_app(), method, "/ws/")).status == 404

    run(main)
    assert not ran


@pytest.mark.parametrize("method", METHODS)
def test_plain_http_to_a_websocket_path_is_426_under_wsgi(app, websockets, method):
    """Under WSGI as well."""
    ran = []
    websockets.route("/ws/<room>", endpoint="chat")(lambda ws, room: ran.append(room))
    response = app.test_client().open("/ws/blue", method=method)
    assert response.status_code == 426
    assert response.headers["Upgrade"] == "websocket"
    assert app.test_client().open("/ws/", method=method).status_code == 404
    assert not ran


@pytest.mark.parametrize(
    "headers",
    [{"Upgrade": "h2c", "Connection": "Upgrade"}, {"Upgrade": "websocket"}],
    ids=["another protocol", "no Connection"],
)
def test_half_a_handshake_is_426(app, websockets, client, headers):
    """What Flask does not take for a handshake is plain HTTP."""
    websockets.route("/ws")(tell)
    response = client.get("/ws", headers=headers)
    assert response.status_code == 426
    assert response.headers["Upgrade"] == "websocket"


@pytest.mark.parametrize("shared", [False, True], ids=["alone", "beside a page"])
def test_a_handshake_under_wsgi_says_what_to_serve(app, websockets, shared):
    """A handshake that reaches a WSGI server: 426, and the body names the way out."""
    websockets.route("/ws")(tell)
    if shared:
        app.get("/ws", endpoint="page")(lambda: "page")
    response = app.test_client().get("/ws", headers=HANDSHAKE)
    assert response.status_code == 426
    assert response.headers["Upgrade"] == "websocket"
    assert "asgi_app()" in response.text


def test_an_async_view_under_wsgi_says_the_same(app, websockets):
    """No coroutine is left behind that nobody awaited."""

    @websockets.route("/ws")
    async def view(ws: AsyncWebSocket) -> None:
        await ws.send("never")

    response = app.test_client().get("/ws", headers=HANDSHAKE)
    assert response.status_code == 426
    assert "asgi_app()" in response.text
    assert app.test_client().get("/ws").status_code == 426


def test_a_handshake_to_an_http_only_path_under_wsgi_is_400(app, websockets):
    """There is nothing that asgi_app() would serve."""
    app.get("/page")(lambda: "page")
    assert app.test_client().get("/page", headers=HANDSHAKE).status_code == 400


@pytest.mark.parametrize("headers", [{}, HANDSHAKE], ids=["plain", "handshake"])
def test_426_from_a_strict_wsgi_server(app, websockets, headers):
    """PEP 3333 forbids applications the Upgrade header, and wsgiref raises: 426 comes without."""
    websockets.route("/ws")(tell)
    with app.test_request_context("/ws", headers=headers) as context:
        environ = dict(context.request.environ)
    out, errors = io.BytesIO(), io.StringIO()
    server = ServerHandler(io.BytesIO(), out, errors, environ)
    server.request_handler = SimpleNamespace(log_request=lambda *figures: None)
    server.run(app)
    status_line = out.getvalue().partition(b"\r\n")[0]
    assert status_line.endswith(b" 426 UPGRADE REQUIRED"), errors.getvalue()


def test_a_path_with_a_page_is_never_426(app, websockets, client):
    """Where HTTP has a view of its own, a wrong method is 405 and names the right ones."""
    app.post("/ws", endpoint="form")(lambda: "posted")
    websockets.route("/ws")(tell)
    assert client.post("/ws").text == "posted"
    response = client.put("/ws")
    assert response.status_code == 405
    assert "POST" in response.headers["Allow"]


def test_hooks_come_before_426(app, websockets, client):
    """before_request may refuse first, as for any other path: 426 tells nobody what is there."""
    app.before_request(lambda: abort(401))
    websockets.route("/ws")(tell)
    assert client.get("/ws").status_code == 401
    assert client.get("/nowhere").status_code == 401


def test_after_request_sees_426(app, websockets, client):
    """after_request and the session work as on any other response."""
    app.before_request(lambda: session.update(seen=True))

    @app.after_request
    def after(response):
        response.headers["X-Seen"] = str(response.status_code)
        return response

    websockets.route("/ws")(tell)
    response = client.get("/ws")
    assert response.headers["X-Seen"] == "426"
    assert "session=" in response.headers["Set-Cookie"]


# -- the user's error handlers ----------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST"])
@pytest.mark.parametrize("code", [400, 404, 405])
def test_426_in_spite_of_error_handlers(app, code, method, when):
    """A handler for another error does not take the 426 away, whenever it was registered."""
    if when == "before":
        app.register_error_handler(code, lambda error: ("the user's page", code))
    websockets = WebSockets(app)
    websockets.route("/ws")(tell)
    if when == "after":
        app.register_error_handler(code, lambda error: ("the user's page", code))
    response = websockets.test_client().open("/ws", method=method)
    assert response.status_code == 426
    assert response.headers["Upgrade"] == "websocket"
    assert "the user's page" not in response.text


@pytest.mark.parametrize("when", ["before", "after"])
def test_json_for_every_error(app, when):
    """Flask's documented handler, which makes JSON of every HTTPException, makes it of 426 too."""

    def as_json(error):
        response = error.get_response()
        response.data = json.dumps({"code": error.code})
        response.content_type = "application/json"
        return response

    if when == "before":
        app.register_error_handler(HTTPException, as_json)
    websockets = WebSockets(app)
    websockets.route("/ws")(tell)
    app.get("/page", endpoint="page")(lambda: "page")
    if when == "after":
        app.register_error_handler(HTTPException, as_json)
    client = websockets.test_client()
    response = client.get("/ws")
    assert (response.status_code, response.json) == (426, {"code": 426})
    assert response.headers["Upgrade"] == "websocket"
    response = rejected(client, "/page")
    assert (response.status_code, response.json) == (400, {"code": 400})
    response = rejected(client, "/nowhere")
    assert (response.status_code, response.json) == (404, {"code": 404})


def test_the_users_own_426(app, websockets, client):
    """A page of the user's own for 426, from a handler of HTTPException that looks at the code."""

    @app.errorhandler(HTTPException)
    def page(error):
        if error.code == 426:
            return "open it with new WebSocket()", 426, {"Upgrade": "websocket"}
        return error

    websockets.route("/ws")(tell)
    app.get("/page", endpoint="page")(lambda: "page")
    for method in ("GET", "POST"):
        response = client.open("/ws", method=method)
        assert (response.status_code, response.text) == (426, "open it with new WebSocket()")
        assert response.headers.getlist("Upgrade") == ["websocket"]
    assert rejected(client, "/page").status_code == 400


def test_a_handler_of_400_still_answers_bad_requests(app, websockets, client):
    """The 426 takes nothing else from the handler of 400."""
    app.register_error_handler(400, lambda error: ("the user's page", 400))
    app.get("/bad", endpoint="bad")(lambda: abort(400))

    @websockets.route("/ws")
    def view(ws):
        abort(400)

    assert client.get("/bad").text == "the user's page"
    assert rejected(client, "/ws").text == "the user's page"
