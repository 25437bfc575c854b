"""`textcraftor doctor`: what a profile needs, what is missing, and what a run will take, in one table."""

import importlib.metadata
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from packaging.requirements import Requirement
from rich.table import Table

from textcraftor.config import Config, FileSource
from textcraftor.fetch import RequiredFile, mismatch, read_lock, required_files
from textcraftor.planning.plan import EFFICIENCY, capacity, gigabytes, matmul_rate, plan

LIBRARIES = ("torch", "diffusers", "transformers", "open_clip_torch", "accelerate", "safetensors")
SIGNS = {"ok": "[green]present[/green]", "missing": "[red]missing[/red]", "wrong": "[red]wrong[/red]", "note": ""}


@dataclass(frozen=True)
class Finding:
    """A row of the table. With the state `missing` or `wrong`, `doctor` exits with 1."""

    what: str
    state: Literal["ok", "missing", "wrong", "note"]
    size: str = ""
    licence: str = ""
    about: str = ""

    @property
    def fails(self) -> bool:
        return self.state in ("missing", "wrong")


def examine(config: Config, root: Path, device: torch.device, verify: bool = False) -> list[Finding]:
    """All rows of the table. verify: read every file and compare its sha256, instead of its name and size."""
    return [
        *_downloads(config, root, verify),
        *_local_paths(config, root),
        *_prompts(config, root),
        *_versions(),
        *_resources(config, root, device),
    ]


def table(config: Config, findings: list[Finding]) -> Table:
    """The findings as a table, with a rule between kinds of findings."""
    shown = Table(title=f"profile {config.profile}", title_justify="left")
    for column in ("what", "state", "size", "licence", "source and notes"):
        shown.add_column(column, overflow="fold")
    section = ""
    for finding in findings:
        if section and finding.what.partition(" ")[0] != section:
            shown.add_section()
        section = finding.what.partition(" ")[0]
        shown.add_row(finding.what, SIGNS[finding.state], finding.size, finding.licence, finding.about)
    return shown


def _downloads(config: Config, root: Path, verify: bool) -> Iterator[Finding]:
    lock = read_lock(root)
    for name, download in config.downloads.items():
        files = required_files(config, [name])
        absent = [required for required in files if not (root / required.path).is_file()]
        present = [required for required in files if required not in absent]
        wrong = [f"{required.path}: {why}" for required in present if (why := _mismatch(required, root, lock, verify))]
        where = f"{download.hub} at {download.revision[:7]}" if download.hub else download.url
        pinned = sum(bool(required.pin) for required in files)
        about = f"{where} -> {download.to}; the profile has the sha256 of {pinned} of {len(files)} files"
        size = gigabytes(download.megabytes * 1e6)
        if wrong:
            yield Finding(f"download {name}", "wrong", size, download.licence, f"{wrong[0]}. Run `textcraftor fetch` again")
        elif absent:
            about = f"{len(absent)} of {len(files)} files: `textcraftor fetch --profile {config.profile}`; {about}"
            yield Finding(f"download {name}", "missing", size, download.licence, about)
        else:
            on_disk = sum((root / required.path).stat().st_size for required in files)
            yield Finding(f"download {name}", "ok", gigabytes(on_disk), download.licence, about)


def _mismatch(required: RequiredFile, root: Path, lock: dict[str, dict[str, object]], verify: bool) -> str:
    """Why a file is not the expected one, by its bytes or, without `verify`, by its recorded origin and size."""
    if verify:
        return mismatch(required, root, lock)
    entry = lock.get(str(required.path))
    if entry and entry["origin"] != required.origin:
        return f"it is of {entry['origin']}"
    size = (root / required.path).stat().st_size
    return f"it has {size:,} bytes, {entry['bytes']:,} were fetched" if entry and entry["bytes"] != size else ""


