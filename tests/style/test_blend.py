"""`textcraftor blend`: the picture, and the user's mistakes in one line."""

from pathlib import Path

import pytest
from PIL import Image, ImageChops

from tests.style.conftest import Run
from textcraftor import pictures

PROMPT = "a red circle"


def rows(path: str) -> list[Image.Image]:
    """The cells of a picture with one column, from top to bottom."""
    image, step = Image.open(path).convert("RGB"), pictures.CELL + pictures.GAP
    x, y = pictures.MARGIN + pictures.LABEL, pictures.MARGIN
    return [image.crop((x, y + n * step, x + pictures.CELL, y + n * step + pictures.CELL)) for n in range(2)]


def same(one: Image.Image, other: Image.Image) -> bool:
    return ImageChops.difference(one, other).getbbox() is None


def test_strength_0_draws_the_base_and_strength_1_the_candidate(run: Run) -> None:
    assert run("generate", PROMPT, "--model", "balanced", "--out", "tuned.png")[0] == 0
    assert run("blend", "original=1", "balanced=0", PROMPT, "--out", "none.png")[0] == 0
    assert run("blend", "original=0", "balanced=1", PROMPT, "--out", "all.png")[0] == 0
    status, out, err = run("blend", "original=-1", "balanced=1.5", "./data/encoders/aesthetic=0.5", PROMPT, "--out", "more.png")
    assert status == 0 and out == "more.png\n" and err == "original=-1.0 balanced=1.5: extrapolates beyond the encoders\n"
    base, tuned = rows("tuned.png")
    assert same(rows("none.png")[1], base)
    assert same(rows("all.png")[1], tuned) and not same(base, tuned)
    assert same(rows("more.png")[0], base) and not same(rows("more.png")[1], tuned)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["balanced=0.5", PROMPT], "sum to 0.5, and must sum to 1"),
        (["original=0", "balanced=0", PROMPT], "sum to 0, and"),
        (["balanced=nan", PROMPT], "finite"),
        (["balancd=1", PROMPT], "Unknown encoder 'balancd'"),
        (["balanced=1"], "one prompt, got none"),
        (["balanced=1", "two", "prompts"], "got 2: 'two', 'prompts'"),
        (["balanced=1", " "], "The prompt is empty"),
        (["./other=1", PROMPT], "does not fit the text_encoder of base base"),
    ],
)
def test_a_mistake_is_one_line(run: Run, arguments: list[str], message: str, family_folders: dict[str, Path]) -> None:
    Path("other").mkdir()
    Path("other/text_encoder").symlink_to(family_folders["sd2"] / "text_encoder")
    status, out, err = run("blend", *arguments)
    assert status == 2 and message in err, err
    assert err.count("\n") == 1 and not out and not Path("blend.png").exists()
