"""The ``WEBSOCKETS_*`` settings."""

from __future__ import annotations

import dataclasses
import os
import warnings

import pytest
from flask import Flask

from flask_websockets import ConfigurationError, WebSockets
from flask_websockets.config import Config, validate_origins

#: The documented settings and their defaults, written out.
DEFAULTS = {
    "WEBSOCKETS_MAX_CONNECTIONS": 10_000,
    "WEBSOCKETS_MAX_CONNECTIONS_PER_ADDRESS": None,
    "WEBSOCKETS_MAX_CONNECTIONS_PER_USER": None,
    "WEBSOCKETS_MAX_HANDSHAKES": 100,
    "WEBSOCKETS_HANDSHAKE_TIMEOUT": 10.0,
    "WEBSOCKETS_HTTP_THREADS": 40,
    "WEBSOCKETS_MAX_MESSAGE_BYTES": 16_777_216,
    "WEBSOCKETS_MAX_MESSAGES_PER_SECOND": None,
    "WEBSOCKETS_MAX_BYTES_PER_SECOND": None,
    "WEBSOCKETS_RATE_EXCEEDED": "close",
    "WEBSOCKETS_INBOX_MESSAGES": 100,
    "WEBSOCKETS_INBOX_BYTES": 1_048_576,
    "WEBSOCKETS_INBOX_TIMEOUT": 15.0,
    "WEBSOCKETS_INBOX_FULL": "pause",
    "WEBSOCKETS_OUTBOX_MESSAGES": 1_000,
    "WEBSOCKETS_OUTBOX_BYTES": 1_048_576,
    "WEBSOCKETS_SEND_TIMEOUT": 30.0,
    "WEBSOCKETS_CLOSE_TIMEOUT": 10.0,
    "WEBSOCKETS_DRAIN_TIMEOUT": 20.0,
    "WEBSOCKETS_MAX_CHANNELS_PER_CONNECTION": 1_000,
    "WEBSOCKETS_MAX_CHANNEL_NAME_BYTES": 255,
    "WEBSOCKETS_MAX_PUBLISH_BYTES": 1_048_576,
    "WEBSOCKETS_MAX_PENDING_PUBLISHES": 10_000,
    "WEBSOCKETS_ALLOWED_ORIGINS": (),
    "WEBSOCKETS_FAST_PATHS": True,
    "WEBSOCKETS_TUNE_PROCESS": True,
    "WEBSOCKETS_BACKEND_URL": "memory://",
}
SWITCHES = [key for key, value in DEFAULTS.items() if type(value) is bool]
NUMBERS = [key for key, value in DEFAULTS.items() if type(value) is int]
SECONDS = [key for key, value in DEFAULTS.items() if type(value) is float]
RATES = [key for key in DEFAULTS if key.endswith("_PER_SECOND")]
MAY_BE_NONE = [key for key, value in DEFAULTS.items() if value is None]


def value_of(key: str, value: object) -> object:
    """What the setting *key* is once *value* has been read."""
    config = Config.from_mapping({key: value})
    return getattr(config, key.removeprefix("WEBSOCKETS_").lower())


class TestDefaults:
    """What holds when nothing is set."""

    def test_defaults(self):
        """Every setting has the documented default, and there are no others."""
        found = dataclasses.asdict(Config())
        assert {f"WEBSOCKETS_{name.upper()}": value for name, value in found.items()} == DEFAULTS

    def test_nothing_set(self):
        """An empty mapping, or a plain Flask configuration, gives the defaults."""
        assert Config.from_mapping({}) == Config()
        assert Config.from_mapping(Flask(__name__).config) == Config()

    def test_defaults_are_valid(self):
        """Each default may be set by hand."""
        assert Config.from_mapping(DEFAULTS) == Config()

    def test_inbox_timeout_is_below_the_ping_timeout(self):
        """A paused reader gives up before uvicorn misses its pong, 20 s by default (I10)."""
        assert Config().inbox_timeout < 20

    def test_frozen(self):
        """The settings are read once; nobody changes them afterwards."""
        with pytest.raises(dataclasses.FrozenInstanceError):
            Config().max_connections = 1  # type: ignore[misc]


