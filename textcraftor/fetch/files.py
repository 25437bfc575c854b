"""The files that a profile's `downloads` name: where each comes from, and where the workspace keeps it."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from textcraftor.config import Config, Download
from textcraftor.errors import ConfigError, ModelError, unknown

PICKLES: Final = (".bin", ".ckpt", ".pt", ".pth")
# File names that libraries expect for safetensors, where more than the suffix differs from the torch file's.
STORED_AS: Final = {"open_clip_pytorch_model.bin": "open_clip_model.safetensors", "pytorch_model.bin": "model.safetensors"}


@dataclass(frozen=True)
class RequiredFile:
    """One file of a download. `file` is its published name, `path` where the workspace keeps it."""

    name: str  # of the download
    download: Download
    file: str

    @property
    def path(self) -> Path:
        """Relative to the workspace. A torch file is kept as safetensors."""
        published = Path(self.file)
        if published.suffix not in PICKLES:
            return Path(self.download.to) / published
        stored = STORED_AS.get(published.name, published.with_suffix(".safetensors").name)
        return Path(self.download.to) / published.with_name(stored)

    @property
    def converted(self) -> bool:
        """Whether the file is kept in another format than it is published in."""
        return self.path.name != Path(self.file).name

    @property
    def pin(self) -> str:
        """sha256 of the published file according to the profile; empty where the profile has none."""
        return self.download.files[self.file]

    @property
    def origin(self) -> str:
        """Repository and commit, or URL."""
        return f"{self.download.hub}@{self.download.revision}" if self.download.hub else self.download.url

    def __str__(self) -> str:
        where = f"{self.download.hub}@{self.download.revision[:7]}" if self.download.hub else self.download.url
        return f"{self.file} of {where}"


def required_files(config: Config, names: Collection[str] = ()) -> list[RequiredFile]:
    """Every file of the profile's downloads, or of the downloads named. Raises ConfigError for an unknown name."""
    for name in names:
        if name not in config.downloads:
            raise ConfigError(unknown("download", name, config.downloads))
    chosen = {name: download for name, download in config.downloads.items() if not names or name in names}
    return [RequiredFile(name, download, file) for name, download in chosen.items() for file in download.files]


def missing_files(config: Config, root: Path) -> list[RequiredFile]:
    """The files that the workspace does not have. Only names are checked; `fetch` and `doctor --verify` read the bytes."""
    return [required for required in required_files(config) if not (root / required.path).is_file()]


def require(config: Config, root: Path) -> None:
    """Raise ModelError when the workspace lacks a file of the profile's downloads."""
    absent = missing_files(config, root)
    if absent:
        size = sum(config.downloads[name].megabytes for name in {required.name for required in absent}) / 1000
        raise ModelError(
            f"{absent[0].path} is missing ({len(absent)} files, of downloads of {size:.1f} GB). Get them with "
            f"`textcraftor fetch --profile {config.profile}`, and see what else is needed with `textcraftor doctor`"
        )
