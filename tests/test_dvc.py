"""dvc.yaml: its commands parse, its parameters and dependencies exist, and the right stages run when an input changes."""

import copy
import os
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from dvc.repo import Repo

from textcraftor import config
from textcraftor.cli import app
from textcraftor.config import Config
from textcraftor.resolved import DigestCache, resolve_sections

ROOT = Path(__file__).parents[1]
PIPELINE = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
STAGES = {name: (stage.get("do") or stage) for name, stage in PIPELINE.items()}
ABLATIONS = yaml.safe_load((ROOT / "ablations/dvc.yaml").read_text())["stages"]
COMPUTED = {name: stage for name, stage in STAGES.items() if name not in ("tiny", "resolve")}
# Fields of the configuration that no stage's output depends on.
NO_STAGE = {"profile", "downloads", "mirror", "registry"}
# Fields that resolved.json has in another place: with the mixes and judges that use them.
ELSEWHERE = {"rewards"}


@pytest.mark.parametrize("name", [*STAGES, *ABLATIONS])
def test_the_command_is_a_verb_that_parses(name: str) -> None:
    program, verb, *arguments = shlex.split(
        {**STAGES, **ABLATIONS}[name]["cmd"].replace("${item}", "balanced").replace("${key}", "balanced")
    )
    command = typer.main.get_command(app).commands[verb]  # type: ignore[attr-defined]
    assert program == "textcraftor"
    command.make_context(verb, arguments)


def sections(stage: dict[str, Any]) -> list[str]:
    """The keys of data/resolved.json that a stage depends on."""
    (params,) = stage["params"]
    ((path, keys),) = params.items()
    assert path == "data/resolved.json"
    return [re.sub(r"\$\{(item|key|mixes\[0\])\}", "balanced", key) for key in keys]


@pytest.mark.parametrize("profile", sorted(path.stem for path in config.PROFILES.glob("*.yaml")))
def test_every_parameter_exists_in_every_profile(profile: str, tmp_path: Path) -> None:
    run = config.load("none.yaml", {"mixes": ["balanced"]} if profile == "tiny" else {}, profile=profile)
    blend = {run.mixes[0]: config.BlendConfig(weights=("original=1",))}
    run = run.model_copy(update={"blends": run.mixes[:1], "blend": blend})
    resolved = resolve_sections(run, ROOT, DigestCache(tmp_path / "digests.json"))
    for stage in (*COMPUTED.values(), *ABLATIONS.values()):
        for key in sections(stage):
            found: Any = resolved
            for part in key.replace("balanced", run.mixes[0]).split("."):
                assert part in found, key
                found = found[part]


def test_every_field_of_the_configuration_is_read_by_a_stage() -> None:
    read = {key.split(".")[0] for stage in (*COMPUTED.values(), *ABLATIONS.values()) for key in sections(stage)}
    assert read | NO_STAGE | ELSEWHERE == set(Config.model_fields)
    assert not read & (NO_STAGE | ELSEWHERE)


def test_the_checkpoint_interval_retrains_no_finished_mix(tmp_path: Path) -> None:
    def train(**settings: object) -> object:
        run = config.load("none", {"train": settings}, profile="tiny")
        return resolve_sections(run, ROOT, DigestCache(tmp_path / "digests.json"))["train"]

    assert train(checkpoint_every=7, checkpoint_minutes=3) == train()
    assert train(steps=7) != train()


def test_every_artifact_is_an_output() -> None:
    of_mixes = [f"{stage['outs'][0]}".replace("${item}", "balanced") for stage in STAGES.values()]
    with Repo(str(ROOT)) as repo:
        (found,) = repo.artifacts.read().values()
    assert {name: artifact.type for name, artifact in found.items()} == {
        "prompts": "dataset",
        "balanced": "model",
        "aesthetic": "model",
    }
    assert {artifact.path.replace("aesthetic", "balanced") for artifact in found.values()} <= {*of_mixes}


