"""The base model and its denoising chain."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from textcraftor.config.section import Fraction, NamedFile, Positive, Section

Scheduler = Annotated[str, Field(pattern=r"^(ddim|dpmsolver|euler|pndm|[A-Z]\w+Scheduler)$")]


class BaseConfig(Section):
    """The base model, SD 1.x, 2.x or SDXL: a diffusers pipeline by hub id or folder, or a single-file checkpoint."""

    path: NamedFile = Field(description="hub id, diffusers folder, or a .safetensors checkpoint of the original layout")
    config: NamedFile | None = Field(
        None, description="single file only: folder or hub id that names architecture and scheduler"
    )
    revision: str | None = None
    resolution: Positive = Field(512, description="pixels; images are square")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="of the frozen UNet and VAE; text encoders and all that is trained are float32"
    )
    vae_slicing: bool = Field(False, description="decode one image at a time: less memory")
    vae_gradient_checkpointing: bool = Field(False, description="recompute the VAE's blocks going back: less memory")
    tiny_vae: NamedFile | None = Field(
        None, description="folder or hub id of an AutoencoderTiny that decodes in the VAE's place"
    )


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


def switch_step(switch_at: float, num_inference_steps: int) -> int:
    """The first step index conditioned by the tuned encoder: 0.4 of 25 steps is step 10."""
    return round(switch_at * num_inference_steps)
