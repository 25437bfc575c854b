"""The ports of the two servers."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import gettempdir

from textcraftor.errors import UserError

HOST = "127.0.0.1"
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
            with _claim(port):
                return int(probe.getsockname()[1])
        except OSError as error:
            problem = error.strerror
    raise ServersError(f"{variable}={fixed} cannot be used ({problem}). Give another one, or none for a free one")


@contextlib.contextmanager
def claimed(ports: Ports) -> Iterator[None]:
    """Keep other projects of this user off these ports. A server binds its port as late as a minute after it was chosen.

    Raises ServersError when another project has just claimed one.
    """
    with contextlib.ExitStack() as claims:
        for port in (ports.prefect, ports.mlflow):
            try:
                claims.enter_context(_claim(port))
            except OSError:
                raise ServersError(f"Another project just took port {port}. Start again, and another one is chosen") from None
        yield


@contextlib.contextmanager
def _claim(port: int) -> Iterator[None]:
    """Hold a port's lock file; the kernel frees it when its holder dies. Raises OSError when another process holds it."""
    with Path(gettempdir(), f"textcraftor-{os.getuid()}-port-{port}.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OSError(error.errno, "another project is starting a server there") from None
        yield
