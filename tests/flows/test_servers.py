"""Ports, the project's lock, and the settings that `make full` refuses before it starts anything."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from flows import local, ports
from flows.environment import environment, shell_lines, silence_analytics
from flows.ports import ServersError, choose_ports, claimed
from flows.servers import Servers, exclusive
from textcraftor.errors import PromptError

ROOT = Path(__file__).parents[2]


def test_free_ports_differ() -> None:
    ports = choose_ports({})
    assert ports.prefect != ports.mlflow


def test_the_usual_ports_are_used_where_they_are_free(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = choose_ports({})
    monkeypatch.setattr(ports, "PREFERRED", {"prefect": usual.prefect, "mlflow": usual.mlflow})
    assert choose_ports({}) == usual
    with socket.socket() as taken:
        # Connections to an earlier server on this port may still be closing.
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", usual.mlflow))
        taken.listen()
        assert choose_ports({}).prefect == usual.prefect
        assert choose_ports({}).mlflow != usual.mlflow


def test_two_projects_that_start_together_share_no_port(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither binds its ports before its servers are up; one of them would have worked on the other's."""
    usual = choose_ports({})
    monkeypatch.setattr(ports, "PREFERRED", {"prefect": usual.prefect, "mlflow": usual.mlflow})
    with claimed(usual):
        other = choose_ports({})
        assert not {other.prefect, other.mlflow} & {usual.prefect, usual.mlflow}
        with pytest.raises(ServersError, match=f"MLFLOW_PORT={usual.mlflow} cannot be used \\(another project"):
            choose_ports({"MLFLOW_PORT": str(usual.mlflow)})
        with pytest.raises(ServersError, match="Start again"), claimed(usual):
            pass
    assert choose_ports({}) == usual


def test_a_server_that_ended_is_reported_with_its_error(tmp_path: Path) -> None:
    servers = Servers(ROOT, tmp_path, choose_ports({}), dict(os.environ))
    servers.start("one", ["http.server", "-h"])
    servers._processes["one"].wait()
    (tmp_path / "logs/one.log").write_text("ERROR: address already in use\nINFO: Application shutdown complete.\n")
    with pytest.raises(ServersError, match="one ended: ERROR: address already in use"):
        servers.require_alive()


def test_fixed_ports_are_kept() -> None:
    free = choose_ports({})
    assert choose_ports({"PREFECT_PORT": str(free.prefect), "MLFLOW_PORT": str(free.mlflow)}) == free
    assert choose_ports({"PORT": str(free.prefect)}).prefect == free.prefect


@pytest.mark.parametrize("port", ["0", "70000", "abc", "-1"])
def test_invalid_ports_are_refused(port: str) -> None:
    with pytest.raises(ServersError, match=f"MLFLOW_PORT={port} is not a port"):
        choose_ports({"MLFLOW_PORT": port})


def test_a_taken_port_is_refused() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ServersError, match=f"PREFECT_PORT={port} cannot be used"):
            choose_ports({"PREFECT_PORT": str(port)})


def test_one_port_for_both_is_refused() -> None:
    port = str(choose_ports({}).prefect)
    with pytest.raises(ServersError, match="cannot be used"):
        choose_ports({"PREFECT_PORT": port, "MLFLOW_PORT": port})


def test_servers_of_a_project_run_once(tmp_path: Path) -> None:
    with exclusive(tmp_path), pytest.raises(ServersError, match="already run"), exclusive(tmp_path):
        pass
    with exclusive(tmp_path):
        pass


def test_settings_of_other_servers_are_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PREFECT_API_KEY", "secret")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "secret")
    monkeypatch.setenv("NO_PROXY", "intranet")
    monkeypatch.setenv("PREFECT_TASK_RUNNER_THREAD_POOL_MAX_WORKERS", "1")
    made = environment(ROOT, tmp_path, choose_ports({}))
    assert made["PREFECT_API_KEY"] == "" and "MLFLOW_TRACKING_TOKEN" not in made
    assert made["PREFECT_SERVER_DATABASE_CONNECTION_URL"] == "sqlite+aiosqlite:///prefect.db", "in the folder where it runs"
    assert made["NO_PROXY"] == made["no_proxy"] == "127.0.0.1,localhost"
    assert made["PREFECT_TASK_RUNNER_THREAD_POOL_MAX_WORKERS"] == "1"
    assert made["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"


def test_no_client_reports_usage_or_prints_a_notice_about_it(tmp_path: Path) -> None:
    made = environment(ROOT, tmp_path, choose_ports({}))
    assert made["DO_NOT_TRACK"] == "1" and "export DO_NOT_TRACK=1" in shell_lines(made).splitlines()


def test_the_ui_calls_no_analytics_service(tmp_path: Path) -> None:
    script = tmp_path / "v2/assets/index.js"
    script.parent.mkdir(parents=True)
    script.write_text('a="https://sr-client-cfg.amplitude.com/config",b="https://amplitude.com/x",c="https://docs.prefect.io"')
    for _ in range(2):
        silence_analytics(tmp_path)
        assert script.read_text() == 'a="http://127.0.0.1:9/config",b="http://127.0.0.1:9/x",c="https://docs.prefect.io"'


def test_settings_come_from_the_command_line(tmp_path: Path) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text("a red circle\n")
    given = {"PROMPTS": str(mine), "PROMOTE": "manual", "PROFILE": "", "HOME": "/x"}
    assert local.settings_from(given) == {"prompts": str(mine), "promote": "manual"}
    with pytest.raises(PromptError, match=r"PROMPTS=none\.txt is not a file"):
        local.settings_from({"PROMPTS": "none.txt"})


@pytest.mark.parametrize(
    ("verb", "variables", "message"),
    [
        ("full", {"PROMPTS": "none.txt"}, "PROMPTS=none.txt is not a file"),
        ("full", {"SERVERS": "theirs"}, "SERVERS=theirs is unknown"),
        ("full", {"SERVERS": "mine", "PREFECT_API_URL": "", "MLFLOW_TRACKING_URI": ""}, "and MLFLOW_TRACKING_URI is not set"),
        ("promote", {"VERSION": "x"}, "VERSION=x is not the number of a version"),
        ("promote", {"VERSION": ""}, "VERSION is missing"),
    ],
)
def test_what_is_impossible_is_said_in_one_line_and_starts_nothing(verb: str, variables: dict[str, str], message: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "flows.local", verb],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
