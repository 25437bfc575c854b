"""The environment in which this project's servers and their clients run, and in which another shell reaches them."""

import os
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import gettempdir

from flows.ports import HOST, Ports
from tasks.environment import OUTSIDE, on_loopback
from textcraftor.errors import ConfigError

UNUSABLE = {  # in the project's path: what no program gets across
    os.pathsep: "separates the entries of PATH",
    "{{": "begins a placeholder in Prefect's templates",
    "\n": "ends a line",
}
ANALYTICS = re.compile(r"https://[\w.-]*\bamplitude\.com")


def environment(root: Path, home: Path, ports: Ports) -> dict[str, str]:
    """The environment of servers and clients, without the settings of any other Prefect or MLflow that the user has."""
    kept = ("PREFECT_TASK_RUNNER_", "PREFECT_LOGGING_")
    inherited = {
        name: value
        for name, value in on_loopback(os.environ).items()
        if not name.startswith(("PREFECT_", "MLFLOW_")) or name.startswith(kept)
    }
    template = Path(__file__).resolve().parents[1] / "mlflow/server.env"
    lines = [line.split("=", 1) for line in template.read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
    folder = prefect_folder(home)
    return {
        **inherited,
        **dict(lines),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{inherited.get('PATH', os.defpath)}",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(root), inherited.get("PYTHONPATH")))),
        "PREFECT_HOME": str(folder),
        "PREFECT_PROFILE": "ephemeral",  # Prefect's name of the profile without settings
        "PREFECT_API_URL": f"{ports.prefect_url}/api",
        # Said although these are the defaults, because a file of settings would give way to nothing less.
        "PREFECT_API_KEY": "",
        "PREFECT_API_AUTH_STRING": "",
        # Relative to that folder, in which the server runs: no sign in the project's path is taken for one of a URL.
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": "sqlite+aiosqlite:///prefect.db",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_UI_STATIC_DIRECTORY": str(folder / "ui"),  # see silence_analytics
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        # SQLite has one writer: on a machine busy with training others may wait for it.
        "PREFECT_SERVER_DATABASE_TIMEOUT": "60",
        "PREFECT_SERVER_DATABASE_CONNECTION_TIMEOUT": "60",
        "PREFECT_WORKER_QUERY_SECONDS": "2",
        # Both are needed for `--watch` to show the output of the stages.
        "PREFECT_SERVER_LOGS_STREAM_OUT_ENABLED": "true",
        "PREFECT_SERVER_LOGS_STREAM_PUBLISHING_ENABLED": "true",
        "MLFLOW_TRACKING_URI": ports.mlflow_url,
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    }


def shell_lines(env: Mapping[str, str]) -> str:
    """Lines for another shell to `source`, so that its `prefect` talks to these servers."""
    names = sorted(name for name in env if name.startswith(("PREFECT_API_", "PREFECT_HOME", "PREFECT_PROFILE", "DO_NOT_TRACK")))
    exports = [f"export {name}={shlex.quote(env[name])}" for name in names]
    hosts = f'export NO_PROXY={env["NO_PROXY"]}"${{NO_PROXY:+,$NO_PROXY}}"'
    outside = {name.removeprefix(OUTSIDE) for name in env if name.startswith(OUTSIDE)}
    unusable = [] if _client_can_be_made() else [f"unset {' '.join(sorted(outside))}"]
    path = f'export PATH={shlex.quote(str(Path(sys.executable).parent))}:"$PATH"'
    return "\n".join([*unusable, *exports, hosts, path, ""])


def _client_can_be_made() -> bool:
    """Whether Prefect's HTTP client takes the proxies and certificates that the user's shell names."""
    import httpx

    try:
        httpx.Client().close()
    except (ImportError, ValueError, OSError, httpx.InvalidURL):
        return False
    return True


def silence_analytics(ui: Path) -> None:
    """Let Prefect's UI, which the server has copied to `ui`, call nobody.

    Its pages ask an analytics service for their configuration even where PREFECT_SERVER_ANALYTICS_ENABLED is false.
    """
    for path in ui.rglob("*.js"):
        script = path.read_text(encoding="utf-8")
        silenced = ANALYTICS.sub(f"http://{HOST}:9", script)  # port 9 discards what it is sent, if anything listens at all
        if silenced != script:
            path.write_text(silenced, encoding="utf-8")


def require_usable_folder(root: Path, home: Path) -> None:
    """Raises ConfigError when nothing can run in the project's folder: because of its name, or because it is read-only."""
    for sign, meaning in UNUSABLE.items():
        if sign in str(root):
            raise ConfigError(
                f"The project's path {str(root)!r} holds {sign!r}, which {meaning}. Rename the folder, or move it"
            )
    if not os.fsencode(root).isascii() and not str(root).isprintable():
        raise ConfigError(f"The project's path {str(root)!a} is not UTF-8. Rename the folder, or move it")
    try:
        prefect_folder(home)
        (home / "lock").open("a").close()
    except OSError as error:
        raise ConfigError(
            f"{error.filename} cannot be written ({error.strerror}). Runs keep their history and their servers' data there. "
            "Make it writable, or run a copy of the project"
        ) from None
    try:
        gettempdir()
    except OSError:
        raise ConfigError("No folder for temporary files can be written. Set TMPDIR to one that can") from None


def prefect_folder(home: Path) -> Path:
    """Prefect's own folder, in which its processes run; made if it is not there."""
    folder = home / "prefect"
    (folder / "ui").mkdir(parents=True, exist_ok=True)
    return folder
