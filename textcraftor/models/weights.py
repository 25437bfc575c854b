"""Read third-party weights strictly: every key must fit, nothing is unpickled, and the libraries log nothing."""

import contextlib
import logging
import pickle
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
import transformers
from torch import Tensor

from textcraftor.errors import ModelError
from textcraftor.models.diagnosis import fault_of
from textcraftor.network import require_usable_network

LOADING_ERRORS = (
    OSError,
    RuntimeError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    safetensors.SafetensorError,
    pickle.UnpicklingError,
)
"""Exceptions that the libraries raise for a missing or truncated file, or one of another model."""


def read_tensors(path: Path, expected: str) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a torch file that holds nothing but tensors.

    expected: what `path` should hold, for the message.  A training checkpoint's `state_dict` is unwrapped.
    Raises ModelError when the file is missing, truncated, or would need unpickling.
    """
    if not path.is_file():
        raise ModelError(f"{path} does not exist; expected {expected}")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (safetensors.SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise ModelError(f"{fault_of(path) or f'{path} cannot be read'}; expected {expected}: {brief(error)}") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ModelError(f"{path} holds more than tensors; expected {expected}")
    return {key.removeprefix("module."): value for key, value in state.items()}


def find_weights(folder: Path, names: Sequence[str]) -> Path:
    """The first of the named files that `folder` holds.  Raises ModelError naming them if it holds none."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise ModelError(f"{folder} holds no weights; expected one of {', '.join(names)}")


def check_fit(label: Path | str, what: str, state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raises ModelError unless `state` has exactly the keys and shapes of `expected`."""
    require_matching_keys(
        label,
        what,
        missing=expected.keys() - state.keys(),
        unexpected=state.keys() - expected.keys(),
        mismatched=[
            (key, tuple(state[key].shape), tuple(value.shape))
            for key, value in expected.items()
            if key in state and state[key].shape != value.shape
        ],
    )


def require_matching_keys(
    label: Path | str,
    what: str,
    missing: Iterable[str] = (),
    unexpected: Iterable[str] = (),
    mismatched: Iterable[tuple[str, Iterable[int], Iterable[int]]] = (),
) -> None:
    """Raises ModelError naming the file and the keys if any key is given: weights never load in part.

    label: the file.  what: the model it should be.  mismatched: (key, shape in the file, shape in the model).
    """
    shapes = [f"{key} is {tuple(got)} instead of {tuple(needed)}" for key, got, needed in mismatched]
    kinds = {"missing": missing, "unexpected": unexpected, "mismatched": shapes}
    named = [f"{kind} keys: {_first(sorted(keys))}" for kind, keys in kinds.items() if keys]
    if named:
        raise ModelError(f"{label} does not fit {what} ({'; '.join(named)}). Nothing was loaded")


def local_or_hub(path: str, expected: str) -> str:
    """`path` if it is a folder with a config.json, or a hub id ("owner/name").

    Raises ModelError naming `path` and what is expected there.
    """
    if Path(path, "config.json").is_file():
        return path
    if Path(path).is_dir() and path:
        raise ModelError(f"{path} holds no config.json; expected {expected}")
    # "owner/name" beside an existing folder "owner" is a misspelt path, not a hub id.
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path) and not Path(path).parent.is_dir():
        require_usable_network()
        return path
    raise ModelError(f"{path!r} does not exist; expected {expected}, or a hub id owner/name")


@contextlib.contextmanager
def loading(source: Path | str, expected: str) -> Iterator[None]:
    """Context for loading: silences the libraries and turns their exceptions into one ModelError about `source`."""
    try:
        with _quiet():
            yield
    except ModelError:
        raise
    except LOADING_ERRORS as error:
        raise ModelError(f"{source} cannot be loaded; expected {expected}: {brief(error)}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress logging, warnings and progress bars. open_clip logs to the root logger, which would configure it."""
    handlers, disabled = logging.root.handlers[:], logging.root.manager.disable
    progress: Any = transformers.utils.logging
    shown = progress.is_progress_bar_enabled()
    logging.disable(logging.CRITICAL)
    progress.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        logging.root.handlers[:] = handlers
        if shown:
            progress.enable_progress_bar()


def brief(error: BaseException, limit: int = 300) -> str:
    """The error's message on one line, cut to `limit` characters."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _first(keys: list[str], shown: int = 4) -> str:
    rest = f" and {len(keys) - shown} more" if len(keys) > shown else ""
    return ", ".join(keys[:shown]) + rest
