"""A page in a browser without a window (Debian's chromium), driven through its debugging pipe."""
from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
_ANSWER_S = 60.0


def program() -> str | None:
    return next(filter(None, map(shutil.which, _NAMES)), None)


class Page:
    """What one tab is asked and says. `requests`: every address that it loaded."""

    def __init__(self, to: int, back: int) -> None:
        self._to, self._back, self._buffer, self._asked = to, back, b"", 0
        self._session: str | None = None
        self.requests: list[str] = []
        self.errors: list[str] = []

    def attach(self) -> None:
        [target] = [one for one in self.ask("Target.getTargets")["targetInfos"] if one["type"] == "page"]
        self._session = self.ask("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._asked += 1
        message = {"id": self._asked, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + _ANSWER_S
        while time.monotonic() < deadline:
            said = self._next()
            if said.get("id") == self._asked:
                assert "error" not in said, said
                return said["result"]
        raise AssertionError(f"the browser does not answer {method}")

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            block = os.read(self._back, 1 << 20)
            assert block, "the browser is gone"
            self._buffer += block
        raw, _, self._buffer = self._buffer.partition(b"\0")
        said = json.loads(raw)
        if said.get("method") == "Network.requestWillBeSent":
            self.requests.append(said["params"]["request"]["url"])
        elif said.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
            self.errors.append(json.dumps(said["params"]))
        return said

    def open(self, path: Path, dark: bool = False, width: int = 1280, height: int = 900) -> float:
        """-> seconds until all of it was loaded and laid out."""
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.ask("Emulation.setEmulatedMedia", features=scheme)
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.ask("Page.navigate", url=path.as_uri())
        deadline = time.monotonic() + _ANSWER_S
        while self.run("document.readyState") != "complete" or self.run("location.protocol") != "file:":
            assert time.monotonic() < deadline
        self.run("document.body.getBoundingClientRect().height")
        return self.run("performance.getEntriesByType('navigation')[0].loadEventStart") / 1000

    def run(self, script: str) -> Any:
        found = self.ask("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def press(self, key: str) -> None:
        for kind in ("rawKeyDown", "keyUp"):
            self.ask("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=_CODES[key])

    def screenshot(self, path: Path) -> None:
        """All of the page, not only what the window shows."""
        size = self.ask("Page.getLayoutMetrics")["cssContentSize"]
        shot = self.ask("Page.captureScreenshot", captureBeyondViewport=True,
                        clip={"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1})
        path.write_bytes(base64.b64decode(shot["data"]))


_CODES = {"Tab": 9, "ArrowLeft": 37, "ArrowRight": 39, "Home": 36, "End": 35, "Enter": 13}


@contextmanager
def browser(profile: Path) -> Iterator[Page]:
    name = program()
    assert name, "no chromium: .ci/packages browser"
    there, to = os.pipe()
    back, said = os.pipe()
    argv = [name, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
            "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]

    def streams() -> None:  # it reads descriptor 3 and answers on 4
        os.dup2(os.dup(there), 30)
        os.dup2(os.dup(said), 31)
        os.dup2(30, 3)
        os.dup2(31, 4)

    process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               close_fds=False, preexec_fn=streams)
    os.close(there)
    os.close(said)
    try:
        page = Page(to, back)
        page.attach()
        yield page
        os.write(to, b'{"id":0,"method":"Browser.close"}\0')
        process.wait(20)
    finally:
        process.kill()
        process.wait()
        os.close(to)
        os.close(back)
