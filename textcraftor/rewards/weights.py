"""Reading weights of others: quietly, without pickle, whole or not at all."""

import contextlib
import logging
import pickle
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
import transformers
from torch import Tensor

from textcraftor.errors import ModelError


def read_tensors(path: Path, wants: str) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a torch file that holds nothing but tensors.

    wants: what is expected at `path`, for the message.  Of a training checkpoint, its `state_dict`.
    Raises ModelError when the file is missing, truncated, or would need unpickling.
    """
    if not path.is_file():
        raise ModelError(f"{path} does not exist; expected {wants}")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (safetensors.SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise ModelError(f"{path} cannot be read; expected {wants}: {one_line(error)}") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ModelError(f"{path} holds more than tensors; expected {wants}")
    return {key.removeprefix("module."): value for key, value in state.items()}


def check_fit(path: Path | str, state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raises ModelError unless `state` has exactly the keys and shapes of `expected`."""
    refuse_misfit(
        path,
        missing=expected.keys() - state.keys(),
        unexpected=state.keys() - expected.keys(),
        misshaped={
            key: (tuple(state[key].shape), tuple(value.shape))
            for key, value in expected.items()
            if key in state and state[key].shape != value.shape
        },
    )


def refuse_misfit(
    path: Path | str,
    missing: Iterable[str],
    unexpected: Iterable[str],
    misshaped: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]],
) -> None:
    """Raises ModelError naming the file and the keys, if there are any: weights never load in part.

    misshaped: key -> (shape in the file, shape in the model).
    """
    shapes = [f"{key} is {got} instead of {wanted}" for key, (got, wanted) in sorted(misshaped.items())]
    faults = [
        f"{kind} {_first(keys)}"
        for kind, keys in (
            ("missing", sorted(missing)),
            ("unexpected", sorted(unexpected)),
            ("mis-shaped", shapes),
        )
        if keys
    ]
    if faults:
        raise ModelError(f"{path} does not fit the model: {'; '.join(faults)}. These are another model's weights")


def local_or_hub(path: str, wants: str) -> str:
    """`path` if it is a folder with a config.json, or a hub id ("owner/name").

    Raises ModelError naming `path` and what is expected there.
    """
    if Path(path, "config.json").is_file():
        return path
    if Path(path).is_dir() and path:
        raise ModelError(f"{path} holds no config.json; expected {wants}")
    # "owner/name" beside an existing folder "owner" is a misspelt path, not a hub id.
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path) and not Path(path).parent.is_dir():
        return path
    raise ModelError(f"{path!r} does not exist; expected {wants}, or a hub id owner/name")


@contextlib.contextmanager
def loading(source: Path | str, wants: str) -> Iterator[None]:
    """Load within: the libraries keep silent, and their faults become one ModelError about `source`."""
    try:
        with _quiet():
            yield
    except ModelError:
        raise
    except (
        OSError,
        RuntimeError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        safetensors.SafetensorError,
        pickle.UnpicklingError,
    ) as error:
        raise ModelError(f"{source} cannot be loaded; expected {wants}: {one_line(error)}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No log line, warning or progress bar. open_clip logs to the root logger, and so would configure it."""
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


def one_line(error: BaseException, limit: int = 300) -> str:
    """The error's message on one line, cut to `limit` characters."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _first(keys: list[str], shown: int = 4) -> str:
    rest = f" and {len(keys) - shown} more" if len(keys) > shown else ""
    return ", ".join(keys[:shown]) + rest
