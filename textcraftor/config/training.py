"""Training: what is tuned, and how."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from textcraftor.config.section import Fraction, NamedFile, Positive, Section


class TuneConfig(Section):
    """Settings that tuning the text encoder and tuning the UNet share (paper algorithm 1)."""

    gradient: Literal["truncated", "random", "one_step", "stop_gradient"] = Field(
        "truncated",
        description="which denoising steps carry gradient. truncated: the last K (paper). random: the last n, with n drawn "
        "from 1..K at each training step (AlignProp). one_step: one of the last K, whose prediction of x_0 is scored (ReFL). "
        "stop_gradient: K steps spread over the tuned part of the chain, the UNet's latent input detached, so that one step's "
        "activations are in memory at a time (DRTune)",
    )
    grad_steps: Positive = Field(5, description="K, the number of denoising steps that carry gradient (paper: 5)")
    method: Literal["full", "lora"] = Field(
        "full", description="full: every weight; lora: a low-rank update, merged when saved"
    )
    lora_rank: Positive = Field(8, description="rank of the low-rank update")
    lora_alpha: Annotated[float, Field(gt=0)] = Field(
        8.0, description="the low-rank update is scaled by lora_alpha / lora_rank"
    )
    steps: Positive = Field(10_000, description="optimiser steps")
    batch_size: Positive = Field(4, description="micro batch: images in one forward pass of one process")
    accumulation: Positive = Field(1, description="micro batches in one optimiser step")
    decode_size: Positive | None = Field(
        None, description="images decoded and scored at a time, to bound the memory of that part. None: the whole micro batch"
    )
    reward_dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None,
        description="precision of the reward models in training; scores stay float32, and evaluation never uses it. None: the "
        "dtype of each reward",
    )
    learning_rate: Annotated[float, Field(gt=0)] = Field(1e-6, description="AdamW's, after the warm-up")
    warmup_steps: Annotated[int, Field(ge=0)] = Field(0, description="optimiser steps in which the learning rate rises from 0")
    decay: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="how the learning rate falls after the warm-up, to 0 at the last step"
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(1e-2, description="AdamW's")
    max_grad_norm: Annotated[float, Field(gt=0)] = Field(1.0, description="the gradient is clipped to this norm")
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="decay of the moving average of the weights, which is saved instead of the last weights. 0: no average"
    )
    interpolation: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0,
        description="the saved weights lie at this share of the way from the weights that training started from to the trained "
        "ones (WiSE-FT). Below 1, less is forgotten of what the rewards did not ask for, at a smaller gain",
    )
    seed: int = Field(0, description="of the order of the prompts and of random draws")
    checkpoint_every: Positive = Field(50, description="optimiser steps between checkpoints")
    checkpoint_minutes: Annotated[float, Field(gt=0)] | None = Field(
        None, description="minutes after which a checkpoint is written even before checkpoint_every steps"
    )
    grid_every: Positive = Field(50, description="optimiser steps between sample grids")
    gradient_checkpointing: bool = Field(
        False, description="recompute each UNet step in the backward pass: less memory, one more forward pass for each step"
    )
    channels_last: bool = Field(
        False, description="UNet and VAE in the channels-last memory format: faster convolutions, different rounding"
    )
    selective_checkpointing: bool = Field(
        False,
        description="recompute norms, activation functions and attention of UNet and VAE in the backward pass, but no 3 x 3 "
        "convolution: less than half of their activations are saved, for a little time; the same bits",
    )
    compile: bool = Field(
        False, description="torch.compile the UNet and the decoder where they carry gradient: slow to start, then faster"
    )
    activation_budget: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="with compile: share of the activations that is kept; the rest is recomputed, the cheapest first"
    )

    shard: bool = Field(
        False,
        description="under torchrun: shard the frozen and the tuned UNet, its gradient and optimiser state over the processes "
        "(FSDP): less memory, more communication",
    )

    @model_validator(mode="after")
    def _only_plain_modules_are_sharded(self) -> "TuneConfig":
        if self.shard and (self.compile or self.channels_last or self.selective_checkpointing):
            raise ValueError(
                "shard: true gathers the UNet block by block and cannot be combined with compile, channels_last or "
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


class TrainUnetConfig(TuneConfig):
    """Tuning the UNet (paper section 3.3)."""

    encoder: Literal["tuned", "original"] = Field(
        "tuned",
        description="the frozen text encoder that the UNet is tuned on: tuned, the mix's own, or original, the base's. On the "
        "original one, the candidate MIX-unet is a UNet alone, and the mix's encoder need not exist (paper table 1, UNet)",
    )


class TrainConfig(TuneConfig):
    """Tuning the text encoder on prompts alone (paper section 3.2.2)."""

    switch_at: Fraction = Field(
        0.8,
        description="fraction of the chain at which the tuned text encoder takes over in training; the steps before it are "
        "computed once and cached",
    )
    start_from: NamedFile | None = Field(
        None,
        description="folder of a candidate (a trained, downloaded or merged one) whose encoders every mix starts from, in "
        "place of the base's. To start a mix from another mix of this run, see `curriculum`",
    )
    encoders: tuple[Literal["text_encoder", "text_encoder_2"], ...] = Field(
        ("text_encoder",),
        description="text encoders to tune. SDXL has two: text_encoder (CLIP ViT-L) and text_encoder_2 (OpenCLIP bigG). An "
        "empty list with negative_embedding: true tunes the negative embedding alone",
    )
    negative_embedding: bool = Field(
        False, description="tune the unconditional input of guidance, starting from the empty prompt's embedding (ReNeg)"
    )
    negative_learning_rate: Annotated[float, Field(gt=0)] = Field(
        5e-3, description="learning rate of the negative embedding (ReNeg: 5e-3)"
    )
    images_per_prompt: Positive = Field(
        1, description="images of each prompt, from different noise, in the same micro batch. The reward diversity needs two"
    )
    max_prompt_grad_norm: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="the gradient that each image sends to its prompt embeddings is clipped to this norm. Gradients through "
        "many steps explode for single images, which would then decide the direction of the whole batch. None: not clipped",
    )
    num_inference_steps: Positive | None = Field(
        None, description="denoising steps in training; with fewer, K steps cover more of the chain. None: as in sampling"
    )
    allow_without_clip: bool = Field(
        False, description="allow a mix without the CLIP constraint, which collapses (paper figure 6)"
    )

    @model_validator(mode="after")
    def _tunes_something(self) -> "TrainConfig":
        if not self.encoders and not self.negative_embedding:
            raise ValueError("train.encoders is empty and train.negative_embedding false: nothing is tuned. Name one")
        return self
