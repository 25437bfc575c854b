"""The record of promotions: which version was made champion after which, by whom and why. Each entry is signed.

An entry names its predecessor by digest, so the record is a chain, and only its last entry says who is champion. Wherever
the entries are kept, `replay` finds the chain in them; it does not depend on who else can write there. Two entries that
follow the same predecessor are a race: the one that was written first counts, and the other's author sees that it lost.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from securesystemslib.signer import Key

from textcraftor.errors import ConfigError, Unproven
from textcraftor.signing import Keyring, Statement, open_envelope, sign

KIND: Final = "urn:textcraftor:promotion:v1"
LONGEST: Final = 500  # characters of `why` and `by`


@dataclass(frozen=True)
class Promotion:
    """One entry of the record.

    model: the registered model.  sequence: 1 for the first.  version: that became champion.  statement: sha256 of the
    version's signed statement.  predecessor: digest of the entry before; empty for the first.  at: UTC, ISO 8601.
    """

    model: str
    sequence: int
    version: int
    statement: str
    predecessor: str
    by: str
    why: str
    at: str

    @property
    def digest(self) -> str:
        """sha256 of what is said, whoever signed it and however that is written down."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def signed(self, keyring: Keyring) -> str:
        """The entry as a signed envelope, on one line.

        Raises ConfigError when the key that signs here is not believed here: the entry would not count.
        """
        signer = keyring.signer()
        if signer.public_key.keyid not in keyring.believed():
            raise ConfigError(
                f"This machine's key ({signer.public_key.keyid[:16]}) is not believed, so it cannot promote here. "
                "`textcraftor keys` lists the keys; TEXTCRAFTOR_SIGNING_KEY names the one to sign with"
            )
        statement = Statement(KIND, {f"{self.model}/{self.version}": self.statement}, asdict(self))
        return json.dumps(json.loads(sign(statement, signer)), separators=(",", ":"))

    @classmethod
    def read(cls, envelope: str, model: str, keys: Mapping[str, Key]) -> "Promotion":
        """The entry in an envelope. Raises Unproven for one that no key signed, or that is about another model."""
        statement = open_envelope(envelope.encode(), KIND, keys)
        said: dict[str, Any] = dict(statement.predicate)
        try:
            entry = cls(**said)
        except TypeError:
            raise Unproven("it is not an entry of the record of promotions") from None
        if (
            entry.model != model
            or not isinstance(entry.sequence, int)
            or dict(statement.subject) != {f"{model}/{entry.version}": entry.statement}
        ):
            raise Unproven(f"it is about {entry.model}, version {entry.version}")
        return entry


@dataclass(frozen=True)
class Chain:
    """The entries that count, in order.

    newest: the highest sequence number that was signed.  fault: why the record cannot be believed; empty if it can.
    """

    entries: tuple[Promotion, ...] = ()
    newest: int = 0
    fault: str = ""

    @property
    def head(self) -> Promotion | None:
        """The last entry: the promotion of the champion."""
        return self.entries[-1] if self.entries else None

    def next(self, model: str, version: int, statement: str, by: str, why: str, at: str) -> Promotion:
        """The entry that makes `version` of `model` champion after the head. It mends a record that has a fault."""
        predecessor = self.head.digest if self.head else ""
        return Promotion(model, self.newest + 1, version, statement, predecessor, by[:LONGEST], why[:LONGEST], at)


def replay(entries: Iterable[Promotion]) -> Chain:
    """The chain in signed entries, which come in the order in which they were written.

    It is broken, and has a fault, when an entry was signed later than its last one: entries between the two are missing.
    """
    known = list(entries)
    counted: list[Promotion] = []
    followers: dict[str, list[Promotion]] = {}
    for entry in known:
        followers.setdefault(entry.predecessor, []).append(entry)
    digest, sequence = "", 0
    while found := [entry for entry in followers.get(digest, ()) if entry.sequence > sequence]:
        counted.append(found[0])
        digest, sequence = found[0].digest, found[0].sequence
    newest = max((entry.sequence for entry in known), default=0)
    fault = ""
    if newest > sequence:
        lost = next(entry for entry in known if entry.sequence == newest)
        fault = f"the promotion of version {lost.version} (entry {newest}) follows one that is missing or not believed"
    return Chain(tuple(counted), newest, fault)
