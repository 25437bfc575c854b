"""A candidate for promotion: folders of tuned weights and their digest. Importing this needs no torch."""

import contextlib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from textcraftor.artifact import digest
from textcraftor.config import ORIGINAL, Weights
from textcraftor.errors import ConfigError, ModelError, unknown
from textcraftor.layout import (
    BASE,
    BLENDS,
    ENCODERS,
    blend_folder,
    blend_of,
    encoder_folder,
    has_tuned_unet,
    mix_of,
    unet_folder,
)

ENCODER_PARTS = ("text_encoder", "text_encoder_2", "negative_embedding")
PARTS = (*ENCODER_PARTS, "unet")
UNET_PREFIX = "unet-"  # of the files of a UNet's training, where they lie beside those of its text encoder's
BLEND_FILE = "blend.json"
BLEND_PARTS = "parts"  # folder of a saved blend's encoders, each laid out like data/encoders/MIX


@dataclass(frozen=True)
class SavedBlend:
    """A blend of embeddings on disk: its weights, its encoders, and the digests that they had when it was saved."""

    file: Path
    weights: Weights
    parts: dict[str, "Candidate"]
    digests: dict[str, str]

    @classmethod
    def read(cls, folder: Path) -> "SavedBlend | None":
        """The blend in a folder; None where there is none, or where it was merged into one encoder.

        Raises ModelError when blend.json is damaged or an encoder is missing.
        """
        file = folder / BLEND_FILE
        if not file.is_file():
            return None
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            if record["space"] == "weights":
                return None
            weights, digests = (
                Weights.parse(record["weights"]),
                {name: str(part["digest"]) for name, part in record["parts"].items()},
            )
        except (ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
            raise ModelError(f"{file} is damaged ({type(error).__name__}: {error}). Save the blend again") from None
        if missing := {*weights.names} - {ORIGINAL, *digests}:
            raise ModelError(f"{file} is damaged: it names no encoder for {', '.join(sorted(missing))}. Save the blend again")
        return cls(file, weights, {name: Candidate.at(folder / BLEND_PARTS / name) for name in sorted(digests)}, digests)


@dataclass(frozen=True)
class Candidate:
    """Folders of tuned weights that may be promoted. A part that is None is the base model's; all None is the base."""

    name: str
    text_encoder: Path | None = None
    unet: Path | None = None
    text_encoder_2: Path | None = None  # SDXL's second
    negative_embedding: Path | None = None
    blend: SavedBlend | None = None  # of other candidates' encoders, in place of all of the above

    @property
    def mix(self) -> str:
        """The reward mix that the candidate was trained on; empty for the base."""
        return mix_of(self.name) if self.name != BASE else ""

    @property
    def parts(self) -> dict[str, Path]:
        """Folders of the tuned modules, by their names in a diffusers pipeline; of a blend, its file and its encoders'."""
        if self.blend:
            parts = {f"{name}/{part}": path for name, each in self.blend.parts.items() for part, path in each.parts.items()}
            return {BLEND_FILE: self.blend.file, **parts}
        return {part: path for part in PARTS if (path := getattr(self, part))}

    @classmethod
    def find(cls, name: str, root: Path) -> "Candidate":
        """Look a candidate up: `base`, a mix, a mix with its tuned UNet (`MIX-unet`), a saved blend (`blend-NAME`), or a folder
        laid out like theirs. A UNet that was tuned on the original text encoder is a candidate without one.

        root: the workspace.  A folder is relative to the current one and written with a slash: a plain name is never a folder.
        Raises ModelError when there is no such candidate.
        """
        if name == BASE:
            return cls(name)
        if (blend := blend_of(name)) and "/" not in name:
            if not (root / blend_folder(blend)).is_dir():
                saved = [path.name for path in (root / BLENDS).glob("[!.]*")]
                raise ModelError(
                    f"{unknown('blend', blend, saved)} `textcraftor blend NAME=WEIGHT ... --save {blend}` makes it"
                )
            return replace(cls.at(root / blend_folder(blend)), name=name)
        mix = mix_of(name)
        if has_tuned_unet(name) and "/" not in name and is_unet_alone(root / unet_folder(mix)):
            return cls(name, unet=_weights(root / unet_folder(mix) / "unet"))
        encoders = root / encoder_folder(mix)
        if "/" in name or not encoders.is_dir():
            if "/" in name and Path(name).is_dir():
                return cls.at(Path(name))
            trained = [path.name for path in (root / ENCODERS).glob("[!.]*")]
            raise ModelError(
                f"{unknown('candidate', name, [BASE, *trained])} `textcraftor train --mix NAME` makes a mix's candidate"
            )
        unet = _weights(root / unet_folder(mix) / "unet") if has_tuned_unet(name) else None
        return cls(name, **_encoders(encoders), unet=unet)

    @classmethod
    def at(cls, folder: Path) -> "Candidate":
        """The candidate in a folder laid out like data/encoders/MIX or data/blends/NAME. Raises ModelError for any other."""
        if blend := SavedBlend.read(folder):
            return cls(folder.resolve().name, blend=blend)
        if is_unet_alone(folder):
            return cls(folder.resolve().name, unet=_weights(folder / "unet"))
        return cls(folder.resolve().name, **_encoders(folder), unet=_weights(folder / "unet", optional=True))

    @cached_property
    def digest(self) -> str:
        """sha256 over the folders of weights, as named in gate records. Empty for the base."""
        return parts_digest({part: digest(path) for part, path in self.parts.items()})


def is_unet_alone(folder: Path) -> bool:
    """Whether a folder holds a UNet that was tuned on the base's text encoder, by the proof of its training."""
    for name in (f"{UNET_PREFIX}proof.json", "proof.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return bool(json.loads((folder / name).read_text(encoding="utf-8"))["config"]["tune"]["encoder"] == "original")
    return False


def parts_digest(digests: Mapping[str, str]) -> str:
    """The digest of a candidate, from those of its parts, named as in `Candidate.parts`; empty without parts."""
    return hashlib.sha256(json.dumps(dict(digests), sort_keys=True).encode()).hexdigest() if digests else ""


def _encoders(folder: Path) -> dict[str, Any]:
    """The tuned text encoders and negative embedding in a folder. Raises ModelError when there is none."""
    found = {part: _weights(folder / part, optional=True) for part in ENCODER_PARTS}
    return found if any(found.values()) else {"text_encoder": _weights(folder / "text_encoder")}


def _weights(folder: Path, optional: bool = False) -> Path | None:
    if optional and not folder.exists():
        return None
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} holds no model (no config.json). `textcraftor train` writes a complete candidate")
    return folder
