"""An envelope opens for the bytes that a believed key signed, and for nothing else."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from textcraftor.errors import Unproven
from textcraftor.signing import Keyring, Statement, open_envelope, sign

KIND = "urn:test:v1"
STATEMENT = Statement(KIND, {"b.bin": "0" * 64, "a.bin": "1" * 64}, {"candidate": "balanced", "passed": True})


@pytest.fixture
def ring(tmp_path: Path) -> Keyring:
    return Keyring(tmp_path, {})


def test_what_was_signed_is_read(ring: Keyring) -> None:
    content = sign(STATEMENT, ring.signer())
    assert content == sign(STATEMENT, ring.signer())
    opened = open_envelope(content, KIND, ring.believed())
    assert (opened.kind, opened.subject, opened.predicate) == (KIND, STATEMENT.subject, STATEMENT.predicate)
    assert opened.signer == ring.signer().public_key.keyid
    payload = json.loads(base64.b64decode(json.loads(content)["payload"]))
    assert payload["_type"] == "https://in-toto.io/Statement/v1"  # other tools read it, too
    assert [each["name"] for each in payload["subject"]] == ["a.bin", "b.bin"]


def _payload(envelope: dict[str, Any], **changes: object) -> dict[str, Any]:
    payload = {**json.loads(base64.b64decode(envelope["payload"])), **changes}
    return {**envelope, "payload": base64.b64encode(json.dumps(payload).encode()).decode()}


FORGERIES: dict[str, tuple[Any, str]] = {
    "another predicate": (lambda e: _payload(e, predicate={"passed": True}), "no key that is believed here signed it"),
    "another subject": (lambda e: _payload(e, subject=[]), "no key that is believed here signed it"),
    "no signature": (lambda e: {**e, "signatures": []}, "it is not signed"),
    "another key's id": (lambda e: {**e, "signatures": [{**e["signatures"][0], "keyid": "0" * 64}]}, "signed by 0000"),
    "signature of other bytes": (lambda e: {**e, "signatures": [{**e["signatures"][0], "sig": "AAAA"}]}, "no key that is"),
    "twice the key": (lambda e: {**e, "signatures": e["signatures"] * 2}, "is damaged"),
    "another payload type": (lambda e: {**e, "payloadType": "text/plain"}, "it holds 'text/plain'"),
    "no payload": (lambda e: {"signatures": e["signatures"]}, "is damaged"),
    "payload no base64": (lambda e: {**e, "payload": "%"}, "no key that is believed|is damaged"),
    "a list": (lambda e: [e], "is damaged"),
    "nothing": (lambda e: None, "is damaged"),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forgery_does_not_open(ring: Keyring, forgery: str) -> None:
    forge, reason = FORGERIES[forgery]
    content = json.dumps(forge(json.loads(sign(STATEMENT, ring.signer())))).encode()
    with pytest.raises(Unproven, match=reason):
        open_envelope(content, KIND, ring.believed())


@pytest.mark.parametrize("content", [b"", b"\xff", b"{", b"[" * 100_000], ids=["empty", "not UTF-8", "cut off", "deep"])
def test_what_is_no_json_does_not_open(ring: Keyring, content: bytes) -> None:
    ring.signer()
    with pytest.raises(Unproven, match="is damaged"):
        open_envelope(content, KIND, ring.believed())


def test_a_statement_of_another_kind_or_of_a_stranger_does_not_open(ring: Keyring, tmp_path: Path) -> None:
    content = sign(STATEMENT, ring.signer())
    with pytest.raises(Unproven, match="it states something else: 'urn:test:v1'"):
        open_envelope(content, "urn:other:v1", ring.believed())
    stranger = Keyring(tmp_path / "elsewhere", {})
    with pytest.raises(Unproven, match="no key that is believed here signed it"):
        open_envelope(sign(STATEMENT, stranger.signer()), KIND, ring.believed())
    ring.revoke(ring.signer().public_key.keyid)
    with pytest.raises(Unproven, match="no key that is believed here signed it"):
        open_envelope(content, KIND, ring.believed())
    with pytest.raises(Unproven, match="no key is believed here"):
        open_envelope(content, KIND, {})
