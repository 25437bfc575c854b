"""The order of the tests, and the fixtures of the processes that run them."""

import gc
from pathlib import Path

import pytest

# The files that take longest, first: with two workers, a long file at the end leaves one of them without work. Those of
# flows/ stay together, so that their Prefect server is started once a worker and ends early.
LONGEST_FIRST = (
    *(
        "flows/test_readme.py",
        "flows/test_full.py",
        "flows/test_scheduling.py",
        "flows/test_terminal.py",
        "flows/test_deploy.py",
    ),
    *("distributed/test_fsdp.py", "models/test_families.py", "training/test_stages.py", "distributed/test_launchers.py"),
    *("invariants/test_one_way.py", "tasks/test_kills.py", "tasks/test_champion.py", "tiny/test_recipe.py"),
    *("tasks/test_registry.py", "training/test_objective.py", "evaluate/test_run.py", "training/test_trainer.py"),
    *("test_dvc.py", "tiny/test_shipped_models.py", "test_workspace_root.py", "training/test_resume.py"),
)


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
