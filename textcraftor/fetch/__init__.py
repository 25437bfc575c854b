"""Fetching other people's weights and data: pinned, resumable, verified, never unpickled.

The profile's `downloads` say what to get: a commit of a hub repository or a URL, file by file, with the sha256 where it is
known. `weights.lock.json` records what was fetched, so that every later fetch, on any machine, gets the same bytes or fails.
"""

from textcraftor.fetch.files import RequiredFile, missing_files, require, required_files
from textcraftor.fetch.lock import LOCK, mismatch, read_lock
from textcraftor.fetch.run import Fetched, fetch

__all__ = [
    "LOCK",
    "Fetched",
    "RequiredFile",
    "fetch",
    "mismatch",
    "missing_files",
    "read_lock",
    "require",
    "required_files",
]
