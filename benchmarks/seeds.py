"""What tuning gains over several seeds at the shipped settings, and whether the gate's verdict depends on rounding.

    python -m benchmarks.seeds [--mix balanced] [--seeds 5] [--kernels] [--jobs 2] [--out docs/seeds.md]

Runs the pipeline's own verbs. Prompts, prefixes and the base's scores are made once; each seed is a training of its own
(`train.seed`: order of the prompts, random draws), evaluated and gated like any candidate. --kernels trains the first seed
again with other rounding: two threads instead of one, and the vector instructions of older processors. Everything is kept in
--work, under a name that depends on settings and weights: the same command resumes, and prints what is done so far.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from textcraftor.ablation import workspaces
from textcraftor.chain.sampler import Sampler
from textcraftor.config import Config, load, written
from textcraftor.device import choose_device
from textcraftor.evaluate.batches import Batches
from textcraftor.evaluate.generation import from_bytes, generate_images, plan
from textcraftor.evaluate.scores import Scores
from textcraftor.layout import BASE, GATE_RECORD, KEYS, report_folder, scores_file
from textcraftor.models.base import load_base
from textcraftor.tiny.language import reword
from textcraftor.tiny.oracle import Oracle

SHARED = (
    "profiles",
    "data/prompts",
    "data/latents",
    "data/tiny",
    "data/sources",
    f"data/reports/{BASE}",
    f"data/scores/{BASE}.parquet",
    f"data/scores/{BASE}.dsse.json",
    str(KEYS),
)
# Other rounding: name -> (settings, environment).
KERNELS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "2 threads": ({"cpu_threads": 2}, {}),
    "AVX2 kernels": ({}, {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}),
    "SSE4 kernels": (
        {},
        {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    ),
}


@dataclass(frozen=True)
class Run:
    """One training, evaluated: its metrics.json, its claims.json, its rules from gate.json, and its scores.

    seconds: of a processor, that the training took.
    """

    name: str
    metrics: Mapping[str, Any]
    claims: Mapping[str, Mapping[str, Mapping[str, int]]]
    rules: Sequence[Mapping[str, Any]]
    scores: pl.DataFrame
    seconds: float = float("nan")


def prepare_shared(folder: Path, params: Path, settings: Mapping[str, Any] | None = None) -> Path:
    """The workspace that all runs share: curated prompts, prefixes, the base's scores. Returns its folder.

    settings: over those of `params`.
    """
    links = {name: params.parent / name for name in ("data/tiny", "data/sources", "profiles")}
    path = workspaces.make(folder, written(params), settings or {}, links)
    if not (folder / scores_file(BASE)).exists():
        for verb in (["curate"], ["prepare"], ["evaluate", "--candidate", BASE]):
            workspaces.run(path, *verb)
    return folder


def read_base(shared: Path) -> Run:
    """The base's own figures and scores in a shared workspace."""
    report = shared / report_folder(BASE)
    claims, metrics = (json.loads((report / f"{each}.json").read_text(encoding="utf-8")) for each in ("claims", "metrics"))
    return Run(BASE, metrics, claims, (), Scores.read(shared / scores_file(BASE)).table)


def tune(name: str, shared: Path, mix: str, settings: Mapping[str, Any], environment: Mapping[str, str]) -> Run:
    """Train, evaluate and gate one run, as far as that is not done yet."""
    folder = shared.parent / name.replace(" ", "-")
    links = {each: shared / each for each in SHARED}
    params = workspaces.make(folder, written(shared / "params.yaml"), {"mixes": [mix], **settings}, links)
    if not (folder / GATE_RECORD).exists():
        seconds = workspaces.run(params, "train", "--mix", mix, environment=environment)
        (folder / "seconds").write_text(str(seconds))
        for verb in (["evaluate", "--candidate", mix], ["gate"]):
            workspaces.run(params, *verb, environment=environment)
    report = folder / report_folder(mix)
    metrics, claims = (json.loads((report / f"{each}.json").read_text(encoding="utf-8")) for each in ("metrics", "claims"))
    rules = json.loads((folder / GATE_RECORD).read_text(encoding="utf-8"))["candidates"][mix]["rules"]
    seconds = float((folder / "seconds").read_text())
    return Run(name, metrics, claims, rules, Scores.read(folder / scores_file(mix)).table, seconds)


