"""Transfer of one file: downloaded or found in a folder, then checked or converted. Nothing is ever unpickled."""

import json
from pathlib import Path
from typing import Final, cast
from urllib.parse import urlsplit

import safetensors
from huggingface_hub import get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]
from safetensors.torch import save_file

from textcraftor.artifact import digest
from textcraftor.errors import ModelError
from textcraftor.fetch.files import RequiredFile
from textcraftor.models.weights import brief, read_tensors
from textcraftor.network import require_usable_network

# The hub's client raises its HTTP library's own errors when a connection fails; this is their base class.
CONNECTION_ERROR: Final[type[Exception]] = cast(type[Exception], HfHubHTTPError.__bases__[0])


def download(required: RequiredFile, part: Path, expected: str, mirror: str) -> str:
    """Append to the partial file `part` what is missing. Returns the sha256 on the hub's record, or "" where it has none.

    The partial file is our own, because the hub's client starts over in every process.
    expected: sha256 of the whole file, if known.  mirror: a hub endpoint, or "" for the default.
    Raises ModelError when the file cannot be downloaded; the partial file is kept. Raises UserError for proxy or
    certificate settings that no client can use.
    """
    if expected and part.exists() and digest(part) == expected:
        return ""
    source = required.download
    require_usable_network()
    try:
        if source.url:
            _append(source.url, part)
            return ""
        address = hf_hub_url(source.hub, required.file, revision=source.revision, endpoint=mirror or None)
        metadata = get_hf_file_metadata(address)
        if metadata.commit_hash and metadata.commit_hash != source.revision:
            raise ModelError(f"{required}: the hub answered with commit {metadata.commit_hash}. A mirror must keep revisions")
        etag = metadata.etag or ""
        # After a redirect to another host, the URL carries its own signature: our token is for the hub alone.
        redirected = urlsplit(metadata.location).netloc != urlsplit(address).netloc
        _append(metadata.location, part, {} if redirected else build_hf_headers(), metadata.size)
        return etag if len(etag) == 64 else ""
    except (HfHubHTTPError, CONNECTION_ERROR, OSError) as error:
        progress = (
            f" {part.stat().st_size / 1e6:.1f} MB of it are kept, and the next fetch goes on from there."
            if part.exists()
            else ""
        )
        raise ModelError(f"{required} could not be downloaded: {brief(error)}.{progress} {_hint(error)}") from None


def find_in(folder: Path, required: RequiredFile) -> Path:
    """The published file in a local folder. Raises ModelError with the places where it was looked for."""
    repository, to = required.download.hub, Path(required.download.to).name
    cached = f"models--{repository.replace('/', '--')}/snapshots/{required.download.revision}"
    places = [to, *([repository, Path(repository).name, cached, f"hub/{cached}"] if repository else [])]
    candidates = [folder / place / required.file for place in places]
    if required.pin:  # identified by its sha256, it may be anywhere
        candidates += [folder / required.file, folder / Path(required.file).name]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    tried = ", ".join(str(candidate.relative_to(folder)) for candidate in candidates)
    raise ModelError(f"{required} is not in {folder}. Looked for {tried}")


def convert(required: RequiredFile, part: Path, target: Path) -> None:
    """Write a torch file as safetensors. It is read with weights_only: a file that would run code raises ModelError."""
    try:
        tensors = read_tensors(part, "a torch file of tensors")
    except ModelError as error:
        raise ModelError(f"{required}: {error}. Refused and deleted") from None
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, target)


def check_format(required: RequiredFile, part: Path) -> None:
    """Raise ModelError for a safetensors or JSON file that cannot be parsed, whatever its sha256 is."""
    try:
        if required.path.suffix == ".safetensors":
            with safetensors.safe_open(part, framework="pt"):
                return
        if required.path.suffix == ".json":
            json.loads(part.read_text(encoding="utf-8"))
    except (safetensors.SafetensorError, ValueError, OSError) as error:
        raise ModelError(f"{required} is damaged: {brief(error)}. Refused and deleted") from None


def _append(address: str, part: Path, headers: dict[str, str] | None = None, size: int | None = None) -> None:
    if part.exists() and size is not None and part.stat().st_size > size:
        part.unlink()
    with part.open("r+b" if part.exists() else "w+b") as file:
        done = file.seek(0, 2)
        http_get(address, file, resume_size=done, headers=headers or {}, expected_size=size, displayed_filename=part.stem)


def _hint(error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return "It is gated or private: accept its licence on the hub and log in (`hf auth login`)."
    if status == 404:
        return "There is no such file at that revision."
    return "Behind a wall, use --mirror URL (or HF_ENDPOINT), or --from a folder that has it."
