"""What the studio's page draws: a blend beside the base, and how to draw it again without the page."""

import io
import json
import math
import shlex
import threading
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import torch
from PIL import Image, PngImagePlugin, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from textcraftor import pictures
from textcraftor.candidate import Candidate
from textcraftor.chain.sampler import Sampler
from textcraftor.config import ORIGINAL, Config, Term, Weights
from textcraftor.errors import ConfigError, ModelError
from textcraftor.generate import not_finite
from textcraftor.models.base import load_base
from textcraftor.models.blended import BlendedModel, load_blend

METADATA: Final = "textcraftor"  # the key of a PNG's text that holds the settings


class Settings(BaseModel):
    """What a picture is drawn from. weights: of the tuned encoders; the original has the rest, so that they sum to 1."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str = Field(min_length=1, max_length=1000, pattern=r"\S")
    seed: int = Field(0, ge=0, lt=2**53)
    weights: dict[str, float] = Field(default_factory=dict)
    switch_at: float = Field(ge=0, le=1)
    guidance_scale: float = Field(ge=1, le=50)

    @classmethod
    def parse(cls, text: bytes | str) -> "Settings":
        """Read JSON. Raises ConfigError."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            faults = (f"{'.'.join(map(str, each['loc'])) or 'settings'}: {each['msg']}" for each in error.errors())
            raise ConfigError("; ".join(faults)) from None

    @property
    def terms(self) -> Weights:
        """The weights with the original's. Raises ConfigError for one that is not finite."""
        rest = round(1 - math.fsum(self.weights.values()), 6)
        return Weights((Term(ORIGINAL, rest), *(Term(name, weight) for name, weight in sorted(self.weights.items()) if weight)))


class Studio:
    """A base and tuned encoders in memory. One picture is drawn at a time.

    parts: by the names that the page shows.  Raises ModelError for one that does not fit the base or has a UNet of its own.
    """

    def __init__(self, run: Config, parts: Mapping[str, Candidate], root: Path, device: torch.device) -> None:
        self.run, self.parts, self.root = run, dict(parts), root
        self.base = load_base(run.base.at(root), device)
        self.models = load_blend(parts, Weights(tuple(Term(name, 1.0) for name in parts)), self.base).models if parts else {}
        self._lock = threading.Lock()
        self._sampler = lru_cache(8)(self._new_sampler)
        self._prefix = lru_cache(64)(self._new_prefix)
        self._base_image = lru_cache(64)(self._new_base_image)

    def defaults(self) -> dict[str, Any]:
        """What the page starts with."""
        settings = {"switch_at": self.run.sampler.switch_at, "guidance_scale": self.run.chain.guidance_scale}
        return {"encoders": list(self.parts), "size": self.run.base.resolution, **settings}

    def draw(self, settings: Settings) -> dict[str, Any]:
        """PNGs of the base and of the blend, the command and the code for the blend. Raises ConfigError, ModelError."""
        weights = settings.terms
        weights.require_known(self.parts)
        with self._lock:
            key = (settings.prompt, settings.seed, settings.guidance_scale)
            base = self._base_image(*key)
            prefix = self._prefix(*key, settings.switch_at)
            sampler = self._sampler(settings.guidance_scale, settings.switch_at)
            blend = BlendedModel(self.models or {ORIGINAL: None}, weights)
            images = sampler.generate([settings.prompt], [settings.seed], blend, prefix)
        if not images.isfinite().all():
            raise ModelError(not_finite(settings.prompt))
        return {
            "base": _png(base),
            "blend": _png(pictures.to_bytes(images)[0], self._metadata(settings)),
            "command": self.command(settings),
            "snippet": self.snippet(settings),
            "note": f"{weights.extrapolates}: beyond the encoders" if weights.extrapolates else "",
        }

    def command(self, settings: Settings) -> str:
        """The command line that draws the same."""
        options = [f"--seed={settings.seed}", f"--switch-at={settings.switch_at:g}"]
        options.append(f"--guidance-scale={settings.guidance_scale:g}")
        return shlex.join(["textcraftor", "blend", *map(str, settings.terms.terms), settings.prompt, *options])

    def snippet(self, settings: Settings) -> str:
        """Code that blends the same on a stock pipeline. Its noise is the pipeline's own."""
        weights = {term.name: term.weight for term in settings.terms.terms}
        folders = {name: str(self._folder(self.parts[name])) for name in weights if name in self.parts}
        size = self.run.base.resolution
        call = f"height={size}, width={size}, num_inference_steps={self.run.chain.num_inference_steps}"
        return (
            "from diffusers import DiffusionPipeline\n"
            "from textcraftor.control import Control\n\n"
            f"pipe = DiffusionPipeline.from_pretrained({str(self.run.base.at(self.root).path)!r})\n"
            f"control = Control.from_folders({folders!r},\n    {weights!r}, switch_at={settings.switch_at:g})\n"
            f"image = pipe({call}, guidance_scale={settings.guidance_scale:g},\n"
            f"    **control(pipe, {settings.prompt!r})).images[0]\n"
        )

    def restore(self, png: bytes) -> dict[str, Any]:
        """{settings, note} of a picture that the studio drew. Raises ConfigError for any other."""
        try:
            with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
                text = getattr(image, "text", {}).get(METADATA)
            record = json.loads(text or "")
            settings, digests = Settings.parse(json.dumps(record["settings"])), dict(record["digests"])
        except (UnidentifiedImageError, OSError, ValueError, KeyError, TypeError, SyntaxError, Image.DecompressionBombError):
            raise ConfigError("This is no picture of the studio: it has no settings in it") from None
        settings.terms.require_known(self.parts)
        other = [name for name, digest in digests.items() if name in self.parts and self.parts[name].digest != digest]
        note = f"It was drawn with another {', '.join(sorted(other))} than the one here" if other else ""
        return {"settings": settings.model_dump(mode="json"), "note": note}

    def _metadata(self, settings: Settings) -> str:
        digests = {name: self.parts[name].digest for name in settings.weights}
        return json.dumps({"settings": settings.model_dump(mode="json"), "digests": digests})

    def _folder(self, candidate: Candidate) -> Path:
        return next(iter(candidate.parts.values())).parent

    def _new_sampler(self, guidance_scale: float, switch_at: float) -> Sampler:
        chain = self.run.chain.model_copy(update={"guidance_scale": guidance_scale})
        return Sampler(self.base, chain, switch_at)

    def _new_prefix(self, prompt: str, seed: int, guidance_scale: float, switch_at: float) -> Tensor:
        return self._sampler(guidance_scale, switch_at).prefix([prompt], [seed])

    def _new_base_image(self, prompt: str, seed: int, guidance_scale: float) -> Tensor:
        """(3, H, W) uint8. Where the switch is does not matter to the base."""
        switch_at = self.run.sampler.switch_at
        prefix = self._prefix(prompt, seed, guidance_scale, switch_at)
        return pictures.to_bytes(self._sampler(guidance_scale, switch_at).generate([prompt], [seed], None, prefix))[0]


def _png(image: Tensor, metadata: str = "") -> bytes:
    out, info = io.BytesIO(), PngImagePlugin.PngInfo()
    if metadata:
        info.add_text(METADATA, metadata)
    pictures.picture(image).save(out, "PNG", pnginfo=info)
    return out.getvalue()
