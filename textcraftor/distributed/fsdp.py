"""A UNet split over the processes (FSDP2): each holds its part of every tensor, and the rest only while a block computes.

Before a block runs, forward or backward, its tensors are gathered, and dropped after it; a trained block's gradient is
averaged over the processes and split in the same breath. So what is split must be called by every process alike, as
often and in the same order: `Trainer` sees to that.
"""

import copy
from collections.abc import Mapping
from typing import cast

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from textcraftor.config import TuneConfig
from textcraftor.distributed import data_parallel

BLOCKS = (ResnetBlock2D, BasicTransformerBlock)


def wanted(tune: TuneConfig) -> bool:
    """Whether the settings ask for it and there are processes to share with."""
    return tune.shard and data_parallel.processes() > 1


def shard(unet: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Split a UNet in place: block by block, and what stands between the blocks as one more.

    dtype: what it computes in. Weights of a higher precision stay so, and are rounded as they are gathered; their
    gradients are averaged in their own.
    """
    mesh = init_device_mesh(device.type, (data_parallel.processes(),))
    own = next(unet.parameters()).dtype
    # The inputs are in `dtype` already, but for times and sizes, which bfloat16 would round.
    precision = MixedPrecisionPolicy(param_dtype=None if own == dtype else dtype, reduce_dtype=own, cast_forward_inputs=False)
    for module in [module for module in unet.modules() if isinstance(module, BLOCKS)] + [unet]:
        # The root's too: kept, they would be stale after the optimiser or the moving average has moved them.
        fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=precision)


def is_split(what: nn.Module | Tensor) -> bool:
    """Of a module: whether `shard` was applied to it. Of a tensor: whether this process holds a part of it only."""
    return isinstance(what, FSDPModule | DTensor)


def whole(tensor: Tensor) -> Tensor:
    """The tensor, gathered where it is split; every process must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of the first process: all of them, whole, on the CPU. Of the others, which must ask too: nothing."""
    kept = dict[str, Tensor]()
    for name, tensor in tensors.items():  # one at a time: no process holds two whole ones
        full = whole(tensor.detach())
        if data_parallel.rank() == 0:
            kept[name] = full.cpu()
    return kept


def like(tensor: Tensor, target: Tensor) -> Tensor:
    """A whole tensor, which every process has, split as `target` is."""
    if not isinstance(target, DTensor):
        return tensor
    tensor = tensor.to(target.device, target.dtype)
    return distribute_tensor(tensor, target.device_mesh, target.placements, src_data_rank=None)


def hollow(module: nn.Module) -> nn.Module:
    """A copy without weights of a module that is yet to be split: what `filled` puts them back into."""
    empty = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in module.parameters()}
    return copy.deepcopy(module, cast(dict[int, object], empty))


def filled(module: nn.Module, shell: nn.Module) -> nn.Module:
    """The module whole again, on the CPU of the first process; every process must ask. One never split: itself."""
    if not is_split(module):
        return module
    weights = gathered(module.state_dict())
    if data_parallel.rank() == 0:
        shell.load_state_dict(weights, assign=True)
    return shell
