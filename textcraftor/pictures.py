"""Conversion of image tensors to PIL images, and labelled image grids."""

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
    """A grid with a row for each model, a column for each prompt, and the prompts below.

    rows: label -> one image for each prompt.  More prompts than COLUMNS start a new block of rows.
    """
    # A font that matplotlib ships, so that the bytes are the same on every machine.
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
    # Nearest neighbour when enlarging: the pixels of a small image should stay visible.
    small = max(image.size) < CELL
    return image.resize((CELL, CELL), Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS)


def to_bytes(images: Tensor) -> Tensor:
    """(..., 3, H, W) in [0, 1] -> uint8 on the CPU, rounded to nearest."""
    return (images.clamp(0, 1) * 255).round().to("cpu", torch.uint8)


def picture(image: Tensor, side: int | None = None) -> Image.Image:
    """(3, H, W) uint8 -> a PIL image, reduced to at most `side` pixels in width and height."""
    made = Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
    if side is not None and max(made.size) > side:
        made.thumbnail((side, side), Image.Resampling.LANCZOS)
    return made


def save(image: Image.Image, path: Path) -> None:
    """Write a PNG without dates or software names, so that equal images give equal bytes."""
    image.save(path, format="PNG", optimize=True)


def _upright(label: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """A label rotated by 90 degrees, one cell high."""
    strip = Image.new("RGB", (CELL, LABEL - 4), PAPER)
    ImageDraw.Draw(strip).text((CELL / 2, (LABEL - 4) / 2), label, fill=INK, font=font, anchor="mm")
    return strip.rotate(90, expand=True)
