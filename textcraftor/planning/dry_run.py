"""A dry run of training: print the plan and run one batch, to see that the run fits and learns before it costs hours."""

import time
from pathlib import Path

import torch
from rich.console import Console

from textcraftor.chain.sampler import Sampler
from textcraftor.config import Config
from textcraftor.errors import TrainingError
from textcraftor.fetch import missing_files
from textcraftor.models.base import TunedModel, load_base
from textcraftor.planning.plan import gigabytes, peak_memory, plan, some_prompts, table, truncated_tokens
from textcraftor.prompts.table import noise_seed, prompt_id
from textcraftor.rewards import RewardMix, load_rewards
from textcraftor.training.acceleration import accelerate
from textcraftor.training.data import Batch
from textcraftor.training.objective import Objective
from textcraftor.training.optimizer import adamw
from textcraftor.training.stages import encoder_parts, in_one_module
from textcraftor.training.start import find_start


def dry_run(config: Config, mix: str, root: Path, device: torch.device) -> bool:
    """Print the plan of `train --mix MIX`, then train on one micro batch. Nothing is written or kept.

    Returns whether the batch was run, which it is not when weights are missing.
    Raises ConfigError for an unknown mix, ModelError for weights that do not load, TrainingError when the loss or its
    gradient is not finite or does not reach the text encoder.
    """
    console = Console(width=None if Console().is_terminal else 120, highlight=False)
    made = plan(config, mix, root)
    if made is None:
        console.print(f"The architecture of {config.base.path} is unknown until it is fetched, so nothing is estimated.")
    else:
        console.print(table(made, truncated_tokens(config, root), device))
    absent = missing_files(config, root)
    if absent:
        console.print(
            f"No batch was run: {absent[0].path} and {len(absent) - 1} more files are missing. "
            f"Get them with `textcraftor fetch --profile {config.profile}`."
        )
        return False
    console.print(one_batch(config, mix, root, device))
    return True


def one_batch(config: Config, mix: str, root: Path, device: torch.device) -> str:
    """Run forward, backward and an optimiser step on one micro batch; returns a line on time, memory and gradient."""
    tune = config.train
    weights = {name: weight for name, weight in config.mix[mix].items() if weight}
    distinct, source = some_prompts(config, root, tune.batch_size // tune.images_per_prompt)
    prompts = [prompt for prompt in distinct for _ in range(tune.images_per_prompt)]
    base = load_base(config.base.at(root), device)
    parts = encoder_parts(base, tune, find_start(config, mix, root))
    module = in_one_module(parts)
    rewards = load_rewards(config.at(root).rewards, weights, device, tune.reward_dtype)
    features = {name: reward.text_features(prompts) for name, reward in rewards.items()}
    for reward in rewards.values():
        reward.drop_text_tower()
    sampler = Sampler(base, config.train_chain, config.train.switch_at)
    accelerate(sampler, [base.pipe.vae, base.pipe.unet], tune)
    seeds = [noise_seed(prompt_id(prompt), number) for number, prompt in enumerate(prompts)]
    batch, tuned = Batch(prompts, sampler.prefix(prompts, seeds), features), TunedModel(**parts)
    objective = Objective(base, sampler, RewardMix(rewards, weights), tune)
    optimizer = adamw(module, tune, tune.negative_learning_rate)
    started = time.monotonic()
    values = objective.backward(batch, tuned, 0)
    norm = float(torch.nn.utils.clip_grad_norm_(module.parameters(), tune.max_grad_norm))
    optimizer.step()
    seconds = time.monotonic() - started
    if not 0 < norm < float("inf"):
        raise TrainingError(f"The gradient norm is {norm}, so nothing would be learnt. Check the rewards: {_describe(values)}")
    return (
        f"One micro batch of {len(prompts)} ({source}) in {seconds:.1f} s, peak memory {gigabytes(peak_memory(device))}: "
        f"gradient norm {norm:.3e}, {_describe(values)}. Nothing was kept."
    )


def _describe(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in values.items())
