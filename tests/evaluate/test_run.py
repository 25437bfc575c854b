"""Complete evaluations, of a random diffusion model and of rendered scenes."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image
from transformers import CLIPTextModel

from tests.evaluate.conftest import PROMPTS, write_curated, write_params
from tests.machines import browser
from tests.machines.browser import needs_browser
from textcraftor.artifact import digest
from textcraftor.cache.prepare import prepare
from textcraftor.candidate import Candidate
from textcraftor.config import load
from textcraftor.errors import ModelError, PromptError, RewardError
from textcraftor.evaluate import evaluate
from textcraftor.evaluate.generation import plan
from textcraftor.evaluate.run import measure
from textcraftor.evaluate.scores import Scores
from textcraftor.rewards import load_reward

CPU = torch.device("cpu")


def run(config, root, name, images, **changes):
    """Measure given images as if the candidate had generated them."""
    folder = root / "data/encoders" / name / "text_encoder"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    model = Candidate(name, None if name == "base" else folder)
    base = None if name == "base" else Scores.read(root / "data/scores/base.parquet")
    load_judge = changes.get("load") or (lambda judge: load_reward(judge, config.rewards[judge]))
    return measure(config, model, root, plan(config, root), images, base, load_judge)


def page(report):
    return (report / "report.html").read_text(encoding="utf-8")


def test_a_better_candidate_gets_better_figures(config, root, good, poor):
    base = run(config, root, "base", poor)
    report = run(config, root, "balanced", good)
    metrics = json.loads((report / "metrics.json").read_text())
    assert (metrics["candidate"], metrics["base"], metrics["n_prompts"]) == ("balanced", "base", PROMPTS)
    assert list(metrics["judges"]) == ["bright", "heldout", "oracle"]
    assert set(metrics["judges"]["oracle"]) == {
        "mean", "base_mean", "delta", "ci_low", "ci_high", "win_rate", "trained_on",
    }  # fmt: skip
    assert metrics["judges"]["oracle"]["ci_low"] > 0.1
    assert metrics["judges"]["bright"]["trained_on"]
    assert not metrics["judges"]["heldout"]["trained_on"]
    assert set(metrics["diversity"]) >= {"mean", "base_mean", "ratio"}
    scores = Scores.read(root / "data/scores/balanced.parquet")
    assert scores.trained_on == ("bright",)
    assert scores.proof["judge_weights"]["heldout"]["digest"] == "made-up/heldout"
    assert "trained_weights" not in scores.proof  # nothing in the candidate's folder says it, and the gate will
    assert scores.digest == Candidate.find("balanced", root).digest
    assert scores.proof["inputs"]["text_encoder"] == digest(root / "data/encoders/balanced/text_encoder")
    assert sorted(path.name for path in report.iterdir()) == ["claims.json", "grid.png", "metrics.json", "report.html"]
    assert len(list((base / "images").iterdir())) == PROMPTS


def test_the_base_is_compared_with_itself(config, root, good):
    report = run(config, root, "base", good)
    metrics = json.loads((report / "metrics.json").read_text())
    for figures in (*metrics["judges"].values(), metrics["diversity"]):
        assert (figures["delta"], figures["ci_low"], figures["ci_high"], figures["win_rate"]) == (0, 0, 0, 0.5)
    assert "against base" not in page(report)


def test_the_report_shows_both_sides(config, root, good, poor):
    run(config, root, "base", poor)
    html = page(run(config, root, "balanced", good))
    assert "balanced" in html
    assert "against base" in html
    assert "no prompt became worse" in html
    assert html.count("<rect") == 25 * 4  # a histogram for each judge and for diversity
    assert "Its pictures show" in html and "Nothing that was measured is worse than the base." in html
    assert "plain prompts" in html
    assert "rich prompts" in html
    assert "the oracle ticks" in html
    green = [31, 122, 77]
    assert (np.asarray(Image.open(root / "data/reports/balanced/grid.png")) == green).all(2).any()
    assert not re.search(r"(src|href)=\"(?!data:image/png;base64,)", html), "a report needs nothing beside itself"
    worse = page(run(config, root, "balanced", (poor.float() * 0).to(torch.uint8)))
    assert "no prompt became better" in worse


@needs_browser
def test_nothing_in_the_report_is_cut_at_any_width(config, root, good, poor):
    run(config, root, "base", poor)
    report = run(config, root, "balanced", good)
    for measured in browser.measure(report / "report.html", *browser.WIDTHS):
        assert not measured["cut"] and measured["wide"] <= int(measured["width"]), measured
        assert measured["cells"] >= 4 * 6, "every judge's figures are in sight"


def test_prompts_are_escaped_in_the_report(root):
    images = torch.randint(0, 255, (6, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    write_curated(root, "heldout", ["<script>alert(1)</script>", "{{ 7 * 7 }} & co"])
    config = load(write_params(root, prompts=2, judges=["bright", "heldout"], heldout_judges=["heldout"]))
    run(config, root, "base", images)
    report = run(config, root, "balanced", images.flip(-1) // 2)
    assert "<script>" not in page(report)
    assert "&lt;script&gt;" in page(report)
    assert "{{ 7 * 7 }}" in page(report)
    assert not (report / "claims.json").exists()


def test_the_same_images_give_the_same_bytes(config, root, good, poor):
    run(config, root, "base", poor)
    first = digest(run(config, root, "balanced", good)), digest(root / "data/scores/balanced.parquet")
    second = digest(run(config, root, "balanced", good)), digest(root / "data/scores/balanced.parquet")
    assert first == second


def test_a_score_that_is_not_finite_leaves_no_files(config, root, good):
    def broken(name):
        judge = load_reward(name, config.rewards[name])
        judge.score = lambda images, text_features: torch.full((len(images),), float("nan"))
        return judge

    with pytest.raises(RewardError, match=r"'bright' gave nan for prompt"):
        run(config, root, "base", good, load=broken)
    assert not list((root / "data").glob("scores/*"))
    assert not list((root / "data").glob("reports/*"))


def test_missing_images_of_the_base_are_reported(config, root, good, poor):
    report = run(config, root, "base", poor)
    shutil.rmtree(report / "images")
    with pytest.raises(ModelError, match="--candidate base"):
        run(config, root, "balanced", good)
    assert not (root / "data/scores/balanced.parquet").exists()


@pytest.fixture
def workspace(root: Path, base_folder: Path) -> Path:
    """With a random pipeline as the base, a candidate that differs from it, and the prefix cache."""
    write_params(root, base={"path": str(base_folder), "resolution": 32})
    prepare(load(root / "params.yaml"), root, CPU)
    encoder = CLIPTextModel.from_pretrained(base_folder / "text_encoder")
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.2)
    encoder.save_pretrained(root / "data/encoders/balanced/text_encoder")
    return root


def test_from_weights_to_report(workspace):
    config = load(workspace / "params.yaml")
    assert evaluate(config, "base", workspace, CPU) == workspace / "data/reports/base"
    report = evaluate(config, "balanced", workspace, CPU)
    metrics = json.loads((report / "metrics.json").read_text())
    assert metrics["judges"]["heldout"]["delta"] != 0
    base, tuned = (Scores.read(workspace / f"data/scores/{name}.parquet") for name in ("base", "balanced"))
    assert base.table.select("prompt_id", "seed").equals(tuned.table.select("prompt_id", "seed"))
    assert base.digest == digest(Path(config.base.path))


def test_the_untuned_encoder_generates_the_images_of_the_base(workspace):
    config = load(workspace / "params.yaml")
    shutil.rmtree(workspace / "data/encoders/balanced/text_encoder")
    shutil.copytree(Path(config.base.path) / "text_encoder", workspace / "data/encoders/balanced/text_encoder")
    evaluate(config, "base", workspace, CPU)
    metrics = json.loads((evaluate(config, "balanced", workspace, CPU) / "metrics.json").read_text())
    for figures in (*metrics["judges"].values(), metrics["diversity"]):
        assert figures["delta"] == 0


def test_unknown_candidates_and_a_missing_base_are_refused(workspace):
    config = load(workspace / "params.yaml")
    with pytest.raises(ModelError, match=r"Unknown candidate 'balancd'.*Did you mean 'balanced'"):
        evaluate(config, "balancd", workspace, CPU)
    with pytest.raises(ModelError, match=r"base.parquet does not exist. Run `textcraftor evaluate --candidate base`"):
        evaluate(config, "balanced", workspace, CPU)


def test_a_base_evaluated_with_other_prompts_judges_or_chain_is_refused(workspace):
    config = load(workspace / "params.yaml")
    evaluate(config, "base", workspace, CPU)

    def changed(**sections):
        return load(workspace / "params.yaml", sections)

    with pytest.raises(ModelError, match="evaluated with another chain"):
        evaluate(changed(chain={"guidance_scale": 9.0}), "balanced", workspace, CPU)
    with pytest.raises(ModelError, match="evaluated with another judges"):
        evaluate(changed(rewards={"bright": {"version": "8"}}), "balanced", workspace, CPU)
    with pytest.raises(ModelError, match="evaluated with another judges"):
        evaluate(changed(evaluate={"judges": ["heldout", "oracle"]}), "balanced", workspace, CPU)
    with pytest.raises(PromptError, match="other prompts or noise"):
        evaluate(changed(evaluate={"images_per_prompt": 2}), "balanced", workspace, CPU)
    parquet = workspace / "data/scores/base.parquet"
    scores = Scores.read(parquet)
    scores.proof["inputs"]["base"] = "0" * 64
    scores.write(parquet)
    with pytest.raises(ModelError, match="another weights of base"):
        evaluate(config, "balanced", workspace, CPU)
    assert pl.read_parquet(parquet).height == scores.table.height


@pytest.mark.parametrize("field", ["head", "tokenizer"])
def test_the_proof_digests_every_file_of_a_judge(config, root, good, poor, field):
    """A judge's head or tokenizer may lie outside its folder; another one makes other scores."""
    (root / "made-up/bright").mkdir(parents=True)
    (root / "made-up/bright/weights").write_text("tower")
    (root / "files").write_text("first")
    config = load(root / "params.yaml", {"rewards": {"bright": {field: "files"}}})
    run(config, root, "base", poor)
    proof = Scores.read(root / "data/scores/base.parquet").proof["inputs"]
    assert proof["judge bright"] == digest(root / "made-up/bright")
    assert proof[f"judge bright {field}"] == digest(root / "files")
    before = Scores.read(root / "data/scores/base.parquet")
    (root / "files").write_text("second")
    run(config, root, "balanced", good)
    after = Scores.read(root / "data/scores/balanced.parquet")
    assert f"of the {field}" in str(after.judge_difference(before, "bright"))
    assert after.judge_difference(before, "heldout") is None
    with pytest.raises(ModelError, match=f"weights of judge bright {field}"):
        evaluate(config, "balanced", root, CPU)
