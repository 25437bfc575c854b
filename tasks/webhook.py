"""The receiver of MLflow's webhooks: after each change in the registry the champion is proven again and its alias put back.

    python -m tasks.webhook [--port 0] [--url https://receiver.example/]

It listens on the loopback interface, registers itself with the MLflow server at MLFLOW_TRACKING_URI, and removes the webhook
of an earlier start. A message only says that something may have changed; what is true is read from the signed record of
promotions. So a forged or repeated message achieves nothing, and one that is lost is made up for by the flow `watch`.
"""

import argparse
import base64
import hashlib
import hmac
import http.server
import json
import logging
import queue
import secrets
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any, Final

from mlflow import MlflowClient
from mlflow.entities.webhook import Webhook, WebhookEvent, WebhookEventStr
from mlflow.webhooks.constants import WEBHOOK_DELIVERY_ID_HEADER, WEBHOOK_SIGNATURE_HEADER, WEBHOOK_TIMESTAMP_HEADER

from tasks import store
from tasks.aliases import watch, watched_models
from tasks.promotions import record_name
from tasks.store import RegistryUnavailable, client
from textcraftor.config import Config, load
from textcraftor.errors import UserError
from textcraftor.loopback import LoopbackServer

NAME: Final = "textcraftor-champion"  # of the webhook, in MLflow
EVENTS: Final[list[WebhookEventStr | WebhookEvent]] = [
    "model_version_alias.created",
    "model_version_alias.deleted",
    "model_version_tag.set",
    "model_version_tag.deleted",
    "model_version.created",
]
LARGEST: Final = 1 << 20  # bytes of a message: a version's card and tags are in it
OLDEST: Final = 300.0  # seconds between signing and arrival
QUIET: Final = 0.5  # seconds in which further changes are waited for: a promotion makes several
RETRIES: Final = (1.0, 5.0, 15.0)  # seconds before the registry is asked again that could not be read

log = logging.getLogger("textcraftor.webhook")


class Receiver(LoopbackServer):
    """Takes messages at http://127.0.0.1:PORT/ and puts the registered models they are about into `changed`.

    secret: of the HMAC that each message carries.  port: 0 takes a free one.  Raises ConfigError when it is taken.
    """

    def __init__(self, secret: str, port: int = 0) -> None:
        self.secret, self.changed = secret, queue.SimpleQueue[str]()
        super().__init__(port, _Handler)


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Receiver
    timeout = 15

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdecimal()):
            return self._answer(411)
        if len(length) > 12 or int(length) > LARGEST:
            return self._answer(413)
        body = self.rfile.read(int(length))
        if not is_signed(self.server.secret, self.headers, body, time.time()):
            log.warning("a message without a valid signature was refused")
            return self._answer(401)
        try:
            self.server.changed.put(str(json.loads(body)["data"]["name"]))
        except (ValueError, KeyError, TypeError):
            return self._answer(422)
        return self._answer(204)

    def _answer(self, status: int) -> None:
        self.close_connection = True
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *arguments: Any) -> None:
        """What matters is logged by what it leads to."""


def is_signed(secret: str, headers: Mapping[str, str] | Any, body: bytes, now: float) -> bool:
    """Whether MLflow signed a message with our secret, not long ago.

    The signature is HMAC-SHA256 of `delivery id.timestamp.body`, in base64 after "v1,".  now: seconds since 1970.
    """
    delivery, sent = headers.get(WEBHOOK_DELIVERY_ID_HEADER, ""), headers.get(WEBHOOK_TIMESTAMP_HEADER, "")
    if not (sent.isascii() and sent.isdecimal() and len(sent) < 16 and abs(now - int(sent)) <= OLDEST):
        return False
    digest = hmac.new(secret.encode(), f"{delivery}.{sent}.".encode() + body, hashlib.sha256).digest()
    given = headers.get(WEBHOOK_SIGNATURE_HEADER, "").encode("utf-8", "replace")
    return hmac.compare_digest(b"v1," + base64.b64encode(digest), given)


def subscribe(mlflow: MlflowClient, url: str, secret: str) -> None:
    """Register the receiver with MLflow, in place of an earlier one. Raises MlflowException where MLflow refuses it."""
    for webhook in list(_webhooks(mlflow)):
        if webhook.name == NAME:
            mlflow.delete_webhook(webhook.webhook_id)
    about = "proves the champion again and puts its alias back where the signed record of promotions has it"
    mlflow.create_webhook(NAME, url, EVENTS, description=about, secret=secret)


def _webhooks(mlflow: MlflowClient) -> Iterator[Webhook]:
    token: str | None = None
    while True:
        page = mlflow.list_webhooks(page_token=token)
        yield from page
        if not (token := page.token):
            return


def work(changed: "queue.SimpleQueue[str]", config: Config) -> None:
    """Watch the models that messages are about, for ever; what happens at once is looked at once."""
    while True:
        names = {changed.get()}
        time.sleep(QUIET)
        while not changed.empty():
            names.add(changed.get())
        for model in watched_models():
            if names & {model, record_name(model)}:
                look(config, model)


def look(config: Config, model: str) -> None:
    """Watch a model and log what was found; nothing that happens here ends the receiver."""
    for wait in (*RETRIES, None):
        try:
            found = watch(config, model)
            return log.log(logging.WARNING if "put back" in found else logging.INFO, "%s", found)
        except RegistryUnavailable as error:
            log.warning("%s", error)
            if wait is not None:
                time.sleep(wait)
        except UserError as error:
            return log.error("%s", error)
        except Exception:
            return log.exception("%s could not be watched", model)
    return None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument(
        "--url", help="where MLflow reaches this receiver; by default its own address on the loopback interface"
    )
    given = parser.parse_args(arguments)
    logging.basicConfig(stream=sys.stdout, level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    log.setLevel(logging.INFO)
    try:
        config, receiver = load(store.ROOT / "params.yaml"), Receiver(secrets.token_urlsafe(32), given.port)
        threading.Thread(target=receiver.serve_forever, daemon=True).start()
        subscribe(client(), given.url or receiver.address, receiver.secret)
    except UserError as error:
        print(f"textcraftor: {error}", file=sys.stderr)
        return error.exit_status
    log.info("MLflow's webhooks arrive at %s", receiver.address)
    for model in watched_models():
        receiver.changed.put(model)  # what happened while nobody listened
    work(receiver.changed, config)
    return 0


if __name__ == "__main__":
    sys.exit(main())
