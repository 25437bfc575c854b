"""The jobs of a table: workspaces that tables share, and the verbs that fill them.

Three kinds: an environment has the base's scores with some way of sampling, a training has tuned weights, and an evaluation
has the scores of the one in the other. Each lies in a folder whose name depends on all that it reads, so that what two rows
have in common is computed once.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from textcraftor.ablation import workspaces
from textcraftor.ablation.rows import TEXT, UNET, Row, Training
from textcraftor.artifact import digest
from textcraftor.candidate import Candidate
from textcraftor.config import Config, merge, named_files, resolve
from textcraftor.errors import PromptError
from textcraftor.layout import (
    ABLATION_STATE,
    BASE,
    CURATED,
    HELDOUT_PROMPTS,
    KEYS,
    LATENTS,
    TRAIN_PROMPTS,
    candidate_name,
    encoder_folder,
    report_folder,
    scores_file,
    scores_signature,
    unet_folder,
)

ABLATED: Final = "ablated"  # the mix and candidate in every workspace
PREVIEWS: Final = 8  # held-out prompts of the sample grids
OWN_FOLDERS: Final = ("profiles", "weights.lock.json", str(CURATED), str(KEYS))


@dataclass(frozen=True)
class Step:
    """One verb with its arguments, and the file that is there once it is done."""

    arguments: tuple[str, ...]
    result: Path


@dataclass(frozen=True)
class Job:
    """A workspace and the verbs that fill it.

    what: for people.  folder: the workspace.  settings: over the run's.  links: as `workspaces.make` takes them.
    kind, size: jobs of one kind take time in proportion to their size.
    """

    what: str
    folder: Path
    settings: Mapping[str, Any]
    links: Mapping[str, Path]
    steps: tuple[Step, ...]
    kind: str
    size: float

    @property
    def remaining(self) -> list[Step]:
        """The steps that are not done; none where the last one is."""
        if (self.folder / self.steps[-1].result).exists():
            return []
        return [step for step in self.steps if not (self.folder / step.result).exists()]


@dataclass(frozen=True)
class Planned:
    """What a row needs, and where its figures are. training, evaluation: None where the row is the base or the run's own."""

    row: Row
    environment: Job
    training: Job | None
    evaluation: Job | None

    @property
    def candidate(self) -> str:
        """Its name in the workspace of its evaluation."""
        tuned_unet = isinstance(self.row.trained, Training) and UNET in self.row.trained.stages
        return candidate_name(ABLATED, tuned_unet) if self.evaluation else BASE

    @property
    def report(self) -> Path:
        """Folder of metrics.json."""
        return (self.evaluation or self.environment).folder / report_folder(self.candidate)

    @property
    def weights(self) -> Candidate:
        """The tuned weights; the base without any."""
        return Candidate.find(self.candidate, self.evaluation.folder) if self.evaluation else Candidate(BASE)

    @property
    def jobs(self) -> list[Job]:
        return [job for job in (self.environment, self.training, self.evaluation) if job]


