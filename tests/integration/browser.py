"""Chromium, headless, driven by the WebDriver protocol."""

import base64
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium and chromium-driver are not installed")
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
FLAGS += "--disable-component-update --disable-sync --window-size=1300,900"
PORT = 17321


class Browser:
    """The few commands of WebDriver (W3C, 2018) that a test needs."""

    def __init__(self, folder: Path) -> None:
        self._driver = subprocess.Popen(
            [DRIVER, f"--port={PORT}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        options = {"binary": CHROMIUM, "args": [*FLAGS.split(), f"--user-data-dir={folder}"]}
        wish = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}}
        for _ in range(100):
            try:
                self._session = f"/session/{self._ask('/session', wish)['sessionId']}"
                return
            except OSError:
                time.sleep(0.1)
        raise AssertionError("chromedriver does not answer")

    def _ask(self, path: str, content: dict) -> dict:
        request = urllib.request.Request(f"http://127.0.0.1:{PORT}{path}", json.dumps(content).encode())
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)["value"]

    def open(self, file: Path) -> None:
        self._ask(f"{self._session}/url", {"url": file.as_uri()})

    def run(self, script: str):
        return self._ask(f"{self._session}/execute/sync", {"script": script, "args": []})

    def click(self, css: str) -> None:
        (element,) = self._ask(f"{self._session}/element", {"using": "css selector", "value": css}).values()
        self._ask(f"{self._session}/element/{element}/click", {})

    def picture(self, file: Path) -> None:
        """Write what is seen, whole from the top to the bottom, as PNG."""
        size = self.run("return document.documentElement.scrollHeight")
        self._ask(f"{self._session}/window/rect", {"width": 1300, "height": min(size + 150, 4000)})
        request = urllib.request.Request(f"http://127.0.0.1:{PORT}{self._session}/screenshot")
        with urllib.request.urlopen(request, timeout=120) as answer:
            file.write_bytes(base64.b64decode(json.load(answer)["value"]))

    def close(self) -> None:
        request = urllib.request.Request(f"http://127.0.0.1:{PORT}{self._session}", method="DELETE")
        urllib.request.urlopen(request, timeout=60).close()  # ends Chromium, which the driver's end does not
        self._driver.terminate()
        self._driver.wait()


@contextmanager
def opened(folder: Path) -> Iterator[Browser]:
    """Open a browser whose profile is in a folder."""
    browser = Browser(folder)
    try:
        yield browser
    finally:
        browser.close()
