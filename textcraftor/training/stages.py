"""The two training stages: the text encoder on a reward mix, then (optionally) the UNet on a frozen text encoder.

They load what `prepare` computed, run the trainer and write an artifact with its proof.
"""

import contextlib
import csv
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from textcraftor import training_proof
from textcraftor.artifact import base_identity, clear_aside, digest, proof, reward_identity, write_json, written_aside
from textcraftor.cache.prepare import heldout_rows, read_text_features, read_train_latents, train_table
from textcraftor.cache.store import INDEX
from textcraftor.candidate import Candidate
from textcraftor.chain.sampler import Sampler
from textcraftor.config import Config, TrainConfig, TuneConfig
from textcraftor.distributed import data_parallel, fsdp
from textcraftor.errors import ConfigError, unknown
from textcraftor.heldout import require_held_out
from textcraftor.layout import LATENTS, TRAIN_PROMPTS, encoder_folder, training_lock, training_state, unet_folder
from textcraftor.models.base import Base, TunedModel, load_base, load_candidate
from textcraftor.models.lora import add_lora, merge_lora
from textcraftor.models.negative_embedding import NegativeEmbedding
from textcraftor.models.saving import save_module
from textcraftor.rewards import Reward, RewardMix, load_rewards
from textcraftor.signing import Keyring
from textcraftor.training.acceleration import accelerate
from textcraftor.training.checkpoint import FILE_NAME, facts_key
from textcraftor.training.data import TrainSet
from textcraftor.training.holder import sole_holder
from textcraftor.training.inline import InlineFeatures, InlinePrefixes
from textcraftor.training.objective import Objective
from textcraftor.training.resume import FINISHED, describe_other_checkpoints, run_facts
from textcraftor.training.start import Start, find_start
from textcraftor.training.trainer import Trainer

PREVIEW_PROMPTS = 8  # in a sample grid


def train_text_encoder(config: Config, mix: str, root: Path, device: torch.device) -> Path:
    """Stage `train@MIX`: tune the text encoder on one reward mix; returns `data/encoders/MIX`.

    Raises ConfigError for an unknown mix, one that trains on a held-out judge, or an encoder the base lacks, ModelError
    for missing or stale inputs, TrainingError when a loss is not finite.
    """
    weights, tune = _mix_weights(config, mix), config.train
    start = find_start(config, mix, root)
    trained_weights = require_held_out(config, weights, root, start.trained_weights if start else None)
    device = data_parallel.start(device)
    base = load_base(config.base.at(root), device)
    parts = encoder_parts(base, tune, start)
    trainer, inputs = _build_trainer(config, tune, weights, root, base, TunedModel(**parts), parts)
    record = _proof(config, root, tune, weights, {**inputs, **(start.inputs if start else {})})
    earlier = start.trained(root) if start else []
    if start is None or (start.trained_weights is not None and earlier):  # otherwise nobody knows, and nothing passes the gate
        record["trained_weights"] = trained_weights
    return _run(trainer, "train", mix, record, config, root, parts, earlier=earlier)


def train_unet(config: Config, mix: str, root: Path, device: torch.device) -> Path:
    """Stage `train-unet@MIX`: tune the UNet on a frozen text encoder, the mix's or the base's; returns `data/unets/MIX`.

    The same loss, the other module (paper section 3.3). Raises as `train_text_encoder` does.
    """
    weights = _mix_weights(config, mix)
    trained_weights = require_held_out(config, weights, root)
    device = data_parallel.start(device)
    base = load_base(config.base.at(root), device)
    if config.train_unet.encoder == "original":
        frozen, encoders = TunedModel(), {}
    else:
        candidate = Candidate.find(mix, root)
        frozen, encoders = load_candidate(candidate, base) or TunedModel(), candidate.parts
    unet: dict[str, Any] = {"unet": _trainable(base, "unet", config.train_unet)}
    meta_copies = {name: fsdp.meta_copy(module) for name, module in unet.items()}
    trainer, inputs = _build_trainer(config, config.train_unet, weights, root, base, replace(frozen, **unet), unet)
    record = _proof(config, root, config.train_unet, weights, {**inputs, **encoders})
    record["trained_weights"] = trained_weights
    return _run(trainer, "train-unet", mix, record, config, root, unet, meta_copies)


