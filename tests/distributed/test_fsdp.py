"""A UNet sharded over two processes: half the memory, the same gradient, the same files."""

import json
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from diffusers import UNet2DConditionModel

from tests.fixtures import Redness, own_base
from tests.processes import in_processes
from tests.training.test_stages import CPU
from tests.training.test_trainer import FACTS, SETTINGS, interrupted, new_trainer, preview
from textcraftor.config import TuneConfig
from textcraftor.distributed import data_parallel, fsdp
from textcraftor.errors import Preempted, RankFailure, TrainingError
from textcraftor.models.base import TunedModel
from textcraftor.models.lora import add_lora, merge_lora
from textcraftor.training.checkpoint import Progress
from textcraftor.training.data import Batch
from textcraftor.training.objective import Objective
from textcraftor.training.preemption import StopRequest
from textcraftor.training.trainer import SUCCEEDED, Trainer

Weights = Mapping[str, torch.Tensor]


def new(
    folder: Path,
    module: str,
    reward: Redness | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    **settings: Any,
) -> Trainer:
    """A trainer of the text encoder or the UNet; with `shard` and two processes, its UNets are sharded."""
    base = own_base(folder, dtype)
    tune = TuneConfig.model_validate({**SETTINGS.model_dump(), **settings})
    trainer = new_trainer(base, tune, reward or Redness(), switch_at=0.4)
    if module == "unet":
        unet = base.trainable("unet")
        unet = add_lora(unet, tune) if tune.method == "lora" else unet
        assert trainer.tuned.text_encoder is not None
        trainer.tuned, trainer.module = TunedModel(trainer.tuned.text_encoder.requires_grad_(False), unet), unet
    if fsdp.should_shard(tune):
        for unet in {base.pipe.unet, trainer.tuned.unet} - {None}:
            fsdp.shard(unet, CPU, base.dtype)
    return trainer


def gradient(trainer: Trainer) -> torch.Tensor:
    """The whole gradient of one step over all ranks, as one vector."""
    _, status, _ = trainer._accumulate_gradients(Progress(), StopRequest())
    assert status == SUCCEEDED
    gradients = [p.grad for p in trainer.module.parameters() if p.grad is not None]
    data_parallel.all_reduce_mean([g for g in gradients if not fsdp.is_sharded(g)])
    return torch.cat([fsdp.full_tensor(g).flatten() for g in gradients])


def close_to(ours: Weights, expected: Weights, start: Weights) -> bool:
    """Within 1e-5 of the weights and 1e-2 of their change in training: AdamW magnifies rounding where gradients are ~0."""
    keys = [key for key in start if not key.endswith("k_proj.bias")]  # theirs is 0 but for rounding: softmax ignores it
    a, b, c = (torch.cat([weights[key].flatten() for key in keys]) for weights in (ours, expected, start))
    return bool((a - b).norm() <= 1e-5 * b.norm() and (a - b).norm() <= 1e-2 * (b - c).norm())


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("sd1", {}),
        ("sdxl", {}),
        ("sdxl", {"gradient": "stop_gradient"}),
        ("sdxl", {"gradient_checkpointing": True}),
        ("sd2", {"gradient": "one_step"}),
        ("sd2", {"method": "lora", "lora_rank": 2}),
    ],
)
def test_the_gradient_equals_one_process_with_twice_the_micro_batch(
    family_folders: dict[str, Path], family: str, settings: dict[str, Any]
) -> None:
    folder, settings = family_folders[family], {"grad_steps": 3, "accumulation": 2, **settings}
    expected = {each: gradient(new(folder, each, batch_size=4, **settings)) for each in ("text_encoder", "unet")}
    assert all(vector.norm() > 0 for vector in expected.values())

    def work() -> None:
        for module, vector in expected.items():
            ours = gradient(new(folder, module, batch_size=2, shard=True, **settings))
            assert (ours - vector).norm() <= 1e-5 * vector.norm(), module

    in_processes(2, work)


def test_each_rank_holds_half(family_folders: dict[str, Path], tmp_path: Path) -> None:
    """Half of weights and gradients, before and after a step: nothing stays gathered."""

    def work() -> None:
        trainer = new(family_folders["sdxl"], "unet", batch_size=2, shard=True, steps=1)
        whole = sum(p.numel() for p in trainer.module.parameters())

        def held(tensors: list[torch.Tensor]) -> int:
            return sum(t.to_local().numel() for t in tensors)  # type: ignore[attr-defined]

        parameters = list(trainer.module.parameters())
        frozen = list(trainer.objective.base.pipe.unet.parameters())
        trainer.fit(tmp_path, FACTS, preview(trainer))
        gradients = [p.grad for p in parameters if p.grad is not None]
        for tensors in (parameters, frozen, gradients, list(trainer.module.parameters())):
            assert all(fsdp.is_sharded(t) for t in tensors)
            assert held(tensors) < 0.6 * whole

    in_processes(2, work)


def test_bfloat16_rounds_gathered_weights_and_keeps_float32_gradients(family_folders: dict[str, Path]) -> None:
    expected = gradient(new(family_folders["sdxl"], "unet", dtype="bfloat16", batch_size=4))

    def work() -> None:
        trainer = new(family_folders["sdxl"], "unet", dtype="bfloat16", batch_size=2, shard=True)
        ours = gradient(trainer)
        assert ours.dtype == torch.float32
        assert torch.cosine_similarity(ours, expected, dim=0) > 0.99  # autocast rounds elsewhere

    in_processes(2, work)


