"""Load a proven model for serving: by its name in the registry, or from the folder that MLflow downloaded."""

import os
from pathlib import Path
from typing import Final

import yaml

from textcraftor import lookup, plugins
from textcraftor.candidate import Candidate
from textcraftor.config import Config, load
from textcraftor.device import choose_device
from textcraftor.errors import ConfigError, Unproven
from textcraftor.generate import with_judged_settings
from textcraftor.serving.service import Service
from textcraftor.snapshot import private_copy, private_folder
from textcraftor.trust.statement import MLFLOW_NOTE
from textcraftor.trust.verifier import verify

PROJECT: Final = "TEXTCRAFTOR_PROJECT"  # the folder with params.yaml, mlflow/policy and the keys
SERVED: Final = "TEXTCRAFTOR_SERVE"  # `any`: serve every proven version, not the champion alone


def project() -> Path:
    """The project whose policy and keys decide. Raises ConfigError."""
    candidates = [Path(os.environ[PROJECT])] if os.environ.get(PROJECT) else [Path.cwd(), Path(__file__).resolve().parents[2]]
    for folder in candidates:
        if (folder / "params.yaml").is_file():
            return folder
    raise ConfigError(f"{candidates[0]} is no project (no params.yaml). Set {PROJECT} to the folder of one")


def load_registered(model: str, run: Config, root: Path, device: str = "auto") -> Service:
    """The service of a model by its name: champion, challenger, a version. Raises what `lookup.find` raises, and Unproven."""
    found = lookup.find(model, run, root)
    if not found.registered:
        raise Unproven(f"{model} is no version of the registry, and only what is proven is served. `champion`, or a number")
    judged = lookup.judged_settings(run, found, root).at(root)
    return Service(judged, found.candidate, choose_device(device, run.cpu_threads))


def load_downloaded(path: str) -> Service:
    """The service of a folder that MLflow downloaded, after copying and verifying it.

    A version of the registry must be the champion that the signed record of promotions names: who moves the alias does
    not decide what is served. TEXTCRAFTOR_SERVE=any allows every proven version.
    Raises Unproven, ConfigError outside a project, and what the registry raises.
    """
    root = project().absolute()
    run, private = load(root / "params.yaml"), private_folder(root)
    folder = private_copy(Path(path), private)
    name = run.registry.name
    if (meta := folder / MLFLOW_NOTE).is_file():
        name = str(yaml.safe_load(meta.read_text(encoding="utf-8"))["model_name"])
        registered = True
    else:
        registered = False
    proven = verify(folder, name, root)
    if registered and os.environ.get(SERVED) != "any":
        champion = plugins.plugin("textcraftor.candidates", "champion")(name)
        if champion != proven.digest:
            raise Unproven(
                f"This version of {name} is not its champion by the signed record of promotions, whatever its alias says. "
                f"Serve the champion, promote this one (make promote VERSION=N), or set {SERVED}=any"
            )
    judged = with_judged_settings(run, proven.scores.proof, root, private).at(root)
    return Service(judged, Candidate.at(folder), choose_device("auto", run.cpu_threads))
