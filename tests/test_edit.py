"""`textcraftor generate --task img2img|inpaint`, and the user's mistakes in one line."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.style.conftest import Run, run, workspace
from textcraftor import pictures

__all__ = ["run", "workspace"]  # fixtures
PROMPT = "a red circle"


@pytest.fixture
def drawn(workspace: Path) -> None:
    """A picture, and a mask of its left half."""
    noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save("given.png")
    Image.fromarray(np.repeat([[255] * 16 + [0] * 16], 32, 0).astype(np.uint8)).save("mask.png")


def rows(path: str, count: int) -> list[np.ndarray]:
    """The cells of a picture with one column, from top to bottom."""
    image, step = np.asarray(Image.open(path).convert("RGB")), pictures.CELL + pictures.GAP
    x, y = pictures.MARGIN + pictures.LABEL, pictures.MARGIN
    return [image[y + n * step : y + n * step + pictures.CELL, x : x + pictures.CELL].astype(int) for n in range(count)]


def test_img2img_redraws_a_picture_with_base_and_candidate(run: Run, drawn: None) -> None:
    options = ("--task", "img2img", "--image", "given.png")
    assert run("generate", PROMPT, "--model", "balanced", *options, "--strength", "0.8", "--out", "much.png")[0] == 0
    given, base, tuned = rows("much.png", 3)
    assert np.array_equal(given[::8, ::8], np.asarray(Image.open("given.png")))
    assert np.abs(base - given).max() > 5 and np.abs(tuned - base).max() > 0
    assert run("generate", PROMPT, "--model", "base", *options, "--strength", "0.8", "--out", "alone.png")[0] == 0
    assert np.array_equal(rows("alone.png", 2)[1], base)


def test_inpainting_redraws_the_white_part(run: Run, drawn: None, family_folders: dict[str, Path]) -> None:
    options = ("--task", "inpaint", "--image", "given.png", "--mask", "mask.png", "--strength", "1")
    assert run("generate", PROMPT, "--model", "balanced", *options)[0] == 0
    _, base, tuned = rows("generated.png", 3)
    assert np.abs(base - tuned)[:, : pictures.CELL // 2].max() > 0
    params = yaml.safe_load(Path("params.yaml").read_text())
    sdxl = {**params, "base": {"path": str(family_folders["sdxl"]), "resolution": 32}}
    Path("params.yaml").write_text(yaml.safe_dump(sdxl))
    assert run("generate", PROMPT, "--model", "base", *options)[0] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "img2img"], "--task img2img needs --image"),
        (["--task", "inpaint", "--image", "given.png"], "--task inpaint needs --mask"),
        (["--task", "img2img", "--image", "nowhere.png"], "nowhere.png does not exist"),
        (["--task", "img2img", "--image", "params.yaml"], "params.yaml is no picture that can be read"),
        (
            ["--task", "inpaint", "--image", "given.png", "--mask", "small.png"],
            "small.png is 24 x 32 pixels and --image given.png 32 x 32",
        ),
        (["--task", "img2img", "--image", "given.png", "--mask", "mask.png"], "--mask is not used by --task img2img"),
        (["--image", "given.png"], "--image is not used by --task text2img. Use --task img2img"),
        (["--task", "img2img", "--image", "given.png", "--strength", "0.1"], "less than one step. Give at least 0.2"),
        (
            ["--task", "img2img", "--image", "small.png"],
            "--image is 24 x 32 pixels; this base draws multiples of 16. Resize it, to 32 x 32",
        ),
    ],
)
def test_a_mistake_is_one_line(run: Run, drawn: None, options: list[str], message: str) -> None:
    Image.new("L", (24, 32)).save("small.png")
    status, out, err = run("generate", PROMPT, "--model", "balanced", *options)
    assert status == 2 and message in err, err
    assert err.count("\n") == 1 and not out and not Path("generated.png").exists()
