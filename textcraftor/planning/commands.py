"""`textcraftor doctor`."""

import sys
from typing import Annotated

import typer

from textcraftor import config as configuration
from textcraftor.options import PARAMS, Device, Params, Profile


def doctor(
    params: Params = PARAMS,
    profile: Profile = None,
    device: Device = "auto",
    verify: Annotated[bool, typer.Option(help="Read every file and compare its sha256.")] = False,
) -> None:
    """Print what the profile needs, what is missing, and the memory and time of a run. Exits with 1 if anything is missing."""
    run = configuration.load(params, profile=profile)
    from rich.console import Console

    from textcraftor.device import choose_device
    from textcraftor.planning.doctor import examine, table

    findings = examine(run, params.parent, choose_device(device, run.cpu_threads), verify)
    Console(width=None if sys.stdout.isatty() else 160).print(table(run, findings))
    if any(finding.fails for finding in findings):
        raise typer.Exit(1)
