"""A small evaluation without diffusion: rendered scenes as images, judges that look at brightness."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
import yaml
from torch import Tensor

from textcraftor.config import Config, RewardConfig, load
from textcraftor.prompts.table import noise_seed, prompt_id, write_prompts
from textcraftor.rewards import Reward
from textcraftor.tiny.language import plain_caption, rich_caption
from textcraftor.tiny.renderer import render
from textcraftor.tiny.scenes import sample_scene

PROMPTS, IMAGES = 8, 3
BRIGHTNESS = "tests.evaluate.conftest:Brightness"


class Brightness(Reward):
    """Scores the mean of one channel; its image features are the means of the four quadrants."""

    resolution = 64

    def __init__(self, name: str, config: RewardConfig | None = None, dtype: torch.dtype = torch.float32):
        super().__init__(name, config or RewardConfig(kind=BRIGHTNESS), dtype)
        self.channel = 2 if name == "heldout" else 0
        self.asked: list[str] = []
        self.dropped = False

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        assert not self.dropped
        self.asked += prompts
        return torch.tensor([[float(len(prompt))] for prompt in prompts])

    def image_features(self, images: Tensor) -> Tensor:
        quadrants = torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)
        return torch.nn.functional.normalize(quadrants, dim=-1)

    def score(self, images: Tensor, text_features: Tensor) -> Tensor:
        assert len(images) == len(text_features)
        return images[:, self.channel].mean((1, 2))

    def drop_text_tower(self) -> None:
        self.dropped = True


def write_params(folder: Path, base: dict[str, Any] | None = None, **evaluate: object) -> Path:
    """params.yaml of a run whose judges are cheap; the mix `balanced` was trained on `bright` alone."""
    settings = {"prompts": PROMPTS, "images_per_prompt": IMAGES, "batch_size": 5, "bootstrap": 200}
    settings |= {"judges": ["bright", "heldout", "oracle"], "diversity_judge": "heldout"}
    params = {
        "profile": "tiny",
        "mixes": ["balanced"],
        "base": base or {},
        "chain": {"num_inference_steps": 5, "guidance_scale": 3.0},
        "rewards": {name: {"kind": BRIGHTNESS, "path": f"made-up/{name}", "version": "7"} for name in ("bright", "heldout")},
        "mix": {"balanced": {"bright": 1, "clip": 0, "contrast": 0, "aesthetic": 0, "pickscore": 0, "hpsv2": 0}},
        "train": {"allow_without_clip": True, "grad_steps": 1},
        "train_unet": {"grad_steps": 1},
        "evaluate": settings | evaluate,
        "gate": {
            "rules": [{"judge": "heldout", "metric": "ci_low", "at_least": 0}],
            "champion_margin": {"oracle": None},
        },
    }
    path = folder / "params.yaml"
    path.write_text(yaml.safe_dump(params))
    return path


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load(write_params(tmp_path))


@pytest.fixture(scope="session")
def scenes() -> list[tuple[str, Tensor]]:
    """(prompt, its pictures (IMAGES, 3, 64, 64) uint8), by prompt_id: every claim of every prompt holds, or nearly."""
    rng = np.random.default_rng(3)
    made: dict[str, tuple[str, Tensor]] = {}
    while len(made) < PROMPTS:
        scene = sample_scene(rng)
        prompt = plain_caption(scene) if len(made) % 2 else rich_caption(scene, rng)
        pictures = np.stack([render(scene, rng) for _ in range(IMAGES)])
        made[prompt_id(prompt)] = (prompt, torch.from_numpy(pictures).permute(0, 3, 1, 2))
    return [made[key] for key in sorted(made)]


@pytest.fixture
def root(tmp_path: Path, scenes: list[tuple[str, Tensor]]) -> Path:
    """A workspace with the scenes' prompts held out, and other train prompts."""
    write_curated(tmp_path, "heldout", [prompt for prompt, _ in scenes])
    write_curated(tmp_path, "train", [f"a red circle, number {number}" for number in range(3)])
    return tmp_path


def write_curated(root: Path, split: str, prompts: Sequence[str]) -> None:
    folder = root / "data/prompts/curated"
    folder.mkdir(parents=True, exist_ok=True)
    ids = [prompt_id(prompt) for prompt in prompts]
    rows = {
        "prompt": prompts,
        "prompt_id": ids,
        "seed": [noise_seed(each, 0) for each in ids],
        "source": ["scenes"] * len(ids),
        "category": ["one thing"] * len(ids),
        "words": [len(prompt.split()) for prompt in prompts],
    }
    write_prompts(pl.DataFrame(rows), folder / f"{split}.parquet")


@pytest.fixture
def good(scenes: list[tuple[str, Tensor]]) -> Tensor:
    """(N, 3, 64, 64) uint8: images that match their prompts."""
    return torch.cat([pictures for _, pictures in scenes])


@pytest.fixture
def poor(good: Tensor) -> Tensor:
    """The same images with the wrong prompts, darker."""
    return (good.roll(IMAGES, 0).float() * 0.8).to(torch.uint8)
