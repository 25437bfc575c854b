"""Conversion of image tensors to PIL images, and labelled image grids."""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

CELL = 256  # pixels
COLUMNS = 4
GAP, MARGIN, LABEL = 8, 16, 28
TEXT_SIZE, TEXT_LINES = 14, 16  # lines: at most, under a picture of CELL pixels; more under a smaller one
TICK_SIZE, TICK_LINE = 12, 16
PAPER, INK, MUTED, HOLDS, FAILS = "#ffffff", "#1c2024", "#60666c", "#1f7a4d", "#b3392f"

Tick = tuple[str, bool]
"""A claim of a prompt in a word or two, and whether it holds in the picture."""


def side_by_side(
    prompts: Sequence[str],
    rows: Mapping[str, Sequence[Image.Image]],
    ticks: Mapping[str, Sequence[Sequence[Tick]]] | None = None,
    columns: int = COLUMNS,
    cell: int = CELL,
) -> Image.Image:
    """A grid with a row for each model, a column for each prompt, and the prompts below.

    rows: label -> one image for each prompt.  More prompts than `columns` start a new block of rows.
    ticks: label -> the claims to tick or cross under each image.  cell: side of an image in the grid, in pixels.
    """
    font, small, bold = _font("", TEXT_SIZE), _font("", TICK_SIZE), _font(":bold", TEXT_SIZE)
    columns = min(columns, len(prompts))
    lines = {label: [_tick_lines(each, small, cell) for each in of_images] for label, of_images in (ticks or {}).items()}
    heights = {label: cell + GAP + TICK_LINE * max(map(len, lines.get(label, [])), default=0) for label in rows}
    texts = [_wrap(prompt, font, cell, TEXT_LINES * CELL // cell) for prompt in prompts]
    block_height = sum(heights.values()) + max(map(len, texts)) * (TEXT_SIZE + 4) + 2 * GAP
    blocks = -(-len(prompts) // columns)
    size = (2 * MARGIN + LABEL + columns * (cell + GAP) - GAP, 2 * MARGIN + blocks * block_height)
    canvas = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(canvas)
    for number, text in enumerate(texts):
        block, column = divmod(number, columns)
        x, y = MARGIN + LABEL + column * (cell + GAP), MARGIN + block * block_height
        for label, pictures in rows.items():
            canvas.paste(_cell(pictures[number], cell), (x, y))
            if column == 0:
                canvas.paste(_upright(label, bold, cell), (MARGIN - 4, y))
            for row, line in enumerate(lines[label][number] if label in lines else ()):
                _draw_ticks(pen, line, small, x, y + cell + 1 + row * TICK_LINE)
            y += heights[label]
        pen.multiline_text((x, y), "\n".join(text), fill=MUTED, font=font)
    return canvas


def triangle(rows: Sequence[Sequence[tuple[str, Image.Image]]], cell: int = CELL) -> Image.Image:
    """Pictures with a line of text below each, in centred rows: one, two, three ...

    rows: (text, image) from the top down.  cell: side of an image, in pixels.
    """
    font = _font("", TICK_SIZE)
    step, line = cell + GAP, cell + GAP + TICK_LINE
    width = max(len(row) for row in rows) * step - GAP
    canvas = Image.new("RGB", (2 * MARGIN + width, 2 * MARGIN + len(rows) * line), PAPER)
    pen = ImageDraw.Draw(canvas)
    for number, row in enumerate(rows):
        x, y = MARGIN + (width - len(row) * step + GAP) // 2, MARGIN + number * line
        for text, image in row:
            canvas.paste(_cell(image, cell), (x, y))
            pen.text((x + cell / 2, y + cell + 2), text, fill=MUTED, font=font, anchor="ma")
            x += step
    return canvas


def titled(title: str, image: Image.Image) -> Image.Image:
    """The image with a title above it, in as many lines as its width makes necessary."""
    font = _font(":bold", TEXT_SIZE)
    lines = _wrap(title, font, image.width - 2 * MARGIN)
    height = MARGIN + len(lines) * TEXT_SIZE + (len(lines) - 1) * 4 + GAP
    canvas = Image.new("RGB", (image.width, image.height + height), PAPER)
    ImageDraw.Draw(canvas).multiline_text((MARGIN, MARGIN), "\n".join(lines), fill=INK, font=font)
    canvas.paste(image, (0, height))
    return canvas


def stack(images: Sequence[Image.Image]) -> Image.Image:
    """The images below each other."""
    canvas = Image.new("RGB", (max(each.width for each in images), sum(each.height for each in images)), PAPER)
    y = 0
    for each in images:
        canvas.paste(each, (0, y))
        y += each.height
    return canvas


@cache
def _font(style: str, size: int) -> ImageFont.FreeTypeFont:
    # A font that matplotlib ships, so that the bytes are the same on every machine.
    return ImageFont.truetype(findfont(f"DejaVu Sans{style}"), size)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int, most: int | None = None) -> list[str]:
    """The text in lines that are at most `width` pixels wide. Of more than `most` lines, the last one ends in an ellipsis."""
    lines = [""]
    for word in text.split():
        for piece in [word] if font.getlength(word) <= width else _pieces(word, font, width):
            longer = f"{lines[-1]} {piece}" if lines[-1] else piece
            if font.getlength(longer) <= width:
                lines[-1] = longer
            else:
                lines.append(piece)
    if most is None or len(lines) <= most:
        return lines
    return [*lines[: most - 1], f"{lines[most - 1][:-2]} …"]


def _pieces(word: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """A word that is wider than a line (an address, Japanese), in pieces that are not."""
    pieces = [""]
    for letter in word:
        if font.getlength(pieces[-1] + letter) <= width:
            pieces[-1] += letter
        else:
            pieces.append(letter)
    return pieces


def _tick_lines(ticks: Sequence[Tick], font: ImageFont.FreeTypeFont, width: int) -> list[list[Tick]]:
    """The ticks in lines that are at most `width` pixels wide."""
    lines: list[list[Tick]] = []
    room = 0.0
    for tick in ticks:
        needed = font.getlength(_tick_text(tick))
        if not lines or needed > room:
            lines.append([])
            room = width
        lines[-1].append(tick)
        room -= needed
    return lines


def _draw_ticks(pen: ImageDraw.ImageDraw, ticks: Sequence[Tick], font: ImageFont.FreeTypeFont, x: float, y: int) -> None:
    for tick in ticks:
        text = _tick_text(tick)
        pen.text((x, y), text, fill=HOLDS if tick[1] else FAILS, font=font)
        x += font.getlength(text)


def _tick_text(tick: Tick) -> str:
    word, holds = tick
    return f"{'✓' if holds else '✗'}{word}  "


def _cell(image: Image.Image, side: int) -> Image.Image:
    # Nearest neighbour when enlarging: the pixels of a small image should stay visible.
    small = max(image.size) < side
    return image.resize((side, side), Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS)


def to_bytes(images: Tensor) -> Tensor:
    """(..., 3, H, W) in [0, 1] -> uint8 on the CPU, rounded to nearest."""
    return (images.clamp(0, 1) * 255).round().to("cpu", torch.uint8)


def picture(image: Tensor, side: int | None = None) -> Image.Image:
    """(3, H, W) uint8 -> a PIL image, reduced to at most `side` pixels in width and height."""
    made = Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
    if side is not None and max(made.size) > side:
        made.thumbnail((side, side), Image.Resampling.LANCZOS)
    return made


def to_tensor(images: Sequence[Image.Image]) -> Tensor:
    """PIL images of one size -> (N, 3, H, W) uint8."""
    return torch.stack([torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) for image in images])


def save(image: Image.Image, path: Path) -> None:
    """Write a PNG without dates or software names, so that equal images give equal bytes."""
    image.save(path, format="PNG", optimize=True)


def _upright(label: str, font: ImageFont.FreeTypeFont, length: int) -> Image.Image:
    """A label rotated by 90 degrees, as high as a cell."""
    strip = Image.new("RGB", (length, LABEL - 4), PAPER)
    ImageDraw.Draw(strip).text((length / 2, (LABEL - 4) / 2), label, fill=INK, font=font, anchor="mm")
    return strip.rotate(90, expand=True)
