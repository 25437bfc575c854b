"""Ablations: the paper's tables, measured with the settings of the run (`textcraftor ablate`)."""

from typing import Annotated

from pydantic import Field

from textcraftor.config.rewards import Mix
from textcraftor.config.section import Name, Positive, Section


class AblationConfig(Section):
    """The budget of `textcraftor ablate`. No stage of the pipeline depends on it."""

    steps: Positive = Field(
        1000, description="optimiser steps of each training. Text encoder and UNet together have half of them each"
    )
    batch_size: Positive | None = Field(
        None,
        description="images of an optimiser step, alike for text encoder and UNet. None: train.batch_size x train.accumulation",
    )
    prompts: Positive = Field(512, description="held-out prompts of an evaluation; at most prompts.heldout")
    images_per_prompt: Annotated[int, Field(ge=2)] = Field(2, description="images of each prompt; diversity needs two")
    rewards: dict[Name, Mix] = Field(
        default_factory=dict,
        description="the mixes of one reward each in table 1, by name, with their CLIP constraint. Empty: one for each reward "
        "of the run's first mix, with the weights that it and the constraint have there",
    )
    collapse: Name = Field(
        "aesthetic", description="figure 6: the one of `rewards` that is trained with and without the CLIP constraint"
    )
    points: Positive = Field(
        3,
        description="figure 6: evaluations along the training, the last after all steps, each other one after half of the next",
    )
