"""Evaluation of one candidate: generate images, score them, compare with the base, write the report."""

import json
from collections.abc import Callable
from pathlib import Path

import polars as pl
import torch
from torch import Tensor

from textcraftor.artifact import base_identity, written_aside
from textcraftor.cache.prepare import read_heldout_latents
from textcraftor.candidate import Candidate
from textcraftor.chain.sampler import Sampler
from textcraftor.config import MATRIX, ORACLE_JUDGES, BaseConfig, Config
from textcraftor.distributed import data_parallel
from textcraftor.errors import ModelError, PromptError, unknown
from textcraftor.evaluate.baselines import Baselines, draw
from textcraftor.evaluate.batches import Batches
from textcraftor.evaluate.claims import Counts, count_claims
from textcraftor.evaluate.generation import generate_images, plan
from textcraftor.evaluate.judging import score
from textcraftor.evaluate.provenance import comparable_settings, scores_proof, trained_on, weights_record
from textcraftor.evaluate.report import GRID_PROMPTS, Evaluation, write_report
from textcraftor.evaluate.scores import DIVERSITY, ORACLE, Scores
from textcraftor.evaluate.signed_scores import write_signed
from textcraftor.evaluate.statistics import compare
from textcraftor.layout import BASE, report_folder, scores_file
from textcraftor.models.base import load_base
from textcraftor.models.blended import load_model
from textcraftor.rewards import Reward, load_reward


def evaluate(config: Config, candidate: str, root: Path, device: torch.device) -> Path:
    """Evaluate `base`, or a candidate against it, on the same prompts and noise.

    Writes data/scores/CANDIDATE.parquet with its signature, and data/reports/CANDIDATE (metrics.json, grid.png, report.html,
    and in the tiny world claims.json); returns the report's folder.  The base must be evaluated first: candidates are
    compared with its scores and images.  Under `torchrun` the processes share generation and scoring; rank 0 compares and
    writes.

    Raises ModelError for an unknown or untrained candidate, or when the base's evaluation is missing;
    PromptError when the base was evaluated on other prompts, and with fewer than two prompts.
    """
    if candidate not in (BASE, *config.candidates):
        raise ModelError(unknown("candidate", candidate, (BASE, *config.candidates)))
    device = data_parallel.start(device)
    rows = plan(config, root)
    batches = Batches(rows.height, config.evaluate.batch_size)
    base = None if candidate == BASE else _base_scores(config, root, rows)
    model = Candidate.find(candidate, root)
    images = _generate(config, model, root, rows, device, batches)

    def load(name: str) -> Reward:
        return _judge(config, name, root, device)

    baselines = None
    if base is None and config.evaluate.baseline_prompts and batches.work.rank == 0:
        baselines = draw(config, root, load_base(config.base.at(root), device), rows, GRID_PROMPTS, load, device)
    return measure(config, model, root, rows, images, base, load, device, batches, baselines)


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
    baselines: Baselines | None = None,
) -> Path:
    """Score the images of one candidate, compare them with the base's and write the report.

    images: (N, 3, H, W) uint8 in the order of `rows`; with several processes, those of this process's `batches`.
    base: the base's scores; None when the candidate is the base.  load: returns a judge by name.  baselines: drawn with the
    base, whose report keeps them for the candidates' reports.
    """
    settings, report = config.evaluate, root / report_folder(model.name)
    batches = batches or Batches(rows.height, settings.batch_size)
    images = batches.collect(images)
    table = score(images, rows, settings, load, device, batches)
    if batches.work.rank > 0:
        batches.work.barrier()
        return report
    proof = {**scores_proof(config, model, root), **weights_record(config, model, root)}
    scores = Scores(
        candidate=model.name,
        digest=model.digest or base_identity(config.base, root),
        judges=settings.judges,
        trained_on=trained_on(config, model, proof),
        proof=proof,
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
        base_images=root / report_folder(BASE) / "images",
        claims=claims,
        base_claims=claims if base is None or claims is None else _base_claims(root),
        judge_descriptions=_judge_descriptions(config),
        baselines=baselines if base is None else Baselines.read(root / report_folder(BASE)),
    )
    with written_aside(report) as aside:
        write_report(aside, evaluation)
        write_signed(scores, root)
    batches.work.barrier()
    return report


def _generate(
    config: Config, model: Candidate, root: Path, rows: pl.DataFrame, device: torch.device, batches: Batches
) -> Tensor:
    """Every image of the plan, or this process's. The models are freed on return, before any judge is loaded."""
    latents = read_heldout_latents(config, root)
    sampler = Sampler(load_base(config.base.at(root), device), config.chain, config.sampler.switch_at)
    tuned = load_model(model, sampler.base)
    return generate_images(
        rows,
        lambda prompts, seeds, indices: sampler.generate(prompts, seeds, tuned, latents[indices]),
        batches,
    )


def _judge(config: Config, name: str, root: Path, device: torch.device) -> Reward:
    return load_reward(name, config.rewards[name].at(root), device)


def _base_scores(config: Config, root: Path, rows: pl.DataFrame) -> Scores:
    """The base's scores, checked before any image is generated: same prompts, noise, chain and judges as configured now."""
    scores = Scores.read(root / scores_file(BASE))
    again = "Run `textcraftor evaluate --candidate base` again"
    if not scores.table.select(rows.columns).equals(rows):
        raise PromptError(f"The base was evaluated on other prompts or noise. {again}")
    now, then = scores_proof(config, Candidate(BASE), root), scores.proof
    # Settings added since these scores were made count as their defaults.
    then["config"]["base"] = BaseConfig.model_validate(then["config"]["base"]).model_dump(mode="json")
    differing = [part for part in comparable_settings(config) if then["config"].get(part) != now["config"][part]]
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


def _judge_descriptions(config: Config) -> dict[str, str]:
    """A description of each column, with the judge's version: scores of different versions are not comparable."""
    descriptions = dict(ORACLE_JUDGES)
    for name in config.evaluate.judges:
        if name not in ORACLE_JUDGES:
            reward = config.rewards[name.removesuffix(MATRIX)]
            kind = "" if reward.kind == name else reward.kind
            scale = "mean over all prompts" if name.endswith(MATRIX) else ""
            descriptions[name] = " ".join(part for part in (kind, reward.version, scale) if part)
    descriptions[DIVERSITY] = f"mean distance between images of one prompt, by {config.evaluate.diversity_judge}"
    return descriptions
