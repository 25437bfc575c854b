"""Servers on the loopback interface."""

import http.server
import socket

import pytest

from textcraftor.errors import ConfigError
from textcraftor.loopback import LoopbackServer


def test_a_server_listens_on_loopback_and_asks_nobody_for_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getfqdn", lambda *_: pytest.fail("this asks a network"))
    with LoopbackServer(0, http.server.BaseHTTPRequestHandler) as server:
        assert server.address == f"http://127.0.0.1:{server.server_port}/" and server.socket.getsockname()[0] == "127.0.0.1"
        with pytest.raises(ConfigError, match=f"--port {server.server_port} cannot be used: Address already in use"):
            LoopbackServer(server.server_port, http.server.BaseHTTPRequestHandler)
