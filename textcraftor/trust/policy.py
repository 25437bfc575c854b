"""The policy of a registered model: what each of its versions must have shown, whatever the settings of the run were.

It is a file of the project, mlflow/policy/NAME.yaml, reviewed and committed like code. A run whose own gate is weaker
cannot register what the policy refuses.
"""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from textcraftor.artifact import written_aside
from textcraftor.config import MATRIX, ORACLE_JUDGES, Config, EvaluateConfig, GateConfig, Positive, Section
from textcraftor.errors import ConfigError
from textcraftor.evaluate.scores import DIVERSITY
from textcraftor.heldout import fingerprint
from textcraftor.layout import POLICIES

HEADER = """\
# What every version of {name} must have shown. Register, promote, serve and `generate` judge by this file alone.
# `textcraftor policy pin` wrote it from {profile}; a change of it is a change of what may go live.
"""


class Policy(Section):
    """Rules and judges of one registered model."""

    gate: GateConfig = Field(description="rules, margins against the champion, least number of prompts")
    judges: dict[str, str] = Field(description="judge -> sha256 of its weights' tensors; empty for one without weights")
    heldout_judges: tuple[str, ...] = Field(description="of the judges, those that nothing may be trained on")
    diversity_judge: str = Field("", description="sha256 of the weights whose features measure `diversity`, for a rule on it")
    images_per_prompt: Annotated[int, Field(ge=2)] = Field(description="at least so many images of each prompt")
    bootstrap: Positive = Field(description="resamples of the prompts for the intervals")
    seed: int = Field(description="of the resampling")

    @model_validator(mode="after")
    def _pins_the_judge_of_diversity(self) -> Self:
        if not self.diversity_judge and _measures_diversity(self.gate):
            raise ValueError(
                "a rule is on diversity, and diversity_judge does not name the weights that measure it. Write the file again "
                "with `textcraftor policy pin --replace`"
            )
        return self

    @property
    def evaluate(self) -> EvaluateConfig:
        """The same as settings of an evaluation."""
        return EvaluateConfig(
            judges=tuple(self.judges),
            heldout_judges=self.heldout_judges,
            images_per_prompt=self.images_per_prompt,
            bootstrap=self.bootstrap,
            seed=self.seed,
        )

    @property
    def digest(self) -> str:
        """sha256 of the content, whatever the file's layout."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()

    @classmethod
    def of(cls, config: Config, root: Path) -> Self:
        """The policy that judges as a run's own gate does. Judges on which no rule depends are left out."""
        gate, judges = config.gate, {}
        needed = {*(rule.judge for rule in gate.rules), gate.rank_by, *gate.champion_margin, *config.evaluate.heldout_judges}
        for name in (judge for judge in config.evaluate.judges if judge in needed):
            reward = config.rewards.get(name.removesuffix(MATRIX))
            judges[name] = fingerprint(reward.at(root)).digest if reward and name not in ORACLE_JUDGES else ""
        measure = config.rewards[config.evaluate.diversity_judge].at(root) if _measures_diversity(config.gate) else None
        return cls(
            gate=config.gate,
            judges=judges,
            heldout_judges=config.evaluate.heldout_judges,
            diversity_judge=fingerprint(measure).digest if measure else "",
            images_per_prompt=config.evaluate.images_per_prompt,
            bootstrap=config.evaluate.bootstrap,
            seed=config.evaluate.seed,
        )

    @classmethod
    def load(cls, name: str, root: Path) -> Self:
        """The policy of a registered model in the project at `root`. Raises ConfigError when it is missing or damaged."""
        path = root / policy_file(name)
        if not path.is_file():
            raise ConfigError(
                f"{name} has no policy ({policy_file(name)}), so nothing can become a version of it. Write the rules that "
                "every version must pass with `textcraftor policy pin`, review and commit the file"
            )
        try:
            return cls.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
        except (yaml.YAMLError, ValidationError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not a policy: {' '.join(str(error).split())[:300]}") from None

    def write(self, name: str, profile: str, root: Path) -> Path:
        """Write the file of the policy; returns its path."""
        path = root / policy_file(name)
        text = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        with written_aside(path) as aside:
            aside.write_text(HEADER.format(name=name, profile=profile) + text, encoding="utf-8")
        return path


def _measures_diversity(gate: GateConfig) -> bool:
    return any(rule.judge == DIVERSITY for rule in gate.rules)


def policy_file(name: str) -> Path:
    """Raises ConfigError for a name that is no file's."""
    if name in ("", ".", "..") or "/" in name or "\\" in name:
        raise ConfigError(f"registry.name = {name!r} cannot be a file's name, and its policy needs one. Choose another")
    return POLICIES / f"{name}.yaml"
