"""Signed statements about files: an in-toto statement in a DSSE envelope, as software supply chains use them.

Sources: in-toto attestation framework, Statement v1; Dead Simple Signing Envelope v1.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import VerificationError
from securesystemslib.signer import Key, Signer

from textcraftor.errors import Unproven

PAYLOAD_TYPE: Final = "application/vnd.in-toto+json"
STATEMENT_TYPE: Final = "https://in-toto.io/Statement/v1"


@dataclass(frozen=True)
class Statement:
    """What is said about files.

    kind: a URI that says what the predicate means.  subject: name of each file -> its sha256.  predicate: JSON.
    signer: id of the key that signed it; empty before.
    """

    kind: str
    subject: Mapping[str, str]
    predicate: Mapping[str, Any]
    signer: str = ""


def sign(statement: Statement, signer: Signer) -> bytes:
    """The signed statement as JSON. Equal statements and keys give equal bytes where the key's scheme has no chance in it."""
    payload = {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": name, "digest": {"sha256": digest}} for name, digest in sorted(statement.subject.items())],
        "predicateType": statement.kind,
        "predicate": statement.predicate,
    }
    text = json.dumps(payload, sort_keys=True, separators=(",", ":"), allow_nan=False)
    envelope = Envelope(text.encode(), PAYLOAD_TYPE, {})
    envelope.sign(signer)
    return (json.dumps(envelope.to_dict(), indent=2) + "\n").encode()


def open_envelope(content: bytes, kind: str, keys: Mapping[str, Key]) -> Statement:
    """The statement in an envelope that one of the keys signed. Raises Unproven for any other content."""
    if not keys:
        raise Unproven("no key is believed here, so nothing is proven (`textcraftor keys`)")
    try:
        envelope = Envelope.from_dict(json.loads(content))
        signers = sorted(envelope.signatures)
        if envelope.payload_type != PAYLOAD_TYPE:
            raise Unproven(f"it holds {envelope.payload_type!r}, not a statement")
        signer = next(iter(envelope.verify(list(keys.values()), 1)))
        payload = json.loads(envelope.payload)
        if (payload["_type"], payload["predicateType"]) != (STATEMENT_TYPE, kind):
            raise Unproven(f"it states something else: {payload['predicateType']!r}")
        subject = {each["name"]: each["digest"]["sha256"] for each in payload["subject"]}
        return Statement(kind, subject, dict(payload["predicate"]), signer)
    except VerificationError:
        raise Unproven(f"no key that is believed here signed it ({_listed(signers)}; `textcraftor keys` lists them)") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:  # damaged, or not an envelope at all
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise Unproven(f"its signed statement is damaged ({reason})") from None


def _listed(signers: list[str]) -> str:
    return f"signed by {', '.join(each[:16] for each in signers)}" if signers else "it is not signed"
