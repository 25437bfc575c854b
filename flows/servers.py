"""Prefect and MLflow servers on this machine, on the loopback interface only, and a worker for the flows.

Their data stay in .textcraftor/. Their processes end with the process that started them, even if it is killed. They run in
Prefect's own folder there, because Prefect reads `.env`, `prefect.toml` and `pyproject.toml` of the folder that it is started
in: a database or an API key of somebody else's, named in the project, must not reach them.
"""

import contextlib
import fcntl
import http.client
import json
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import quote

from tasks import guard
from tasks.environment import OUTSIDE, grace_seconds, on_loopback
from textcraftor.errors import UserError

HOST = "127.0.0.1"
START_TIMEOUT = 600.0  # seconds; 10 are usual, minutes on a machine busy with training
SHELL_FILE = "env"  # in .textcraftor/, while the servers run
PREFERRED = {"prefect": 4200, "mlflow": 5000}  # their usual ports, so that links and shells of yesterday still fit


class ServersError(UserError):
    """A server cannot be started: a port is taken, another run holds the project, or the server died."""


@dataclass(frozen=True)
class Ports:
    """Ports of the two servers."""

    prefect: int
    mlflow: int

    @property
    def prefect_url(self) -> str:
        return f"http://{HOST}:{self.prefect}"

    @property
    def mlflow_url(self) -> str:
        return f"http://{HOST}:{self.mlflow}"


def choose_ports(environment: Mapping[str, str]) -> Ports:
    """The usual ports or, where one is taken, a free one; or those that PREFECT_PORT (or PORT) and MLFLOW_PORT fix.

    Raises ServersError when a fixed port is not a port number, is taken, or is given twice.
    """
    fixed = {
        "prefect": environment.get("PREFECT_PORT") or environment.get("PORT"),
        "mlflow": environment.get("MLFLOW_PORT"),
    }
    if fixed["prefect"] and fixed["prefect"] == fixed["mlflow"]:
        raise ServersError(f"Port {fixed['mlflow']} cannot be used for both servers. Give two, or none for free ones")
    with contextlib.ExitStack() as sockets:  # all open at once, so that the ports differ
        return Ports(
            **{
                name: _find_port(name, fixed_port, sockets)
                for name, fixed_port in sorted(fixed.items(), key=lambda f: not f[1])
            }
        )


