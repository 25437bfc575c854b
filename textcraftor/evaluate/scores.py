"""A candidate's table of scores with its proof. Reading it needs no model library, so the gate needs none."""

import contextlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq
from polars.exceptions import PolarsError
from pydantic import ValidationError

from textcraftor.artifact import written_aside
from textcraftor.config import BaseConfig, ChainConfig, SamplerConfig, Section
from textcraftor.errors import ModelError

DIVERSITY = "diversity"
ORACLE = "oracle"
_METADATA = "textcraftor"
# Field of a reward's configuration -> what the digest of its files is called.
JUDGE_FILES = {"path": "weights", "head": "weights of the head", "tokenizer": "files of the tokenizer"}
_GENERATED_WITH: Mapping[str, type[Section]] = {"base": BaseConfig, "chain": ChainConfig, "sampler": SamplerConfig}
_BASE_FILES = {"path": "weights", "config": "config files", "tiny_vae": "tiny_vae files"}
_MEMORY_ONLY = ("vae_slicing", "vae_gradient_checkpointing")  # change images by rounding at most


@dataclass(frozen=True)
class Scores:
    """One candidate's scores.

    table: one row an image: prompt_id, prompt, seed, image_index, a float column for each judge, and `diversity`, one value
    a prompt, repeated for its images.  digest: of the model's bytes.  trained_on: the rewards it was tuned with, and judges
    that have their weights.  proof: see `textcraftor.artifact.proof` and `textcraftor.evaluate.provenance`.
    """

    candidate: str
    digest: str
    judges: tuple[str, ...]
    trained_on: tuple[str, ...]
    proof: Mapping[str, Any]
    table: pl.DataFrame

    def write(self, path: Path) -> None:
        """Write the table as parquet, atomically; the same scores give the same bytes."""
        about = {
            "candidate": self.candidate,
            "digest": self.digest,
            "judges": list(self.judges),
            "trained_on": list(self.trained_on),
            "proof": dict(self.proof),
        }
        # Written with pyarrow: polars would put the metadata where pyarrow does not find it.
        table = self.table.to_arrow().replace_schema_metadata({_METADATA: json.dumps(about, sort_keys=True)})
        with written_aside(path) as aside:
            pq.write_table(table, aside)

    def chain_difference(self, other: "Scores") -> str | None:
        """Why these scores and `other`'s cannot be compared: images of another base, chain or sampler; None if they can.

        Settings that a proof does not have yet count as their defaults.
        """
        found = []
        for section, model in _GENERATED_WITH.items():
            ours, theirs = (_settings(scores.proof, section, model) for scores in (self, other))
            if not ours or not theirs:
                found += [f"{section} (the proof of {(other if ours else self).candidate} has none)"] if ours or theirs else []
                continue
            for key in {**ours, **theirs}:
                if key not in _MEMORY_ONLY and ours.get(key) != theirs.get(key):
                    values = "" if key in _BASE_FILES.values() else f" ({ours.get(key)!r} against {theirs.get(key)!r})"
                    found.append(f"{section}.{key}{values}")
        if not found:
            return None
        return (
            f"{self.candidate} and {other.candidate} were generated with another {', '.join(found)} and cannot be compared. "
            "Evaluate both with the same settings"
        )

    def judge_difference(self, other: "Scores", judge: str) -> str | None:
        """Why a judge's scores here and in `other` cannot be compared: another kind, version or weights; None if they can.

        For instance, HPSv2 2.0 and 2.1 differ by more than any tuning does.
        """
        ours, theirs = self._judge(judge), other._judge(judge)
        for what in ("kind", "version", *JUDGE_FILES.values(), *JUDGE_FILES):
            if ours.get(what) != theirs.get(what):
                values = "" if what in JUDGE_FILES.values() else f" ({ours.get(what)!r} against {theirs.get(what)!r})"
                return (
                    f"{judge} of {self.candidate} and of {other.candidate} are scores of another {what}{values} and cannot be "
                    f"compared. Evaluate both with the same judge"
                )
        return None

    def _judge(self, judge: str) -> dict[str, str]:
        """Kind, version and weights of a judge, as far as the proof has them; for diversity, of the judge that measures it."""
        config = self.proof.get("config", {})
        name = config.get("diversity_judge", judge) if judge == DIVERSITY else judge
        facts = config.get("judges", {}).get(name, {})
        if not isinstance(facts, dict):  # the oracle has no settings
            return {}
        digests = self.proof.get("inputs", {})
        known = {what: facts[what] for what in ("kind", "version") if what in facts}
        for field, files in JUDGE_FILES.items():
            if digest := digests.get(f"judge {name}" if field == "path" else f"judge {name} {field}"):
                known[files] = digest
            elif facts.get(field):  # a hub id has no digest
                known[field] = facts[field]
        return known

    @classmethod
    def read(cls, path: Path) -> "Scores":
        """Read what `write` wrote.  Raises ModelError when the file is missing or not a table of scores."""
        if not path.is_file():
            raise ModelError(f"{path} does not exist. Run `textcraftor evaluate --candidate {path.stem}` first")
        return cls.parse(path.read_bytes(), path)

    @classmethod
    def parse(cls, content: bytes, path: Path) -> "Scores":
        """The scores in the bytes of a file.  path: for the message.  Raises ModelError when they are not a table of scores."""
        try:
            about = json.loads(pl.read_parquet_metadata(io.BytesIO(content))[_METADATA])
            return cls(
                candidate=about["candidate"],
                digest=about["digest"],
                judges=tuple(about["judges"]),
                trained_on=tuple(about["trained_on"]),
                proof=about["proof"],
                table=pl.read_parquet(io.BytesIO(content)),
            )
        except (PolarsError, OSError, KeyError, ValueError, TypeError) as error:
            raise ModelError(
                f"{path} is not a table of scores ({type(error).__name__}: {' '.join(str(error).split())}). "
                f"Remove it and run `textcraftor evaluate --candidate {path.stem}`"
            ) from None


def _settings(proof: Mapping[str, Any], section: str, model: type[Section]) -> dict[str, Any]:
    """A section of the proof's configuration with defaults filled in; empty where the proof has none.

    Files are known by their digests where the proof has them, wherever they are; otherwise by name or hub id.
    """
    settings: dict[str, Any] = proof.get("config", {}).get(section) or {}
    with contextlib.suppress(ValidationError):  # a setting that this version no longer has
        settings = model.model_validate(settings).model_dump(mode="json") if settings else {}
    digests = proof.get("inputs", {})
    for field, files in _BASE_FILES.items() if settings and section == "base" else ():
        if digest := digests.get("base" if field == "path" else f"base {field}"):
            settings = {**settings, files: digest}
            settings.pop(field, None)
            if field == "path":
                settings.pop("revision", None)
    return settings
