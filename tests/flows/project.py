"""A project of toy stages, with the files of a real one."""

import shutil
import sys
from pathlib import Path

import yaml

from textcraftor.config import load
from textcraftor.resolved import write_resolved
from textcraftor.trust.policy import Policy

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def make_project(folder: Path, **sections: object) -> Path:
    """A folder with toy stages, DVC, our params.yaml with `sections` replaced, and the stage `resolve` done."""
    folder.mkdir(parents=True)
    (folder / "data/tiny").mkdir(parents=True)
    (folder / "data/tiny/weights").write_text("shipped")
    (folder / ".dvc").mkdir()
    (folder / ".dvc/config").write_text("[core]\n    no_scm = True\n    analytics = false\n")
    use_toys(folder, **sections)
    config = load(folder / "params.yaml")
    for reward in config.rewards.values():
        if reward.path and reward.path.startswith("data/tiny/"):
            (folder / reward.path).mkdir(parents=True, exist_ok=True)
            (folder / reward.path / "model.safetensors").write_text(f"weights of {reward.path}")
    write_resolved(config, folder)
    Policy.of(config, folder).write(config.registry.name, config.profile, folder)
    return folder


def use_toys(folder: Path, **sections: object) -> None:
    """Put toy stages and their parameters in the place of the real ones, `sections` replaced."""
    shutil.copyfile(HERE / "toy.py", folder / "toy.py")
    # The interpreter that runs the tests is the one that has the library.
    text = (HERE / "toy_dvc.yaml").read_text().replace("cmd: python ", f"cmd: {sys.executable} ")
    shown = {name: yaml.safe_load((ROOT / "dvc.yaml").read_text())[name] for name in ("metrics", "plots")}
    (folder / "dvc.yaml").write_text(text + yaml.safe_dump(shown))
    params = yaml.safe_load((ROOT / "params.yaml").read_text()) | {"train": {"steps": 200}} | sections
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))


def stages_run(folder: Path) -> list[str]:
    """The stages that ran, in order; each wrote its name to the log."""
    log = folder / "stages.log"
    return log.read_text().splitlines() if log.exists() else []
