"""Getting weights and data of others: pinned, resumed, verified, never unpickled.

What to get stands in the profile's `downloads`: a commit of a hub repository or a URL, file by file, with the sha256
where it is known. `weights.lock.json` records what came, so that every later fetch, on any machine, gets the same bytes
or none. Commit it.
"""

import hashlib
import json
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, cast
from urllib.parse import urlsplit

import safetensors
from huggingface_hub import get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]
from safetensors.torch import save_file

from textcraftor.artifact import digest, write_json, written_aside
from textcraftor.config import Config, Download
from textcraftor.errors import ConfigError, ModelError, unknown
from textcraftor.layout import PARTIAL_DOWNLOADS
from textcraftor.models.weights import brief, read_tensors

LOCK: Final = Path("weights.lock.json")

PICKLES: Final = (".bin", ".ckpt", ".pt", ".pth")
# What libraries call the same weights as safetensors, where it is more than another suffix.
STORED_AS: Final = {"open_clip_pytorch_model.bin": "open_clip_model.safetensors", "pytorch_model.bin": "model.safetensors"}

# The hub's client raises its HTTP library's own errors when a connection fails; their root is this base.
CONNECTION_ERROR: Final[type[Exception]] = cast(type[Exception], HfHubHTTPError.__bases__[0])

Action = Literal["present", "recorded", "downloaded", "copied"]
Entry = dict[str, Any]


@dataclass(frozen=True)
class Wanted:
    """One file of a download: `file` as it is published, `path` as it is kept in the workspace."""

    name: str
    download: Download
    file: str

    @property
    def path(self) -> Path:
        """Relative to the workspace; what was a pickle is kept as safetensors."""
        published = Path(self.file)
        if published.suffix not in PICKLES:
            return Path(self.download.to) / published
        stored = STORED_AS.get(published.name, published.with_suffix(".safetensors").name)
        return Path(self.download.to) / published.with_name(stored)

    @property
    def converted(self) -> bool:
        return self.path.name != Path(self.file).name

    @property
    def pin(self) -> str:
        """sha256 of the published file, as the profile has it; empty where nobody has told."""
        return self.download.files[self.file]

    @property
    def origin(self) -> str:
        """Where it comes from, in words that change when the pinned origin does."""
        return f"{self.download.hub}@{self.download.revision}" if self.download.hub else self.download.url

    def __str__(self) -> str:
        where = f"{self.download.hub}@{self.download.revision[:7]}" if self.download.hub else self.download.url
        return f"{self.file} of {where}"


@dataclass(frozen=True)
class Fetched:
    """What became of one file."""

    path: Path
    action: Action
    bytes: int


def wanted(config: Config, names: Collection[str] = ()) -> list[Wanted]:
    """Every file of the profile's downloads, or of those named. Raises ConfigError for an unknown name."""
    for name in names:
        if name not in config.downloads:
            raise ConfigError(unknown("download", name, config.downloads))
    chosen = {name: each for name, each in config.downloads.items() if not names or name in names}
    return [Wanted(name, each, file) for name, each in chosen.items() for file in each.files]


def missing(config: Config, root: Path) -> list[Wanted]:
    """The files that `fetch` would have to get. Looks at names alone; `fetch` and `doctor --verify` read the bytes."""
    return [each for each in wanted(config) if not (root / each.path).is_file()]


def require(config: Config, root: Path) -> None:
    """Raises ModelError when something of the profile's downloads is not there yet."""
    absent = missing(config, root)
    if absent:
        size = sum(config.downloads[name].megabytes for name in {each.name for each in absent}) / 1000
        raise ModelError(
            f"{absent[0].path} is missing ({len(absent)} files, of downloads of {size:.1f} GB). Get them with "
            f"`textcraftor fetch --profile {config.profile}`, and see what else is needed with `textcraftor doctor`"
        )


