"""`textcraftor bench`."""

import json
from typing import Annotated

import typer

from textcraftor import config as configuration
from textcraftor import layout
from textcraftor.options import PARAMS, Device, Params, Profile

bench = typer.Typer(help="Measure the library against what it replaces.", no_args_is_help=True)


@bench.callback()
def _bench() -> None:
    """Keep `bench` a group of commands while it has only one."""


@bench.command("train")
def bench_train(
    mix: Annotated[str | None, typer.Option(help="A mix of the profile; without, `paper`, the published four rewards.")] = None,
    profile: Profile = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; each times the reference and our steps one after another.")] = 8,
    micro_batch: Annotated[int | None, typer.Option(min=1, help="Of our step; it bounds its memory.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE over the profile, such as train.decode_size=4.")
    ] = None,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Of full size, written once (12 GB); no download. Profile sd15.")
    ] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="On the CPU; all cores without.")] = None,
    params: Params = PARAMS,
    device: Device = "auto",
) -> None:
    """Our training step against a plain loop with the published code's semantics: speed, memory, gradient."""
    run = configuration.load(params, configuration.parsed(settings or ()), profile).at(params.parent)
    from textcraftor.bench.training import bench_training
    from textcraftor.device import choose_device
    from textcraftor.fetch import require

    if random_weights:
        from textcraftor.bench.random_weights import with_random_weights, write_all

        folder = params.parent / layout.RANDOM_WEIGHTS
        with_random_weights(run, folder)  # refuses other profiles, before 12 GB are written
        write_all(folder)
        run = with_random_weights(run, folder)
    elif run.downloads:
        require(run, params.parent)
    found = bench_training(
        run, mix or ("paper" if "paper" in run.mix else run.mixes[0]), choose_device(device, threads), repeats, micro_batch
    )
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    for name, value in found.items():
        typer.echo(f"{name:28} {value:.6g}" if isinstance(value, float) else f"{name:28} {value}")