def encoder_parts(base: Base, tune: TrainConfig, start: Start | None = None) -> dict[str, Any]:
    """The tuned modules that condition the UNet, by the names of a candidate's folders: text encoders, negative embedding.

    start: a candidate whose modules they start from, in place of the base's.  Raises ModelError where it has others.
    """
    if start:
        return {name: _as_trained(module, tune) for name, module in start.modules(base, tune).items()}
    parts: dict[str, Any] = {name: _trainable(base, name, tune) for name in sorted(set(tune.encoders))}
    if tune.negative_embedding:
        with torch.no_grad():
            empty = base.conditioning([""]).prompt_embeds[:1]
        parts["negative_embedding"] = NegativeEmbedding(empty).to(base.device)
    return parts


def in_one_module(parts: Mapping[str, nn.Module]) -> nn.Module:
    """A single part as it is, several in a ModuleDict."""
    return next(iter(parts.values())) if len(parts) == 1 else nn.ModuleDict(parts)


def _trainable(base: Base, name: str, tune: TuneConfig) -> nn.Module:
    """A copy of the base's module in which every weight, or a low-rank update, is trained."""
    return _as_trained(base.trainable(name), tune)


def _as_trained(module: nn.Module, tune: TuneConfig) -> nn.Module:
    lora = tune.method == "lora" and not isinstance(module, NegativeEmbedding)
    return add_lora(module, tune) if lora else module


def _mix_weights(config: Config, mix: str) -> dict[str, float]:
    if mix not in config.mix:
        raise ConfigError(unknown("mix", mix, config.mix))
    return {reward: weight for reward, weight in config.mix[mix].items() if weight}


def _build_trainer(
    config: Config,
    tune: TuneConfig,
    weights: dict[str, float],
    root: Path,
    base: Base,
    tuned: TunedModel,
    parts: dict[str, nn.Module],
) -> tuple[Trainer, dict[str, Path]]:
    """The trainer with its training data, and the files that the data came from."""
    sampler = Sampler(base, config.train_chain, config.train.switch_at)
    train_set, rewards = _load_data(config, tune, weights, root, sampler)
    unets = [base.pipe.unet, *([tuned.unet] if tuned.unet else [])]
    accelerate(sampler, [base.pipe.vae, *unets], tune)
    if fsdp.should_shard(tune):
        for unet in unets:
            fsdp.shard(unet, base.device, base.dtype)
    objective = Objective(base, sampler, RewardMix(rewards, weights), tune)
    trainer = Trainer(objective, train_set, tuned, in_one_module(parts), config.train.negative_learning_rate)
    return trainer, {"prompts": root / TRAIN_PROMPTS, "latents": root / LATENTS / "train" / INDEX}


def _load_data(
    config: Config, tune: TuneConfig, weights: Iterable[str], root: Path, sampler: Sampler
) -> tuple[TrainSet, dict[str, Reward]]:
    """The train set and the rewards of a mix. Prefixes and text features are stored, or computed batch by batch (inline)."""
    table, reward_configs = train_table(config, root), config.at(root).rewards
    prompts, images = table["prompt"], config.train.images_per_prompt
    if config.prepare.mode == "inline":
        rewards = load_rewards(reward_configs, weights, sampler.base.device, tune.reward_dtype)
        # Text features are computed in the precision that `prepare` uses, whatever `reward_dtype` images are scored in.
        text_rewards = rewards if tune.reward_dtype is None else load_rewards(reward_configs, weights, sampler.base.device)
        features = {name: InlineFeatures(reward, prompts) for name, reward in text_rewards.items()}
        return TrainSet(prompts, InlinePrefixes(sampler, table), features, images), rewards
    stored = {name: read_text_features(config, root, name) for name in weights}
    latents = read_train_latents(config, root)
    rewards = load_rewards(reward_configs, weights, sampler.base.device, tune.reward_dtype)
    for reward in rewards.values():
        reward.drop_text_tower()
    return TrainSet(prompts, latents, stored, images), rewards


def _proof(config: Config, root: Path, tune: TuneConfig, weights: dict[str, float], inputs: dict[str, Path]) -> dict[str, Any]:
    sections = {
        "base": config.base,
        "chain": config.train_chain,
        "switch_at": config.train.switch_at,
        "tune": tune,
        "mix": weights,
        "rewards": {name: config.rewards[name].model_dump(mode="json") for name in weights},
    }
    models = {
        "base": base_identity(config.base, root),
        **{name: reward_identity(config.rewards[name], root) for name in weights},
    }
    return {**proof(sections, inputs, tune.seed), "models": models}


