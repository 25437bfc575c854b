"""The report on one candidate: metrics.json, grid.png, report.html. The verdict is the gate's.

Pages contain no date, path or link, so the same scores and images give the same bytes.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import polars as pl
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from textcraftor import pictures
from textcraftor.artifact import write_json
from textcraftor.config import MIN_PROMPTS
from textcraftor.errors import ModelError
from textcraftor.evaluate.baselines import Baselines
from textcraftor.evaluate.claims import Counts, tick_claims
from textcraftor.evaluate.figures import compare_claims, headline, interval, losses, number
from textcraftor.evaluate.scores import DIVERSITY, ORACLE, Scores
from textcraftor.evaluate.statistics import TIE, prompt_means
from textcraftor.layout import BASE

GRID_PROMPTS = 12
EXTREMES = 6
BINS = 25  # odd, so that the middle bin holds "no change"
PICTURE_SIZE = 256  # pixels, in pages and of the base's images kept for later comparison


@dataclass(frozen=True)
class Evaluation:
    """Everything measured about one candidate.

    scores, base_scores: tables of the same prompts and noise.  metrics: result of `statistics.compare`, with both names.
    images: (N, 3, H, W) uint8 in the table's order.  base_images: folder of the base's images, PROMPT_ID.png.
    claims, base_claims: results of `claims.count_claims`, or None where the oracle does not judge.
    judge_descriptions: what each column is, in words.  baselines: the cheap rivals, where they were drawn.
    """

    scores: Scores
    base_scores: Scores
    metrics: Mapping[str, Any]
    images: Tensor
    base_images: Path
    claims: Mapping[str, Counts] | None
    base_claims: Mapping[str, Counts] | None
    judge_descriptions: Mapping[str, str]
    baselines: Baselines | None = None

    @property
    def is_base(self) -> bool:
        return self.scores.candidate == self.base_scores.candidate

    @cached_property
    def columns(self) -> tuple[str, ...]:
        return (*self.scores.judges, DIVERSITY)

    @cached_property
    def base_means(self) -> NDArray[np.float64]:
        """(P, columns): the base's mean for each prompt, sorted by prompt_id."""
        return prompt_means(self.base_scores.table, self.columns)

    @cached_property
    def deltas(self) -> NDArray[np.float64]:
        """(P, columns): candidate minus base."""
        return prompt_means(self.scores.table, self.columns) - self.base_means

    @cached_property
    def first_images(self) -> dict[str, tuple[str, int]]:
        """prompt_id -> (prompt, row of its first image), in the order of the table."""
        rows = self.scores.table.with_row_index("row").filter(image_index=0)
        return {key: (prompt, row) for key, prompt, row in rows.select("prompt_id", "prompt", "row").iter_rows()}

    @property
    def focus(self) -> str:
        """The judge that ranks the best and worst prompts: the oracle, else the first judge that was not trained on."""
        held_out = [name for name in self.scores.judges if name not in self.scores.trained_on]
        return ORACLE if ORACLE in self.scores.judges else [*held_out, self.scores.judges[0]][0]

    def after_picture(self, prompt_id: str) -> Image.Image:
        return pictures.picture(self.images[self.first_images[prompt_id][1]], PICTURE_SIZE)

    def before_picture(self, prompt_id: str) -> Image.Image:
        if self.is_base:
            return self.after_picture(prompt_id)
        path = self.base_images / f"{prompt_id}.png"
        try:
            return Image.open(path).convert("RGB")
        except OSError:
            raise ModelError(
                f"{path}, the base's picture, is missing or damaged. Run `textcraftor evaluate --candidate base`"
            ) from None


