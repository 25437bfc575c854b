"""A served model: pictures in order, and a clear refusal of everything else."""

import base64
import concurrent.futures
import http.client
import io
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.fixtures import CHAIN
from textcraftor.candidate import Candidate
from textcraftor.config import BaseConfig, Config, SamplerConfig, load
from textcraftor.errors import ConfigError
from textcraftor.serving import server as server_module
from textcraftor.serving.server import CONNECTIONS, LARGEST, ModelServer
from textcraftor.serving.service import MOST, Request, Service

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def service(base_folder: Path) -> Service:
    config: Config = load(ROOT / "params.yaml").model_copy(
        update={
            "base": BaseConfig(path=str(base_folder), resolution=32),
            "chain": CHAIN,
            "sampler": SamplerConfig(switch_at=0.4),
        }
    )
    return Service(config, Candidate("tuned", text_encoder=base_folder / "text_encoder"), torch.device("cpu"))


@pytest.fixture
def server(service: Service) -> Iterator[ModelServer]:
    with ModelServer(service, 0, waiting=2) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def ask(server: ModelServer, body: bytes, **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    try:
        connection.request("POST", "/invocations", body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def test_a_request_gets_its_own_picture(service: Service, server: ModelServer) -> None:
    (expected,) = service.draw([Request(prompt="a red circle", seed=7)])
    assert ask(server, json.dumps({"prompt": "a red circle", "seed": 7}).encode()) == (200, expected)
    assert Image.open(io.BytesIO(expected)).size == (32, 32)


def test_pictures_do_not_depend_on_who_else_asks(service: Service) -> None:
    requests = [Request(prompt=f"{index} circles", seed=index, steps=2 + index % 2) for index in range(10)]
    alone = [service.draw([request])[0] for request in requests]
    pairs = zip(alone, service.draw(requests), strict=True)
    for one, other in pairs:
        ours, theirs = (
            torch.frombuffer(bytearray(Image.open(io.BytesIO(each)).tobytes()), dtype=torch.uint8) for each in (one, other)
        )
        assert (ours.int() - theirs.int()).abs().max() <= 1


def test_strength_goes_from_the_base_to_the_model(service: Service) -> None:
    assert service.draw([Request(prompt="a", strength=1)]) == service.draw([Request(prompt="a", strength=0.5)])  # same weights
    with pytest.raises(ConfigError, match="strength: Input should be less than or equal to 1"):
        Request.read({"prompt": "a", "strength": 2})


HOSTILE = {
    "no JSON": (b"{", 422),
    "not UTF-8": (b"\xff\xfe", 422),
    "deep": (b"[" * 8000, 422),
    "a list": (b"[]", 422),
    "no prompt": (b"{}", 422),
    "an empty prompt": (b'{"prompt": " "}', 422),
    "a number for a prompt": (b'{"prompt": 1}', 422),
    "a long prompt": (json.dumps({"prompt": "a" * 1001}).encode(), 422),
    "a negative seed": (b'{"prompt": "a", "seed": -1}', 422),
    "a huge seed": (b'{"prompt": "a", "seed": 1e300}', 422),
    "a million steps": (b'{"prompt": "a", "steps": 1000000}', 422),
    "guidance that is no number": (b'{"prompt": "a", "guidance": NaN}', 422),
    "an unknown field": (b'{"prompt": "a", "model": "/etc/passwd"}', 422),
    "a large body": (b" " * (LARGEST + 1), 413),
}


@pytest.mark.parametrize("attack", HOSTILE)
def test_a_bad_request_is_refused_and_the_next_one_is_drawn(server: ModelServer, attack: str) -> None:
    body, status = HOSTILE[attack]
    refused, why = ask(server, body)
    assert (refused, b"Traceback" in why) == (status, False) and why
    assert ask(server, b'{"prompt": "a"}')[0] == 200


@pytest.mark.parametrize("length", ["", "-1", "1e9", "999999999999999999999"])
def test_a_false_length_is_refused(server: ModelServer, length: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    connection.putrequest("POST", "/invocations")
    connection.putheader("Content-Length", length)
    connection.endheaders()
    assert connection.getresponse().status in (411, 413)
    connection.close()


def test_a_refused_body_of_megabytes_gets_its_answer(server: ModelServer) -> None:
    assert ask(server, b" " * 1_000_000)[0] == 413


def test_slow_and_vanishing_clients_hold_nobody_up(server: ModelServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "READING", 0.3)
    head = b"POST /invocations HTTP/1.1\r\nContent-Length: 15\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.server_port), 60) as slow:
        slow.sendall(head + b'{"prompt"')
        for sent in (head[:20], head, head + b'{"prompt": "a"}'):
            with socket.create_connection(("127.0.0.1", server.server_port)) as gone:
                gone.sendall(sent)
        assert ask(server, b'{"prompt": "a"}')[0] == 200
        assert slow.recv(100).startswith(b"HTTP/1.1 408 ")


def test_more_connections_than_there_are_threads_for_are_closed(server: ModelServer) -> None:
    for _ in range(CONNECTIONS - 1):
        assert server.free.acquire(blocking=False)
    with socket.create_connection(("127.0.0.1", server.server_port), 60) as first:
        first.sendall(b"GET /ping HTTP/1.1\r\n\r\n")
        assert first.recv(100).startswith(b"HTTP/1.1 200 ")
        with socket.create_connection(("127.0.0.1", server.server_port), 60) as second:
            assert second.recv(100) == b""
    for _ in range(CONNECTIONS - 1):
        server.free.release()
    assert ask(server, b'{"prompt": "a"}')[0] == 200


def test_a_full_queue_answers_at_once_and_loses_nothing(
    service: Service, server: ModelServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, draw = threading.Event(), service.draw

    def wait(requests: list[Request]) -> list[bytes]:
        assert go_on.wait(60)
        return draw(requests)

    monkeypatch.setattr(service, "draw", wait)
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        asked = [pool.submit(ask, server, json.dumps({"prompt": "a", "seed": seed}).encode()) for seed in range(12)]
        done, _ = concurrent.futures.wait(asked, timeout=20, return_when=concurrent.futures.FIRST_COMPLETED)
        assert {each.result()[0] for each in done} == {429}
        go_on.set()
        statuses = [each.result()[0] for each in asked]
    assert set(statuses) == {200, 429} and statuses.count(200) >= 3


def test_mlflows_call_takes_tables_lists_and_parameters(service: Service) -> None:
    import pandas as pd

    (expected,) = service.draw([Request(prompt="b", seed=4, steps=3)])
    drawn = service.predict(pd.DataFrame({"prompt": ["a", "b"]}), {"seed": 3, "steps": 3, "guidance": None})
    assert base64.b64decode(service.predict(["b"], {"seed": 4, "steps": 3})[0]) == expected and len(drawn) == 2
    for wrong in (pd.DataFrame({"text": ["a"]}), [], ["a"] * (MOST + 1), [1]):
        with pytest.raises(ConfigError):
            service.predict(wrong)
