"""When each stage of a workspace last ran: a run in MLflow begins and ends with the work, not with its entry.

DVC keeps no times, and what it takes from its cache has new ones.
"""

import contextlib
import json
from pathlib import Path

from textcraftor.artifact import write_json
from textcraftor.layout import STATE, blend_of, has_tuned_unet, mix_of

FOLDER = Path(STATE) / "stages"


def write(folder: Path, stage: str, started: float, ended: float) -> None:
    """Note that a stage ran.  started, ended: seconds since 1970."""
    write_json(folder / FOLDER / f"{stage}.json", {"started": started, "ended": ended})


def span(folder: Path, candidate: str) -> tuple[float, float] | None:
    """From the start of a candidate's training to the end of its evaluation, in seconds since 1970; None if nobody noted it."""
    times = []
    for stage in _stages(candidate):
        with contextlib.suppress(OSError, ValueError, KeyError):
            noted = json.loads((folder / FOLDER / f"{stage}.json").read_bytes())
            times.append((float(noted["started"]), float(noted["ended"])))
    return (min(started for started, _ in times), max(ended for _, ended in times)) if times else None


def _stages(candidate: str) -> tuple[str, ...]:
    if blend := blend_of(candidate):
        return f"blend@{blend}", f"evaluate-blend@{blend}"
    mix = mix_of(candidate)
    if has_tuned_unet(candidate):
        return f"train-unet@{mix}", f"evaluate-unet@{mix}"
    return f"train@{mix}", f"train-after@{mix}", f"evaluate@{mix}", f"evaluate-after@{mix}"
