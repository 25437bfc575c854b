"""Prompts: reading sources, cleaning, deduplication, and the split into train and held-out."""

from textcraftor.prompts.curation import CurationSummary, curate
from textcraftor.prompts.table import noise_seed, prompt_id, read_prompts

__all__ = ["CurationSummary", "curate", "noise_seed", "prompt_id", "read_prompts"]