class TestValues:
    """What may be set, and what may not."""

    @pytest.mark.parametrize("key", NUMBERS)
    @pytest.mark.parametrize("value", [1, 7, 10**9])
    def test_whole_numbers(self, key, value):
        """A whole number of at least 1 is taken as it is."""
        assert value_of(key, value) == value

    @pytest.mark.parametrize("key", NUMBERS)
    @pytest.mark.parametrize("value", [0, -1, 1.0, 1.5, "1", None, True, b"1", [1], float("nan")])
    def test_no_whole_numbers(self, key, value):
        """Anything else is an error that names the setting and the value."""
        with pytest.raises(ConfigurationError) as caught:
            value_of(key, value)
        assert str(caught.value) == f"{key} must be a whole number of at least 1; got {value!r}."

    @pytest.mark.parametrize("key", SECONDS)
    @pytest.mark.parametrize("value", [1, 0.01, 2.5, 3600])
    def test_seconds(self, key, value):
        """Seconds may be whole or not, and become a float."""
        found = value_of(key, value)
        assert found == value
        assert type(found) is float

    @pytest.mark.parametrize("key", SECONDS)
    @pytest.mark.parametrize(
        "value", [0, 0.0, -1, -0.5, 1e9, float("inf"), float("nan"), "1", None, True, [1]]
    )
    def test_no_seconds(self, key, value):
        """Anything else, infinity included, is an error that names the setting and the value."""
        with pytest.raises(ConfigurationError) as caught:
            value_of(key, value)
        assert str(caught.value) == f"{key} must be a number of seconds above 0; got {value!r}."

    @pytest.mark.parametrize("key", SWITCHES)
    def test_switches(self, key):
        """A switch is True or False; anything else is an error that names it and the value."""
        assert value_of(key, False) is False
        for value in (1, 0, "1", None, [True]):
            with pytest.raises(ConfigurationError) as caught:
                value_of(key, value)
            assert str(caught.value) == f"{key} must be True or False; got {value!r}."

    @pytest.mark.parametrize("key", MAY_BE_NONE)
    def test_no_limit(self, key):
        """None is no limit, and a number is one."""
        assert value_of(key, None) is None
        assert value_of(key, 7) == 7

    @pytest.mark.parametrize("key", RATES)
    @pytest.mark.parametrize("value", [1, 0.5, 100_000])
    def test_rates(self, key, value):
        """So many a second may be less than one, and becomes a float."""
        assert value_of(key, value) == value
        assert type(value_of(key, value)) is float

    @pytest.mark.parametrize("key", RATES)
    @pytest.mark.parametrize("value", [0, -1, float("inf"), float("nan"), "1", True, [1]])
    def test_no_rates(self, key, value):
        """Anything else is an error that names the setting and the value."""
        with pytest.raises(ConfigurationError) as caught:
            value_of(key, value)
        expected = f"{key} must be a number above 0, or None for no limit; got {value!r}."
        assert str(caught.value) == expected

    @pytest.mark.parametrize("key", sorted(set(MAY_BE_NONE) - set(RATES)))
    @pytest.mark.parametrize("value", [0, -1, 1.5, "1", True])
    def test_no_numbers_of_connections(self, key, value):
        """A limit on connections is a whole number of at least 1, if it is one."""
        with pytest.raises(ConfigurationError, match=f"^{key} must be a whole number of at least"):
            value_of(key, value)

    @pytest.mark.parametrize("value", ["close", "slow_down"])
    def test_rate_exceeded(self, value):
        """The two policies are known."""
        assert value_of("WEBSOCKETS_RATE_EXCEEDED", value) == value

    @pytest.mark.parametrize("value", ["", "slow", "pause", None, True])
    def test_no_policy_of_rates(self, value):
        """Anything else is an error that names the setting and the policies."""
        with pytest.raises(
            ConfigurationError, match=r'^WEBSOCKETS_RATE_EXCEEDED must be "close" or "slow_down"'
        ):
            value_of("WEBSOCKETS_RATE_EXCEEDED", value)

    @pytest.mark.parametrize("value", ["pause", "close", "drop_newest"])
    def test_inbox_full(self, value):
        """The three policies are known."""
        assert value_of("WEBSOCKETS_INBOX_FULL", value) == value

    @pytest.mark.parametrize("value", ["", "PAUSE", "drop_oldest", None, True, 1, ["pause"]])
    def test_no_policy(self, value):
        """Anything else is an error that names the setting."""
        with pytest.raises(ConfigurationError, match=r"^WEBSOCKETS_INBOX_FULL must be"):
            value_of("WEBSOCKETS_INBOX_FULL", value)

    @pytest.mark.parametrize("value", ["redis://localhost", "memory", "", None, 1])
    def test_no_backend(self, value):
        """There is one backend so far."""
        with pytest.raises(
            ConfigurationError, match=r"^WEBSOCKETS_BACKEND_URL must be 'memory://'"
        ):
            value_of("WEBSOCKETS_BACKEND_URL", value)

    def test_every_setting_is_looked_at(self):
        """One bad value among good ones is found."""
        with pytest.raises(ConfigurationError, match="WEBSOCKETS_SEND_TIMEOUT"):
            Config.from_mapping({**DEFAULTS, "WEBSOCKETS_SEND_TIMEOUT": 0})

    def test_every_setting_is_tested(self):
        """Each setting is in one of the groups of this class."""
        rest = {
            "WEBSOCKETS_INBOX_FULL",
            "WEBSOCKETS_RATE_EXCEEDED",
            "WEBSOCKETS_ALLOWED_ORIGINS",
            "WEBSOCKETS_BACKEND_URL",
        }
        assert {*NUMBERS, *SECONDS, *SWITCHES, *MAY_BE_NONE, *rest} == set(DEFAULTS)


