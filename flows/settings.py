"""Settings of a run; Prefect's UI shows them as a form."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from textcraftor.config import profile_files

# The form offers the shipped profiles and those in the project's own `profiles/`, as they were at deployment.
Profile = Annotated[str, Field(json_schema_extra={"enum": sorted(profile_files(Path()))})]


class RunSettings(BaseModel):
    """Empty fields are as in params.yaml. Other values run in a variant workspace under runs/; no tracked file is edited."""

    model_config = ConfigDict(extra="forbid")

    profile: Profile | None = Field(
        None, title="Profile", description="Base model, rewards and sizes. Empty: the profile that params.yaml names."
    )
    prompts: str | None = Field(
        None,
        title="Prompts",
        description="A file of prompts in the project: .txt (one a line), .csv, .tsv, .json, .jsonl or .parquet.",
    )
    mixes: list[str] | None = Field(
        None, title="Reward mixes", description="Mixes of the profile to train. Empty: those that params.yaml names."
    )
    tune_unet: bool = Field(
        False,
        title="Tune the UNet too",
        description="Adds a candidate MIX-unet for each mix: its UNet, tuned on the frozen tuned text encoder.",
    )
    promote: Literal["auto", "review", "manual", "never"] = Field(
        "auto",
        title="Promotion",
        description="auto: a candidate that passes the gate and is no worse than the champion replaces it. "
        "review: the run waits until a person has filled in the form behind Resume on its page. "
        "manual: it becomes `challenger` until a person runs the deployment promote/champion. "
        "never: nothing is registered.",
    )
    overrides: dict[str, Any] = Field(
        default_factory=dict,
        title="Overrides",
        description='Single values that replace those of the profile, as in params.yaml: {"train": {"steps": 300}}.',
    )
