"""The environment in which stages run, and how long they have to stop."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from textcraftor.errors import UserError

GRACE_VARIABLE = "TEXTCRAFTOR_GRACE_SECONDS"
GRACE = 300.0  # seconds: a fully tuned SDXL UNet with its optimiser state is 40 GB, written at 200 MB/s
QUIET = {"DVC_NO_ANALYTICS": "1", "DO_NOT_TRACK": "1", "PYTHONUNBUFFERED": "1", "NO_COLOR": "1"}


def grace_seconds(environment: Mapping[str, str]) -> float:
    """Seconds that a stage has to write its checkpoint after SIGTERM. Raises UserError for what is no such number."""
    given = environment.get(GRACE_VARIABLE) or str(GRACE)
    try:
        seconds = float(given)
        if not 0 <= seconds < float("inf"):
            raise ValueError
    except ValueError:
        raise UserError(f"{GRACE_VARIABLE}={given} is not a number of seconds. {GRACE:.0f} is the default") from None
    return seconds


def stage_environment(environment: Mapping[str, str], concurrency: int, gpu: str | None = None) -> dict[str, str]:
    """The stage's environment: this interpreter's commands first, its share of the cores, its GPU."""
    threads = max(1, (os.cpu_count() or 1) // concurrency)
    path = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', os.defpath)}"
    # No Prefect settings: the library knows no orchestrator.
    inherited = {name: value for name, value in environment.items() if not name.startswith("PREFECT_")}
    device = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
    return {"OMP_NUM_THREADS": str(threads), **inherited, **QUIET, **device, "PATH": path}
