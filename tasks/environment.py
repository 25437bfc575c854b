"""The environment in which stages run, and how long they have to stop."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

from textcraftor.errors import UserError
from textcraftor.network import network_settings

GRACE_VARIABLE = "TEXTCRAFTOR_GRACE_SECONDS"
GRACE = 300.0  # seconds: a fully tuned SDXL UNet with its optimiser state is 40 GB, written at 200 MB/s
OUTSIDE = "TEXTCRAFTOR_OUTSIDE_"
QUIET = {"DVC_NO_ANALYTICS": "1", "DO_NOT_TRACK": "1", "PYTHONUNBUFFERED": "1", "NO_COLOR": "1"}


def sqlite_url(path: Path) -> str:
    """MLflow's URL of a database file. SQLAlchemy decodes the path, and would take what follows a `?` for options."""
    return f"sqlite:///{quote(str(path))}"


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


def on_loopback(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment for servers and clients that talk on loopback only: proxies and certificates are set aside.

    An HTTP client reads them when it is made, and refuses some whatever it is made for: a SOCKS proxy, IPv6 in NO_PROXY, a
    certificate file that is gone. `stage_environment` gives them back, because a stage may download weights.
    """
    outside = network_settings(environment)
    inside = {name: value for name, value in environment.items() if name not in outside}
    hosts = "127.0.0.1,localhost"  # for the proxy that the operating system itself may be set to
    return {**inside, **{OUTSIDE + name: value for name, value in outside.items()}, "NO_PROXY": hosts, "no_proxy": hosts}


def stage_environment(environment: Mapping[str, str], concurrency: int, gpu: str | None = None) -> dict[str, str]:
    """The stage's environment: this interpreter's commands first, its share of the cores, its GPU."""
    threads = max(1, (os.cpu_count() or 1) // concurrency)
    path = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', os.defpath)}"
    # No Prefect settings: the library knows no orchestrator.
    outside = {name.removeprefix(OUTSIDE): value for name, value in environment.items() if name.startswith(OUTSIDE)}
    inherited = {
        name: value
        for name, value in environment.items()
        if not name.startswith(("PREFECT_", OUTSIDE)) and not (outside and name in network_settings(environment))
    } | outside
    device = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
    return {"OMP_NUM_THREADS": str(threads), **inherited, **QUIET, **device, "PATH": path}
