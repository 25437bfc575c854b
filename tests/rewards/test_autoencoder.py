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


def picture(x: int, colour: int = 0) -> torch.Tensor:
    """A square of one colour at column `x` of a white ground."""
    image = torch.ones(3, 64, 64)
    image[:, 24:40, x : x + 16] = 0.1
    image[colour, 24:40, x : x + 16] = 0.9
    return image


def test_features_are_latents_of_unit_length(layout):
    features = layout.image_features(torch.rand(3, 3, 64, 64))
    assert features.shape == (3, 4 * 8 * 8)
    assert features.norm(dim=-1).tolist() == pytest.approx([1, 1, 1])


def test_the_same_thing_elsewhere_is_another_picture(layout):
    moved = torch.stack([picture(4), picture(44)])
    same = torch.stack([picture(4), picture(4)])
    assert diversity(layout.image_features(same), 2)[0] == pytest.approx(0, abs=1e-6)
    assert diversity(layout.image_features(moved), 2)[0] > 0.1


def test_another_ground_alone_is_nearly_the_same_layout(layout):
    darker, elsewhere = picture(4).clone(), picture(44)
    darker[darker == 1] = 0.8
    other_ground = diversity(layout.image_features(torch.stack([picture(4), darker])), 2)[0]
    other_place = diversity(layout.image_features(torch.stack([picture(4), elsewhere])), 2)[0]
    assert other_ground < 0.2 * other_place


def test_it_scores_nothing(layout):
    with pytest.raises(RewardError, match=r"layout.*diversity_judge only"):
        layout.score(torch.rand(1, 3, 64, 64), layout.text_features(["a red circle"]))


def test_no_vae_is_named(tmp_path):
    with pytest.raises(ModelError, match="AutoencoderKL"):
        load_reward("layout", RewardConfig(kind="vae", path=str(tmp_path)))


def test_weights_never_load_in_part(tmp_path):
    folder = shutil.copytree(VAE, tmp_path / "vae")
    weights = folder / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    del state["encoder.conv_in.bias"]
    save_file(state, weights, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"encoder\.conv_in\.bias"):
        load_reward("layout", RewardConfig(kind="vae", path=str(folder)))