def test_every_dependency_is_an_output_or_shipped() -> None:
    outs = [Path(out if isinstance(out, str) else next(iter(out))) for stage in STAGES.values() for out in stage["outs"]]
    for name, stage in {**STAGES, **ABLATIONS}.items():
        for dependency in (Path(each.replace("${mixes[0]}", "${item}")) for each in stage.get("deps", [])):
            made = any(dependency.is_relative_to(out) or out.is_relative_to(dependency) for out in outs)
            assert made or (ROOT / dependency).exists(), f"{name}: {dependency}"


def test_what_cannot_change_training_retrains_nothing() -> None:
    """A sampling switch, a judge or a threshold must not cost a week of GPU time."""
    for name in ("train", "train-unet"):
        assert not set(sections(STAGES[name])) & {"sampler", "evaluate", "gate", "registry", "mix", "rewards"}


# Committed instead: `dvc pull` would fail on outputs of stages that never ran here.
UNCACHED = {"cache": False, "persist": True}


def test_ablations_are_off_by_default() -> None:
    """`dvc repro` runs no stage of another file, and no stage of the pipeline depends on an ablation."""
    assert all(
        stage["wdir"] == ".." and stage["outs"] == [{f"docs/ablations/{name}": UNCACHED}] for name, stage in ABLATIONS.items()
    )
    assert not any("ablations" in dependency for stage in STAGES.values() for dependency in stage.get("deps", []))
    with Repo(str(ROOT)) as repo:
        targets = {stage.addressing for stage in repo.stage.collect("dvc.yaml")}
        assert len(targets) > 8 and not any("ablations" in target for target in targets)
        table5 = {stage.addressing for stage in repo.stage.collect("ablations/dvc.yaml:table5", with_deps=True)}
    assert {"resolve", "curate", "validate", "train@balanced"} <= table5


# What replaces the commands of all stages but `resolve`: note the stage, write its outputs.
MAKE = """
import pathlib, sys
stage, *outs = sys.argv[1:]
with open("stages.log", "a") as log:
    log.write(stage + "\\n")
for out in map(pathlib.Path, outs):
    folder = out if not out.suffix else out.parent
    folder.mkdir(parents=True, exist_ok=True)
    if not out.suffix:
        for part in ("train", "heldout", "features") if out.name == "latents" else ("weights",):
            (out / part).write_text(stage)
    else:
        out.write_text(stage)
"""


TRAINED = {"train@balanced", "train@aesthetic"}
PROFILE = "mine/profile.yaml"


