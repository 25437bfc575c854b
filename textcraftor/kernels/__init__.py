"""Modules that are not trained: the same numbers, with less kept for the way back and, on a CPU, more quickly.

torch keeps for autograd what a frozen weight would need for its own gradient, and what could be computed again cheaply.
`economise` puts our kinds of layers and blocks in place of a module's own; the whole of a residual block, a transformer
or a tower's layer is one node of the graph then. Weights, their names and `isinstance` stay.

A layer or block works as the library's own wherever no gradient is carried (so that a prefix has the same bits, cached
or not) or autocast rounds, where any of its weights is trained, and where it has parts that ours does not know.
"""

from torch import nn

from textcraftor.kernels.layers import FrozenConv2d, FrozenGEGLU, FrozenLinear
from textcraftor.kernels.operators import derived_bytes
from textcraftor.kernels.resnet import FrozenResnetBlock2D
from textcraftor.kernels.tower import FrozenCLIPEncoderLayer, FrozenResidualAttentionBlock
from textcraftor.kernels.transformer import FrozenTransformer2DModel
from textcraftor.kernels.upsample import FrozenUpsample2D

__all__ = ["derived_bytes", "economise"]

KINDS = (
    FrozenLinear,
    FrozenConv2d,
    FrozenGEGLU,
    FrozenResnetBlock2D,
    FrozenUpsample2D,
    FrozenTransformer2DModel,
    FrozenResidualAttentionBlock,
    FrozenCLIPEncoderLayer,
)
OWN: dict[type, type] = {kind.__mro__[1]: kind for kind in KINDS}


def economise(module: nn.Module) -> None:
    """Put our kinds of layers and blocks in place of a frozen module's own, below it and itself."""
    for layer in module.modules():
        if (own := OWN.get(type(layer))) is not None:
            layer.__class__ = own
