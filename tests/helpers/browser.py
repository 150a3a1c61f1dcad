"""Headless Chromium, driven by its DevTools protocol over a pair of pipes: no driver, no library, no port.

with chromium() as browser:
    page = browser.open(path.as_uri())
    page.click("#go")
    assert page.evaluate("document.title") == "done" and not page.problems
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

_FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-extensions")
_FLAGS += ("--no-first-run", "--mute-audio", "--disable-background-networking", "--disable-component-update")
_FLAGS += ("--disable-sync", "--hide-scrollbars", "--force-color-profile=srgb")
_SECONDS = 60.0  # the machine may be busy with other things
_KEYS = {"Enter": (13, "\r"), " ": (32, " "), "Tab": (9, ""), "Escape": (27, "")}
_KEYS |= {f"Arrow{side}": (code, "") for side, code in (("Left", 37), ("Up", 38), ("Right", 39), ("Down", 40))}


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """A browser with a profile of its own; skips the test where there is none."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("needs a browser: chromium or google-chrome")
    out_of_us, to_us = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        # The protocol's pipes are the file descriptors 3 (commands) and 4 (answers).
        command = f'exec "$@" 3<&{out_of_us[0]} 4>&{to_us[1]}'
        arguments = [program, *_FLAGS, "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]
        process = subprocess.Popen(
            ["bash", "-c", command, "bash", *arguments],
            pass_fds=(out_of_us[0], to_us[1]),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(out_of_us[0])
        os.close(to_us[1])
        try:
            yield Browser(out_of_us[1], to_us[0])
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
            process.wait()
            os.close(out_of_us[1])
            os.close(to_us[0])


class Browser:
    """The connection: sends commands, waits for their answers, and hands events to the pages."""

    def __init__(self, commands: int, answers: int):
        self._commands, self._answers, self._rest, self._id = commands, answers, b"", 0
        self._pages: dict[str, Page] = {}
        self._done: dict[int, dict[str, Any]] = {}

    def open(self, url: str, *, width: int = 1200, height: int = 900, phone: bool = False, dark: bool = False) -> Page:
        """A new tab of this size in CSS pixels, with the page loaded."""
        target = self.call("Target.createTarget", {"url": "about:blank"})["targetId"]
        session = self.call("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        page = self._pages[session] = Page(self, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": phone}
        page.call("Emulation.setDeviceMetricsOverride", metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.call("Emulation.setEmulatedMedia", {"features": [scheme]})
        page.go(url)
        return page

    def call(self, method: str, params: dict[str, Any] | None = None, session: str | None = None) -> dict[str, Any]:
        """The answer to a command.

        Raises:
          RuntimeError: the browser refuses it.
          TimeoutError: there is no answer.
        """
        self._id += 1
        message: dict[str, Any] = {"id": self._id, "method": method, "params": params or {}}
        message |= {"sessionId": session} if session else {}
        self._send(json.dumps(message).encode() + b"\0")
        number, until = self._id, time.monotonic() + _SECONDS
        while number not in self._done:
            self.listen(until - time.monotonic(), method)
        answer = self._done.pop(number)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def _send(self, data: bytes) -> None:
        while data:
            data = data[os.write(self._commands, data) :]

    def listen(self, seconds: float, what: str) -> None:
        """Takes in what the browser says next."""
        if not select.select([self._answers], [], [], max(seconds, 0))[0]:
            raise TimeoutError(f"the browser does not answer: {what}")
        read = os.read(self._answers, 1 << 20)
        if not read:
            raise RuntimeError(f"the browser has ended: {what}")
        *messages, self._rest = (self._rest + read).split(b"\0")
        for message in map(json.loads, messages):
            if "id" in message:
                self._done[message["id"]] = message
            elif message.get("sessionId") in self._pages:
                self._pages[message["sessionId"]].on_event(message["method"], message["params"])


class Page:
    """A tab. `problems`: errors and warnings of its console, uncaught exceptions and requests that failed; `requests`:
    the addresses it asked for."""

    def __init__(self, browser: Browser, session: str):
        self._browser, self._session, self._loaded = browser, session, False
        self._chooser: int | None = None
        self.problems: list[str] = []
        self.requests: list[str] = []

    def on_event(self, method: str, params: dict[str, Any]) -> None:
        if method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Page.fileChooserOpened":
            self._chooser = params["backendNodeId"]
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Network.loadingFailed" and not params.get("canceled"):
            self.problems.append(params["errorText"])
        elif method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.problems.append(details.get("exception", {}).get("description", details["text"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.problems.append(params["entry"]["text"])
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.problems.append(" ".join(str(a.get("value", a.get("description"))) for a in params["args"]))

    def call(self, method: str, params: dict[str, Any] | None = None) -> dict[str, Any]:
        """A command of the DevTools protocol to this tab."""
        return self._browser.call(method, params, self._session)

    def go(self, url: str) -> None:
        """Loads a page, and waits until all of it is there."""
        self._loaded = False
        answer = self.call("Page.navigate", {"url": url})
        if "errorText" in answer:
            raise RuntimeError(f"{url}: {answer['errorText']}")
        until = time.monotonic() + _SECONDS
        while not self._loaded:
            self._browser.listen(until - time.monotonic(), f"to load {url[:200]}")

    def evaluate(self, source: str) -> Any:
        """The value of JavaScript's expression, a promise's when it is kept.

        Raises:
          RuntimeError: it throws.
        """
        wanted = {"expression": source, "awaitPromise": True, "returnByValue": True}
        answer = self.call("Runtime.evaluate", wanted)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{source}: {answer['exceptionDetails'].get('exception', {}).get('description')}")
        return answer["result"].get("value")

    def wait(self, condition: str, seconds: float = 30.0) -> None:
        """Waits until JavaScript's expression is true."""
        until = time.monotonic() + seconds
        while not self.evaluate(f"Boolean({condition})"):
            if time.monotonic() > until:
                raise TimeoutError(f"{condition} does not come about; problems: {self.problems}")
            time.sleep(0.05)

    def text(self, selector: str) -> str:
        """The visible text of the first element."""
        return self.evaluate(f"document.querySelector({json.dumps(selector)}).innerText")

    def _middle(self, selector: str) -> dict[str, float]:
        """The middle of the first element, scrolled into view."""
        x, y = self.evaluate(
            f"(e => {{e.scrollIntoView({{block: 'center', inline: 'center', behavior: 'instant'}});"
            "const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]})"
            f"(document.querySelector({json.dumps(selector)}))"
        )
        return {"x": x, "y": y}

    def click(self, selector: str) -> None:
        """Clicks with the mouse in the middle of the first element, as a user would."""
        mouse = self._middle(selector) | {"button": "left", "clickCount": 1}
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", {"type": kind, **mouse})

    def press(self, *keys: str) -> None:
        """Presses keys by their names: Enter, " ", Tab, Escape, ArrowLeft..., or single letters."""
        for key in keys:
            code, text = _KEYS.get(key, (ord(key[0].upper()), key))
            event = {"key": key, "code": "Space" if key == " " else key, "windowsVirtualKeyCode": code}
            self.call("Input.dispatchKeyEvent", {"type": "keyDown", **event, **({"text": text} if text else {})})
            self.call("Input.dispatchKeyEvent", {"type": "keyUp", **event})

    @contextlib.contextmanager
    def choosing(self, *files: Path) -> Iterator[None]:
        """What is inside has to open the dialog to choose files; these are chosen in it."""
        self._chooser = None
        self.call("Page.setInterceptFileChooserDialog", {"enabled": True})
        yield
        until = time.monotonic() + _SECONDS
        while self._chooser is None:
            self._browser.listen(until - time.monotonic(), "to open the dialog to choose files")
        chosen = {"backendNodeId": self._chooser, "files": [str(f.resolve()) for f in files]}
        self.call("DOM.setFileInputFiles", chosen)

    def drop(self, selector: str, *files: Path) -> None:
        """Drags files from elsewhere over the first element, and drops them."""
        data = {"items": [], "files": [str(f.resolve()) for f in files], "dragOperationsMask": 1}
        place = self._middle(selector)
        for kind in ("dragEnter", "dragOver", "drop"):
            self.call("Input.dispatchDragEvent", {"type": kind, **place, "data": data})

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        """Writes a PNG of what is seen, or of the whole page."""
        answer = self.call("Page.captureScreenshot", {"format": "png", "captureBeyondViewport": whole})
        path.write_bytes(base64.b64decode(answer["data"]))

    def pdf(self) -> bytes:
        """The page as it is printed."""
        return base64.b64decode(self.call("Page.printToPDF", {"printBackground": True})["data"])
