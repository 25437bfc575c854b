"""Where a workspace keeps its artifacts, and what its candidates are called. Every path is relative to the workspace root."""

from pathlib import Path
from typing import Final

# Shipped with the project, or written by its owner.
TINY: Final = Path("data/tiny")
EXPECTATIONS: Final = Path("data/expectations")
POLICIES: Final = Path("mlflow/policy")  # what a version of a registered model must have shown
TEAM_KEYS: Final = POLICIES / "keys"  # public keys of those whose signatures count

# Made by the stages.
RESOLVED: Final = Path("data/resolved.json")  # the configuration with the digests of the files that it names
PROMPT_SOURCES: Final = Path("data/prompts/sources")  # prompt files that a run was given
CURATED: Final = Path("data/prompts/curated")
TRAIN_PROMPTS: Final = CURATED / "train.parquet"
HELDOUT_PROMPTS: Final = CURATED / "heldout.parquet"
VALIDATION: Final = Path("data/prompts/validation.json")
VALIDATION_PAGE: Final = Path("data/prompts/validation.html")
LATENTS: Final = Path("data/latents")
ENCODERS: Final = Path("data/encoders")
UNETS: Final = Path("data/unets")
BLENDS: Final = Path("data/blends")
SCORES: Final = Path("data/scores")
REPORTS: Final = Path("data/reports")
GATE_RECORD: Final = REPORTS / "gate.json"

# Written for readers, and committed.
ABLATIONS_PAGE: Final = Path("docs/ablations.md")
ABLATIONS: Final = Path("docs/ablations")  # a folder for each table

# Working files that no stage depends on: checkpoints, partial downloads, caches.
STATE: Final = Path(".textcraftor")
DIGESTS: Final = STATE / "digests.json"  # of files that have not changed since
TRAINING_STATE: Final = STATE / "training"
TRAINING_LOCKS: Final = STATE / "locks"
PARTIAL_DOWNLOADS: Final = STATE / "downloads"
RANDOM_WEIGHTS: Final = STATE / "random-weights"
KEYS: Final = STATE / "keys"  # that sign on this machine
VERIFIED: Final = STATE / "verified"  # copies that a process has verified and loads from
ABLATION_STATE: Final = STATE / "ablations"  # workspaces of trainings and evaluations, which tables share
TINY_STATE: Final = STATE / "tiny"

BASE: Final = "base"  # the untuned model, which every other candidate is compared with
_UNET_SUFFIX: Final = "-unet"  # names of mixes hold no hyphen
_BLEND_PREFIX: Final = "blend-"


def candidate_name(mix: str, unet: bool = False) -> str:
    """The candidate trained on a mix: its text encoder, or with `unet` its text encoder and its UNet."""
    return mix + _UNET_SUFFIX if unet else mix


def mix_of(candidate: str) -> str:
    """The mix that a candidate was trained on, by the candidate's name; empty for a blend."""
    return "" if blend_of(candidate) else candidate.removesuffix(_UNET_SUFFIX)


def has_tuned_unet(candidate: str) -> bool:
    """Whether a candidate's UNet is tuned too, by the candidate's name."""
    return candidate.endswith(_UNET_SUFFIX)


def blend_candidate(blend: str) -> str:
    """The candidate that a saved blend is."""
    return _BLEND_PREFIX + blend


def blend_of(candidate: str) -> str:
    """The saved blend that a candidate is, by the candidate's name; empty for any other."""
    return candidate.removeprefix(_BLEND_PREFIX) if candidate.startswith(_BLEND_PREFIX) else ""


def blend_folder(blend: str) -> Path:
    """Output of `blend --save BLEND`: blend.json, proof.json, and parts/ or the merged modules."""
    return BLENDS / blend


def candidate_folder(candidate: str) -> Path:
    """Where a candidate's encoders are: the output of `train` or of `blend`."""
    return blend_folder(blend) if (blend := blend_of(candidate)) else encoder_folder(mix_of(candidate))


def encoder_folder(mix: str) -> Path:
    """Output of `train --mix MIX`: text_encoder/, negative_embedding/, proof.json, training.dsse.json, history.csv, grids/."""
    return ENCODERS / mix


def unet_folder(mix: str) -> Path:
    """Output of `train-unet --mix MIX`: unet/, proof.json, training.dsse.json, history.csv, grids/."""
    return UNETS / mix


def training_state(stage: str, mix: str) -> Path:
    """Checkpoints of the unfinished runs of a stage (`train`, `train-unet`) on a mix, a folder for each run."""
    return TRAINING_STATE / f"{stage}@{mix}"


def training_lock(stage: str, mix: str) -> Path:
    """The file that a stage (`train`, `train-unet`) holds locked while it trains a mix."""
    return TRAINING_LOCKS / f"{stage}@{mix}"


def scores_file(candidate: str) -> Path:
    """Scores of each image of a candidate, with their proof."""
    return SCORES / f"{candidate}.parquet"


def scores_signature(candidate: str) -> Path:
    """The signed statement about `scores_file(candidate)`."""
    return SCORES / f"{candidate}.dsse.json"


def report_folder(candidate: str) -> Path:
    """metrics.json, grid.png and report.html of a candidate."""
    return REPORTS / candidate
