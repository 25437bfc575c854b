"""A run with the settings of params.yaml happens in the project, any other in a variant workspace."""

import json
from pathlib import Path

import pytest
import yaml
from prefect.logging import disable_run_logger

from tasks.stages import repro
from tasks.variants import open_workspace, stage_inputs
from tasks.workspace import Workspace
from tests.flows.project import make_project, stages_run
from textcraftor.artifact import digest
from textcraftor.config import PROFILES
from textcraftor.errors import ConfigError, PromptError


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return make_project(tmp_path / "project")


def tracked(project: Path) -> dict[str, str]:
    return {name: digest(project / name) for name in ("params.yaml", "dvc.yaml", "toy.py")}


def test_unchanged_settings_run_in_the_project(project: Path) -> None:
    assert open_workspace.fn(project).folder == project
    assert open_workspace.fn(project, profile="tiny", mixes=["balanced", "aesthetic"]).folder == project
    assert not (project / "runs").exists()


def test_a_variant_is_a_workspace_of_its_own(project: Path) -> None:
    before = tracked(project)
    variant = open_workspace.fn(project, mixes=["balanced"], overrides={"train": {"steps": 7}})
    assert variant.folder.parent == project / "runs"
    assert variant.config.train.steps == 7
    assert variant.config.mixes == ("balanced",)
    assert tracked(project) == before
    assert open_workspace.fn(project, mixes=["balanced"], overrides={"train": {"steps": 7}}) == variant
    assert open_workspace.fn(project, mixes=["balanced"], overrides={"train": {"steps": 8}}) != variant


def test_a_variant_shares_the_dvc_cache_of_the_project(project: Path) -> None:
    variant = open_workspace.fn(project, overrides={"train": {"steps": 7}}).folder
    with disable_run_logger():
        assert repro.fn("curate", project) == "ran"
        assert repro.fn("resolve", variant) == "ran"
        assert repro.fn("curate", variant) == "restored"
        assert repro.fn("validate", variant) == "ran"
        assert repro.fn("validate", project) == "restored"
        assert repro.fn("curate", project) == "unchanged"  # the variant inside the project does not disturb its DVC
    assert stages_run(project) == ["curate"]
    assert stage_inputs(variant) == ["data/tiny", "toy.py"]


def test_edited_prompts_make_another_variant(project: Path) -> None:
    (project / "mine.txt").write_text("a red circle\n")
    first = open_workspace.fn(project, prompts="mine.txt")
    source = first.config.prompts.sources[0]
    assert source.kind == "file"
    assert (first.folder / source.path).read_text() == "a red circle\n"
    (project / "mine.txt").write_text("a blue square\n")
    assert open_workspace.fn(project, prompts="mine.txt") != first


def test_tune_unet_selects_every_mix(project: Path) -> None:
    variant = open_workspace.fn(project, tune_unet=True)
    assert variant.config.unet_mixes == ("balanced", "aesthetic")


def test_another_profile_starts_without_the_overrides_of_params_yaml(
    project: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    profiles = tmp_path / "profiles"
    profiles.mkdir()
    tiny = (Path(__file__).parents[2] / "textcraftor/profiles/tiny.yaml").read_text()
    (profiles / "tiny.yaml").write_text(tiny)
    (profiles / "other.yaml").write_text(tiny)
    monkeypatch.setattr("textcraftor.config.profiles.PROFILES", profiles)
    assert Workspace(project).config.train.steps == 200
    assert open_workspace.fn(project, profile="other").config.train.steps == yaml.safe_load(tiny)["train"]["steps"]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"overrides": {"train": {"stepps": 7}}}, ConfigError, "train.stepps"),
        ({"mixes": ["balancd"]}, ConfigError, "Did you mean 'balanced'"),
        ({"profile": "tinny"}, ConfigError, "Did you mean 'tiny'"),
        ({"overrides": {"base": {"path": "../sd15"}}}, ConfigError, "base.path = ../sd15 leaves the project"),
        ({"prompts": "none.txt"}, PromptError, "none.txt is not a file"),
        ({"prompts": "toy.py"}, PromptError, "got .py"),
    ],
)
def test_impossible_settings_write_nothing(
    project: Path, settings: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        open_workspace.fn(project, **settings)
    assert not (project / "runs").exists()


def test_metrics_are_read_from_the_report(tmp_path: Path) -> None:
    (tmp_path / "data/reports/a").mkdir(parents=True)
    (tmp_path / "data/reports/a/metrics.json").write_text(json.dumps({"n_prompts": 3}))
    assert Workspace(tmp_path).metrics("a") == {"n_prompts": 3}


def test_every_file_that_the_configuration_names_is_in_the_variant(project: Path) -> None:
    (project / "models").mkdir()
    for name in ("checkpoint", "architecture", "tiny_vae", "tower", "head", "tokenizer", "benchmark"):
        (project / "models" / name).write_text(name)
    reward = {"path": "models/tower", "head": "models/head", "tokenizer": "models/tokenizer"}
    overrides = {
        "base": {"path": "models/checkpoint", "config": "models/architecture", "tiny_vae": "models/tiny_vae"},
        "rewards": {"aesthetic": reward},
        "prompts": {"benchmarks": [{"kind": "file", "path": "models/benchmark"}]},
    }
    variant = open_workspace.fn(project, overrides=overrides).folder
    assert {path.name for path in (variant / "models").iterdir()} == {path.name for path in (project / "models").iterdir()}


def test_a_profile_of_the_project_is_in_the_variant(project: Path) -> None:
    (project / "profiles").mkdir()
    profile = project / "profiles/mine.yaml"
    profile.write_text((PROFILES / "tiny.yaml").read_text())
    workspace = open_workspace.fn(project, profile="mine")
    assert (workspace.folder / "profiles/mine.yaml").read_text() == profile.read_text()
    assert workspace.config.profile == "mine"
