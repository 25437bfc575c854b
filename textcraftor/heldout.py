"""Held-out judges: no mix may train on their weights, whatever name or file those weights go by.

A model is known by a fingerprint of its tensors. Another file name, format, order or metadata, or files beside the
weights, make no difference, and neither does a changed tensor or two. Not seen: weights stored in another precision,
fine-tuned, or with noise added, and a reward of the user's own that computes what a judge does.
"""

import hashlib
import json
import mmap
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from textcraftor.artifact import digest
from textcraftor.config import MATRIX, Config, RewardConfig
from textcraftor.errors import ConfigError

FORMATS: Final = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
LARGEST: Final = 16  # tensors of a fingerprint


@dataclass(frozen=True)
class Fingerprint:
    """What identifies a reward model's weights.

    digest: over the bytes of all tensors, in no order.  largest: shortened digests of the largest tensors.  A model that
    is not on this machine has its hub id for a digest, and one without weights its kind.
    """

    digest: str
    largest: tuple[str, ...] = ()

    def same_weights(self, other: "Fingerprint") -> bool:
        """Whether two models have the same weights: all of them, or at least half of their largest tensors."""
        shared = len({*self.largest} & {*other.largest})
        return self.digest == other.digest or 2 * shared >= max(1, min(len(self.largest), len(other.largest)))

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "largest": list(self.largest)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Fingerprint":
        return cls(data["digest"], tuple(data["largest"]))


def fingerprint(reward: RewardConfig) -> Fingerprint:
    """The fingerprint of a reward's weights: its model, and its head where that lies elsewhere. Reads every byte once."""
    named = [path.removeprefix("local-dir:") for path in (reward.path, reward.head) if path]
    present = [Path(path) for path in named if Path(path).exists()]
    if not present:
        return Fingerprint(" ".join(named) or f"kind {reward.kind}")
    tensors = {key: size for path in present for key, size in _tensors(path)}
    total = hashlib.sha256("\n".join(sorted(tensors)).encode()).hexdigest()
    largest = sorted(tensors, key=lambda key: (-tensors[key], key))[:LARGEST]
    return Fingerprint(total, tuple(key[:16] for key in largest))


def require_held_out(
    config: Config, mix: Mapping[str, float], root: Path, earlier: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The fingerprints of a mix's rewards as JSON, by name, for the proof of what is trained on them.

    mix: reward -> weight.  root: the workspace.  earlier: fingerprints as JSON of what the encoder was trained on before.
    Raises ConfigError when one of the rewards has the weights of a held-out judge.
    """
    trained = {name: fingerprint(config.rewards[name].at(root)) for name, weight in mix.items() if weight}
    before = {name: Fingerprint.from_json(each) for name, each in (earlier or {}).items()}
    for judge in config.evaluate.heldout_judges:
        name = judge.removesuffix(MATRIX)
        reward = same_weights(fingerprint(config.rewards[name].at(root)), trained) if name in config.rewards else None
        if reward:
            raise ConfigError(
                f"The mix trains on {reward!r} ({config.rewards[reward].path}), which has the weights of the held-out judge "
                f"{judge!r} ({config.rewards[name].path}). Take it out of the mix, or name other evaluate.heldout_judges"
            )
        if name in config.rewards and (reward := same_weights(fingerprint(config.rewards[name].at(root)), before)):
            raise ConfigError(
                f"The encoder to start from was trained on {reward!r}, which has the weights of the held-out judge {judge!r}. "
                "Start from another, or name other evaluate.heldout_judges"
            )
    new = {name if before.get(name, each) == each else f"{name} (now)": each for name, each in trained.items()}
    return {name: each.as_json() for name, each in {**before, **new}.items()}


def same_weights(judge: Fingerprint, trained: Mapping[str, Fingerprint]) -> str | None:
    """The first of the trained rewards that has the judge's weights; None if none does."""
    return next((name for name, reward in trained.items() if judge.same_weights(reward)), None)


def _tensors(path: Path) -> Iterator[tuple[str, int]]:
    """(sha256, bytes) of each tensor in a file, or in every file of weights in a folder."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix in FORMATS)
    for file in files:
        try:
            yield from _safetensors(file) if file.suffix == ".safetensors" else _torch_storages(file)
        except (ValueError, KeyError, TypeError, AttributeError, OSError, zipfile.BadZipFile):
            yield digest(file), file.stat().st_size  # of no format known here: the file as it is
    if not files:
        yield digest(path), 0


def _safetensors(path: Path) -> Iterator[tuple[str, int]]:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data, memoryview(data) as view:
        header = int.from_bytes(view[:8], "little")
        tensors = json.loads(bytes(view[8 : 8 + header]))
        for name, tensor in tensors.items():
            if name != "__metadata__":
                start, end = tensor["data_offsets"]
                with view[8 + header + start : 8 + header + end] as part:
                    yield hashlib.sha256(part).hexdigest(), end - start


def _torch_storages(path: Path) -> Iterator[tuple[str, int]]:
    """Storages of a torch file, read as the zip archive that it is: nothing is unpickled."""
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if "/data/" in entry.filename:
                yield hashlib.sha256(archive.read(entry)).hexdigest(), entry.file_size
