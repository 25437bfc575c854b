"""What a run can be told; this is the form in Prefect's UI."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from textcraftor.config import profile_files

# The form offers the shipped profiles and those in the project's own `profiles/`, as they were at deployment.
Profile = Annotated[str, Field(json_schema_extra={"enum": sorted(profile_files(Path()))})]


class RunSettings(BaseModel):
    """Empty means: as params.yaml says. Anything else makes a variant under runs/, no tracked file is edited."""

    model_config = ConfigDict(extra="forbid")

    profile: Profile | None = Field(
        None, title="Profile", description="Base model, rewards and sizes; empty: the one params.yaml names."
    )
    prompts: str | None = Field(
        None,
        title="Prompts",
        description="Your prompts: a .txt (one a line), .csv, .tsv, .json, .jsonl or .parquet in the project.",
    )
    mixes: list[str] | None = Field(
        None, title="Reward mixes", description="The mixes to train side by side, of those the profile defines."
    )
    tune_unet: bool = Field(
        False,
        title="Tune the UNet too",
        description="Adds a candidate MIX-unet for each mix, on its frozen tuned encoder.",
    )
    promote: Literal["auto", "manual", "never"] = Field(
        "auto",
        title="Promotion",
        description="auto: what passes the gate and is no worse than the champion takes its place. "
        "manual: it becomes `challenger`, and the deployment promote/champion waits for a person. "
        "never: nothing is registered.",
    )
    overrides: dict[str, Any] = Field(
        default_factory=dict,
        title="Overrides",
        description='Single values over the profile, as in params.yaml: {"train": {"steps": 300}}.',
    )
