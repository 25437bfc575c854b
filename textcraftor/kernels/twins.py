"""The two halves of guidance hear the same latents, so all before the first attention to the prompt is computed once for both.

A tensor whose halves are one remembers that half. A layer that knows of it works on the half alone, and so does the way
back: the gradients of both halves are added before they go on, which is what they would come to further down.
"""

from typing import cast

import torch
from torch import Tensor


def twins(half: Tensor) -> Tensor:
    """The tensor twice along its batch, (2B, ...). Gradient reaches `half` from those who use the whole and the half."""
    whole = torch.cat([half, half])
    whole.__dict__["_half"] = half
    return whole


def shared_half(whole: Tensor) -> Tensor:
    """The half that both halves are, (B, ...); the tensor itself where that is not known."""
    return whole if torch.compiler.is_compiling() else cast(Tensor, whole.__dict__.get("_half", whole))


def summed(whole: Tensor, size: int) -> Tensor:
    """The parts of `size` rows added up: a gradient to what was repeated."""
    first, *others = whole.split(size)
    for other in others:
        first = first + other
    return first
