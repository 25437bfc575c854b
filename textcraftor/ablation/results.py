"""What came out of a table's rows, as one JSON record that the page and the plots are made from."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from textcraftor.ablation import workspaces
from textcraftor.ablation.plan import ABLATED, Job, Planned
from textcraftor.config import Config
from textcraftor.layout import encoder_folder

Record = dict[str, Any]
RECORD: Final = "table.json"


def record(name: str, planned: Sequence[Planned], config: Config) -> Record:
    """The record of a table.

    {table, profile, mix, steps, images_per_step, prompts, images_per_prompt, heldout_judges, collapse, seconds, rows:
    [{label, facts, judges, diversity, training_seconds, history}]}.  judges, diversity: as in metrics.json.
    seconds: of a processor, of all jobs, including those that other tables share.  history: column -> values, step by step.
    """
    jobs = {job.folder: job for each in planned for job in each.jobs}
    rows = [_row(each) for each in planned]
    return {
        "table": name,
        "profile": config.profile,
        "mix": config.mixes[0],
        "steps": config.ablation.steps,
        "images_per_step": config.ablation.batch_size or config.train.batch_size * config.train.accumulation,
        "prompts": rows[0]["prompts"],
        "images_per_prompt": config.ablation.images_per_prompt,
        "heldout_judges": list(config.evaluate.heldout_judges),
        "collapse": config.ablation.collapse,
        "seconds": round(sum(map(_seconds, jobs.values()))),
        "rows": rows,
    }


def _row(planned: Planned) -> Record:
    metrics = json.loads((planned.report / "metrics.json").read_text(encoding="utf-8"))
    history = planned.training.folder / encoder_folder(ABLATED) / "history.csv" if planned.training else None
    return {
        "label": planned.row.label,
        "facts": dict(planned.row.facts),
        "is_base": planned.row.trained is None,
        "prompts": metrics["n_prompts"],
        "judges": metrics["judges"],
        "diversity": metrics["diversity"],
        "training_seconds": round(_seconds(planned.training)) if planned.training else 0,
        "history": _columns(history) if history and history.is_file() else {},
    }


def _seconds(job: Job) -> float:
    return sum(workspaces.read_seconds(job.folder).values())


def _columns(path: Path) -> dict[str, list[float]]:
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows] for name in rows[0] if all(row[name] for row in rows)}