class Pipeline:
    """The real dvc.yaml in a folder of its own: `resolve` is real, the other stages write a line."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "make.py").write_text(MAKE)
        stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
        for name, entry in stages.items():
            stage = entry.get("do") or entry
            outs = [out if isinstance(out, str) else next(iter(out)) for out in stage["outs"]]
            label = f"{name}@${{item}}" if "foreach" in entry else name
            stage["cmd"] = f"{sys.executable} make.py {label} {' '.join(outs)}"
            if name == "resolve":
                stage["cmd"] = f"{sys.executable} -m textcraftor.cli resolve"
        (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
        for shipped in ("data/sources", "data/expectations", "data/tiny/base", "data/tiny/rewards"):
            (folder / shipped).mkdir(parents=True)
            (folder / shipped / "file").write_text("shipped")
        self.repo = Repo.init(str(folder), no_scm=True)

    def write(self, name: str, text: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".new").write_text(text)
        path.with_suffix(".new").replace(path)

    def reproduce(self) -> set[str]:
        """Run `dvc repro`; the stages that ran."""
        (self.folder / "stages.log").write_text("")
        here = Path.cwd()
        os.chdir(self.folder)
        try:
            with Repo(str(self.folder)) as repo:
                ran = {stage.addressing for stage in repo.reproduce()} - {"tiny"}  # frozen: its outputs are recorded
        finally:
            os.chdir(here)
        assert {*(self.folder / "stages.log").read_text().split(), "resolve"} == ran
        return ran


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("outside")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory, outside: Path) -> Pipeline:
    """A pipeline that has run once, by a profile of its own, on weights outside data/tiny and outside the workspace."""
    made = Pipeline(tmp_path_factory.mktemp("pipeline"))
    made.write(PROFILE, (config.PROFILES / "tiny.yaml").read_text())
    rewards = {
        "hpsv2": {"path": "weights/hpsv2"},
        "aesthetic": {"path": "weights/tower", "head": "weights/head", "tokenizer": "weights/tokenizer"},
        "heldout": {"path": "weights/heldout"},
    }
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params |= {"profile": PROFILE, "base": {"path": str(outside / "base"), "tiny_vae": "weights/tiny_vae"}, "rewards": rewards}
    params["prompts"] = {"benchmarks": [{"kind": "file", "path": "lists/benchmark.txt"}], "world": "any"}
    made.write("params.yaml", yaml.safe_dump(params))
    for name in ("hpsv2", "tower", "head", "tokenizer", "heldout", "tiny_vae"):
        made.write(f"weights/{name}", "original")
    made.write("lists/benchmark.txt", "original")
    (outside / "base/unet").mkdir(parents=True)
    (outside / "base/unet/weights").write_text("original")
    first = made.reproduce()
    assert first == {
        *("resolve", "curate", "validate", "prepare", "train@balanced", "train@aesthetic"),
        *("evaluate-base", "evaluate@balanced", "evaluate@aesthetic", "gate"),
    }
    return made


def test_without_a_change_nothing_but_resolve_runs(pipeline: Pipeline) -> None:
    lock = (pipeline.folder / "dvc.lock").read_bytes()
    assert pipeline.reproduce() == {"resolve"}
    assert (pipeline.folder / "dvc.lock").read_bytes() == lock
    with Repo(str(pipeline.folder)) as repo:
        assert list(repo.status().values()) == [["always changed"]]


def test_a_clone_that_pulled_computes_nothing_again(pipeline: Pipeline, tmp_path: Path) -> None:
    with Repo(str(pipeline.folder)) as repo:
        with repo.config.edit() as settings:
            settings["remote"]["store"] = {"url": str(tmp_path / "store")}
            settings["core"]["remote"] = "store"
        assert repo.push() > 0
        outs = [Path(out.fs_path) for out in repo.index.outs if out.use_cache]
    clone = copy.copy(pipeline)
    clone.folder = tmp_path / "clone"
    left_out = {*outs, pipeline.folder / ".dvc/cache", pipeline.folder / ".dvc/tmp"}
    shutil.copytree(
        pipeline.folder,
        clone.folder,
        ignore=lambda folder, names: [name for name in names if Path(folder) / name in left_out],
    )
    with Repo(str(clone.folder)) as repo:
        repo.pull()
    assert clone.reproduce() == {"resolve"}
    Repo.get(str(pipeline.folder), "data/encoders/balanced", out=str(tmp_path / "taken"))
    assert (tmp_path / "taken/weights").read_text() == "train@balanced"


@pytest.mark.parametrize(
    ("replaced", "rerun"),
    [
        ("weights/hpsv2", {"train@balanced", "evaluate-base"}),  # the mix `aesthetic` does not use it
        ("weights/heldout", {"evaluate-base"}),  # a judge that no mix uses
        ("weights/tokenizer", {*TRAINED, "evaluate-base"}),
        ("lists/benchmark.txt", {"curate"}),
    ],
)
def test_a_file_replaced_at_the_same_path_reruns_the_stages_that_use_it(
    pipeline: Pipeline, replaced: str, rerun: set[str]
) -> None:
    pipeline.write(replaced, "replaced")  # of the same size
    ran = pipeline.reproduce()
    assert ran & {*TRAINED, "evaluate-base", "curate"} == rerun


def test_a_base_replaced_outside_the_workspace_reruns_everything_that_uses_it(pipeline: Pipeline, outside: Path) -> None:
    (outside / "base/unet/weights").write_text("replaced")
    ran = pipeline.reproduce()
    assert {"prepare", *TRAINED, "evaluate-base", "evaluate@balanced", "evaluate@aesthetic"} <= ran
    assert not ran & {"curate", "validate"}


def test_a_value_changed_in_the_profile_reruns_the_stages_that_read_it(pipeline: Pipeline) -> None:
    profile = (config.PROFILES / "tiny.yaml").read_text()
    assert "at_least: 0.05" in profile
    pipeline.write(PROFILE, profile.replace("at_least: 0.05", "at_least: 0.06"))
    assert pipeline.reproduce() == {"resolve", "gate"}
