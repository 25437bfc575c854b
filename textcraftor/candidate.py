"""A candidate: what may be promoted. Folders of weights and their digest; torch is not needed to speak of one."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from textcraftor.artifact import digest
from textcraftor.errors import ModelError, unknown


@dataclass(frozen=True)
class Candidate:
    """A thing that may be promoted: folders of tuned weights, both None for the base itself."""

    name: str
    text_encoder: Path | None = None
    unet: Path | None = None

    @classmethod
    def find(cls, name: str, root: Path) -> "Candidate":
        """`base`, a mix (`data/encoders/MIX`), a mix with its tuned UNet (`MIX-unet`), or a folder of either layout.

        Raises ModelError when there is no such candidate.
        """
        if name == "base":
            return cls(name)
        encoders = root / "data/encoders"
        mix = name.removesuffix("-unet")
        if not (encoders / mix).is_dir():
            folder = Path(name)
            if folder.is_dir():
                unet = folder / "unet"
                return cls(folder.name, _weights(folder / "text_encoder"), _weights(unet) if unet.exists() else None)
            trained = [path.name for path in encoders.glob("[!.]*")]
            raise ModelError(
                f"{unknown('candidate', name, ['base', *trained])} A mix becomes one by `textcraftor train --mix NAME`"
            )
        unet_folder = _weights(root / "data/unets" / mix / "unet") if name.endswith("-unet") else None
        return cls(name, _weights(encoders / mix / "text_encoder"), unet_folder)

    @cached_property
    def digest(self) -> str:
        """sha256 over the weights' folders: what a gate record speaks of. Empty for the base."""
        parts = {"text_encoder": self.text_encoder, "unet": self.unet}
        digests = {part: digest(path) for part, path in parts.items() if path}
        return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest() if digests else ""


def _weights(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} holds no model (no config.json). A whole candidate is made by `textcraftor train`")
    return folder
