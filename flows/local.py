"""`make full`, `make ui` and `make promote`: the pipeline on this machine, with servers of its own.

    python -m flows.local full       start servers, deploy, run, report, stop servers
    python -m flows.local ui         start servers and a worker, stop them at Ctrl-C
    python -m flows.local promote    make a registered version champion, on the servers that run or on new ones

`full` exits with 0 (promoted, or the champion stays), 3 (not promoted), 1 (the run failed) or 2 (impossible settings).
Settings are environment variables: PROMPTS (a file), PROFILE, PROMOTE; SERVERS=mine for a run on the servers that
PREFECT_API_URL and MLFLOW_TRACKING_URI name; VERSION for `promote`; PREFECT_PORT and MLFLOW_PORT fix a port;
TEXTCRAFTOR_GRACE_SECONDS is how long a training that is stopped may take to write its checkpoint. Ctrl-C waits for
checkpoints; a second Ctrl-C does not, and they are still written.
"""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from flows import mine
from flows.environment import prefect_folder, require_usable_folder
from flows.ports import ServersError, choose_ports
from flows.servers import SHELL_FILE, exclusive, reached, running
from tasks import guard
from tasks.environment import grace_seconds
from tasks.links import model_page, runs_page
from textcraftor.config import load
from textcraftor.errors import ConfigError, PromptError, UserError
from textcraftor.layout import STATE

ROOT = Path(__file__).resolve().parents[1]
HOME = ROOT / STATE
DEPLOYMENT, PROMOTION = "textcraftor/full", "promote/champion"


def full() -> int:
    """Start servers, run the deployment on them, stop them; or run on the user's own. Returns the exit status."""
    settings = settings_from(os.environ)
    name = f"make-full-{time.strftime('%Y%m%d-%H%M%S')}-{uuid4().hex[:4]}"
    log = HOME / "logs" / f"{name}.log"
    if mine.is_wanted(os.environ):
        env = mine.environment(os.environ, settings)
        with exclusive(HOME):
            print("   ".join(f"{name}={mine.without_credentials(env[name])}" for name in mine.NAMED))
            print(f"Log     {log.relative_to(ROOT)}", flush=True)
            log.parent.mkdir(parents=True, exist_ok=True)
            return run([sys.executable, "-m", "flows.mine", name, json.dumps(settings)], env, name, log)
    ports = choose_ports(os.environ)
    with exclusive(HOME):
        print("Starting Prefect and MLflow ...", flush=True)
        with running(ROOT, HOME, ports) as servers:
            print(f"Prefect {ports.prefect_url}   MLflow {ports.mlflow_url}   (both until the run ends)", flush=True)
            print(f"Log     {log.relative_to(ROOT)}", flush=True)
            os.environ.update(servers.env)
            parameters = json.dumps({"settings": settings})
            command = ["prefect", "deployment", "run", DEPLOYMENT, "--watch", "--flow-run-name", name, "--params", parameters]
            return run([sys.executable, "-m", *command], servers.env, name, log, servers.require_alive)


def run(
    command: list[str], env: Mapping[str, str], name: str, log: Path, require_alive: Callable[[], None] = lambda: None
) -> int:
    """Follow a run to its end, the output of `command` in `log`, a line a stage in the terminal, and print its summary.

    command: runs a flow run of this name.  require_alive: raises when its servers have ended.
    """
    from flows import summary, terminal  # they import Prefect, which reads the environment when it is imported

    with log.open("w") as output:
        watch = guard.start(
            command,
            grace_seconds(os.environ) + guard.GRACE,  # the stages in it may write a checkpoint
            cwd=prefect_folder(HOME),
            env={**env, "COLUMNS": "160"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            with terminal.opened(name) as shown:
                while watch.poll() is None:
                    require_alive()
                    shown.show()
                    time.sleep(1)
                shown.finish()
        except BaseException:
            asyncio.run(summary.cancel_run(name))  # the interrupted run must not look as if it still ran
            raise
        finally:
            guard.end(watch)
    return asyncio.run(summary.print_summary(name, log))


def ui() -> int:
    """Serve both UIs, with earlier runs in them, and run what is asked for, until Ctrl-C, which is how it is meant to end."""
    model = load(ROOT / "params.yaml").registry.name
    ports = choose_ports(os.environ)
    with contextlib.suppress(SystemExit), exclusive(HOME):
        print("Starting Prefect and MLflow ...", flush=True)
        with running(ROOT, HOME, ports, watched=True) as servers:
            print(
                f"Prefect   {ports.prefect_url}\n"
                f"MLflow    {runs_page(ports.mlflow_url, servers.experiment_id(model))}   runs\n"
                f"          {model_page(ports.mlflow_url, model)}   registered versions\n"
                f"To start runs from another shell, first: source {HOME.relative_to(ROOT) / SHELL_FILE}\n"
                "Ctrl-C stops both.",
                flush=True,
            )
            while True:
                servers.require_alive()
                time.sleep(1)
    return 0


def promote() -> int:
    """Run the deployment that makes VERSION the champion; returns the exit status. Raises ConfigError without a version."""
    given = os.environ.get("VERSION", "")
    if not (given.isdecimal() and int(given) > 0):
        said = f"VERSION={given} is not the number of a version" if given else "VERSION is missing"
        raise ConfigError(f"{said}. Give one that the registry shows, such as make promote VERSION=1")
    with reached(ROOT, HOME, os.environ) as env:
        os.environ.clear()
        os.environ.update(env)
        from flows import summary  # imports Prefect, which reads the environment when it is imported

        return asyncio.run(summary.run_promotion(PROMOTION, int(given)))


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
        require_usable_folder(ROOT, HOME)
        os.chdir(prefect_folder(HOME))  # away from the settings that may lie in the project
        return verbs[arguments[0]]()
    except ServersError as error:
        print(f"textcraftor: {error}", file=sys.stderr)
        return 1
    except UserError as error:
        print(f"textcraftor: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main({"full": full, "ui": ui, "promote": promote}, sys.argv[1:]))
