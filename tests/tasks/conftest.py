"""Fixtures of the registry's tests: toy projects up to the gate."""

import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tasks import store as registry_store
from tasks.registry import promote
from tasks.workspace import Workspace
from tests.flows.project import make_project
from tests.tasks.registered import CHAMPION, WORSE, enter
from textcraftor.config import Config
from textcraftor.layout import KEYS, POLICIES

STAGES = """
import os, runpy, sys
for folder in sys.argv[1:]:
    os.chdir(folder)
    toy = runpy.run_path("toy.py")
    toy["evaluate"]("base"), toy["train"]("balanced"), toy["evaluate"]("balanced"), toy["judge"]()
"""


QUICK = {"evaluate": {"bootstrap": 300}}  # resamples; each verification judges again


def judge_projects(root: Path, steps: Iterable[int]) -> dict[int, Path]:
    """Toy projects in `root` run up to the gate, by train.steps. They share one key and one policy, those of `root`."""
    projects = {each: make_project(root / str(each), mixes=["balanced"], **QUICK, train={"steps": each}) for each in steps}
    for project in projects.values():
        (project / KEYS).parent.mkdir(exist_ok=True)
        (project / KEYS).symlink_to(root / KEYS)
    (root / KEYS).mkdir(parents=True)
    shutil.copytree(next(iter(projects.values())) / POLICIES, root / POLICIES)
    subprocess.run([sys.executable, "-c", STAGES, *map(str, projects.values())], check=True)
    return projects


@pytest.fixture(scope="session")
def judged(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Toy projects run up to the gate, by train.steps: the higher, the better the models."""
    return judge_projects(tmp_path_factory.mktemp("judged"), (1, 200, 300))


@pytest.fixture(scope="module")
def two_versions(
    tmp_path_factory: pytest.TempPathFactory, empty_store: Path, judged: dict[int, Path]
) -> Iterator[tuple[Path, dict[int, Workspace]]]:
    """A store whose version 1 is better than version 2, and a copy of the artifacts to restore them from."""
    home = tmp_path_factory.mktemp("versions")
    shutil.copyfile(empty_store, home / "mlflow.db")
    workspaces = {steps: Workspace(folder) for steps, folder in judged.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{home / 'mlflow.db'}")
        patch.setattr(registry_store, "STORE", home / "store")
        patch.setattr(registry_store, "ROOT", judged[1].parent)
        assert [enter(workspaces[300]), enter(workspaces[200])] == [CHAMPION, WORSE]
        shutil.copytree(home / "store", home / "backup")
        copy_database(home / "mlflow.db", home / "backup.db")
        yield home, workspaces


@pytest.fixture
def before(two_versions: tuple[Path, dict[int, Workspace]]) -> MlflowClient:
    """The store as it was when both were registered, nothing promoted and nothing downloaded."""
    home, _ = two_versions
    for name in ("store", "models"):
        shutil.rmtree(home / name, ignore_errors=True)
    shutil.copytree(home / "backup", home / "store")
    copy_database(home / "backup.db", home / "mlflow.db")
    return registry_store.client()


@pytest.fixture
def store(before: MlflowClient, config: Config) -> MlflowClient:
    """The same with version 1 the champion."""
    assert promote.fn(CHAMPION, config).verdict == "promoted"
    return before


def copy_database(source: Path, target: Path) -> None:
    """Copy a database into one that MLflow has open."""
    with sqlite3.connect(source, timeout=10) as read, sqlite3.connect(target, timeout=10) as written:
        read.backup(written)
    read.close()
    written.close()


@pytest.fixture
def config(two_versions: tuple[Path, dict[int, Workspace]]) -> Config:
    """With a margin that version 2 does not reach against version 1."""
    plain = two_versions[1][300].config
    return plain.model_copy(update={"gate": plain.gate.model_copy(update={"champion_margin": {"oracle": 0.02}})})
