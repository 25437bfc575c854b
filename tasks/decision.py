"""How a run ended. It stands apart from what decides, so that what only prints it does not wait for MLflow."""

from typing import Literal

from pydantic import BaseModel


class Decision(BaseModel):
    """How a run ended for its best candidate."""

    verdict: Literal["promoted", "champion stays", "challenger", "judged", "not promoted"]
    why: str
    candidate: str | None = None
    version: int | None = None
    digest: str | None = None
    folder: str = ""
    page: str | None = None
    worse: str = ""  # what got worse than the base, in a sentence
