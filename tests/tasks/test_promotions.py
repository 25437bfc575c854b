"""The signed record of promotions: who may move the champion, and what happens to those who try otherwise."""

import base64
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tasks import promotions
from tasks import store as registry_store
from tasks.champion import rollback
from tasks.registry import challenge, decline, promote
from tasks.versions import fetch
from tests.tasks.registered import CHAMPION, MODEL, WORSE, alias_holder
from textcraftor.config import Config
from textcraftor.errors import ConfigError, ModelError, Unproven
from textcraftor.signing import Keyring
from textcraftor.trust.promotion import Chain


@pytest.fixture
def store(before: MlflowClient, config: Config) -> MlflowClient:
    """Version 2 was champion, and 1 is."""
    for version in (WORSE, CHAMPION):
        assert promote.fn(version, config).verdict == "promoted"
    return before


def test_rollback_is_one_more_promotion(before: MlflowClient, config: Config) -> None:
    with pytest.raises(ModelError, match=r"no earlier champion of textcraftor-tiny to go back to\. Name a version"):
        rollback(config)
    for version in (WORSE, CHAMPION):
        promote.fn(version, config)
    back = rollback(config, why="too red")
    assert (back.verdict, back.version, alias_holder(before, "champion")) == ("promoted", WORSE, str(WORSE))
    assert "a person chose it (rollback from version 1: too red)" in back.why
    assert rollback(config).version == CHAMPION and rollback(config, to=WORSE).version == WORSE
    entries = promotions.read(before, MODEL).entries
    assert [(entry.sequence, entry.version) for entry in entries] == [(1, 2), (2, 1), (3, 2), (4, 1), (5, 2)]
    assert all(later.predecessor == entry.digest for entry, later in itertools.pairwise(entries))


def test_a_declined_challenger_is_none_any_more_and_says_who_declined_it(before: MlflowClient, config: Config) -> None:
    challenge.fn(WORSE, config)
    declined = decline.fn(WORSE, config, "Ada", "shapes got worse")
    assert (declined.verdict, declined.why) == ("not promoted", "Ada declined it: shapes got worse")
    assert before.get_model_version(MODEL, str(WORSE)).tags["review"] == declined.why
    assert (alias_holder(before, "champion"), alias_holder(before, "challenger")) == (None, None)


def _post(store: MlflowClient, envelope: str, version: int = WORSE) -> None:
    """Add a version to the record, as anybody can who reaches MLflow's API."""
    source = f"models:/{MODEL}/{version}"
    store.create_model_version(promotions.record_name(MODEL), source=source, tags={"promotion": envelope})


def _entry(chain: Chain, keyring: Keyring, version: int = WORSE, model: str = MODEL) -> str:
    return chain.next(model, version, "0" * 64, "me", "because", "2026-01-01T00:00:00+00:00").signed(keyring)


def _replay(store: MlflowClient) -> None:
    (first,) = (each for each in store.search_model_versions(f"name = '{MODEL}-promotions'") if each.version == 1)
    _post(store, first.tags["promotion"])


def _other_predicate(store: MlflowClient) -> None:
    (last,) = (each for each in store.search_model_versions(f"name = '{MODEL}-promotions'") if each.version == 2)
    envelope = json.loads(last.tags["promotion"])
    said = json.loads(base64.b64decode(envelope["payload"]))
    said["predicate"] |= {"sequence": 3, "version": WORSE}
    _post(store, json.dumps({**envelope, "payload": base64.b64encode(json.dumps(said).encode()).decode()}))


# What somebody writes into the record through MLflow's API, without the key
FORGERIES: dict[str, Callable[[MlflowClient, Path], object]] = {
    "no envelope": lambda store, _: _post(store, "champion: version 1"),
    "no entry at all": lambda store, _: _post(store, "{}"),
    "a stranger's entry": lambda store, root: _post(store, _entry(promotions.read(store, MODEL), Keyring(root, {}), WORSE)),
    "an earlier entry again": lambda store, _: _replay(store),
    "an entry with another version in it": lambda store, _: _other_predicate(store),
    "the last entry deleted": lambda store, _: store.delete_model_version(f"{MODEL}-promotions", "2"),
    "the first entry deleted": lambda store, _: store.delete_model_version(f"{MODEL}-promotions", "1"),
    "the last entry overwritten": lambda store, _: store.set_model_version_tag(f"{MODEL}-promotions", "2", "promotion", "x"),
    "the record deleted": lambda store, _: store.delete_registered_model(f"{MODEL}-promotions"),
    "the record renamed": lambda store, _: store.rename_registered_model(f"{MODEL}-promotions", "elsewhere"),
    "the alias moved": lambda store, _: store.set_registered_model_alias(MODEL, "champion", str(WORSE)),
    "the alias removed": lambda store, _: store.delete_registered_model_alias(MODEL, "champion"),
    "the challenger made champion": lambda store, _: store.set_registered_model_alias(MODEL, "challenger", str(CHAMPION)),
}


@pytest.mark.parametrize("attack", FORGERIES)
def test_nobody_without_the_key_moves_the_champion(store: MlflowClient, config: Config, tmp_path: Path, attack: str) -> None:
    FORGERIES[attack](store, tmp_path / "attacker")
    assert fetch("champion", config) == fetch(str(CHAMPION), config)
    assert promote.fn(WORSE, config).verdict == "not promoted"
    assert promote.fn(CHAMPION, config).verdict == "champion stays"
    assert (alias_holder(store, "champion"), alias_holder(store, "challenger")) == (str(CHAMPION), None)


@pytest.mark.parametrize("attack", ["the first entry deleted", "the last entry overwritten", "the last entry deleted"])
def test_a_machine_that_never_saw_the_record_takes_no_broken_one(
    store: MlflowClient, config: Config, tmp_path: Path, attack: str
) -> None:
    """It cannot know of an entry at the end that is gone; the one before it is then a champion that was proven."""
    FORGERIES[attack](store, tmp_path / "attacker")
    shutil.rmtree(registry_store.STORE / "promotions")
    if attack != "the first entry deleted":
        assert fetch("champion", config) == fetch(str(WORSE), config)
        return
    with pytest.raises(
        Unproven, match=r"the promotion of version 1 \(entry 2\) follows one that is missing.*textcraftor rollback"
    ):
        fetch("champion", config)
    assert promote.fn(WORSE, config).verdict == "not promoted"
    assert promote.fn(CHAMPION, config, by="somebody").verdict == "promoted"
    assert fetch("champion", config) == fetch(str(CHAMPION), config)


def test_a_key_that_is_not_believed_promotes_nothing(
    before: MlflowClient, config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    Keyring(tmp_path / "other", {}).signer()
    believed = Keyring(registry_store.ROOT, {}).believed()
    monkeypatch.setattr(Keyring, "believed", lambda _: believed)
    monkeypatch.setenv("TEXTCRAFTOR_SIGNING_KEY", str(tmp_path / "other/.textcraftor/keys/signing.pem"))
    with pytest.raises(ConfigError, match="is not believed, so it cannot promote here"):
        promote.fn(CHAMPION, config)
    assert alias_holder(before, "champion") is None
