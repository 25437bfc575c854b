"""A folder with dvc.yaml and params.yaml in which a run happens: the project itself, or one of its variants."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from textcraftor import layout
from textcraftor.config import Config, load


@dataclass(frozen=True)
class Workspace:
    """A folder with dvc.yaml and params.yaml, and the paths of its artifacts."""

    folder: Path

    @cached_property
    def config(self) -> Config:
        """The resolved configuration. Raises ConfigError."""
        return load(self.folder / "params.yaml")

    @property
    def reports(self) -> Path:
        return self.folder / layout.REPORTS

    def report(self, candidate: str) -> Path:
        """Folder with the candidate's metrics.json, grid.png and report.html."""
        return self.folder / layout.report_folder(candidate)

    def metrics(self, candidate: str) -> dict[str, Any]:
        """The candidate's metrics.json."""
        metrics: dict[str, Any] = json.loads((self.report(candidate) / "metrics.json").read_text(encoding="utf-8"))
        return metrics

    def scores(self, candidate: str) -> Path:
        return self.folder / layout.scores_file(candidate)
