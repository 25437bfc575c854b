"""The configuration of a run: one frozen model a stage, and the only reader of YAML.

A profile (`textcraftor/profiles/NAME.yaml`) describes a whole run; `params.yaml` names the profile,
selects its mixes and overrides single values. `load` merges and checks them once; every artifact
carries the sections that made it. Fractions of the chain (`switch_at`) hold for any number of steps.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from textcraftor.errors import ConfigError, unknown

PROFILES = Path(__file__).parent / "profiles"

MATRIX = "_bxb"  # suffix of a judge that averages the whole prompt-image matrix

SWITCH_HINT = " It is a fraction of the chain: 0.4 is the paper's value for sampling, 0.8 for training."

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
Scheduler = Annotated[str, Field(pattern=r"^(ddim|dpmsolver|euler|pndm|[A-Z]\w+Scheduler)$")]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_]*$")]


class Section(BaseModel):
    """Frozen, and deaf to no key: an unknown key is an error, never ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class SceneSource(Section):
    """Prompts of the tiny world, written by `textcraftor.tiny.language`."""

    kind: Literal["scenes"]
    count: Positive = 4000
    seed: int = 0
    rich_fraction: Fraction = Field(0.6, description="share written in the rich language")


class FileSource(Section):
    """Prompts of a file: plain text (one a line), CSV, TSV, JSON, JSONL or parquet, in UTF-8."""

    kind: Literal["file"]
    path: str
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
    heldout: Positive = Field(512, description="rows kept for evaluation, never trained on")
    max_train: Positive | None = Field(None, description="at most this many train rows")
    seed: int = 0


Sha256 = Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")]


class Download(Section):
    """Files of others that `textcraftor fetch` brings into the folder `to`: from a hub repository, or from a URL."""

    to: str = Field(description="folder in the workspace; where the base, a reward or a prompt source then looks")
    hub: str = Field("", description="repository on the hub, owner/name; instead of url")
    revision: Annotated[str, Field(pattern=r"^([0-9a-f]{40})?$")] = Field(
        "", description="commit of the hub repository, in full: a branch moves"
    )
    url: str = Field("", description="address of the one file, where it lies on no hub")
    files: dict[str, Sha256] = Field(
        min_length=1, description="file -> sha256; empty: recorded in weights.lock.json at the first fetch, and held to it"
    )
    megabytes: Positive = Field(1, description="size of all files, about")
    licence: str = "unknown"

    @model_validator(mode="after")
    def _one_origin(self) -> "Download":
        if bool(self.hub) == bool(self.url):
            raise ValueError(f"give either hub (with revision) or url, got hub {self.hub!r} and url {self.url!r}")
        if self.hub and not self.revision:
            raise ValueError(f"{self.hub} needs its revision: the 40 digits of a commit")
        if self.url and len(self.files) != 1:
            raise ValueError(f"a url is one file, got {len(self.files)} files")
        for path in (self.to, *self.files):
            if Path(path).is_absolute() or ".." in Path(path).parts:
                raise ValueError(f"{path!r} must stay inside the workspace: relative, without '..'")
        return self


class BaseConfig(Section):
    """The base model, SD 1.x, 2.x or SDXL: a diffusers pipeline by hub id or folder, or a single-file checkpoint."""

    path: str = Field(description="hub id, diffusers folder, or a .safetensors checkpoint of the original layout")
    config: str | None = Field(None, description="single file only: folder or hub id that names architecture and scheduler")
    revision: str | None = None
    resolution: Positive = Field(512, description="pixels; images are square")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="of the frozen UNet and VAE; text encoders and all that is trained are float32"
    )
    vae_slicing: bool = Field(False, description="decode one image at a time: less memory")
    vae_gradient_checkpointing: bool = Field(False, description="recompute the VAE's blocks going back: less memory")
    tiny_vae: str | None = Field(None, description="folder or hub id of an AutoencoderTiny that decodes in the VAE's place")


class ChainConfig(Section):
    """The denoising chain (paper section 4.1: DDIM, 25 steps, guidance 7.5); the same in training and sampling."""

    scheduler: Scheduler = Field(
        "ddim",
        description="ddim, dpmsolver (DPM-Solver++ multistep), euler, pndm, or a class of diffusers that draws no noise at its "
        "steps, such as UniPCMultistepScheduler; noise schedule and prediction type are the base's",
    )
    num_inference_steps: Positive = 25
    guidance_scale: Annotated[float, Field(ge=1)] = 7.5


