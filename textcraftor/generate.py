"""`textcraftor generate`: images of one prompt from the base and from a candidate, from the same noise."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from textcraftor import pictures
from textcraftor.artifact import digest, written_aside
from textcraftor.candidate import Candidate
from textcraftor.chain.sampler import Sampler
from textcraftor.config import BaseConfig, ChainConfig, Config, SamplerConfig
from textcraftor.errors import ModelError
from textcraftor.models.base import Base, TunedModel, load_base
from textcraftor.models.blended import BlendedModel, load_model
from textcraftor.snapshot import private_copy


def draw(
    config: Config, candidate: Candidate, prompt: str, seed: int, out: Path, device: torch.device, label: str | None = None
) -> None:
    """Write a PNG to `out`: the base's image, and the candidate's below it, under `label`. Raises ModelError."""
    base = load_base(config.base, device)
    tuned = load_model(candidate, base)
    draw_models(config, base, {label or candidate.name: tuned} if tuned else {}, prompt, seed, out)


def draw_models(
    config: Config, base: Base, models: Mapping[str, TunedModel | BlendedModel], prompt: str, seed: int, out: Path
) -> None:
    """Write a PNG to `out`: the base's image, and those of the models below it, each under its name. Raises ModelError."""
    sampler = Sampler(base, config.chain, config.sampler.switch_at)
    prefix = sampler.prefix([prompt], [seed])
    rows = {}
    for name, model in {"base": None, **models}.items():
        images = sampler.generate([prompt], [seed], model, prefix)
        if not images.isfinite().all():  # it would become a black picture
            raise ModelError(not_finite(prompt))
        rows[name] = [pictures.picture(pictures.to_bytes(images)[0])]
    with written_aside(out) as aside:
        pictures.save(pictures.side_by_side([prompt], rows), aside)


def not_finite(prompt: str) -> str:
    """The message about an image that would be black, because a module overflowed or its weights are damaged."""
    return (
        f"The model generated an image with values that are not finite, for prompt {prompt!r}. Many VAEs overflow in half "
        "precision: set base.dtype: float32 or bfloat16. If it is float32 already, the weights are damaged"
    )


def with_judged_settings(config: Config, proof: Mapping[str, Any], root: Path, private: Path | None = None) -> Config:
    """`config` with the base, chain and sampler that a candidate was judged with.

    proof: of the candidate's scores, as `textcraftor.artifact.proof` makes it.  root: of relative paths.
    private: a folder for a copy of the base, which is then compared and loaded from.
    Each file or folder of the base is taken from where it was judged, or from where `config` names it, whichever has the
    judged digest; a base that was judged by its hub id is identified by id and revision.
    Raises ModelError when neither has it, or when the proof does not name the three.
    """
    try:
        sections = proof["config"]
        base = BaseConfig.model_validate(sections["base"])
        chain = ChainConfig.model_validate(sections["chain"])
        sampler = SamplerConfig.model_validate(sections["sampler"])
    except (KeyError, TypeError, ValidationError):
        raise ModelError(
            "The scores of this model do not say with which base, chain and sampler it was judged, in terms this version "
            "understands. Evaluate it again"
        ) from None
    judged, here = base.own_files(), config.base.own_files()
    for field, path in judged.items():
        if expected := proof.get("inputs", {}).get("base" if field == "path" else f"base {field}"):
            found = _judged_base(path, here.get(field, path), expected, root, private)
            base = base.model_copy(update={field: found})
    return config.model_copy(update={"base": base, "chain": chain, "sampler": sampler})


def _judged_base(judged: str, configured: str, expected: str, root: Path, private: Path | None) -> str:
    """The path, of the two, whose files have the digest `expected`, or its copy's. Raises ModelError when neither has it."""
    found = []
    for path in dict.fromkeys((judged, configured)):
        if (root / path).exists():
            copied = str(private_copy(root / path, private).absolute()) if private else path
            if (seen := digest(root / copied)) == expected:
                return copied
            found.append(f"{path} has {seen[:12]}")
        else:
            found.append(f"{path} does not exist")
    raise ModelError(
        f"This model was judged on another base than the one here: {judged} had digest {expected[:12]}, {', '.join(found)}. "
        f"Put the judged base there, or train and evaluate on this one"
    )
