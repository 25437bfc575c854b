"""The record of promotions in MLflow: versions of a second registered model, NAME-promotions, each with one signed entry.

MLflow numbers versions in the order they are made and gives no number twice, so all machines see the entries in the same
order, and of two promotions at once exactly one counts. Each machine keeps a copy of what it saw count: an entry that
somebody deletes in the registry is not lost to it, and a race that was decided stays so.
"""

import contextlib
import hashlib
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from tasks import store
from tasks.store import tracking_uri, without_credentials
from textcraftor.artifact import written_aside
from textcraftor.errors import Unproven
from textcraftor.signing import Keyring
from textcraftor.trust.promotion import Chain, Promotion, replay

TAG: Final = "promotion"
ABOUT: Final = (
    "The signed record of the promotions of {model}. Each version here is one entry; the last one names the champion. "
    "`make promote` and `textcraftor rollback` add entries. Nothing that is changed here by hand has effect."
)
_LOOPBACK: Final = re.compile(r"https?://(127\.0\.0\.1|localhost|\[::1\])(:|/|$)")


def record_name(model: str) -> str:
    """Name of the registered model that holds the record of another."""
    return f"{model}-promotions"


def read(mlflow: MlflowClient, model: str) -> Chain:
    """The record of a registered model. What no believed key signed does not count. Raises MLflow's errors and OSError."""
    keys, folder = Keyring(store.ROOT).believed(), _copies(model)
    versions = sorted(mlflow.search_model_versions(f"name = '{record_name(model)}'"), key=lambda each: int(each.version))
    copies = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.json"))]
    envelopes: dict[Promotion, str] = {}
    for envelope in (*copies, *(version.tags.get(TAG, "") for version in versions)):
        with contextlib.suppress(Unproven):  # anybody may add versions: what is no entry must not block what is one
            envelopes.setdefault(Promotion.read(envelope, model, keys), envelope)
    chain = replay(envelopes)
    for entry in chain.entries:
        path = folder / f"{entry.sequence:06}-{entry.digest[:16]}.json"
        if not path.exists():
            with written_aside(path) as aside:
                aside.write_text(envelopes[entry], encoding="utf-8")
    return chain


def append(mlflow: MlflowClient, chain: Chain, model: str, version: int, statement: str, by: str, why: str) -> bool:
    """Sign and write the entry that makes a version champion after the chain's head; False when another one came first.

    statement: sha256 of the version's signed statement.  Raises ConfigError when this machine's key is not believed.
    """
    entry = chain.next(model, version, statement, by, why, datetime.now(UTC).isoformat(timespec="milliseconds"))
    envelope = entry.signed(Keyring(store.ROOT))
    record = record_name(model)
    try:
        mlflow.create_registered_model(record, description=ABOUT.format(model=model))
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    said = f"Version {version} of {model}, by {entry.by}: {entry.why}"
    mlflow.create_model_version(record, source=f"models:/{model}/{version}", tags={TAG: envelope}, description=said)
    return read(mlflow, model).head == entry


def _copies(model: str) -> Path:
    """This machine's copies of the entries that counted: those of its own MLflow, or of the server that it is told to use."""
    uri, folder = without_credentials(tracking_uri()), store.STORE / "promotions"
    own = not uri.startswith("http") or _LOOPBACK.match(uri)
    return (folder if own else folder / hashlib.sha256(uri.encode()).hexdigest()[:12]) / model
