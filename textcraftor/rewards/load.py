"""Loads the rewards that a profile names: built-in kinds, entry points, or any importable class."""

import importlib
from collections.abc import Iterable, Mapping
from importlib.metadata import entry_points

import torch

from textcraftor.config import RewardConfig
from textcraftor.errors import RewardError, unknown
from textcraftor.rewards.base import Reward

GROUP = "textcraftor.rewards"

# Dotted paths, so that a model library is imported only when a reward needs it.
KINDS = {
    "aesthetic": "textcraftor.rewards.aesthetic:Aesthetic",
    "clip": "textcraftor.rewards.clip:Clip",
    "contrast": "textcraftor.rewards.contrast:Contrast",
    "detail": "textcraftor.rewards.detail:Detail",
    "diversity": "textcraftor.rewards.diversity:Diversity",
    "hpsv2": "textcraftor.rewards.hpsv2:HPSv2",
    "imagereward": "textcraftor.rewards.imagereward:ImageReward",
    "pickscore": "textcraftor.rewards.pickscore:PickScore",
    "vae": "textcraftor.rewards.autoencoder:Autoencoder",
}


def load_reward(name: str, config: RewardConfig, device: torch.device | str = "cpu", dtype: str | None = None) -> Reward:
    """The reward `name`, frozen, in eval mode, on `device`.

    dtype: of its towers, a name such as "bfloat16"; by default config.dtype, else float32.
    Raises RewardError for an unknown kind, ModelError for weights that are missing or do not fit.
    """
    reward = _class_of(config.kind)(name, config, getattr(torch, dtype or config.dtype or "float32"))
    return reward.requires_grad_(False).eval().to(device)


def load_rewards(
    configs: Mapping[str, RewardConfig],
    names: Iterable[str],
    device: torch.device | str = "cpu",
    dtype: str | None = None,
) -> dict[str, Reward]:
    """The named rewards, each loaded once.

    Raises RewardError for a name that `configs` lacks, before any is loaded.
    """
    unique = list(dict.fromkeys(names))
    for name in unique:
        if name not in configs:
            raise RewardError(unknown("reward", name, configs))
    return {name: load_reward(name, configs[name], device, dtype) for name in unique}


def _class_of(kind: str) -> type[Reward]:
    """The class of a kind: one of KINDS, the name of an entry point, or "package.module:Class"."""
    plugins = {point.name: point.value for point in entry_points(group=GROUP)}
    path = KINDS.get(kind) or plugins.get(kind) or kind
    module, colon, attribute = path.partition(":")
    if not colon:
        message = unknown("reward kind", kind, {*KINDS, *plugins})
        raise RewardError(f"{message} Or name a class: package.module:Class")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise RewardError(f"Reward kind {kind!r}: cannot import {path}: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Reward)):
        raise RewardError(f"Reward kind {kind!r}: {path} is not a subclass of textcraftor.rewards.Reward")
    return found
