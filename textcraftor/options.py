"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

from textcraftor.errors import ConfigError

Params = Annotated[Path, typer.Option(help="The run: its profile, mixes and overrides. Its folder is the workspace.")]
Profile = Annotated[
    str | None,
    typer.Option(help="A profile's name or file, instead of the one params.yaml names, whose overrides are then left out."),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")]
PARAMS = Path("params.yaml")


def require_prompt(prompt: str) -> None:
    """Raises ConfigError for an empty prompt."""
    if not prompt.strip():
        raise ConfigError('The prompt is empty. Say what to draw, for instance: "a small red circle on a white background"')
