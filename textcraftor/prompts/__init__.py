"""Prompts: where they come from, how they are cleaned, and which of them training never sees."""

from textcraftor.prompts.curation import CurationSummary, curate
from textcraftor.prompts.table import noise_seed, prompt_id, read_prompts

__all__ = ["CurationSummary", "curate", "noise_seed", "prompt_id", "read_prompts"]
