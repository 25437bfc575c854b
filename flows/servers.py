"""Prefect and MLflow on this machine, loopback only, for as long as they are needed.

Their data lie in .textcraftor/ and stay. The processes go with whoever started them, however it ends.
"""

import contextlib
import fcntl
import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tasks import guard
from textcraftor.errors import UserError

HOST = "127.0.0.1"
START_TIMEOUT = 600.0  # seconds; 10 are usual, minutes on a machine busy with training
POOL = "textcraftor"


class ServersError(UserError):
    """A server cannot be started: a port is taken, another run holds the project, or the server died."""


@dataclass(frozen=True)
class Ports:
    """Where the two UIs are served."""

    prefect: int
    mlflow: int

    @property
    def prefect_url(self) -> str:
        return f"http://{HOST}:{self.prefect}"

    @property
    def mlflow_url(self) -> str:
        return f"http://{HOST}:{self.mlflow}"


def choose_ports(environment: Mapping[str, str]) -> Ports:
    """Free ports, or the ones that PREFECT_PORT (or PORT) and MLFLOW_PORT fix.

    Raises ServersError when a fixed one is no port, is taken, or is given twice.
    """
    fixed = {
        "prefect": environment.get("PREFECT_PORT") or environment.get("PORT"),
        "mlflow": environment.get("MLFLOW_PORT"),
    }
    if fixed["prefect"] and fixed["prefect"] == fixed["mlflow"]:
        raise ServersError(f"Port {fixed['mlflow']} cannot be used for both servers. Give two, or none for free ones")
    with contextlib.ExitStack() as held:  # all at once, so that they differ
        return Ports(**{name: _claim(name, wanted, held) for name, wanted in sorted(fixed.items(), key=lambda f: not f[1])})


