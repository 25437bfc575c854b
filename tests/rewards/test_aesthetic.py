"""The aesthetic predictor: its folded head, its tower, its published weights."""

import hashlib
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPModel, CLIPVisionModelWithProjection

from tests.rewards.conftest import spread_weights, vision_config
from textcraftor.config import RewardConfig
from textcraftor.errors import ModelError, RewardError
from textcraftor.models.weights import read_tensors
from textcraftor.rewards import Reward, load_reward
from textcraftor.rewards.head import fold_layers

REPOSITORY = Path(__file__).parents[2]
PUBLISHED = "sac+logos+ava1-l14-linearMSE.pth"


@pytest.fixture
def reward(aesthetic_folder: Path) -> Reward:
    return load_reward("aesthetic", RewardConfig(kind="aesthetic", path=str(aesthetic_folder)))


def laion_head(layers) -> nn.Sequential:
    """The head as LAION defines it: linear layers with dropout in between."""
    sizes = [layers[f"layers.{index}.weight"].shape for index in (0, 2, 4, 6, 7)]
    linears = [nn.Linear(fan_in, fan_out) for fan_out, fan_in in sizes]
    dropout = nn.Dropout()
    stack = nn.Sequential(linears[0], dropout, linears[1], dropout, linears[2], dropout, linears[3], linears[4])
    stack.load_state_dict({key.removeprefix("layers."): value for key, value in layers.items()})
    return stack.eval()


def test_score_is_the_head_applied_to_the_normalised_embedding(reward, aesthetic_folder, images, prompts):
    tower = CLIPVisionModelWithProjection.from_pretrained(aesthetic_folder).eval()
    with torch.no_grad():
        embedding = tower(pixel_values=reward.preprocess(images)).image_embeds
        embedding = embedding / embedding.norm(dim=-1, keepdim=True)
        expected = laion_head(load_file(aesthetic_folder / "head.safetensors"))(embedding).squeeze(-1)
    score = reward.score(images, reward.text_features(prompts))
    torch.testing.assert_close(score, expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 1e-3
    torch.testing.assert_close(reward.image_features(images), embedding)


def test_the_prompt_is_ignored(reward, images, prompts):
    assert reward.text_features(prompts).shape == (3, 0)
    reward.drop_text_tower()
    with pytest.raises(RewardError, match=r"3 images but text features of shape \(2, 0\)"):
        reward.score(images, reward.text_features(prompts[:2]))


def test_head_stays_float32_when_the_tower_is_bfloat16(aesthetic_folder, reward):
    config = RewardConfig(kind="aesthetic", path=str(aesthetic_folder))
    low = load_reward("aesthetic", config, dtype="bfloat16")
    assert torch.equal(low.weight, reward.weight)
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}


def test_the_tower_loads_from_a_full_clip_model(pickscore_folder, aesthetic_folder, images, prompts):
    """The published tower is part of a CLIPModel that also has a text tower."""
    config = RewardConfig(kind="aesthetic", path=str(pickscore_folder), head=str(aesthetic_folder / "head.safetensors"))
    reward = load_reward("aesthetic", config)
    model = CLIPModel.from_pretrained(pickscore_folder).eval()
    with torch.no_grad():
        embedding = model.get_image_features(pixel_values=reward.preprocess(images)).pooler_output
    torch.testing.assert_close(reward.image_features(images), embedding / embedding.norm(dim=-1, keepdim=True))


def test_a_missing_head_is_reported(aesthetic_folder, tmp_path):
    folder = shutil.copytree(aesthetic_folder, tmp_path / "headless")
    (folder / "head.safetensors").unlink()
    with pytest.raises(ModelError, match=r"headless/head\.safetensors does not exist; expected the linear"):
        load_reward("aesthetic", RewardConfig(kind="aesthetic", path=str(folder)))


def without_a_layer(layers):
    del layers["layers.4.bias"]


def with_an_unexpected_layer(layers):
    layers["layers.8.bias"] = torch.zeros(1)


def mismatched_shapes(layers):
    layers["layers.2.weight"] = torch.zeros(128, 1000)


def two_outputs(layers):
    layers["layers.7.weight"], layers["layers.7.bias"] = torch.zeros(2, 16), torch.zeros(2)


def too_narrow(layers):
    layers["layers.0.weight"] = torch.zeros(1024, 11)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_a_layer, r"missing or unexpected layers\.4\.bias"),
        (with_an_unexpected_layer, r"missing or unexpected layers\.8\.bias"),
        (mismatched_shapes, "do not chain down to one number"),
        (two_outputs, "do not chain down to one number"),
        (too_narrow, "expects embeddings of width 11, the tower .* has width 12"),
    ],
)
def test_a_head_that_does_not_fit_is_rejected(aesthetic_folder, tmp_path, change, message):
    layers = load_file(aesthetic_folder / "head.safetensors")
    change(layers)
    save_file(layers, tmp_path / "head.safetensors")
    config = RewardConfig(kind="aesthetic", path=str(aesthetic_folder), head=str(tmp_path / "head.safetensors"))
    with pytest.raises(ModelError, match=message):
        load_reward("aesthetic", config)


@pytest.fixture
def published_head() -> Path:
    folder = Path(os.environ.get("TEXTCRAFTOR_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
    if not (folder / PUBLISHED).is_file():
        pytest.skip(f"{PUBLISHED} is not in {folder}; set TEXTCRAFTOR_TEST_DATA to the folder that holds it")
    return folder / PUBLISHED


def test_published_head_folds_to_its_known_vector(published_head):
    sha256 = hashlib.sha256(published_head.read_bytes()).hexdigest()
    assert sha256.startswith("21dd590f") and sha256.endswith("f1e0")
    weight, bias = fold_layers(read_tensors(published_head, "LAION's head"), published_head)
    assert bias.item() == pytest.approx(5.23664584, abs=1e-6)
    assert weight.norm().item() == pytest.approx(17.995625, abs=1e-5)
    assert weight[:3].tolist() == pytest.approx([-0.691593, -0.556994, -0.321169], abs=1e-6)
    assert (weight.sum() / 768**0.5 + bias).item() == pytest.approx(4.883285, abs=1e-5)


def test_published_head_scores_like_its_layers(published_head, tmp_path, images, prompts):
    """The published .pth file on a random tower of the published width."""
    config = vision_config()
    config.projection_dim = 768
    tower = spread_weights(CLIPVisionModelWithProjection(config)).eval()
    tower.save_pretrained(tmp_path)
    reward = load_reward("aesthetic", RewardConfig(kind="aesthetic", path=str(tmp_path), head=str(published_head)))
    with torch.no_grad():
        embedding = tower(pixel_values=reward.preprocess(images)).image_embeds
        embedding = embedding / embedding.norm(dim=-1, keepdim=True)
        expected = laion_head(torch.load(published_head, map_location="cpu", weights_only=True))(embedding).squeeze(-1)
    score = reward.score(images, reward.text_features(prompts))
    assert (score - expected).abs().max() <= 1e-4 and expected.std() > 1e-3
