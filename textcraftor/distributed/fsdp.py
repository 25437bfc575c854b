"""A UNet sharded over the ranks (FSDP2): each rank holds its shard of every tensor, and whole tensors only briefly.

The tensors of a block are gathered before its forward or backward pass and freed after it. The gradient of a trained
block is averaged over the ranks and sharded in the same operation. Every rank must therefore call a sharded module
equally often and in the same order; `Trainer` takes care of that.
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


def should_shard(tune: TuneConfig) -> bool:
    """Whether the settings ask for sharding and there is more than one rank."""
    return tune.shard and data_parallel.world_size() > 1


def shard(unet: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Shard a UNet in place, block by block; the layers outside the blocks form one more unit.

    dtype: what it computes in. Weights of a higher precision keep it and are rounded as they are gathered; their
    gradients are averaged in the weights' precision.
    """
    mesh = init_device_mesh(device.type, (data_parallel.world_size(),))
    weight_dtype = next(unet.parameters()).dtype
    # The inputs are in `dtype` already, except times and sizes, which bfloat16 would round.
    precision = MixedPrecisionPolicy(
        param_dtype=None if weight_dtype == dtype else dtype, reduce_dtype=weight_dtype, cast_forward_inputs=False
    )
    for module in [module for module in unet.modules() if isinstance(module, BLOCKS)] + [unet]:
        # The root is resharded too: kept gathered, it would be stale after the optimiser or the moving average wrote to it.
        fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=precision)


def is_sharded(what: nn.Module | Tensor) -> bool:
    """Whether `shard` was applied to a module, or this rank holds only its shard of a tensor."""
    return isinstance(what, FSDPModule | DTensor)


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole tensor, gathered if it is sharded. Collective: every rank must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather_on_rank0(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The whole tensors on the CPU of rank 0, an empty dict on the other ranks. Collective: every rank must call it."""
    gathered = dict[str, Tensor]()
    for name, tensor in tensors.items():  # one at a time: no rank holds two whole tensors
        full = full_tensor(tensor.detach())
        if data_parallel.rank() == 0:
            gathered[name] = full.cpu()
    return gathered


def shard_like(tensor: Tensor, target: Tensor) -> Tensor:
    """This rank's shard of a whole tensor, laid out as `target` is. Every rank has the whole tensor: no communication."""
    if not isinstance(target, DTensor):
        return tensor
    tensor = tensor.to(target.device, target.dtype)
    return distribute_tensor(tensor, target.device_mesh, target.placements, src_data_rank=None)


def meta_copy(module: nn.Module) -> nn.Module:
    """A copy on the meta device, made before a module is sharded. `unshard` loads the gathered weights into it."""
    empty = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in module.parameters()}
    return copy.deepcopy(module, cast(dict[int, object], empty))


def unshard(module: nn.Module, meta: nn.Module) -> nn.Module:
    """The whole module on the CPU of rank 0. Collective. A module that is not sharded is returned as it is.

    meta: what `meta_copy` made of it.
    """
    if not is_sharded(module):
        return module
    weights = gather_on_rank0(module.state_dict())
    if data_parallel.rank() == 0:
        meta.load_state_dict(weights, assign=True)
    return meta
