"""The resolved configuration that DVC's stages depend on, with the digest of every file that it names.

DVC compares parameters, not the files that they name: weights replaced at the same path would leave every stage up to date.
So `textcraftor resolve` runs first in every `dvc repro` and writes data/resolved.json, whose sections the stages list.
Fields that neither profile nor params.yaml set are left out: a field that the library gains reruns nothing. So are those that
say when checkpoints are written.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from textcraftor.artifact import digest, write_json
from textcraftor.config import MATRIX, Config, Section, named_files
from textcraftor.layout import DIGESTS, RESOLVED

WITHOUT_EFFECT = {"checkpoint_every", "checkpoint_minutes"}  # on a finished stage


def write_resolved(config: Config, root: Path) -> Path:
    """Write data/resolved.json, unless it holds the same already, and return its path."""
    digests = DigestCache(root / DIGESTS)
    record = resolve_sections(config, root, digests)
    digests.save()
    if _read_json(root / RESOLVED) != record:
        write_json(root / RESOLVED, record)
    return root / RESOLVED


def resolve_sections(config: Config, root: Path, digests: "DigestCache") -> dict[str, Any]:
    """What stages may depend on: sections of the configuration, `mix` and `evaluate` with the rewards that they use.

    A reward belongs to the mixes and judges that use it, so that another one changes nothing for the rest.
    """
    rewards = {name: _with_digests(reward, root, digests) for name, reward in config.rewards.items()}
    judges = {name: rewards.get(name.removesuffix(MATRIX), {}) for name in config.evaluate.judges}
    diversity = config.evaluate.diversity_judge
    return {
        "mixes": list(config.mixes),
        "curriculum": dict(config.curriculum),
        "unet_mixes": list(config.unet_mixes),
        "blends": list(config.blends),
        "blend": {name: config.blend[name].model_dump(mode="json") for name in config.blends},
        "cpu_threads": config.cpu_threads,
        **{
            name: _with_digests(getattr(config, name), root, digests)
            for name in ("prompts", "base", "chain", "sampler", "prepare", "train", "train_unet", "gate")
        },
        "mix": {
            mix: {name: {"weight": weight, **rewards[name]} for name, weight in config.mix[mix].items() if weight}
            for mix in config.all_mixes
        },
        "ablation": {
            **_with_digests(config.ablation, root, digests),
            "rewards": {
                mix: {name: {"weight": weight, **rewards[name]} for name, weight in weights.items()}
                for mix, weights in config.reward_mixes.items()
            },
        },
        "evaluate": {
            **_with_digests(config.evaluate, root, digests),
            "judges": judges,
            "diversity_judge": {diversity: rewards[diversity]},
        },
    }


class DigestCache:
    """sha256 of files and folders. A file is read again only when its inode, size or modification time changed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: dict[str, str] = _read_json(path) or {}
        self._changed = False

    def digest(self, path: Path) -> str:
        """sha256 of a file; of a folder, over the names and digests of its files. Raises FileNotFoundError."""
        if path.is_dir():
            files = sorted(each for each in path.rglob("*") if each.is_file())
            lines = [f"{each.relative_to(path).as_posix()}\0{self.digest(each)}\n" for each in files]
            return hashlib.sha256("".join(lines).encode()).hexdigest()
        stat = path.stat()
        key = f"{stat.st_dev}:{stat.st_ino}:{stat.st_size}:{stat.st_mtime_ns}"
        if key not in self._known:
            self._known[key] = digest(path)
            self._changed = True
        return self._known[key]

    def save(self) -> None:
        if self._changed:
            write_json(self.path, self._known)


def _with_digests(section: Section, root: Path, digests: DigestCache) -> dict[str, Any]:
    """The fields that profile and params.yaml set; the path of a file that exists is followed by its digest."""
    fields: dict[str, Any] = section.model_dump(mode="json", exclude_unset=True, exclude=WITHOUT_EFFECT)
    for (*parents, name), path in named_files(section):
        if (root / path).exists():
            holder: Any = fields
            for parent in parents:
                holder = holder[parent]
            holder[name] = f"{path} sha256:{digests.digest(root / path)}"
    return fields


def _read_json(path: Path) -> Any:
    """What a JSON file holds, None where it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