def score_reworded(shared: Path, config: Config) -> pl.DataFrame:
    """The oracle's scores of what the base draws for the reworded prompts, one image a prompt: prompt_id, reworded.

    Each image is scored by the original prompt, and starts from the noise of that prompt's first image.
    """
    path = shared / "reworded.parquet"
    if not path.exists():
        rows = plan(config, shared).filter(image_index=0)
        sampler = Sampler(
            load_base(config.base.at(shared), choose_device("cpu", config.cpu_threads)), config.chain, config.sampler.switch_at
        )
        plain = rows.with_columns(pl.Series("prompt", [reword(prompt) for prompt in rows["prompt"]]))
        images = generate_images(
            plain, lambda prompts, seeds, _: sampler.generate(prompts, seeds), Batches(rows.height, config.evaluate.batch_size)
        )
        reworded = pl.Series("reworded", Oracle().score(from_bytes(images), rows["prompt"].to_list()).double().numpy())
        rows.select("prompt_id").with_columns(reworded).write_parquet(path)
    return pl.read_parquet(path)


def recovered(run: Run, base: pl.DataFrame, reworded: pl.DataFrame) -> float:
    """The share of what rewording gains that tuning gains, by the oracle, over the first image of each prompt."""
    first = run.scores.filter(image_index=0).select("prompt_id", tuned="oracle")
    joined = first.join(base.filter(image_index=0).select("prompt_id", base="oracle"), on="prompt_id")
    means = joined.join(reworded, on="prompt_id").select("tuned", "base", "reworded").mean().row(0)
    tuned, untuned, plain = means
    return (tuned - untuned) / (plain - untuned) if plain > untuned else float("nan")


def table(runs: Sequence[Run], base: Run, shares: Sequence[float]) -> str:
    """A Markdown table with a row for each figure and a column for each run, in points of 100 where it is a share."""
    figures: dict[str, list[str]] = {}
    judges = runs[0].metrics["judges"]

    def points(value: float) -> str:
        return f"{100 * value:+.1f}"

    def add(name: str, cell: Callable[[Run], str], of: Callable[[Run], float]) -> None:
        values = [of(run) for run in runs]
        mean, spread = np.mean(values), np.std(values, ddof=1) if len(values) > 1 else float("nan")
        figures[name] = [*map(cell, runs), f"{mean:+.4g}", f"{spread:.3g}"]

    for judge in [name for name in judges if name.startswith("oracle") or not judges[name]["trained_on"]]:
        scale = 100 if judge == "oracle" else 1

        def change(run: Run, judge: str = judge, scale: int = scale) -> str:
            values = run.metrics["judges"][judge]
            return f"{scale * values['delta']:+.3g} [{scale * values['ci_low']:+.3g}, {scale * values['ci_high']:+.3g}]"

        unit = " (points)" if scale == 100 else ""
        add(f"{judge}{unit}", change, lambda run, judge=judge, scale=scale: scale * run.metrics["judges"][judge]["delta"])
    add(
        "diversity, ratio",
        lambda run: f"{run.metrics['diversity']['ratio']:.3f}",
        lambda run: run.metrics["diversity"]["ratio"],
    )
    for axis, names in base.claims.items():
        for name, count in names.items():
            before = count["held"] / count["of"]
            label = f"{name} prompts" if axis == "language" else name

            def gain(run: Run, axis: str = axis, name: str = name, before: float = before) -> float:
                after = run.claims[axis][name]
                return 100 * (after["held"] / after["of"] - before)

            add(f"{label} (base {before:.3f})", lambda run, gain=gain: points(gain(run) / 100), gain)
    by_name = dict(zip([run.name for run in runs], shares, strict=True))
    add("share of rewording's gain", lambda run: f"{by_name[run.name]:.0%}", lambda run: by_name[run.name])
    head = ["", *(run.name for run in runs), "mean", "spread"]
    rows = [head, ["---"] + ["---:"] * (len(head) - 1), *([name, *cells] for name, cells in figures.items())]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def margins(seeds: Sequence[Run], kernels: Sequence[Run]) -> str:
    """A Markdown table of the gate's rules: how far the seeds stay from the bound, in spreads over seeds and over kernels.

    A spread is the standard deviation over the runs; over kernels, the first seed's own run is one of them.
    """
    lines = [
        "| rule | bound | mean | least | spread, seeds | spread, kernels | margin / larger spread |",
        "|---|" + "---:|" * 6,
    ]
    for number, rule in enumerate(seeds[0].rules):
        if rule["metric"] == "held_out" or any(run.rules[number]["value"] is None for run in seeds):
            continue
        over_seeds = [float(run.rules[number]["value"]) for run in seeds]
        over_kernels = [over_seeds[0], *(float(run.rules[number]["value"]) for run in kernels)]
        spreads = [float(np.std(each, ddof=1)) if len(each) > 1 else float("nan") for each in (over_seeds, over_kernels)]
        margin = (np.mean(over_seeds) - rule["bound"]) / np.nanmax(spreads) if np.isfinite(spreads).any() else float("nan")
        cells = [f"{rule['bound']:.3g}", f"{np.mean(over_seeds):.4f}", f"{min(over_seeds):.4f}", *(f"{s:.4f}" for s in spreads)]
        lines.append(f"| {rule['rule']} | " + " | ".join([*cells, f"{margin:.1f}"]) + " |")
    return "\n".join(lines)


