"""A small driver for the system's Chromium, over its DevTools protocol. Every wait has an end."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from websockets.sync.client import connect

from .waiting import wait_until

#: Seconds for a cold start on a loaded machine.
START_TIMEOUT = 60.0
#: Seconds for one answer of the DevTools protocol.
ANSWER_TIMEOUT = 30.0
#: Seconds to end by itself; then it is killed.
END_TIMEOUT = 5.0

FLAGS = [
    "--headless",
    "--no-sandbox",  # it does not work for root, who runs what is in a container
    "--disable-gpu",
    "--disable-dev-shm-usage",  # /dev/shm is small in a container
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--no-first-run",
    "--no-proxy-server",
    "--remote-debugging-port=0",
]


class BrowserError(Exception):
    """The browser ended, refused a command, or a script in a page raised."""


def find_chromium() -> str | None:
    """The path of the system's Chromium; None if there is none."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next(filter(None, map(shutil.which, names)), None)


class Browser:
    """A headless Chromium with a fresh profile in *directory*.

    Use it in a ``with`` block, which ends the process whatever happens.

    :param flags: more of its command line.
    """

    def __init__(self, directory: Path, *flags: str) -> None:
        executable = find_chromium()
        if executable is None:
            raise BrowserError("There is no Chromium on this system.")
        self._profile = directory / "profile"
        self._log_path = directory / "chromium.log"
        self._pages: list[Page] = []
        self._commands: _Commands | None = None
        with self._log_path.open("wb") as log:
            self._process = subprocess.Popen(
                [executable, *FLAGS, *flags, f"--user-data-dir={self._profile}", "about:blank"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # its helper processes are in its group, and end with it
            )
        try:
            port, path = wait_until(self._endpoint, START_TIMEOUT, "Chromium's DevTools port")
            self._address = f"ws://127.0.0.1:{port}"
            self._commands = _Commands(self._address + path)
        except BaseException:
            self.kill()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        try:
            for page in self._pages:
                page.disconnect()
            if self._commands is not None:
                self._commands.call("Browser.close")
                self._process.wait(END_TIMEOUT)
        except Exception:
            pass  # it is killed either way, and a failed test has its own error to show
        finally:
            self.kill()

    def kill(self) -> None:
        """End the browser and its helper processes."""
        if self._commands is not None:
            self._commands.disconnect()
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # all of them have ended
        self._process.wait(END_TIMEOUT)

    def open(
        self, url: str, *, width: int = 1200, height: int = 800, beside: Page | None = None
    ) -> Page:
        """Open *url* as somebody else: pages share neither cookies nor storage.

        Or as a second tab *beside* a page, with which it shares both.
        """
        assert self._commands is not None
        if beside:
            context = beside.context
        else:
            context = self._commands.call("Target.createBrowserContext")["browserContextId"]
        target = self._commands.call(
            "Target.createTarget", url="about:blank", browserContextId=context
        )["targetId"]
        page = Page(_Commands(f"{self._address}/devtools/page/{target}"), context)
        self._pages.append(page)
        page.resize(width, height)
        page.go(url)
        return page

    def close_pages(self) -> None:
        """Close all pages, and forget their cookies and storage: nothing of them goes on."""
        assert self._commands is not None
        for page in self._pages:
            page.disconnect()
        for context in {page.context for page in self._pages}:
            self._commands.call("Target.disposeBrowserContext", browserContextId=context)
        self._pages.clear()

    def _endpoint(self) -> list[str] | None:
        if self._process.poll() is not None:
            log = self._log_path.read_text(errors="replace")
            raise BrowserError(f"Chromium ended with {self._process.returncode}:\n{log}")
        try:
            lines = (self._profile / "DevToolsActivePort").read_text().splitlines()
        except FileNotFoundError:
            return None
        return lines if len(lines) == 2 else None


class Page:
    """One page of a :class:`Browser`."""

    def __init__(self, commands: _Commands, context: str) -> None:
        #: Whose cookies and storage it has.
        self.context = context
        self._commands = commands
        for domain in ("Page", "Runtime", "Log"):
            commands.call(f"{domain}.enable")

    @property
    def errors(self) -> list[str]:
        """What the page raised or logged as an error so far, requests that failed included."""
        self.run("0")  # what happened before the answer has come before it
        return self._commands.errors

    def go(self, url: str) -> None:
        """Go to *url* and wait until it is loaded."""
        self.run("window.__previous = true")
        answer = self._commands.call("Page.navigate", url=url)
        if "errorText" in answer:
            raise BrowserError(f"{url}: {answer['errorText']}")
        self.wait_for("!window.__previous && document.readyState === 'complete'")

    def back(self) -> None:
        """Go back, as the browser's button does, and do not wait for it.

        A script's ``history.back()`` may take away the page that it should answer from.
        """
        history = self._commands.call("Page.getNavigationHistory")
        before = history["entries"][history["currentIndex"] - 1]
        self._commands.call("Page.navigateToHistoryEntry", entryId=before["id"])

    def run(self, script: str) -> Any:
        """Evaluate JavaScript; a promise is awaited. Returns what JSON can carry of its value.

        :raises BrowserError: if the script raises, or the page is left meanwhile.
        """
        answer = self._commands.call(
            "Runtime.evaluate",
            expression=script,
            awaitPromise=True,
            returnByValue=True,
            userGesture=True,
        )
        if "exceptionDetails" in answer:
            raise BrowserError(f"{script}: {_description(answer['exceptionDetails'])}")
        return answer["result"].get("value")

    def wait_for(self, script: str, timeout: float = 15.0) -> Any:
        """Evaluate *script* again and again until it is true, and return its value.

        While it raises it is not true yet: the page may still be on its way.

        :raises TimeoutError: if it is not true within *timeout* seconds.
        """
        error = ""

        def true() -> Any:
            nonlocal error
            try:
                value, error = self.run(script), ""
            except BrowserError as raised:
                value, error = None, f" ({raised})"
            return value

        try:
            return wait_until(true, timeout, script)
        except TimeoutError as timed_out:
            raise TimeoutError(f"{timed_out}{error}") from None

    def press(self, key: str, text: str = "") -> None:
        """Press and release a key, as a keyboard would: ``press("Enter", "\\r")``."""
        codes = {"Enter": 13, "Escape": 27, "Tab": 9}
        parameters = {"key": key, "code": key, "windowsVirtualKeyCode": codes.get(key, 0)}
        down = "keyDown" if text else "rawKeyDown"
        self._commands.call("Input.dispatchKeyEvent", type=down, text=text, **parameters)
        self._commands.call("Input.dispatchKeyEvent", type="keyUp", **parameters)

    def type(self, text: str) -> None:
        """Type *text* into whatever has the focus."""
        self._commands.call("Input.insertText", text=text)

    def resize(self, width: int, height: int) -> None:
        """Give the page a window of that many CSS pixels."""
        self._commands.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def set_dark(self, dark: bool) -> None:
        """Have the system prefer dark colours, or light ones."""
        feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._commands.call("Emulation.setEmulatedMedia", features=[feature])

    def screenshot(self, path: Path) -> None:
        """Write what can be seen of the page to *path*, as PNG."""
        answer = self._commands.call("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(answer["data"]))

    def disconnect(self) -> None:
        """Let go of the page. It stays open until the browser ends."""
        self._commands.disconnect()


class _Commands:
    """One DevTools connection: commands with their answers, one at a time, and the errors."""

    def __init__(self, url: str) -> None:
        self._open = ExitStack()
        self._connection = self._open.enter_context(
            connect(url, proxy=None, max_size=None, open_timeout=ANSWER_TIMEOUT)
        )
        self._last_id = 0
        self.errors: list[str] = []

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and return its result.

        :raises BrowserError: if the browser refuses it.
        :raises TimeoutError: if it does not answer within ``ANSWER_TIMEOUT``.
        """
        self._last_id += 1
        self._connection.send(
            json.dumps({"id": self._last_id, "method": method, "params": parameters})
        )
        deadline = time.monotonic() + ANSWER_TIMEOUT
        while True:
            message = json.loads(self._connection.recv(max(0.0, deadline - time.monotonic())))
            if message.get("id") == self._last_id:
                if "error" in message:
                    raise BrowserError(f"{method}: {message['error'].get('message')}")
                result: dict[str, Any] = message["result"]
                return result
            self._note_error(message)

    def _note_error(self, event: dict[str, Any]) -> None:
        if event.get("method") == "Runtime.exceptionThrown":
            self.errors.append(_description(event["params"]["exceptionDetails"]))
        elif event.get("method") == "Log.entryAdded":
            entry = event["params"]["entry"]
            if entry["level"] == "error":
                self.errors.append(f"{entry['text']} ({entry.get('url', '')})")

    def disconnect(self) -> None:
        self._open.close()


def _description(details: dict[str, Any]) -> str:
    exception = details.get("exception", {})
    return str(exception.get("description") or exception.get("value") or details["text"])
