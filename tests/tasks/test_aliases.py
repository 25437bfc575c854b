"""The alias `champion`, moved by hand and put back; and messages of MLflow's webhooks, true and forged."""

import base64
import hashlib
import hmac
import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tasks import store as registry_store
from tasks.aliases import watch, watched_models
from tasks.registry import promote
from tasks.store import RegistryUnavailable
from tasks.webhook import EVENTS, LARGEST, Receiver, is_signed, look, subscribe
from tests.tasks.registered import CHAMPION, MODEL, WORSE, alias_holder
from textcraftor.config import Config
from textcraftor.errors import Unproven

NOW = 1_800_000_000


@pytest.mark.parametrize(
    ("move", "where"),
    [
        (lambda store: store.set_registered_model_alias(MODEL, "champion", str(WORSE)), "on version 2"),
        (lambda store: store.delete_registered_model_alias(MODEL, "champion"), "removed"),
    ],
)
def test_an_alias_moved_by_hand_is_put_back_and_the_versions_say_so(
    store: MlflowClient, config: Config, move: Callable[[MlflowClient], None], where: str
) -> None:
    assert watch(config, MODEL) == f"{MODEL}: version 1 is the champion, proven again"
    move(store)
    found = watch(config, MODEL)
    assert found == f"{MODEL}: the alias `champion` was {where}; entry 1 of the record names version 1: put back"
    assert alias_holder(store, "champion") == str(CHAMPION)
    tags = {number: store.get_model_version(MODEL, str(number)).tags.get("alias_corrected", "") for number in (CHAMPION, WORSE)}
    assert where in tags[CHAMPION] and (where in tags[WORSE]) == (where != "removed")
    assert "put back" not in watch(config, MODEL), "once"


def test_a_promotion_is_no_correction(store: MlflowClient, config: Config) -> None:
    promote.fn(WORSE, config, by="somebody")
    watch(config, MODEL)
    tags = [store.get_model_version(MODEL, str(number)).tags for number in (CHAMPION, WORSE)]
    assert alias_holder(store, "champion") == str(WORSE) and not any("alias_corrected" in each for each in tags)


def test_nothing_is_put_where_no_promotion_was_signed(before: MlflowClient, config: Config) -> None:
    assert watch(config, MODEL) == f"{MODEL}: nothing was promoted yet"
    before.set_registered_model_alias(MODEL, "champion", str(WORSE))
    assert "no signed promotion made it champion" in watch(config, MODEL)


def test_a_damaged_champion_is_reported_and_still_has_its_alias(
    store: MlflowClient, config: Config, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    store.set_registered_model_alias(MODEL, "champion", str(WORSE))
    for folder in (registry_store.STORE, registry_store.STORE.parent / "models"):
        for weights in folder.rglob("model.safetensors"):
            weights.write_bytes(b"exchanged")
    with pytest.raises(Unproven, match=r"was on version 2;.* put back.* is not proven: .*textcraftor rollback"):
        watch(config, MODEL)
    assert alias_holder(store, "champion") == str(CHAMPION)
    look(config, MODEL)
    assert "is not proven" in caplog.text


def test_a_registry_that_cannot_be_read_moves_nothing(
    store: MlflowClient, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(RegistryUnavailable, match="cannot be read"):
        watch(config, MODEL)


def test_every_model_with_a_policy_is_watched(judged: dict[int, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_store, "ROOT", judged[200])
    assert watched_models() == [MODEL]


def signature(secret: str, body: bytes, delivery: str = "1", sent: int = NOW) -> dict[str, str]:
    digest = hmac.new(secret.encode(), f"{delivery}.{sent}.".encode() + body, hashlib.sha256).digest()
    signed = "v1," + base64.b64encode(digest).decode()
    return {"X-MLflow-Delivery-Id": delivery, "X-MLflow-Timestamp": str(sent), "X-MLflow-Signature": signed}


def test_a_message_that_mlflow_signs_is_believed() -> None:
    from mlflow.webhooks.delivery import _generate_hmac_signature

    theirs = {**signature("s", b"{}"), "X-MLflow-Signature": _generate_hmac_signature("s", "1", str(NOW), "{}")}
    assert is_signed("s", theirs, b"{}", NOW + 299.0)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {**signature("s", b"{}"), "X-MLflow-Signature": ""},
        {**signature("s", b"{}"), "X-MLflow-Signature": "v1,ä"},
        {**signature("s", b"{}"), "X-MLflow-Delivery-Id": "2"},
        {**signature("s", b"{}"), "X-MLflow-Timestamp": str(NOW + 1)},
        signature("another secret", b"{}"),
        signature("s", b'{"data": 1}'),
        signature("s", b"{}", sent=NOW - 301),
        signature("s", b"{}", sent=NOW + 301),
        {**signature("s", b"{}"), "X-MLflow-Timestamp": "-1"},
        {**signature("s", b"{}"), "X-MLflow-Timestamp": "9" * 5000},
    ],
)
def test_a_forged_or_old_message_is_not(headers: dict[str, str]) -> None:
    assert not is_signed("s", headers, b"{}", NOW)


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    with Receiver("s") as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b'{"data": {"name": "m"}}', None, 204),
        (b'{"data": {"name": "m"}}', {}, 401),
        (b"no JSON", None, 422),
        (b'{"data": []}', None, 422),
        (b"[]", None, 422),
        (b"", {"Content-Length": str(LARGEST + 1)}, 413),
        (b"", {"Content-Length": "9" * 40}, 413),
        (b"", {"Content-Length": "x"}, 411),
    ],
)
def test_the_receiver_takes_signed_messages_alone(
    receiver: Receiver, body: bytes, headers: dict[str, str] | None, status: int
) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", receiver.server_port, timeout=10)
    given = signature("s", body, sent=int(time.time())) if headers is None else headers
    connection.request("POST", "/", body, given)
    assert connection.getresponse().status == status
    assert receiver.changed.empty() == (status != 204)
    if status == 204:
        assert receiver.changed.get() == json.loads(body)["data"]["name"]


def test_the_receiver_replaces_the_webhook_of_its_last_start(before: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_WEBHOOK_ALLOWED_SCHEMES", "http")
    monkeypatch.setenv("MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS", "true")
    for port in (1, 2):
        subscribe(before, f"http://127.0.0.1:{port}/", "s")
    (webhook,) = before.list_webhooks()
    assert webhook.url == "http://127.0.0.1:2/" and {str(event) for event in webhook.events} == set(EVENTS)