@contextlib.contextmanager
def alone(home: Path) -> Iterator[None]:
    """Hold the project for one set of servers. Raises ServersError when another one runs."""
    home.mkdir(parents=True, exist_ok=True)
    with (home / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ServersError(
                f"Servers of this project already run: {_addresses(home)}. Stop them first (Ctrl-C there)"
            ) from None
        yield


@contextlib.contextmanager
def running(root: Path, home: Path, ports: Ports, worker: bool) -> Iterator["Servers"]:
    """Start both servers (and a worker with the deployments of prefect.yaml), yield, and end all of it."""
    servers = Servers(root, home, ports, environment(home, ports))
    try:
        servers.start("prefect", ["prefect", "server", "start", "--host", HOST, "--port", str(ports.prefect)])
        servers.start("mlflow", ["mlflow", "server", *mlflow_options(home / "mlflow", ports.mlflow)])
        servers.wait_for("prefect", ports.prefect, "/api/health")
        servers.wait_for("mlflow", ports.mlflow, "/health")
        (home / "servers.json").write_text(json.dumps([ports.prefect_url, ports.mlflow_url]), encoding="utf-8")
        if worker:
            servers.run("prefect", "work-pool", "create", POOL, "--type", "process", "--overwrite")
            servers.run("prefect", "--no-prompt", "deploy", "--all")
            servers.start("worker", ["prefect", "worker", "start", "--pool", POOL, "--type", "process", "--name", "local"])
        yield servers
    finally:
        (home / "servers.json").unlink(missing_ok=True)
        servers.stop()


class Servers:
    """The processes, and the environment in which clients reach them."""

    def __init__(self, root: Path, home: Path, ports: Ports, env: dict[str, str]) -> None:
        self.root, self.home, self.ports, self.env = root, home, ports, env
        self._processes: dict[str, subprocess.Popen[str]] = {}

    def start(self, name: str, module: list[str]) -> None:
        """Start `python -m MODULE...`, its output in .textcraftor/logs/NAME.log."""
        log = self._log(name)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as output:
            self._processes[name] = guard.start(
                [sys.executable, "-m", *module], cwd=self.root, env=self.env, stdout=output, stderr=subprocess.STDOUT
            )

    def run(self, *module: str) -> None:
        """Run `python -m MODULE...` to its end. Raises ServersError with what it said last when it fails."""
        done = subprocess.run([sys.executable, "-m", *module], cwd=self.root, env=self.env, capture_output=True, text=True)
        if done.returncode != 0:
            said = (done.stdout + done.stderr).strip().splitlines()
            raise ServersError(f"`{' '.join(module)}` failed: {' '.join(said[-3:])}")

    def wait_for(self, name: str, port: int, path: str) -> None:
        """Return when the server answers. Raises ServersError when it ends or does not within START_TIMEOUT."""
        deadline = time.monotonic() + START_TIMEOUT
        while time.monotonic() < deadline:
            self.require_alive()
            if _answers(port, path):
                return
            time.sleep(0.3)
        raise ServersError(f"{name} did not answer within {START_TIMEOUT:.0f} s. Its log: {self._log(name)}")

    def require_alive(self) -> None:
        """Raises ServersError when one of the processes has ended."""
        for name, process in self._processes.items():
            if process.poll() is not None:
                said = self._log(name).read_text(encoding="utf-8", errors="replace").strip().splitlines()
                raise ServersError(f"{name} ended: {said[-1] if said else 'it said nothing'}. Its log: {self._log(name)}")

    def stop(self) -> None:
        """End all processes, the last started first."""
        for process in reversed(self._processes.values()):
            guard.end(process)
        self._processes.clear()

    def _log(self, name: str) -> Path:
        return self.home / "logs" / f"{name}.log"


def environment(home: Path, ports: Ports) -> dict[str, str]:
    """What servers and clients run in: this machine's servers, whatever Prefect or MLflow the user else works with."""
    kept = ("PREFECT_TASK_RUNNER_", "PREFECT_LOGGING_")
    mine = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PREFECT_", "MLFLOW_")) or name.startswith(kept)
    }
    template = Path(__file__).resolve().parents[1] / "mlflow/server.env"
    lines = [line.split("=", 1) for line in template.read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
    direct = ",".join(filter(None, (HOST, "localhost", mine.get("NO_PROXY") or mine.get("no_proxy"))))
    return {
        **mine,
        **dict(lines),
        "NO_PROXY": direct,
        "no_proxy": direct,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{mine.get('PATH', os.defpath)}",
        "PREFECT_HOME": str(home / "prefect"),
        "PREFECT_API_URL": f"{ports.prefect_url}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        # SQLite has one writer: on a machine busy with training it may keep others waiting.
        "PREFECT_SERVER_DATABASE_TIMEOUT": "60",
        "PREFECT_SERVER_DATABASE_CONNECTION_TIMEOUT": "60",
        "PREFECT_WORKER_QUERY_SECONDS": "2",
        # Both, so that `--watch` shows what the stages say.
        "PREFECT_SERVER_LOGS_STREAM_OUT_ENABLED": "true",
        "PREFECT_SERVER_LOGS_STREAM_PUBLISHING_ENABLED": "true",
        "MLFLOW_TRACKING_URI": ports.mlflow_url,
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    }


def mlflow_options(store: Path, port: int) -> list[str]:
    """The command line of the MLflow server: its data in `store`, artifacts only through itself."""
    (store / "artifacts").mkdir(parents=True, exist_ok=True)
    return [
        *("--host", HOST, "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", f"sqlite:///{store / 'mlflow.db'}"),
        *("--artifacts-destination", (store / "artifacts").as_uri()),
    ]


def _claim(name: str, wanted: str | None, held: contextlib.ExitStack) -> int:
    variable = f"{name.upper()}_PORT"
    if wanted and not (wanted.isdecimal() and 1 <= int(wanted) <= 65535):
        raise ServersError(f"{variable}={wanted} is not a port. Give a number from 1 to 65535, or none for a free one")
    claim = held.enter_context(socket.socket())
    claim.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        claim.bind((HOST, int(wanted or 0)))
    except OSError as error:
        raise ServersError(
            f"{variable}={wanted} cannot be used ({error.strerror}). Give another one, or none for a free one"
        ) from None
    return int(claim.getsockname()[1])


def _answers(port: int, path: str) -> bool:
    connection = http.client.HTTPConnection(HOST, port, timeout=5)  # no proxy, whatever the environment says
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _addresses(home: Path) -> str:
    with contextlib.suppress(OSError, ValueError):
        return " and ".join(json.loads((home / "servers.json").read_text(encoding="utf-8")))
    return "they are starting or stopping"
