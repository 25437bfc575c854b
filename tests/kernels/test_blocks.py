"""Whole blocks as one node of the graph: the library's numbers and gradients, less kept, the library's own where it must be."""

import copy
from collections.abc import Callable
from typing import Any

import open_clip.transformer as openclip
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from tests.families import new_unet, new_vae
from tests.kernels.test_layers import kept, multiplies_with
from textcraftor.kernels import economise, operators
from textcraftor.kernels.resnet import FrozenResnetBlock2D
from textcraftor.kernels.tower import FrozenCLIPEncoderLayer, FrozenResidualAttentionBlock
from textcraftor.kernels.transformer import FrozenTransformer2DModel
from textcraftor.kernels.twins import twins
from textcraftor.kernels.upsample import FrozenUpsample2D

__all__ = ["multiplies_with"]  # the fixture


def transformer(**more: Any) -> Transformer2DModel:
    return Transformer2DModel(2, 8, 16, norm_num_groups=4, cross_attention_dim=12, **more)


def vision(act: str) -> CLIPVisionConfig:
    return CLIPVisionConfig(hidden_size=16, intermediate_size=32, num_attention_heads=2, hidden_act=act)


IMAGES, TOKENS = (3, 16, 4, 6), (3, 5, 16)
BLOCKS: dict[str, tuple[type, Callable[[], nn.Module], tuple[tuple[int, ...], ...]]] = {
    "residual": (FrozenResnetBlock2D, lambda: ResnetBlock2D(in_channels=16, temb_channels=None, groups=4), (IMAGES,)),
    "residual, wider": (
        FrozenResnetBlock2D,
        lambda: ResnetBlock2D(in_channels=16, out_channels=24, temb_channels=None, groups=4, output_scale_factor=2.0),
        (IMAGES,),
    ),
    "upsampled": (FrozenUpsample2D, lambda: Upsample2D(16, use_conv=True, out_channels=24), (IMAGES,)),
    "transformer": (FrozenTransformer2DModel, transformer, (IMAGES, (3, 7, 12))),
    "transformer of two blocks, linear": (
        FrozenTransformer2DModel,
        lambda: transformer(num_layers=2, use_linear_projection=True),
        (IMAGES, (3, 7, 12)),
    ),
    "open_clip": (FrozenResidualAttentionBlock, lambda: openclip.ResidualAttentionBlock(16, 2), (TOKENS,)),
    "open_clip, quick": (
        FrozenResidualAttentionBlock,
        lambda: openclip.ResidualAttentionBlock(16, 2, act_layer=openclip.QuickGELU),
        (TOKENS,),
    ),
    "CLIP": (FrozenCLIPEncoderLayer, lambda: CLIPEncoderLayer(vision("gelu")), (TOKENS,)),
    "CLIP, quick": (FrozenCLIPEncoderLayer, lambda: CLIPEncoderLayer(vision("quick_gelu")), (TOKENS,)),
}


def blocks(name: str) -> tuple[nn.Module, nn.Module, list[Tensor]]:
    kind, make, shapes = BLOCKS[name]
    torch.manual_seed(0)
    plain = make().eval().requires_grad_(False)
    for parameter in plain.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))  # norms are the identity and biases zero in a new block
    frozen = copy.deepcopy(plain)
    economise(frozen)
    assert type(frozen) is kind and isinstance(frozen, type(plain))
    return plain, frozen, [torch.randn(shape) for shape in shapes]


def call(block: nn.Module, given: list[Tensor]) -> Tensor:
    if isinstance(block, ResnetBlock2D):
        return block(given[0], None)
    if isinstance(block, CLIPEncoderLayer):
        return block(given[0], None)
    out = block(*given)
    return out if isinstance(out, Tensor) else out.sample


def forward_and_back(block: nn.Module, given: list[Tensor]) -> list[Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in given]
    made = call(block, leaves)
    weights = torch.linspace(-1, 1, made.numel()).view_as(made)
    return [made.detach(), *torch.autograd.grad((made * weights).sum(), leaves)]


@pytest.mark.parametrize("name", BLOCKS)
def test_the_same_numbers_and_the_same_gradients_as_one_node(name: str) -> None:
    plain, frozen, given = blocks(name)
    for theirs, ours in zip(forward_and_back(plain, given), forward_and_back(frozen, given), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)
    made = call(frozen, [tensor.clone().requires_grad_() for tensor in given])
    nodes = [node.name() for node, _ in made.grad_fn.next_functions if node is not None]
    assert nodes and all(name in ("torch::autograd::AccumulateGrad", "_LinearBackward") for name in nodes), "a prompt's keys"


