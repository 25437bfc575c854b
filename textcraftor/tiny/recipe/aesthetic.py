"""The aesthetic reward: a rating from 1 to 10, independent of the prompt, in the format of LAION's aesthetic predictor.

Synthetic annotators like gloss, contrast and spacing, and dislike flaws of the image.
"""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from textcraftor.tiny.recipe import batches
from textcraftor.tiny.recipe.degradation import degrade
from textcraftor.tiny.recipe.fit import Schedule, fit
from textcraftor.tiny.recipe.towers import EMBEDDING, IMAGE_SIZE, normalize
from textcraftor.tiny.renderer import BACKGROUND_COLOURS, OBJECT_COLOURS, Placement, draw, sample_placements
from textcraftor.tiny.scenes import Scene

SCHEDULE = Schedule(steps=500, batch=64, peak_lr=1e-3, ema=0.99, save_every=50)
RATING_NOISE = 0.5  # standard deviation of the annotators' ratings of one image
LUMA = np.asarray((0.299, 0.587, 0.114))


class AestheticModel(nn.Module):
    """A CLIP image tower (quick GELU, as OpenAI's) and LAION's head: linear layers without activations."""

    def __init__(self) -> None:
        super().__init__()
        config = CLIPVisionConfig(
            hidden_size=96,
            intermediate_size=192,
            num_hidden_layers=4,
            num_attention_heads=3,
            image_size=IMAGE_SIZE,
            patch_size=8,
            projection_dim=EMBEDDING,
            hidden_act="quick_gelu",
        )
        self.tower = CLIPVisionModelWithProjection(config)
        widths = (EMBEDDING, 1024, 128, 64, 16, 1)
        # Indices 1, 3 and 5 are dropout, as in LAION's file: without weights, but they number the keys.
        self.layers = nn.Sequential(
            nn.Linear(widths[0], widths[1]),
            nn.Dropout(0.2),
            nn.Linear(widths[1], widths[2]),
            nn.Dropout(0.2),
            nn.Linear(widths[2], widths[3]),
            nn.Dropout(0.1),
            nn.Linear(widths[3], widths[4]),
            nn.Linear(widths[4], widths[5]),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Predicted ratings, (B,).  images: (B, 3, 64, 64) in [0, 1]."""
        features = F.normalize(self.tower(normalize(images)).image_embeds.float(), dim=-1)
        scores: Tensor = self.layers(features).squeeze(-1).float()
        return scores


def _contrast(scene: Scene) -> float:
    """Mean difference in luminance between the objects and the background, 0 to 1."""
    background = LUMA @ np.asarray(BACKGROUND_COLOURS[scene.background])
    return (
        float(np.mean([abs(LUMA @ np.asarray(OBJECT_COLOURS[obj.colour or ""]) - background) for obj in scene.objects])) / 255
    )


def _spacing(placements: tuple[Placement, ...]) -> float:
    """Distance of the objects to the frame and to each other, from 0 (cut off or touching) to 1."""
    margin = min(min(p.x, p.y, 1 - p.x, 1 - p.y) - p.width / 2 for p in placements)
    to_frame = float(np.clip(margin / 0.15, 0, 1))
    if len(placements) == 1:
        return to_frame
    one, other = placements
    gap = max(abs(one.x - other.x), abs(one.y - other.y)) - (one.width + other.width) / 2
    return (to_frame + float(np.clip(gap / 0.15, 0, 1))) / 2


def _jitter(placements: tuple[Placement, ...], rng: np.random.Generator) -> tuple[Placement, ...]:
    return tuple(Placement(p.x + rng.uniform(-0.1, 0.1), p.y + rng.uniform(-0.1, 0.1), p.width) for p in placements)


def sample_rated_images(
    count: int, rng: np.random.Generator, device: torch.device, vae: AutoencoderKL | None = None
) -> tuple[Tensor, Tensor]:
    """Images (B, 3, 64, 64) in [0, 1], some badly composed or degraded, and their mean ratings (B,) from 1 to 10."""
    scenes = batches.sample_scenes(count, rng)
    layouts = [sample_placements(scene, rng) for scene in scenes]
    layouts = [_jitter(layout, rng) if rng.random() < 0.4 else layout for layout in layouts]
    pixels = np.stack([draw(scene, layout, rng) for scene, layout in zip(scenes, layouts, strict=True)])
    clean = batches.to_tensor(pixels).to(device)
    images = degrade(clean, rng, vae)
    flaws = (images - clean).abs().mean((1, 2, 3))
    clean_ratings = [
        3.0 + 2.0 * (scene.style == "glossy") + 3.0 * _contrast(scene) + 2.0 * _spacing(layout)
        for scene, layout in zip(scenes, layouts, strict=True)
    ]
    ratings = torch.tensor(clean_ratings, device=device) - 25 * flaws
    return images, ratings.clamp(1, 10)


def train_aesthetic(
    model: AestheticModel, checkpoint: Path, seed: int, vae: AutoencoderKL | None = None, schedule: Schedule = SCHEDULE
) -> None:
    """Train in place by regression on noisy ratings."""
    device = next(model.parameters()).device

    def loss_at(rng: np.random.Generator) -> Tensor:
        images, ratings = sample_rated_images(schedule.batch, rng, device, vae)
        return F.mse_loss(model(images), ratings + RATING_NOISE * torch.randn_like(ratings))

    nn.init.constant_(model.state_dict(keep_vars=True)["layers.7.bias"], 5.0)  # start at the middle of the scale
    fit("aesthetic", model, loss_at, schedule, checkpoint, seed)