def page(seeds: Sequence[Run], kernels: Sequence[Run], base: Run, reworded: pl.DataFrame, mix: str) -> str:
    """The Markdown page: gains by seed, then the margins of the gate."""
    runs = [*seeds, *kernels]
    shares = [recovered(run, base.scores, reworded) for run in runs]
    passed = sum(all(rule["passed"] for rule in run.rules) for run in runs)
    prompts = runs[0].metrics["n_prompts"]
    text = [
        f"# `{mix}` over {len(seeds)} seeds",
        "",
        f"Change against the base on {prompts} held-out prompts, with the 95 % interval over prompts. Claims in points, as the "
        "oracle reads them. Spread: standard deviation over seeds.",
        "",
        table(seeds, base, shares[: len(seeds)]),
        "",
        f"The gate passes {passed} of {len(runs)} runs. Margin: from the mean to the bound.",
        "",
        margins(seeds, kernels),
    ]
    if kernels:
        text += ["", f"The first seed with other rounding, beside {seeds[0].name}:", ""]
        text += [table([seeds[0], *kernels], base, [shares[0], *shares[len(seeds) :]])]
    return "\n".join(text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--mix", help="default: the first of params.yaml")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--kernels", action="store_true")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time")
    parser.add_argument("--work", type=Path, default=Path(".textcraftor/seeds"))
    parser.add_argument("--out", type=Path, help="file for the tables; they are printed in any case")
    options = parser.parse_args()
    if options.seeds < 1 or options.jobs < 1:
        parser.error(f"--seeds {options.seeds} --jobs {options.jobs}: both must be at least 1")
    config, root = load(options.params), options.params.parent
    mix = options.mix or config.mixes[0]
    shared = prepare_shared(options.work / workspaces.key(config, root, mix) / "shared", options.params)
    jobs: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
        f"seed {seed}": ({"train": {"seed": seed}}, {}) for seed in range(options.seeds)
    }
    if options.kernels:
        jobs |= {name: ({"train": {"seed": 0}, **settings}, environment) for name, (settings, environment) in KERNELS.items()}
    with ThreadPoolExecutor(options.jobs) as pool:  # each job waits for processes of its own
        pending = {name: pool.submit(tune, name, shared, mix, *job) for name, job in jobs.items()}
        reworded = score_reworded(shared, load(shared / "params.yaml"))
        runs = []
        for name, each in pending.items():
            runs.append(each.result())
            print(f"{name}: oracle {runs[-1].metrics['judges']['oracle']['delta']:+.4f}", flush=True)
    text = page(runs[: options.seeds], runs[options.seeds :], read_base(shared), reworded, mix)
    print(f"\n{text}")
    if options.out:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
