"""Two promotions at once, many times: two processes promote a worse and a better toy model at the same moment.

    python -m tests.tasks.race [--rounds 200] [--machines 2]

With two machines the processes share MLflow's database and nothing else: neither lock file nor copies of the record. With
one they share those, too. Prints in how many rounds the better version was champion at the end, how often the worse one was
first, and how many entries of the record lost a race. Exits with 1 unless the better version won every round.
"""

import argparse
import multiprocessing
import os
import shutil
import sys
import tempfile
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from prefect.states import Failed

from tasks import promotions, store
from tasks.environment import sqlite_url
from tasks.registry import promote
from tasks.tracking import only_if_unavailable
from tasks.workspace import Workspace
from tests.tasks.conftest import copy_database, judge_projects
from tests.tasks.registered import CHAMPION, MODEL, WORSE, enter


def use(home: Path, machine: str, root: Path) -> None:
    """Let this process be a machine with a folder of its own."""
    os.environ["MLFLOW_TRACKING_URI"] = sqlite_url(home / "mlflow.db")
    store.STORE, store.ROOT = home / machine / "store", root


def compete(home: Path, machine: str, project: Path, version: int, start: Barrier, done: Barrier) -> None:
    """Promote a version whenever the others do."""
    use(home, machine, project.parent)
    config = Workspace(project).config
    while True:
        start.wait()
        if (home / "end").exists():
            return
        while True:
            try:
                promote.fn(version, config)
                break
            except Exception as error:
                if not only_if_unavailable(None, None, Failed(data=error)):  # Prefect retries what this says
                    start.abort()
                    done.abort()
                    raise
        done.wait()


def race(home: Path, rounds: int, machines: int) -> dict[str, int]:
    projects = judge_projects(home / "judged", (200, 300))
    use(home, "first", home / "judged")
    MlflowClient(sqlite_url(home / "mlflow.db")).search_experiments()
    assert [enter(Workspace(projects[steps])) for steps in (300, 200)] == [CHAMPION, WORSE]
    copy_database(home / "mlflow.db", home / "backup.db")
    start, done = multiprocessing.Barrier(3), multiprocessing.Barrier(3)
    folders = ["first", "second"] if machines == 2 else ["first", "first"]
    runners = [
        multiprocessing.Process(target=compete, args=(home, folder, projects[300], version, start, done))
        for folder, version in zip(folders, (WORSE, CHAMPION), strict=True)
    ]
    for runner in runners:
        runner.start()
    counts = dict.fromkeys(("rounds", "better won", "worse was first", "entries that lost"), 0)
    client = store.client()
    for _ in range(rounds):
        copy_database(home / "backup.db", home / "mlflow.db")
        for folder in folders:
            shutil.rmtree(home / folder / "store/promotions", ignore_errors=True)
        start.wait()
        done.wait()
        entries = promotions.read(client, MODEL).entries
        written = client.search_model_versions(f"name = '{MODEL}-promotions'")
        counts["rounds"] += 1
        counts["better won"] += entries[-1].version == CHAMPION
        counts["worse was first"] += entries[0].version == WORSE
        counts["entries that lost"] += len(written) - len(entries)
    (home / "end").touch()
    start.wait()
    for runner in runners:
        runner.join()
    return counts


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--machines", type=int, choices=(1, 2), default=2)
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        counts: dict[str, Any] = race(Path(folder), given.rounds, given.machines)
    print(f"{given.machines} machine(s): " + ", ".join(f"{name} {count}" for name, count in counts.items()))
    return int(counts["better won"] != counts["rounds"])


if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    sys.exit(main())
