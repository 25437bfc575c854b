"""A real registry served in the three ways there are, each in a process of its own, and unproven versions offered to each.

    python -m tests.serving.live [--way serve|pyfunc|mlflow]

It makes a checkout with two proven versions of which the first is champion, and a third version with the same tags and own
weights, added by MLflow's API. Prints a line for each thing tried; exits with 1 if one of them went wrong. Takes a minute or
two: run it by hand after changing textcraftor/serving, tasks/versions.py or MLflow's version.
"""

import argparse
import base64
import contextlib
import http.client
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from PIL import Image

from tests.serving.checkout import MODEL, environment, make_checkout
from textcraftor.layout import STATE

REQUEST = {"prompt": "a red circle", "seed": 3, "steps": 2}
PYFUNC = """
import sys
import mlflow
model = mlflow.pyfunc.load_model(sys.argv[1])
print("PNG", model.predict({"prompt": ["a red circle"]}, params={"seed": 3, "steps": 2})[0])
"""
STARTS = 300  # seconds until a server must answer


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ask(port: int, method: str, path: str, body: Any = None) -> bytes:
    """The body of the answer. Raises OSError where there is none."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    with contextlib.closing(connection):
        connection.request(method, path, json.dumps(body), {"Content-Type": "application/json"})
        return connection.getresponse().read()


@contextlib.contextmanager
def running(checkout: Path, command: list[str], port: int) -> Iterator[None]:
    """A server that answers, or has ended. What it prints goes to server.log."""
    with (checkout / "server.log").open("w") as out:
        kept = environment(checkout)
        server = subprocess.Popen(command, cwd=checkout, env=kept, stdout=out, stderr=out, start_new_session=True)
    try:
        deadline = time.monotonic() + STARTS
        while server.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                ask(port, "GET", "/ping")
                break
            time.sleep(0.3)
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)  # MLflow's server is a child
        server.wait()


def command_line(port: int, model: str) -> list[str]:
    return [sys.executable, "-m", "textcraftor.cli", "serve", "--port", str(port), "--device", "cpu", "--model", model]


def mlflow_serve(port: int, model: str) -> list[str]:
    where = ["--env-manager", "local", "-h", "127.0.0.1", "-p", str(port)]
    return [sys.executable, "-m", "mlflow", "models", "serve", "-m", f"models:/{MODEL}{model}", *where]


def by_command_line(checkout: Path, model: str) -> tuple[bytes, str]:
    """(PNG, output): the PNG is empty where the model was refused."""
    port = free_port()
    with running(checkout, command_line(port, model), port):
        try:
            return ask(port, "POST", "/invocations", REQUEST), ""
        except OSError:
            return b"", (checkout / "server.log").read_text()


def by_mlflow_serve(checkout: Path, model: str) -> tuple[bytes, str]:
    port, settings = free_port(), {name: REQUEST[name] for name in ("seed", "steps")}
    body = {"dataframe_records": [{"prompt": REQUEST["prompt"]}], "params": settings}
    with running(checkout, mlflow_serve(port, model), port):
        try:
            answer = json.loads(ask(port, "POST", "/invocations", body))
            return base64.b64decode(answer["predictions"][0]), ""
        except OSError:
            return b"", (checkout / "server.log").read_text()


def by_pyfunc(checkout: Path, model: str) -> tuple[bytes, str]:
    command = [sys.executable, "-c", PYFUNC, f"models:/{MODEL}{model}"]
    done = subprocess.run(command, cwd=checkout, env=environment(checkout), capture_output=True, text=True)
    drawn = [line.removeprefix("PNG ") for line in done.stdout.splitlines() if line.startswith("PNG ")]
    return base64.b64decode(drawn[0]) if drawn else b"", done.stderr


def add_unproven(checkout: Path) -> None:
    """Version 3: own weights in a copy of version 1, registered with its tags, as anybody can who reaches the API."""
    client = MlflowClient(environment(checkout)["MLFLOW_TRACKING_URI"])
    first = client.get_model_version(MODEL, "1")
    run = client.create_run(client.get_run(first.run_id).info.experiment_id)
    copy = Path(client.download_artifacts(first.run_id, "candidate", str(checkout / "data")))
    weights = copy / "text_encoder/model.safetensors"
    shutil.copyfile(checkout / "base/text_encoder/model.safetensors", weights)
    client.log_artifacts(run.info.run_id, str(copy), "candidate")
    source = f"{run.info.artifact_uri}/candidate"
    assert client.create_model_version(MODEL, source, run.info.run_id, tags=first.tags).version in (3, "3")


WAYS: dict[str, tuple[str, Callable[[Path, str], tuple[bytes, str]], str, str]] = {
    "serve": ("textcraftor serve", by_command_line, "champion", "3"),
    "pyfunc": ("mlflow.pyfunc.load_model", by_pyfunc, "@champion", "/3"),
    "mlflow": ("mlflow models serve", by_mlflow_serve, "@champion", "/3"),
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--way", choices=WAYS, nargs="*", default=[*WAYS])
    given, failed = parser.parse_args(arguments), 0
    with tempfile.TemporaryDirectory() as folder:
        checkout = make_checkout(Path(folder) / "checkout", versions=2)
        add_unproven(checkout)
        client, pictures = MlflowClient(environment(checkout)["MLFLOW_TRACKING_URI"]), []

        def tell(what: str, right: bool, detail: str = "") -> None:
            nonlocal failed
            failed += not right
            print(f"{'ok   ' if right else 'WRONG'}  {what}{': ' + detail if detail else ''}", flush=True)

        def reason(output: str) -> str:
            said = [line for line in output.splitlines() if "Unproven" in line or line.startswith("textcraftor:")]
            return said[-1].strip()[:170] if said else " ".join(output.split())[-170:]

        for name, draw, champion, unproven in (WAYS[way] for way in given.way):
            png, output = draw(checkout, champion)
            pictures.append(png)
            size = Image.open(io.BytesIO(png)).size if png else None
            tell(f"{name} draws the champion", size == (32, 32), f"{len(png)} bytes" if png else reason(output))
            png, output = draw(checkout, unproven)
            tell(f"{name} refuses unproven version 3", not png and "signed" in output, reason(output))
        tell("each of these draws the same picture", len(set(pictures)) == 1 and bool(pictures[0]))
        client.set_registered_model_alias(MODEL, "champion", "3")
        shutil.rmtree(checkout / STATE / "models")  # MLflow has written a file of its own into the version that it loaded
        png, _ = by_command_line(checkout, "champion")
        tell("the alias moved to version 3: textcraftor serve draws the champion all the same", png == pictures[0])
        client.set_registered_model_alias(MODEL, "champion", "2")
        png, output = by_pyfunc(checkout, "@champion")
        tell(
            "the alias moved to proven version 2: MLflow does not serve it",
            not png and "not its champion" in output,
            reason(output),
        )
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
