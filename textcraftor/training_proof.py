"""What a candidate was trained on, signed by the training itself. It lies beside the weights:

    training.dsse.json    the statement: its subject is proof.json, the tuned weights and the file below
    trained-on.parquet    one number for each prompt of this training and of those that it started from

In a registered candidate those of the UNet begin with `unet-`, as its other files do; a blend has them for each part.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import polars as pl
from polars.exceptions import PolarsError
from securesystemslib.signer import Key

from textcraftor.artifact import digest
from textcraftor.candidate import BLEND_PARTS, PARTS, UNET_PREFIX, Candidate
from textcraftor.errors import Unproven
from textcraftor.prompts.table import prompt_id
from textcraftor.signing import Keyring, Statement, open_envelope, sign

KIND: Final = "urn:textcraftor:training:v1"
STATEMENT: Final = "training.dsse.json"
PROMPTS: Final = "trained-on.parquet"
PROOF: Final = "proof.json"


@dataclass(frozen=True)
class Trained:
    """prompts: sorted numbers (`prompt_numbers`).  weights: fingerprints of the rewards, as in proof.json."""

    prompts: pl.Series
    weights: Mapping[str, Any]


def prompt_numbers(prompts: Iterable[str]) -> pl.Series:
    """The ids of prompts as numbers of 64 bits, sorted, each once. Case and spacing of a prompt make no difference."""
    return pl.Series("prompt", np.unique(np.fromiter((int(prompt_id(prompt), 16) for prompt in prompts), np.uint64)))


def write(
    folder: Path,
    parts: Iterable[str],
    prompts: Iterable[str],
    trained_weights: Mapping[str, Any],
    keyring: Keyring,
    earlier: Sequence[Trained] = (),
) -> None:
    """Sign for the weights in `folder`, whose proof.json is written already.

    parts: folders of the tuned modules.  earlier: of the trainings that this one started from.
    """
    numbers = pl.concat([prompt_numbers(prompts), *(each.prompts for each in earlier)]).unique().sort()
    numbers.to_frame().write_parquet(folder / PROMPTS, compression="zstd")
    paths = [folder / PROOF, folder / PROMPTS, *(path for part in parts for path in (folder / part).rglob("*"))]
    subject = {path.relative_to(folder).as_posix(): digest(path) for path in paths if path.is_file()}
    weights = {name: each for before in earlier for name, each in before.weights.items()} | dict(trained_weights)
    about = {"prompts": len(numbers), "trained_weights": weights}
    (folder / STATEMENT).write_bytes(sign(Statement(KIND, subject, about), keyring.signer()))


def of_candidate(candidate: Candidate, keys: Mapping[str, Key]) -> list[Trained]:
    """What the trainings of a candidate in the workspace signed. Raises Unproven where one of them did not, or not for it."""
    folders: dict[Path, dict[str, str]] = {}
    for path in (each for part in candidate.parts.values() for each in part.rglob("*") if each.is_file()):
        folder = path.parents[1]
        files = folders.setdefault(folder, {each.name: digest(each) for each in folder.glob("*.*") if each.is_file()})
        files[path.relative_to(folder).as_posix()] = digest(path)
    found: list[Trained] = []
    for folder, files in folders.items():
        alone = STATEMENT in files and not any(name.split("/")[0] in PARTS[:-1] for name in files)
        found += read(folder, files, keys, "" if alone else UNET_PREFIX)
    return found


def read(folder: Path, files: Mapping[str, str], keys: Mapping[str, Key], unet: str = UNET_PREFIX) -> list[Trained]:
    """What was signed for each tuned module in a candidate's folder.

    files: name and sha256 of the folder's files.  unet: prefix of the files of the UNet's training.
    Raises Unproven where a training is not signed by one of `keys`, or signed for other files.
    """
    homes: dict[tuple[str, str], set[str]] = {}
    for name in files:
        parts = name.split("/")
        home = "/".join(parts[:2]) + "/" if parts[0] == BLEND_PARTS and len(parts) > 3 else ""
        module = name.removeprefix(home).split("/")[0]
        if module in PARTS and "/" in name.removeprefix(home):
            homes.setdefault((home, unet if module == "unet" else ""), set()).add(name)
    return [_read_one(folder, files, keys, home, prefix, weights) for (home, prefix), weights in sorted(homes.items())]


def _read_one(
    folder: Path, files: Mapping[str, str], keys: Mapping[str, Key], home: str, prefix: str, weights: set[str]
) -> Trained:
    path, prompts = folder / f"{home}{prefix}{STATEMENT}", folder / f"{home}{prefix}{PROMPTS}"
    where = f" of {home.rstrip('/')}" if home else f" of its {prefix.rstrip('-')}" if prefix else ""
    if not (path.is_file() and prompts.is_file()):
        raise Unproven(f"the training{where} is not signed, so nobody knows on which prompts. Train it again")
    contents = {f"{home}{prefix}{name}": each.read_bytes() for name, each in ((STATEMENT, path), (PROMPTS, prompts))}
    if any(files.get(name) != hashlib.sha256(content).hexdigest() for name, content in contents.items()):
        raise Unproven(f"the record of the training{where} changed while it was read")
    try:
        statement = open_envelope(contents[f"{home}{prefix}{STATEMENT}"], KIND, keys)
    except Unproven as error:
        raise Unproven(f"the training{where}: {error}. Train it again") from None
    signed = {home + (name if "/" in name else prefix + name): each for name, each in statement.subject.items()}
    needed = {*weights, f"{home}{prefix}{PROOF}", f"{home}{prefix}{PROMPTS}"}
    if differing := sorted(name for name in {*signed, *needed} if signed.get(name, "") != files.get(name)):
        raise Unproven(f"the training{where} was signed for other files: {', '.join(differing[:3])}")
    try:
        numbers = pl.read_parquet(contents[f"{home}{prefix}{PROMPTS}"])["prompt"]
        trained = Trained(numbers.cast(pl.UInt64), dict(statement.predicate["trained_weights"]))
    except (PolarsError, OSError, KeyError, TypeError, ValueError):
        raise Unproven(f"the record of the training{where} is damaged. Train it again") from None
    return trained
