"""Conditioning inputs of the UNet: text embeddings, and the additional inputs of SDXL."""

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
        """Convert the embeddings to another dtype. time_ids are sizes in pixels and keep theirs."""
        pooled = None if self.pooled is None else self.pooled.to(dtype)
        return Conditioning(self.prompt_embeds.to(dtype), pooled, self.time_ids)

    def detach(self) -> "Conditioning":
        """Detached copies of the tensors: leaves that accumulate a gradient where the originals require one."""
        pooled = None if self.pooled is None else _leaf(self.pooled)
        return Conditioning(_leaf(self.prompt_embeds), pooled, self.time_ids)

    def clip_gradients(self, max_norm: float) -> None:
        """Scale each prompt's gradient, over all tensors and both halves of guidance, down to a norm of `max_norm`."""
        gradients = [
            tensor.grad for tensor in (self.prompt_embeds, self.pooled) if tensor is not None and tensor.grad is not None
        ]
        if gradients:
            of_rows = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients]).norm(dim=0)
            of_prompts = torch.stack(of_rows.chunk(2)).norm(dim=0)
            scale = (max_norm / of_prompts.clamp(min=max_norm)).repeat(2)
            for gradient in gradients:
                gradient *= scale.view(-1, *[1] * (gradient.dim() - 1))

    def backward(self, leaves: "Conditioning") -> None:
        """Backpropagate the gradients accumulated in `leaves`, which came from `detach`, through this graph."""
        pairs = [(self.prompt_embeds, leaves.prompt_embeds), (self.pooled, leaves.pooled)]
        collected = [
            (ours, leaf.grad) for ours, leaf in pairs if ours is not None and leaf is not None and leaf.grad is not None
        ]
        if collected:
            torch.autograd.backward([ours for ours, _ in collected], [gradient for _, gradient in collected])


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.requires_grad)
