"""Headless Chromium, where it is installed: pages as a person sees them."""

import base64
import html
import json
import re
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None)

needs_browser = pytest.mark.skipif(PROGRAM is None, reason="no Chromium on PATH: install one to test the pages in a browser")

WIDTHS = (360, 768, 1120, 1500)  # pixels: a phone, a tablet, two screens

# Measures a page in frames of several widths: what is wider than its frame or cut inside it, words and ticks broken in two.
_FRAMES = """<!doctype html><meta charset="utf-8">{frames}<pre id="found"></pre><script>
addEventListener("load", () => {{
  const found = [...document.querySelectorAll("iframe")].map(frame => {{
    const page = frame.contentDocument, width = page.documentElement.clientWidth
    const lines = each => {{
      const range = page.createRange()
      range.selectNodeContents(each)
      return new Set([...range.getClientRects()].map(line => line.top)).size
    }}
    const whole = each => each.matches("figcaption span") || !each.children.length && /^\\S{{1,20}}$/.test(each.innerText)
    const broken = each => whole(each) && lines(each) > 1
    const cut = [...page.querySelectorAll("*")].filter(each => broken(each) ||
      each.getBoundingClientRect().right > width + 1 || each.tagName == "TABLE" && each.scrollWidth > each.clientWidth + 1)
    const visible = [...page.querySelectorAll("td")].filter(each => each.getBoundingClientRect().width > 0).length
    const paper = frame.contentWindow.getComputedStyle(page.body).backgroundColor
    const names = cut.map(each => each.outerHTML.slice(0, 80))
    return {{width: frame.width, wide: page.documentElement.scrollWidth, cut: names, cells: visible, paper: paper}}
  }})
  document.querySelector("#found").textContent = JSON.stringify(found)
}})
</script>"""


def measure(page: Path, *widths: int, dark: bool = False) -> list[dict[str, object]]:
    """For each width: {width, wide (of the whole page), cut (elements that are), cells (visible table cells), paper}."""
    source = html.escape(page.read_text(encoding="utf-8"), quote=True)
    frames = "".join(f'<iframe width="{width}" height="4000" srcdoc="{source}"></iframe>' for width in widths)
    wrapper = page.with_name(f"{page.stem}-frames.html")
    wrapper.write_text(_FRAMES.format(frames=frames), encoding="utf-8")
    dom = visit(
        wrapper.as_uri(), "--blink-settings=preferredColorScheme=0" if dark else "--blink-settings=preferredColorScheme=1"
    )
    (found,) = re.findall(r'<pre id="found">(.*?)</pre>', dom, re.S)
    measured: list[dict[str, object]] = json.loads(html.unescape(found))
    return measured


def visit(address: str, *options: str, budget: int = 5000) -> str:
    """The page's document after its scripts ran. budget: milliseconds of the page's own time."""
    assert PROGRAM
    command = [PROGRAM, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage"]
    command += ["--window-size=1600,1200", f"--virtual-time-budget={budget}", *options, "--dump-dom", address]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


KEYS = {"Tab": 9, "Enter": 13, " ": 32, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowRight": 39}  # Windows' key codes


class Page:
    """A page in a Chromium of its own, over the DevTools protocol: pages of servers that push news never come to rest."""

    def __init__(self, address: str, profile: Path, width: int = 1200) -> None:
        from websockets.sync.client import connect

        assert PROGRAM
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage"]
        options += ["--remote-debugging-port=0", f"--user-data-dir={profile}", f"--window-size={width},1000"]
        self._process = subprocess.Popen([PROGRAM, *options, "about:blank"], stderr=subprocess.PIPE, text=True)
        assert self._process.stderr
        found = next(filter(None, (re.search(r"ws://([\d.:]+)/", line) for line in self._process.stderr)))
        with urllib.request.urlopen(f"http://{found[1]}/json/list") as answer:
            (target,) = [each for each in json.load(answer) if each["type"] == "page"]
        self._socket = connect(target["webSocketDebuggerUrl"], max_size=None)
        self._number = 0
        self.errors: list[str] = []
        for domain in ("Runtime", "Log", "Page", "DOM"):
            self.call(f"{domain}.enable")
        self.call("Page.navigate", url=address)

    def open(self, address: str) -> None:
        """Go to another address. One application may only change what follows its `#`, so an empty page comes between."""
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=address)

    @property
    def text(self) -> str:
        """What a person can read on the page, its white space collapsed."""
        return " ".join(str(self.value("document.body ? document.body.innerText : ''")).split())

    def wait_for(self, *texts: str, seconds: float = 60) -> str:
        """Wait until all of these can be read; returns all that can. Raises AssertionError with it when they cannot."""
        until = time.monotonic() + seconds
        while not all(each in (read := self.text) for each in texts):
            assert time.monotonic() < until, f"not all of {texts} can be read on the page: {read[:2000]}"
            time.sleep(0.2)
        return read

    def click(self, text: str) -> None:
        """Click on the innermost element that reads exactly like this, as soon as there is one."""
        same = f"each => each.textContent.trim() == {json.dumps(text)} && each.offsetParent"
        found = f"[...document.querySelectorAll('body *')].filter({same})"
        self.wait(f"{found}.length > 0")
        self.value(f"{found}.at(-1).click()")

    def look(self, path: Path, width: int = 1400, height: int = 1600, dark: bool = False) -> None:
        """Write a PNG of the page as a screen of this size shows it, in pixels."""
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        time.sleep(1)  # for the page to take its new shape
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def call(self, method: str, **parameters: object) -> dict[str, Any]:
        """Call a method of the protocol; errors of the page that arrive meanwhile are kept in `errors`."""
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(timeout=60))
            if message.get("method") == "Runtime.exceptionThrown":
                self.errors.append(json.dumps(message["params"]["exceptionDetails"]))
            elif message.get("method") == "Runtime.consoleAPICalled" and message["params"]["type"] in ("error", "warning"):
                self.errors.append(json.dumps(message["params"]["args"]))
            elif message.get("method") == "Log.entryAdded" and message["params"]["entry"]["level"] in ("error", "warning"):
                self.errors.append(json.dumps(message["params"]["entry"]))
            elif message.get("id") == self._number:
                assert "error" not in message, message
                result: dict[str, Any] = message["result"]
                return result

    def value(self, expression: str) -> Any:
        """What a JavaScript expression gives; promises are waited for."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, expression: str, seconds: float = 60) -> None:
        """Wait until an expression is true."""
        until = time.monotonic() + seconds
        while not self.value(expression):
            assert time.monotonic() < until, f"not within {seconds} s: {expression}"
            time.sleep(0.05)

    def press(self, *keys: str) -> None:
        """Press keys, one after another: names of KEYS, or text to type."""
        for key in keys:
            if key in KEYS:
                text = {"Enter": "\r", " ": " "}.get(key)
                event = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key]}
                self.call("Input.dispatchKeyEvent", type="keyDown", **event, **({"text": text} if text else {}))
                self.call("Input.dispatchKeyEvent", type="keyUp", **event)
            else:
                self.call("Input.insertText", text=key)

    def close(self) -> None:
        """End the browser."""
        self._socket.close()
        self._process.kill()
        self._process.wait()
        if self._process.stderr:
            self._process.stderr.close()
