"""Writes the model card: figures as measured, and a sheet of samples to look at."""

import textwrap
from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from textcraftor.tiny.oracle import KINDS
from textcraftor.tiny.recipe.exam import GUIDANCE_SCALE, STEPS, Report, examine

SHEET_COLUMNS, SHEET_ROWS, TILE, CAPTION = 6, 4, 160, 58

_TEXT = """\
---
license: apache-2.0
library_name: diffusers
tags: [text-to-image, tiny, synthetic]
---
# The tiny Stable Diffusion and its rewards

A real, small Stable Diffusion 1.x and five real, small reward models, in the classes and file formats of the big ones,
trained from scratch on rendered scenes alone. They let the whole pipeline run on a laptop, over the very code path of
SD 1.5. They know one world: one or two coloured shapes on a plain ground. They are no use outside it.

![samples](samples.png)

*{steps} DDIM steps, guidance_scale {guidance}; not chosen, simply the first ones: upper half plain captions, lower half rich
prompts, which the base understands only in part.*

## What lies here
| folder | loads with | parameters |
|---|---|---|
{inventory}

All weights are safetensors in half precision, {megabytes:.1f} MB together. `base` draws 64 x 64 px; its text encoder is its
own. `heldout` judges only: nothing is trained on it, its architecture (convolutions) and its pictures are others than the
rewards', and it never met the base's autoencoder.

## How it was made
`textcraftor tiny-build` (`textcraftor/tiny/recipe`), seeded and resumable, about an hour and a half on two CPU cores.
The base learned 90 % of its pictures with captions: 88 % of those plain, 12 % rich, and half of the rich ones wrong. The
rewards learned from both languages alike. So the UNet can draw what its text encoder fails to say, which is what tuning
the text encoder is to mend. Rewards learned by contrast with twins that differ in one attribute (`clip`, `heldout`), then
from the noisy choices of two groups of synthetic annotators (`pickscore`: group P, `hpsv2`: group H), `aesthetic` from
noisy scores for gloss, contrast and composition, whatever the prompt.

The weights that ship were trained while the recipe was being finished; the numbering of the vocabulary was made
deterministic in between. A rebuild gives their like, not their bytes.

## Figures
Measured by the recipe's last step on prompts and scenes that no step saw: {count} prompts, 60 % rich, judged by the oracle
(`textcraftor/tiny/oracle.py`), which reads pixels and learns nothing. Guessing another scene's picture would hold {chance:.3f}.

| claims that hold | {kinds} | all |
|---|{rules}---|
| plain prompts | {plain} |
| rich prompts | {rich} |
| together | {overall} |

| autoencoder | |
|---|---|
| mean squared error, images in [-1, 1] | {vae_mse:.4f} |
| claims that hold on reconstructions | {vae_oracle:.3f} |

| reward | prefers the picture's own caption to a twin's | finds it among 128 | agrees with its annotators |
|---|---|---|---|
{rewards}

`aesthetic` correlates with the public's score by {aesthetic:.3f}; it reads no prompt. Annotators err and disagree, so no
reward can agree with them always.

## Licence and limits
Apache-2.0. No picture, caption or weight came from anywhere but the renderer and the grammar in `textcraftor/tiny`.
The base confuses shapes, sizes and bindings, more so in rich prompts: that is its purpose. Text it does not know it reads
byte by byte and draws something arbitrary.
"""

_LOADERS = {
    "base": "`StableDiffusionPipeline.from_pretrained`",
    "rewards/clip": '`open_clip.create_model_and_transforms("local-dir:...")`',
    "rewards/hpsv2": "open_clip, likewise",
    "rewards/heldout": "open_clip, likewise",
    "rewards/pickscore": "`CLIPModel.from_pretrained`",
    "rewards/aesthetic": "`CLIPVisionModelWithProjection.from_pretrained` and `head.safetensors`",
}


def _row(figures: Mapping[str, float]) -> str:
    # A handful of prompts may make no claim of some kind.
    return " | ".join(f"{figures[kind]:.3f}" if kind in figures else "-" for kind in (*KINDS, "all"))


def _weights(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def card_text(out: Path, report: Report) -> str:
    """The model card of what lies in `out`."""
    inventory = [f"| `{name}` | {how} | {_weights(out / name) / 2e6:.2f} M |" for name, how in _LOADERS.items()]
    rewards = [
        f"| `{name}` | {twins:.3f} | {report.retrieval[name]:.3f} | "
        + (f"{report.pairs[name]:.3f} |" if name in report.pairs else "- |")
        for name, twins in report.twins.items()
    ]
    return _TEXT.format(
        steps=STEPS,
        guidance=GUIDANCE_SCALE,
        inventory="\n".join(inventory),
        megabytes=_weights(out) / 1e6,
        count=len(report.prompts),
        chance=report.chance,
        kinds=" | ".join(KINDS),
        rules="---|" * len(KINDS),
        plain=_row(report.plain),
        rich=_row(report.rich),
        overall=_row(report.overall),
        vae_mse=report.vae_mse,
        vae_oracle=report.vae_oracle,
        rewards="\n".join(rewards),
        aesthetic=report.aesthetic_correlation,
    )


def sample_sheet(report: Report) -> Image.Image:
    """A grid of samples with their prompts: the last (plain) ones above the first (rich) ones."""
    half = SHEET_COLUMNS * SHEET_ROWS // 2
    rich_count = len(report.prompts) - report.plain_count
    chosen = [*range(rich_count, len(report.prompts))][:half] + [*range(rich_count)][:half]
    sheet = Image.new("RGB", (SHEET_COLUMNS * TILE, SHEET_ROWS * (TILE + CAPTION)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    for spot, index in enumerate(chosen):
        x, y = spot % SHEET_COLUMNS * TILE, spot // SHEET_COLUMNS * (TILE + CAPTION)
        pixels = (report.images[index].clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        sheet.paste(Image.fromarray(pixels).resize((TILE - 6, TILE - 6), Image.Resampling.NEAREST), (x + 3, y + 3))
        pen.text((x + 4, y + TILE), textwrap.fill(report.prompts[index], 28), fill="black", font=font, spacing=1)
    return sheet


def write_card(out: Path, device: torch.device, count: int) -> None:
    """Examine what lies in `out`; write samples.png and then README.md, which marks the whole as finished."""
    report = examine(out, device, count)
    sheet = out / "samples.part.png"
    sample_sheet(report).save(sheet, optimize=True)
    sheet.replace(out / "samples.png")
    aside = out / "README.md.part"
    aside.write_text(card_text(out, report))
    aside.replace(out / "README.md")
