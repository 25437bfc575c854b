"""A base in bfloat16: frozen weights are rounded, trained weights are not."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.checkpoints import write_single_file
from tests.families import FAMILIES
from tests.fixtures import CHAIN, Redness
from textcraftor.candidate import Candidate
from textcraftor.chain.sampler import Sampler
from textcraftor.config import BaseConfig, TuneConfig
from textcraftor.models.base import Base, TunedModel, load_base, load_candidate
from textcraftor.models.lora import add_lora
from textcraftor.models.selective_checkpointing import enable_selective_checkpointing
from textcraftor.rewards import RewardMix
from textcraftor.training.data import TrainSet
from textcraftor.training.objective import Objective
from textcraftor.training.trainer import Trainer

CPU = torch.device("cpu")
PROMPTS = ["a small red circle", "a large blue square on a black background"]
TUNE = TuneConfig(grad_steps=2, steps=1, batch_size=2, learning_rate=1e-6)
FILES = {"text_encoder": "text_encoder/model.safetensors", "unet": "unet/diffusion_pytorch_model.safetensors"}


def base_of(path: Path, dtype: str = "bfloat16", **settings: str) -> Base:
    return load_base(BaseConfig.model_validate({"path": str(path), "resolution": 32, "dtype": dtype, **settings}), CPU)


def trainer_of(base: Base, tuned: TunedModel, module: nn.Module) -> Trainer:
    sampler, reward = Sampler(base, CHAIN, 0.4), Redness()
    latents = sampler.prefix(PROMPTS, [3, 4])
    train_set = TrainSet(PROMPTS, latents, {"redness": reward.text_features(PROMPTS)})
    objective = Objective(base, sampler, RewardMix({"redness": reward}, {"redness": 10.0}), TUNE)
    return Trainer(objective, train_set, tuned, module)


@pytest.mark.parametrize("name", FAMILIES)
def test_only_unet_and_vae_are_rounded(family_folders: dict[str, Path], name: str) -> None:
    base = base_of(family_folders[name])
    assert base.pipe.unet.dtype == base.pipe.vae.dtype == base.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for encoder in base.encoders.values() for p in encoder.parameters())
    sampler = Sampler(base, CHAIN, 0.4)
    assert sampler.prefix(PROMPTS, [3, 4]).dtype == sampler.generate(PROMPTS, [3, 4]).dtype == torch.float32
    conditioning = base.conditioning(PROMPTS)
    assert conditioning.prompt_embeds.dtype == torch.bfloat16
    exact = Sampler(base_of(family_folders[name], "float32"), CHAIN, 0.4).generate(PROMPTS, [3, 4])
    rounded = sampler.generate(PROMPTS, [3, 4])
    assert 0 < (rounded - exact).abs().mean() < 2e-2


@pytest.mark.parametrize("module", ["text_encoder", "unet"])
def test_updates_below_bfloat16s_resolution_are_kept(family_folders: dict[str, Path], module: str, tmp_path: Path) -> None:
    """An AdamW step of 1e-6 would move hardly any bfloat16 weight. Here it does, in memory and after saving and loading."""
    base = base_of(family_folders["sd2"])
    trained = base.trainable(module)
    tuned = TunedModel(**{"text_encoder": base.trainable("text_encoder").requires_grad_(False), module: trained})
    before = {key: value.clone() for key, value in trained.state_dict().items()}
    trainer = trainer_of(base, tuned, trained)
    trainer.fit(tmp_path / "state", {"run": "test"}, (PROMPTS, trainer.train_set.latents))
    moved = unmoved = 0
    for key, parameter in trained.named_parameters():
        assert parameter.dtype == torch.float32 and (parameter.grad is None or parameter.grad.dtype == torch.float32)
        reached = (parameter != before[key]) & (before[key].abs() > 1e-2)
        moved += int(reached.sum())
        unmoved += int((parameter.bfloat16() == before[key].bfloat16())[reached].sum())
    assert moved > 1000 and unmoved > 0.99 * moved
    for part, encoder in {**tuned.encoders, **({"unet": tuned.unet} if tuned.unet else {})}.items():
        encoder.save_pretrained(tmp_path / "candidate" / part)  # type: ignore[operator]
    again = load_candidate(Candidate.find(str(tmp_path / "candidate"), Path()), base)
    assert again is not None
    for key, value in getattr(again, module).state_dict().items():
        assert torch.equal(value, trained.state_dict()[key]), key
    ours, theirs = (Sampler(base, CHAIN, 0.4).generate(PROMPTS, [3, 4], model) for model in (tuned, again))
    assert torch.equal(ours, theirs), "judged as it was trained"


@pytest.mark.parametrize("single_file", [False, True])
def test_trained_modules_start_from_unrounded_weights(
    family_folders: dict[str, Path], single_file: bool, tmp_path: Path
) -> None:
    folder, base = family_folders["sd2"], base_of(family_folders["sd2"])
    if single_file:
        write_single_file(FAMILIES["sd2"](), tmp_path / "model.safetensors")
        base = base_of(tmp_path / "model.safetensors", config=str(folder))
    for name, file in FILES.items():
        master = base.trainable(name).state_dict()
        for key, value in load_file(folder / file).items():
            assert torch.equal(master[key.removeprefix("text_model.")], value), key
    rounded = base.pipe.unet.state_dict()
    assert any(not torch.equal(rounded[key].float(), value) for key, value in base.trainable("unet").state_dict().items())


def test_a_trained_unet_computes_in_the_bases_precision(family_folders: dict[str, Path]) -> None:
    """float32 weights under autocast: the compute time of bfloat16 with the weights of float32."""
    base = base_of(family_folders["sd2"])
    unet, conditioning = base.trainable("unet"), base.conditioning(PROMPTS)
    seen: list[torch.dtype] = []
    unet.conv_in.register_forward_hook(lambda *call: seen.append(call[2].dtype))
    sampler = Sampler(base, CHAIN, 0.4)
    prefix = sampler.prefix(PROMPTS, [3, 4])
    gradients = []
    for checkpointing in (False, True):
        unet.zero_grad()
        sampler.finish(prefix, conditioning, unet, 3, checkpointing).square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in unet.parameters()]))
    assert set(seen) == {torch.bfloat16}
    assert gradients[0].dtype == torch.float32 and gradients[0].abs().sum() > 0
    assert torch.equal(*gradients)
    frozen = sampler.finish(prefix, conditioning)
    with torch.no_grad():
        assert (sampler.finish(prefix, conditioning, unet) - frozen).abs().mean() < 0.05 * frozen.abs().mean()


def test_the_gradient_in_bfloat16_points_in_the_direction_of_float32s(family_folders: dict[str, Path]) -> None:
    flat = []
    for dtype in ("float32", "bfloat16"):
        base = base_of(family_folders["sdxl"], dtype)
        encoders = {name: base.trainable(name) for name in base.encoders}
        sampler = Sampler(base, CHAIN, 0.4)
        conditioning = base.conditioning(PROMPTS, TunedModel(**encoders))
        sampler.finish(sampler.prefix(PROMPTS, [3, 4]), conditioning, None, 2).square().mean().backward()
        parameters = [p for encoder in encoders.values() for p in encoder.parameters()]
        flat.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
    assert torch.nn.functional.cosine_similarity(*flat, dim=0) > 0.98


def test_a_low_rank_update_of_the_unet_gets_the_same_gradient_with_selective_checkpointing(
    family_folders: dict[str, Path],
) -> None:
    """Under autocast: the weights are float32, the UNet computes in bfloat16."""
    flat = []
    for selective in (False, True):
        base = base_of(family_folders["sd1"])
        torch.manual_seed(0)
        unet = add_lora(base.trainable("unet"), TUNE.model_copy(update={"method": "lora"}))
        if selective:
            enable_selective_checkpointing(unet)
        sampler = Sampler(base, CHAIN, 0.4)
        prefix = sampler.prefix(PROMPTS, [3, 4])
        sampler.finish(prefix, base.conditioning(PROMPTS), unet, 2).square().mean().backward()
        flat.append(torch.cat([p.grad.flatten() for p in unet.parameters() if p.grad is not None]))
    assert flat[0].abs().sum() > 0
    assert torch.equal(*flat)
