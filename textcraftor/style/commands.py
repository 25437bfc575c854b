"""The verbs of style control."""

import contextlib
import re
from pathlib import Path
from typing import Annotated, Literal

import typer

from textcraftor import config as configuration
from textcraftor.errors import ConfigError
from textcraftor.options import PARAMS, Device, Params, Profile, require_prompt

Arguments = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[NAME=WEIGHT]... [PROMPT]",
        help="The weights, which sum to 1, and what to draw. NAME: `original`, a candidate, version or folder. "
        "NAME=WEIGHT@FROM..TO holds in a part of the chain only.",
    ),
]
Space = Annotated[
    Literal["embeddings", "weights"] | None,
    typer.Option(
        help="embeddings (the default): each encoder runs. weights: they are merged into one encoder, which is cheaper."
    ),
]


def blend(
    arguments: Arguments = None,
    out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("blend.png"),
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise.")] = 0,
    space: Space = None,
    save: Annotated[
        str | None,
        typer.Option(
            metavar="BLEND", help="Save the blend to data/blends/BLEND. Without weights, as `blend.BLEND` defines it."
        ),
    ] = None,
    switch_at: Annotated[
        float | None, typer.Option(min=0, max=1, help="Where the blend takes over. Default: sampler.switch_at.")
    ] = None,
    guidance_scale: Annotated[float | None, typer.Option(min=1, help="Default: chain.guidance_scale.")] = None,
    params: Params = PARAMS,
    profile: Profile = None,
    device: Device = "auto",
) -> None:
    """Blend text encoders: draw the base and the blend side by side, from the same noise; or save the blend as a candidate."""
    terms = [each for each in arguments or () if configuration.is_term(each)]
    words = [each for each in arguments or () if not configuration.is_term(each)]
    if len(words) > 1 or not (words or save):
        got = f"{len(words)}: {', '.join(map(repr, words))}" if words else "none"
        raise ConfigError(
            f"A blend is drawn for one prompt, got {got}. Write weights as NAME=WEIGHT, and the prompt in quotes: "
            'textcraftor blend original=0.5 balanced=0.5 "a small red circle"'
        )
    for each in words:
        require_prompt(each)
    given = {"sampler": {"switch_at": switch_at}, "chain": {"guidance_scale": guidance_scale}}
    overrides = {section: each for section, each in given.items() if None not in each.values()}
    run, root = configuration.load(params, overrides, profile), params.parent
    settings = _settings(terms, space, save, run)
    weights, steps = configuration.Weights.of(settings.weights), run.chain.num_inference_steps
    weights.stages(configuration.switch_step(run.sampler.switch_at, steps), steps)  # raises before anything is loaded
    from textcraftor.device import choose_device
    from textcraftor.style.drawing import draw_blend
    from textcraftor.style.parts import find_parts
    from textcraftor.style.saving import save_blend

    parts = find_parts(weights, run, root)
    if weights.extrapolates:
        typer.echo(f"{weights.extrapolates}: extrapolates beyond the encoders", err=True)
    for each in words:
        draw_blend(settings, parts, run.at(root), each, seed, out, choose_device(device, run.cpu_threads))
        typer.echo(out)
    if save:
        typer.echo(save_blend(save, settings, parts, run, root))
        if save not in run.blends:
            typer.echo(
                f"To judge it like a mix, put into {params}: blends: [{save}] and "
                f"blend: {{{save}: {{weights: [{', '.join(settings.weights)}], space: {settings.space}}}}}",
                err=True,
            )


def _settings(
    terms: list[str], space: Literal["embeddings", "weights"] | None, save: str | None, run: configuration.Config
) -> configuration.BlendConfig:
    """The blend that the command line gives, or that the configuration has under the name to save."""
    named = run.blend.get(save) if save else None
    if save and not re.fullmatch(r"[a-z0-9][a-z0-9_]*", save):
        raise ConfigError(f"--save {save}: a blend's name has small letters, digits and _ only, such as soft_2")
    if not terms:
        if named is None:
            raise ConfigError("A blend needs weights, such as: original=0.5 balanced=0.5")
        return named
    written = map(str, configuration.Weights.parse(terms).terms)
    given = configuration.BlendConfig(weights=tuple(written), space=space or "embeddings")
    if named is not None and named != given:
        raise ConfigError(
            f"--save {save}: the configuration has another blend.{save}. Leave the weights out, or take another name"
        )
    return given


def sheet(
    prompts: Annotated[list[str], typer.Argument(help="What to draw.")],
    encoder: Annotated[
        list[str],
        typer.Option(help="Once: from the original to it. Twice: from one to the other. Three times: all blends of the three."),
    ],
    strengths: Annotated[str, typer.Option(help="Of the last encoder, for one or two.")] = "0 0.25 0.5 0.75 1",
    divisions: Annotated[int, typer.Option(min=1, max=20, help="Of each side of the triangle, for three.")] = 4,
    out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("sheet.png"),
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise, the same for all.")] = 0,
    params: Params = PARAMS,
    profile: Profile = None,
    device: Device = "auto",
) -> None:
    """Draw a style sheet: prompts by strengths (paper figure 4), or a triangle of blends of three encoders (figure 5)."""
    for each in prompts:
        require_prompt(each)
    if not 1 <= len(encoder) <= 3 or len({*encoder}) < len(encoder):
        raise ConfigError(f"A sheet is drawn for one, two or three different encoders, got {', '.join(encoder)}")
    try:
        numbers = [float(each) for each in strengths.replace(",", " ").split()]
    except ValueError:
        raise ConfigError(f"--strengths {strengths!r} are no numbers. Write, for instance, '0 0.5 1'") from None
    run, root = configuration.load(params, profile=profile), params.parent
    names = encoder if len(encoder) > 1 else [configuration.ORIGINAL, *encoder]
    from textcraftor.device import choose_device
    from textcraftor.style.parts import find_parts
    from textcraftor.style.sheet import Subject, draw_strengths, draw_triangle

    parts = find_parts(configuration.Weights(tuple(configuration.Term(name, 1.0) for name in names)), run, root)
    subject = Subject(parts, run.at(root), prompts, seed, choose_device(device, run.cpu_threads))
    if len(names) == 2:
        draw_strengths(subject, names[0], names[1], numbers, out)
    else:
        draw_triangle(subject, names, divisions, out)
    typer.echo(out)


def studio(
    encoders: Annotated[
        list[str] | None, typer.Argument(help="Candidates, versions or folders. Default: all that are trained.")
    ] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="0: a free one. Default: 8770, or a free one.")] = None,
    params: Params = PARAMS,
    profile: Profile = None,
    device: Device = "auto",
) -> None:
    """Open a page on this machine to blend encoders by hand, until Ctrl-C."""
    run, root = configuration.load(params, profile=profile), params.parent
    from textcraftor.device import choose_device
    from textcraftor.style.parts import find_parts, trained_encoders
    from textcraftor.style.server import PORT, StudioServer
    from textcraftor.style.studio import Studio

    names = encoders or trained_encoders(run, root)
    parts = find_parts(configuration.Weights(tuple(configuration.Term(name, 1.0) for name in names)), run, root)
    opened = Studio(run, parts, root, choose_device(device, run.cpu_threads))
    try:
        server = StudioServer(opened, PORT if port is None else port)
    except ConfigError:
        if port is not None:
            raise
        server = StudioServer(opened, 0)
    with server, contextlib.suppress(KeyboardInterrupt):
        typer.echo(f"Studio    {server.address}\nCtrl-C stops it.")
        server.serve_forever()
