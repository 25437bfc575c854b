"""The base model and its denoising chain."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from textcraftor.config.section import Fraction, NamedFile, Positive, Section

Scheduler = Annotated[str, Field(pattern=r"^(ddim|dpmsolver|euler|pndm|[A-Z]\w+Scheduler)$")]


class BaseConfig(Section):
    """The base model (SD 1.x, SD 2.x or SDXL): a diffusers pipeline by hub id or folder, or a single-file checkpoint."""

    path: NamedFile = Field(
        description="hub id, diffusers folder, or single-file checkpoint (.safetensors) in the original layout"
    )
    config: NamedFile | None = Field(
        None, description="for a single-file checkpoint: folder or hub id that gives its architecture, tokenizer and scheduler"
    )
    revision: str | None = Field(None, description="commit or branch of the hub repository. None: its main branch")
    resolution: Positive = Field(512, description="width and height of the images, in pixels")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="precision of the frozen UNet and VAE. Text encoders and trained weights are always float32"
    )
    vae_slicing: bool = Field(False, description="decode one image at a time, to save memory")
    vae_gradient_checkpointing: bool = Field(
        False, description="recompute the VAE's blocks in the backward pass, to save memory"
    )
    tiny_vae: NamedFile | None = Field(
        None, description="folder or hub id of an AutoencoderTiny that decodes instead of the base model's VAE"
    )


class ChainConfig(Section):
    """The denoising chain, the same in training and sampling (paper section 4.1: DDIM, 25 steps, guidance 7.5)."""

    scheduler: Scheduler = Field(
        "ddim",
        description="ddim, dpmsolver (DPM-Solver++ multistep), euler, pndm, or the name of a diffusers scheduler that adds no "
        "noise in its steps, such as UniPCMultistepScheduler. Noise schedule and prediction type are the base model's",
    )
    num_inference_steps: Positive = Field(25, description="denoising steps of an image (paper section 4.1)")
    guidance_scale: Annotated[float, Field(ge=1)] = Field(
        7.5, description="weight of classifier-free guidance; 1 is none (paper section 4.1)"
    )


class SamplerConfig(Section):
    """How images are sampled with a tuned text encoder. Training does not depend on this section."""

    switch_at: Fraction = Field(
        0.4,
        description="fraction of the chain at which the tuned text encoder takes over from the frozen one (paper: 10 of 25)",
    )


class PrepareConfig(Section):
    """The prefix cache: latents at the training switch, computed once for all mixes."""

    mode: Literal["cache", "inline"] = Field(
        "cache",
        description="inline: store nothing for the train prompts; training computes the prefixes and text features of each "
        "batch itself. That costs the UNet forward passes up to the switch for each sample, and pays for a single pass over "
        "very many prompts",
    )
    batch_size: Positive = Field(64, description="prompts in one forward pass")
    shard_rows: Positive = Field(
        1024, description="rows of one cache file, a multiple of batch_size. An interruption loses at most one file"
    )
    dtype: Literal["float32", "float16"] = Field(
        "float32", description="of the stored train latents. float16 halves the disk space (SD 1.5: 32 KB a sample) and rounds"
    )
    cpu_threads: Positive | None = Field(
        None, description="CPU threads of this stage, which runs alone. None: the run's cpu_threads"
    )

    @model_validator(mode="after")
    def _batches_fill_shards(self) -> "PrepareConfig":
        if self.shard_rows % self.batch_size:
            nearest = max(1, round(self.shard_rows / self.batch_size)) * self.batch_size
            raise ValueError(
                f"shard_rows = {self.shard_rows} is no multiple of batch_size = {self.batch_size}. Take {nearest}: "
                "a batch may not span two shards, or recomputing one of them would change its numbers"
            )
        return self


def switch_step(switch_at: float, num_inference_steps: int) -> int:
    """The first step that the tuned text encoder conditions: 0.4 of 25 steps is step 10."""
    return round(switch_at * num_inference_steps)
