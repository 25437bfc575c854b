"""Writes the model card (data/tiny/README.md) from measured figures, and a sheet of sample images."""

import textwrap
from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from textcraftor import pictures
from textcraftor.layout import TINY
from textcraftor.tiny.oracle import CLAIM_KINDS
from textcraftor.tiny.recipe.agreement import LARGE_DIFFERENCE
from textcraftor.tiny.recipe.unet import TRAINING_IMAGES
from textcraftor.tiny.recipe.validation import GUIDANCE_SCALE, STEPS, ValidationReport, validate

SHEET_COLUMNS, SHEET_ROWS, TILE, CAPTION = 6, 4, 160, 58

_TEXT = """\
---
license: apache-2.0
library_name: diffusers
tags: [text-to-image, tiny, synthetic]
---
# The tiny Stable Diffusion and its rewards

A small Stable Diffusion 1.x and five small reward models, in the classes and file formats of the full-size ones, trained
from scratch on rendered scenes alone. With them the whole pipeline runs on a laptop, through the same code as SD 1.5. They
know images of one or two coloured shapes on a plain background and are of no use for anything else.

![samples](samples.png)

*{steps} DDIM steps, guidance_scale {guidance}; the first prompts of each kind, not selected. Upper half: plain captions. Lower
half: rich prompts, which the base understands only in part.*

## Contents
| folder | loads with | parameters |
|---|---|---|
{inventory}

All weights are safetensors in half precision, {megabytes:.1f} MB together; without a `dtype` argument they load as float32.
`StableDiffusionPipeline.from_pretrained("{base}")("a small red circle").images[0]` is a picture of 64 x 64 px. `base`
has a text encoder of its own. `heldout` is a judge only: no model is trained on it, its architecture (convolutions) and its
training images differ from the rewards'.

## Training
`textcraftor tiny-build` (`textcraftor/tiny/recipe`), seeded and resumable, takes a night on two CPU cores, less on a GPU. The
autoencoder has a factor of 4. UNet and text encoder were trained together, on velocity prediction, with {images:,} rendered
images. Each has one caption for good: a few are rich, and half of those describe another image; in the last steps all do. So
the UNet can draw what its text encoder fails to express for rich prompts, and tuning the text encoder can close that gap.
Why it is trained so, and where these weights differ: `docs/decisions/tiny-base.md`.

`clip` and `heldout` learned a scene's attributes first, then by contrast on renders with correct captions, 60 % of them rich,
and hard negatives that differ in one attribute. `pickscore` and `hpsv2` start from `clip`. All four were then fine-tuned on
images that the base drew at several stages of its training: `clip` and `heldout` on captions of what those show, `pickscore`
and `hpsv2` on the choices of two groups of synthetic annotators (P and H) between two images of one prompt. The annotators see
pixels through the oracle, misread one claim in twenty, have tastes and err. `aesthetic` was trained on noisy ratings of gloss,
contrast and spacing.

## Figures
Measured by the recipe's last step on prompts and scenes that no step has seen: {count} prompts, 60 % rich, checked by the
oracle (`textcraftor/tiny/oracle.py`), which reads pixels and is not learned. Images of other prompts reach {chance:.3f}.

| claims that hold | {kinds} | all |
|---|{rules}---|
| plain prompts | {plain} |
| rich prompts | {rich} |
| all prompts | {overall} |

| autoencoder | |
|---|---|
| mean squared error, images in [-1, 1] | {vae_mse:.4f} |
| claims that hold in reconstructions | {vae_claims:.3f} |

| reward | prefers the caption to a hard negative | finds it among 128 | agrees with the oracle | and on large differences |
|---|---|---|---|---|
{rewards}

Agreement is on pairs of images that the base drew for one prompt: how often the reward prefers the one of which more claims
hold. A difference is large from {large:.1f} of the claims. The correlation of `aesthetic` with the mean ratings is
{aesthetic:.3f}, and with the oracle, within a prompt, {independent:.3f}.

## Licence and limits
Apache-2.0. Every image, caption and weight comes from the renderer and the grammar in `textcraftor/tiny`. The base
misunderstands rich prompts: that leaves room for tuning. Words outside the vocabulary are tokenized byte by byte and
give arbitrary images.
"""