class TestOrigins:
    """``WEBSOCKETS_ALLOWED_ORIGINS`` and ``origins=``."""

    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            (None, ()),
            ([], ()),
            ("*", ("*",)),
            ("https://app.example.com", ("https://app.example.com",)),
            (["https://a.org", "null"], ("https://a.org", "null")),
            (("https://*.example.com:8443",), ("https://*.example.com:8443",)),
            ({"https://a.org"}, ("https://a.org",)),
            (frozenset(["https://a.org"]), ("https://a.org",)),
            (["HTTPS://App.Example.COM"], ("https://app.example.com",)),
        ],
    )
    def test_origins(self, value, expected):
        """None, one origin or a collection of them become a tuple in lower case."""
        assert value_of("WEBSOCKETS_ALLOWED_ORIGINS", value) == expected

    @pytest.mark.parametrize("value", [1, True, b"https://a.org", {"https://a.org": 1}, object])
    def test_no_list(self, value):
        """What is no collection is an error that names the setting."""
        with pytest.raises(ConfigurationError, match=r"^WEBSOCKETS_ALLOWED_ORIGINS must be a list"):
            value_of("WEBSOCKETS_ALLOWED_ORIGINS", value)

    @pytest.mark.parametrize(
        "value", ["", "example.com", "*.example.com", "https://a.org/", "https:a.org", 1, None]
    )
    def test_no_origin(self, value):
        """What is no origin is an error that names the setting and the value."""
        with pytest.raises(ConfigurationError) as caught:
            value_of("WEBSOCKETS_ALLOWED_ORIGINS", ["https://good.org", value])
        assert str(caught.value).startswith("WEBSOCKETS_ALLOWED_ORIGINS: an origin is")
        assert str(caught.value).endswith(f"got {value!r}.")

    def test_name_of_the_argument(self):
        """``origins=`` goes through the same check, under its own name."""
        with pytest.raises(
            ConfigurationError, match=r"^origins: an origin is .* got 'example\.com'"
        ):
            validate_origins("origins", ("example.com",))