def write_report(folder: Path, evaluation: Evaluation) -> None:
    """Write metrics.json, grid.png and report.html to `folder`; claims.json if there are claims, and the base's images."""
    folder.mkdir()
    write_json(folder / "metrics.json", evaluation.metrics)
    if evaluation.claims is not None:
        write_json(folder / "claims.json", evaluation.claims)
    if evaluation.is_base and evaluation.baselines:
        evaluation.baselines.write(folder)
    if rivals := _rivals(evaluation):
        write_json(folder / "rivals.json", rivals)
    if evaluation.is_base:
        (folder / "images").mkdir()
        for prompt_id in evaluation.first_images:
            pictures.save(evaluation.after_picture(prompt_id), folder / "images" / f"{prompt_id}.png")
    prompt_ids = list(evaluation.first_images)[:GRID_PROMPTS]
    pictures.save(_before_and_after(evaluation, prompt_ids), folder / "grid.png")
    (folder / "report.html").write_text(_html(evaluation), encoding="utf-8")


def _before_and_after(evaluation: Evaluation, prompt_ids: Sequence[str]) -> Image.Image:
    prompts = [evaluation.first_images[each][0] for each in prompt_ids]
    columns = [_first_pictures(evaluation, each) for each in prompt_ids]
    # A rival that was drawn for some of these prompts only is in the report, and has no row here.
    shown = [label for label in columns[0] if all(label in column for column in columns)]
    rows = {label: [column[label] for column in columns] for label in shown}
    ticks = None
    if evaluation.claims is not None:
        ticks = {label: _ticks(prompts, images) for label, images in rows.items()}
    return pictures.side_by_side(prompts, rows, ticks)


def _first_pictures(evaluation: Evaluation, prompt_id: str) -> dict[str, Image.Image]:
    """A prompt's first image by each model: base, cheap rivals where they were drawn for this prompt, candidate."""
    images = {BASE: evaluation.before_picture(prompt_id)}
    drawn = evaluation.baselines.pictures if evaluation.baselines else {}
    images |= {name: of_prompts[prompt_id] for name, of_prompts in drawn.items() if prompt_id in of_prompts}
    return images if evaluation.is_base else {**images, evaluation.scores.candidate: evaluation.after_picture(prompt_id)}


def _html(evaluation: Evaluation) -> str:
    pages = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    worst, best = _extremes(evaluation)
    first = [_pair(evaluation, None, prompt_id) for prompt_id in list(evaluation.first_images)[:GRID_PROMPTS]]
    claims = compare_claims(evaluation.claims, evaluation.base_claims)
    return pages.get_template("report.html.j2").render(
        name=evaluation.scores.candidate,
        is_base=evaluation.is_base,
        metrics=evaluation.metrics,
        images_per_prompt=len(evaluation.images) // evaluation.metrics["n_prompts"],
        rows=_table(evaluation),
        first=first,
        grid_prompts=len(first),
        histograms=[] if evaluation.is_base else _histograms(evaluation),
        claims=claims,
        rivals=_rivals(evaluation),
        headline=headline(evaluation.metrics, claims),
        losses=losses(evaluation.metrics, claims),
        focus=evaluation.focus,
        worst=worst,
        best=best,
        digest=evaluation.scores.digest,
        base_digest=evaluation.base_scores.digest,
        proof=evaluation.scores.proof,
        min_prompts=MIN_PROMPTS,
    )


def _table(evaluation: Evaluation) -> list[dict[str, Any]]:
    """A row for each judge, with its interval as positions 0..1 on an axis in standard deviations of the base."""
    figures = {**evaluation.metrics["judges"], DIVERSITY: evaluation.metrics["diversity"]}
    # Judges have different scales; the base's standard deviation over prompts is a common unit.
    spreads = dict(zip(evaluation.columns, evaluation.base_means.std(0), strict=True))
    rows: list[dict[str, Any]] = []
    for name, values in figures.items():
        spread = float(spreads[name])
        ends = [values[key] / spread if spread > 0 else 0.0 for key in ("ci_low", "delta", "ci_high")]
        note = "trained on" if values.get("trained_on") else "" if name == DIVERSITY else "held out"
        shown = {
            "base": number(values["base_mean"], values),
            "mean": number(values["mean"], values),
            "delta": number(values["delta"], values, signed=True),
            "interval": interval(values),
        }
        rows.append(
            {"name": name, "what": evaluation.judge_descriptions[name], "note": note, "ends": ends, "shown": shown, **values}
        )
    reach = max(0.1, *(abs(end) for row in rows for end in row["ends"])) * 1.05
    for row in rows:
        row["low"], row["at"], row["high"] = ((end / reach + 1) / 2 for end in row["ends"])
    return rows


