"""A candidate's scores as a table that carries its proof. Reading it needs no model, so the gate needs none."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq
from polars.exceptions import PolarsError

from textcraftor.artifact import written_aside
from textcraftor.errors import ModelError

DIVERSITY = "diversity"
ORACLE = "oracle"
_METADATA = "textcraftor"
# Field of a reward's configuration -> what the digest of its files is called.
JUDGE_FILES = {"path": "weights", "head": "weights of the head", "tokenizer": "files of the tokenizer"}


@dataclass(frozen=True)
class Scores:
    """One candidate's scores.

    table: a row an image: prompt_id, prompt, seed, image_index, a float column a judge, and `diversity`, which is the
    prompt's and stands on each of its images.  digest: of the model's bytes.  trained_on: the rewards it was tuned
    with, so that every other judge is a held-out one.  proof: as `textcraftor.artifact.proof` makes it.
    """

    candidate: str
    digest: str
    judges: tuple[str, ...]
    trained_on: tuple[str, ...]
    proof: Mapping[str, Any]
    table: pl.DataFrame

    def write(self, path: Path) -> None:
        """Write the table as parquet, whole or not at all; the same scores give the same bytes."""
        about = {
            "candidate": self.candidate,
            "digest": self.digest,
            "judges": list(self.judges),
            "trained_on": list(self.trained_on),
            "proof": dict(self.proof),
        }
        # By pyarrow: it is the one that keeps metadata where both it and polars find it.
        table = self.table.to_arrow().replace_schema_metadata({_METADATA: json.dumps(about, sort_keys=True)})
        with written_aside(path) as aside:
            pq.write_table(table, aside)

    def unlike(self, other: "Scores", judge: str) -> str | None:
        """Why a judge's scores here and in `other` cannot be compared: another kind, version or weights; None if they can.

        HPSv2 2.0 and 2.1 differ by more than any tuning does.  What a proof does not say is not held against it.
        """
        ours, theirs = self._judge(judge), other._judge(judge)
        for what in ours.keys() & theirs.keys():
            if ours[what] != theirs[what]:
                seen = "" if what in JUDGE_FILES.values() else f" ({ours[what]!r} against {theirs[what]!r})"
                return (
                    f"{judge} of {self.candidate} and of {other.candidate} are scores of another {what}{seen} and cannot be "
                    f"compared. Evaluate both with the same judge"
                )
        return None

    def _judge(self, judge: str) -> dict[str, str]:
        """Kind, version and weights of a judge, as far as the proof says; of diversity, those of the judge behind it."""
        config = self.proof.get("config", {})
        name = config.get("diversity_judge", judge) if judge == DIVERSITY else judge
        facts = config.get("judges", {}).get(name, {})
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
        """Read what `write` wrote.  Raises ModelError when the file is missing or no table of scores."""
        if not path.is_file():
            raise ModelError(f"{path} does not exist. Run `textcraftor evaluate --candidate {path.stem}` first")
        try:
            about = json.loads(pl.read_parquet_metadata(path)[_METADATA])
            return cls(
                candidate=about["candidate"],
                digest=about["digest"],
                judges=tuple(about["judges"]),
                trained_on=tuple(about["trained_on"]),
                proof=about["proof"],
                table=pl.read_parquet(path),
            )
        except (PolarsError, OSError, KeyError, ValueError) as error:
            raise ModelError(
                f"{path} is not a table of scores ({type(error).__name__}: {' '.join(str(error).split())}). "
                f"Remove it and run `textcraftor evaluate --candidate {path.stem}`"
            ) from None