class TestKeys:
    """Which keys are read."""

    @pytest.mark.parametrize(
        "key", ["WEBSOCKETS_MAX_CONECTIONS", "WEBSOCKETS_", "WEBSOCKETS_max_connections"]
    )
    def test_unknown_key_warns(self, key):
        """A key that looks like ours and is none is reported where the application is made."""
        with pytest.warns(UserWarning) as caught:
            config = Config.from_mapping({key: 5, "WEBSOCKETS_HTTP_THREADS": 3})
        (warning,) = caught
        assert warning.category is UserWarning
        assert str(warning.message).startswith(f"{key} is not a setting of flask-websockets")
        assert warning.filename == __file__
        hint = str(warning.message).partition("no effect; ")[2]
        if key == "WEBSOCKETS_":
            assert all(known in hint for known in DEFAULTS)
        else:
            assert hint == "did you mean WEBSOCKETS_MAX_CONNECTIONS?"
        assert config == Config(http_threads=3)

    @pytest.mark.parametrize("through", ["the constructor", "init_app"])
    def test_the_warning_points_at_the_callers_line(self, through):
        """However the application was handed over."""
        app = Flask(__name__)
        app.config["WEBSOCKETS_MAX_CONECTIONS"] = 5
        with pytest.warns(UserWarning, match="did you mean") as caught:
            WebSockets(app) if through == "the constructor" else WebSockets().init_app(app)
        assert [warning.filename for warning in caught] == [__file__]

    @pytest.mark.parametrize(
        "key",
        ["MAX_CONNECTIONS", "WEBSOCKET_MAX_CONNECTIONS", "websockets_max_connections", "DEBUG"],
    )
    def test_other_keys_are_ignored(self, key):
        """Keys of others are none of our business, whatever their value."""
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert Config.from_mapping({key: object()}) == Config()

    def test_environment_is_never_read(self, monkeypatch):
        """The websockets library has variables of the same prefix: ours come from the app alone."""
        for key in DEFAULTS:
            monkeypatch.setenv(key, "1")
        monkeypatch.setenv("WEBSOCKETS_MAX_LINE_LENGTH", "1")
        assert os.environ["WEBSOCKETS_MAX_CONNECTIONS"] == "1"
        app = Flask(__name__)
        WebSockets(app)
        assert app.extensions["websockets"].config == Config()

    def test_read_once_from_the_application(self):
        """``init_app`` reads the application's configuration; later changes have no effect."""
        app = Flask(__name__)
        app.config["WEBSOCKETS_HTTP_THREADS"] = 3
        WebSockets(app)
        app.config["WEBSOCKETS_HTTP_THREADS"] = 4
        assert app.extensions["websockets"].config == Config(http_threads=3)

    @pytest.mark.parametrize("late", ["WEBSOCKETS_HTTP_THREADS", "WEBSOCKETS_MAX_CONNECTIONS"])
    @pytest.mark.parametrize("use", ["asgi_app", "test_client"])
    def test_a_change_that_comes_too_late_warns(self, late, use):
        """Who serves or tests the application is told which setting has no effect, and where."""
        app = Flask(__name__)
        app.config["WEBSOCKETS_HTTP_THREADS"] = 3
        websockets = WebSockets(app)
        app.config[late] = 4
        with pytest.warns(UserWarning, match=f"^{late} was set after") as caught:
            getattr(websockets, use)()
            getattr(websockets, use)()
        assert [warning.filename for warning in caught] == [__file__]

    def test_a_wrong_key_that_comes_too_late_is_wrong_first(self):
        """To set it earlier would not help."""
        app = Flask(__name__)
        websockets = WebSockets(app)
        app.config["WEBSOCKETS_MAX_CONECTIONS"] = 5
        with pytest.warns(UserWarning, match="is not a setting") as caught:
            websockets.asgi_app()
        assert len(caught) == 1

    def test_settings_of_others_and_the_same_again_do_not_warn(self):
        """Only what is ours, and differs."""
        app = Flask(__name__)
        app.config["WEBSOCKETS_HTTP_THREADS"] = 3
        websockets = WebSockets(app)
        app.config.update(WEBSOCKETS_HTTP_THREADS=3, WEBSOCKETS_SERVE_PORT=1, OTHER=1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            websockets.asgi_app()
            websockets.test_client()

    def test_bad_setting_stops_init_app(self):
        """An application with a bad setting is not set up, and can be once it is put right."""
        app = Flask(__name__)
        app.config["WEBSOCKETS_HTTP_THREADS"] = 0
        with pytest.raises(ConfigurationError, match="WEBSOCKETS_HTTP_THREADS"):
            WebSockets(app)
        app.config["WEBSOCKETS_HTTP_THREADS"] = 1
        WebSockets(app)
        assert app.extensions["websockets"].config == Config(http_threads=1)
