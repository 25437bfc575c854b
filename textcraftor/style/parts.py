"""The candidates that the names in a blend stand for."""

from pathlib import Path

from textcraftor import lookup
from textcraftor.candidate import Candidate
from textcraftor.config import ORIGINAL, Config, Weights
from textcraftor.errors import ConfigError, ModelError, unknown
from textcraftor.layout import encoder_folder

ALIASES = ("champion", "challenger")


def find_parts(weights: Weights, run: Config, root: Path) -> dict[str, Candidate]:
    """Name -> candidate, of every name but `original`: a candidate of the run, a version, an alias or a folder.

    root: the workspace.
    Raises ConfigError for an unknown name, ModelError for a model that is missing or was judged on another base than the run's.
    """
    known = (*run.candidates, *ALIASES)
    parts = {}
    for name in weights.names:
        if name == ORIGINAL:
            continue
        if name not in known and not name.isdigit() and "/" not in name:
            raise ConfigError(
                f"{unknown('encoder', name, (ORIGINAL, *known))} A version's number or a folder (with a /) will do, too"
            )
        found = lookup.find(name, run, root)
        lookup.require_base(run, found, root)
        parts[name] = found.candidate
    return parts


def trained_encoders(run: Config, root: Path) -> list[str]:
    """The mixes of the run whose encoders are there. Raises ModelError when there is none."""
    found = [mix for mix in run.all_mixes if (root / encoder_folder(mix)).is_dir()]
    if not found:
        raise ModelError(
            f"No encoder is trained yet: `textcraftor train --mix {run.all_mixes[0]}`, or name a version or a folder"
        )
    return found
