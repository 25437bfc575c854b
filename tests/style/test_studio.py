"""The studio: what it draws, what its server answers, and its page in a browser by keyboard alone."""

import base64
import io
import json
import shlex
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.machines.browser import Page, needs_browser
from tests.style.conftest import Run
from textcraftor.candidate import Candidate
from textcraftor.config import load
from textcraftor.errors import ConfigError
from textcraftor.style.server import StudioServer
from textcraftor.style.studio import METADATA, Settings, Studio

SETTINGS = {"prompt": "a red circle", "seed": 3, "weights": {"balanced": 1.25}, "switch_at": 0.2, "guidance_scale": 2.0}


@pytest.fixture
def studio(workspace: Path) -> Studio:
    parts = {mix: Candidate.find(mix, Path()) for mix in ("balanced", "aesthetic")}
    return Studio(load("params.yaml"), parts, Path(), torch.device("cpu"))


@pytest.fixture
def server(studio: Studio) -> Iterator[StudioServer]:
    with StudioServer(studio, 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def pixels(png: bytes) -> bytes:
    return Image.open(io.BytesIO(png)).convert("RGB").tobytes()


def test_the_command_draws_what_the_page_shows(studio: Studio, run: Run) -> None:
    drawn = studio.draw(Settings.model_validate(SETTINGS))
    program, *arguments = shlex.split(drawn["command"])
    assert program == "textcraftor" and run(*arguments)[0] == 0
    from tests.style.test_blend import rows

    for row, name in zip(rows("blend.png"), ("base", "blend"), strict=True):
        assert row.resize((32, 32), Image.Resampling.NEAREST).tobytes() == pixels(drawn[name])
    assert pixels(drawn["base"]) != pixels(drawn["blend"]) and drawn["note"].endswith("beyond the encoders")
    compile(drawn["snippet"], "snippet", "exec")
    found: dict[str, Any] = {}
    exec(drawn["snippet"], found)  # noqa: S102 (our own)
    assert found["image"].size == (32, 32)


def test_strength_0_is_the_base(studio: Studio) -> None:
    drawn = studio.draw(Settings.model_validate({**SETTINGS, "weights": {"balanced": 0.0}}))
    assert pixels(drawn["base"]) == pixels(drawn["blend"])


def test_a_picture_restores_its_settings(studio: Studio) -> None:
    drawn = studio.draw(Settings.model_validate(SETTINGS))
    assert studio.restore(drawn["blend"]) == {"settings": SETTINGS, "note": ""}
    weights = Path("data/encoders/balanced/text_encoder/model.safetensors")
    weights.write_bytes(weights.read_bytes() + b" ")
    studio.parts["balanced"] = Candidate.find("balanced", Path())
    assert studio.restore(drawn["blend"])["note"] == "It was drawn with another balanced than the one here"
    for other in (drawn["base"], b"", b"\x89PNG\r\n\x1a\n", b"GIF89a"):
        with pytest.raises(ConfigError, match="no picture of the studio"):
            studio.restore(other)
    assert METADATA in Image.open(io.BytesIO(drawn["blend"])).text  # type: ignore[attr-defined]


def ask(server: StudioServer, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    request = urllib.request.Request(server.address.rstrip("/") + path, body, headers)  # noqa: S310
    try:
        with urllib.request.urlopen(request) as answer:  # noqa: S310
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_the_server_answers_its_own_page_only(server: StudioServer) -> None:
    assert server.server_address[0] == "127.0.0.1"
    assert ask(server, "/")[0] == 200 and json.loads(ask(server, "/studio.json")[1])["encoders"] == ["balanced", "aesthetic"]
    body = json.dumps(SETTINGS).encode()
    status, answer = ask(server, "/draw", body)
    assert status == 200 and base64.b64decode(json.loads(answer)["blend"].split(",")[1]).startswith(b"\x89PNG")
    assert ask(server, "/draw", body, Origin="http://elsewhere.example")[0] == 403
    assert ask(server, "/", Host="elsewhere.example:80")[0] == 403
    for path in ("/../params.yaml", "/page.html", "/params.yaml"):
        assert ask(server, path)[0] == 404
    for wrong in (b"{}", b"x", json.dumps({**SETTINGS, "weights": {"balanced": float("nan")}}).encode()):
        status, answer = ask(server, "/draw", wrong)
        assert status == 400 and "\n" not in json.loads(answer)["error"]
    assert ask(server, "/draw", json.dumps({**SETTINGS, "weights": {"other": 1.0}}).encode())[0] == 400


def test_a_port_that_is_taken_and_a_workspace_without_encoders_are_one_line(server: StudioServer, run: Run) -> None:
    status, _, err = run("studio", "--port", str(server.server_port))
    assert status == 2 and "cannot be used" in err and err.count("\n") == 1
    Path("data/encoders").rename("elsewhere")
    status, _, err = run("studio")
    assert status == 2 and "No encoder is trained yet" in err and err.count("\n") == 1


@needs_browser
def test_the_page_is_used_by_keyboard_alone(server: StudioServer, tmp_path: Path) -> None:
    page = Page(server.address, tmp_path / "profile")
    try:
        page.wait("document.body && document.body.dataset.drawn == 1")
        first = page.value("document.querySelector('#blend').src")
        assert first != page.value("document.querySelector('#base').src")  # it starts with all of the first encoder
        page.press("Tab", "Tab")
        assert page.value("document.activeElement.id") == "seed"
        page.press("Tab")
        assert page.value("document.activeElement.dataset.name") == "balanced"
        page.press(*["ArrowLeft"] * 3)
        page.wait("document.querySelector('#command').textContent.includes('balanced=0.85')")
        page.wait("document.querySelector('#state').textContent.includes(' s')")
        assert page.value("document.querySelector('#original').textContent") == "0.15"
        blend = page.value("document.querySelector('#blend').src")
        assert blend != first and blend == page.value("document.querySelector('#download').href")
        page.press("Home")
        page.wait("document.querySelector('#state').textContent.includes('beyond the encoders')")
        # A picture from the disk, as the file field or a drop gives it, restores everything.
        (tmp_path / "blend.png").write_bytes(base64.b64decode(blend.split(",")[1]))
        root = page.call("DOM.getDocument")["root"]["nodeId"]
        field = page.call("DOM.querySelector", nodeId=root, selector="#file")["nodeId"]
        page.call("DOM.setFileInputFiles", nodeId=field, files=[str(tmp_path / "blend.png")])
        page.wait("document.querySelector('#state').textContent.includes('restored from blend.png')")
        assert page.value("document.querySelector('#blend').src") == blend
        assert page.value("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        assert not page.errors
    finally:
        page.close()
