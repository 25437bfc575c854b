"""Pictures side by side: a row for each model, a column for each prompt, the prompt written below."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

CELL = 256  # pixels
COLUMNS = 4
GAP, MARGIN, LABEL = 8, 16, 28
TEXT_SIZE, TEXT_LINES, TEXT_COLUMNS = 14, 3, 34
PAPER, INK, MUTED = "#ffffff", "#1c2024", "#60666c"


def side_by_side(prompts: Sequence[str], rows: Mapping[str, Sequence[Image.Image]]) -> Image.Image:
    """One picture of many: `rows` has a label and as many pictures as there are prompts for each model.

    The n-th pictures of all rows stand above each other, so that base and candidate are compared at a glance.
    """
    # A font that matplotlib ships: the same letters, hence the same bytes, on every machine.
    font = ImageFont.truetype(findfont("DejaVu Sans"), TEXT_SIZE)
    bold = ImageFont.truetype(findfont("DejaVu Sans:bold"), TEXT_SIZE)
    columns = min(COLUMNS, len(prompts))
    blocks = -(-len(prompts) // columns)
    text_height = TEXT_LINES * (TEXT_SIZE + 4) + 2 * GAP
    block_height = len(rows) * (CELL + GAP) + text_height
    size = (2 * MARGIN + LABEL + columns * (CELL + GAP) - GAP, 2 * MARGIN + blocks * block_height)
    canvas = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(canvas)
    for number, prompt in enumerate(prompts):
        block, column = divmod(number, columns)
        x, y = MARGIN + LABEL + column * (CELL + GAP), MARGIN + block * block_height
        for label, pictures in rows.items():
            canvas.paste(_cell(pictures[number]), (x, y))
            if column == 0:
                canvas.paste(_upright(label, bold), (MARGIN - 4, y))
            y += CELL + GAP
        lines = textwrap.wrap(prompt, TEXT_COLUMNS, max_lines=TEXT_LINES, placeholder=" …")
        pen.multiline_text((x, y), "\n".join(lines), fill=MUTED, font=font)
    return canvas


def _cell(image: Image.Image) -> Image.Image:
    # Nearest neighbour upwards: a small image should look as small as it is.
    small = max(image.size) < CELL
    return image.resize((CELL, CELL), Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS)


def to_bytes(images: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1] -> uint8 on the CPU, rounded as an image file rounds."""
    return (images.clamp(0, 1) * 255).round().to("cpu", torch.uint8)


def picture(image: Tensor, side: int | None = None) -> Image.Image:
    """(3, H, W) uint8 -> a picture, at most `side` pixels wide and high."""
    made = Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
    if side is not None and max(made.size) > side:
        made.thumbnail((side, side), Image.Resampling.LANCZOS)
    return made


def save(image: Image.Image, path: Path) -> None:
    """Write a PNG without dates or software names: the same picture, the same bytes."""
    image.save(path, format="PNG", optimize=True)


def _upright(label: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """A label that reads upwards, one cell high."""
    strip = Image.new("RGB", (CELL, LABEL - 4), PAPER)
    ImageDraw.Draw(strip).text((CELL / 2, (LABEL - 4) / 2), label, fill=INK, font=font, anchor="mm")
    return strip.rotate(90, expand=True)
