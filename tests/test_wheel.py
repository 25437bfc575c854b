"""The wheel is the library and its command line: it works from any folder, beside anybody's own `tasks`."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILD = "import sys; from setuptools.build_meta import build_wheel; print(build_wheel(sys.argv[1]))"
# What the console script does, which is written by an installer.
SCRIPT = (
    "from importlib.metadata import entry_points as e; e(group='console_scripts', name='textcraftor')['textcraftor'].load()()"
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("source")
    for name in ("textcraftor", "tasks", "flows"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    out = tmp_path_factory.mktemp("wheel")
    done = subprocess.run([sys.executable, "-c", BUILD, str(out)], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with the wheel in it; its dependencies are this environment's."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False)
    python = folder / "bin/python"
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    # A folder named in a .pth joins sys.path, and its own .pth files, such as the one of a checkout, are not read.
    (site / "dependencies.pth").write_text("\n".join(each for each in sys.path if each.endswith("-packages")))
    return python


def textcraftor(python: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command where `tasks` is somebody else's module, first on the path."""
    (folder / "tasks.py").write_text("raise SystemExit('the wrong tasks')")
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [str(python), "-c", SCRIPT, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_the_wheel_holds_the_library_alone(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"textcraftor"}
    shipped = {f"textcraftor/profiles/{path.name}" for path in (ROOT / "textcraftor/profiles").glob("*.yaml")}
    assert shipped | {"textcraftor/py.typed"} <= set(names) and any(name.endswith(".j2") for name in names)


def test_an_installed_wheel_works_in_an_empty_folder_beside_foreign_tasks(python: Path, tmp_path: Path) -> None:
    done = textcraftor(python, tmp_path, "config", "--profile", "tiny")
    assert done.returncode == 0 and "num_inference_steps: 10" in done.stdout, done.stderr
    where = subprocess.run(
        [str(python), "-c", "import textcraftor; print(textcraftor.__file__)"], cwd=tmp_path, capture_output=True, text=True
    )
    assert str(python.parents[1]) in where.stdout, "the wheel was tested, not the checkout"


def test_a_verb_of_the_pipeline_says_that_it_needs_a_checkout(python: Path, tmp_path: Path) -> None:
    done = textcraftor(python, tmp_path, "validate", "--profile", "tiny")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "`validate` belongs to the pipeline" in done.stderr and "checkout" in done.stderr


def test_a_checkout_finds_its_own_tasks_beside_foreign_ones(tmp_path: Path) -> None:
    """From a folder that is no checkout, as in a variant workspace; what is missing there is the curated prompts."""
    done = textcraftor(Path(sys.executable), tmp_path, "validate", "--profile", "tiny")
    assert done.returncode == 2 and "data/prompts/curated" in done.stderr, done.stderr
