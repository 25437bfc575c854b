"""What a person reads before deciding: metrics.json, grid.png, report.html. It shows, and passes no verdict.

The pages hold no date, no path and no link: the same scores and images give the same bytes.
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
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from textcraftor import pictures
from textcraftor.artifact import write_json
from textcraftor.errors import ModelError
from textcraftor.evaluate.claims import Counts
from textcraftor.evaluate.scores import DIVERSITY, ORACLE, Scores
from textcraftor.evaluate.statistics import TIE, prompt_means

GRID_PROMPTS = 12
EXTREMES = 6
BINS = 25  # odd: the middle bin holds "no change"
SHOWN = 256  # pixels; what the base keeps of its first image of every prompt, and what pages show


@dataclass(frozen=True)
class Evaluation:
    """Everything measured about one candidate.

    scores, base_scores: the tables, of the same prompts and noise.  metrics: of `statistics.compare`, with the names.
    images: (N, 3, H, W) uint8 in the table's order.  before: folder of the base's pictures, PROMPT_ID.png.
    claims, base_claims: of `claims.count_claims`, or None where no oracle judges.  judged_by: what each judge is,
    in words.
    """

    scores: Scores
    base_scores: Scores
    metrics: Mapping[str, Any]
    images: Tensor
    before: Path
    claims: Mapping[str, Counts] | None
    base_claims: Mapping[str, Counts] | None
    judged_by: Mapping[str, str]

    @property
    def is_base(self) -> bool:
        return self.scores.candidate == self.base_scores.candidate

    @cached_property
    def columns(self) -> tuple[str, ...]:
        return (*self.scores.judges, DIVERSITY)

    @cached_property
    def base_means(self) -> NDArray[np.float64]:
        """(P, columns): the base's mean of each prompt, in order of prompt_id."""
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
        """The judge by which best and worst prompts are told: the oracle, else the first that nobody trained on."""
        held_out = [name for name in self.scores.judges if name not in self.scores.trained_on]
        return ORACLE if ORACLE in self.scores.judges else [*held_out, self.scores.judges[0]][0]

    def after_picture(self, prompt_id: str) -> Image.Image:
        return pictures.picture(self.images[self.first_images[prompt_id][1]], SHOWN)

    def before_picture(self, prompt_id: str) -> Image.Image:
        if self.is_base:
            return self.after_picture(prompt_id)
        path = self.before / f"{prompt_id}.png"
        try:
            return Image.open(path).convert("RGB")
        except OSError:
            raise ModelError(
                f"{path}, the base's picture, is missing or damaged. Run `textcraftor evaluate --candidate base`"
            ) from None


def write_report(folder: Path, evaluation: Evaluation) -> None:
    """Fill `folder` with metrics.json, grid.png, report.html; claims.json where there are claims; the base's images."""
    folder.mkdir()
    write_json(folder / "metrics.json", evaluation.metrics)
    if evaluation.claims is not None:
        write_json(folder / "claims.json", evaluation.claims)
    if evaluation.is_base:
        (folder / "images").mkdir()
        for prompt_id in evaluation.first_images:
            pictures.save(evaluation.after_picture(prompt_id), folder / "images" / f"{prompt_id}.png")
    shown = list(evaluation.first_images)[:GRID_PROMPTS]
    pictures.save(_before_and_after(evaluation, shown), folder / "grid.png")
    (folder / "report.html").write_text(_html(evaluation, folder / "grid.png"), encoding="utf-8")


def _before_and_after(evaluation: Evaluation, prompt_ids: Sequence[str]) -> Image.Image:
    rows = {"base": [evaluation.before_picture(each) for each in prompt_ids]}
    if not evaluation.is_base:
        rows[evaluation.scores.candidate] = [evaluation.after_picture(each) for each in prompt_ids]
    return pictures.side_by_side([evaluation.first_images[each][0] for each in prompt_ids], rows)


