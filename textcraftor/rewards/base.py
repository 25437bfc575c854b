"""The interface of every reward, and base classes for rewards that ignore the prompt or compare embeddings."""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from textcraftor.config import RewardConfig
from textcraftor.errors import RewardError
from textcraftor.rewards.preprocess import Preprocess


class Reward(nn.Module, ABC):
    """A frozen model that scores images; higher is better.

    Constructed as `Kind(name, config, dtype)` on the CPU; `load_reward` freezes it and moves it to its device.
    Third parties subclass it and name their class in the profile (`kind: package.module:Class`) or in an entry point of
    the group `textcraftor.rewards`.

    name: its name in the profile.  version: scores of different versions are not comparable; the profile's version, or
    the class's `default_version`.  range: (low, high) of the scores, None if unbounded.
    resolution: side of the model's square input in pixels; 0 if images are not resized.  licence: of the weights.
    dtype: of the towers; scores are float32.
    """

    default_version = ""
    range: tuple[float, float] | None = None
    resolution: int

    def __init__(self, name: str, config: RewardConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.name = name
        self.version = config.version or self.default_version
        self.licence = config.licence
        self.dtype = dtype

    @abstractmethod
    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """The prompts as cacheable features: (B, D) float32, no gradient.

        A row depends on its own prompt only, not on the batch.  D is 0 for a reward that ignores the prompt.
        Raises RewardError after `drop_text_tower`, or if `prompts` is a string or empty.
        """

    @abstractmethod
    def image_features(self, images: Tensor) -> Tensor:
        """(B, D) float32, L2-normalised, gradient kept.  images: (B, 3, H, W) float in [0, 1]."""

    @abstractmethod
    def score(self, images: Tensor, text_features: Tensor) -> Tensor:
        """The reward of each image given its own prompt: (B,) float32, differentiable with respect to the images.

        images: (B, 3, H, W) float in [0, 1].  text_features: (B, D), from `text_features`.
        Raises RewardError if batch sizes or widths differ.
        """

    def score_rows(self, images: Tensor, text_features: Tensor, rows: slice) -> Tensor:
        """Scores of some rows of a batch, equal to those rows of the batch's scores: (b,), differentiable.

        images: (b, 3, H, W), of these rows.  text_features: (B, D), of the whole batch.
        A reward that compares an image with the batch's other prompts overrides this, so that batches can be split.
        """
        return self.score(images, text_features[rows])

    def drop_text_tower(self) -> None:
        """Free the modules that only `text_features` needs, once all features are cached."""
        return

    def truncated(self, prompts: Sequence[str]) -> int:
        """Number of prompts longer than the model's context, of which only the beginning counts."""
        return 0

    @property
    def device(self) -> torch.device:
        """Device of the image tower, of features and of scores."""
        return next(itertools.chain(self.parameters(), self.buffers())).device


class PromptFreeReward(Reward):
    """A reward that ignores the prompt: its text features have width 0."""

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """(B, 0) float32."""
        return torch.empty(len(validate_prompts(self.name, prompts)), 0, device=self.device)


class CosineReward(Reward):
    """scale * cos(image, prompt) under a CLIP-like image and text tower.

    Image i is scored with prompt i only. The published TextCraftor code averages the whole B x B matrix instead.
    """

    def __init__(
        self,
        name: str,
        config: RewardConfig,
        dtype: torch.dtype,
        preprocess: Preprocess,
        scale: float = 1.0,
    ) -> None:
        super().__init__(name, config, dtype)
        self.preprocess = preprocess
        self.resolution = preprocess.size
        self.scale = scale
        self.range = (-scale, scale)

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """(B, D) float32, L2-normalised, no gradient.  Prompts are truncated to the context length."""
        prompts = validate_prompts(self.name, prompts)
        with torch.no_grad():
            return F.normalize(self._encode_text(prompts).float(), dim=-1)

    def image_features(self, images: Tensor) -> Tensor:
        """(B, D) float32, L2-normalised, gradient kept.  images: (B, 3, H, W) float in [0, 1]."""
        return F.normalize(self._encode_image(self.preprocess(images)).float(), dim=-1)

    def score(self, images: Tensor, text_features: Tensor) -> Tensor:
        """scale * cosine of each image with its own prompt: (B,), differentiable with respect to the images."""
        check_batch(self.name, images, text_features)
        features = self.image_features(images)
        check_width(self.name, text_features, features.shape[1])
        return self.scale * (features * text_features.to(features)).sum(dim=-1)

    @abstractmethod
    def _encode_image(self, pixels: Tensor) -> Tensor:
        """Projected image embeddings (B, D).  pixels: (B, 3, size, size), preprocessed."""

    @abstractmethod
    def _encode_text(self, prompts: list[str]) -> Tensor:
        """Projected text embeddings (B, D)."""


def validate_prompts(name: str, prompts: Sequence[str]) -> list[str]:
    """The prompts as a list.  Raises RewardError for a single string or an empty list."""
    if isinstance(prompts, str):
        raise RewardError(f"Reward {name!r}: prompts must be a list of strings, got one string: {prompts!r}")
    if not prompts:
        raise RewardError(f"Reward {name!r}: got no prompts; at least one is needed")
    return list(prompts)


def check_batch(name: str, images: Tensor, text_features: Tensor) -> None:
    """Raises RewardError unless `text_features` is 2-D with one row for each image."""
    if text_features.ndim != 2 or len(text_features) != len(images):
        raise RewardError(
            f"Reward {name!r}: {len(images)} images but text features of shape {tuple(text_features.shape)}; "
            "one row for each image is needed"
        )


def check_width(name: str, text_features: Tensor, width: int) -> None:
    """Raises RewardError unless `text_features` is (B, width)."""
    if text_features.shape[1] != width:
        raise RewardError(
            f"Reward {name!r}: text features are {text_features.shape[1]} wide instead of {width}. "
            "They are another reward's; compute them with this one's text_features"
        )


def text_tower_dropped(name: str) -> RewardError:
    """The error for text features requested after `drop_text_tower`."""
    return RewardError(f"Reward {name!r}: its text tower was dropped. Compute text features before that")
