"""Law 1: the library knows no orchestra. Proven by importing all of it in a fresh interpreter."""

import subprocess
import sys

ORCHESTRA = ("prefect", "dvc", "mlflow", "great_expectations")

PROBE = """
import importlib, pkgutil, sys
{before}
import textcraftor
for module in pkgutil.walk_packages(textcraftor.__path__, "textcraftor."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
print(*sorted(set(name.split(".")[0] for name in sys.modules) & {{{orchestra}}}))
"""


def met(before: str = "") -> list[str]:
    """Which of the orchestra are imported once the whole library is, after the statement `before`."""
    code = PROBE.format(before=before, orchestra=", ".join(map(repr, ORCHESTRA)))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_the_library_imports_no_orchestra() -> None:
    assert met() == []


def test_the_law_can_be_broken() -> None:
    assert "dvc" in met(before="import dvc")
