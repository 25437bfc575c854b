"""`make full SERVERS=mine`: a run in a process of its own, reported to the Prefect and MLflow that the user's settings name.

    python -m flows.mine NAME SETTINGS      what `flows.local` starts; SETTINGS are those of the flow, as JSON

It makes no deployment, work pool or worker there, and touches no other run: a shared server holds the work of others.
"""

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from textcraftor.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
NAMED = ("PREFECT_API_URL", "MLFLOW_TRACKING_URI")


def is_wanted(environment: Mapping[str, str]) -> bool:
    """Whether the run goes to the user's own servers. Raises ConfigError for a SERVERS that says something else."""
    given = environment.get("SERVERS", "")
    if given not in ("", "mine"):
        raise ConfigError(f"SERVERS={given} is unknown. SERVERS=mine uses your own; without it the project starts servers")
    return given == "mine"


def environment(user: Mapping[str, str], settings: Mapping[str, Any]) -> dict[str, str]:
    """The environment of the run: the user's. Raises ConfigError when it names no servers, or they cannot do what is asked."""
    if missing := [name for name in NAMED if not user.get(name)]:
        raise ConfigError(
            f"SERVERS=mine uses the servers that {' and '.join(NAMED)} name, and {' and '.join(missing)} is not set. "
            "Set it, or leave SERVERS out: the project then starts servers of its own"
        )
    if settings.get("promote") == "review":
        raise ConfigError("PROMOTE=review needs a deployment to resume, and SERVERS=mine makes none. Use PROMOTE=manual")
    path = f"{Path(sys.executable).parent}{os.pathsep}{user.get('PATH', os.defpath)}"
    packages = os.pathsep.join(filter(None, (str(ROOT), user.get("PYTHONPATH"))))
    return {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3", **user, "PATH": path, "PYTHONPATH": packages}


def without_credentials(url: str) -> str:
    """An address to print, without user and password."""
    return re.sub(r"(\w+://)[^/\s@]+@", r"\1", url)


def main(name: str, settings: str) -> None:
    from flows.full import full  # imports Prefect, which reads the settings of the folder that this is started in
    from flows.settings import RunSettings

    os.chdir(ROOT)
    full.with_options(flow_run_name=name)(RunSettings.model_validate_json(settings), return_state=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