def fetch(
    config: Config, root: Path, names: Collection[str] = (), folder: Path | None = None, mirror: str = ""
) -> Iterator[Fetched]:
    """Bring every file of the profile's downloads into the workspace, one by one; what is there and sound stays.

    names: only these downloads.  folder: take them from there and ask no network; it may be laid out as the hub
    (OWNER/NAME/FILE), as the hub's cache, or as another workspace's weights.  mirror: a hub endpoint.
    Raises ModelError naming the file when it cannot be had, its sha256 is not the expected one, or it is damaged;
    such a file is never put in place. What was downloaded of an interrupted file is kept, and the next call goes on.
    """
    if folder is not None and not folder.is_dir():
        raise ModelError(f"--from {folder} is not a folder")
    files = wanted(config, names)
    _require_space(config, root, files)
    for each in files:
        lock = read_lock(root)
        fetched, entry = _bring(each, root, lock, folder, mirror or config.mirror)
        if lock.get(str(each.path)) != entry:
            write_json(root / LOCK, dict(sorted({**lock, str(each.path): entry}.items())))
        yield fetched


def read_lock(root: Path) -> dict[str, Entry]:
    """path -> {sha256, bytes, origin, file, published_sha256}: what was fetched. Raises ModelError when unreadable."""
    path = root / LOCK
    if not path.exists():
        return {}
    try:
        lock = json.loads(path.read_text(encoding="utf-8"))
        return {name: {**entry, "sha256": str(entry["sha256"])} for name, entry in lock.items()}
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise ModelError(f"{path} is no record of fetched files ({error}). Restore it from version control") from None


def fault(each: Wanted, root: Path, lock: Mapping[str, Entry]) -> str:
    """Why the file in the workspace is not the expected one, by its bytes; empty when it is."""
    found, entry = digest(root / each.path), lock.get(str(each.path))
    if entry and entry["origin"] != each.origin:
        return f"it is of {entry['origin']}, the profile asks for {each.origin}"
    if entry and each.pin and entry["published_sha256"] != each.pin:
        return f"{LOCK} and the profile's sha256 differ"
    expected = entry["sha256"] if entry else each.pin if not each.converted else ""
    if expected and found != expected:
        return f"its sha256 is {found[:12]}..., expected {expected[:12]}..."
    return "" if expected or not each.converted else f"it is not in {LOCK}, so nothing says what it is"


def _bring(each: Wanted, root: Path, lock: Mapping[str, Entry], folder: Path | None, mirror: str) -> tuple[Fetched, Entry]:
    target, entry = root / each.path, lock.get(str(each.path))
    if target.is_file() and not fault(each, root, lock):
        action: Action = "present" if entry else "recorded"
        entry = entry or _entry(each, target, digest(target))
        return Fetched(each.path, action, target.stat().st_size), entry
    known = entry["published_sha256"] if entry and entry["origin"] == each.origin else ""
    if each.pin and known and known != each.pin:
        raise ModelError(f"{each}: {LOCK} has sha256 {known[:12]}..., the profile {each.pin[:12]}... Correct one of them")
    part = root / PARTIAL_DOWNLOADS / f"{hashlib.sha256(f'{each.origin}/{each.file}'.encode()).hexdigest()[:16]}.part"
    part.parent.mkdir(parents=True, exist_ok=True)
    expected = {"the profile": each.pin, str(LOCK): known}
    if folder is not None:
        shutil.copyfile(_find(each, folder), part)
    else:
        expected["the hub"] = _download(each, part, each.pin or known, mirror)
    published = digest(part)
    for told_by, sha256 in expected.items():
        if sha256 and sha256 != published:
            part.unlink()
            raise ModelError(
                f"{each}: its sha256 is {published}, but {told_by} says {sha256}. The file was refused and deleted"
            )
    with written_aside(target) as aside, _kept_out(each, part):
        if each.converted:
            _convert(each, part, aside)
        else:
            _check(each, part)
            shutil.move(part, aside)
    part.unlink(missing_ok=True)
    fetched = Fetched(each.path, "copied" if folder else "downloaded", target.stat().st_size)
    return fetched, _entry(each, target, published)


def _entry(each: Wanted, target: Path, published: str) -> Entry:
    return {
        "sha256": digest(target) if each.converted else published,
        "bytes": target.stat().st_size,
        "origin": each.origin,
        "file": each.file,
        "published_sha256": published,
    }


