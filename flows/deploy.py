"""Prepare this project's own Prefect server for a worker: settle earlier runs, make the work pool, deploy the flows.

    python -m flows.deploy PROJECT

`flows.servers` runs it in Prefect's folder, where no settings of the project lie: they are read when Prefect is imported.
Only then it changes to the project, where `prefect deploy` looks for prefect.yaml.
"""

import asyncio
import os
import re
import runpy
import shlex
import sys
from pathlib import Path

from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import ArtifactUpdate, WorkPoolCreate
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterKey,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import TERMINAL_STATES, FlowRun, StateType
from prefect.states import Cancelled, Scheduled
from prefect.workers.process import ProcessWorker

POOL = "textcraftor"
PROMOTION = "promote"  # the flow in flows/promote.py
VERSION_LINK = "model-version"  # key of the artifact that links to MLflow
LOOPBACK = re.compile(r"http://127\.0\.0\.1:\d+/")


async def prepare_server(mlflow_url: str) -> None:
    """Bring the server into the state in which a worker may start."""
    async with get_client() as client:
        await settle_earlier_runs(client)
        await repair_links(client, mlflow_url)
        await create_pool(client)


async def settle_earlier_runs(client: PrefectClient) -> None:
    """End what had begun when earlier servers stopped: nobody works on it, and it would hold the deployment's only slot.

    A promotion that a person asked for is scheduled again: it is short, and the same twice is the same. Runs that never
    began stay scheduled. A run that waits for a review has no process, and goes on waiting.
    """
    begun = FlowRunFilterStateType(not_any_=[*TERMINAL_STATES, StateType.SCHEDULED, StateType.PAUSED])
    flows: dict[object, str] = {}
    for run in await client.read_flow_runs(flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=begun))):
        if run.flow_id not in flows:
            flows[run.flow_id] = (await client.read_flow(run.flow_id)).name
        if flows[run.flow_id] == PROMOTION:
            await client.set_flow_run_state(run.id, Scheduled(message="Its servers were stopped before it ended."), force=True)
        else:
            await cancel(client, run)


async def cancel(client: PrefectClient, run: FlowRun) -> None:
    """Cancel a run whose processes are gone."""
    await client.set_flow_run_state(run.id, Cancelled(message="Its servers were stopped."), force=True)


async def repair_links(client: PrefectClient, mlflow_url: str) -> None:
    """Let the links of earlier runs lead to the MLflow server of today, which may have another port."""
    links = ArtifactFilter(key=ArtifactFilterKey(any_=[VERSION_LINK]))
    for artifact in await client.read_artifacts(artifact_filter=links):
        if isinstance(artifact.data, str) and artifact.id:
            repaired = LOOPBACK.sub(f"{mlflow_url}/", artifact.data)
            if repaired != artifact.data:
                await client.update_artifact(artifact.id, ArtifactUpdate(data=repaired))


async def create_pool(client: PrefectClient) -> None:
    """The pool of local processes. Each imports Prefect in this process's folder before it changes to the project."""
    template = ProcessWorker.get_default_base_job_template()
    variables = template["variables"]["properties"]
    variables["command"]["default"] = flow_command(sys.executable)
    variables["working_dir"]["default"] = str(Path.cwd())
    await client.create_work_pool(WorkPoolCreate(name=POOL, type="process", base_job_template=template), overwrite=True)


def flow_command(python: str) -> str:
    """The command of a flow run's process, as the worker takes it apart again."""
    return f"{shlex.quote(python)} -m prefect.engine"


if __name__ == "__main__":
    asyncio.run(prepare_server(os.environ["MLFLOW_TRACKING_URI"]))
    os.chdir(sys.argv[1])
    sys.argv = ["prefect", "--no-prompt", "deploy", "--all"]
    runpy.run_module("prefect", run_name="__main__", alter_sys=True)
