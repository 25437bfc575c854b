"""What is tuned, and how."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from textcraftor.config.section import Fraction, Positive, Section


class TuneConfig(Section):
    """What tuning the text encoder and tuning the UNet have in common (paper algorithm 1)."""

    gradient: Literal["truncated", "random", "one_step", "stop_gradient"] = Field(
        "truncated",
        description="which denoising steps carry gradient: the last K (paper); the last 1..K, drawn for each step of "
        "training (AlignProp); one of the last K, x_0 predicted from it (ReFL); K spread over the tuned part of the "
        "chain with the UNet's latent input detached, one UNet graph in memory at a time (DRTune)",
    )
    grad_steps: Positive = Field(5, description="K: the denoising steps that carry gradient (paper: the last 5)")
    method: Literal["full", "lora"] = Field("full", description="every weight, or a low-rank update, merged when saved")
    lora_rank: Positive = Field(8, description="rank of the low-rank update")
    lora_alpha: Annotated[float, Field(gt=0)] = Field(8.0, description="the update is scaled by lora_alpha / lora_rank")
    steps: Positive = Field(10_000, description="optimiser steps")
    batch_size: Positive = Field(4, description="micro batch, prompts of one process")
    accumulation: Positive = Field(1, description="micro batches an optimiser step")
    decode_size: Positive | None = Field(
        None, description="images decoded and scored at a time, which bounds that part's memory. None: the micro batch"
    )
    reward_dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None,
        description="the rewards' towers compute in it in training, scores stay float32; judges never do. None: as each says",
    )
    learning_rate: Annotated[float, Field(gt=0)] = 1e-6
    warmup_steps: Annotated[int, Field(ge=0)] = Field(0, description="steps over which the learning rate rises from 0")
    decay: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="of the learning rate after the warm-up, down to 0 at the last step"
    )
    weight_decay: Annotated[float, Field(ge=0)] = 1e-2
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="of the moving average of the weights that is saved instead of the last ones. 0: none"
    )
    seed: int = 0
    checkpoint_every: Positive = Field(50, description="optimiser steps between checkpoints")
    checkpoint_minutes: Annotated[float, Field(gt=0)] | None = Field(
        None, description="minutes after which a checkpoint is written even before checkpoint_every steps"
    )
    grid_every: Positive = Field(50, description="optimiser steps between sample grids")
    gradient_checkpointing: bool = Field(
        False, description="recompute each UNet step in the backward pass: less memory, one more UNet forward a step"
    )
    channels_last: bool = Field(
        False, description="UNet and VAE in the channels-last memory format: faster convolutions, other rounding"
    )
    selective_checkpointing: bool = Field(
        False,
        description="recompute norms, activation functions and attention of UNet and VAE in the backward pass, but no 3 x 3 "
        "convolution: less than half of their activations are saved, for a little time; the same bits",
    )
    compile: bool = Field(
        False, description="torch.compile of UNet and decoder where they carry gradient: minutes at the start, then faster"
    )
    activation_budget: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="with compile: the share of activations kept; the rest is recomputed, the cheapest first"
    )

    shard: bool = Field(
        False,
        description="under torchrun: split the UNet, frozen and tuned, with its gradient and optimiser state over the "
        "processes (FSDP): less memory, more traffic",
    )

    @model_validator(mode="after")
    def _shards_plain_modules(self) -> "TuneConfig":
        if self.shard and (self.compile or self.channels_last or self.selective_checkpointing):
            raise ValueError(
                "shard: true gathers the UNet block by block, which goes with none of compile, channels_last and "
                "selective_checkpointing. Set them to false"
            )
        return self

    @model_validator(mode="after")
    def _one_way_of_recomputing(self) -> "TuneConfig":
        if self.compile and self.selective_checkpointing:
            raise ValueError(
                "compile chooses by itself what to recompute (activation_budget), so it does not go with "
                "selective_checkpointing. Set one of them to false"
            )
        return self

    @model_validator(mode="after")
    def _warm_up_fits(self) -> "TuneConfig":
        if self.decay != "constant" and self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps = {self.warmup_steps} leaves no step of {self.steps} to decay over")
        return self


class TrainConfig(TuneConfig):
    """Prompt-based fine-tuning of the text encoder (paper section 3.2.2)."""

    switch_at: Fraction = Field(0.8, description="training: the chain before it is the frozen encoder's, and cached")
    encoders: tuple[Literal["text_encoder", "text_encoder_2"], ...] = Field(
        ("text_encoder",),
        description="what is tuned; SDXL has two: text_encoder (CLIP ViT-L) and text_encoder_2 (OpenCLIP bigG). "
        "None of them with negative_embedding: true leaves the text encoder frozen",
    )
    negative_embedding: bool = Field(
        False, description="tune the unconditional input of guidance, starting as the empty prompt's embedding (ReNeg)"
    )
    negative_learning_rate: Annotated[float, Field(gt=0)] = Field(5e-3, description="of the negative embedding (ReNeg: 5e-3)")
    images_per_prompt: Positive = Field(
        1, description="noises of each prompt, whose images share a micro batch; the reward diversity needs two"
    )
    num_inference_steps: Positive | None = Field(
        None, description="steps of the training chain; fewer let K of them reach further back. None: as when sampling"
    )
    allow_without_clip: bool = Field(False, description="a mix without the CLIP constraint collapses (paper figure 6)")

    @model_validator(mode="after")
    def _tunes_something(self) -> "TrainConfig":
        if not self.encoders and not self.negative_embedding:
            raise ValueError("train.encoders is empty and train.negative_embedding false: nothing is tuned. Name one")
        return self
