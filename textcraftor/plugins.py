"""What of the pipeline is installed beside the library: verbs and kinds of candidates that need an orchestrator."""

import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from textcraftor.errors import ConfigError


def plugin(group: str, name: str) -> Callable[..., Any]:
    """The function behind a verb or a kind of candidate that needs an orchestrator: ours in `tasks/`, or another package's.

    `tasks/` is in no wheel, since its name is anybody's: it is imported from the checkout that this library runs from.
    Raises ConfigError outside a checkout, or without the pipeline extra.
    """
    checkout = Path(__file__).resolve().parents[1]
    for entry_point in entry_points(group=group, name=name):
        if entry_point.dist and entry_point.dist.name == "textcraftor":
            if not ((checkout / "pyproject.toml").is_file() and (checkout / "tasks/__init__.py").is_file()):
                continue
            if str(checkout) != sys.path[0]:
                sys.path.insert(0, str(checkout))  # before any other module called `tasks`
        try:
            return entry_point.load()
        except ImportError as error:
            raise ConfigError(
                f"`{name}` needs the pipeline extra ({error}): `make setup`, or pip install -e '{checkout}[pipeline]'"
            ) from None
    raise ConfigError(
        f"`{name}` belongs to the pipeline (tasks/ and flows/), which is not installed with the library. Get a checkout of the "
        "project, run `make setup` there, and use its .venv/bin/textcraftor"
    )
