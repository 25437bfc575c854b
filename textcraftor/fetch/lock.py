"""weights.lock.json: the sha256 and origin of every file that was fetched. It belongs in version control."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from textcraftor.artifact import digest
from textcraftor.errors import ModelError
from textcraftor.fetch.files import RequiredFile

LOCK: Final = Path("weights.lock.json")

Entry = dict[str, Any]


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


def new_entry(required: RequiredFile, path: Path, published: str) -> Entry:
    """The entry of a file that was put at `path`. published: sha256 of the published file."""
    return {
        "sha256": digest(path) if required.converted else published,
        "bytes": path.stat().st_size,
        "origin": required.origin,
        "file": required.file,
        "published_sha256": published,
    }


def mismatch(required: RequiredFile, root: Path, lock: Mapping[str, Entry]) -> str:
    """Why the bytes in the workspace are not the expected ones; empty when they are."""
    found, entry = digest(root / required.path), lock.get(str(required.path))
    if entry and entry["origin"] != required.origin:
        return f"it is of {entry['origin']}, the profile asks for {required.origin}"
    if entry and required.pin and entry["published_sha256"] != required.pin:
        return f"{LOCK} and the profile's sha256 differ"
    expected = entry["sha256"] if entry else required.pin if not required.converted else ""
    if expected and found != expected:
        return f"its sha256 is {found[:12]}..., expected {expected[:12]}..."
    return "" if expected or not required.converted else f"it is not in {LOCK}, so nothing says what it is"
