"""Errors that a user can cause and correct.

    UserError                 one clear line, exit status 2
    ├── ConfigError           a profile, params.yaml or an option has an impossible value
    ├── PromptError           a prompt source is missing, empty or unreadable
    ├── StoreError            the cache that `prepare` fills is missing, stale or damaged, or does not fit on the disk
    ├── ModelError            weights are missing, truncated or do not fit
    ├── RewardError           a reward is unknown, mis-weighted or got inputs it cannot score
    ├── TrainingError         a run cannot continue (non-finite loss, out of memory, full disk)
    ├── Unproven              a model cannot be used or promoted: it did not pass the gate, or its evidence does not hold
    ├── RankFailure           one rank failed inside a collective operation; the launcher ends the others
    └── Preempted             a run stopped after SIGTERM and wrote its checkpoint: exit status 75, run it again

Every message says what is wrong, the value given, what is allowed and what to do next. Any other exception is a bug and
keeps its traceback.
"""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Base class. The CLI prints the message as one line and exits with `exit_status`."""

    exit_status = 2


class ConfigError(UserError):
    """A profile, params.yaml or an option has an impossible value."""


class PromptError(UserError):
    """A prompt source is missing, empty or unreadable."""


class StoreError(UserError):
    """The cache that `prepare` fills is missing, stale or damaged, or does not fit on the disk."""


class ModelError(UserError):
    """Weights are missing, truncated or do not fit the architecture."""


class RewardError(UserError):
    """A reward is unknown, mis-weighted or got inputs it cannot score."""


class TrainingError(UserError):
    """A run cannot continue: the loss is not finite, or memory or disk space ran out."""


class Unproven(UserError):
    """A model cannot be used or promoted: it did not pass the gate, or its evidence is missing, damaged or forged."""


class RankFailure(UserError):
    """One rank failed inside a collective operation, so no rank can write a checkpoint. The last one on disk is kept."""


class Preempted(UserError):
    """A run stopped after SIGTERM and wrote its checkpoint. 75 is EX_TEMPFAIL of sysexits.h: run it again, it resumes."""

    exit_status = 75


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """The message for an unknown name: it lists the known names and suggests the most similar one."""
    names = sorted(known)
    message = f"Unknown {kind} {name!r}. Known: {', '.join(names)}."
    guess = difflib.get_close_matches(name, names, n=1)
    return f"{message} Did you mean {guess[0]!r}?" if guess else message
