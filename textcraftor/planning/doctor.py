"""What a profile needs and what of it is here: weights, prompts, library versions, device, memory, disk, time. One table."""

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
    """One line of the table. state: `missing` and `wrong` fail the visit."""

    what: str
    state: Literal["ok", "missing", "wrong", "note"]
    size: str = ""
    licence: str = ""
    about: str = ""

    @property
    def fails(self) -> bool:
        return self.state in ("missing", "wrong")


def examine(config: Config, root: Path, device: torch.device, verify: bool = False) -> list[Finding]:
    """Everything `doctor` has to say. verify: read every file and compare its sha256, instead of looking at names."""
    return [
        *_downloads(config, root, verify),
        *_local_paths(config, root),
        *_prompts(config, root),
        *_versions(),
        *_resources(config, root, device),
    ]


def table(config: Config, findings: list[Finding]) -> Table:
    """The findings as one table."""
    shown = Table(title=f"profile {config.profile}", title_justify="left")
    for column in ("what", "state", "size", "licence", "where from, and what to know"):
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
        absent = [each for each in files if not (root / each.path).is_file()]
        wrong = [f"{each.path}: {why}" for each in files if each not in absent and (why := _fault(each, root, lock, verify))]
        where = f"{download.hub} at {download.revision[:7]}" if download.hub else download.url
        pinned = sum(bool(each.pin) for each in files)
        about = f"{where} -> {download.to}; sha256 of {pinned} of {len(files)} files in the profile"
        size = gigabytes(download.megabytes * 1e6)
        if wrong:
            yield Finding(f"download {name}", "wrong", size, download.licence, f"{wrong[0]}. `textcraftor fetch` again")
        elif absent:
            told = f"{len(absent)} of {len(files)} files: `textcraftor fetch --profile {config.profile}`; {about}"
            yield Finding(f"download {name}", "missing", size, download.licence, told)
        else:
            held = sum((root / each.path).stat().st_size for each in files)
            yield Finding(f"download {name}", "ok", gigabytes(held), download.licence, about)


def _fault(each: RequiredFile, root: Path, lock: dict[str, dict[str, object]], verify: bool) -> str:
    """By the bytes, or at a glance: of another origin or size than what was fetched."""
    if verify:
        return mismatch(each, root, lock)
    entry = lock.get(str(each.path))
    if entry and entry["origin"] != each.origin:
        return f"it is of {entry['origin']}"
    size = (root / each.path).stat().st_size
    return f"{size:,} bytes, fetched were {entry['bytes']:,}" if entry and entry["bytes"] != size else ""


def _local_paths(config: Config, root: Path) -> Iterator[Finding]:
    """What the base and the rewards name and no download brings: shipped, your own, or a hub id that loads at its use."""
    named = {"base": (config.base.path, "")}
    for name, reward in config.rewards.items():
        named |= {f"reward {name}": (reward.path, reward.licence)}
        named |= {f"reward {name}, {part}": (path, "") for part in ("head", "tokenizer") if (path := getattr(reward, part))}
    for what, (path, licence) in named.items():
        if not path or any(Path(path).is_relative_to(each.to) for each in config.downloads.values()):
            continue
        if (root / path).exists():
            yield Finding(what, "ok", gigabytes(_size(root / path)), licence, path)
        elif (path.count("/") == 1 and not (root / path).parent.exists()) or ":" in path:
            yield Finding(what, "note", "", licence, f"{path}: a hub id; it is loaded, unverified, when it is used")
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
    """Installed against what this package was built with."""
    needs = {
        each.name.lower().replace("-", "_"): each for each in map(Requirement, importlib.metadata.requires("textcraftor") or ())
    }
    for library in LIBRARIES:
        need = needs.get(library.lower())
        try:
            version = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(f"library {library}", "missing", about=f"needs {need}")
            continue
        fits = need is None or need.specifier.contains(version, prereleases=True)
        told = version if fits else f"{version} is installed, {need} is needed: `make setup`"
        yield Finding(f"library {library}", "ok" if fits else "wrong", about=told)


def _resources(config: Config, root: Path, device: torch.device) -> Iterator[Finding]:
    yield Finding("device", "note", about=capacity(device))
    yield Finding("disk", "note", gigabytes(shutil.disk_usage(root).free), about="free here")
    made = plan(config, config.mixes[0], root)
    if made is None:
        yield Finding("memory", "note", about=f"unknown: nothing tells the architecture of {config.base.path} yet")
        return
    parts = sorted(made.memory.items(), key=lambda part: -part[1])
    told = ", ".join(f"{part} {gigabytes(size)}" for part, size in parts[:4])
    yield Finding(
        f"memory train --mix {made.mix}",
        "note",
        gigabytes(made.peak),
        about=f"estimated, micro batch {made.tune.batch_size}: {told}; +10 % and 1 GB. Less: train.batch_size, "
        "train.gradient_checkpointing, train.decode_size",
    )
    rate = matmul_rate(device, getattr(torch, config.base.dtype))
    here = _duration(made.seconds(1000, rate))
    yield Finding(
        "time 1,000 samples",
        "note",
        here,
        about=f"one of this device, estimated: {sum(made.flops.values()) / 1e12:.2f} TFLOP a sample ({made.work.total} "
        f"guided UNet forwards, prefixes cached) at {EFFICIENCY:.0%} of the {rate / 1e12:.2f} TFLOP/s that a "
        f"{config.base.dtype} matrix product reaches here. By the paper's figure (an A100, float32): "
        f"{_duration(made.seconds_on_a100(1000))}",
    )
    prefix = made.switch_step * made.pair_flops * 1000 / (rate * EFFICIENCY)
    yield Finding(
        "time 1,000 prefixes", "note", _duration(prefix), about=f"once for all mixes: {made.switch_step} guided steps each"
    )


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    return sum(each.stat().st_size for each in files)