def _html(evaluation: Evaluation, grid_path: Path) -> str:
    pages = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    worst, best = _extremes(evaluation)
    return pages.get_template("report.html.j2").render(
        name=evaluation.scores.candidate,
        is_base=evaluation.is_base,
        metrics=evaluation.metrics,
        images_per_prompt=len(evaluation.images) // evaluation.metrics["n_prompts"],
        rows=_table(evaluation),
        grid=_data_uri(grid_path.read_bytes()),
        grid_prompts=min(GRID_PROMPTS, len(evaluation.first_images)),
        histograms=[] if evaluation.is_base else _histograms(evaluation),
        claims=_claims(evaluation),
        focus=evaluation.focus,
        worst=worst,
        best=best,
        digest=evaluation.scores.digest,
        base_digest=evaluation.base_scores.digest,
        proof=evaluation.scores.proof,
    )


def _table(evaluation: Evaluation) -> list[dict[str, Any]]:
    """A row a judge, and the ends of its interval as places 0..1 on one common axis, in spreads of the base."""
    figures = {**evaluation.metrics["judges"], DIVERSITY: evaluation.metrics["diversity"]}
    # Judges have scales of their own; measured in the base's spread over prompts they share an axis.
    spreads = dict(zip(evaluation.columns, evaluation.base_means.std(0), strict=True))
    rows: list[dict[str, Any]] = []
    for name, values in figures.items():
        spread = float(spreads[name])
        ends = [values[key] / spread if spread > 0 else 0.0 for key in ("ci_low", "delta", "ci_high")]
        note = "trained on" if values.get("trained_on") else "" if name == DIVERSITY else "held out"
        rows.append({"name": name, "what": evaluation.judged_by[name], "note": note, "ends": ends, **values})
    reach = max(0.1, *(abs(end) for row in rows for end in row["ends"])) * 1.05
    for row in rows:
        row["low"], row["at"], row["high"] = ((end / reach + 1) / 2 for end in row["ends"])
    return rows


def _histograms(evaluation: Evaluation) -> list[dict[str, Any]]:
    """For each column how many prompts changed by how much; bins are symmetric around no change."""
    drawn = []
    for name, deltas in zip(evaluation.columns, evaluation.deltas.T, strict=True):
        reach = max(float(np.abs(deltas).max()), TIE)
        counts, _ = np.histogram(deltas, bins=BINS, range=(-reach, reach))
        better, worse = int((deltas > TIE).sum()), int((deltas < -TIE).sum())
        bars = [{"height": count / counts.max(), "side": np.sign(i - BINS // 2)} for i, count in enumerate(counts.tolist())]
        drawn.append(
            {
                "name": name,
                "reach": reach,
                "bars": bars,
                "better": better,
                "worse": worse,
                "same": len(deltas) - better - worse,
            }
        )
    return drawn


def _claims(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Shares of claims that hold, base against candidate; a row a kind of claim, then a row a language."""
    if evaluation.claims is None or evaluation.base_claims is None:
        return []
    return [
        {
            "name": name if axis == "kind" else f"all, {name} prompts",
            "of": count["of"],
            "base": _share(evaluation.base_claims[axis][name]),
            "candidate": _share(count),
        }
        for axis, names in evaluation.claims.items()
        for name, count in names.items()
    ]


def _share(count: Mapping[str, int]) -> float:
    return count["held"] / count["of"]


def _extremes(evaluation: Evaluation) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The prompts that lost most and won most under the focus judge, with both pictures; none that did not change."""
    if evaluation.is_base:
        return [], []
    deltas = evaluation.deltas[:, evaluation.columns.index(evaluation.focus)]
    change = list(zip(deltas.tolist(), sorted(evaluation.first_images), strict=True))
    worst = sorted(each for each in change if each[0] < -TIE)[:EXTREMES]
    best = sorted((each for each in change if each[0] > TIE), key=lambda each: (-each[0], each[1]))[:EXTREMES]
    return [_pair(evaluation, *each) for each in worst], [_pair(evaluation, *each) for each in best]


def _pair(evaluation: Evaluation, delta: float, prompt_id: str) -> dict[str, Any]:
    before, after = evaluation.before_picture(prompt_id), evaluation.after_picture(prompt_id)
    return {
        "prompt": evaluation.first_images[prompt_id][0],
        "delta": delta,
        "before": _data_uri(_png(before)),
        "after": _data_uri(_png(after)),
    }


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
