"""What can go wrong through no fault of the code.

    UserError                 one clear line, exit status 2
    ├── ConfigError           a profile, params.yaml or an option says something impossible
    ├── PromptError           a prompt source is missing, empty or unreadable
    ├── StoreError            what `prepare` stores is missing, stale or damaged, or does not fit on the disk
    ├── ModelError            weights are missing, truncated or do not fit
    ├── RewardError           a reward is unknown, mis-weighted or got inputs it cannot score
    ├── TrainingError         a run cannot go on (non-finite loss, no memory, full disk)
    ├── RankFailure           one rank failed inside a collective operation; the launcher ends the others
    └── Preempted             a run stopped after SIGTERM and wrote its checkpoint: exit status 75, run it again

Every message says what was wrong, what was got, what is allowed and what to do next. Anything
that is not a `UserError` is a bug and keeps its traceback.
"""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A fault of the input, not of the code. The CLI prints the one line and exits with this status."""

    exit_status = 2


class ConfigError(UserError):
    """A profile, params.yaml or an option says something impossible."""


class PromptError(UserError):
    """A prompt source is missing, empty or unreadable."""


class StoreError(UserError):
    """What `prepare` stores is missing, stale or damaged, or does not fit on the disk."""


class ModelError(UserError):
    """Weights are missing, truncated or do not fit the architecture."""


class RewardError(UserError):
    """A reward is unknown, mis-weighted or got inputs it cannot score."""


class TrainingError(UserError):
    """A run cannot go on: the loss is not finite, memory or disk does not suffice."""


class RankFailure(UserError):
    """One rank failed inside a collective operation, so no rank can write a checkpoint. The last one on disk is kept."""


class Preempted(UserError):
    """A run stopped after SIGTERM and wrote its checkpoint. 75 is EX_TEMPFAIL of sysexits.h: run it again, it resumes."""

    exit_status = 75


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """The message for a name nobody knows: lists the known ones and the nearest guess."""
    names = sorted(known)
    message = f"Unknown {kind} {name!r}. Known: {', '.join(names)}."
    guess = difflib.get_close_matches(name, names, n=1)
    return f"{message} Did you mean {guess[0]!r}?" if guess else message
