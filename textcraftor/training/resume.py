"""Which runs may continue each other's checkpoints: docs/decisions/resume.md."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from textcraftor.config import Config, TuneConfig
from textcraftor.distributed import data_parallel
from textcraftor.training.checkpoint import FILE_NAME, differences, read_facts

OUTPUT_SETTINGS = frozenset({"checkpoint_every", "checkpoint_minutes", "grid_every", "allow_without_clip"})
"""Settings of `TrainConfig` that no weight depends on."""

EXECUTION_SETTINGS = frozenset(
    {
        "decode_size",
        "gradient_checkpointing",
        "channels_last",
        "selective_checkpointing",
        "compile",
        "activation_budget",
        "shard",
    }
)
"""Settings of `TuneConfig` that change the weights by rounding at most. Each step's are recorded in the proof."""

FINISHED = ".finished"
"""Suffix of the folder of a run whose artifact is written, while the folder is being deleted."""


def run_facts(
    config: Config, tune: TuneConfig, section: str, parts: list[str], weights: Mapping[str, float], record: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything that determines a run's result beyond rounding. A checkpoint is resumed by a run with the same facts.

    Models count by their digests, wherever their files lie. Of batch size, accumulation and world size the product counts:
    samples are taken from the stream by optimiser step.

    section: of `tune` in the configuration, `train` or `train_unet`.  parts: the modules that are tuned.  weights: of the
    rewards in the mix.  record: the proof, for its digests of models and inputs and its library versions.
    """
    # Where training starts counts by its digest, which is among the inputs.
    apart = OUTPUT_SETTINGS | EXECUTION_SETTINGS | {"batch_size", "accumulation", "start_from"}
    samples = tune.batch_size * tune.accumulation * data_parallel.world_size()
    base = config.base.model_dump(
        mode="json", exclude={*config.base.own_files(), "revision", "vae_slicing", "vae_gradient_checkpointing"}
    )
    return {
        "parts": parts,
        section: {**tune.model_dump(mode="json", exclude=set(apart)), "batch_size x accumulation x processes": samples},
        "base": {"weights": record["models"]["base"], **base},
        "chain": config.train_chain.model_dump(mode="json"),
        "switch_at": config.train.switch_at,
        "images_per_prompt": config.train.images_per_prompt,
        "mix": dict(weights),
        "rewards": {
            name: {
                **config.rewards[name].model_dump(mode="json", exclude={*config.rewards[name].own_files(), "licence"}),
                "weights": record["models"][name],
            }
            for name in weights
        },
        "inputs": record["inputs"],
        "versions": record["versions"],
    }


def execution_facts(tune: TuneConfig, split: int, device: torch.device) -> dict[str, Any]:
    """What changes a step's result by rounding only: ranks, device, threads, micro batches, kernels.

    split: the number that the micro batch was divided by for lack of memory, see `Progress`.
    """
    on_gpu = device.type == "cuda"
    return {
        "world_size": data_parallel.world_size(),
        "device": torch.cuda.get_device_name(device) if on_gpu else device.type,
        "cpu_threads": None if on_gpu else torch.get_num_threads(),
        "batch_size": tune.batch_size // split,
        "accumulation": tune.accumulation * split,
        **{name: getattr(tune, name) for name in sorted(EXECUTION_SETTINGS)},
    }


def describe_other_checkpoints(folder: Path, facts: Mapping[str, Any]) -> list[str]:
    """A line for each checkpoint of the same stage and mix made with other facts, the newest first.

    folder: of this run; those of the other runs lie beside it.
    """
    lines = []
    for path in sorted(folder.parent.glob(f"*/{FILE_NAME}"), key=lambda path: path.stat().st_mtime, reverse=True):
        if path.parent == folder or path.parent.suffix == FINISHED:
            continue
        try:
            step, other = read_facts(path)
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            lines.append(f"A checkpoint exists in {path.parent}, but cannot be read ({error}). It is kept")
            continue
        lines.append(
            f"A checkpoint of step {step} exists in {path.parent}, of a run with other settings: "
            f"{'; '.join(differences(other, facts))}. It is kept and not resumed: this run starts at step 0. To resume it set "
            "these back; delete the folder if you do not need it"
        )
    return lines
