"""Properties of every kind of reward."""

import logging
import warnings

import pytest
import torch
from torch import Tensor

from textcraftor.config import RewardConfig
from textcraftor.errors import RewardError
from textcraftor.rewards import KINDS, Reward, load_reward


@pytest.fixture
def configs(pickscore_folder, openclip_folder, aesthetic_folder, imagereward_folder) -> dict[str, RewardConfig]:
    return {
        "detail": RewardConfig(kind="detail", licence="MIT"),
        "diversity": RewardConfig(kind="diversity", path=str(openclip_folder), licence="MIT"),
        "imagereward": RewardConfig(kind="imagereward", path=str(imagereward_folder), licence="MIT"),
        "aesthetic": RewardConfig(kind="aesthetic", path=str(aesthetic_folder), licence="MIT"),
        "contrast": RewardConfig(kind="contrast", path=str(openclip_folder), licence="MIT"),
        "clip": RewardConfig(kind="clip", path=str(openclip_folder), licence="MIT"),
        "hpsv2": RewardConfig(kind="hpsv2", path=str(openclip_folder), version="tiny", licence="MIT"),
        "pickscore": RewardConfig(kind="pickscore", path=str(pickscore_folder), licence="MIT"),
    }


@pytest.fixture
def prompts(request, prompts) -> list[str]:
    """Three prompts; for `diversity`, which compares images of one prompt, one prompt three times."""
    repeat = "diversity" in request.node.callspec.params.values() if hasattr(request.node, "callspec") else False
    return prompts[:1] * 3 if repeat else prompts


@pytest.fixture(params=sorted(KINDS.keys() - {"vae"}))  # kind vae cannot score: see test_autoencoder.py
def reward(request, configs) -> Reward:
    return load_reward(request.param, configs[request.param])


def test_attributes_are_declared(reward, configs):
    assert reward.name in KINDS
    assert reward.version and reward.licence == "MIT" and reward.resolution == (0 if reward.name == "detail" else 16)
    if reward.name in ("imagereward", "contrast"):
        assert reward.range is None  # unbounded
    else:
        low, high = reward.range
        assert low < high


def test_is_frozen_and_in_eval_mode(reward):
    assert not any(parameter.requires_grad for parameter in reward.parameters())
    assert not any(module.training for module in reward.modules())


def test_gradient_reaches_the_images_and_nothing_else(reward, images, prompts):
    features = reward.text_features(prompts)
    images.requires_grad_()
    reward.score(images, features).sum().backward()
    assert (images.grad.flatten(1).norm(dim=1) > 0).all()
    assert all(parameter.grad is None for parameter in reward.parameters())


def test_gradient_agrees_with_finite_differences(reward, images, prompts):
    features = reward.text_features(prompts)

    def total(at: Tensor) -> Tensor:
        return reward.score(at, features).double().sum()

    images = (0.2 + 0.6 * images).requires_grad_()
    (gradient,) = torch.autograd.grad(total(images), images)
    images = images.detach()
    for direction in (
        gradient / gradient.norm(),
        torch.randn_like(images) / images.numel() ** 0.5 + gradient,
    ):
        step = 0.02 * direction / direction.norm()
        numeric = (total(images + step) - total(images - step)) / 2
        assert numeric.item() == pytest.approx((gradient * step).sum().item(), rel=0.02)


def test_an_image_is_scored_with_its_own_prompt_only(reward, images, prompts):
    """The published TextCraftor code averages over all pairs of images and prompts of the batch."""
    if reward.name == "diversity":
        prompts = [prompts[0], prompts[0], "blue"]
        images = torch.cat([images, images[2:].flip(2)])
        score = reward.score(images, reward.text_features([*prompts, "blue"]))
        others = reward.text_features([*prompts[:2], "big", "big"])
    else:
        score = reward.score(images, reward.text_features(prompts))
        others = reward.text_features([prompts[0], "big", "circle circle"])
    if reward.name == "contrast":  # the other prompts are its negatives
        assert reward.score(images, others)[0] != score[0]
        return
    torch.testing.assert_close(reward.score(images, others)[0], score[0], rtol=1e-5, atol=1e-4)
    assert reward.score(images.square(), others)[0] != score[0]


def test_image_features_are_unit_vectors(reward, images):
    torch.testing.assert_close(reward.image_features(images).norm(dim=-1), torch.ones(3))


def test_different_batch_sizes_are_rejected(reward, images, prompts):
    features = reward.text_features(prompts)
    for wrong in (features[:2], features[0]):
        with pytest.raises(RewardError, match="3 images but text features of shape"):
            reward.score(images, wrong)


@pytest.mark.parametrize("kind", ["clip", "pickscore"])
def test_text_features_of_another_reward_are_rejected(configs, images, kind):
    with pytest.raises(RewardError, match="text features are 5 wide instead of 12"):
        load_reward(kind, configs[kind]).score(images, torch.zeros(3, 5))


def test_prompts_must_be_a_list_of_strings(reward):
    with pytest.raises(RewardError, match="got one string: 'a red circle'"):
        reward.text_features("a red circle")
    with pytest.raises(RewardError, match="got no prompts"):
        reward.text_features([])


def test_any_unicode_prompt_is_encoded(reward):
    prompts = ["", "赤い円", "\U0001f534", "e\u0301\u202e\x00", " \n\t"]
    features = reward.text_features(prompts)
    assert len(features) == len(prompts) and features.isfinite().all()
    assert 0 <= reward.truncated(prompts) <= len(prompts)


def test_loading_prints_nothing_and_does_not_configure_logging(configs, monkeypatch, capfd):
    monkeypatch.setattr(logging.root, "handlers", [])  # with pytest's handler the libraries would not add theirs
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, config in configs.items():
            load_reward(name, config).truncated(["red " * 50])
    assert capfd.readouterr() == ("", "")
    assert not logging.root.handlers and not logging.root.manager.disable


def test_loading_restores_logging_after_an_error(tmp_path):
    level = logging.root.manager.disable
    with pytest.raises(Exception, match="does not exist"):
        load_reward("clip", RewardConfig(kind="clip", path="no/where"))
    assert logging.root.manager.disable == level
