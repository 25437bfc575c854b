"""dvc.yaml against the code: every command parses, every parameter section exists, every dependency is made."""

import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from textcraftor import config
from textcraftor.cli import app

ROOT = Path(__file__).parents[1]
PIPELINE = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
STAGES = {name: (stage.get("do") or stage) for name, stage in PIPELINE.items() if name != "tiny"}  # frozen: no parameters


@pytest.mark.parametrize("name", STAGES)
def test_the_command_is_a_verb_that_parses(name: str) -> None:
    program, verb, *arguments = shlex.split(STAGES[name]["cmd"].replace("${item}", "balanced"))
    command = typer.main.get_command(app).commands[verb]  # type: ignore[attr-defined]
    assert program == "textcraftor"
    command.make_context(verb, arguments)


def sections(stage: dict[str, Any]) -> tuple[set[str], set[str]]:
    """The sections a stage reads of params.yaml, and of the profile."""
    own = {entry for entry in stage["params"] if isinstance(entry, str)}
    (of_profile,) = [entry for entry in stage["params"] if isinstance(entry, dict)]
    ((path, keys),) = of_profile.items()
    assert path == "textcraftor/profiles/${profile}.yaml"
    return own, {key.split(".")[0] for key in keys}


@pytest.mark.parametrize("name", STAGES)
def test_parameters_are_sections_and_profile_and_overrides_agree(name: str) -> None:
    own, of_profile = sections(STAGES[name])
    known = set(config.Config.model_fields)
    assert own | of_profile <= known
    assert of_profile <= own, "a section read of the profile can be overridden in params.yaml"
    assert own - of_profile <= {"profile", "mixes", "unet_mixes"}


def test_params_yaml_and_the_profiles_hold_every_section_a_stage_reads() -> None:
    written = yaml.safe_load((ROOT / "params.yaml").read_text())
    read_of_params = set().union(*(sections(stage)[0] for stage in STAGES.values()))
    read_of_profile = set().union(*(sections(stage)[1] for stage in STAGES.values()))
    assert read_of_params <= written.keys()
    for path in config.PROFILES.glob("*.yaml"):
        assert read_of_profile <= yaml.safe_load(path.read_text()).keys(), path.name


def test_what_cannot_change_training_retrains_nothing() -> None:
    """A sampling switch, a judge or a threshold must never cost a GPU-week."""
    for name in ("train", "train-unet"):
        assert not sections(STAGES[name])[0] & {"sampler", "evaluate", "gate", "registry"}
