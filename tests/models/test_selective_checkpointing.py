"""Selective checkpointing: the library's outputs and gradients bit for bit, from fewer saved activations."""

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from tests.families import new_unet, new_vae
from textcraftor.models.selective_checkpointing import disable_selective_checkpointing, enable_selective_checkpointing

IMAGES, TEMB, PROMPTS = (3, 16, 4, 6), (3, 8), (3, 7, 12)


def transformer(**more: Any) -> Transformer2DModel:
    return Transformer2DModel(2, 8, 16, norm_num_groups=4, cross_attention_dim=12, **more)


def resnet(**more: Any) -> ResnetBlock2D:
    return ResnetBlock2D(in_channels=16, groups=4, **{"temb_channels": 8, **more})


BLOCKS: dict[str, tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...]]] = {
    "UNet resnet": (resnet, (IMAGES, TEMB)),
    "UNet resnet with a shortcut": (lambda: resnet(out_channels=24, output_scale_factor=2.0), (IMAGES, TEMB)),
    "VAE resnet": (lambda: resnet(temb_channels=None, time_embedding_norm="group"), (IMAGES,)),
    "upsampler": (lambda: Upsample2D(16, use_conv=True, out_channels=24), (IMAGES,)),
    "transformer": (transformer, (IMAGES, PROMPTS)),
    "two transformer blocks": (lambda: transformer(num_layers=2, use_linear_projection=True), (IMAGES, PROMPTS)),
}
UNSUPPORTED = {
    "resnet with scale and shift": (lambda: resnet(temb_channels=16, time_embedding_norm="scale_shift"), (IMAGES, (3, 16))),
    "resnet that upsamples": (lambda: resnet(up=True), (IMAGES, TEMB)),
    "resnet that downsamples": (lambda: resnet(down=True), (IMAGES, TEMB)),
    "resnet without SiLU of the timestep": (lambda: resnet(skip_time_act=True), (IMAGES, TEMB)),
    "transformer that attends to prompts only": (lambda: transformer(only_cross_attention=True), (IMAGES, PROMPTS)),
    "transformer without prompts": (lambda: Transformer2DModel(2, 8, 16, norm_num_groups=4), (IMAGES,)),
}
ALL = {**BLOCKS, **UNSUPPORTED}


def blocks(name: str) -> tuple[nn.Module, nn.Module, list[Tensor]]:
    """The library's block, frozen; a copy with selective checkpointing; and inputs."""
    make, shapes = ALL[name]
    torch.manual_seed(0)
    plain = make().eval().requires_grad_(False)
    for parameter in plain.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))  # norms are the identity and biases zero in a new block
    checkpointed = copy.deepcopy(plain)
    enable_selective_checkpointing(checkpointed)
    return plain, checkpointed, [torch.randn(shape) for shape in shapes]


def call(block: nn.Module, inputs: list[Tensor], **options: Any) -> Tensor:
    if isinstance(block, ResnetBlock2D) and len(inputs) == 1:
        return block(inputs[0], None)
    output = block(*inputs, **options)
    return output if isinstance(output, Tensor) else output.sample


