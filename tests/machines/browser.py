"""Headless Chromium, where it is installed: pages as a person sees them."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None)

needs_browser = pytest.mark.skipif(PROGRAM is None, reason="no Chromium on PATH: install one to test the pages in a browser")

WIDTHS = (360, 768, 1120, 1500)  # pixels: a phone, a tablet, two screens

# Measures a page in frames of several widths: what is wider than its frame, or cut inside it.
_FRAMES = """<!doctype html><meta charset="utf-8">{frames}<pre id="found"></pre><script>
addEventListener("load", () => {{
  const found = [...document.querySelectorAll("iframe")].map(frame => {{
    const page = frame.contentDocument, width = page.documentElement.clientWidth
    const cut = [...page.querySelectorAll("*")].filter(each =>
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
