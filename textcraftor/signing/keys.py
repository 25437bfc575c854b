"""The keys of a project: which one signs here, and which ones are believed.

    .textcraftor/keys/signing.pem       the private key of this machine, made on first use, readable by its owner alone
    .textcraftor/keys/retired/*.pem     public keys that no longer sign; what they signed is still believed
    .textcraftor/keys/revoked/*.pem     public keys that are never believed again
    mlflow/policy/keys/*.pem            public keys of the team, committed. If there is one, only these are believed

A key that was made here proves that this machine's pipeline wrote something, and no more: whoever can read the file can sign.
Where that is not enough, the key comes from TEXTCRAFTOR_SIGNING_KEY, a file or a key service of securesystemslib
(`awskms:...`, `gcpkms:...`, `azurekms:...`, `hv:...`, `hsm:...`), and TEXTCRAFTOR_PUBLIC_KEY, the file of its public part.
"""

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)
from securesystemslib.signer import CryptoSigner, Key, Signer, SSlibKey

from textcraftor.errors import ConfigError
from textcraftor.layout import KEYS, TEAM_KEYS

SIGNING_KEY, PUBLIC_KEY = "TEXTCRAFTOR_SIGNING_KEY", "TEXTCRAFTOR_PUBLIC_KEY"


@dataclass(frozen=True)
class Keyring:
    """The keys of the project at `root`.

    Nothing is read or made before it is needed.  Every method raises ConfigError for a file that holds no key.
    """

    root: Path
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)

    @property
    def folder(self) -> Path:
        return self.root / KEYS

    def signer(self) -> Signer:
        """What signs: the key that the environment names, else this machine's, which is made if there is none."""
        named = self.environment.get(SIGNING_KEY, "")
        if ":" in named and not Path(named).exists():
            return self._from_service(named)
        path = Path(named) if named else self.folder / "signing.pem"
        if not named and not path.exists():
            _make(path)
        return CryptoSigner(_private_key(path))

    def believed(self) -> dict[str, Key]:
        """The public keys whose signatures count, by id: the team's; without those, the one that signs and the retired."""
        team = _public_keys(self.root / TEAM_KEYS)
        keys = team or {**_public_keys(self.folder / "retired"), **self._own()}
        revoked = self.revoked()
        return {keyid: key for keyid, key in keys.items() if keyid not in revoked}

    def revoked(self) -> dict[str, Key]:
        return _public_keys(self.folder / "revoked")

    def rotate(self) -> str:
        """Retire this machine's key and make another; returns the new key's id. What the old one signed is still believed."""
        self._put_away("retired")
        return self.signer().public_key.keyid

    def revoke(self, keyid: str) -> None:
        """Never believe one of this machine's keys again: what it signed is no longer proven. The signing key is replaced.

        keyid: whole or the beginning.  Raises ConfigError when no key, or more than one, has it.
        """
        own, retired = self._own(), _public_keys(self.folder / "retired")
        found = [known for known in {**own, **retired} if keyid and known.startswith(keyid)]
        if len(found) != 1:
            known = ", ".join(each[:16] for each in {**own, **retired}) or "none"
            raise ConfigError(f"{keyid!r} is not the id of one key of this machine. Known: {known}")
        if found[0] in retired:
            (self.folder / "revoked").mkdir(exist_ok=True)
            (self.folder / "retired" / f"{found[0]}.pem").replace(self.folder / "revoked" / f"{found[0]}.pem")
        elif self.environment.get(SIGNING_KEY):
            raise ConfigError(f"{SIGNING_KEY} names this key. Set another one, and remove its public key from {TEAM_KEYS}/")
        else:
            self._put_away("revoked")
            self.signer()

    def _own(self) -> dict[str, Key]:
        """The public part of the key that signs, without making one."""
        if self.environment.get(SIGNING_KEY) or (self.folder / "signing.pem").exists():
            key = self.signer().public_key
            return {key.keyid: key}
        return {}

    def _put_away(self, where: str) -> None:
        """Replace the private key by its public part, in a folder of that name."""
        path, folder = self.folder / "signing.pem", self.folder / where
        if path.exists():
            public = _private_key(path).public_key()
            folder.mkdir(parents=True, exist_ok=True)
            pem = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
            (folder / f"{SSlibKey.from_crypto(public).keyid}.pem").write_bytes(pem)
            path.unlink()

    def _from_service(self, uri: str) -> Signer:
        public = self.environment.get(PUBLIC_KEY)
        if not public:
            raise ConfigError(f"{SIGNING_KEY}={uri} is a key service: {PUBLIC_KEY} must name the file of its public key (PEM)")
        try:
            return Signer.from_priv_key_uri(uri, SSlibKey.from_crypto(_read(Path(public), load_pem_public_key)))
        except Exception as error:  # each service raises errors of its own
            raise ConfigError(f"{SIGNING_KEY}={uri} cannot be used: {' '.join(str(error).split())[:200]}") from None


def _make(path: Path) -> None:
    """Write a new private key, unless another process was faster. The file appears whole, and only its owner reads it."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    pem = Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    descriptor, aside = tempfile.mkstemp(dir=path.parent)  # readable by its owner alone
    with os.fdopen(descriptor, "wb") as file:
        file.write(pem)
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(aside, path)  # fails if the other process's key is there, where a rename would replace it
    except FileExistsError:
        pass
    finally:
        Path(aside).unlink()


def _public_keys(folder: Path) -> dict[str, Key]:
    keys = [SSlibKey.from_crypto(_read(path, load_pem_public_key)) for path in sorted(folder.glob("*.pem"))]
    return {key.keyid: key for key in keys}


def _private_key(path: Path) -> Any:
    return _read(path, lambda pem: load_pem_private_key(pem, None))


def _read(path: Path, load: Any) -> Any:
    try:
        return load(path.read_bytes())
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no key in PEM, or it has a password"
        raise ConfigError(f"The key {path} cannot be read: {reason}") from None