class Planner:
    """Plans the rows of a run.

    params: what its params.yaml holds.  root: its workspace, where the prompts are curated already.
    Raises PromptError where they are not.
    """

    def __init__(self, params: Mapping[str, Any], root: Path) -> None:
        self.params, self.root = params, root
        self.config = resolve(params, root)
        self._known: dict[str, Config] = {}
        for path in (root / TRAIN_PROMPTS, root / HELDOUT_PROMPTS):
            if not path.is_file():
                raise PromptError(f"{path} is missing. Run `textcraftor curate` first")
        self.prompts = {path: digest(root / path) for path in (TRAIN_PROMPTS, HELDOUT_PROMPTS)}
        own = (*OWN_FOLDERS, *([self.config.profile] if self.config.profile.endswith((".yaml", ".yml")) else []))
        self.links = {name: root / name for name in own} | self._named_files()

    def plan(self, rows: Sequence[Row]) -> list[Planned]:
        """Where each row is trained and evaluated. Every setting is checked here. Raises ConfigError."""
        return [self._plan(row) for row in rows]

    def _plan(self, row: Row) -> Planned:
        environment = self._environment(row)
        if row.trained is None:
            return Planned(row, environment, None, None)
        if isinstance(row.trained, Training):
            training = self._training(row.label, row.trained)
            folder, identity, stages = training.folder, training.folder.name, row.trained.stages
            made = [encoder_folder(ABLATED)] * (TEXT in stages) + [unet_folder(ABLATED)] * (UNET in stages)
            weights = {str(path): folder / path for path in made}
        else:
            training, stages = None, (TEXT,)
            candidate = Candidate.find(row.trained, self.root)
            identity = candidate.digest
            weights = {str(encoder_folder(ABLATED)): self.root / encoder_folder(row.trained)}
        return Planned(row, environment, training, self._evaluation(row, environment, identity, weights, UNET in stages))

    def _environment(self, row: Row) -> Job:
        """The base, sampled as the row is."""
        config = self._resolved(sampling := self._sampling(row))
        key = workspaces.key(
            config,
            self.root,
            *self.prompts.values(),
            sections=("base", "chain", "sampler", "evaluate", "cpu_threads"),
        )
        steps = (
            Step(("prepare",), LATENTS / "heldout/index.json"),
            Step(("evaluate", "--candidate", BASE), report_folder(BASE) / "metrics.json"),
        )
        chain = f"{config.chain.scheduler}, {config.chain.num_inference_steps} steps"
        what = f"base ({chain}, tuned from {config.sampler.switch_at:.2f} of them on)"
        return Job(what, self._folder("environments", key), sampling, self.links, steps, "evaluate", _work(config))

    def _training(self, label: str, training: Training) -> Job:
        settings = merge(
            self._settings(training.mix, UNET in training.stages),
            {
                # Training reads no held-out latents but those of its sample grids.
                "sampler": {"switch_at": 0.0},
                "evaluate": {"prompts": min(PREVIEWS, self.config.prompts.heldout), "images_per_prompt": 2},
                **training.settings,
            },
        )
        config = self._resolved(settings)
        sections = ["base", "chain", "cpu_threads", "train", f"mix.{ABLATED}"]
        sections += ["train_unet"] if UNET in training.stages else []
        key = workspaces.key(config, self.root, *training.stages, *self.prompts.values(), sections=sections)
        results = {TEXT: encoder_folder(ABLATED), UNET: unet_folder(ABLATED)}
        steps = (
            Step(("prepare",), LATENTS / "train/index.json"),
            *(Step((stage, "--mix", ABLATED), results[stage] / "proof.json") for stage in training.stages),
        )
        tunes = [getattr(config, stage.replace("-", "_")) for stage in training.stages]
        size = float(sum(tune.steps * tune.batch_size * tune.accumulation for tune in tunes))
        kind = " + ".join(training.stages)
        return Job(f"train {label}", self._folder("trainings", key), settings, self.links, steps, kind, size)

    def _evaluation(self, row: Row, environment: Job, identity: str, weights: Mapping[str, Path], unet: bool) -> Job:
        mix = row.trained.mix if isinstance(row.trained, Training) else self.config.mix[str(row.trained)]
        settings = merge(self._settings(mix, unet), self._sampling(row))
        shared = (LATENTS, scores_file(BASE), scores_signature(BASE), report_folder(BASE))
        links = {**self.links, **{str(path): environment.folder / path for path in shared}, **weights}
        candidate = candidate_name(ABLATED, unet)
        steps = (Step(("evaluate", "--candidate", candidate), report_folder(candidate) / "metrics.json"),)
        folder = self._folder("evaluations", f"{environment.folder.name}-{identity[:12]}")
        return Job(f"evaluate {row.label}", folder, settings, links, steps, environment.kind, environment.size)

    def _sampling(self, row: Row) -> dict[str, Any]:
        ablation = self.config.ablation
        judged = {
            "prompts": min(ablation.prompts, self.config.prompts.heldout),
            "images_per_prompt": ablation.images_per_prompt,
            "baseline_prompts": 0,
        }
        return merge({"evaluate": judged, "prepare": {"mode": "inline"}}, row.sampling)

    def _settings(self, mix: Mapping[str, float], unet: bool) -> dict[str, Any]:
        """Settings of a workspace with the mix ABLATED beside those of the run, which nothing trains there."""
        return {
            "mixes": [*self.config.mixes, ABLATED],
            "mix": {ABLATED: dict(mix)},
            "unet_mixes": [ABLATED] if unet else [],
            "prepare": {"mode": "inline"},
            "train": {"allow_without_clip": True},
        }

    def _resolved(self, settings: Mapping[str, Any]) -> Config:
        """The run with these settings. Rows have many in common, and to check them takes time."""
        key = json.dumps(settings, sort_keys=True)
        if key not in self._known:
            self._known[key] = resolve(merge(self.params, settings), self.root)
        return self._known[key]

    def _folder(self, kind: str, key: str) -> Path:
        return self.root / ABLATION_STATE / kind / key

    def _named_files(self) -> dict[str, Path]:
        """The files and folders of the workspace that the configuration names, without those that lie in another of them."""
        named = {path.removeprefix("local-dir:") for _, path in named_files(self.config)}
        inside = sorted(path for path in named if not Path(path).is_absolute() and (self.root / path).exists())
        found: list[str] = []
        for path in inside:
            if not any(Path(path).is_relative_to(above) for above in found):
                found.append(path)
        return {path: self.root / path for path in found}


def _work(config: Config) -> float:
    """Size of an evaluation: denoising steps of all its images."""
    return float(config.evaluate.prompts * config.evaluate.images_per_prompt * config.chain.num_inference_steps)