class SamplerConfig(Section):
    """How images are made with a tuned encoder. Nothing here touches training, so nothing here retrains."""

    switch_at: Fraction = Field(
        0.4, description="fraction of the chain at which the tuned encoder takes over (paper: 10 of 25)"
    )


class RewardConfig(Section):
    """One reward model: its kind names the class, its path the weights.

    What is None is not written anywhere: a reward that does not use a field reads the same with and without it.
    """

    kind: str
    path: str = ""
    head: str = Field("", description="aesthetic: the linear stack's safetensors; default PATH/head.safetensors")
    version: str = Field("", description="of the weights; hpsv2: 2.0 or 2.1, which are not comparable")
    tokenizer: str = Field("", description="pickscore, imagereward: folder or hub id of the tokenizer; default PATH")
    licence: str = Field("unknown", description="of the weights")
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="the towers compute in it, scores stay float32; None: float32"
    )
    target: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="detail: rms contrast of each octave; None: 0.05, a photograph's"
    )

    @model_serializer(mode="wrap")
    def _without_what_is_not_set(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in dump(self).items() if value is not None}


class TuneConfig(Section):
    """What tuning the text encoder and tuning the UNet have in common (paper algorithm 1)."""

    grad_steps: Positive = Field(5, description="K: the last denoising steps that carry gradient (paper: 5)")
    steps: Positive = Field(10_000, description="optimiser steps")
    batch_size: Positive = Field(4, description="micro batch, prompts")
    accumulation: Positive = Field(1, description="micro batches an optimiser step")
    learning_rate: Annotated[float, Field(gt=0)] = 1e-6
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    weight_decay: Annotated[float, Field(ge=0)] = 1e-2
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    seed: int = 0
    checkpoint_every: Positive = Field(50, description="optimiser steps between checkpoints")
    grid_every: Positive = Field(50, description="optimiser steps between sample grids")
    gradient_checkpointing: bool = False


class TrainConfig(TuneConfig):
    """Prompt-based fine-tuning of the text encoder (paper section 3.2.2)."""

    switch_at: Fraction = Field(0.8, description="training: the chain before it is the frozen encoder's, and cached")
    encoders: tuple[Literal["text_encoder", "text_encoder_2"], ...] = Field(
        ("text_encoder",),
        min_length=1,
        description="what is tuned; SDXL has two: text_encoder (CLIP ViT-L) and text_encoder_2 (OpenCLIP bigG)",
    )
    num_inference_steps: Positive | None = Field(
        None, description="steps of the training chain; fewer let K of them reach further back. None: as when sampling"
    )
    allow_without_clip: bool = Field(False, description="a mix without the CLIP constraint collapses (paper figure 6)")


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
    diversity_judge: str = Field("clip", description="the reward whose image features measure diversity")
    bootstrap: Positive = Field(2000, description="resamples of the prompts")
    seed: int = 0


class GateRule(Section):
    """One bound on one figure of metrics.json; `judge: diversity` has mean, base_mean and ratio."""

    judge: str
    metric: Literal["mean", "delta", "ci_low", "win_rate", "ratio"]
    at_least: float
    why: str = ""


class GateConfig(Section):
    """What a candidate must reach before it may be promoted."""

    rules: tuple[GateRule, ...] = Field(min_length=1)
    rank_by: str = Field("heldout", description="of the candidates that pass, the one with the best delta of this judge wins")
    champion_margin: dict[str, float] = Field(
        default_factory=dict, description="judge -> how far below the champion's mean is still non-inferior"
    )


class RegistryConfig(Section):
    """The MLflow registered model that candidates become versions of."""

    name: str


