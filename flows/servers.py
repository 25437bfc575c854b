"""Prefect and MLflow servers on this machine, on the loopback interface only, and a worker for the flows.

Their data stay in .textcraftor/. Their processes end with the process that started them, even if it is killed. They run in
Prefect's own folder there, because Prefect reads `.env`, `prefect.toml` and `pyproject.toml` of the folder that it is started
in: a database or an API key of somebody else's, named in the project, must not reach them.
"""

import base64
import contextlib
import fcntl
import http.client
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from urllib.parse import quote

from flows.environment import environment, prefect_folder, shell_lines, silence_analytics
from flows.ports import HOST, Ports, ServersError, choose_ports, claimed
from tasks import guard
from tasks.environment import grace_seconds, sqlite_url

START_TIMEOUT = 600.0  # seconds; 10 are usual, minutes on a machine busy with training
FERNET = 44  # characters of a key for Fernet, MLflow's cipher: 32 bytes in base64
SHELL_FILE = "env"  # in .textcraftor/, while the servers run


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
def running(root: Path, home: Path, ports: Ports, watched: bool = False) -> Iterator["Servers"]:
    """Start both servers and a worker for the deployments of prefect.yaml; stop them after the block.

    watched: with the receiver of MLflow's webhooks, which puts back the alias of the champion.
    Raises ServersError when one cannot be started.
    """
    with claimed(ports):
        yield from _running(root, home, ports, watched)


def _running(root: Path, home: Path, ports: Ports, watched: bool) -> Iterator["Servers"]:
    servers = Servers(root, home, ports, environment(root, home, ports))
    try:
        servers.start("prefect", ["prefect", "server", "start", "--host", HOST, "--port", str(ports.prefect)])
        # It keeps what is uploaded in TMPDIR first, and weights may be larger than that.
        uploads = home / "mlflow/uploads"
        uploads.mkdir(parents=True, exist_ok=True)
        options = mlflow_options(home / "mlflow", ports.mlflow)
        servers.start(
            "mlflow",
            ["mlflow", "server", *options],
            TMPDIR=str(uploads),
            MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY=webhook_key(home),
        )
        servers.wait_for("prefect", ports.prefect, "/api/health")
        servers.wait_for("mlflow", ports.mlflow, "/health")
        silence_analytics(prefect_folder(home) / "ui")
        # Before the worker starts, which would take up again what an earlier one left unfinished.
        servers.run("flows.deploy", str(root))
        worker_command = ["prefect", "worker", "start", "--pool", "textcraftor", "--type", "process", "--name", "local"]
        # The flow in it waits for stages that write a checkpoint, so the worker gets their time and a little more.
        servers.start("worker", worker_command, grace=grace_seconds(os.environ) + guard.GRACE)
        if watched:
            servers.start("webhook", ["tasks.webhook"])
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

    def start(self, name: str, module: list[str], grace: float = guard.GRACE, **variables: str) -> None:
        """Start `python -m MODULE...`, its output in .textcraftor/logs/NAME.log.

        grace: seconds it has to end.  variables: of its environment, in place of those of all servers.
        """
        log = self._log(name)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as output:
            self._processes[name] = guard.start(
                [sys.executable, "-m", *module],
                grace,
                cwd=self.folder,
                env={**self.env, **variables},
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
                # A server that cannot go on says so, and then that it ended well.
                cause = next(
                    (line for line in reversed(lines) if re.search("error", line, re.I)), lines[-1] if lines else "no output"
                )
                raise ServersError(f"{name} ended: {cause}. Its log: {self._log(name)}")

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


def mlflow_options(store: Path, port: int) -> list[str]:
    """Options of the MLflow server: its data lie in `store`, artifacts are served by the server alone."""
    (store / "artifacts").mkdir(parents=True, exist_ok=True)
    return [
        *("--host", HOST, "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", sqlite_url(store / "mlflow.db")),
        *("--artifacts-destination", (store / "artifacts").as_uri()),
    ]


def webhook_key(home: Path) -> str:
    """The key with which MLflow encrypts the secrets of its webhooks, made on first use and readable by its owner alone."""
    path = home / "keys/webhook.key"
    if not path.exists() or len(path.read_text()) != FERNET:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.touch(0o600)
        path.write_bytes(base64.urlsafe_b64encode(os.urandom(32)))
    return path.read_text()


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
