"""A project of toy stages in a folder of its own, laid out like this one."""

import shutil
import sys
from pathlib import Path

import yaml

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def make_project(folder: Path, **sections: object) -> Path:
    """Toy stages, dvc.yaml, an initialised DVC, and a params.yaml like ours overlaid by `sections`."""
    folder.mkdir(parents=True)
    shutil.copyfile(HERE / "toy.py", folder / "toy.py")
    shutil.copyfile(HERE / "toy_dvc.yaml", folder / "dvc.yaml")
    # By its path, not its name: the interpreter that runs the tests is the one that has the library.
    text = (folder / "dvc.yaml").read_text().replace("cmd: python ", f"cmd: {sys.executable} ")
    (folder / "dvc.yaml").write_text(text)
    (folder / "data/tiny").mkdir(parents=True)
    (folder / "data/tiny/weights").write_text("shipped")
    params = yaml.safe_load((ROOT / "params.yaml").read_text()) | {"train": {"steps": 200}} | sections
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    (folder / ".dvc").mkdir()
    (folder / ".dvc/config").write_text("[core]\n    no_scm = True\n    analytics = false\n")
    return folder


def stages_run(folder: Path) -> list[str]:
    """The stages that did run, in order, as each wrote down itself."""
    log = folder / "stages.log"
    return log.read_text().splitlines() if log.exists() else []
