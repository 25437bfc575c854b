"""The cheap rivals of tuning: what the base alone draws at its best guidance scale, and for reworded prompts.

A gain over the base that a rival reaches for nothing is no gain of tuning. Guidance alone moves preference judges
(GA-Eval, arXiv 2602.22570), and rewording is the paper's prompt engineering, known exactly in the tiny world. The rivals are
drawn once, when the base is evaluated, on the first held-out prompts, one image each: a few images beside the evaluation's.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import torch
from PIL import Image
from torch import Tensor

from textcraftor import pictures
from textcraftor.artifact import write_json
from textcraftor.chain.sampler import Sampler
from textcraftor.config import Config
from textcraftor.evaluate.batches import Batches
from textcraftor.evaluate.generation import generate_images
from textcraftor.evaluate.judging import judge_images
from textcraftor.evaluate.scores import ORACLE
from textcraftor.layout import TRAIN_PROMPTS
from textcraftor.models.base import Base
from textcraftor.prompts.table import read_prompts
from textcraftor.rewards import Reward
from textcraftor.tiny.language import reword

REWORDED = "reworded"
FOLDER = "baselines"  # in the base's report


@dataclass(frozen=True)
class Baselines:
    """Scores and pictures of the rivals.

    table: prompt_id, baseline, and a column for each held-out judge; the first image of each prompt.
    pictures: baseline -> prompt_id -> picture, of the first prompts.
    guidance_scale: the best of those tried.  tried: scale -> mean score on train prompts.  chosen_by: the judge of that score.
    """

    table: pl.DataFrame
    pictures: dict[str, dict[str, Image.Image]]
    guidance_scale: float
    tried: dict[str, float]
    chosen_by: str

    @property
    def names(self) -> list[str]:
        """The rivals, in the order of their drawing. The base's own guidance scale is no rival when it is the best."""
        return self.table["baseline"].unique(maintain_order=True).to_list()

    def write(self, folder: Path) -> None:
        """Write table, pictures and choice to `folder`/baselines."""
        (folder / FOLDER).mkdir()
        self.table.write_parquet(folder / FOLDER / "scores.parquet")
        write_json(
            folder / FOLDER / "guidance.json", {"best": self.guidance_scale, "tried": self.tried, "chosen_by": self.chosen_by}
        )
        for name, of_prompts in self.pictures.items():
            (folder / FOLDER / name).mkdir()
            for prompt_id, picture in of_prompts.items():
                pictures.save(picture, folder / FOLDER / name / f"{prompt_id}.png")

    @classmethod
    def read(cls, folder: Path) -> "Baselines | None":
        """What `write` wrote to the base's report; None where no rivals were drawn."""
        if not (folder / FOLDER).is_dir():
            return None
        table = pl.read_parquet(folder / FOLDER / "scores.parquet")
        choice = json.loads((folder / FOLDER / "guidance.json").read_text(encoding="utf-8"))
        images = {
            name: {path.stem: Image.open(path).convert("RGB") for path in sorted((folder / FOLDER / name).glob("*.png"))}
            for name in table["baseline"].unique(maintain_order=True)
        }
        return cls(table, images, choice["best"], choice["tried"], choice["chosen_by"])

    def means(self, judge: str) -> dict[str, float]:
        """Mean of a judge over the prompts, for each rival."""
        grouped = self.table.group_by("baseline", maintain_order=True).agg(pl.col(judge).mean())
        return dict(grouped.iter_rows())


def draw(
    config: Config, root: Path, base: Base, rows: pl.DataFrame, shown: int, load: Callable[[str], Reward], device: torch.device
) -> Baselines:
    """Choose the guidance scale on train prompts, then draw and judge the rivals on held-out ones.

    rows: the evaluation's plan.  shown: prompts whose pictures are kept.  load: returns a judge by name.
    """
    settings = config.evaluate
    judges = [name for name in settings.judges if name == ORACLE or name in settings.heldout_judges] or [config.gate.rank_by]
    rows = rows.filter(image_index=0).head(settings.baseline_prompts)
    best, tried = best_guidance(config, root, base, load, device)
    drawn: dict[str, tuple[float, pl.DataFrame]] = {}
    if best != config.chain.guidance_scale:
        drawn[f"guidance {best:g}"] = (best, rows)
    if config.prompts.world == "tiny":
        plain = pl.Series("prompt", [reword(prompt) for prompt in rows["prompt"]])
        drawn[REWORDED] = (config.chain.guidance_scale, rows.with_columns(plain))
    tables, images = [], {}
    schema: dict[str, pl.DataType] = {name: pl.Float64() for name in judges}
    for name, (scale, asked) in drawn.items():
        made = _generate(config, base, scale, asked)
        # Judged by what was asked for, whatever the base was told.
        columns = judge_images(made, rows["prompt"].to_list(), judges, load, device, settings.batch_size)
        series = [pl.Series(judge, columns[judge].numpy(), pl.Float64) for judge in judges]
        tables.append(rows.select("prompt_id", pl.lit(name).alias("baseline")).with_columns(series))
        ids = rows["prompt_id"].head(shown)
        images[name] = {key: pictures.picture(image, pictures.CELL) for key, image in zip(ids, made[:shown], strict=True)}
    empty = pl.DataFrame(schema={"prompt_id": pl.String(), "baseline": pl.String(), **schema})
    return Baselines(pl.concat([empty, *tables]), images, best, tried, _chosen_by(config))


def best_guidance(
    config: Config, root: Path, base: Base, load: Callable[[str], Reward], device: torch.device
) -> tuple[float, dict[str, float]]:
    """(the best guidance scale for the base, scale -> mean score), on train prompts: half as many as the rivals are drawn on.

    The oracle chooses where it judges, else the judge that the gate ranks by. Among equals the configured scale wins.
    """
    judge = _chosen_by(config)
    rows = read_prompts(root / TRAIN_PROMPTS, ["prompt", "seed"]).head(max(1, config.evaluate.baseline_prompts // 2))
    scales = dict.fromkeys((config.chain.guidance_scale, *config.evaluate.guidance_scales))
    prompts, tried = rows["prompt"].to_list(), {}
    for scale in scales:
        images = _generate(config, base, scale, rows)
        score = judge_images(images, prompts, [judge], load, device, config.evaluate.batch_size)[judge]
        tried[scale] = float(score.mean())
    return max(tried, key=lambda scale: tried[scale]), {f"{scale:g}": value for scale, value in tried.items()}


def _chosen_by(config: Config) -> str:
    return ORACLE if ORACLE in config.evaluate.judges else config.gate.rank_by


def _generate(config: Config, base: Base, guidance_scale: float, rows: pl.DataFrame) -> Tensor:
    """The base's images of rows with prompt and seed: (N, 3, H, W) uint8."""
    chain = config.chain.model_copy(update={"guidance_scale": guidance_scale})
    sampler = Sampler(base, chain, config.sampler.switch_at)

    def generate(prompts: Sequence[str], seeds: Sequence[int], _: slice) -> Tensor:
        return sampler.generate(prompts, seeds)

    return generate_images(rows, generate, Batches(rows.height, config.evaluate.batch_size))