@contextlib.contextmanager
def exclusive(home: Path) -> Iterator[None]:
    """Hold the project's lock. Raises ServersError when other servers of this project run."""
    home.mkdir(parents=True, exist_ok=True)
    with (home / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            ports = _running_ports(home)
            where = f"{ports.prefect_url} and {ports.mlflow_url}" if ports else "they are starting or stopping"
            raise ServersError(f"Servers of this project already run: {where}. Stop them first (Ctrl-C there)") from None
        yield


@contextlib.contextmanager
def reached(root: Path, home: Path, settings: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """The environment in which clients reach this project's servers: those that run, or new ones until the block ends.

    Raises ServersError when they are just starting or stopping, or cannot be started.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(exclusive(home))
        except ServersError:
            if (ports := _running_ports(home)) is None:
                raise
            yield environment(root, home, ports)
            return
        print("Starting Prefect and MLflow ...", flush=True)
        yield stack.enter_context(running(root, home, choose_ports(settings))).env


@contextlib.contextmanager
def running(root: Path, home: Path, ports: Ports) -> Iterator["Servers"]:
    """Start both servers and a worker for the deployments of prefect.yaml; stop them after the block."""
    servers = Servers(root, home, ports, environment(root, home, ports))
    try:
        servers.start("prefect", ["prefect", "server", "start", "--host", HOST, "--port", str(ports.prefect)])
        servers.start("mlflow", ["mlflow", "server", *mlflow_options(home / "mlflow", ports.mlflow)])
        servers.wait_for("prefect", ports.prefect, "/api/health")
        servers.wait_for("mlflow", ports.mlflow, "/health")
        # Before the worker starts, which would take up again what an earlier one left unfinished.
        servers.run("flows.deploy", str(root))
        worker_command = ["prefect", "worker", "start", "--pool", "textcraftor", "--type", "process", "--name", "local"]
        # The flow in it waits for stages that write a checkpoint, so the worker gets their time and a little more.
        servers.start("worker", worker_command, grace=grace_seconds(os.environ) + guard.GRACE)
        (home / "servers.json").write_text(json.dumps(asdict(ports)), encoding="utf-8")
        (home / SHELL_FILE).write_text(shell_lines(servers.env), encoding="utf-8")
        yield servers
    finally:
        for name in ("servers.json", SHELL_FILE):
            (home / name).unlink(missing_ok=True)
        servers.stop()


class Servers:
    """The server processes, and the environment in which clients reach them."""

    def __init__(self, root: Path, home: Path, ports: Ports, env: dict[str, str]) -> None:
        self.root, self.home, self.ports, self.env = root, home, ports, env
        self.folder = prefect_folder(home)
        self._processes: dict[str, subprocess.Popen[str]] = {}

    def start(self, name: str, module: list[str], grace: float = guard.GRACE) -> None:
        """Start `python -m MODULE...`, its output in .textcraftor/logs/NAME.log. grace: seconds it has to end."""
        log = self._log(name)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as output:
            self._processes[name] = guard.start(
                [sys.executable, "-m", *module],
                grace,
                cwd=self.folder,
                env=self.env,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def run(self, *module: str) -> None:
        """Run `python -m MODULE...` to its end. Raises ServersError with its last lines when it fails."""
        done = subprocess.run([sys.executable, "-m", *module], cwd=self.folder, env=self.env, capture_output=True, text=True)
        if done.returncode != 0:
            lines = (done.stdout + done.stderr).strip().splitlines()
            raise ServersError(f"`{' '.join(module)}` failed: {' '.join(lines[-3:])}")

    def wait_for(self, name: str, port: int, path: str) -> None:
        """Wait until the server answers. Raises ServersError when it ends, or does not answer within START_TIMEOUT."""
        deadline = time.monotonic() + START_TIMEOUT
        while time.monotonic() < deadline:
            self.require_alive()
            if _get(port, path) is not None:
                return
            time.sleep(0.3)
        raise ServersError(f"{name} did not answer within {START_TIMEOUT:.0f} s. Its log: {self._log(name)}")

    def require_alive(self) -> None:
        """Raises ServersError when one of the processes has ended."""
        for name, process in self._processes.items():
            if process.poll() is not None:
                lines = self._log(name).read_text(encoding="utf-8", errors="replace").strip().splitlines()
                raise ServersError(f"{name} ended: {lines[-1] if lines else 'no output'}. Its log: {self._log(name)}")

    def experiment_id(self, name: str) -> str | None:
        """ID of an MLflow experiment that is not deleted; None where there is none."""
        content = _get(self.ports.mlflow, f"/api/2.0/mlflow/experiments/get-by-name?experiment_name={quote(name)}")
        experiment = json.loads(content or "{}").get("experiment", {})
        return experiment.get("experiment_id") if experiment.get("lifecycle_stage") == "active" else None

    def stop(self) -> None:
        """End all processes, in the reverse order of their start."""
        for process in reversed(self._processes.values()):
            guard.end(process)
        self._processes.clear()

    def _log(self, name: str) -> Path:
        return self.home / "logs" / f"{name}.log"


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
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{folder / 'prefect.db'}",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
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
    names = sorted(name for name in env if name.startswith(("PREFECT_API_", "PREFECT_HOME", "PREFECT_PROFILE")))
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


def prefect_folder(home: Path) -> Path:
    """Prefect's own folder, in which its processes run; made if it is not there."""
    folder = home / "prefect"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def mlflow_options(store: Path, port: int) -> list[str]:
    """Options of the MLflow server: its data lie in `store`, artifacts are served by the server alone."""
    (store / "artifacts").mkdir(parents=True, exist_ok=True)
    return [
        *("--host", HOST, "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", f"sqlite:///{store / 'mlflow.db'}"),
        *("--artifacts-destination", (store / "artifacts").as_uri()),
    ]


def _find_port(name: str, fixed: str | None, sockets: contextlib.ExitStack) -> int:
    """A port that the probe, which stays open in `sockets`, could bind."""
    variable = f"{name.upper()}_PORT"
    if fixed and not (fixed.isdecimal() and 1 <= int(fixed) <= 65535):
        raise ServersError(f"{variable}={fixed} is not a port. Give a number from 1 to 65535, or none for a free one")
    for port in [int(fixed)] if fixed else [PREFERRED[name], 0]:
        probe = sockets.enter_context(socket.socket())
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
            return int(probe.getsockname()[1])
        except OSError as error:
            problem = error.strerror
    raise ServersError(f"{variable}={fixed} cannot be used ({problem}). Give another one, or none for a free one")


def _get(port: int, path: str) -> bytes | None:
    """The body that a server of ours answers with; None when it does not, or not with status 200."""
    connection = http.client.HTTPConnection(HOST, port, timeout=5)  # no proxy, whatever the environment says
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.read() if response.status == 200 else None
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def _running_ports(home: Path) -> Ports | None:
    """Ports of the servers that run; None while they start or stop."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        return Ports(**json.loads((home / "servers.json").read_text(encoding="utf-8")))
    return None
