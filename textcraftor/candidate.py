"""A candidate: what may be promoted. Folders of weights and their digest; torch is not needed to speak of one."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from textcraftor.artifact import digest
from textcraftor.errors import ModelError, unknown

ENCODER_PARTS = ("text_encoder", "text_encoder_2", "negative_embedding")
PARTS = (*ENCODER_PARTS, "unet")


@dataclass(frozen=True)
class Candidate:
    """A thing that may be promoted: folders of tuned weights; what is None is the base's own, all None is the base."""

    name: str
    text_encoder: Path | None = None
    unet: Path | None = None
    text_encoder_2: Path | None = None  # SDXL's second
    negative_embedding: Path | None = None

    @property
    def parts(self) -> dict[str, Path]:
        """The tuned modules' folders, by the pipeline's names for them."""
        return {part: path for part in PARTS if (path := getattr(self, part))}

    @classmethod
    def find(cls, name: str, root: Path) -> "Candidate":
        """`base`, a mix (`data/encoders/MIX`), a mix with its tuned UNet (`MIX-unet`), or a folder of either layout.

        Raises ModelError when there is no such candidate.
        """
        if name == "base":
            return cls(name)
        encoders = root / "data/encoders"
        mix = name.removesuffix("-unet")
        if len(Path(name).parts) > 1 or not (encoders / mix).is_dir():
            folder = Path(name)
            if folder.is_dir():
                return cls(folder.name, **_encoders(folder), unet=_weights(folder / "unet", optional=True))
            trained = [path.name for path in encoders.glob("[!.]*")]
            raise ModelError(
                f"{unknown('candidate', name, ['base', *trained])} A mix becomes one by `textcraftor train --mix NAME`"
            )
        unet_folder = _weights(root / "data/unets" / mix / "unet") if name.endswith("-unet") else None
        return cls(name, **_encoders(encoders / mix), unet=unet_folder)

    @cached_property
    def digest(self) -> str:
        """sha256 over the weights' folders: what a gate record speaks of. Empty for the base."""
        digests = {part: digest(path) for part, path in self.parts.items()}
        return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest() if digests else ""


def _encoders(folder: Path) -> dict[str, Path | None]:
    """What conditions the UNet, of a folder: the tuned text encoders and negative embedding, at least one of them."""
    found = {part: _weights(folder / part, optional=True) for part in ENCODER_PARTS}
    return found if any(found.values()) else {"text_encoder": _weights(folder / "text_encoder")}


def _weights(folder: Path, optional: bool = False) -> Path | None:
    if optional and not folder.exists():
        return None
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} holds no model (no config.json). A whole candidate is made by `textcraftor train`")
    return folder
