"""VAE latents as layout features: sensitive to positions, hardly to the background, and not a score."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from textcraftor.config import RewardConfig
from textcraftor.errors import ModelError, RewardError
from textcraftor.evaluate.judging import diversity
from textcraftor.rewards import load_reward

VAE = Path(__file__).parents[2] / "data/tiny/base/vae"


@pytest.fixture(scope="module")
def layout():
    return load_reward("layout", RewardConfig(kind="vae", path=str(VAE)))


def square_at(x: int, colour: int = 0) -> torch.Tensor:
    """An image of a square of one colour at column `x` on a white background."""
    image = torch.ones(3, 64, 64)
    image[:, 24:40, x : x + 16] = 0.1
    image[colour, 24:40, x : x + 16] = 0.9
    return image


def test_features_are_latents_of_unit_length(layout):
    features = layout.image_features(torch.rand(3, 3, 64, 64))
    assert features.shape == (3, 4 * 16 * 16)
    assert features.norm(dim=-1).tolist() == pytest.approx([1, 1, 1])


def test_moving_an_object_increases_diversity(layout):
    moved = torch.stack([square_at(4), square_at(44)])
    same = torch.stack([square_at(4), square_at(4)])
    assert diversity(layout.image_features(same), 2)[0] == pytest.approx(0, abs=1e-6)
    assert diversity(layout.image_features(moved), 2)[0] > 0.1


def test_another_background_counts_much_less_than_another_position(layout):
    darker, moved = square_at(4).clone(), square_at(44)
    darker[darker == 1] = 0.8
    other_background = diversity(layout.image_features(torch.stack([square_at(4), darker])), 2)[0]
    other_position = diversity(layout.image_features(torch.stack([square_at(4), moved])), 2)[0]
    assert other_background < 0.2 * other_position


def test_scoring_is_rejected(layout):
    with pytest.raises(RewardError, match=r"layout.*diversity_judge only"):
        layout.score(torch.rand(1, 3, 64, 64), layout.text_features(["a red circle"]))


def test_a_missing_vae_is_reported(tmp_path):
    with pytest.raises(ModelError, match="AutoencoderKL"):
        load_reward("layout", RewardConfig(kind="vae", path=str(tmp_path)))


def test_missing_tensors_are_rejected(tmp_path):
    folder = shutil.copytree(VAE, tmp_path / "vae")
    weights = folder / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    del state["encoder.conv_in.bias"]
    save_file(state, weights, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"encoder\.conv_in\.bias"):
        load_reward("layout", RewardConfig(kind="vae", path=str(folder)))
