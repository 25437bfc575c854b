"""MLflow's basic-auth as mlflow/basic-auth.ini sets it up, on a real server: what reviewers, promoters and strangers may do.

    python -m tests.tasks.live_auth

Needs `pip install "mlflow[auth]"`, which the project's environment does not have. Prints a line for each thing tried; exits
with 1 if one of them went wrong. Run it by hand after changing MLflow's version.
"""

import contextlib
import importlib.util
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import requests

ROOT = Path(__file__).parents[2]
MODEL = "textcraftor-tiny"


@contextlib.contextmanager
def server(folder: Path, environment: dict[str, str]) -> Iterator[str]:
    """A server that answers; its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    where = [
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--workers",
        "1",
        "--backend-store-uri",
        f"sqlite:///{folder}/mlflow.db",
    ]
    command = [sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth", *where]
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        address, until = f"http://127.0.0.1:{port}", time.monotonic() + 300
        while time.monotonic() < until and process.poll() is None:
            with contextlib.suppress(requests.ConnectionError):
                requests.get(f"{address}/health", timeout=10)
                break
            time.sleep(0.5)
        yield address
    finally:
        os.killpg(process.pid, 15)
        process.wait()


def main() -> int:
    if importlib.util.find_spec("flask_wtf") is None:
        print('not tried: flask-wtf is not installed. `pip install "mlflow[auth]"` into this environment, and run it again')
        return 1
    passwords = {name: secrets.token_urlsafe(16) for name in ("admin", "ada", "bob")}
    settings = {
        "MLFLOW_AUTH_CONFIG_PATH": str(ROOT / "mlflow/basic-auth.ini"),
        "MLFLOW_AUTH_ADMIN_PASSWORD": passwords["admin"],
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_urlsafe(32),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    wrong = 0
    with tempfile.TemporaryDirectory() as home, server(Path(home), {**os.environ, **settings}) as address:

        def ask(person: str, method: str, path: str, **body: Any) -> int:
            account = (person, passwords[person]) if person else None
            return requests.request(method, f"{address}/api/{path}", json=body, auth=account, timeout=120).status_code

        def tell(what: str, got: int, *expected: int) -> None:
            nonlocal wrong
            wrong += got not in expected
            print(f"{'ok   ' if got in expected else 'WRONG'}  {what}: {got}", flush=True)

        alias = {"name": MODEL, "alias": "champion", "version": "1"}
        for person in ("ada", "bob"):
            account = {"username": person, "password": passwords[person]}
            tell(
                f"the administrator makes an account for {person}",
                ask("admin", "POST", "2.0/mlflow/users/create", **account),
                200,
            )
        for model in (MODEL, f"{MODEL}-promotions"):
            tell(f"{model} is made", ask("admin", "POST", "2.0/mlflow/registered-models/create", name=model), 200)
            grant = {"username": "ada", "resource_type": "registered_model", "resource_id": model, "permission": "MANAGE"}
            tell(f"ada may manage {model}", ask("admin", "POST", "3.0/mlflow/users/permissions/grant", **grant), 200)
        source = {"name": MODEL, "source": "s3://bucket/candidate"}
        tell("a version", ask("ada", "POST", "2.0/mlflow/model-versions/create", **source), 200)
        tell("bob, a reviewer, reads it", ask("bob", "GET", f"2.0/mlflow/model-versions/get?name={MODEL}&version=1"), 200)
        tell("bob moves no alias", ask("bob", "POST", "2.0/mlflow/registered-models/alias", **alias), 403)
        tell(
            "bob sets no tag",
            ask("bob", "POST", "2.0/mlflow/model-versions/set-tag", name=MODEL, version="1", key="a", value="b"),
            403,
        )
        tell("bob adds no version", ask("bob", "POST", "2.0/mlflow/model-versions/create", **source), 403)
        entry = {"name": f"{MODEL}-promotions", "source": "s3://bucket/entry"}
        tell(
            "bob adds no entry to the record of promotions",
            ask("bob", "POST", "2.0/mlflow/model-versions/create", **entry),
            403,
        )
        hook = {"name": "x", "url": "https://example.com/", "events": [{"entity": "MODEL_VERSION", "action": "CREATED"}]}
        tell("bob makes no webhook", ask("bob", "POST", "2.0/mlflow/webhooks", **hook), 403)
        tell("ada, a promoter, moves the alias", ask("ada", "POST", "2.0/mlflow/registered-models/alias", **alias), 200)
        tell("ada adds an entry to the record", ask("ada", "POST", "2.0/mlflow/model-versions/create", **entry), 200)
        tell("without an account nobody reads", ask("", "GET", f"2.0/mlflow/registered-models/get?name={MODEL}"), 401)
        log = (Path(home) / "server.log").read_text()
        tell("no password is in the server's log", sum(each in log for each in passwords.values()), 0)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
