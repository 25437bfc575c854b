"""The contrastive reward: log-probability of an image's own prompt among the prompts of the batch."""

import pytest
import torch

from textcraftor.config import RewardConfig
from textcraftor.errors import RewardError
from textcraftor.rewards import load_reward


@pytest.fixture
def contrast(openclip_folder):
    return load_reward("contrast", RewardConfig(kind="contrast", path=str(openclip_folder)))


def test_the_score_is_the_log_probability_of_its_own_prompt(contrast, openclip_folder, images, prompts):
    clip = load_reward("clip", RewardConfig(kind="clip", path=str(openclip_folder)))
    features = clip.text_features(prompts)
    scale = clip.text_tower.logit_scale.exp()
    logits = torch.stack([scale * clip.score(images, features[[j] * len(images)]) for j in range(len(prompts))], dim=1)
    expected = torch.stack([torch.log(row.exp()[i] / row.exp().sum()) for i, row in enumerate(logits)])
    assert contrast.score(images, contrast.text_features(prompts)).tolist() == pytest.approx(expected.tolist(), abs=1e-5)


def test_equal_prompts_share_the_probability(contrast, images, prompts):
    equal = contrast.text_features([prompts[0]] * len(images))
    assert contrast.score(images, equal).tolist() == pytest.approx([-torch.tensor(len(images)).log().item()] * len(images))


def test_the_gradient_reaches_the_images_but_no_parameter(contrast, images, prompts):
    images = images.clone().requires_grad_(True)
    contrast.score(images, contrast.text_features(prompts)).sum().backward()
    assert images.grad is not None
    assert images.grad.flatten(1).norm(dim=1).min() > 0
    assert all(parameter.grad is None for parameter in contrast.parameters())


def test_fewer_prompts_than_images_are_rejected(contrast, images, prompts):
    with pytest.raises(RewardError, match="one row for each image"):
        contrast.score(images, contrast.text_features(prompts)[:1])


def test_a_batch_scored_in_parts_gives_the_scores_of_the_batch(contrast, images, prompts):
    features = contrast.text_features(prompts)
    together = contrast.score(images, features)
    parts = [contrast.score_rows(images[rows], features, rows) for rows in (slice(0, 1), slice(1, len(images)))]
    torch.testing.assert_close(torch.cat(parts), together)
    assert not torch.allclose(contrast.score(images[:2], features[:2]), together[:2])
