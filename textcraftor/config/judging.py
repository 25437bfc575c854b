"""How candidates are judged, and what promotes one."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from textcraftor.config.section import Positive, Section

MATRIX = "_bxb"  # suffix of a judge that averages the whole prompt-image matrix


class EvaluateConfig(Section):
    """Same prompts, same noise for the base and every candidate."""

    prompts: Positive = 512
    images_per_prompt: Annotated[int, Field(ge=2)] = Field(4, description="diversity needs at least two")
    batch_size: Positive = 16
    judges: tuple[str, ...] = Field(
        min_length=1,
        description="rewards, `oracle` in the tiny world, and REWARD_bxb: a cosine reward's mean over all prompts, "
        "not only the image's own (the scale of the paper's PickScore)",
    )
    heldout_judges: tuple[str, ...] = Field(
        (), description="of the judges, those whose weights no mix may train on; the gate needs a rule on one of them"
    )
    diversity_judge: str = Field("clip", description="the reward whose image features measure diversity")
    bootstrap: Positive = Field(10_000, description="resamples of the prompts")
    seed: int = 0


class GateRule(Section):
    """One bound on one figure of metrics.json; `judge: diversity` has mean, base_mean and ratio."""

    judge: str
    metric: Literal["mean", "delta", "ci_low", "win_rate", "ratio"]
    at_least: float
    why: str = ""


MIN_PROMPTS = 30  # fewer, and a 95 % interval of skewed scores covers clearly less: docs/decisions/scores-and-gate.md


class GateConfig(Section):
    """What a candidate must reach before it may be promoted."""

    rules: tuple[GateRule, ...] = Field(min_length=1)
    rank_by: str = Field("heldout", description="of the candidates that pass, the one with the best delta of this judge wins")
    min_prompts: Annotated[int, Field(ge=2)] = Field(
        MIN_PROMPTS, description="prompts below which no rule passes: an interval over fewer says too little about chance"
    )
    champion_margin: dict[str, float] = Field(
        default_factory=dict,
        description="judge -> how far below the champion's mean is still non-inferior; null removes a margin of the profile",
    )

    @field_validator("champion_margin", mode="before")
    @classmethod
    def _null_removes(cls, margins: Any) -> Any:
        return {judge: value for judge, value in margins.items() if value is not None} if isinstance(margins, dict) else margins


class RegistryConfig(Section):
    """The MLflow registered model that candidates become versions of."""

    name: str
