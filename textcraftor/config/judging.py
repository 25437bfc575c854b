"""Evaluation of candidates, and the rules for promotion."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from textcraftor.config.section import Positive, Section

MATRIX = "_bxb"  # suffix of a judge that averages the whole prompt-image matrix
# Judges of the tiny world that read the pixels and have no weights (textcraftor.tiny): name -> what it measures.
ORACLE_JUDGES = {
    "oracle": "share of the prompt's claims that hold",
    "oracle_diversity": "how much images of one prompt differ in what it leaves open; 1: as right pictures do",
    "oracle_variety": "how much images of different prompts differ, in the claim that varies least; 1: as right pictures do",
}


class EvaluateConfig(Section):
    """Evaluation of the base and every candidate, on the same prompts and noise."""

    prompts: Positive = Field(512, description="number of held-out prompts")
    images_per_prompt: Annotated[int, Field(ge=2)] = Field(4, description="images of each prompt; diversity needs two")
    batch_size: Positive = Field(16, description="images in one forward pass")
    judges: tuple[str, ...] = Field(
        min_length=1,
        description="names of rewards; in the tiny world `oracle`, `oracle_diversity` and `oracle_variety` too; REWARD_bxb: a "
        "cosine reward's mean over the image with all "
        "prompts instead of its own (the scale of the PickScore in the paper)",
    )
    heldout_judges: tuple[str, ...] = Field(
        (), description="of the judges, those whose weights no mix may train on; the gate needs a rule on one of them"
    )
    diversity_judge: str = Field("clip", description="the reward whose image features measure diversity")
    baseline_prompts: Annotated[int, Field(ge=0)] = Field(
        0,
        description="first held-out prompts on which the cheap rivals of tuning are drawn, one image each: the base at its "
        "best guidance scale and, in the tiny world, reworded prompts. 0: none",
    )
    guidance_scales: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (3.0, 5.0, 10.0),
        description="scales tried for the base beside chain.guidance_scale, on train prompts, half as many as baseline_prompts",
    )
    bootstrap: Positive = Field(10_000, description="resamples of the prompts")
    seed: int = 0


class GateRule(Section):
    """A lower bound for one figure of metrics.json. `judge: diversity` has mean and ratio, other judges the rest."""

    judge: str = Field(description="one of evaluate.judges, or diversity")
    metric: Literal["mean", "delta", "ci_low", "win_rate", "ratio"]
    at_least: float
    why: str = ""


MIN_PROMPTS = 30  # fewer, and a 95 % interval of skewed scores covers clearly less: docs/decisions/scores-and-gate.md


class GateConfig(Section):
    """What a candidate must reach to be promoted."""

    rules: tuple[GateRule, ...] = Field(min_length=1, description="all must hold")
    rank_by: str = Field("heldout", description="among candidates that pass, the one with the highest delta of this judge wins")
    min_prompts: Annotated[int, Field(ge=2)] = Field(
        MIN_PROMPTS, description="no rule passes with fewer prompts: an interval over fewer says too little about chance"
    )
    champion_margin: dict[str, float] = Field(
        default_factory=dict,
        description="judge -> how far below the champion's mean is still non-inferior; null removes the profile's margin",
    )

    @field_validator("champion_margin", mode="before")
    @classmethod
    def _null_removes(cls, margins: Any) -> Any:
        return {judge: value for judge, value in margins.items() if value is not None} if isinstance(margins, dict) else margins


class RegistryConfig(Section):
    """The MLflow registered model that candidates become versions of."""

    name: str = Field(description="name of the registered model")
