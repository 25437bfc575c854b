"""Where prompts come from, and what curation makes of them."""

from typing import Annotated, Literal

from pydantic import Field

from textcraftor.config.section import Fraction, NamedFile, Positive, Section


class SceneSource(Section):
    """Prompts of the tiny world, written by `textcraftor.tiny.language`."""

    kind: Literal["scenes"]
    count: Positive = 4000
    seed: int = 0
    rich_fraction: Fraction = Field(0.6, description="share written in the rich language")


class FileSource(Section):
    """Prompts of a file: plain text (one a line), CSV, TSV, JSON, JSONL or parquet, in UTF-8."""

    kind: Literal["file"]
    path: NamedFile
    column: str = Field("prompt", description="column or key that holds the prompt; case does not matter")
    licence: str = "unknown"
    held_out: bool = Field(False, description="evaluate on these prompts alone, and train on none of them")
    origin: str = Field("", description="where to get the file; said when it is missing")


PromptSource = Annotated[SceneSource | FileSource, Field(discriminator="kind")]


class PromptsConfig(Section):
    """Curation: sources -> clean, dedupe, classify, split."""

    sources: tuple[PromptSource, ...] = Field(min_length=1)
    benchmarks: tuple[FileSource, ...] = Field((), description="prompts that must never leak into train")
    world: Literal["any", "tiny"] = Field("any", description="tiny: keep only scenes of the tiny world")
    min_characters: Positive = 3
    max_characters: Positive = 1000
    blocklist: tuple[str, ...] = Field((), description="whole words; a prompt that holds one is dropped")
    near_duplicate: Annotated[float, Field(gt=0, le=1)] = Field(
        0.9, description="Jaccard similarity from which two prompts are one; 1: exact only"
    )
    heldout_share: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.2,
        description="share of all prompts that is held out, chosen by each prompt's hash with `seed`. Settle both before the "
        "first training: they alone decide which prompts are never trained on. 0.001 is enough of millions of prompts. "
        "Without effect where a source is marked held_out",
    )
    heldout: Positive = Field(512, description="at most this many of the held-out prompts are evaluated on")
    max_train: Positive | None = Field(None, description="at most this many train rows")
    seed: int = 0
