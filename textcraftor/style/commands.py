"""The verbs of style control."""

from pathlib import Path
from typing import Annotated

import typer

from textcraftor import config as configuration
from textcraftor.errors import ConfigError
from textcraftor.options import PARAMS, Device, Params, Profile, require_prompt


def blend(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME=WEIGHT... PROMPT",
            help="The weights, which sum to 1, and what to draw. NAME: `original`, a candidate, version or folder. "
            "NAME=WEIGHT@FROM..TO holds in a part of the chain only.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("blend.png"),
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise.")] = 0,
    params: Params = PARAMS,
    profile: Profile = None,
    device: Device = "auto",
) -> None:
    """Blend text encoders and draw one picture: the base and the blend side by side, from the same noise."""
    terms = [each for each in arguments if configuration.is_term(each)]
    words = [each for each in arguments if not configuration.is_term(each)]
    if len(words) != 1:
        got = f"{len(words)}: {', '.join(map(repr, words))}" if words else "none"
        raise ConfigError(
            f"A blend is drawn for one prompt, got {got}. Write weights as NAME=WEIGHT, and the prompt in quotes: "
            'textcraftor blend original=0.5 balanced=0.5 "a small red circle"'
        )
    require_prompt(words[0])
    weights = configuration.Weights.parse(terms)
    run = configuration.load(params, profile=profile)
    weights.stages(
        configuration.switch_step(run.sampler.switch_at, run.chain.num_inference_steps), run.chain.num_inference_steps
    )
    from textcraftor.device import choose_device
    from textcraftor.generate import draw_models
    from textcraftor.models.base import load_base
    from textcraftor.models.blended import load_blend
    from textcraftor.style.parts import find_parts

    parts = find_parts(weights, run, params.parent)
    if weights.extrapolates:
        typer.echo(f"{weights.extrapolates}: extrapolates beyond the encoders", err=True)
    run = run.at(params.parent)
    base = load_base(run.base, choose_device(device, run.cpu_threads))
    draw_models(run, base, {"blend": load_blend(parts, weights, base)}, words[0], seed, out)
    typer.echo(out)