class PrepareConfig(Section):
    """The prefix cache: latents at the training switch, computed once for all mixes."""

    mode: Literal["cache", "inline"] = Field(
        "cache",
        description="inline: nothing is stored of the train prompts; training computes each batch's prefixes and text "
        "features itself: the UNet forwards up to the switch for each sample, worth it for one pass over very many prompts",
    )
    batch_size: Positive = 64
    shard_rows: Positive = Field(
        1024, description="rows of a file of the cache, a multiple of batch_size: what is lost when it is interrupted"
    )
    dtype: Literal["float32", "float16"] = Field(
        "float32", description="of the stored train latents. float16 halves the disk (32 KB a sample of SD 1.5), and rounds"
    )
    cpu_threads: Positive | None = Field(None, description="as the run's, for this stage, which runs alone. None: the run's")

    @model_validator(mode="after")
    def _batches_fill_shards(self) -> "PrepareConfig":
        if self.shard_rows % self.batch_size:
            nearest = max(1, round(self.shard_rows / self.batch_size)) * self.batch_size
            raise ValueError(
                f"shard_rows = {self.shard_rows} is no multiple of batch_size = {self.batch_size}. Take {nearest}: "
                "no batch may span two shards, or what is missing would change the numbers"
            )
        return self


Mix = dict[Name, float]


class Config(Section):
    """A whole run, resolved and checked."""

    profile: str
    mixes: tuple[Name, ...] = Field(min_length=1, description="the mixes to train, of those the profile defines")
    unet_mixes: tuple[Name, ...] = Field((), description="of `mixes`, those whose UNet is tuned too")
    prompts: PromptsConfig
    downloads: dict[Name, Download] = Field(
        default_factory=dict, description="what `textcraftor fetch` gets; empty where all is shipped"
    )
    mirror: str = Field("", description="address of a hub mirror; empty: the environment's HF_ENDPOINT, or the hub itself")
    base: BaseConfig
    chain: ChainConfig = ChainConfig()
    sampler: SamplerConfig = SamplerConfig()
    cpu_threads: Positive | None = Field(
        None, description="threads of a CPU run; fixed, because sums in another order are other bytes. None: all cores"
    )
    rewards: dict[Name, RewardConfig]
    mix: dict[Name, Mix]
    prepare: PrepareConfig = PrepareConfig()
    train: TrainConfig = TrainConfig()
    train_unet: TuneConfig = TuneConfig()
    evaluate: EvaluateConfig
    gate: GateConfig
    registry: RegistryConfig

    @model_validator(mode="after")
    def _facts_across_sections(self) -> "Config":
        for name in self.mixes:
            if name not in self.mix:
                raise ValueError(f"mixes: {unknown('mix', name, self.mix)}")
            self._check_mix(name, self.mix[name])
        for name in self.unet_mixes:
            if name not in self.mixes:
                raise ValueError(f"unet_mixes: {unknown('mix', name, self.mixes)}")
        known = {*self.rewards, *(name + MATRIX for name in self.rewards), "oracle"}
        for judge in (*self.evaluate.judges, *self.gate.champion_margin):
            if judge not in known:
                raise ValueError(unknown("judge", judge, known))
        if self.gate.rank_by not in self.evaluate.judges:
            raise ValueError(f"gate.rank_by: {unknown('judge', self.gate.rank_by, self.evaluate.judges)}")
        for rule in self.gate.rules:
            if rule.judge != "diversity" and rule.judge not in self.evaluate.judges:
                raise ValueError(f"gate.rules: {unknown('judge', rule.judge, {*self.evaluate.judges, 'diversity'})}")
            if (rule.metric == "ratio") != (rule.judge == "diversity") and rule.metric != "mean":
                raise ValueError(
                    f"gate.rules: {rule.judge} has no {rule.metric}. Diversity has mean and ratio, a judge the rest"
                )
        for name in (*self.evaluate.judges, *(reward for mix in self.mix.values() for reward in mix)):
            if name in self.rewards and self.rewards[name].kind == "vae":
                raise ValueError(f"{name} (kind vae) scores no picture: it may be evaluate.diversity_judge, no judge or reward")
        if self.evaluate.diversity_judge not in self.rewards:
            raise ValueError(unknown("reward", self.evaluate.diversity_judge, self.rewards))
        if self.evaluate.prompts > self.prompts.heldout:
            raise ValueError(
                f"evaluate.prompts = {self.evaluate.prompts} is more than prompts.heldout = {self.prompts.heldout}"
            )
        steps = self.train_chain.num_inference_steps
        tuned_steps = steps - switch_step(self.train.switch_at, steps)
        for section, tune in (("train", self.train), ("train_unet", self.train_unet)):
            if tune.grad_steps > tuned_steps:
                raise ValueError(
                    f"{section}.grad_steps = {tune.grad_steps} is more than the {tuned_steps} steps that "
                    f"train.switch_at = {self.train.switch_at} leaves of {steps}"
                )
        return self

    def _check_mix(self, name: str, weights: Mix) -> None:
        for reward in weights:
            if reward not in self.rewards:
                raise ValueError(f"mix.{name}: {unknown('reward', reward, self.rewards)}")
        constrained = any(self.rewards[r].kind == "clip" and w > 0 for r, w in weights.items())
        if not constrained and not self.train.allow_without_clip:
            raise ValueError(
                f"mix.{name} has no CLIP constraint (a reward of kind 'clip' with weight > 0). Without it a single "
                "reward collapses the model (paper figure 6). Add one, or set train.allow_without_clip: true"
            )

    @property
    def train_chain(self) -> ChainConfig:
        """The chain as training runs it: `chain`, with `train.num_inference_steps` where that is set."""
        steps = self.train.num_inference_steps or self.chain.num_inference_steps
        return self.chain.model_copy(update={"num_inference_steps": steps})

    @property
    def candidates(self) -> tuple[str, ...]:
        """Every candidate of the run, the base excluded: each mix, then each mix with its UNet."""
        return (*self.mixes, *(f"{mix}-unet" for mix in self.unet_mixes))


