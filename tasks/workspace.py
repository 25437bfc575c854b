"""The folder a run happens in: the project itself, or a variant of it that leaves tracked files alone.

A run with the settings of params.yaml as it stands happens in the project. Any other gets `runs/DIGEST/`:
a DVC workspace of its own with its own params.yaml, the same dvc.yaml, copies of what the stages read, and
the project's DVC cache, so that what was computed once anywhere is not computed again.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from dvc.repo import Repo
from prefect import task
from prefect.cache_policies import NO_CACHE

from textcraftor import layout
from textcraftor.artifact import digest, written_aside
from textcraftor.config import PROFILES, Config, load, merge, named_files, profile_file, resolve
from textcraftor.errors import ConfigError, PromptError

PROMPT_FILES = (".txt", ".csv", ".tsv", ".json", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Workspace:
    """A folder with dvc.yaml and params.yaml, and where its artifacts lie."""

    folder: Path

    @cached_property
    def config(self) -> Config:
        """The resolved configuration. Raises ConfigError."""
        return load(self.folder / "params.yaml")

    @property
    def reports(self) -> Path:
        return self.folder / layout.REPORTS

    def report(self, candidate: str) -> Path:
        """Folder with the candidate's metrics.json, grid.png and report.html."""
        return self.folder / layout.report_folder(candidate)

    def metrics(self, candidate: str) -> dict[str, Any]:
        """The candidate's metrics.json."""
        metrics: dict[str, Any] = json.loads((self.report(candidate) / "metrics.json").read_text(encoding="utf-8"))
        return metrics

    def scores(self, candidate: str) -> Path:
        return self.folder / layout.scores_file(candidate)


@task(cache_policy=NO_CACHE)
def open_workspace(
    root: Path,
    profile: str | None = None,
    mixes: Sequence[str] | None = None,
    tune_unet: bool = False,
    prompts: Path | str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Workspace:
    """The workspace for these settings: `root` where they change nothing, else `root/runs/DIGEST`.

    What params.yaml overrides belongs to the profile it names: another profile starts without it.
    Raises ConfigError or PromptError before anything is written when a setting is impossible.
    """
    stands = yaml.safe_load((root / "params.yaml").read_text(encoding="utf-8"))
    wanted = dict(stands)
    if profile is not None and profile != stands["profile"]:
        wanted = {key: {} for key, value in stands.items() if isinstance(value, dict)} | {"profile": profile}
    wanted = merge(wanted, overrides or {})
    if prompts is not None:
        wanted = merge(wanted, {"prompts": {"sources": [prompt_source(root / prompts)]}})
    if mixes:
        wanted["mixes"] = list(mixes)
    config = resolve(wanted, root)
    # dvc.yaml loops over both lists, so they stand in params.yaml even where the profile decides.
    wanted["mixes"] = list(config.mixes)
    wanted["unet_mixes"] = list(config.mixes if tune_unet else config.unet_mixes)
    if wanted == stands:
        return Workspace(root)
    list(named_paths(resolve(wanted, root)))  # raises before anything is written
    folder = root / "runs" / hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:12]
    furnish(folder, root, wanted, [root / prompts] if prompts else [])
    return Workspace(folder)


def prompt_source(path: Path) -> dict[str, str]:
    """The `prompts.sources` entry for a file; its name in the workspace carries the digest of what it holds.

    DVC sees parameters, not the files they name: an edited file must be another parameter.
    Raises PromptError when there is no such file or its kind is unknown.
    """
    if not path.is_file():
        raise PromptError(f"{path} is not a file. Give a text file with one prompt a line, or {', '.join(PROMPT_FILES[1:])}")
    if path.suffix.lower() not in PROMPT_FILES:
        raise PromptError(f"{path.name}: prompts come as {', '.join(PROMPT_FILES)}, got {path.suffix or 'no suffix'}")
    return {"kind": "file", "path": str(layout.PROMPT_SOURCES / f"{digest(path)[:12]}{path.suffix.lower()}")}


def furnish(folder: Path, root: Path, params: Mapping[str, Any], prompt_files: Iterable[Path]) -> None:
    """Make `folder` a DVC workspace with these params, sharing the cache of the one at `root`; again: refresh it."""
    folder.mkdir(parents=True, exist_ok=True)
    with written_aside(folder / "params.yaml") as aside:
        aside.write_text(yaml.safe_dump(dict(params), sort_keys=False, allow_unicode=True), encoding="utf-8")
    shutil.copy2(root / "dvc.yaml", folder / "dvc.yaml")
    for path in prompt_files:
        target = folder / prompt_source(path)["path"]
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    with Repo(str(root)) as project:
        cache = project.cache.local_cache_dir
    variant = Repo(str(folder)) if (folder / ".dvc").is_dir() else Repo.init(str(folder), no_scm=True)
    with variant, variant.config.edit() as settings:
        settings["cache"]["dir"] = str(cache)
        settings["core"].update({"analytics": False, "check_update": False})
    config = resolve(params, root)
    for entry in sorted({*inputs(folder), *named_paths(config), *own_profile(config, root)}):
        if (root / entry).exists():
            _place(root / entry, folder / entry)


def own_profile(config: Config, root: Path) -> list[str]:
    """The profile's file, relative to the workspace, where it is one of the project's own."""
    path = profile_file(config.profile, root)
    return [str(path.relative_to(root))] if path.is_relative_to(root) and not path.is_relative_to(PROFILES) else []


def named_paths(config: Config) -> Iterator[str]:
    """Files and folders that the configuration names, as far as they are relative to the workspace.

    Raises ConfigError for one that leaves the project: a variant lies elsewhere, so it would be another file there.
    """
    for location, path in named_files(config):
        if Path(path).is_absolute():
            continue
        if os.path.normpath(path).startswith(".."):
            where = ".".join(map(str, location))
            raise ConfigError(f"{where} = {path} leaves the project. Give an absolute path, or one inside the project")
        yield path


def inputs(folder: Path) -> list[str]:
    """What the stages read and no stage here makes, relative to the workspace; a frozen stage makes nothing.

    params.yaml is left out: it is what makes a workspace another one.
    """
    with Repo(str(folder)) as repo:
        stages = repo.index.stages
        made = [Path(out.fs_path) for stage in stages if not stage.frozen for out in stage.outs]
        read = [dep.fs_path for stage in stages for dep in stage.deps if dep.protocol == "local"]
        read += [out.fs_path for stage in stages if stage.frozen for out in stage.outs]
    # A folder with outputs in it, such as all scores, is made here as much as the outputs are.
    outside = [
        path
        for path in {Path(path) for path in read} - {folder.resolve() / "params.yaml"}
        if not any(path.is_relative_to(out) or out.is_relative_to(path) for out in made)
    ]
    return sorted(os.path.relpath(path, folder.resolve()) for path in outside if path.is_relative_to(folder.resolve()))


def _place(source: Path, target: Path) -> None:
    """Hard links where the file system has them (weights are large), copies elsewhere."""
    if target.is_dir():
        shutil.rmtree(target)
    target.unlink(missing_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, copy_function=_link, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        _link(str(source), str(target))


def _link(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target
