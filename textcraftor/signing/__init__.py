"""Signatures: the key that signs on this machine, the keys that are believed, and signed statements."""

from textcraftor.signing.envelope import Statement, open_envelope, sign
from textcraftor.signing.keys import Keyring

__all__ = ["Keyring", "Statement", "open_envelope", "sign"]