_LOADERS = {
    "base": "`StableDiffusionPipeline.from_pretrained`",
    "rewards/clip": '`open_clip.create_model_and_transforms("local-dir:...")`',
    "rewards/hpsv2": "the same",
    "rewards/heldout": "the same",
    "rewards/pickscore": "`CLIPModel.from_pretrained`",
    "rewards/aesthetic": "`CLIPVisionModelWithProjection.from_pretrained` and `head.safetensors`",
}


def _row(figures: Mapping[str, float]) -> str:
    # With few prompts, none may make a claim of some kind.
    return " | ".join(f"{figures[kind]:.3f}" if kind in figures else "-" for kind in (*CLAIM_KINDS, "all"))


def _weights_size(folder: Path) -> int:
    """Bytes of all safetensors files; half precision takes two for each parameter."""
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def card_text(out: Path, report: ValidationReport) -> str:
    """The model card of the models in `out`."""
    inventory = [f"| `{name}` | {how} | {_weights_size(out / name) / 2e6:.2f} M |" for name, how in _LOADERS.items()]
    rewards = [
        f"| `{name}` | {accuracy:.3f} | {report.retrieval[name]:.3f} | "
        + " | ".join(f"{share:.3f}" for share in report.agreement[name])
        + " |"
        for name, accuracy in report.hard_negatives.items()
    ]
    return _TEXT.format(
        images=TRAINING_IMAGES,
        base=TINY / "base",
        steps=STEPS,
        guidance=GUIDANCE_SCALE,
        inventory="\n".join(inventory),
        megabytes=_weights_size(out) / 1e6,
        count=len(report.prompts),
        chance=report.chance,
        kinds=" | ".join(CLAIM_KINDS),
        rules="---|" * len(CLAIM_KINDS),
        plain=_row(report.plain),
        rich=_row(report.rich),
        overall=_row(report.overall),
        vae_mse=report.vae_mse,
        vae_claims=report.vae_claims,
        rewards="\n".join(rewards),
        aesthetic=report.aesthetic_correlation,
        independent=report.aesthetic_and_oracle,
        large=LARGE_DIFFERENCE,
    )


def sample_sheet(report: ValidationReport) -> Image.Image:
    """A grid of images with their prompts: the first plain ones above the first rich ones."""
    half = SHEET_COLUMNS * SHEET_ROWS // 2
    rich_count = len(report.prompts) - report.plain_count
    chosen = [*range(rich_count, len(report.prompts))][:half] + [*range(rich_count)][:half]
    sheet = Image.new("RGB", (SHEET_COLUMNS * TILE, SHEET_ROWS * (TILE + CAPTION)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    for cell, index in enumerate(chosen):
        x, y = cell % SHEET_COLUMNS * TILE, cell // SHEET_COLUMNS * (TILE + CAPTION)
        image = pictures.picture(pictures.to_bytes(report.images[index]))
        sheet.paste(image.resize((TILE - 6, TILE - 6), Image.Resampling.NEAREST), (x + 3, y + 3))
        pen.text((x + 4, y + TILE), textwrap.fill(report.prompts[index], 28), fill="black", font=font, spacing=1)
    return sheet


def write_card(out: Path, device: torch.device, count: int) -> None:
    """Measure the models in `out`; write samples.png and last README.md, whose presence marks the build as complete."""
    report = validate(out, device, count)
    sheet = out / "samples.part.png"
    pictures.save(sample_sheet(report), sheet)
    sheet.replace(out / "samples.png")
    card = out / "README.md.part"
    card.write_text(card_text(out, report))
    card.replace(out / "README.md")
