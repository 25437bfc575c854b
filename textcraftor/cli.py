"""The command line: one verb for each stage, and verbs to use and inspect the result.

A user's mistake prints one line and exits with 2; a bug keeps its traceback. Verbs and candidates that need an
orchestrator are entry points, loaded only when they are used: the library itself imports none.
"""

import errno
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from textcraftor import config as configuration
from textcraftor import layout
from textcraftor.ablation.commands import ablate
from textcraftor.bench.commands import bench
from textcraftor.errors import ModelError, UserError
from textcraftor.options import PARAMS, Device, Params, Profile, require_prompt
from textcraftor.planning.commands import doctor
from textcraftor.serving.commands import serve
from textcraftor.style.commands import blend, sheet, studio
from textcraftor.trust import commands as trust

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.add_typer(trust.keys, name="keys")
app.add_typer(trust.policy, name="policy")
app.add_typer(bench, name="bench")

REFUSED = {  # what a system refuses through no fault of ours, and what to do
    errno.EACCES: "Make it accessible, or work in a copy of the project",
    errno.EROFS: "Work in a copy of the project",
    errno.ENOSPC: "Free some space on that disk",
    errno.EDQUOT: "Free some space of your quota",
}


@app.command()
def config(
    params: Params = PARAMS,
    profile: Profile = None,
    list_profiles: Annotated[bool, typer.Option("--list", help="Print the names and files of all profiles instead.")] = False,
) -> None:
    """Print the resolved configuration, every default included."""
    if list_profiles:
        for name, path in sorted(configuration.profile_files(params.parent).items()):
            typer.echo(f"{name}  {path}")
        return
    typer.echo(configuration.resolved_yaml(configuration.load(params, profile=profile)), nl=False)


@app.command()
def resolve(params: Params = PARAMS, profile: Profile = None) -> None:
    """Write data/resolved.json, the configuration and the digests of the files it names, on which DVC's stages depend."""
    run = configuration.load(params, profile=profile)
    from textcraftor.resolved import write_resolved

    typer.echo(write_resolved(run, params.parent))


@app.command()
def curate(params: Params = PARAMS, profile: Profile = None) -> None:
    """Clean, deduplicate, classify and split the prompts of the sources."""
    run = configuration.load(params, profile=profile)
    from textcraftor.prompts import curate

    summary = curate(run.prompts, params.parent, params.parent / layout.CURATED)
    typer.echo(summary)


@app.command()
def validate(params: Params = PARAMS, profile: Profile = None) -> None:
    """Check the curated prompts; a violation stops every later stage."""
    from textcraftor.plugins import plugin

    run = configuration.load(params, profile=profile)
    plugin("textcraftor.verbs", "validate")(run, params.parent)


@app.command()
def prepare(params: Params = PARAMS, profile: Profile = None, device: Device = "auto") -> None:
    """Compute the prefix latents and text features that all mixes share."""
    run = configuration.load(params, profile=profile)
    _require_downloads(run, params.parent)
    from textcraftor.cache.prepare import prepare
    from textcraftor.device import choose_device

    prepare(run, params.parent, choose_device(device, run.prepare.cpu_threads or run.cpu_threads))


@app.command()
def train(
    mix: Annotated[str, typer.Option(help="A mix of the profile.")],
    params: Params = PARAMS,
    profile: Profile = None,
    device: Device = "auto",
    dry_run: Annotated[
        bool, typer.Option(help="Print the plan and run one batch, if the weights are here. Nothing is kept.")
    ] = False,
) -> None:
    """Tune the text encoder on one reward mix."""
    run = configuration.load(params, profile=profile)
    from textcraftor.device import choose_device

    if dry_run:
        from textcraftor.planning.dry_run import dry_run as try_it

        try_it(run, mix, params.parent, choose_device(device, run.cpu_threads))
        return
    _require_downloads(run, params.parent)
    from textcraftor.training.stages import train_text_encoder

    typer.echo(train_text_encoder(run, mix, params.parent, choose_device(device, run.cpu_threads)))


@app.command("train-unet")
def train_unet(
    mix: Annotated[str, typer.Option(help="A mix, whose text encoder is tuned unless train_unet.encoder is original.")],
    params: Params = PARAMS,
    profile: Profile = None,
    device: Device = "auto",
) -> None:
    """Tune the UNet on a frozen text encoder: the mix's tuned one, or the original (train_unet.encoder)."""
    run = configuration.load(params, profile=profile)
    _require_downloads(run, params.parent)
    from textcraftor.device import choose_device
    from textcraftor.training.stages import train_unet

    typer.echo(train_unet(run, mix, params.parent, choose_device(device, run.cpu_threads)))


@app.command()
def evaluate(
    candidate: Annotated[str, typer.Option(help="base, MIX or MIX-unet.")],
    params: Params = PARAMS,
    profile: Profile = None,
    device: Device = "auto",
) -> None:
    """Generate a candidate's images and score them, on the same prompts and noise as the base."""
    run = configuration.load(params, profile=profile)
    _require_downloads(run, params.parent)
    from textcraftor.device import choose_device
    from textcraftor.evaluate import evaluate

    typer.echo(evaluate(run, candidate, params.parent, choose_device(device, run.cpu_threads)))


