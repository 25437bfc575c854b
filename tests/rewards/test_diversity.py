"""Diversity: the evaluation's measure as a differentiable reward."""

import itertools

import open_clip
import pytest
import torch

from textcraftor.config import RewardConfig
from textcraftor.errors import RewardError
from textcraftor.evaluate.judging import diversity as evaluation_diversity
from textcraftor.rewards import Reward, RewardMix, load_reward

PROMPTS = ["red circle", "blue", "red circle", "blue", "red circle"]


@pytest.fixture
def reward(openclip_folder) -> Reward:
    return load_reward("diversity", RewardConfig(kind="diversity", path=str(openclip_folder)))


@pytest.fixture
def five() -> torch.Tensor:
    return torch.nn.functional.interpolate(torch.rand(5, 3, 6, 6), (24, 24), mode="bilinear")


def test_score_is_the_mean_distance_of_all_pairs_of_a_prompt(reward, openclip_folder, five):
    """Pair by pair, on the features of open_clip's own model."""
    model = open_clip.create_model(f"local-dir:{openclip_folder}").eval()
    with torch.no_grad():
        features = model.encode_image(reward.preprocess(five), normalize=True)
    expected = torch.empty(5)
    for rows in ([0, 2, 4], [1, 3]):
        pairs = [1 - features[i] @ features[j] for i, j in itertools.combinations(rows, 2)]
        expected[rows] = torch.stack(pairs).mean()
    score = reward.score(five, reward.text_features(PROMPTS))
    assert (score - expected).abs().max() <= 1e-5 and expected.min() > 1e-3


def test_score_equals_the_evaluations_diversity(reward, five):
    four = five[:4]
    features = reward.text_features(["a", "a", "b", "b"])
    expected = evaluation_diversity(reward.image_features(four), 2).float()
    torch.testing.assert_close(reward.score(four, features), expected, rtol=0, atol=1e-6)


def test_equal_images_have_no_diversity(reward, five):
    equal = five[:1].expand(4, -1, -1, -1)
    score = reward.score(equal, reward.text_features(["red"] * 4))
    assert score.abs().max() < 1e-6


def test_the_gradient_moves_the_images_of_a_prompt_apart(reward, five):
    features = reward.text_features(PROMPTS)
    images = five.clone().requires_grad_()
    before = reward.score(images, features)
    before[0].backward()
    has_gradient = images.grad.flatten(1).norm(dim=1) > 0
    assert has_gradient.tolist() == [True, False, True, False, True]  # only the images of its prompt
    moved = (images + 0.02 * images.grad / images.grad.abs().max()).detach()
    assert reward.score(moved, features)[0] > before[0]


def test_a_single_image_of_a_prompt_is_rejected(reward, five):
    with pytest.raises(RewardError, match=r"1 of the 3 images in the batch are alone.*Draw at least 2 images of each prompt"):
        reward.score(five[:3], reward.text_features(["red", "red", "blue"]))


def test_features_are_integers_and_differ_between_prompts(reward):
    prompts = ["a", "b", "A", "a ", "\ud800", "赤い円"]
    features = reward.text_features(prompts)
    assert len({tuple(row) for row in features.tolist()}) == len(prompts)
    assert torch.equal(features, features.round()) and features.max() < 2**24
    assert torch.equal(features[:1], reward.text_features(["a"]))
    assert not features.half().isfinite().all()  # never cache them in half precision


def test_the_text_tower_is_dropped(reward):
    assert reward.text_tower is None and reward.truncated(["red " * 99]) == 0


def test_a_mix_includes_diversity(reward, openclip_folder, five):
    clip = load_reward("clip", RewardConfig(kind="clip", path=str(openclip_folder)))
    rewards = {"clip": clip, "diversity": reward}
    features = {name: each.text_features(PROMPTS) for name, each in rewards.items()}
    total, parts = RewardMix(rewards, {"clip": 10.0, "diversity": 2.0})(five, features)
    torch.testing.assert_close(total, 10 * parts["clip"] + 2 * parts["diversity"])
