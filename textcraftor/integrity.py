"""Weights are loaded whole or refused by file and key: the words for it."""

from collections.abc import Iterable, Mapping
from typing import Any

from safetensors import SafetensorError

from textcraftor.errors import ModelError

LOADING_FAULTS = (OSError, ValueError, RuntimeError, SafetensorError, KeyError, TypeError, AttributeError)
"""What the libraries raise at a missing, truncated or foreign file."""


def refuse(label: str, cls: type, faults: Mapping[str, Iterable[Any]]) -> None:
    """Raise ModelError when there is any faulty key. label: the file; cls: what it should be; faults: kind -> keys."""
    named = [f"{kind} keys: {_some(keys)}" for kind, keys in faults.items() if keys]
    if named:
        raise ModelError(f"{label} does not fit {cls.__name__} ({'; '.join(named)}). Nothing was loaded")


def brief(error: Exception) -> str:
    """An exception of a library as one line."""
    return " ".join(str(error).split())[:400]


def _some(keys: Iterable[Any]) -> str:
    names = sorted(map(str, keys))
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
