"""Reward models: one module for each, `RewardMix` for their weighted sum, `load_reward` to load them.

A reward scores images given their prompts; higher is better. Text features are computed once, without gradient, and
cached; the score is differentiable with respect to the images.
"""

from textcraftor.rewards.base import Reward
from textcraftor.rewards.load import KINDS, load_reward, load_rewards
from textcraftor.rewards.mix import RewardMix

__all__ = ["KINDS", "Reward", "RewardMix", "load_reward", "load_rewards"]
