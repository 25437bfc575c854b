"""Reward models: one file a reward, the mix that weighs them, the loader that finds them.

A reward scores images against prompts; higher is better. The prompt's side never sees a gradient,
is computed once and cached; the image's side is differentiable.
"""

from textcraftor.rewards.base import Reward
from textcraftor.rewards.load import KINDS, load_reward, load_rewards
from textcraftor.rewards.mix import RewardMix

__all__ = ["KINDS", "Reward", "RewardMix", "load_reward", "load_rewards"]
