"""One candidate, from its weights to the report: draw, judge, compare, show."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch import Tensor

from textcraftor.artifact import base_identity, proof, written_aside
from textcraftor.cache.prepare import read_heldout_latents
from textcraftor.candidate import Candidate
from textcraftor.chain.sampler import Sampler
from textcraftor.config import MATRIX, BaseConfig, Config, Section
from textcraftor.distributed import data_parallel
from textcraftor.errors import ModelError, PromptError, unknown
from textcraftor.evaluate.batches import Batches
from textcraftor.evaluate.claims import Counts, count_claims
from textcraftor.evaluate.generation import draw, plan
from textcraftor.evaluate.judging import score
from textcraftor.evaluate.report import Evaluation, write_report
from textcraftor.evaluate.scores import DIVERSITY, ORACLE, Scores
from textcraftor.evaluate.statistics import compare
from textcraftor.layout import BASE, HELDOUT_PROMPTS, report_folder, scores_file
from textcraftor.models.base import load_base, load_candidate
from textcraftor.rewards import Reward, load_reward


def evaluate(config: Config, candidate: str, root: Path, device: torch.device) -> Path:
    """Evaluate `base`, or a candidate against it, on the same prompts and noise.

    Writes data/scores/CANDIDATE.parquet and data/reports/CANDIDATE (metrics.json, grid.png, report.html, in the tiny
    world claims.json), and returns the report's folder.  The base comes first: every other candidate is compared with
    its scores and pictures.  Under `torchrun` the processes divide the images among them, to draw and to judge; the
    first of them compares and writes.

    Raises ModelError for an unknown candidate, one that was not trained, or when the base's evaluation is missing;
    PromptError when the base was evaluated on other prompts, and with fewer than two prompts.
    """
    if candidate not in (BASE, *config.candidates):
        raise ModelError(unknown("candidate", candidate, (BASE, *config.candidates)))
    device = data_parallel.start(device)
    rows = plan(config, root)
    batches = Batches(rows.height, config.evaluate.batch_size)
    base = None if candidate == BASE else _base_scores(config, root, rows)
    model = Candidate.find(candidate, root)
    images = _draw(config, model, root, rows, device, batches)
    return measure(config, model, root, rows, images, base, lambda name: _judge(config, name, root, device), device, batches)


def measure(
    config: Config,
    model: Candidate,
    root: Path,
    rows: pl.DataFrame,
    images: Tensor,
    base: Scores | None,
    load: Callable[[str], Reward],
    device: torch.device | str = "cpu",
    batches: Batches | None = None,
) -> Path:
    """Score, compare and report the images of one candidate; `base` is None for the base itself.

    images: (N, 3, H, W) uint8 in the order of `rows`; of several processes, each has those of its `batches`.
    load: a judge by its name.
    """
    settings, report = config.evaluate, root / report_folder(model.name)
    batches = batches or Batches(rows.height, settings.batch_size)
    table, images = score(images, rows, settings, load, device, batches), batches.collect(images)
    if batches.work.rank > 0:
        batches.work.barrier()
        return report
    scores = Scores(
        candidate=model.name,
        digest=model.digest or base_identity(config.base, root),
        judges=settings.judges,
        trained_on=_trained_on(config, model),
        proof=_proof(config, model, root),
        table=table,
    )
    against = base or scores
    figures = compare(scores.table, against.table, settings.judges, scores.trained_on, settings)
    claims = None
    if ORACLE in settings.judges:
        claims = count_claims(images, rows["prompt"].to_list(), settings.batch_size)
    evaluation = Evaluation(
        scores=scores,
        base_scores=against,
        metrics={"candidate": model.name, "base": BASE, **figures},
        images=images,
        before=root / report_folder(BASE) / "images",
        claims=claims,
        base_claims=claims if base is None or claims is None else _base_claims(root),
        judged_by=_judged_by(config),
    )
    with written_aside(report) as aside:
        write_report(aside, evaluation)
        scores.write(root / scores_file(model.name))
    batches.work.barrier()
    return report


def _draw(config: Config, model: Candidate, root: Path, rows: pl.DataFrame, device: torch.device, batches: Batches) -> Tensor:
    """Every image of the plan, or this process's; the models are gone from memory when the judges come."""
    latents = read_heldout_latents(config, root)
    sampler = Sampler(load_base(config.base.at(root), device), config.chain, config.sampler.switch_at)
    tuned = load_candidate(model, sampler.base)
    return draw(
        rows,
        lambda prompts, seeds, where: sampler.generate(prompts, seeds, tuned, latents[where]),
        batches,
    )