def _histograms(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Histogram of the change over prompts for each column; bins are symmetric around no change."""
    histograms = []
    for name, deltas in zip(evaluation.columns, evaluation.deltas.T, strict=True):
        reach = max(float(np.abs(deltas).max()), TIE)
        counts, _ = np.histogram(deltas, bins=BINS, range=(-reach, reach))
        better, worse = int((deltas > TIE).sum()), int((deltas < -TIE).sum())
        bars = [{"height": count / counts.max(), "side": np.sign(i - BINS // 2)} for i, count in enumerate(counts.tolist())]
        histograms.append(
            {
                "name": name,
                "reach": reach,
                "bars": bars,
                "better": better,
                "worse": worse,
                "same": len(deltas) - better - worse,
            }
        )
    return histograms


def _rivals(evaluation: Evaluation) -> dict[str, Any]:
    """Means of the held-out judges over the first image of the first prompts: base, each cheap rival, candidate.

    {prompts, guidance: {best, tried, chosen_by}, judges: {JUDGE: {MODEL: mean}}}; empty where no rivals were drawn.
    """
    drawn = evaluation.baselines
    if drawn is None or not drawn.names:
        return {}
    judges = [name for name in drawn.table.columns if name in evaluation.scores.judges]
    sides = {BASE: evaluation.base_scores.table, evaluation.scores.candidate: evaluation.scores.table}
    keys = drawn.table["prompt_id"].unique()
    means = {name: table.filter(pl.col("prompt_id").is_in(keys.implode()), image_index=0) for name, table in sides.items()}

    def of(judge: str) -> dict[str, float]:
        ours = {name: float(table[judge].to_numpy().mean()) for name, table in means.items()}
        return {BASE: ours.pop(BASE), **drawn.means(judge), **ours}

    guidance = {"best": drawn.guidance_scale, "tried": drawn.tried, "chosen_by": drawn.chosen_by}
    return {"prompts": len(keys), "guidance": guidance, "judges": {judge: of(judge) for judge in judges}}


def _extremes(evaluation: Evaluation) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The prompts that lost and gained most under the focus judge, with both images; without those that did not change."""
    if evaluation.is_base:
        return [], []
    deltas = evaluation.deltas[:, evaluation.columns.index(evaluation.focus)]
    change = list(zip(deltas.tolist(), sorted(evaluation.first_images), strict=True))
    worst = sorted(each for each in change if each[0] < -TIE)[:EXTREMES]
    best = sorted((each for each in change if each[0] > TIE), key=lambda each: (-each[0], each[1]))[:EXTREMES]
    return [_pair(evaluation, *each) for each in worst], [_pair(evaluation, *each) for each in best]


def _pair(evaluation: Evaluation, delta: float | None, prompt_id: str) -> dict[str, Any]:
    """A prompt's first image by each model. delta: the candidate's change under the focus judge, None where none is shown."""
    images, prompt = _first_pictures(evaluation, prompt_id), evaluation.first_images[prompt_id][0]
    ticks = _ticks([prompt] * len(images), list(images.values())) if evaluation.claims is not None else [()] * len(images)
    return {
        "prompt": prompt,
        "delta": delta,
        "shown": "" if delta is None else number(delta, evaluation.metrics["judges"][evaluation.focus], signed=True),
        "images": [
            {"model": model, "source": _data_uri(_png(image)), "ticks": each}
            for (model, image), each in zip(images.items(), ticks, strict=True)
        ],
    }


def _ticks(prompts: Sequence[str], images: Sequence[Image.Image]) -> Sequence[Sequence[pictures.Tick]]:
    """The claims of each prompt, and whether its image holds them."""
    return tick_claims(pictures.to_tensor(images), prompts)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
