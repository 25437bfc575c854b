"""Proxies and certificates that the environment names, and that no HTTP client can use."""

import os
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import huggingface_hub
import pytest
import requests

from flows.environment import environment, shell_lines
from flows.ports import choose_ports
from tasks.environment import stage_environment
from textcraftor.config import BaseConfig
from textcraftor.errors import UserError
from textcraftor.models.loading import load_pipeline
from textcraftor.network import network_settings, require_usable_network

UNUSABLE = {
    "SOCKS": {"ALL_PROXY": "socks5://127.0.0.1:1080"},
    "SOCKS in lower case": {"all_proxy": "socks://proxy.test:1080/"},
    "a certificate file that is gone": {"SSL_CERT_FILE": "/nonexistent/cacert.pem"},
    "a scheme that is none": {"HTTPS_PROXY": "ftp://proxy.test"},
    "a certificate file that is none": {"SSL_CERT_FILE": "/etc/hostname"},
}
HARMLESS = {  # to the hub's client; the first two are refused by Prefect's
    "IPv6 in NO_PROXY": {"NO_PROXY": "localhost,127.0.0.1,[::1]", "HTTPS_PROXY": "http://127.0.0.1:9"},
    "an IPv6 network in no_proxy": {"no_proxy": "fe80::/10", "http_proxy": "http://127.0.0.1:9"},
    "a proxy that is down": {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"},
    "certificates of requests": {"REQUESTS_CA_BUNDLE": "/nonexistent", "CURL_CA_BUNDLE": "/nonexistent"},
    "a folder of certificates that is gone": {"SSL_CERT_DIR": "/nonexistent"},
    "nothing": {},
}


@pytest.fixture
def settings(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    for name in network_settings(os.environ):
        monkeypatch.delenv(name)
    for name, value in request.param.items():
        monkeypatch.setenv(name, value)
    huggingface_hub.close_session()
    yield request.param
    huggingface_hub.close_session()


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{made.server_port}"
        made.shutdown()


@pytest.mark.parametrize("settings", [*UNUSABLE.values(), *HARMLESS.values()], ids=[*UNUSABLE, *HARMLESS], indirect=True)
def test_clients_of_our_servers_work_and_stages_keep_the_settings(
    settings: dict[str, str], server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = environment(tmp_path, tmp_path, choose_ports({}))
    stage = stage_environment(made, concurrency=1)
    assert network_settings(stage) == network_settings(settings) or not network_settings(settings)
    for name in settings:
        monkeypatch.delenv(name)
    for name, value in made.items():
        monkeypatch.setenv(name, value)
    assert httpx.get(server).status_code == requests.get(server, timeout=10).status_code == 200


@pytest.mark.parametrize("settings", [*UNUSABLE.values(), *HARMLESS.values()], ids=[*UNUSABLE, *HARMLESS], indirect=True)
def test_another_shell_can_talk_to_our_servers(
    settings: dict[str, str], server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text(shell_lines(environment(tmp_path, tmp_path, choose_ports({}))))
    sourced = subprocess.run(["sh", "-uc", f". {tmp_path}/file; env -0"], capture_output=True, text=True, check=True).stdout
    there = dict(line.split("=", 1) for line in sourced.split("\0") if line)
    assert there["PREFECT_API_URL"].startswith("http://127.0.0.1:")
    for name in (*settings, "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in network_settings(there).items():
        monkeypatch.setenv(name, value)
    assert httpx.get(server).status_code == 200
    if settings in HARMLESS.values() and "no_proxy" not in {name.lower() for name in settings}:
        assert settings.items() <= there.items(), "what works is left alone"


@pytest.mark.parametrize("settings", UNUSABLE.values(), ids=UNUSABLE, indirect=True)
def test_what_must_download_says_in_one_line_which_settings_are_unusable(settings: dict[str, str]) -> None:
    for attempt in (require_usable_network, lambda: load_pipeline(BaseConfig(path="owner/name"))):
        with pytest.raises(UserError) as error:
            attempt()
        said = str(error.value)
        assert "\n" not in said and "Unset or correct them" in said and all(name in said for name in settings)


@pytest.mark.parametrize("settings", HARMLESS.values(), ids=HARMLESS, indirect=True)
def test_settings_that_a_client_can_be_made_with_are_not_refused(settings: dict[str, str]) -> None:
    require_usable_network()