def _run(
    trainer: Trainer,
    stage: str,
    mix: str,
    record: dict[str, Any],
    config: Config,
    root: Path,
    parts: dict[str, nn.Module],
    meta_copies: Mapping[str, nn.Module] | None = None,
    earlier: Sequence[training_proof.Trained] = (),
) -> Path:
    """Fit, then write the artifact. The checkpoint lies outside the artifact's folder, which DVC deletes first.

    stage: `train` or `train-unet`.  meta_copies: for the parts that may be sharded, the copies that `fsdp.unshard` loads
    their weights into.  earlier: what the candidate that this starts from was trained on.
    Raises TrainingError when another process trains the same.
    """
    out = root / (unet_folder(mix) if stage == "train-unet" else encoder_folder(mix))
    runs = root / training_state(stage, mix)
    with sole_holder(root / training_lock(stage, mix)) if data_parallel.rank() == 0 else contextlib.nullcontext():
        _fit_and_write(trainer, stage, runs, record, config, root, out, parts, meta_copies or {}, earlier)
    data_parallel.barrier()
    return out


def _fit_and_write(
    trainer: Trainer,
    stage: str,
    runs: Path,
    record: dict[str, Any],
    config: Config,
    root: Path,
    out: Path,
    parts: dict[str, nn.Module],
    meta_copies: Mapping[str, nn.Module],
    earlier: Sequence[training_proof.Trained],
) -> None:
    """Train, from the checkpoint if there is one, and write weights, history and proof to `out`.

    runs: folder of the checkpoints of all unfinished runs of this stage and mix.
    """
    facts = run_facts(config, trainer.tune, stage.replace("-", "_"), list(parts), trainer.objective.mix.weights, record)
    state = runs / facts_key(facts)[:16]
    finished = state.with_name(state.name + FINISHED)
    if data_parallel.rank() == 0:
        shutil.rmtree(finished, ignore_errors=True)
        clear_aside(out)
        if not (state / FILE_NAME).exists():
            for line in describe_other_checkpoints(state, facts):
                Console(stderr=True).print(line, highlight=False, soft_wrap=True)
    progress = trainer.fit(state, facts, _preview_rows(config, root, trainer.objective.sampler))
    parts |= {name: fsdp.unshard(parts[name], meta) for name, meta in meta_copies.items()}
    if data_parallel.rank() == 0:
        with written_aside(out) as aside:
            for part, module in parts.items():
                save_module(merge_lora(module, aside / "lora" / part), aside / part)
            shutil.copytree(state / "grids", aside / "grids", ignore=shutil.ignore_patterns(".*"))
            _write_history(aside / "history.csv", progress.history)
            write_json(
                aside / "proof.json", {**record, "execution": progress.execution, "weights": _weights_digest(aside, parts)}
            )
            if (rewards := record.get("trained_weights")) is not None:
                training_proof.write(aside, parts, trainer.train_set.prompts, rewards, Keyring(root), earlier)
        # Renamed first: a kill during the deletion must not leave half a state to resume from.
        shutil.rmtree(state.rename(finished))
        with contextlib.suppress(OSError):  # not empty: unfinished runs with other settings
            runs.rmdir()


def _weights_digest(folder: Path, parts: Iterable[str]) -> str | dict[str, str]:
    """sha256 of the tuned module, or of each by name where several are tuned."""
    digests = {part: digest(folder / part) for part in parts}
    return digests if len(digests) > 1 else next(iter(digests.values()))


def _preview_rows(config: Config, root: Path, sampler: Sampler) -> tuple[list[str], Tensor]:
    """The first held-out prompts with their latents at the switch, for the sample grids; never trained on."""
    prompts, _, seeds = heldout_rows(config, root)
    rows = slice(0, PREVIEW_PROMPTS * config.evaluate.images_per_prompt, config.evaluate.images_per_prompt)
    return prompts[rows], sampler.prefix(prompts[rows], seeds[rows])


def _write_history(path: Path, history: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(history[0]))
        writer.writeheader()
        writer.writerows(history)
