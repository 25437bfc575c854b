"""Fixtures of the registry's tests: toy projects up to the gate."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.flows.project import make_project
from textcraftor.layout import KEYS, POLICIES

STAGES = """
import os, runpy, sys
for folder in sys.argv[1:]:
    os.chdir(folder)
    toy = runpy.run_path("toy.py")
    toy["evaluate"]("base"), toy["train"]("balanced"), toy["evaluate"]("balanced"), toy["judge"]()
"""


@pytest.fixture(scope="session")
def judged(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Toy projects run up to the gate, by train.steps: the higher, the better the models."""
    root = tmp_path_factory.mktemp("judged")
    projects = {steps: make_project(root / str(steps), train={"steps": steps}, mixes=["balanced"]) for steps in (1, 200, 300)}
    for project in projects.values():  # one key and one policy, those of the project `root`
        (project / KEYS).parent.mkdir(exist_ok=True)
        (project / KEYS).symlink_to(root / KEYS)
    (root / KEYS).mkdir(parents=True)
    shutil.copytree(projects[1] / POLICIES, root / POLICIES)
    subprocess.run([sys.executable, "-c", STAGES, *map(str, projects.values())], check=True)
    return projects
