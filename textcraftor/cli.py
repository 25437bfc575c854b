"""The command line: one verb for each stage, and verbs to use and inspect the result.

A user's mistake prints one line and exits with 2; a bug keeps its traceback. Verbs and candidates that need an
orchestrator are entry points, loaded only when they are used: the library itself imports none.
"""

import contextlib
import errno
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from textcraftor import config as configuration
from textcraftor import layout
from textcraftor.ablation.commands import ablate
from textcraftor.errors import ModelError, UserError
from textcraftor.options import PARAMS, Device, Params, Profile, require_prompt
from textcraftor.style.commands import blend, sheet, studio
from textcraftor.trust import commands as trust

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.add_typer(trust.keys, name="keys")
app.add_typer(trust.policy, name="policy")

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
def rollback(
    to: Annotated[int | None, typer.Option(min=1, help="This version, instead of the one that was champion before.")] = None,
    why: Annotated[str, typer.Option(help="The reason; it stands in the record of promotions.")] = "",
    params: Params = PARAMS,
    profile: Profile = None,
) -> None:
    """Make the version before the present champion champion again, after proving it. The record keeps both promotions."""
    from textcraftor.plugins import plugin

    decision = plugin("textcraftor.verbs", "rollback")(configuration.load(params, profile=profile), to, why)
    typer.echo(f"{decision.verdict}: version {decision.version}: {decision.why}")


@app.command()
def serve(
    model: Annotated[str, typer.Option(help="champion, challenger or a version; nothing that is not proven.")] = "champion",
    port: Annotated[int, typer.Option(min=0, max=65535, help="On the loopback interface; 0 takes a free one.")] = 8780,
    waiting: Annotated[int, typer.Option(min=1, help="Requests that may wait; more are answered with 429.")] = 64,
    params: Params = PARAMS,
    profile: Profile = None,
    device: Device = "auto",
) -> None:
    """Serve a proven model until Ctrl-C: POST /invocations takes {"prompt": ..., "seed": ...} and answers with a PNG."""
    run = configuration.load(params, profile=profile)
    from textcraftor.serving.loading import load_registered
    from textcraftor.serving.server import ModelServer

    with ModelServer(load_registered(model, run, params.parent, device), port, waiting) as server:
        typer.echo(f"http://127.0.0.1:{server.server_port}/invocations  {model}, until Ctrl-C")
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()


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


app.command()(ablate)
app.command()(blend)
app.command()(sheet)
app.command()(studio)


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


@app.command()
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


bench = typer.Typer(help="Measure the library against what it replaces.", no_args_is_help=True)
app.add_typer(bench, name="bench")


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
    from textcraftor.bench import bench_training
    from textcraftor.device import choose_device

    if random_weights:
        from textcraftor.bench.random_weights import with_random_weights, write_all

        folder = params.parent / layout.RANDOM_WEIGHTS
        with_random_weights(run, folder)  # refuses other profiles, before 12 GB are written
        write_all(folder)
        run = with_random_weights(run, folder)
    else:
        _require_downloads(run, params.parent)
    found = bench_training(
        run, mix or ("paper" if "paper" in run.mix else run.mixes[0]), choose_device(device, threads), repeats, micro_batch
    )
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    for name, value in found.items():
        typer.echo(f"{name:28} {value:.6g}" if isinstance(value, float) else f"{name:28} {value}")


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