@pytest.mark.parametrize("module", ["text_encoder", "unet"])
def test_a_sharded_run_and_one_process_agree_and_resume_each_other(
    family_folders: dict[str, Path], tmp_path: Path, module: str
) -> None:
    folder, settings = family_folders["sd1"], {"ema_decay": 0.5, "learning_rate": 1e-4, "steps": 2, "checkpoint_every": 1}

    class Killed(Exception):
        pass

    def die_in_step_two(step: int) -> None:
        if step == 1:
            raise Killed

    def fit(batch_size: int, where: str, dies: bool = False, shard: bool = False) -> dict[str, torch.Tensor]:
        trainer = new(folder, module, batch_size=batch_size, shard=shard, **settings)
        if dies:
            with pytest.raises(Killed):
                interrupted(trainer, die_in_step_two).fit(tmp_path / where, FACTS, preview(trainer))
        else:
            trainer.fit(tmp_path / where, FACTS, preview(trainer))
        return fsdp.gather_on_rank0(trainer.module.state_dict())

    start = new(folder, module).module.state_dict()
    alone = fit(8, "alone")
    fit(8, "alone first", dies=True)

    def work() -> None:
        for where in ("together", "alone first"):
            weights = fit(4, where, shard=True)
            if data_parallel.rank() == 0:
                torch.save(weights, tmp_path / f"{where}.pt")
        fit(4, "together first", shard=True, dies=True)

    in_processes(2, work)
    found = [torch.load(tmp_path / f"{where}.pt", weights_only=True) for where in ("together", "alone first")]
    found.append(fit(8, "together first"))
    for weights in found:
        assert weights.keys() == alone.keys()
        assert close_to(weights, alone, start)
    assert (tmp_path / "together/grids/step_000000.png").is_file()


def test_a_nonfinite_reward_on_one_rank_is_named_by_both(family_folders: dict[str, Path], tmp_path: Path) -> None:
    def work() -> None:
        reward = Redness()
        if data_parallel.rank() == 1:
            reward.scale.fill_(float("inf"))
        trainer = new(family_folders["sd1"], "unet", reward, shard=True)
        with pytest.raises(TrainingError, match="reward redness is not finite"):
            trainer.fit(tmp_path, FACTS, preview(trainer))

    in_processes(2, work)
    assert (tmp_path / "checkpoint.safetensors").is_file()


def test_sigterm_to_one_rank_stops_both_with_a_checkpoint(family_folders: dict[str, Path], tmp_path: Path) -> None:
    def work() -> None:
        def asked(step: int) -> None:
            if step == 1 and data_parallel.rank() == 1:  # before the first checkpoint that is due
                signal.raise_signal(signal.SIGTERM)

        trainer = interrupted(new(family_folders["sd1"], "unet", batch_size=2, accumulation=2, shard=True), asked)
        with pytest.raises(Preempted, match="after step 1"):
            trainer.fit(tmp_path, FACTS, preview(trainer))

    in_processes(2, work)
    assert (tmp_path / "checkpoint.safetensors").is_file()


def test_out_of_memory_in_a_sharded_unet_is_a_rank_failure(family_folders: dict[str, Path], tmp_path: Path) -> None:
    def work() -> None:
        trainer = new(family_folders["sd1"], "unet", shard=True)

        class Small(Objective):
            def backward(self, batch: Batch, tuned: TunedModel, step: int, share: float = 1.0) -> dict[str, float]:
                raise torch.OutOfMemoryError("CUDA out of memory")

        trainer.objective = Small(**vars(trainer.objective))
        with pytest.raises(RankFailure, match=r"no memory for a micro batch of 4\. Lower train\.batch_size"):
            trainer.fit(tmp_path, FACTS, preview(trainer))

    in_processes(2, work)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_sharded_unet_is_saved_as_a_plain_folder(family_folders: dict[str, Path], tmp_path: Path, method: str) -> None:
    def work() -> None:
        tune = TuneConfig(shard=True, method=method, lora_rank=2)  # type: ignore[arg-type]
        base = own_base(family_folders["sdxl"])
        unet = base.trainable("unet")
        unet = add_lora(unet, tune) if method == "lora" else unet
        with torch.no_grad():
            for name, parameter in unet.named_parameters():
                if "lora_B" in name or method == "full":
                    parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1)
        whole = merge_lora(unet, tmp_path / f"lora{data_parallel.rank()}").state_dict()
        shell = fsdp.meta_copy(unet)
        assert all(p.is_meta for p in shell.parameters())
        fsdp.shard(unet, CPU, base.dtype)
        written = fsdp.unshard(unet, shell)
        if data_parallel.rank() == 0:
            merge_lora(written, tmp_path / "lora").save_pretrained(tmp_path / "unet")
            found = UNet2DConditionModel.from_pretrained(tmp_path / "unet").state_dict()
            assert found.keys() == whole.keys() and all(torch.equal(found[name], whole[name]) for name in whole)

    in_processes(2, work)
    assert json.loads((tmp_path / "unet/config.json").read_text())["_class_name"] == "UNet2DConditionModel"
    assert (tmp_path / "lora/adapter_model.safetensors").is_file() == (method == "lora")


def test_one_process_reports_that_there_is_nothing_to_split(
    family_folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = new(family_folders["sd1"], "text_encoder", shard=True, steps=1)
    trainer.fit(tmp_path, FACTS, preview(trainer))
    assert "shard: one process: nothing to split" in capsys.readouterr().err


@pytest.mark.parametrize("other", ["compile", "channels_last"])
def test_settings_that_cannot_be_combined_with_shard_are_refused(other: str) -> None:
    with pytest.raises(ValueError, match="cannot be combined with compile"):
        TuneConfig.model_validate({"shard": True, other: True})