def _download(each: Wanted, part: Path, expected: str, mirror: str) -> str:
    """Fill `part`, from where it ends; returns the sha256 that the hub's own record has, where it has one.

    Our own file to resume from, because the hub's client starts over in every process.
    """
    if expected and part.exists() and digest(part) == expected:
        return ""
    try:
        if each.download.url:
            _append(each.download.url, part)
            return ""
        address = hf_hub_url(each.download.hub, each.file, revision=each.download.revision, endpoint=mirror or None)
        about = get_hf_file_metadata(address)
        if about.commit_hash and about.commit_hash != each.download.revision:
            raise ModelError(f"{each}: the hub answered with commit {about.commit_hash}. A mirror must keep revisions")
        told = about.etag or ""
        # A redirect to a content network carries its own signature: our token is for the hub alone.
        elsewhere = urlsplit(about.location).netloc != urlsplit(address).netloc
        _append(about.location, part, {} if elsewhere else build_hf_headers(), about.size)
        return told if len(told) == 64 else ""
    except (HfHubHTTPError, CONNECTION_ERROR, OSError) as error:
        so_far = (
            f" {part.stat().st_size / 1e6:.1f} MB of it are kept, and the next fetch goes on from there."
            if part.exists()
            else ""
        )
        raise ModelError(f"{each} could not be downloaded: {brief(error)}.{so_far} {_hint(error)}") from None


def _append(address: str, part: Path, headers: dict[str, str] | None = None, size: int | None = None) -> None:
    if part.exists() and size is not None and part.stat().st_size > size:
        part.unlink()
    with part.open("r+b" if part.exists() else "w+b") as file:
        done = file.seek(0, 2)
        http_get(address, file, resume_size=done, headers=headers or {}, expected_size=size, displayed_filename=part.stem)


def _find(each: Wanted, folder: Path) -> Path:
    """The published file in a local folder. Raises ModelError saying where it was looked for."""
    owner_name, to = each.download.hub, Path(each.download.to).name
    cached = f"models--{owner_name.replace('/', '--')}/snapshots/{each.download.revision}"
    places = [to, *([owner_name, Path(owner_name).name, cached, f"hub/{cached}"] if owner_name else [])]
    candidates = [folder / place / each.file for place in places]
    if each.pin:  # its sha256 says which one it is, so it may lie anywhere
        candidates += [folder / each.file, folder / Path(each.file).name]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise ModelError(f"{each} is not in {folder}. Looked for {', '.join(str(c.relative_to(folder)) for c in candidates)}")


@contextmanager
def _kept_out(each: Wanted, part: Path) -> Iterator[None]:
    """A file that cannot be used is deleted, or the next call would take it for a good beginning."""
    try:
        yield
    except ModelError:
        part.unlink(missing_ok=True)
        raise


def _convert(each: Wanted, part: Path, target: Path) -> None:
    """A torch file as safetensors, once. Read with weights_only: a file that would run code is refused."""
    try:
        tensors = read_tensors(part, "a torch file of tensors")
    except ModelError as error:
        raise ModelError(f"{each}: {error}. Refused and deleted") from None
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, target)


def _check(each: Wanted, part: Path) -> None:
    """Raises ModelError for a file whose form is broken, which no recorded sha256 may make good."""
    try:
        if each.path.suffix == ".safetensors":
            with safetensors.safe_open(part, framework="pt"):
                return
        if each.path.suffix == ".json":
            json.loads(part.read_text(encoding="utf-8"))
    except (safetensors.SafetensorError, ValueError, OSError) as error:
        raise ModelError(f"{each} is damaged: {brief(error)}. Refused and deleted") from None


def _require_space(config: Config, root: Path, files: list[Wanted]) -> None:
    absent = {each.name for each in files if not (root / each.path).is_file()}
    needed = sum(config.downloads[name].megabytes for name in absent) / 1000
    free = shutil.disk_usage(root).free / 1e9
    if needed > free:
        raise ModelError(
            f"The downloads need about {needed:.1f} GB, {free:.1f} GB are free here. "
            f"Make room, or name some of {', '.join(sorted(absent))}"
        )


def _hint(error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return "It is gated or private: accept its licence on the hub and log in (`hf auth login`)."
    if status == 404:
        return "There is no such file at that revision."
    return "Behind a wall, use --mirror URL (or HF_ENDPOINT), or --from a folder that has it."
