"""A gate record made by the gate stage is proven as it stands, and no falsified one is."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import yaml

from tasks.evidence import assemble, certify, identity
from tasks.gate import read_verdict
from tasks.workspace import Workspace
from textcraftor import training_proof
from textcraftor.candidate import Candidate
from textcraftor.errors import Unproven
from textcraftor.evaluate.gate import gate
from textcraftor.evaluate.scores import Scores
from textcraftor.evaluate.signed_scores import write_signed
from textcraftor.layout import BASE, encoder_folder, report_folder, unet_folder
from textcraftor.prompts.table import prompt_id
from textcraftor.signing import Keyring
from textcraftor.trust.policy import Policy
from textcraftor.trust.statement import BASE_SCORES, SCORES
from textcraftor.trust.verifier import verify

PROMPTS, IMAGES = 32, 2
TRAINED = {"clip": {"digest": "c" * 64, "largest": []}}


def scores(name: str, digest: str, gain: float) -> Scores:
    """A candidate's scores: the base's plus `gain`."""
    noise = np.random.default_rng(0).normal(0, 0.1, PROMPTS * IMAGES)
    prompts = [f"prompt {row}" for row in range(PROMPTS) for _ in range(IMAGES)]
    table = pl.DataFrame(
        {
            "prompt_id": [prompt_id(prompt) for prompt in prompts],
            "prompt": prompts,
            "seed": range(len(prompts)),
            "image_index": list(range(IMAGES)) * PROMPTS,
            "heldout": noise + gain,
            "oracle": noise + gain,
            "diversity": 0.5,
        }
    )
    weights = {
        "config": {"diversity_judge": "layout"},
        "judge_weights": {name: {"digest": digest * 64, "largest": []} for name, digest in (("heldout", "b"), ("layout", "d"))},
        "trained_weights": TRAINED,
    }
    return Scores(name, digest, ("heldout", "oracle"), ("clip",), {"inputs": {}, **weights}, table)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace with the scores of the base, of `balanced`, which passes, and of `aesthetic`, which does not."""
    root = tmp_path_factory.mktemp("gated")
    rules = [
        {"judge": "oracle", "metric": "ci_low", "at_least": 0.05},
        {"judge": "diversity", "metric": "ratio", "at_least": 0.9},
    ]
    params = {
        "mixes": ["balanced", "aesthetic"],
        "evaluate": {"judges": ["heldout", "oracle"], "bootstrap": 100},
        "gate": {
            "rank_by": "heldout",
            "rules": rules,
        },
    }
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    workspace = Workspace(root)
    write_signed(scores(BASE, "", 0), root)
    for name, gain in (("balanced", 0.2), ("aesthetic", 0.01)):
        weights = root / encoder_folder(name) / "text_encoder"
        weights.mkdir(parents=True)
        (weights / "config.json").write_text("{}")
        (weights / "model.safetensors").write_text(f"weights of {name}")
        (weights.parent / "lora").mkdir()  # what train.method: lora leaves beside the merged weights
        (weights.parent / "lora/adapter_config.json").write_text("{}")
        (weights.parent / "proof.json").write_text("{}")
        training_proof.write(weights.parent, ["text_encoder"], ["another prompt"], TRAINED, Keyring(root))
        write_signed(scores(name, Candidate.find(name, root).digest, gain), root)
        (root / report_folder(name)).mkdir(parents=True)
    gate(workspace.config, root)
    policy = Policy.of(workspace.config, root)
    judges = {"judges": {"heldout": "b" * 64, "oracle": ""}, "diversity_judge": "d" * 64}
    pinned = policy.model_copy(update={"images_per_prompt": IMAGES, **judges})
    pinned.write(workspace.config.registry.name, "tiny", root)
    return workspace


def assembled(workspace: Workspace, name: str, folder: Path) -> Path:
    assemble(name, read_verdict.fn(workspace).records[name], workspace, folder)
    return folder


