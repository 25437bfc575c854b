"""Time and memory of one training step of Stable Diffusion 1.5 at full size on a CPU, with random weights.

    python -m textcraftor.bench.random_weights FOLDER
    python -m benchmarks.full_size_step FOLDER > docs/full-size.md

The paper's configuration for one prompt: DDIM, 25 steps, guidance 7.5, gradient through the last 5; PickScore, HPSv2,
aesthetic and CLIP in the mix. The step is that of training (`Objective.backward`), with gradient checkpointing in UNet and
autoencoder.
"""

import argparse
import contextlib
import copy
import ctypes
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from textcraftor.bench.random_weights import reward_configs
from textcraftor.chain.sampler import Sampler
from textcraftor.config import BaseConfig, ChainConfig, TuneConfig
from textcraftor.models.base import TunedModel, load_base
from textcraftor.rewards import Reward, RewardMix, load_reward
from textcraftor.training.data import Batch
from textcraftor.training.objective import Objective

PROMPT = "a lighthouse on a cliff at dusk, oil painting"
MIX = {"pickscore": 1.0, "hpsv2": 100.0, "aesthetic": 1.0, "clip": 100.0}  # the paper's weights
GIB = 2**30


class Ledger:
    """Wall-clock seconds, CPU seconds and peak memory in GiB of each part, printed to stderr as each ends."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, float, float, float]] = []

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak resident memory
        started, worked = time.monotonic(), time.process_time()
        yield
        ctypes.CDLL(None).malloc_trim(0)  # return freed memory, or it would count towards the next part
        self.rows.append((name, time.monotonic() - started, time.process_time() - worked, peak_memory()))
        print("{}: {:.1f} s, {:.1f} s of processor, peak {:.1f} GiB".format(*self.rows[-1]), file=sys.stderr, flush=True)

    @property
    def peak(self) -> float:
        return max(row[3] for row in self.rows)

    def markdown(self) -> str:
        rows = ["| {} | {:.1f} | {:.1f} | {:.1f} |".format(*row) for row in self.rows]
        return "\n".join(["| part | seconds | processor seconds | peak memory, GiB |", "|---|---:|---:|---:|", *rows])


def peak_memory() -> float:
    """Peak resident memory since the last reset, GiB."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024 / GIB


def load_rewards(folder: Path, dtype: torch.dtype, ledger: Ledger) -> tuple[dict[str, Reward], dict[str, Tensor]]:
    """The rewards without text towers, and the text features of the prompt, by name."""
    rewards, features = {}, {}
    for name, config in reward_configs(folder).items():
        with ledger.part(f"load {name}, encode the prompt, drop its text tower"):
            rewards[name] = load_reward(name, config, dtype=str(dtype).removeprefix("torch."))
            features[name] = rewards[name].text_features([PROMPT])
            rewards[name].drop_text_tower()
    return rewards, features


def run(folder: Path, dtype: torch.dtype, steps: int = 25, grad_steps: int = 5) -> tuple[Ledger, str]:
    """Run the step; returns the ledger and a summary of rewards and gradient."""
    ledger = Ledger()
    with ledger.part("load Stable Diffusion 1.5, copy the text encoder"):
        size = 64 if (folder / "clip/open_clip_model.safetensors").stat().st_size < GIB else 512
        config = BaseConfig(path=str(folder / "base"), resolution=size, vae_gradient_checkpointing=True)
        base = load_base(config, torch.device("cpu"))
        encoder = copy.deepcopy(base.text_encoder).float().requires_grad_(True)
        sampler = Sampler(base, ChainConfig(num_inference_steps=steps), 1 - grad_steps / steps)
    rewards, features = load_rewards(folder, dtype, ledger)
    with ledger.part(f"prefix: the first {steps - grad_steps} denoising steps (cached in a real run)"):
        prefix = sampler.prefix([PROMPT], [0])
    tune = TuneConfig(grad_steps=grad_steps, gradient_checkpointing=True)
    objective = Objective(base, sampler, RewardMix(rewards, MIX), tune)
    with ledger.part(f"the gradient: {grad_steps} denoising steps, autoencoder, rewards, and back to the text encoder"):
        values = objective.backward(Batch([PROMPT], prefix, features), TunedModel(encoder), 0)
    with ledger.part("AdamW"):
        optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-6, weight_decay=1e-2)
        norm = float(torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0))
        optimizer.step()
    frozen = [*base.pipe.unet.parameters(), *base.pipe.vae.parameters(), *base.text_encoder.parameters()]
    frozen += [parameter for reward in rewards.values() for parameter in reward.parameters()]
    assert all(parameter.grad is None for parameter in frozen)
    scores = ", ".join(f"{name} {values[name]:.4f}" for name in MIX)
    sizes = {
        "UNet": base.pipe.unet,
        "text encoder": encoder,
        "autoencoder": base.pipe.vae,
        **{f"{name} image tower": reward for name, reward in rewards.items()},
    }
    counts = ", ".join(f"{name} {sum(p.numel() for p in part.parameters()) / 1e6:,.0f} M" for name, part in sizes.items())
    return ledger, (
        f"Parameters: {counts}. Rewards (of random weights): {scores}. Gradient of the text encoder: norm {norm:.3e}, "
        f"{sum(p.grad is not None for p in encoder.parameters())} of {len(list(encoder.parameters()))} tensors; "
        "no frozen parameter received one."
    )


def page(ledger: Ledger, outcome: str, dtype: torch.dtype) -> str:
    return f"""# One training step at full size

Stable Diffusion 1.5, PickScore (ViT-H/14), HPSv2.1 (ViT-H-14), aesthetic (ViT-L/14) and CLIP (ViT-g-14), random weights
in the published architectures and file formats, on a CPU ({torch.get_num_threads()} threads, torch {torch.__version__}).
One prompt, 512 px, base and text encoder in fp32, reward towers in {str(dtype).removeprefix("torch.")}. Written by
`python -m benchmarks.full_size_step`.

**Peak memory {ledger.peak:.1f} GiB; {sum(row[1] for row in ledger.rows):.0f} seconds in all, of which the processor
worked {sum(row[2] for row in ledger.rows):.0f} (all threads together).**

{ledger.markdown()}

{outcome}
"""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("folder", type=Path, help="written by textcraftor.bench.random_weights")
    arguments.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="of the reward towers")
    given = arguments.parse_args()
    dtype = getattr(torch, given.dtype)
    ledger, outcome = run(given.folder, dtype)
    print(page(ledger, outcome, dtype))


if __name__ == "__main__":
    main()
