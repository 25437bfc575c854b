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
