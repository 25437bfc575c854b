"""Style sheets: what stands where, and the user's mistakes in one line."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.style.conftest import Run
from textcraftor import pictures
from textcraftor.style.sheet import CELL

PROMPTS = ("a red circle", "a large blue square")


def test_prompts_by_strengths_from_the_base_to_the_candidate(run: Run) -> None:
    status, out, _ = run("sheet", "--encoder", "balanced", "--strengths", "0, 0.5 1", *PROMPTS)
    assert status == 0 and out == "sheet.png\n"
    sheet = np.asarray(Image.open("sheet.png").convert("RGB"))
    step = CELL + pictures.GAP
    grid = pictures.side_by_side(PROMPTS, {each: [Image.new("RGB", (1, 1))] * 2 for each in "123"}, cell=CELL)
    top = pictures.MARGIN + len(sheet) - grid.height  # below the title
    for column, prompt in enumerate(PROMPTS):
        x = pictures.MARGIN + pictures.LABEL + column * step
        cells = [sheet[top + row * step :, x : x + CELL][:CELL:4, ::4] for row in range(3)]
        run("generate", prompt, "--model", "balanced", "--out", "pair.png")
        pair = np.asarray(Image.open("pair.png").convert("RGB"))[pictures.MARGIN :, pictures.MARGIN + pictures.LABEL :]
        base, tuned = (pair[row * (pictures.CELL + pictures.GAP) :][: pictures.CELL : 8, : pictures.CELL : 8] for row in (0, 1))
        # Drawn in one batch here and alone there, so they agree up to rounding.
        assert np.abs(cells[0].astype(int) - base).max() <= 1 and np.abs(cells[2].astype(int) - tuned).max() <= 1
        assert not np.array_equal(cells[1], cells[0]) and not np.array_equal(cells[1], cells[2])


def test_a_triangle_has_the_encoders_at_its_corners(run: Run) -> None:
    encoders = [option for name in ("original", "balanced", "aesthetic") for option in ("--encoder", name)]
    assert run("sheet", *encoders, "--divisions", "2", PROMPTS[0])[0] == 0
    sheet = Image.open("sheet.png").convert("RGB")
    step, line = CELL + pictures.GAP, CELL + pictures.GAP + pictures.TICK_LINE
    top = pictures.MARGIN + pictures.MARGIN + pictures.TEXT_SIZE + pictures.GAP
    assert sheet.size == (2 * pictures.MARGIN + 3 * step - pictures.GAP, top + 3 * line + pictures.MARGIN)
    corners = [(1, 0), (0, 2), (2, 2)]  # in half columns from the left, and rows
    boxes = [(pictures.MARGIN + (column * step if row else step), top + row * line) for column, row in corners]
    cells = [sheet.crop((x, y, x + CELL, y + CELL)).resize((32, 32), Image.Resampling.NEAREST) for x, y in boxes]
    for cell, name in zip(cells, ("original", "balanced", "aesthetic"), strict=True):
        run("blend", f"{name}=1", PROMPTS[0], "--out", "one.png")
        y = pictures.MARGIN + pictures.CELL + pictures.GAP
        x = pictures.MARGIN + pictures.LABEL
        drawn = Image.open("one.png").convert("RGB").crop((x, y, x + pictures.CELL, y + pictures.CELL))
        assert cell.tobytes() == drawn.resize((32, 32), Image.Resampling.NEAREST).tobytes(), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--encoder", "balancd"], "Unknown encoder 'balancd'"),
        (["--encoder", "balanced", "--encoder", "balanced"], "different encoders"),
        (["--encoder", "balanced", "--strengths", "much"], "no numbers"),
        (["--encoder", "balanced", "--strengths", "nan"], "finite"),
        (["--encoder", "balanced", "--strengths", ""], "--strengths is empty"),
    ],
)
def test_a_mistake_is_one_line(run: Run, options: list[str], message: str) -> None:
    status, out, err = run("sheet", *options, "a red circle")
    assert status == 2 and message in err and err.count("\n") == 1 and not out and not Path("sheet.png").exists()
