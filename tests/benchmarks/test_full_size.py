"""The full-size step at small size: the same layout, and the gradient in slices is the trainer's own."""

import copy
from pathlib import Path

import pytest
import torch

from benchmarks import full_size_step
from textcraftor.bench.random_weights import tokenizer, write_all
from textcraftor.config import BaseConfig, ChainConfig, TuneConfig
from textcraftor.models import TunedModel, load_base
from textcraftor.objective import Objective
from textcraftor.rewards import RewardMix
from textcraftor.sampler import Sampler
from textcraftor.trainset import Batch

TuneK = TuneConfig(grad_steps=2, gradient_checkpointing=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("full_size")
    write_all(folder, small=True)
    return folder


def test_the_gradient_in_slices_is_that_of_the_whole_loss(folder: Path) -> None:
    base = load_base(BaseConfig(path=str(folder / "base"), resolution=64), torch.device("cpu"))
    base.pipe.vae.enable_gradient_checkpointing()
    sampler = Sampler(base, ChainConfig(num_inference_steps=4), 0.5)
    ledger = full_size_step.Ledger()
    rewards, features = full_size_step.load_rewards(folder, torch.float32, ledger)
    prefix = sampler.prefix([full_size_step.PROMPT], [0])
    sliced, whole = (copy.deepcopy(base.text_encoder).requires_grad_(True) for _ in range(2))
    values = full_size_step.gradient_in_slices(base, sampler, sliced, prefix, rewards, features, 2, ledger)
    batch = Batch([full_size_step.PROMPT], prefix, features)
    parts = Objective(base, sampler, RewardMix(rewards, full_size_step.MIX), TuneK).backward(batch, TunedModel(whole), 0)
    assert values == pytest.approx({name: parts[name] for name in values}, abs=1e-5)
    gradients = [torch.cat([p.grad.flatten() for p in encoder.parameters()]) for encoder in (sliced, whole)]
    assert (gradients[0] - gradients[1]).norm() <= 1e-4 * gradients[1].norm()


def test_the_page_names_every_part_and_its_peak(folder: Path) -> None:
    ledger, outcome = full_size_step.run(folder, torch.bfloat16, steps=3, grad_steps=1)
    page = full_size_step.page(ledger, outcome, torch.bfloat16)
    assert "Peak memory" in page and "no frozen parameter received one" in page
    for part in ("prefix", "text encoder", "autoencoder, backward", *full_size_step.MIX, "AdamW"):
        assert part in page


def test_the_tokenizer_is_clips_own() -> None:
    ours = tokenizer()
    assert (len(ours), ours.bos_token_id, ours.eos_token_id) == (49408, 49406, 49407)
    assert ours("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
