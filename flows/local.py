"""`make full` and `make ui`: the whole pipeline on this machine, and a look at what it did.

    python -m flows.local full     servers up, deploy, run, report, servers down
    python -m flows.local ui       servers up until Ctrl-C

`full` exits with the run's own verdict: 0 promoted or the champion stays, 3 not promoted, 1 failed, 2 when what
was asked for is impossible. Settings come as environment variables: PROMPTS (a file), PROFILE, PROMOTE, and
PREFECT_PORT, MLFLOW_PORT to fix a port.
"""

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from flows.servers import Servers, ServersError, alone, choose_ports, running
from tasks import guard
from textcraftor.errors import PromptError, UserError
from textcraftor.layout import STATE

ROOT = Path(__file__).resolve().parents[1]
HOME = ROOT / STATE
DEPLOYMENT = "textcraftor/full"


def full() -> int:
    """Run the deployment on servers of its own and tell how it ended."""
    settings = settings_from(os.environ)
    ports = choose_ports(os.environ)
    with alone(HOME):
        print("Starting Prefect and MLflow ...", flush=True)
        with running(ROOT, HOME, ports, worker=True) as servers:
            print(f"Prefect {ports.prefect_url}   MLflow {ports.mlflow_url}   (both until the run ends)", flush=True)
            os.environ.update(servers.env)
            asyncio.run(clear_leftovers())
            status = run(servers, settings)
    print("Both UIs, with this run in them: make ui")
    return status


def run(servers: Servers, settings: Mapping[str, Any]) -> int:
    """Start the deployment, watch it to its end, print what came of it. Returns the exit status."""
    from flows import summary  # imports Prefect, which reads the environment when it is imported

    name = f"make-full-{time.strftime('%Y%m%d-%H%M%S')}-{uuid4().hex[:4]}"
    parameters = json.dumps({"settings": dict(settings)})
    command = ["prefect", "deployment", "run", DEPLOYMENT, "--watch", "--flow-run-name", name, "--params", parameters]
    watch = guard.start([sys.executable, "-m", *command], cwd=servers.root, env=servers.env)
    try:
        while watch.poll() is None:
            servers.require_alive()
            time.sleep(0.5)
    except BaseException:
        asyncio.run(clear_leftovers())  # what is ended here must not look as if it still ran
        raise
    finally:
        guard.end(watch)
    return asyncio.run(summary.tell(name))


async def clear_leftovers() -> None:
    """Close runs that a machine that stopped left open: nobody else works on them while we hold the project.

    An open run would be taken up by our worker, or keep the deployment's only place for ever.
    """
    from prefect import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType
    from prefect.client.schemas.objects import TERMINAL_STATES, StateType
    from prefect.states import Cancelled

    is_open = FlowRunFilterStateType(any_=[state for state in StateType if state not in TERMINAL_STATES])
    async with get_client() as client:
        for left in await client.read_flow_runs(flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=is_open))):
            await client.set_flow_run_state(left.id, Cancelled(message="Its servers were stopped."), force=True)


def ui() -> int:
    """Show what earlier runs did, until Ctrl-C."""
    ports = choose_ports(os.environ)
    with alone(HOME):
        print("Starting Prefect and MLflow ...", flush=True)
        with running(ROOT, HOME, ports, worker=False) as servers:
            print(f"Prefect {ports.prefect_url}\nMLflow  {ports.mlflow_url}\nCtrl-C stops both.", flush=True)
            while True:
                servers.require_alive()
                time.sleep(1)


def settings_from(environment: Mapping[str, str]) -> dict[str, Any]:
    """The run's settings as far as the command line gives them. Raises PromptError when PROMPTS is no file."""
    settings = {name.lower(): value for name in ("PROMPTS", "PROFILE", "PROMOTE") if (value := environment.get(name))}
    if (prompts := settings.get("prompts")) and not (ROOT / prompts).is_file():
        raise PromptError(f"PROMPTS={prompts} is not a file. Give one, relative to {ROOT.name}/ or absolute, or none")
    return settings


def main(verbs: Mapping[str, Callable[[], int]], arguments: list[str]) -> int:
    """Run a verb so that any polite signal ends what it started."""
    if len(arguments) != 1 or arguments[0] not in verbs:
        print(__doc__, file=sys.stderr)
        return 2

    def stop(number: int, _: object) -> None:
        sys.exit(128 + number)

    # Set even where a shell's background job would ignore Ctrl-C.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    try:
        return verbs[arguments[0]]()
    except ServersError as error:
        print(f"textcraftor: {error}", file=sys.stderr)
        return 1
    except UserError as error:
        print(f"textcraftor: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main({"full": full, "ui": ui}, sys.argv[1:]))
