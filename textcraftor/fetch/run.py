"""Fetching: for each required file, keep what is present, else transfer it, verify it and record it."""

import hashlib
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from textcraftor.artifact import digest, write_json, written_aside
from textcraftor.config import Config
from textcraftor.errors import ModelError
from textcraftor.fetch import transfer
from textcraftor.fetch.files import RequiredFile, required_files
from textcraftor.fetch.lock import LOCK, Entry, mismatch, new_entry, read_lock
from textcraftor.layout import PARTIAL_DOWNLOADS

Action = Literal["present", "recorded", "downloaded", "copied"]


@dataclass(frozen=True)
class Fetched:
    """A file in the workspace after `fetch`, and what was done about it. bytes: its size."""

    path: Path
    action: Action
    bytes: int


def fetch(
    config: Config, root: Path, names: Collection[str] = (), folder: Path | None = None, mirror: str = ""
) -> Iterator[Fetched]:
    """Bring every file of the profile's downloads into the workspace, one by one; files that are present and intact stay.

    names: only these downloads.  folder: take the files from there, without network; it may be laid out as the hub
    (OWNER/NAME/FILE), as the hub's cache, or as another workspace's weights.  mirror: a hub endpoint.
    Raises ModelError naming the file when it cannot be transferred, its sha256 is not the expected one, or it is damaged;
    such a file is never put in place. A partial download is kept, and the next call resumes it.
    """
    if folder is not None and not folder.is_dir():
        raise ModelError(f"--from {folder} is not a folder")
    files = required_files(config, names)
    _require_space(config, root, files)
    for required in files:
        lock = read_lock(root)
        fetched, entry = _fetch_one(required, root, lock, folder, mirror or config.mirror)
        if lock.get(str(required.path)) != entry:
            write_json(root / LOCK, dict(sorted({**lock, str(required.path): entry}.items())))
        yield fetched


def _fetch_one(
    required: RequiredFile, root: Path, lock: Mapping[str, Entry], folder: Path | None, mirror: str
) -> tuple[Fetched, Entry]:
    target, entry = root / required.path, lock.get(str(required.path))
    if target.is_file() and not mismatch(required, root, lock):
        action: Action = "present" if entry else "recorded"
        return Fetched(required.path, action, target.stat().st_size), entry or new_entry(required, target, digest(target))
    recorded = entry["published_sha256"] if entry and entry["origin"] == required.origin else ""
    if required.pin and recorded and recorded != required.pin:
        raise ModelError(
            f"{required}: {LOCK} has sha256 {recorded[:12]}..., the profile {required.pin[:12]}... Correct one of them"
        )
    part = root / PARTIAL_DOWNLOADS / f"{hashlib.sha256(f'{required.origin}/{required.file}'.encode()).hexdigest()[:16]}.part"
    part.parent.mkdir(parents=True, exist_ok=True)
    expected = {"the profile": required.pin, str(LOCK): recorded}
    if folder is not None:
        shutil.copyfile(transfer.find_in(folder, required), part)
    else:
        expected["the hub"] = transfer.download(required, part, required.pin or recorded, mirror)
    published = digest(part)
    for source, sha256 in expected.items():
        if sha256 and sha256 != published:
            part.unlink()
            raise ModelError(
                f"{required}: its sha256 is {published}, but {source} says {sha256}. The file was refused and deleted"
            )
    with written_aside(target) as aside, _deleted_if_refused(part):
        if required.converted:
            transfer.convert(required, part, aside)
        else:
            transfer.check_format(required, part)
            shutil.move(part, aside)
    part.unlink(missing_ok=True)
    fetched = Fetched(required.path, "copied" if folder else "downloaded", target.stat().st_size)
    return fetched, new_entry(required, target, published)


@contextmanager
def _deleted_if_refused(part: Path) -> Iterator[None]:
    """Delete the partial file on a ModelError, or the next call would resume from a file that cannot be used."""
    try:
        yield
    except ModelError:
        part.unlink(missing_ok=True)
        raise


def _require_space(config: Config, root: Path, files: list[RequiredFile]) -> None:
    absent = {required.name for required in files if not (root / required.path).is_file()}
    needed = sum(config.downloads[name].megabytes for name in absent) / 1000
    free = shutil.disk_usage(root).free / 1e9
    if needed > free:
        raise ModelError(
            f"The downloads need about {needed:.1f} GB, {free:.1f} GB are free here. "
            f"Make room, or name some of {', '.join(sorted(absent))}"
        )
