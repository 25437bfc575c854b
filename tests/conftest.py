"""The order of the tests, who runs them, and the fixtures of the processes that do."""

import gc
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadFileScheduling

# The files that take longest, first: with two workers, a long file at the end leaves one of them without work. Those that
# share a Prefect server run on one worker, because starting it takes as long as some of them.
ONE_SERVER = ("flows/test_full.py", "flows/test_scheduling.py", "flows/test_terminal.py", "flows/test_deploy.py")
LONGEST_FIRST = (
    *("flows/test_readme.py", *ONE_SERVER),
    *("distributed/test_fsdp.py", "training/test_stages.py", "distributed/test_launchers.py", "models/test_families.py"),
    *("invariants/test_one_way.py", "tasks/test_kills.py", "tasks/test_champion.py", "tiny/test_recipe.py"),
    *("tasks/test_registry.py", "training/test_objective.py", "evaluate/test_run.py", "training/test_trainer.py"),
    *("test_dvc.py", "tiny/test_shipped_models.py", "test_workspace_root.py", "training/test_resume.py"),
)


class Scheduling(LoadFileScheduling):
    """A file's tests on one worker, and those of several files where they share a server."""

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return "a Prefect server" if file.endswith(ONE_SERVER) else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Scheduling | None:
    return Scheduling(config, log) if config.getvalue("dist") == "loadfile" else None


def pytest_configure(config: pytest.Config) -> None:
    # The process that only hands tests to workers needs no fixtures, and importing torch and diffusers takes it 7 s.
    if not config.getoption("numprocesses", None):
        gc.disable()  # a quarter of the time that imports take is the search for garbage among what they keep
        config.pluginmanager.import_plugin("tests.fixtures")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    rank = {here / name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))  # stable: the tests of a file stay in their order


def pytest_collection_finish() -> None:
    gc.freeze()  # the modules, which no later search needs to look at
    gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # for what ends with the interpreter
