"""The folder in which a run happens: the project itself, or a variant of it that changes no tracked file.

A run with the settings of params.yaml happens in the project. Any other settings get `runs/DIGEST/`: a DVC workspace
with its own params.yaml, the same dvc.yaml, hard links to the files that the stages read, and the project's DVC cache,
so that nothing is computed twice.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from dvc.repo import Repo
from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.workspace import Workspace
from textcraftor import layout
from textcraftor.artifact import digest, written_aside
from textcraftor.config import PROFILES, Config, merge, named_files, profile_file, resolve
from textcraftor.errors import ConfigError, PromptError

PROMPT_FILES = (".txt", ".csv", ".tsv", ".json", ".jsonl", ".parquet")


@task(cache_policy=NO_CACHE)
def open_workspace(
    root: Path,
    profile: str | None = None,
    mixes: Sequence[str] | None = None,
    tune_unet: bool = False,
    prompts: Path | str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Workspace:
    """The workspace for these settings: `root` if they change nothing, else `root/runs/DIGEST`.

    The overrides in params.yaml belong to the profile that it names: another profile starts without them.
    Raises ConfigError or PromptError before anything is written when a setting is impossible.
    """
    current = yaml.safe_load((root / "params.yaml").read_text(encoding="utf-8"))
    requested = dict(current)
    if profile is not None and profile != current["profile"]:
        requested = {key: {} for key, value in current.items() if isinstance(value, dict)} | {"profile": profile}
    requested = merge(requested, overrides or {})
    if prompts is not None:
        requested = merge(requested, {"prompts": {"sources": [prompt_source(root / prompts)]}})
    if mixes:
        requested["mixes"] = list(mixes)
    config = resolve(requested, root)
    # dvc.yaml loops over these lists, so params.yaml needs them even if the profile gives them.
    requested["mixes"] = list(config.mixes)
    requested["unet_mixes"] = list(config.all_mixes if tune_unet else config.unet_mixes)
    requested["curriculum"] = dict(config.curriculum)
    requested["blends"] = list(config.blends)
    if requested == current:
        return Workspace(root)
    list(named_paths(resolve(requested, root)))  # raises before anything is written
    folder = root / "runs" / hashlib.sha256(json.dumps(requested, sort_keys=True).encode()).hexdigest()[:12]
    create_variant(folder, root, requested, [root / prompts] if prompts else [])
    return Workspace(folder)


def prompt_source(path: Path) -> dict[str, str]:
    """The `prompts.sources` entry for a file, whose name in the workspace contains the digest of its bytes.

    So an edited file is another parameter, and gets a variant of its own.
    Raises PromptError when there is no such file or its type is unknown.
    """
    if not path.is_file():
        raise PromptError(f"{path} is not a file. Give a text file with one prompt a line, or {', '.join(PROMPT_FILES[1:])}")
    if path.suffix.lower() not in PROMPT_FILES:
        raise PromptError(f"{path.name}: prompts come as {', '.join(PROMPT_FILES)}, got {path.suffix or 'no suffix'}")
    return {"kind": "file", "path": str(layout.PROMPT_SOURCES / f"{digest(path)[:12]}{path.suffix.lower()}")}


def create_variant(folder: Path, root: Path, params: Mapping[str, Any], prompt_files: Iterable[Path]) -> None:
    """Make `folder` a DVC workspace with these params and the DVC cache of `root`, or refresh it."""
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
    place = str(folder.resolve())
    variant = Repo(place) if (folder / ".dvc").is_dir() else Repo.init(place, no_scm=True)
    with variant, variant.config.edit() as settings:
        # DVC writes a relative path relative to its file. An absolute one it cannot write unless it is ASCII.
        settings["cache"]["dir"] = os.path.relpath(Path(cache).resolve())
        settings["core"].update({"analytics": False, "check_update": False})
    config = resolve(params, root)
    for entry in sorted({*stage_inputs(folder), *named_paths(config), *project_profile(config, root)}):
        if (root / entry).exists():
            _link_or_copy(root / entry, folder / entry)
    _share_keys(root, folder)
    if (root / layout.DIGESTS).exists():  # they are by inode, so they hold for hard links too
        (folder / layout.DIGESTS).parent.mkdir(exist_ok=True)
        shutil.copyfile(root / layout.DIGESTS, folder / layout.DIGESTS)


def _share_keys(root: Path, folder: Path) -> None:
    """Let a variant sign with the project's key and believe the same keys."""
    (root / layout.KEYS).mkdir(parents=True, exist_ok=True, mode=0o700)
    for keys in (layout.KEYS, layout.TEAM_KEYS):
        (folder / keys).parent.mkdir(parents=True, exist_ok=True)
        if (root / keys).is_dir() and not (folder / keys).exists():
            (folder / keys).symlink_to((root / keys).resolve(), target_is_directory=True)


def project_profile(config: Config, root: Path) -> list[str]:
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


def stage_inputs(folder: Path) -> list[str]:
    """Files and folders that stages read and no stage writes, relative to the workspace. A frozen stage writes nothing.

    params.yaml is left out: each workspace has its own.
    """
    with Repo(str(folder)) as repo:
        stages = repo.index.stages
        written = [Path(out.fs_path) for stage in stages if not stage.frozen for out in stage.outs]
        read = [dep.fs_path for stage in stages for dep in stage.deps if dep.protocol == "local"]
        read += [out.fs_path for stage in stages if stage.frozen for out in stage.outs]
    # A folder that contains outputs, such as data/scores, is written by stages, too.
    outside = [
        path
        for path in {Path(path) for path in read} - {folder.resolve() / "params.yaml"}
        if not any(path.is_relative_to(out) or out.is_relative_to(path) for out in written)
    ]
    return sorted(os.path.relpath(path, folder.resolve()) for path in outside if path.is_relative_to(folder.resolve()))


def _link_or_copy(source: Path, target: Path) -> None:
    """Hard-link a file or folder (weights are large), or copy it where the file system has no hard links."""
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
