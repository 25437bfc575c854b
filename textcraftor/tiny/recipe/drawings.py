"""Images that the base draws at several stages of its training: what people choose between and caption.

Rewards that have only seen clean renders are nearly blind on them. PickScore and HPSv2 were trained on people's choices
between generated images for the same reason.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from rich.progress import track
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from textcraftor.tiny.language import parse, sample_prompts
from textcraftor.tiny.oracle import MIN_GLOSS, DetectedScene, check_claims, detect
from textcraftor.tiny.recipe.fit import generator
from textcraftor.tiny.scenes import Scene

IMAGES_PER_PROMPT: Final = 4
GUIDANCE_SCALES: Final = (2.0, 4.0, 7.5, 12.0)
RICH_FRACTION: Final = 0.6
BATCH: Final = 256


@dataclass(frozen=True, slots=True)
class Drawings:
    """Drawn images and what is in them.

    images: (P, K, 3, 64, 64) uint8, K images of each of P prompts.  detected: what each image shows, P lists of K.
    """

    prompts: list[str]
    images: Tensor
    detected: list[list[DetectedScene]]

    def fidelity(self, prompt: int, image: int, misread: float, rng: np.random.Generator) -> float:
        """The fraction of the prompt's claims that an annotator sees in an image; `misread`: probability of misreading one."""
        claims = parse(self.prompts[prompt])
        assert claims is not None  # every prompt of the tiny world makes claims
        holds = np.asarray(list(check_claims(self.detected[prompt][image], claims).values()))
        return float(np.mean(holds ^ (rng.random(len(holds)) < misread)))

    def style(self, prompt: int, image: int) -> str:
        """The style of an image, "flat" or "glossy"."""
        return style_of(self.detected[prompt][image])


def style_of(detected: DetectedScene) -> str:
    """The style of a detected scene, by the mean gloss of its objects; "flat" without any."""
    gloss = [found.gloss for found in detected.objects]
    return "glossy" if gloss and float(np.mean(gloss)) > MIN_GLOSS else "flat"


def described_scene(detected: DetectedScene) -> Scene | None:
    """The scene that a person would write a caption for; None when there is none: no object, three, or one of no shape."""
    objects = detected.objects
    attributes = tuple(found.attributes for found in objects)
    if not 1 <= len(objects) <= 2 or detected.background is None or any(each.shape is None for each in attributes):
        return None
    if len({each.colour for each in attributes}) < len(attributes):
        return None
    relation = None
    if len(objects) == 2:
        across, down = objects[0].x - objects[1].x, objects[0].y - objects[1].y
        names = ("left of", "right of") if abs(across) > abs(down) else ("above", "below")
        relation = names[int((across if abs(across) > abs(down) else down) > 0)]
    return Scene(attributes, relation, detected.background, style_of(detected))


def sample_described(drawings: Drawings, count: int, rng: np.random.Generator) -> tuple[Tensor, list[Scene]]:
    """Random drawn images, (B, 3, 64, 64) in [0, 1], and what they show; B is below `count` if few can be described."""
    images: list[Tensor] = []
    scenes: list[Scene] = []
    for index in rng.integers(drawings.images.shape[:2], size=(4 * count, 2)):
        row, column = (int(value) for value in index)
        scene = described_scene(drawings.detected[row][column])
        if scene is not None and len(scenes) < count:
            images.append(drawings.images[row, column])
            scenes.append(scene)
    return (torch.stack(images).float() / 255 if images else torch.empty(0, 3, 64, 64)), scenes


def make_drawings(
    load_stages: Callable[[], Sequence[StableDiffusionPipeline]], prompts: int, steps: int, seed: int, cache: Path
) -> Drawings:
    """Images of `prompts` prompts, each by a random stage and at a random guidance scale; read from `cache` if it exists.

    load_stages: the base at several stages of its training.  steps: of the sampler.
    """
    said = sample_prompts(prompts, seed, RICH_FRACTION)
    if not cache.exists():
        rng, stages = generator(seed, "drawings"), load_stages()
        count = prompts * IMAGES_PER_PROMPT
        stage, guidance = rng.integers(len(stages), size=count), rng.choice(GUIDANCE_SCALES, size=count)
        images = torch.empty((count, 3, 64, 64), dtype=torch.uint8)
        order = np.lexsort((guidance, stage))
        starts = np.flatnonzero((np.diff(stage[order]) != 0) | (np.diff(guidance[order]) != 0)) + 1
        groups = [rows for group in np.split(order, starts) for rows in np.split(group, range(BATCH, len(group), BATCH))]
        for rows in track(groups, description="drawings"):
            texts = [said[row // IMAGES_PER_PROMPT] for row in rows]
            seeds = [seed * 1_000_000 + int(row) for row in rows]
            drawn = draw(stages[stage[rows[0]]], texts, float(guidance[rows[0]]), seeds, steps)
            images[torch.from_numpy(rows)] = (drawn * 255).round().byte()
        cache.parent.mkdir(parents=True, exist_ok=True)
        temporary = cache.with_suffix(".part")
        save_file({"images": images}, temporary, {"prompts": json.dumps(said)})
        temporary.replace(cache)
    with safe_open(cache, "pt") as file:
        images = file.get_tensor("images")
    detected = [scene for part in images.split(256) for scene in detect(part.float() / 255)]
    table = [detected[start : start + IMAGES_PER_PROMPT] for start in range(0, len(detected), IMAGES_PER_PROMPT)]
    return Drawings(said, images.view(prompts, IMAGES_PER_PROMPT, 3, 64, 64), table)


@torch.no_grad()
def draw(
    pipeline: StableDiffusionPipeline, prompts: Sequence[str], guidance_scale: float, seeds: Sequence[int], steps: int
) -> Tensor:
    """Images of prompts, (B, 3, 64, 64) float32 in [0, 1] on the CPU; image n starts from the noise of seed n."""
    noise: list[Any] = [torch.Generator().manual_seed(seed) for seed in seeds]
    images: Tensor = pipeline(
        list(prompts), num_inference_steps=steps, guidance_scale=guidance_scale, generator=noise, output_type="pt"
    ).images
    return images.float().cpu()
