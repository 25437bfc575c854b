"""A candidate for promotion: folders of tuned weights and their digest. Importing this needs no torch."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from textcraftor.artifact import digest
from textcraftor.errors import ModelError, unknown
from textcraftor.layout import BASE, ENCODERS, encoder_folder, has_tuned_unet, mix_of, unet_folder

ENCODER_PARTS = ("text_encoder", "text_encoder_2", "negative_embedding")
PARTS = (*ENCODER_PARTS, "unet")


@dataclass(frozen=True)
class Candidate:
    """Folders of tuned weights that may be promoted. A part that is None is the base model's; all None is the base."""

    name: str
    text_encoder: Path | None = None
    unet: Path | None = None
    text_encoder_2: Path | None = None  # SDXL's second
    negative_embedding: Path | None = None

    @property
    def mix(self) -> str:
        """The reward mix that the candidate was trained on; empty for the base."""
        return mix_of(self.name) if self.name != BASE else ""

    @property
    def parts(self) -> dict[str, Path]:
        """Folders of the tuned modules, by their names in a diffusers pipeline."""
        return {part: path for part in PARTS if (path := getattr(self, part))}

    @classmethod
    def find(cls, name: str, root: Path) -> "Candidate":
        """Look a candidate up: `base`, a mix, a mix with its tuned UNet (`MIX-unet`), or a folder laid out like theirs.

        root: the workspace; a folder is relative to the current one.
        Raises ModelError when there is no such candidate.
        """
        if name == BASE:
            return cls(name)
        mix = mix_of(name)
        encoders = root / encoder_folder(mix)
        if len(Path(name).parts) > 1 or not encoders.is_dir():
            folder = Path(name)
            if folder.is_dir():
                return cls.at(folder)
            trained = [path.name for path in (root / ENCODERS).glob("[!.]*")]
            raise ModelError(
                f"{unknown('candidate', name, [BASE, *trained])} `textcraftor train --mix NAME` makes a mix's candidate"
            )
        unet = _weights(root / unet_folder(mix) / "unet") if has_tuned_unet(name) else None
        return cls(name, **_encoders(encoders), unet=unet)

    @classmethod
    def at(cls, folder: Path) -> "Candidate":
        """The candidate in a folder laid out like data/encoders/MIX. Raises ModelError when it holds none."""
        return cls(folder.resolve().name, **_encoders(folder), unet=_weights(folder / "unet", optional=True))

    @cached_property
    def digest(self) -> str:
        """sha256 over the folders of weights, as named in gate records. Empty for the base."""
        digests = {part: digest(path) for part, path in self.parts.items()}
        return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest() if digests else ""


def _encoders(folder: Path) -> dict[str, Path | None]:
    """The tuned text encoders and negative embedding in a folder. Raises ModelError when there is none."""
    found = {part: _weights(folder / part, optional=True) for part in ENCODER_PARTS}
    return found if any(found.values()) else {"text_encoder": _weights(folder / "text_encoder")}


def _weights(folder: Path, optional: bool = False) -> Path | None:
    if optional and not folder.exists():
        return None
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} holds no model (no config.json). `textcraftor train` writes a complete candidate")
    return folder
