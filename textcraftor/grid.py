"""Image grids with the prompt under each image."""

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

MARGIN = 8
CAPTION_LINES = 3


def to_pil(image: Tensor) -> Image.Image:
    """One image (3, H, W) in [0, 1] as 8-bit RGB."""
    pixels = (image.detach().float().clamp(0, 1) * 255).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def sample_grid(images: Tensor, captions: Sequence[str], columns: int = 4, tile: int = 192) -> Image.Image:
    """A grid of (B, 3, H, W) images in [0, 1], each shown `tile` pixels wide with its caption wrapped below."""
    font = ImageFont.load_default(size=12)
    row_height = tile + 2 * MARGIN + CAPTION_LINES * 15
    rows = -(-len(captions) // columns)
    canvas = Image.new("RGB", (columns * (tile + MARGIN) + MARGIN, rows * row_height + MARGIN), "white")
    draw = ImageDraw.Draw(canvas)
    for index, caption in enumerate(captions):
        left = MARGIN + index % columns * (tile + MARGIN)
        top = MARGIN + index // columns * row_height
        # Nearest neighbour below the tile's size: a small image should look as small as it is.
        small = images.shape[-1] < tile
        canvas.paste(
            to_pil(images[index]).resize((tile, tile), Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS),
            (left, top),
        )
        lines = textwrap.wrap(caption, width=tile // 6, max_lines=CAPTION_LINES, placeholder=" ...")
        draw.multiline_text((left, top + tile + 2), "\n".join(lines), fill="black", font=font, spacing=2)
    return canvas
