"""The configuration of a run: an immutable model for each section, and the only reader of YAML.

A profile describes a whole run: one of `textcraftor/profiles/NAME.yaml`, `profiles/NAME.yaml` of the workspace, or a file
of your own. `params.yaml` names the profile, selects its mixes and overrides single values. `load` merges and checks them;
every artifact carries the sections that made it. Fractions of the chain (`switch_at`) hold for any number of steps.
"""

from textcraftor.config.ablation import AblationConfig
from textcraftor.config.base import BaseConfig, ChainConfig, PrepareConfig, SamplerConfig, switch_step
from textcraftor.config.blend import ORIGINAL, BlendConfig, Term, Weights, is_term
from textcraftor.config.downloads import Download
from textcraftor.config.judging import MATRIX, MIN_PROMPTS, ORACLE_JUDGES, EvaluateConfig, GateConfig, GateRule, RegistryConfig
from textcraftor.config.profiles import (
    PROFILES,
    load,
    merge,
    parsed,
    profile_file,
    profile_files,
    resolve,
    resolved_yaml,
    written,
)
from textcraftor.config.prompts import FileSource, PromptsConfig, PromptSource, SceneSource
from textcraftor.config.rewards import Mix, RewardConfig
from textcraftor.config.run import Config
from textcraftor.config.section import Fraction, Name, NamedFile, Positive, Section, locate, named_files
from textcraftor.config.training import TrainConfig, TrainUnetConfig, TuneConfig

__all__ = [
    "MATRIX",
    "MIN_PROMPTS",
    "ORACLE_JUDGES",
    "ORIGINAL",
    "PROFILES",
    "AblationConfig",
    "BaseConfig",
    "BlendConfig",
    "ChainConfig",
    "Config",
    "Download",
    "EvaluateConfig",
    "FileSource",
    "Fraction",
    "GateConfig",
    "GateRule",
    "Mix",
    "Name",
    "NamedFile",
    "Positive",
    "PrepareConfig",
    "PromptSource",
    "PromptsConfig",
    "RegistryConfig",
    "RewardConfig",
    "SamplerConfig",
    "SceneSource",
    "Section",
    "Term",
    "TrainConfig",
    "TrainUnetConfig",
    "TuneConfig",
    "Weights",
    "is_term",
    "load",
    "locate",
    "merge",
    "named_files",
    "parsed",
    "profile_file",
    "profile_files",
    "resolve",
    "resolved_yaml",
    "switch_step",
    "written",
]
