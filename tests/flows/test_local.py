"""`make ui` and a second shell, as the README has it, in a folder where settings for somebody else's Prefect lie."""

import asyncio
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from prefect import flow, get_client
from prefect.settings import PREFECT_API_URL
from prefect.states import Running

from flows.ports import choose_ports
from tasks import guard
from tests.flows.checkout import make_checkout, shell_environment

SECOND_SHELL = """
source .textcraftor/env
prefect deployment run textcraftor/full --watch --params '{"settings": {"promote": "manual"}}' &&
prefect deployment run promote/champion --param version=1 --watch
"""


@dataclass(frozen=True)
class Served:
    """A checkout under `make ui`: what was printed, and the state of the run that is open on the other server."""

    folder: Path
    printed: str
    theirs: Path  # the database that the settings in the folder name
    open_run: object


@flow(name="textcraftor")
def their_run() -> None: ...


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    home = tmp_path_factory.mktemp("local")
    folder, theirs = make_checkout(home / "checkout", mixes=["balanced"]), home / "theirs.db"
    other = PREFECT_API_URL.value()  # of the tests' own server, which plays somebody else's here
    database = f"sqlite+aiosqlite:///{theirs}"
    (folder / ".env").write_text(
        f"PREFECT_API_URL={other}\nPREFECT_API_KEY=secret\nPREFECT_SERVER_API_AUTH_STRING=a:b\n"
        f"PREFECT_SERVER_DATABASE_CONNECTION_URL={database}\n"
    )
    (folder / "prefect.toml").write_text(f'[api]\nurl = "{other}"\n[server.database]\nconnection_url = "{database}"\n')

    async def open_their_run() -> object:
        async with get_client() as client:
            return (await client.create_flow_run(their_run, state=Running())).id

    open_run = asyncio.run(open_their_run())
    ports = choose_ports({})
    ui = guard.start(
        [sys.executable, "-m", "flows.local", "ui"],
        grace=60,
        cwd=folder,
        env=shell_environment(PREFECT_PORT=str(ports.prefect), MLFLOW_PORT=str(ports.mlflow)),
        stdout=subprocess.PIPE,
    )
    try:
        assert ui.stdout
        printed = ""
        while "Ctrl-C" not in printed:
            line = ui.stdout.readline()
            assert line, f"make ui ended: {printed}"
            printed += line
        yield Served(folder, printed, theirs, open_run)
    finally:
        guard.end(ui)
    assert ui.returncode == 0, "to be stopped is how make ui is meant to end"
    assert not (folder / ".textcraftor/env").exists()


def promote(folder: Path, version: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flows.local", "promote"]
    return subprocess.run(command, cwd=folder, env=shell_environment(VERSION=version), capture_output=True, text=True)


def test_a_second_shell_runs_and_promotes_and_nobody_elses_run_is_touched(served: Served) -> None:
    assert "source .textcraftor/env" in served.printed
    assert "/#/models/textcraftor-tiny?workflowType=machine_learning" in served.printed
    bash = shutil.which("bash")
    assert bash
    done = subprocess.run(
        [bash, "-ec", SECOND_SHELL], cwd=served.folder, env=shell_environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = " ".join(done.stdout.split())
    assert "challenger: a person decides: make promote VERSION=1" in said
    assert "promoted: it passed the gate and a person chose it" in said

    again = promote(served.folder, "1")
    assert (again.returncode, again.stderr) == (0, "")
    verdict = "Verdict: champion stays (balanced, version 1 in the registry): version 1 is the champion"
    assert again.stdout.splitlines()[0] == verdict
    refused = promote(served.folder, "9")
    assert refused.returncode == 1
    assert refused.stderr == "textcraftor: textcraftor-tiny has no version 9 in the registry. Known: 1\n"

    async def theirs() -> tuple[str, bool]:
        async with get_client() as client:
            run = await client.read_flow_run(served.open_run)  # type: ignore[arg-type]
            pools = {pool.name for pool in await client.read_work_pools()}
            return str(run.state_name), bool(await client.read_deployments()) or "textcraftor" in pools

    assert asyncio.run(theirs()) == ("Running", False)
    assert not served.theirs.exists()