def output_and_gradients(block: nn.Module, inputs: list[Tensor], **options: Any) -> list[Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    output = call(block, leaves, **options)
    weights = torch.linspace(-1, 1, output.numel()).view_as(output)
    return [output.detach(), *torch.autograd.grad((output * weights).sum(), leaves)]


def saved_bytes(block: nn.Module, inputs: list[Tensor]) -> int:
    """Bytes of the tensors saved for the backward pass, without weights. Hooks of checkpoint hide what it recomputes."""
    weights = {parameter.data_ptr() for parameter in block.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in weights:
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call(block, leaves)
    return sum(found.values())


class CountOperators(TorchDispatchMode):
    """Counts calls by operator."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.name()] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ALL)
def test_same_bits_forward_and_backward(name: str) -> None:
    plain, checkpointed, inputs = blocks(name)
    for theirs, ours in zip(output_and_gradients(plain, inputs), output_and_gradients(checkpointed, inputs), strict=True):
        assert torch.equal(ours, theirs)
    with torch.no_grad():
        assert torch.equal(call(checkpointed, inputs), call(plain, inputs))


@pytest.mark.parametrize("name", ["UNet resnet", "two transformer blocks"])
def test_same_bits_under_autocast(name: str) -> None:
    plain, checkpointed, inputs = blocks(name)
    with torch.autocast("cpu", torch.bfloat16):
        theirs, ours = output_and_gradients(plain, inputs), output_and_gradients(checkpointed, inputs)
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", BLOCKS)
def test_trained_weights_get_the_same_gradient(name: str) -> None:
    plain, checkpointed, inputs = blocks(name)
    for block in (plain, checkpointed):
        block.requires_grad_(True)
        call(block, inputs).square().sum().backward()
    for theirs, ours in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None and torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("name", BLOCKS)
def test_at_most_half_of_the_bytes_are_saved(name: str) -> None:
    plain, checkpointed, inputs = blocks(name)
    assert 0 < saved_bytes(checkpointed, inputs) <= saved_bytes(plain, inputs) / 2


@pytest.mark.parametrize("name", ["UNet resnet", "UNet resnet with a shortcut", "VAE resnet", "upsampler"])
def test_no_convolution_runs_twice(name: str) -> None:
    plain, checkpointed, inputs = blocks(name)
    counts = []
    for block in (plain, checkpointed):
        with CountOperators() as counted:
            output_and_gradients(block, inputs)
        counts.append(counted.calls["aten::convolution"])
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("argument", ["attention_mask", "encoder_attention_mask"])
def test_masks_reach_the_attention(argument: str) -> None:
    plain, checkpointed, inputs = blocks("transformer")
    mask = torch.zeros(3, 24 if argument == "attention_mask" else 7)
    mask[:, :2] = -10000.0
    masked = [output_and_gradients(block, inputs, **{argument: mask})[0] for block in (plain, checkpointed)]
    assert torch.equal(*masked)
    assert not torch.allclose(masked[1], call(checkpointed, inputs), atol=1e-3)


@pytest.mark.parametrize("name", BLOCKS)
def test_same_gradient_inside_full_checkpointing(name: str) -> None:
    _, checkpointed, inputs = blocks(name)
    results = []
    for nested in (False, True):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        output = (
            checkpoint(lambda *leaves: call(checkpointed, list(leaves)), *leaves, use_reentrant=False)
            if nested
            else call(checkpointed, leaves)
        )
        results.append(torch.autograd.grad(output.square().sum(), leaves))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_disabling_gives_the_modules_their_own_forward_back() -> None:
    plain, checkpointed, inputs = blocks("UNet resnet")
    disable_selective_checkpointing(checkpointed)
    assert "forward" not in vars(checkpointed)
    assert saved_bytes(checkpointed, inputs) == saved_bytes(plain, inputs)


def test_a_copy_computes_with_its_own_weights() -> None:
    _, checkpointed, inputs = blocks("UNet resnet")
    other = copy.deepcopy(checkpointed)
    for parameter in other.parameters():
        parameter.mul_(2)
    inputs[0].requires_grad_()
    assert not torch.allclose(call(other, inputs), call(checkpointed, inputs), atol=1e-3)


def test_dropout_of_a_training_block_is_the_same_in_the_backward_pass() -> None:
    plain, checkpointed, inputs = blocks("UNet resnet")
    results = []
    for block in (plain, checkpointed):
        block.train()
        block.get_submodule("dropout").p = 0.5  # type: ignore[assignment]
        torch.manual_seed(1)
        results.append(output_and_gradients(block, inputs))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("projection", [False, True], ids=["SD 1.x", "SD 2.x"])
def test_a_unet_and_a_decoder_save_less_than_half(projection: bool) -> None:
    torch.manual_seed(0)
    unet, vae = new_unet(12, use_linear_projection=projection).eval(), new_vae(norm_num_groups=4).eval()
    latents, prompts = torch.randn(2, 4, 4, 4), torch.randn(2, 5, 12)

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unet, self.vae = unet, vae

        def forward(self, latents: Tensor, prompts: Tensor) -> Tensor:
            return vae.decode(unet(latents, 500, encoder_hidden_states=prompts).sample).sample

    both = Both().requires_grad_(False)
    names = list(both.state_dict())
    before, bytes_before = output_and_gradients(both, [latents, prompts]), saved_bytes(both, [latents, prompts])
    enable_selective_checkpointing(both)
    after, bytes_after = output_and_gradients(both, [latents, prompts]), saved_bytes(both, [latents, prompts])
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert 0 < bytes_after < bytes_before / 2
    assert list(both.state_dict()) == names
