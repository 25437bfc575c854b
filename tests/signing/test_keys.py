"""Keys are made once, stay private, and are believed until they are revoked."""

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from textcraftor.errors import ConfigError
from textcraftor.layout import KEYS, TEAM_KEYS
from textcraftor.signing import Keyring


def write_pair(folder: Path, name: str) -> tuple[Path, Path]:
    """Files of a new private key and its public key."""
    key, folder = Ed25519PrivateKey.generate(), folder
    private, public = folder / f"{name}.pem", folder / f"{name}.pub.pem"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return private, public


def test_the_key_of_a_machine_is_made_once_and_is_its_owners_alone(tmp_path: Path) -> None:
    assert Keyring(tmp_path, {}).believed() == {}  # looking makes none
    with ThreadPoolExecutor(8) as pool:
        ids = set(pool.map(lambda _: Keyring(tmp_path, {}).signer().public_key.keyid, range(16)))
    assert len(ids) == 1 and set(Keyring(tmp_path, {}).believed()) == ids
    assert [path.name for path in (tmp_path / KEYS).iterdir()] == ["signing.pem"]
    assert stat.S_IMODE((tmp_path / KEYS / "signing.pem").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / KEYS).stat().st_mode) == 0o700


def test_a_retired_key_is_believed_and_a_revoked_one_never(tmp_path: Path) -> None:
    ring = Keyring(tmp_path, {})
    first = ring.signer().public_key.keyid
    second = ring.rotate()
    assert set(ring.believed()) == {first, second} and ring.signer().public_key.keyid == second
    ring.revoke(first[:10])
    assert set(ring.believed()) == {second} and set(ring.revoked()) == {first}
    ring.revoke(second)
    third = ring.signer().public_key.keyid
    assert third not in (first, second) and set(ring.believed()) == {third}
    with pytest.raises(ConfigError, match=f"'0000' is not the id of one key of this machine. Known: {third[:16]}"):
        ring.revoke("0000")
    with pytest.raises(ConfigError, match="is not the id of one key"):
        ring.revoke("")


def test_with_keys_of_a_team_no_other_is_believed(tmp_path: Path) -> None:
    ring = Keyring(tmp_path, {})
    own = ring.signer().public_key.keyid
    private, public = write_pair(tmp_path, "team")
    (tmp_path / TEAM_KEYS).mkdir(parents=True)
    public.rename(tmp_path / TEAM_KEYS / "team.pem")
    assert own not in ring.believed()
    team = Keyring(tmp_path, {"TEXTCRAFTOR_SIGNING_KEY": str(private)})
    assert set(team.believed()) == {team.signer().public_key.keyid}
    with pytest.raises(ConfigError, match="remove its public key from mlflow/policy/keys/"):
        team.revoke(team.signer().public_key.keyid)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"TEXTCRAFTOR_SIGNING_KEY": "nowhere.pem"}, "The key nowhere.pem cannot be read: No such file"),
        ({"TEXTCRAFTOR_SIGNING_KEY": "awskms:arn:aws:kms:eu"}, "TEXTCRAFTOR_PUBLIC_KEY must name the file"),
        ({"TEXTCRAFTOR_SIGNING_KEY": "nosuch:key", "TEXTCRAFTOR_PUBLIC_KEY": "PUBLIC"}, "nosuch:key cannot be used"),
    ],
)
def test_a_key_that_cannot_be_used_is_named(tmp_path: Path, environment: dict[str, str], message: str) -> None:
    _, public = write_pair(tmp_path, "service")
    environment = {name: value.replace("PUBLIC", str(public)) for name, value in environment.items()}
    with pytest.raises(ConfigError, match=message):
        Keyring(tmp_path, environment).signer()


def test_a_damaged_key_is_named_and_not_replaced(tmp_path: Path) -> None:
    (tmp_path / KEYS).mkdir(parents=True)
    path = tmp_path / KEYS / "signing.pem"
    path.write_text("-----BEGIN PRIVATE KEY-----\n")
    with pytest.raises(ConfigError, match=r"signing.pem cannot be read: it is no key in PEM"):
        Keyring(tmp_path, {}).signer()
    assert path.read_text() == "-----BEGIN PRIVATE KEY-----\n"
