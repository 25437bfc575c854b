"""The mix: a weighted sum of rewards, and the weights that it rejects."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from textcraftor.config import RewardConfig
from textcraftor.errors import RewardError
from textcraftor.rewards import Reward, RewardMix


class Brightness(Reward):
    """Mean brightness of the image times the length of its prompt."""

    resolution = 8
    calls = 0

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        return torch.tensor([[float(len(prompt))] for prompt in prompts])

    def image_features(self, images: Tensor) -> Tensor:
        return torch.nn.functional.normalize(images.flatten(1), dim=-1)

    def score(self, images: Tensor, text_features: Tensor) -> Tensor:
        self.calls += 1
        return images.mean(dim=(1, 2, 3)) * text_features[:, 0]


@pytest.fixture
def rewards() -> dict[str, Reward]:
    return {name: Brightness(name, RewardConfig(kind="brightness")) for name in ("one", "two", "three")}


def test_total_is_the_weighted_sum_and_parts_are_unweighted(rewards):
    images = torch.stack([torch.full((3, 4, 4), value) for value in (0.25, 0.5)])
    features = {"one": torch.tensor([[1.0], [2.0]]), "two": torch.tensor([[4.0], [8.0]])}
    total, parts = RewardMix(rewards, {"one": 10.0, "two": -0.5})(images, features)
    assert parts["one"].tolist() == [0.25, 1.0]
    assert parts["two"].tolist() == [1.0, 4.0]
    assert total.tolist() == [2.0, 8.0]
    assert rewards["three"].calls == 0  # no weight, no work


def test_gradient_is_the_weighted_sum_of_the_gradients(rewards):
    images = torch.rand(2, 3, 4, 4, requires_grad=True)
    features = {"one": torch.ones(2, 1), "two": torch.ones(2, 1)}
    total, _ = RewardMix(rewards, {"one": 3.0, "two": 4.0})(images, features)
    total.sum().backward()
    torch.testing.assert_close(images.grad, torch.full_like(images, 7.0 / 48))


def test_unknown_names_list_the_known_ones(rewards):
    with pytest.raises(RewardError, match=r"Unknown reward 'on'. Known: one, three, two. Did you mean 'one'"):
        RewardMix(rewards, {"on": 1.0})


@pytest.mark.parametrize("weights", [{}, {"one": 0.0}, {"one": float("nan")}, {"one": float("inf")}])
def test_zero_or_non_finite_weights_are_rejected(rewards, weights):
    with pytest.raises(RewardError, match=r"weight"):
        RewardMix(rewards, weights)


def test_missing_text_features_are_reported(rewards):
    mix = RewardMix(rewards, {"one": 1.0, "two": 1.0})
    with pytest.raises(RewardError, match="No text features for two; got those of: one"):
        mix(torch.rand(1, 3, 4, 4), {"one": torch.ones(1, 1)})
