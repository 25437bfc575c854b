"""`bench train`: both steps compute the same gradient, and work is counted in UNet forwards."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.training.test_stages import run
from textcraftor.bench.meters import largest_relative_difference, peak_bytes, resident_bytes
from textcraftor.bench.random_weights import with_random_weights, write_all
from textcraftor.bench.training import bench_training, paired_ratios
from textcraftor.config import Config, TrainConfig, load
from textcraftor.errors import ConfigError

__all__ = ["run"]  # the fixture
CPU = torch.device("cpu")
KEYS = {
    "speed_ratio_cached",
    "speed_ratio_cached_range",
    "speed_ratio_inline",
    "memory_ratio",
    "gradient_max_rel_diff",
    "unet_forwards_reference",
    "unet_forwards_ours",
    "stage_seconds",
}


def settings(run: Config, **train: object) -> Config:
    return run.model_copy(update={"train": TrainConfig.model_validate({**run.train.model_dump(), "grad_steps": 2, **train})})


def test_same_gradient_with_fewer_unet_forwards(run: Config) -> None:
    found = bench_training(settings(run, batch_size=4), "redder", CPU, repeats=1)
    assert found.keys() >= KEYS and json.dumps(found)
    assert found["gradient_max_rel_diff"] <= 1e-4
    # 5 steps, 2 with gradient: 5 + 2 recomputed + 2 * 2 backward. From the cache 2 + 2; computing the prefix takes 3 more.
    assert found["unet_forwards_reference"] == 11
    assert (found["unet_forwards_ours"], found["unet_forwards_ours_inline"]) == (4, 7)


def test_a_smaller_micro_batch_needs_less_memory(run: Config) -> None:
    plain = settings(run, batch_size=4, selective_checkpointing=False, decode_size=None)
    whole, parts = (bench_training(plain, "redder", CPU, 1, micro_batch=size) for size in (4, 1))
    assert parts["memory_ratio"] < 0.5 * whole["memory_ratio"]
    assert parts["gradient_max_rel_diff"] <= 1e-4 and parts["unet_forwards_ours"] == 4


def test_settings_the_published_code_lacks_raise_config_error(run: Config) -> None:
    euler = run.model_copy(update={"chain": run.chain.model_copy(update={"scheduler": "euler"})})
    with pytest.raises(ConfigError, match=r"only DDIM, and chain\.scheduler is euler"):
        bench_training(euler, "redder", CPU)
    with pytest.raises(ConfigError, match="does not divide"):
        bench_training(settings(run, batch_size=4), "redder", CPU, micro_batch=3)
    with pytest.raises(ConfigError, match="profile sd15"):
        with_random_weights(run, Path("nowhere"))


def test_the_published_gradient_is_compared_whatever_the_run_trains_with(run: Config) -> None:
    compared = bench_training(settings(run, gradient="stop_gradient"), "redder", CPU, 1)
    assert compared["gradient_max_rel_diff"] <= 1e-4


def test_random_weights_in_the_published_layout(tmp_path: Path) -> None:
    write_all(tmp_path, small=True)
    overrides = {
        "base": {"resolution": 64, "dtype": "float32"},
        "chain": {"num_inference_steps": 4},
        "train_unet": {"grad_steps": 1},
    }
    config = load(tmp_path / "none.yaml", {**overrides, "train": {"grad_steps": 1, "batch_size": 2}}, "sd15")
    found = bench_training(with_random_weights(config, tmp_path), "paper", CPU, repeats=1)
    assert found["gradient_max_rel_diff"] <= 1e-4


def test_peak_and_resident_bytes_and_relative_difference() -> None:
    """Peak memory counts what is held at the same time; shared parameters count once."""
    step = lambda: [torch.ones(1000).sum() for _ in range(5)]  # noqa: E731
    assert 4000 <= peak_bytes(step, CPU) < 8000
    linear = nn.Linear(3, 5)
    assert resident_bytes([linear, nn.Sequential(linear)]) == 4 * 20
    ours, theirs = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.1])
    assert largest_relative_difference([(ours, theirs)]) == pytest.approx(0.1 / 1.01**0.5)


def test_ratios_are_paired_within_a_round() -> None:
    """A round in which the machine is three times slower moves neither the median nor the range."""
    ratios = paired_ratios([4.0, 12.0, 5.0], [2.0, 6.0, 2.0])
    assert ratios == {"median": 2.0, "min": 2.0, "max": 2.5}
