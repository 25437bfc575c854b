"""What the walk through the README has opened: the checkout in which `make full` was typed, and the servers of `make ui`."""

import contextlib
import http.client
import json
import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.flows.visitor import Shell


@dataclass(frozen=True)
class Visit:
    """A checkout in which `make full PROMOTE=manual` was typed, and what it said; beside it lie somebody else's settings."""

    shell: Shell
    said: str
    theirs: Path  # the database that those settings name
    callers: list[object]  # of the server that they name

    @property
    def folder(self) -> Path:
        return self.shell.folder


@dataclass(frozen=True)
class Served:
    """`make ui`: the addresses that it printed."""

    prefect: str
    runs: str
    model: str
    ui: "subprocess.Popen[str]"
    group: int  # of its processes

    def ask(self, path: str, method: str = "POST", **body: object) -> Any:
        """What Prefect's API answers; to a search without conditions, newest first."""
        return self._call(self.prefect, f"/api{path}", method, body)

    def mlflow(self, path: str, method: str = "POST", **body: object) -> Any:
        """What MLflow's API answers."""
        return self._call(self.model.split("/#")[0], f"/api/2.0/mlflow{path}", method, body)

    def _call(self, server: str, path: str, method: str, body: object) -> Any:
        connection = http.client.HTTPConnection(server.removeprefix("http://"), timeout=60)
        connection.request(method, path, json.dumps(body), {"Content-Type": "application/json"})
        with contextlib.closing(connection):
            return json.loads(connection.getresponse().read() or "null")

    def champion(self) -> str | None:
        """The version with the alias `champion`."""
        model = self.mlflow("/registered-models/get?name=textcraftor-tiny", "GET")["registered_model"]
        return next((each["version"] for each in model.get("aliases", ()) if each["alias"] == "champion"), None)


def stop(ui: "subprocess.Popen[str]", group: int) -> None:
    """Press Ctrl-C in the shell of `make ui`, unless that was done already, and wait for its end."""
    if ui.poll() is not None:
        return
    os.killpg(group, signal.SIGINT)
    left = ui.stdout.read() if ui.stdout else ""
    # The recipe ends with 0, or make would print an error; GNU make then ends itself by the signal that it got, too: 130.
    assert ui.wait() in (0, 130) and left == "", "to be stopped is how make ui is meant to end"


def move_alias(served: Served, version: str) -> None:
    served.mlflow("/registered-models/alias", name="textcraftor-tiny", alias="champion", version=version)


def corrections(visit: Visit) -> int:
    """How often the receiver of webhooks put the alias back."""
    return (visit.folder / ".textcraftor/logs/webhook.log").read_text().count(": put back")


def wait_for_correction(visit: Visit, served: Served, before: int) -> None:
    until = time.monotonic() + 300
    while corrections(visit) == before:
        assert time.monotonic() < until, "the receiver corrects nothing"
        time.sleep(0.3)
    assert served.champion() == "1"
