"""What the UNet hears of the prompts: text embeddings, and what a family adds to them."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """Both halves of guidance in one batch: the empty prompt B times, then the B prompts (diffusers' order).

    prompt_embeds: (2B, L, D).  pooled: (2B, P) and time_ids: (2B, 6) for SDXL, None for SD 1.x and 2.x.
    """

    prompt_embeds: Tensor
    pooled: Tensor | None = None
    time_ids: Tensor | None = None

    @property
    def unet_inputs(self) -> dict[str, Any]:
        """Keyword arguments of a diffusers UNet."""
        added = None if self.pooled is None else {"text_embeds": self.pooled, "time_ids": self.time_ids}
        return {"encoder_hidden_states": self.prompt_embeds, "added_cond_kwargs": added}

    def to(self, dtype: torch.dtype) -> "Conditioning":
        """The same in another precision; time_ids are sizes in pixels and stay as they are."""
        pooled = None if self.pooled is None else self.pooled.to(dtype)
        return Conditioning(self.prompt_embeds.to(dtype), pooled, self.time_ids)

    def cut(self) -> "Conditioning":
        """The same numbers as leaves that collect gradient where the graph behind them wants any."""
        pooled = None if self.pooled is None else _leaf(self.pooled)
        return Conditioning(_leaf(self.prompt_embeds), pooled, self.time_ids)

    def backward(self, cut: "Conditioning") -> None:
        """Send what the leaves of `cut` have collected back through this one's graph."""
        pairs = [(self.prompt_embeds, cut.prompt_embeds), (self.pooled, cut.pooled)]
        collected = [
            (ours, leaf.grad) for ours, leaf in pairs if ours is not None and leaf is not None and leaf.grad is not None
        ]
        if collected:
            torch.autograd.backward([ours for ours, _ in collected], [gradient for _, gradient in collected])


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.requires_grad)
