"""Models by the names that people give them."""

from dataclasses import dataclass
from pathlib import Path

from textcraftor import layout, plugins
from textcraftor.candidate import Candidate
from textcraftor.config import Config
from textcraftor.errors import ModelError
from textcraftor.evaluate.scores import Scores
from textcraftor.generate import with_judged_settings
from textcraftor.snapshot import private_folder


@dataclass(frozen=True)
class Found:
    """A candidate, the file with its scores where it was judged, and what to call it in a picture.

    registered: whether it is a version of the registry, which is served from verified copies alone.
    """

    candidate: Candidate
    scores: Path
    label: str
    registered: bool = False


def find(model: str, run: Config, root: Path) -> Found:
    """The model called `model`: base, a candidate of the run, a folder, or a version of the registry, proven.

    A version is a copy that only this process's account can open, verified after it was copied.
    root: the workspace.  Raises ModelError when there is none, and what the registry raises.
    """
    if model in (layout.BASE, *run.candidates):
        return Found(Candidate.find(model, root), root / layout.scores_file(model), model)
    if "/" in model:  # a plain name never is a folder, so that none can stand in for the champion
        return Found(Candidate.at(Path(model)), Path(model) / "evidence/scores.parquet", Path(model).resolve().name)
    folder = plugins.plugin("textcraftor.candidates", "registry")(model, run, private_folder(root))
    number = folder.name.split("-")[0]  # the registry's folders are named VERSION-RUN
    label = f"version {number}" if model == number else f"{model} ({number})"
    return Found(Candidate.at(folder), folder / "evidence/scores.parquet", label, registered=True)


def judged_settings(run: Config, found: Found, root: Path, copied: bool = True) -> Config:
    """`run` with the settings the model was judged with; unchanged for the base and for weights not judged yet.

    copied: with a registered version, name a verified copy of the base, to be loaded from.
    """
    if not found.candidate.parts or not found.scores.is_file():
        return run
    judged = Scores.read(found.scores)
    private = private_folder(root) if copied and found.registered else None
    return with_judged_settings(run, judged.proof, root, private) if judged.digest == found.candidate.digest else run


def require_base(run: Config, found: Found, root: Path) -> None:
    """Raises ModelError when a model was judged on another base than the run's."""
    judged = judged_settings(run, found, root, copied=False).base
    if judged != run.base:
        raise ModelError(
            f"{found.label} was judged on base {judged.path}, and this run's is {run.base.path}. Name that base in params.yaml"
        )
