"""Settings of tuning, compared on development prompts: what each gains, and what its training costs.

    python -m benchmarks.tuning [benchmarks/tuning.yaml] [--mix balanced] [--seeds 1] [--jobs 2] [--out docs/tuning.md]

The YAML file has `all`, settings that every run has over params.yaml, and `settings`, more of them by the name of a run. Runs
the pipeline's own verbs; resumes like `benchmarks.seeds`. The settings that a profile ships are chosen here; its held-out
prompts are looked at once, afterwards.
"""

import argparse
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from benchmarks import seeds
from benchmarks.seeds import Run
from textcraftor.ablation import workspaces
from textcraftor.config import load, merge


def trainings(name: str, shared: Path, mix: str, count: int) -> list[Run]:
    """One run for each seed."""
    return [
        seeds.tune(f"{name} {seed}" if count > 1 else name, shared, mix, {"train": {"seed": seed}}, {}) for seed in range(count)
    ]


def compared(name: str, settings: Mapping[str, Any], options: argparse.Namespace) -> tuple[Run, list[Run]]:
    """The base and the runs of one setting, in workspaces whose name depends on everything that they read."""
    config, root = load(options.params, settings), options.params.parent
    mix = options.mix or config.mixes[0]
    folder = options.work / workspaces.key(config, root, mix)
    shared = seeds.prepare_shared(folder / "shared", options.params, {**settings, "mixes": [mix]})
    return seeds.read_base(shared), trainings(name, shared, mix, options.seeds)


def page(found: Mapping[str, tuple[Run, Sequence[Run]]], share: float = float("nan")) -> str:
    """A Markdown table for each setting, with a column for each seed."""
    parts = []
    for name, (base, runs) in found.items():
        seconds = [run.seconds for run in runs]
        parts += [f"## {name}", "", f"Training took {min(seconds):.0f} to {max(seconds):.0f} s of a processor.", ""]
        parts += [seeds.table(runs, base, [share] * len(runs)), ""]
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?", default=Path("benchmarks/tuning.yaml"))
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--mix", help="default: the first of params.yaml")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2, help="settings at a time")
    parser.add_argument("--work", type=Path, default=Path(".textcraftor/tuning"))
    parser.add_argument("--out", type=Path, help="file for the tables; they are printed in any case")
    options = parser.parse_args()
    written = yaml.safe_load(options.file.read_text(encoding="utf-8"))
    with ThreadPoolExecutor(options.jobs) as pool:  # each job waits for processes of its own
        pending = {
            name: pool.submit(compared, name, merge(dict(written.get("all", {})), settings), options)
            for name, settings in written["settings"].items()
        }
        found = {}
        for name, each in pending.items():
            found[name] = each.result()
            gains = ", ".join(f"{run.metrics['judges']['oracle']['delta']:+.4f}" for run in found[name][1])
            print(f"{name}: oracle {gains}", flush=True)
    text = page(found)
    print(f"\n{text}")
    if options.out:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
