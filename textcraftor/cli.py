"""The command line: one verb for each stage, and verbs to use and inspect the result.

A user's mistake prints one line and exits with 2; a bug keeps its traceback. Verbs and candidates that need an
orchestrator are entry points, loaded only when they are used: the library itself imports none.
"""

import json
import os
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from textcraftor import config as configuration
from textcraftor import layout
from textcraftor.errors import ConfigError, UserError

if TYPE_CHECKING:
    from textcraftor.candidate import Candidate

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

Params = Annotated[Path, typer.Option(help="The run: its profile, mixes and overrides. Its folder is the workspace.")]
Profile = Annotated[
    str | None,
    typer.Option(help="A profile's name or file, instead of the one params.yaml names, whose overrides are then left out."),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")]
PARAMS = Path("params.yaml")


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
    _plugin("textcraftor.verbs", "validate")(configuration.load(params, profile=profile), params.parent)


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
    mix: Annotated[str, typer.Option(help="A mix whose text encoder is tuned.")],
    params: Params = PARAMS,
    profile: Profile = None,
    device: Device = "auto",
) -> None:
    """Tune the UNet on the frozen tuned text encoder of a mix."""
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
    model: Annotated[str, typer.Option(help="champion, challenger, a version, a candidate, or a folder.")] = "champion",
    out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("generated.png"),
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise.")] = 0,
    params: Params = PARAMS,
    profile: Profile = None,
    device: Device = "auto",
) -> None:
    """Draw one picture: base and tuned model side by side, from the same noise.

    A model that was judged is drawn with the base, chain and switch it was judged with, whatever params.yaml says now.
    """
    if not prompt.strip():
        raise ConfigError('The prompt is empty. Say what to draw, for instance: "a small red circle on a white background"')
    run = configuration.load(params, profile=profile)
    from textcraftor.candidate import Candidate
    from textcraftor.device import choose_device
    from textcraftor.generate import draw

    root = params.parent
    label = model
    if model in (layout.BASE, *run.candidates):
        candidate, scores = Candidate.find(model, root), root / layout.scores_file(model)
    else:
        if Path(model).is_dir():
            folder = Path(model)
            label = folder.resolve().name
        else:
            folder = _plugin("textcraftor.candidates", "registry")(model, run)
            number = folder.name.split("-")[0]  # the registry's folders are named VERSION-RUN
            label = f"version {number}" if model == number else f"{model} ({number})"
        candidate, scores = Candidate.find(str(folder), root), folder / "evidence/scores.parquet"
    run = _judged_settings(run, candidate, scores, root)
    draw(run.at(root), candidate, prompt, seed, out, choose_device(device, run.cpu_threads), label)
    typer.echo(out)


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


def _judged_settings(run: configuration.Config, candidate: "Candidate", scores: Path, root: Path) -> configuration.Config:
    """`run` with the settings the candidate was judged with; unchanged for the base and for weights not judged yet."""
    if not candidate.parts or not scores.is_file():
        return run
    from textcraftor.evaluate.scores import Scores
    from textcraftor.generate import with_judged_settings

    judged = Scores.read(scores)
    return with_judged_settings(run, judged.proof, root) if judged.digest == candidate.digest else run


def _plugin(group: str, name: str) -> Callable[..., Any]:
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


def main() -> None:
    """Entry point of the console script."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        app()
    except UserError as error:
        typer.echo(f"textcraftor: {' '.join(str(error).split())}", err=True)
        sys.exit(error.exit_status)


if __name__ == "__main__":
    main()
