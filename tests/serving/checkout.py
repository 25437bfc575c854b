"""A checkout of its own with a registry in it: versions of a tiny random model, judged by toys, signed, and promoted.

`textcraftor serve`, `mlflow.pyfunc.load_model` and `mlflow models serve` work in it as in the real one, in processes with
`environment(checkout)`.
"""

import contextlib
import json
import os
import runpy
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Final
from unittest import mock

import torch

from tasks import store
from tasks.champion import make_champion
from tasks.environment import sqlite_url
from tasks.gate import read_verdict
from tasks.registry import register
from tasks.tracking import track
from tasks.workspace import Workspace
from tests.fixtures import random_pipeline
from tests.flows.checkout import shell_environment
from tests.flows.project import ROOT, make_project
from tests.tasks.registered import MODEL
from textcraftor import training_proof
from textcraftor.candidate import Candidate
from textcraftor.config import load
from textcraftor.evaluate.provenance import scores_proof
from textcraftor.evaluate.scores import Scores
from textcraftor.evaluate.signed_scores import write_signed
from textcraftor.layout import STATE, encoder_folder, report_folder, scores_file
from textcraftor.models.saving import save_module
from textcraftor.signing import Keyring

SETTINGS: Final[dict[str, Any]] = {
    "mixes": ["balanced"],
    "base": {"path": "base", "resolution": 32},
    "chain": {"num_inference_steps": 4, "guidance_scale": 3.0},
    "sampler": {"switch_at": 0.0},  # so that two steps already show another encoder
    "train": {"steps": 200, "grad_steps": 1},
    "train_unet": {"grad_steps": 1},
    "evaluate": {"bootstrap": 300},
}


def make_checkout(folder: Path, versions: int = 1) -> Path:
    """A project with our library and tasks, and so many proven versions, of which the first is champion."""
    make_project(folder, **SETTINGS)
    for name in ("textcraftor", "tasks", "mlflow"):
        ignored = shutil.ignore_patterns("__pycache__", "policy")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored, dirs_exist_ok=True)
    shutil.copyfile(ROOT / "pyproject.toml", folder / "pyproject.toml")
    random_pipeline().save_pretrained(folder / "base")
    with in_registry(folder), contextlib.chdir(folder):
        for number in range(1, versions + 1):
            enter(folder, seed=number)
        make_champion(1, load("params.yaml"))
    return folder


@contextlib.contextmanager
def in_registry(checkout: Path) -> Any:
    """Let `tasks` in this process work on the checkout's registry."""
    uri = sqlite_url(checkout / STATE / "mlflow/mlflow.db")
    stores = mock.patch.multiple(store, ROOT=checkout, STORE=checkout / STATE / "mlflow")
    (checkout / STATE / "mlflow").mkdir(parents=True, exist_ok=True)
    with stores, mock.patch.dict(os.environ, MLFLOW_TRACKING_URI=uri):
        yield


def enter(checkout: Path, seed: int) -> int:
    """Tune the base's encoder at random, let the toys judge it, and register it; its version. Called in the checkout."""
    toy, config = runpy.run_path("toy.py"), load("params.yaml")
    for made in (encoder_folder("balanced"), report_folder("balanced"), report_folder("base")):
        shutil.rmtree(made, ignore_errors=True)
    toy["evaluate"]("base"), toy["train"]("balanced")
    tune(checkout, Path(encoder_folder("balanced")), seed)
    toy["evaluate"]("balanced")
    for name in ("base", "balanced"):  # the toys' scores do not name the base's files
        scores = Scores.read(scores_file(name))
        about = {**scores.proof, **scores_proof(config, Candidate.find(name, Path()), Path())}
        write_signed(replace(scores, proof=about), Path())
    toy["judge"]()
    workspace = Workspace(checkout)
    record = read_verdict.fn(workspace).records["balanced"]
    return register.fn("balanced", track.fn("balanced", record, workspace).run_id, record, workspace)


def tune(checkout: Path, folder: Path, seed: int) -> None:
    """Put a randomly changed copy of the base's encoder in the place of the toy's, as a training would sign it."""
    encoder = random_pipeline().text_encoder
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in encoder.parameters():
            weight += 0.3 * weight.std(correction=0) * torch.randn_like(weight)
    shutil.rmtree(folder / "text_encoder")
    save_module(encoder, folder / "text_encoder")
    rewards = json.loads((folder / "proof.json").read_text())["trained_weights"]
    training_proof.write(folder, ["text_encoder"], ["a small red circle"], rewards, Keyring(checkout))


def environment(checkout: Path) -> dict[str, str]:
    """The environment of a process that works in the checkout, with its library and its registry."""
    uri = sqlite_url(checkout / STATE / "mlflow/mlflow.db")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # of an activated environment: MLflow looks for uvicorn
    return shell_environment(
        PATH=path, PYTHONPATH=str(checkout), MLFLOW_TRACKING_URI=uri, MLFLOW_DISABLE_TELEMETRY="true", OMP_NUM_THREADS="1"
    )


__all__ = ["MODEL", "environment", "in_registry", "make_checkout"]