def switch_step(switch_at: float, num_inference_steps: int) -> int:
    """The first step index conditioned by the tuned encoder: 0.4 of 25 steps is step 10."""
    return round(switch_at * num_inference_steps)


def load(params: Path | str = "params.yaml", overrides: Mapping[str, Any] | None = None, profile: str | None = None) -> Config:
    """Resolve a run: the profile, overlaid by `params`, overlaid by `overrides` (nested mappings).

    profile: instead of the one that `params` names. What `params` overrides belongs to the profile it names: another
    one starts without it, and then the file need not even exist.
    Raises ConfigError when a file is missing or not YAML, a key is unknown or a value impossible.
    """
    written = _read(Path(params)) if profile is None or Path(params).exists() else {}
    if profile is not None and profile != written.get("profile", "tiny"):
        written = {"profile": profile}
    chosen = merge(written, overrides or {})
    profile = chosen.get("profile", "tiny")
    known = {path.stem: path for path in PROFILES.glob("*.yaml")}
    if profile not in known:
        raise ConfigError(unknown("profile", str(profile), known))
    try:
        return Config.model_validate({**merge(_read(known[profile]), chosen), "profile": profile})
    except ValidationError as error:
        raise ConfigError(_one_line(error)) from None


def resolved_yaml(config: Section) -> str:
    """The configuration as YAML, every default spelled out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _read(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist. Run from the project's root, or name the file with --params") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML in UTF-8: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must be a mapping of sections, got {type(data).__name__}")
    return data


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Overlay nested mappings; anything else replaces (a list is never merged)."""
    merged = dict(below)
    for key, value in above.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def _one_line(error: ValidationError) -> str:
    """Pydantic's report as one line: where, what was got, what is allowed."""
    first, *rest = error.errors(include_url=False)
    where = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        return unknown("key", where, _keys_at(first["loc"])) + _more(rest)
    got = f" (got {first['input']!r})" if not isinstance(first["input"], dict) else ""
    hint = SWITCH_HINT if where.endswith("switch_at") else ""
    return f"{where}: {message}{got}.{hint}{_more(rest)}" if where else message + _more(rest)


def _more(rest: list[Any]) -> str:
    return f" ({len(rest)} more fault{'s' if len(rest) > 1 else ''})" if rest else ""


def _keys_at(loc: tuple[int | str, ...]) -> list[str]:
    """The full names of the keys allowed beside the unknown one, as far as the path is made of sections."""
    model: Any = Config
    for part in loc[:-1]:
        field = model.model_fields.get(part) if isinstance(part, str) else None
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, Section)):
            return []
        model = field.annotation
    prefix = "".join(f"{part}." for part in loc[:-1])
    return [prefix + name for name in model.model_fields]
