"""`textcraftor generate --task img2img|inpaint`: a given picture, redrawn by the base and by a candidate, from the same noise.

Stock diffusers pipelines do it, with the base's modules; the candidate's encoders come in through `Control`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from diffusers import (
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image, UnidentifiedImageError

from textcraftor import pictures
from textcraftor.artifact import written_aside
from textcraftor.candidate import Candidate
from textcraftor.chain.solver import make_scheduler
from textcraftor.config import Config
from textcraftor.control import Control
from textcraftor.errors import ConfigError
from textcraftor.models.base import Base, load_base
from textcraftor.models.loading import assemble

PIPELINES: Final[dict[tuple[str, bool], Any]] = {
    ("img2img", False): StableDiffusionImg2ImgPipeline,
    ("img2img", True): StableDiffusionXLImg2ImgPipeline,
    ("inpaint", False): StableDiffusionInpaintPipeline,
    ("inpaint", True): StableDiffusionXLInpaintPipeline,
}
"""(task, whether the base is an SDXL) -> diffusers' class."""


@dataclass(frozen=True)
class Given:
    """What a picture is redrawn from. strength: share of the chain that redraws it.  mask: white is redrawn; for inpainting."""

    task: str
    image: Image.Image
    mask: Image.Image | None
    strength: float


def read_given(task: str, image: Path | None, mask: Path | None, strength: float, num_inference_steps: int) -> Given | None:
    """Read and check what the command line gives; None for text2img. Raises ConfigError."""
    needed = {"--image": image, **({"--mask": mask} if task == "inpaint" else {})} if task != "text2img" else {}
    for option, path in needed.items():
        if path is None:
            raise ConfigError(f"--task {task} needs {option}, a picture")
    for option, path in (("--image", image), ("--mask", mask)):
        if path is not None and option not in needed:
            raise ConfigError(
                f"{option} is not used by --task {task}. Use --task {'inpaint' if option == '--mask' else 'img2img'}"
            )
    if image is None:
        return None
    if int(num_inference_steps * strength) < 1:
        raise ConfigError(
            f"--strength {strength:g} of {num_inference_steps} steps is less than one step. "
            f"Give at least {1 / num_inference_steps:g}"
        )
    picture, masked = _read(image, "RGB"), _read(mask, "L") if mask else None
    if masked and masked.size != picture.size:
        raise ConfigError(
            f"--mask {mask} is {_size(masked)} pixels and --image {image} {_size(picture)}. They must be of one size"
        )
    return Given(task, picture, masked, strength)


def edit(
    config: Config, candidate: Candidate, given: Given, prompt: str, seed: int, out: Path, device: torch.device, label: str
) -> None:
    """Write a PNG to `out`: the given picture, and below it the base's and the candidate's. Raises ConfigError, ModelError."""
    base = load_base(config.base, device)
    pipe = edit_pipeline(base, given.task, config)
    _require_size(given.image, pipe)
    settings: dict[str, Any] = {"num_inference_steps": config.chain.num_inference_steps, "strength": given.strength}
    words: dict[str, dict[str, Any]] = {"base": {"prompt": prompt, **settings}}
    if candidate.parts:
        words[label] = Control({label: candidate}, switch_at=config.sampler.switch_at)(pipe, prompt, **settings)
    masked = {"mask_image": given.mask, "height": given.image.height, "width": given.image.width} if given.mask else {}
    rows = {"given": [given.image]}
    for name, call in words.items():
        generator = torch.Generator().manual_seed(seed)
        more = {"guidance_scale": config.chain.guidance_scale, "generator": generator, "image": given.image}
        rows[name] = pipe(**call, **masked, **more).images
    with written_aside(out) as aside:
        pictures.save(pictures.side_by_side([prompt], rows), aside)


def edit_pipeline(base: Base, task: str, config: Config) -> Any:
    """The base's modules in diffusers' pipeline for a task, with the chain's scheduler."""
    pipeline = PIPELINES[task, isinstance(base.pipe, StableDiffusionXLPipeline)]
    scheduler = make_scheduler(config.chain, base.pipe.scheduler.config)
    options = {key: base.pipe.config[key] for key in ("force_zeros_for_empty_prompt",) if key in base.pipe.config}
    pipe = assemble(pipeline, {**base.pipe.components, "scheduler": scheduler}, options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _require_size(image: Image.Image, pipe: Any) -> None:
    factor = pipe.vae_scale_factor * 2 ** (len(pipe.unet.config.block_out_channels) - 1)
    if any(side % factor for side in image.size):
        width, height = (max(factor, round(side / factor) * factor) for side in image.size)
        raise ConfigError(
            f"--image is {_size(image)} pixels; this base draws multiples of {factor}. Resize it, to {width} x {height}"
        )


def _read(path: Path, mode: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert(mode)
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist. Give a picture, such as a PNG or a JPEG") from None
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError, ValueError, SyntaxError) as error:
        raise ConfigError(f"{path} is no picture that can be read: {error}. Give a PNG or a JPEG") from None


def _size(image: Image.Image) -> str:
    return f"{image.width} x {image.height}"