def _local_paths(config: Config, root: Path) -> Iterator[Finding]:
    """Files of the base and the rewards that no download contains: shipped ones, the user's own, and hub ids."""
    named = {"base": (config.base.path, "")}
    named |= {f"base, {field}": (path, "") for field, path in config.base.own_files().items() if field != "path"}
    for name, reward in config.rewards.items():
        for field, path in reward.own_files().items():
            named |= {f"reward {name}": (path, reward.licence)} if field == "path" else {f"reward {name}, {field}": (path, "")}
    for what, (path, licence) in named.items():
        if any(Path(path).is_relative_to(download.to) for download in config.downloads.values()):
            continue
        if (root / path).exists():
            yield Finding(what, "ok", gigabytes(_size(root / path)), licence, path)
        elif (path.count("/") == 1 and not (root / path).parent.exists()) or ":" in path:
            yield Finding(what, "note", "", licence, f"{path}: a hub id, downloaded without verification when it is used")
        else:
            yield Finding(what, "missing", "", licence, f"{path} does not exist")


def _prompts(config: Config, root: Path) -> Iterator[Finding]:
    for source in (*config.prompts.sources, *config.prompts.benchmarks):
        if not isinstance(source, FileSource):
            continue
        path = root / source.path
        if path.is_file():
            yield Finding(f"prompts {source.path}", "ok", gigabytes(path.stat().st_size), source.licence)
        else:
            yield Finding(f"prompts {source.path}", "missing", "", source.licence, source.origin)


def _versions() -> Iterator[Finding]:
    """Installed versions against those this package requires."""
    requirements = {
        requirement.name.lower().replace("-", "_"): requirement
        for requirement in map(Requirement, importlib.metadata.requires("textcraftor") or ())
    }
    for library in LIBRARIES:
        requirement = requirements.get(library.lower())
        try:
            version = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(f"library {library}", "missing", about=f"needs {requirement}")
            continue
        fits = requirement is None or requirement.specifier.contains(version, prereleases=True)
        about = version if fits else f"{version} is installed, {requirement} is needed: `make setup`"
        yield Finding(f"library {library}", "ok" if fits else "wrong", about=about)


def _resources(config: Config, root: Path, device: torch.device) -> Iterator[Finding]:
    yield Finding("device", "note", about=capacity(device))
    yield Finding("disk", "note", gigabytes(shutil.disk_usage(root).free), about="free")
    made = plan(config, config.mixes[0], root)
    if made is None:
        yield Finding("memory", "note", about=f"unknown until {config.base.path} is fetched: its architecture is not known")
        return
    parts = sorted(made.memory.items(), key=lambda part: -part[1])
    largest = ", ".join(f"{part} {gigabytes(size)}" for part, size in parts[:4])
    yield Finding(
        f"memory train --mix {made.mix}",
        "note",
        gigabytes(made.peak),
        about=f"estimate for micro batches of {made.tune.batch_size}: {largest}; 10 % and 1 GB are added. To reduce it: "
        "train.batch_size, train.gradient_checkpointing, train.decode_size",
    )
    rate = matmul_rate(device, getattr(torch, config.base.dtype))
    here = _duration(made.seconds(1000, rate))
    yield Finding(
        "time 1,000 samples",
        "note",
        here,
        about=f"estimate for one device of this kind: {sum(made.flops.values()) / 1e12:.2f} TFLOP a sample "
        f"({made.work.total} guided UNet forward passes, prefixes cached) at {EFFICIENCY:.0%} of the {rate / 1e12:.2f} "
        f"TFLOP/s that a {config.base.dtype} matrix product reaches here. By the paper's figure for an A100 in float32: "
        f"{_duration(made.seconds_on_a100(1000))}",
    )
    prefix = made.switch_step * made.pair_flops * 1000 / (rate * EFFICIENCY)
    yield Finding(
        "time 1,000 prefixes", "note", _duration(prefix), about=f"once for all mixes, {made.switch_step} guided steps each"
    )


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)
