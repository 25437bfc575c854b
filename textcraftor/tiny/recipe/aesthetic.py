"""The aesthetic reward: beauty from 1 to 10, whatever the prompt says, in LAION's format."""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from textcraftor.tiny.recipe import corpus
from textcraftor.tiny.recipe.damage import damage
from textcraftor.tiny.recipe.fit import Schedule, fit
from textcraftor.tiny.recipe.towers import EMBEDDING, IMAGE_SIZE, standardised
from textcraftor.tiny.renderer import GROUND, PALETTE, Place, draw, place
from textcraftor.tiny.scenes import Scene

SCHEDULE = Schedule(steps=500, batch=64, peak_lr=1e-3, ema=0.99, save_every=50)
DISAGREEMENT = 0.5  # spread of the annotators' scores for one picture


class Beholder(nn.Module):
    """CLIP's image tower (quick GELU, as OpenAI's) and LAION's stack of linear layers without activations."""

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
        # Indices 1, 3 and 5 are LAION's dropouts: they hold no weights but give the keys their numbers.
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
        """images: (B, 3, 64, 64) in [0, 1].  Returns scores, (B,)."""
        features = F.normalize(self.tower(standardised(images)).image_embeds.float(), dim=-1)
        scores: Tensor = self.layers(features).squeeze(-1).float()
        return scores


def _contrast(scene: Scene) -> float:
    weights = np.asarray((0.299, 0.587, 0.114))
    ground = weights @ np.asarray(GROUND[scene.background])
    return float(np.mean([abs(weights @ np.asarray(PALETTE[thing.colour or ""]) - ground) for thing in scene.things])) / 255


def _room(places: tuple[Place, ...]) -> float:
    """How freely the things stand, 0 (cut off or touching) to 1: distance to the frame and to each other."""
    margin = min(min(spot.x, spot.y, 1 - spot.x, 1 - spot.y) - spot.extent / 2 for spot in places)
    free = float(np.clip(margin / 0.15, 0, 1))
    if len(places) == 1:
        return free
    one, other = places
    reach = max(abs(one.x - other.x), abs(one.y - other.y)) - (one.extent + other.extent) / 2
    return (free + float(np.clip(reach / 0.15, 0, 1))) / 2


def _disturbed(places: tuple[Place, ...], rng: np.random.Generator) -> tuple[Place, ...]:
    return tuple(Place(p.x + rng.uniform(-0.1, 0.1), p.y + rng.uniform(-0.1, 0.1), p.extent) for p in places)


def exhibition(
    count: int, rng: np.random.Generator, device: torch.device, vae: AutoencoderKL | None = None
) -> tuple[Tensor, Tensor]:
    """Pictures (B, 3, 64, 64), some badly composed or flawed, and what the public would score them, 1-10, (B,)."""
    batch = corpus.scenes(count, rng)
    spots = [place(scene, rng) for scene in batch]
    spots = [_disturbed(spot, rng) if rng.random() < 0.4 else spot for spot in spots]
    drawn = np.stack([draw(scene, spot, rng) for scene, spot in zip(batch, spots, strict=True)])
    clean = torch.from_numpy(drawn).permute(0, 3, 1, 2).float().div(255).to(device)
    images = damage(clean, rng, vae)
    flaws = (images - clean).abs().mean((1, 2, 3))
    liked = [
        3.0 + 2.0 * (scene.style == "glossy") + 3.0 * _contrast(scene) + 2.0 * _room(spot)
        for scene, spot in zip(batch, spots, strict=True)
    ]
    scores = torch.tensor(liked, device=device) - 25 * flaws
    return images, scores.clamp(1, 10)


def train_beholder(
    beholder: Beholder, checkpoint: Path, seed: int, vae: AutoencoderKL | None = None, schedule: Schedule = SCHEDULE
) -> None:
    """Train in place by regression on noisy scores."""
    device = next(beholder.parameters()).device

    def loss_at(rng: np.random.Generator) -> Tensor:
        images, scores = exhibition(schedule.batch, rng, device, vae)
        return F.mse_loss(beholder(images), scores + DISAGREEMENT * torch.randn_like(scores))

    nn.init.constant_(beholder.state_dict(keep_vars=True)["layers.7.bias"], 5.0)  # start at the middle of the scale
    fit("aesthetic", beholder, loss_at, schedule, checkpoint, seed)
