"""Random pipelines of each supported family, small enough to run in milliseconds, of exactly the real classes.

What makes a family is kept: SD 2.x predicts the velocity from a wider encoder with plain gelu and its own head sizes;
SDXL hears two encoders, a pooled embedding and six sizes.
"""

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from textcraftor.tiny.recipe.tokenizer import new_tokenizer

NOISE_SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def text_config(width: int, act: str = "quick_gelu", **more: Any) -> CLIPTextConfig:
    tokenizer = new_tokenizer()
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        hidden_act=act,
        **more,
    )


def new_unet(context: int, **more: Any) -> UNet2DConditionModel:
    settings = {
        "sample_size": 4,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": context,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**{**settings, **more})


def new_vae(**more: Any) -> AutoencoderKL:
    settings = {
        "block_out_channels": (8, 8, 8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "sample_size": 32,
    }
    return AutoencoderKL(**{**settings, **more})


def loud(*modules: torch.nn.Module) -> None:
    """Fresh weights hardly hear the prompt: turn it up, so that what is said matters."""
    with torch.no_grad():
        for module in modules:
            for name, parameter in module.named_parameters():
                if parameter.ndim > 1 and any(part in name for part in ("attn2", "embedding", "text_projection")):
                    parameter.mul_(6)


def sd1() -> StableDiffusionPipeline:
    """SD 1.x: predicts the noise; its own scheduler is PNDM."""
    torch.manual_seed(0)
    encoder, unet = CLIPTextModel(text_config(16)), new_unet(16)
    loud(encoder, unet)
    scheduler = PNDMScheduler(**NOISE_SCHEDULE, set_alpha_to_one=False, skip_prk_steps=True)
    return _stable_diffusion(encoder, unet, scheduler)


def sd2() -> StableDiffusionPipeline:
    """SD 2.x: predicts the velocity, from an OpenCLIP encoder that was cut before its last layer."""
    torch.manual_seed(1)
    encoder = CLIPTextModel(text_config(24, "gelu", projection_dim=12))
    unet = new_unet(24, attention_head_dim=(2, 4), use_linear_projection=True)
    loud(encoder, unet)
    scheduler = DDIMScheduler(**NOISE_SCHEDULE, clip_sample=False, set_alpha_to_one=False, prediction_type="v_prediction")
    return _stable_diffusion(encoder, unet, scheduler)


def sdxl(force_zeros: bool = True) -> StableDiffusionXLPipeline:
    """SDXL: two encoders, the second's pooled output, sizes; its own scheduler is Euler."""
    torch.manual_seed(2)
    first, second = (
        CLIPTextModel(text_config(16)),
        CLIPTextModelWithProjection(text_config(24, "gelu", projection_dim=12)),
    )
    unet = new_unet(
        40,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=12 + 6 * 4,
    )
    loud(first, second, unet)
    return StableDiffusionXLPipeline(
        vae=new_vae(scaling_factor=0.13025, force_upcast=True),
        text_encoder=first,
        text_encoder_2=second,
        tokenizer=new_tokenizer(),
        tokenizer_2=new_tokenizer(),
        unet=unet,
        scheduler=EulerDiscreteScheduler(**NOISE_SCHEDULE, timestep_spacing="leading"),
        force_zeros_for_empty_prompt=force_zeros,
        add_watermarker=False,
    )


FAMILIES = {"sd1": sd1, "sd2": sd2, "sdxl": sdxl}


def _stable_diffusion(encoder: CLIPTextModel, unet: UNet2DConditionModel, scheduler: Any) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=new_vae(),
        text_encoder=encoder,
        tokenizer=new_tokenizer(),
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
