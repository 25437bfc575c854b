"""Fields that name files are marked, so that whoever needs the files finds them all."""

from collections.abc import Iterator
from typing import Any, get_args

import pytest

from textcraftor import config
from textcraftor.config import BaseConfig, Config, RewardConfig, Section, named_files
from textcraftor.config.section import FILE

# Every text field that names no file. A new one belongs here, or is a NamedFile.
NO_FILES = {
    "Config.profile",
    "Config.mirror",
    "BaseConfig.revision",
    "ChainConfig.scheduler",
    "Download.hub",
    "Download.revision",
    "Download.url",
    "Download.files",  # names within the download's folder
    "Download.licence",
    "RewardConfig.kind",
    "RewardConfig.version",
    "RewardConfig.licence",
    "FileSource.column",
    "FileSource.licence",
    "FileSource.origin",
    "PromptsConfig.blocklist",
    "EvaluateConfig.judges",
    "EvaluateConfig.heldout_judges",
    "EvaluateConfig.diversity_judge",
    "GateConfig.rank_by",
    "GateConfig.champion_margin",
    "GateRule.judge",
    "GateRule.why",
    "RegistryConfig.name",
    "Config.mixes",
    "AblationConfig.rewards",
    "AblationConfig.collapse",
    "Config.curriculum",
    "Config.unet_mixes",
    "Config.blends",
    "Config.blend",
    "BlendConfig.weights",
    "Config.downloads",
    "Config.rewards",
    "Config.mix",
}


def sections(section: type[Section] = Section) -> Iterator[type[Section]]:
    for child in section.__subclasses__():
        if child.__module__.startswith("textcraftor.config"):
            yield child
            yield from sections(child)


def parts(annotation: Any) -> Iterator[Any]:
    """An annotation and everything inside it, metadata included."""
    yield annotation
    for part in (*get_args(annotation), *getattr(annotation, "__metadata__", ())):
        yield from parts(part)


def text_fields() -> dict[str, bool]:
    """SECTION.FIELD of every field that holds text -> whether it is a NamedFile."""
    found = {}
    for section in set(sections()):
        for name, field in section.model_fields.items():
            inside = [*field.metadata, *parts(field.annotation)]
            if str in inside and name in section.__annotations__:
                found[f"{section.__name__}.{name}"] = FILE in inside
    return found


def test_every_text_field_is_a_named_file_or_known_to_be_none() -> None:
    assert {name for name, marked in text_fields().items() if not marked} == NO_FILES


def test_named_files_finds_every_marked_field() -> None:
    """Every marked field is found, whatever it is nested in."""
    marked = {name for name, is_file in text_fields().items() if is_file}
    assert marked == {
        "BaseConfig.path",
        "BaseConfig.config",
        "BaseConfig.tiny_vae",
        "RewardConfig.path",
        "RewardConfig.head",
        "RewardConfig.tokenizer",
        "FileSource.path",
        "TrainConfig.start_from",
        "Download.to",
    }
    base = BaseConfig(path="a", config="b", tiny_vae="c")
    assert dict(named_files(base)) == {("path",): "a", ("config",): "b", ("tiny_vae",): "c"}
    reward = RewardConfig(kind="aesthetic", path="a", head="b", tokenizer="c")
    assert [path for _, path in named_files(reward)] == ["a", "b", "c"]


@pytest.mark.parametrize("profile", sorted(path.stem for path in config.PROFILES.glob("*.yaml")))
def test_named_files_looks_into_every_section(profile: str) -> None:
    run: Config = config.load("none.yaml", profile=profile)
    found = dict(named_files(run))
    assert found["base", "path"] == run.base.path
    for name, reward in run.rewards.items():
        assert found.get(("rewards", name, "path"), "") == reward.path
    for index, source in enumerate(run.prompts.sources):
        assert found.get(("prompts", "sources", index, "path")) == getattr(source, "path", None)
    for name, download in run.downloads.items():
        assert found["downloads", name, "to"] == download.to