@app.command()
def gate(params: Params = PARAMS, profile: Profile = None) -> None:
    """Compare every candidate's scores with the thresholds."""
    run = configuration.load(params, profile=profile)
    from textcraftor.evaluate.gate import gate

    typer.echo(gate(run, params.parent))


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    model: Annotated[
        str, typer.Option(help="champion, challenger, a version, a candidate, or a folder (with a /).")
    ] = "champion",
    out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("generated.png"),
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise.")] = 0,
    task: Annotated[
        Literal["text2img", "img2img", "inpaint"],
        typer.Option(help="text2img; img2img redraws --image; inpaint redraws the white part of --mask in --image."),
    ] = "text2img",
    image: Annotated[Path | None, typer.Option(help="The picture to redraw.")] = None,
    mask: Annotated[Path | None, typer.Option(help="Of the size of --image: white is redrawn, black is kept.")] = None,
    strength: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the chain that redraws --image: 1 keeps nothing of it.")
    ] = 0.8,
    params: Params = PARAMS,
    profile: Profile = None,
    device: Device = "auto",
) -> None:
    """Draw one picture: base and tuned model side by side, from the same noise.

    A model that was judged is drawn with the base, chain and switch it was judged with, whatever params.yaml says now.
    """
    require_prompt(prompt)
    run = configuration.load(params, profile=profile)
    from textcraftor import lookup
    from textcraftor.device import choose_device
    from textcraftor.edit import edit, read_given
    from textcraftor.generate import draw

    root = params.parent
    given = read_given(task, image, mask, strength, run.chain.num_inference_steps)
    found = lookup.find(model, run, root)
    run = lookup.judged_settings(run, found, root).at(root)
    chosen = choose_device(device, run.cpu_threads)
    if given is None:
        draw(run, found.candidate, prompt, seed, out, chosen, found.label)
    else:
        edit(run, found.candidate, given, prompt, seed, out, chosen, found.label)
    typer.echo(out)


@app.command()
def export(
    to: Annotated[Literal["diffusers", "pipeline", "single-file", "lora-kohya", "lora-peft"], typer.Option(help="The format.")],
    out: Annotated[
        Path, typer.Option(help="A folder, or for a single file or a LoRA a .safetensors file; replaced if it is there.")
    ],
    model: Annotated[
        str, typer.Option(help="champion, challenger, a version, a candidate, or a folder (with a /).")
    ] = "champion",
    rank: Annotated[int, typer.Option(min=1, help="Of a LoRA.")] = 16,
    params: Params = PARAMS,
    profile: Profile = None,
    device: Device = "auto",
) -> None:
    """Write a model for other tools, read it again with diffusers' loader, and print how far the pictures differ."""
    run = configuration.load(params, profile=profile)
    from textcraftor import lookup
    from textcraftor.device import choose_device
    from textcraftor.export import PROMPTS, differences, export, reload
    from textcraftor.models.base import load_base, load_candidate

    found = lookup.find(model, run, params.parent)
    run = lookup.judged_settings(run, found, params.parent).at(params.parent)
    base = load_base(run.base, choose_device(device, run.cpu_threads))
    if found.candidate.blend or (tuned := load_candidate(found.candidate, base)) is None:
        raise ModelError(
            f"{found.label} has no tuned encoder of its own to export. A blend is merged with `blend --space weights`"
        )
    made = export(tuned, base, to, out, rank)
    for prompt, (mean, largest) in zip(PROMPTS, differences(reload(to, out, base), tuned, base), strict=True):
        typer.echo(f"{to:<10}  mean {mean:6.2f}  largest {largest:6.2f} of 255  {prompt}")
    typer.echo(f"{made.path}  holds {1 - made.lost:.1%} of what tuning changed")


for command in (trust.rollback, serve, ablate, blend, sheet, studio, doctor):
    app.command()(command)


@app.command()
def fetch(
    names: Annotated[list[str] | None, typer.Argument(help="Only these downloads of the profile.")] = None,
    folder: Annotated[Path | None, typer.Option("--from", help="Take the files from this folder; no network.")] = None,
    mirror: Annotated[str, typer.Option(help="Hub mirror. Default: `mirror` of the profile, then HF_ENDPOINT.")] = "",
    params: Params = PARAMS,
    profile: Profile = None,
) -> None:
    """Download what the profile needs and the workspace lacks: pinned, resumable, verified, never unpickled."""
    run = configuration.load(params, profile=profile)
    from textcraftor.fetch import LOCK, fetch

    for fetched in fetch(run, params.parent, names or (), folder, mirror):
        typer.echo(f"{fetched.action:<10}  {fetched.bytes / 1e6:>9,.1f} MB  {fetched.path}")
    typer.echo(f"All files are here, as recorded in {LOCK}" if run.downloads else f"Profile {run.profile} needs no downloads")


@app.command("tiny-build")
def tiny_build(
    out: Annotated[Path, typer.Option(help="Where to write the weights.")] = layout.TINY,
    work: Annotated[Path, typer.Option(help="Caches and checkpoints to resume from.")] = layout.TINY_STATE,
    seed: int = 0,
    device: Device = "auto",
) -> None:
    """Train the embedded base model and its rewards from scratch (a night on two cores)."""
    from textcraftor.tiny.recipe.build import build

    typer.echo(f"made: {', '.join(build(out, work, seed=seed, device=device)) or 'nothing, all is there'}")


def _require_downloads(run: configuration.Config, root: Path) -> None:
    """Raise ModelError, naming `fetch`, before a library fails with a message of its own."""
    if run.downloads:
        from textcraftor.fetch import require

        require(run, root)


def main() -> None:
    """Entry point of the console script."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        app()
    except UserError as error:
        typer.echo(f"textcraftor: {' '.join(str(error).split())}", err=True)
        sys.exit(error.exit_status)
    except OSError as error:
        if error.errno not in REFUSED:
            raise
        typer.echo(f"textcraftor: {error.filename or 'writing'}: {error.strerror}. {REFUSED[error.errno]}", err=True)
        sys.exit(UserError.exit_status)


if __name__ == "__main__":
    main()
