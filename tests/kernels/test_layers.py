"""Frozen layers: torch's own numbers to rounding, less kept for the way back, and torch's own bits where nothing goes back."""

import copy
import gc
from collections.abc import Callable

import pytest
import torch
from diffusers.models.activations import GEGLU
from torch import Tensor, nn

from textcraftor.kernels import derived_bytes, economise, operators
from textcraftor.kernels.layers import FrozenConv2d, FrozenLinear


@pytest.fixture(params=[True, False], ids=["MKL", "oneDNN"], autouse=True)
def multiplies_with(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to multiply, whichever this processor would take."""
    monkeypatch.setattr(operators, "_is_intel", lambda: request.param)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(24, 40), (3, 5, 24)),
    "linear without bias": (lambda: nn.Linear(24, 40, bias=False), (7, 24)),
    "convolution": (lambda: nn.Conv2d(8, 16, 3, padding=1), (2, 8, 9, 9)),
    "convolution of 1 x 1": (lambda: nn.Conv2d(8, 16, 1), (2, 8, 9, 7)),
    "patches": (lambda: nn.Conv2d(3, 16, (4, 2), stride=(4, 2), bias=False), (2, 3, 12, 6)),
    "patches, with a rest": (lambda: nn.Conv2d(3, 16, 4, stride=4), (2, 3, 13, 9)),
    "padded beyond its kernel": (lambda: nn.Conv2d(8, 16, 3, padding=3), (2, 8, 9, 9)),
    "strided convolution": (lambda: nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=2), (2, 8, 9, 9)),
    "padded otherwise": (lambda: nn.Conv2d(8, 16, 3, padding="same", padding_mode="reflect"), (2, 8, 9, 9)),
    "gated": (lambda: GEGLU(24, 40), (3, 5, 24)),
}


def layers(name: str) -> tuple[nn.Module, nn.Module, Tensor]:
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    plain = make().requires_grad_(False)
    frozen = copy.deepcopy(plain)
    economise(nn.Sequential(frozen))
    return plain, frozen, torch.randn(shape)


def forward_and_back(layer: nn.Module, given: Tensor) -> tuple[Tensor, Tensor]:
    leaf = given.clone().requires_grad_()
    made = layer(leaf)
    (gradient,) = torch.autograd.grad((made * torch.linspace(-1, 1, made.numel()).view_as(made)).sum(), leaf)
    return made.detach(), gradient


@pytest.mark.parametrize("name", LAYERS)
def test_the_same_numbers_and_the_same_gradient(name: str) -> None:
    plain, frozen, given = layers(name)
    for theirs, ours in zip(forward_and_back(plain, given), forward_and_back(frozen, given), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_where_no_gradient_goes_the_bits_are_torchs(name: str) -> None:
    plain, frozen, given = layers(name)
    with torch.no_grad():
        assert torch.equal(frozen(given), plain(given))


@pytest.mark.parametrize("name", ["linear", "convolution", "gated"])
def test_under_autocast_the_bits_are_torchs(name: str) -> None:
    plain, frozen, given = layers(name)
    with torch.autocast("cpu", torch.bfloat16):
        theirs, ours = forward_and_back(plain, given), forward_and_back(frozen, given)
    assert theirs[0].dtype == torch.bfloat16
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize("name", ["linear", "convolution", "gated"])
def test_a_copy_that_is_trained_gets_its_gradients(name: str) -> None:
    plain, frozen, given = layers(name)
    gradients = []
    for layer in (plain, copy.deepcopy(frozen)):
        layer.requires_grad_(True)
        layer(given).square().sum().backward()
        gradients.append([parameter.grad for parameter in layer.parameters()])
    for theirs, ours in zip(*gradients, strict=True):
        assert torch.equal(ours, theirs)


def kept(layer: nn.Module, given: Tensor) -> int:
    """Bytes kept for the way back, weights aside."""
    own = {parameter.data_ptr() for parameter in layer.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        made = layer(given.clone().requires_grad_())
    assert made.requires_grad
    return sum(found.values())


def test_a_convolution_keeps_nothing_and_a_gate_its_projection() -> None:
    plain, frozen, given = layers("convolution")
    assert (kept(plain, given), kept(frozen, given)) == (given.nbytes, 0)
    plain, frozen, given = layers("gated")
    projected = 3 * 5 * 80 * 4
    assert kept(frozen, given) == projected < kept(plain, given)


def test_weights_that_changed_are_packed_anew() -> None:
    plain, frozen, given = layers("linear")
    forward_and_back(frozen, given)
    for layer in (plain, frozen):
        with torch.no_grad():
            layer.weight.mul_(2)
    for theirs, ours in zip(forward_and_back(plain, given), forward_and_back(frozen, given), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_what_is_kept_of_a_weight_goes_with_it() -> None:
    _, frozen, given = layers("convolution")
    assert derived_bytes([frozen]) == 0
    forward_and_back(frozen, given)
    assert derived_bytes([frozen]) == 2 * frozen.weight.nbytes, "for the way there, and for the way back"
    gc.collect()  # of other tests' layers
    before = len(operators._derived)
    del frozen
    gc.collect()
    assert len(operators._derived) == before - 1


def test_names_and_kinds_stay() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.Conv2d(1, 1, 1), nn.ReLU()).requires_grad_(False)
    names = list(module.state_dict())
    economise(module)
    assert list(module.state_dict()) == names and isinstance(module[0], nn.Linear)
    assert [type(layer) for layer in module] == [FrozenLinear, FrozenConv2d, nn.ReLU]
    half = module[0].to(torch.bfloat16)
    assert forward_and_back(half, torch.randn(4, 2, dtype=torch.bfloat16))[0].dtype == torch.bfloat16, "not packed, and right"