def test_the_evidence_of_a_unet_alone_has_no_encoder(workspace: Workspace, tmp_path: Path) -> None:
    """The UNet was tuned on the original encoder: the mix's own, which lies there too, is no part of the candidate."""
    root = tmp_path / "gated"
    shutil.copytree(workspace.folder, root)
    tuned, name = root / unet_folder("balanced"), "balanced-unet"
    for path, text in {"unet/config.json": "{}", "unet/model.safetensors": "weights", "grids/step_000000.png": ""}.items():
        (tuned / path).parent.mkdir(parents=True, exist_ok=True)
        (tuned / path).write_text(text)
    (tuned / "proof.json").write_text(json.dumps({"config": {"tune": {"encoder": "original"}}}))
    keyring = Keyring(root)
    training_proof.write(tuned, ["unet"], ["another prompt"], TRAINED, keyring)
    write_signed(scores(name, Candidate.find(name, root).digest, 0.2), root)
    (root / report_folder(name)).mkdir(parents=True)
    params = yaml.safe_load((root / "params.yaml").read_text())
    (root / "params.yaml").write_text(yaml.safe_dump({**params, "unet_mixes": ["balanced"]}))
    gate(Workspace(root).config, root)
    folder = assembled(Workspace(root), name, tmp_path / name)
    assert Candidate.at(folder).parts == {"unet": folder / "unet"} and not (folder / "text_encoder").exists()
    certify(folder, Workspace(root).config.registry.name, root)
    assert verify(folder, Workspace(root).config.registry.name, root).scores.candidate == name


def test_what_passes_the_policy_gets_a_statement_and_what_does_not_gets_none(workspace: Workspace, tmp_path: Path) -> None:
    verdict, model = read_verdict.fn(workspace), workspace.config.registry.name
    assert verdict.winner == "balanced"
    folder = assembled(workspace, "balanced", tmp_path / "balanced")
    statement = certify(folder, model, workspace.folder)
    assert statement.predicate["candidate"] == "balanced"
    assert verify(folder, model, workspace.folder).record["rules"] == verdict.records["balanced"]["rules"]
    failed = assembled(workspace, "aesthetic", tmp_path / "aesthetic")
    with pytest.raises(Unproven, match=r"aesthetic does not pass the policy of textcraftor-tiny \(oracle.ci_low\)"):
        certify(failed, model, workspace.folder)
    assert not (failed / "statement.dsse.json").exists()


def test_an_edited_gate_record_does_not_help(workspace: Workspace, tmp_path: Path) -> None:
    folder = assembled(workspace, "aesthetic", tmp_path / "aesthetic")
    record = json.loads((folder / "evidence/gate.json").read_text())
    for rule in record["rules"]:
        rule.update(passed=True, value=1.0)
    (folder / "evidence/gate.json").write_text(json.dumps({**record, "passed": True}))
    with pytest.raises(Unproven, match="does not pass the policy"):
        certify(folder, workspace.config.registry.name, workspace.folder)


@pytest.mark.parametrize("table", [SCORES, BASE_SCORES])
def test_edited_scores_do_not_help(workspace: Workspace, tmp_path: Path, table: str) -> None:
    """Edited in the workspace before the candidate is assembled, as with `dvc commit` of a table."""
    folder = assembled(workspace, "aesthetic", tmp_path / "aesthetic")
    edited, sign = Scores.read(folder / table), 1 if table == SCORES else -1
    replace(edited, table=edited.table.with_columns(pl.col("oracle") + sign)).write(folder / table)
    with pytest.raises(Unproven, match="was changed after it was signed"):
        certify(folder, workspace.config.registry.name, workspace.folder)


def test_identity_is_of_weights_values_and_verdict(workspace: Workspace, tmp_path: Path) -> None:
    folder = assembled(workspace, "balanced", tmp_path / "balanced")
    path = folder / "evidence/scores.parquet"
    written, key = Scores.read(path), identity(folder)
    replace(written, proof={"code_revision": "another"}).write(path)
    _edit_rule(folder, why="in other words")
    (folder / "evidence/report.html").write_text("another report")
    assert identity(folder) == key
    replace(written, table=written.table.with_columns(pl.col("oracle") + 1e-12)).write(path)
    assert identity(folder) != key
    written.write(path)
    assert identity(folder) == key
    for change in ({"bound": 0.04}, {"value": 0.3}, {"rule": "another"}, {"passed": False}):
        other = shutil.copytree(folder, tmp_path / f"other {next(iter(change))}")
        _edit_rule(other, **change)
        assert identity(other) != key, change


def _edit_rule(folder: Path, **changes: object) -> None:
    path = folder / "evidence/gate.json"
    record = json.loads(path.read_text())
    record["rules"][0].update(changes)
    path.write_text(json.dumps(record))
