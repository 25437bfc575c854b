"""`make full` and `make ui`: the whole pipeline on this machine, and the UIs with earlier runs.

    python -m flows.local full     start servers, deploy, run, report, stop servers
    python -m flows.local ui       start servers, stop them at Ctrl-C

`full` exits with 0 (promoted, or the champion stays), 3 (not promoted), 1 (the run failed) or 2 (impossible settings).
Settings are environment variables: PROMPTS (a file), PROFILE, PROMOTE; PREFECT_PORT and MLFLOW_PORT fix a port;
TEXTCRAFTOR_GRACE_SECONDS is how long a training that is stopped may take to write its checkpoint. Ctrl-C waits for
checkpoints; a second Ctrl-C does not, and they are still written.
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

from flows.servers import Servers, ServersError, choose_ports, exclusive, running
from tasks import guard
from textcraftor.errors import PromptError, UserError
from textcraftor.layout import STATE

ROOT = Path(__file__).resolve().parents[1]
HOME = ROOT / STATE
DEPLOYMENT = "textcraftor/full"


def full() -> int:
    """Start servers, run the deployment on them, stop them. Returns the exit status."""
    settings = settings_from(os.environ)
    ports = choose_ports(os.environ)
    with exclusive(HOME):
        print("Starting Prefect and MLflow ...", flush=True)
        with running(ROOT, HOME, ports, worker=True) as servers:
            print(f"Prefect {ports.prefect_url}   MLflow {ports.mlflow_url}   (both until the run ends)", flush=True)
            os.environ.update(servers.env)
            asyncio.run(cancel_open_runs())
            status = run(servers, settings)
    print("Both UIs, with this run in them: make ui")
    return status


def run(servers: Servers, settings: Mapping[str, Any]) -> int:
    """Run the deployment to its end and print its summary. Returns the exit status."""
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
        asyncio.run(cancel_open_runs())  # the interrupted run must not look as if it still ran
        raise
    finally:
        guard.end(watch)
    return asyncio.run(summary.print_summary(name))


async def cancel_open_runs() -> None:
    """Cancel runs that an earlier crash left open; while we hold the project's lock nobody works on them.

    Our worker would start an open run again, or the run would occupy the deployment's only slot for ever.
    """
    from prefect import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType
    from prefect.client.schemas.objects import TERMINAL_STATES, StateType
    from prefect.states import Cancelled

    is_open = FlowRunFilterStateType(any_=[state for state in StateType if state not in TERMINAL_STATES])
    async with get_client() as client:
        for run in await client.read_flow_runs(flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=is_open))):
            await client.set_flow_run_state(run.id, Cancelled(message="Its servers were stopped."), force=True)


def ui() -> int:
    """Serve both UIs, with earlier runs in them, until Ctrl-C."""
    ports = choose_ports(os.environ)
    with exclusive(HOME):
        print("Starting Prefect and MLflow ...", flush=True)
        with running(ROOT, HOME, ports, worker=False) as servers:
            print(f"Prefect {ports.prefect_url}\nMLflow  {ports.mlflow_url}\nCtrl-C stops both.", flush=True)
            while True:
                servers.require_alive()
                time.sleep(1)


def settings_from(environment: Mapping[str, str]) -> dict[str, Any]:
    """The run's settings that the environment gives. Raises PromptError when PROMPTS is not a file."""
    settings = {name.lower(): value for name in ("PROMPTS", "PROFILE", "PROMOTE") if (value := environment.get(name))}
    if (prompts := settings.get("prompts")) and not (ROOT / prompts).is_file():
        raise PromptError(f"PROMPTS={prompts} is not a file. Give one, relative to {ROOT.name}/ or absolute, or none")
    return settings


def main(verbs: Mapping[str, Callable[[], int]], arguments: list[str]) -> int:
    """Run a verb; SIGINT, SIGTERM and SIGHUP stop it and everything that it started."""
    if len(arguments) != 1 or arguments[0] not in verbs:
        print(__doc__, file=sys.stderr)
        return 2

    def stop(number: int, _: object) -> None:
        sys.exit(128 + number)

    # Set explicitly, because a shell's background job would ignore Ctrl-C.
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
