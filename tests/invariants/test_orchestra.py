"""Law 1: the library imports no orchestrator: not at import time, not inside a function, not by name."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import textcraftor

ORCHESTRATORS = ("prefect", "dvc", "mlflow", "great_expectations")

PROBE = """
import gc, importlib, pkgutil, sys
import textcraftor

gc.disable()  # a quarter of the time that imports take

def imported():
    return sorted(set(name.split(".")[0] for name in sys.modules) & {names})

for module in pkgutil.walk_packages(textcraftor.__path__, "textcraftor."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
by_library = imported()
import dvc
print(by_library, imported())
"""


def named_orchestrators(source: str) -> Iterator[str]:
    """The orchestrators that a module's source imports anywhere, or names in a call of import_module or __import__."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            names = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
        yield from (name for name in names if name.split(".")[0] in ORCHESTRATORS)


def test_importing_the_library_imports_no_orchestrator() -> None:
    """In a fresh interpreter; it then imports one, to show that the probe sees them."""
    code = PROBE.format(names=set(ORCHESTRATORS))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] ['dvc']"


def test_no_module_of_the_library_names_an_orchestrator_in_an_import() -> None:
    """Imports inside functions run after the library was imported, so only its source shows them."""
    files = list(Path(textcraftor.__file__).parent.rglob("*.py"))
    assert len(files) > 50
    found = {f"{path}: {name}" for path in files for name in named_orchestrators(path.read_text(encoding="utf-8"))}
    assert not found


@pytest.mark.parametrize(
    "source",
    [
        "import prefect",
        "def late():\n    from mlflow.entities import Metric",
        "def late():\n    import importlib\n    return importlib.import_module('dvc.repo')",
        "def late():\n    return __import__('great_expectations')",
    ],
)
def test_the_source_check_can_fail(source: str) -> None:
    assert list(named_orchestrators(source))
