"""What every reward promises, and the cosine rewards that most of them are."""

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

    Built as `Kind(name, config, dtype)` on the CPU; `load_reward` freezes it and moves it to its device.
    A third party subclasses this and names its class in the profile (`kind: package.module:Class`)
    or in an entry point of the group `textcraftor.rewards`.

    name: what the profile calls it.  version: scores of two versions are not comparable; a class states
    its own as `default_version`, and the profile may say otherwise.
    range: (low, high) of the scores, or None where nothing bounds them.
    resolution: pixels of the square that the model sees; 0: the image as drawn.  licence: of the weights.
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
        """What the reward keeps of each prompt: (B, D) float32, no gradient, independent of its neighbours.

        Cacheable: the same prompt always gives the same features. D is 0 for a reward that reads no
        prompt. Raises RewardError once the text tower is dropped, or when `prompts` is no list of strings.
        """

    @abstractmethod
    def image_features(self, images: Tensor) -> Tensor:
        """(B, D) float32, L2-normalised, gradient kept.  images: (B, 3, H, W) float in [0, 1]."""

    @abstractmethod
    def score(self, images: Tensor, text_features: Tensor) -> Tensor:
        """The reward of each image under its own prompt: (B,) float32, differentiable to the images.

        images: (B, 3, H, W) float in [0, 1].  text_features: (B, D), from `text_features`.
        Raises RewardError when the batches or widths do not fit.
        """

    def score_rows(self, images: Tensor, text_features: Tensor, rows: slice) -> Tensor:
        """The scores of some rows of a batch, the same as when all of it is scored at once: (b,), differentiable.

        images: (b, 3, H, W), of those rows.  text_features: (B, D), of the whole batch.
        A reward that holds an image against its neighbours' prompts overrides this, so that batches may be split.
        """
        return self.score(images, text_features[rows])

    def drop_text_tower(self) -> None:
        """Free what only `text_features` needs, once the features of every prompt are cached."""
        return

    def truncated(self, prompts: Sequence[str]) -> int:
        """How many of the prompts are longer than the model reads, and so are judged by their beginning."""
        return 0

    @property
    def device(self) -> torch.device:
        """Where the image tower lives, and features and scores come out."""
        return next(itertools.chain(self.parameters(), self.buffers())).device


class CosineReward(Reward):
    """scale * cos(image, prompt) of a CLIP-like pair of towers.

    Only the diagonal: image i meets prompt i, never prompt j (averaging the whole B x B matrix is a
    fault of the published TextCraftor code).
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
        """(B, D) float32, L2-normalised, no gradient. Longer prompts than the context are cut."""
        prompts = checked_prompts(self.name, prompts)
        with torch.no_grad():
            return F.normalize(self._encode_text(prompts).float(), dim=-1)

    def image_features(self, images: Tensor) -> Tensor:
        """(B, D) float32, L2-normalised, gradient kept.  images: (B, 3, H, W) float in [0, 1]."""
        return F.normalize(self._encode_image(self.preprocess(images)).float(), dim=-1)

    def score(self, images: Tensor, text_features: Tensor) -> Tensor:
        """scale * cosine of each image with its own prompt: (B,), differentiable to the images."""
        check_batch(self.name, images, text_features)
        features = self.image_features(images)
        if features.shape != text_features.shape:
            raise RewardError(
                f"Reward {self.name!r}: text features are {text_features.shape[1]} wide, image features "
                f"{features.shape[1]}. They are another reward's; compute them with this one's text_features"
            )
        return self.scale * (features * text_features.to(features)).sum(dim=-1)

    @abstractmethod
    def _encode_image(self, pixels: Tensor) -> Tensor:
        """The image tower's projection (B, D) of preprocessed pixels (B, 3, size, size)."""

    @abstractmethod
    def _encode_text(self, prompts: list[str]) -> Tensor:
        """The text tower's projection (B, D)."""


def checked_prompts(name: str, prompts: Sequence[str]) -> list[str]:
    """The prompts as a list. Raises RewardError for a bare string or none at all."""
    if isinstance(prompts, str):
        raise RewardError(f"Reward {name!r}: prompts must be a list of strings, got one string: {prompts!r}")
    if not prompts:
        raise RewardError(f"Reward {name!r}: got no prompts; at least one is needed")
    return list(prompts)


def check_batch(name: str, images: Tensor, text_features: Tensor) -> None:
    """Raises RewardError unless there is one row of text features for each image."""
    if text_features.ndim != 2 or len(text_features) != len(images):
        raise RewardError(
            f"Reward {name!r}: {len(images)} images but text features of shape {tuple(text_features.shape)}; "
            "one row for each image is needed"
        )


def dropped(name: str) -> RewardError:
    """The error of asking for text features after `drop_text_tower`."""
    return RewardError(f"Reward {name!r}: its text tower was dropped. Compute text features before that")