def _judge(config: Config, name: str, root: Path, device: torch.device) -> Reward:
    return load_reward(name, config.rewards[name].at(root), device)


def _trained_on(config: Config, model: Candidate) -> tuple[str, ...]:
    """The rewards of the candidate's mix, and the judges that are the same reward on another scale."""
    rewards = {name for name, weight in config.mix.get(model.mix, {}).items() if weight}
    scales = {judge for judge in config.evaluate.judges if judge.endswith(MATRIX) and judge.removesuffix(MATRIX) in rewards}
    return tuple(sorted(rewards | scales))


def _comparable(config: Config) -> dict[str, Any]:
    """What must be alike for two candidates' scores to be comparable."""
    judges: dict[str, Any] = {name: ORACLE for name in config.evaluate.judges if name == ORACLE}
    for name in {*config.evaluate.judges, config.evaluate.diversity_judge} - {ORACLE}:
        judges[name] = config.rewards[name.removesuffix(MATRIX)].model_dump(mode="json")
    return {
        "base": config.base.model_dump(mode="json"),
        "chain": config.chain.model_dump(mode="json"),
        "sampler": config.sampler.model_dump(mode="json"),
        "judges": dict(sorted(judges.items())),
        "diversity_judge": config.evaluate.diversity_judge,
    }


def _proof(config: Config, model: Candidate, root: Path) -> dict[str, Any]:
    """The proof of a table of scores; weights that are no local path are named by the configuration alone."""
    judges = {name: config.rewards[name.removesuffix(MATRIX)] for name in _comparable(config)["judges"] if name != ORACLE}
    models: dict[str, Section] = {"base": config.base, **{f"judge {name}": reward for name, reward in judges.items()}}
    paths = {"prompts": root / HELDOUT_PROMPTS, **model.parts}
    for label, section in models.items():
        for field, path in section.at(root).own_files().items():
            paths[label if field == "path" else f"{label} {field}"] = Path(path)
    present = {name: path for name, path in paths.items() if path.exists()}
    return proof({**_comparable(config), "evaluate": config.evaluate}, present, config.evaluate.seed)


def _base_scores(config: Config, root: Path, rows: pl.DataFrame) -> Scores:
    """The base's scores, if they can be compared with: same prompts, noise, chain, judges. Asked before any drawing."""
    scores = Scores.read(root / scores_file(BASE))
    again = "Run `textcraftor evaluate --candidate base` again"
    if not scores.table.select(rows.columns).equals(rows):
        raise PromptError(f"The base was evaluated on other prompts or noise. {again}")
    now = _proof(config, Candidate(BASE), root)
    then = scores.proof
    # Settings that came after these scores hold their defaults in them.
    then["config"]["base"] = BaseConfig.model_validate(then["config"]["base"]).model_dump(mode="json")
    differing = [part for part in _comparable(config) if then["config"].get(part) != now["config"][part]]
    differing += [f"weights of {name}" for name, digest in now["inputs"].items() if then["inputs"].get(name) != digest]
    if differing:
        raise ModelError(f"The base was evaluated with another {', '.join(differing)}. {again}")
    return scores


def _base_claims(root: Path) -> dict[str, Counts]:
    path = root / report_folder(BASE) / "claims.json"
    try:
        claims: dict[str, Counts] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ModelError(f"{path} is missing or damaged. Run `textcraftor evaluate --candidate base` again") from None
    return claims


def _judged_by(config: Config) -> dict[str, str]:
    """What each column is, in words: a score without its version means nothing."""
    words = {ORACLE: "share of the prompt's claims that hold"}
    for name in config.evaluate.judges:
        if name != ORACLE:
            reward = config.rewards[name.removesuffix(MATRIX)]
            kind = "" if reward.kind == name else reward.kind
            scale = "mean over all prompts" if name.endswith(MATRIX) else ""
            words[name] = " ".join(part for part in (kind, reward.version, scale) if part)
    words[DIVERSITY] = f"mean distance between images of one prompt, by {config.evaluate.diversity_judge}"
    return words