@pytest.mark.parametrize("name", BLOCKS)
def test_where_no_gradient_goes_the_bits_are_the_librarys(name: str) -> None:
    plain, frozen, given = blocks(name)
    with torch.no_grad():
        assert torch.equal(call(frozen, given), call(plain, given))


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_with_one_weight_that_is_trained_gives_it_the_librarys_gradient(name: str) -> None:
    plain, frozen, given = blocks(name)
    gradients = []
    for block in (plain, frozen):
        trained = next(parameter for parameter in block.parameters() if parameter.ndim > 1)
        trained.requires_grad_(True)
        call(block, given).square().sum().backward()
        gradients.append(trained.grad)
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", BLOCKS)
def test_in_double_precision_a_block_is_the_librarys(name: str) -> None:
    plain, frozen, given = blocks(name)
    doubles = [tensor.double() for tensor in given]
    for theirs, ours in zip(forward_and_back(plain.double(), doubles), forward_and_back(frozen.double(), doubles), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", ["residual", "residual, wider", "open_clip, quick"])
def test_less_is_kept(name: str) -> None:
    plain, frozen, (given,) = blocks(name)
    ours, theirs = (kept(Called(block), given) for block in (frozen, plain))
    assert 0 < ours <= 0.8 * theirs


class Called(nn.Module):
    """A block as a function of its first argument."""

    def __init__(self, block: nn.Module, *others: Tensor) -> None:
        super().__init__()
        self.block, self.others = block, others

    def forward(self, given: Tensor) -> Tensor:
        return call(self.block, [given, *self.others])


def test_a_transformer_keeps_a_third() -> None:
    plain, frozen, (images, prompts) = blocks("transformer")
    ours, theirs = (kept(Called(block, prompts), images) for block in (frozen, plain))
    assert 0 < ours <= theirs / 3


def test_without_a_gradient_to_the_images_the_prompts_still_get_theirs() -> None:
    """The first step that carries gradient starts from latents of the cache."""
    plain, frozen, (images, prompts) = blocks("transformer of two blocks, linear")
    gradients = []
    for block in (plain, frozen):
        leaf = prompts.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(call(block, [images, leaf]).square().sum(), leaf)
        gradients.append(gradient)
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


def test_keys_of_a_prompt_are_computed_once_a_chain_and_anew_for_another() -> None:
    plain, frozen, (images, prompts) = blocks("transformer")
    for given in (prompts, prompts + 1, prompts):
        leaf = given.clone().requires_grad_()
        for _ in range(2):
            torch.testing.assert_close(call(frozen, [images, leaf]), call(plain, [images, leaf]), atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        leaf.mul_(2)
        for block in (plain, frozen):
            block.transformer_blocks[0].attn2.to_k.weight.mul_(3)
    torch.testing.assert_close(call(frozen, [images, leaf]), call(plain, [images, leaf]), atol=1e-5, rtol=1e-5)


def test_keys_made_without_a_graph_are_not_those_of_prompts_that_want_a_gradient() -> None:
    _, frozen, (images, prompts) = blocks("transformer")
    call(frozen, [images, prompts])
    call(frozen, [images, prompts.requires_grad_()]).sum().backward()
    assert prompts.grad is not None and prompts.grad.abs().max() > 0


def test_what_a_block_does_not_know_is_the_librarys() -> None:
    plain, frozen, (images, prompts) = blocks("transformer")
    up, own, (small,) = blocks("upsampled")
    for block in (up, own):
        assert block(small.clone().requires_grad_(), output_size=(9, 13)).shape[-2:] == (9, 13)
    mask = torch.zeros(3, 7)
    mask[:, :2] = -10000.0
    ours, theirs = (block(images.requires_grad_(), prompts, encoder_attention_mask=mask).sample for block in (frozen, plain))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    for block in (plain, frozen):
        block.transformer_blocks[0].attn2.set_processor(AttnProcessor())
    assert not frozen._is_plain
    torch.testing.assert_close(call(frozen, [images, prompts]), call(plain, [images, prompts]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", BLOCKS)
def test_what_is_kept_is_saved_by_autograds_rules(name: str) -> None:
    """torch's checkpoints free nothing else."""
    _, frozen, given = blocks(name)
    leaves = [tensor.clone().requires_grad_() for tensor in given]
    of_node = vars(call(frozen, leaves).grad_fn)
    assert len(of_node) == 1 and not isinstance(next(iter(of_node.values())), Tensor | tuple | list), "the block alone"
    checkpointed = checkpoint(lambda *tensors: call(frozen, list(tensors)), *leaves, use_reentrant=False)
    theirs, ours = (torch.autograd.grad(made.sum(), leaves) for made in (call(frozen, leaves), checkpointed))
    for one, other in zip(theirs, ours, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ["open_clip", "CLIP"])
def test_a_masked_layer_of_a_tower_is_the_librarys(name: str) -> None:
    plain, frozen, (tokens,) = blocks(name)
    mask = torch.full((5, 5), float("-inf")).triu(1)
    given = {"attn_mask": mask} if name == "open_clip" else {"attention_mask": mask.expand(3, 1, 5, 5)}
    ours, theirs = (block(tokens.clone().requires_grad_(), **given) for block in (frozen, plain))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(ours, call(frozen, [tokens.clone().requires_grad_()]), atol=1e-3), "a mask matters here"


@pytest.mark.parametrize("projection", [False, True], ids=["SD 1.x", "SD 2.x"])
def test_a_whole_unet_and_a_whole_decoder(projection: bool) -> None:
    torch.manual_seed(0)
    unet, vae = new_unet(12, use_linear_projection=projection).eval(), new_vae(norm_num_groups=4).eval()
    latents, prompts = torch.randn(2, 4, 4, 4), torch.randn(2, 5, 12)
    found = []
    for economical in (False, True):
        for module in (unet, vae):
            module.requires_grad_(False)
            if economical:
                economise(module)
        leaves = [latents.clone().requires_grad_(), prompts.clone().requires_grad_()]
        images = vae.decode(unet(leaves[0], 500, encoder_hidden_states=leaves[1]).sample).sample
        found.append([images.detach(), *torch.autograd.grad(images.square().sum(), leaves)])
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)
    kinds = {type(module) for module in (*unet.modules(), *vae.modules())}
    assert {FrozenResnetBlock2D, FrozenTransformer2DModel, FrozenUpsample2D} <= kinds


@pytest.mark.parametrize("name", ["open_clip", "open_clip, quick", "CLIP", "CLIP, quick"])
def test_a_last_layer_whose_class_token_alone_is_used_sends_the_same_gradient(name: str) -> None:
    plain, frozen, (tokens,) = blocks(name)
    found = []
    for block in (plain, frozen):
        leaf = tokens.clone().requires_grad_()
        found.append(torch.autograd.grad(call(block, [leaf])[:, 0].pow(3).sum(), leaf)[0])
    torch.testing.assert_close(found[1], found[0], atol=2e-5, rtol=2e-5)
    assert found[0][:, 1:].abs().max() > 1e-3, "by way of keys and values it reaches the others"


def test_a_decoders_residual_blocks_are_one_node_too() -> None:
    """Their norms are of the kind "group", which is the plain one where no timestep comes in."""
    decoder = new_vae(norm_num_groups=4).eval().requires_grad_(False)
    economise(decoder)
    blocks_of_it = [module for module in decoder.decoder.modules() if isinstance(module, ResnetBlock2D)]
    assert blocks_of_it and all(block._is_plain for block in blocks_of_it)
    shifted = ResnetBlock2D(in_channels=16, temb_channels=8, groups=4, time_embedding_norm="scale_shift")
    economise(shifted)
    assert not shifted._is_plain


@pytest.mark.parametrize("projection", [False, True], ids=["SD 1.x", "SD 2.x"])
def test_what_both_halves_of_guidance_share_is_computed_once(projection: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    unet = new_unet(12, use_linear_projection=projection).eval().requires_grad_(False)
    economise(unet)
    latents, prompts = torch.randn(2, 4, 4, 4), torch.randn(4, 5, 12)
    found, rows = [], []
    normed = operators.group_norm
    monkeypatch.setattr("textcraftor.kernels.resnet.group_norm", lambda layer, x: (rows.append(len(x)), normed(layer, x))[1])
    for pair in (lambda half: torch.cat([half, half]), twins):
        leaves = [latents.clone().requires_grad_(), prompts.clone().requires_grad_()]
        noise_pred = unet(pair(leaves[0]), 500, encoder_hidden_states=leaves[1]).sample
        found.append([noise_pred.detach(), *torch.autograd.grad(noise_pred.pow(3).sum(), leaves)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=2e-5)
    apart, shared = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    assert set(apart) == {4} and shared.count(2) >= 2 and set(shared) == {2, 4}, "the first block's norms, there and back"


def test_a_timestep_that_differs_between_the_halves_is_not_shared() -> None:
    """SDXL adds the prompt to it."""
    torch.manual_seed(0)
    block = ResnetBlock2D(in_channels=16, temb_channels=8, groups=4).eval().requires_grad_(False)
    images, temb = torch.randn(2, 16, 4, 4).requires_grad_(), torch.randn(4, 8)
    theirs = block(torch.cat([images, images]), temb)
    economise(block)
    torch.testing.assert_close(block(twins(images), temb), theirs, atol=1e-5, rtol=1e-5)
