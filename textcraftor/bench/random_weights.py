"""Checkpoints of the published architectures and file formats, with random weights: what no hub is needed for.

    python -m textcraftor.bench.random_weights FOLDER            # 12 GB
    python -m textcraftor.bench.random_weights FOLDER --small    # the same layout in a few MB, for the tests

FOLDER/base: Stable Diffusion 1.5 as a diffusers folder, fp32.  FOLDER/pickscore: transformers CLIPModel ViT-H/14.
FOLDER/hpsv2: HPS_v2.1_compressed.pt, an open_clip ViT-H-14 (small: an open_clip folder, since a bare .pt always means
that architecture).  FOLDER/aesthetic: CLIP ViT-L/14's image tower and LAION's head.  FOLDER/clip: an open_clip folder
of ViT-g-14.  The rewards are in half precision, as HPSv2 and the CLIP models are published.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import open_clip
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import save_file
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from textcraftor.config import Config, RewardConfig
from textcraftor.errors import ConfigError

VOCABULARY = 49408  # CLIP's own
HEAD = ((768, 1024), (1024, 128), (128, 64), (64, 16), (16, 1))
# What --small changes of an architecture; everything else stays as published.
SMALL_TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL_OPEN_CLIP = {
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": VOCABULARY, "width": 16, "heads": 2, "layers": 2},
}


def tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer, from the vocabulary that open_clip ships."""
    shipped = SimpleTokenizer()
    tokens = {token.replace("<start_of_text>", "<|startoftext|>").replace("<end_of_text>", "<|endoftext|>"): number
              for token, number in shipped.encoder.items()}  # fmt: skip
    return CLIPTokenizer(vocab=tokens, merges=list(shipped.bpe_ranks), model_max_length=77)


def write_base(folder: Path, small: bool = False) -> None:
    """Stable Diffusion 1.5: CLIP ViT-L/14 text encoder, 860 M UNet, KL autoencoder."""
    torch.manual_seed(0)
    ends = {"bos_token_id": VOCABULARY - 2, "eos_token_id": VOCABULARY - 1, "pad_token_id": VOCABULARY - 1}
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    unet: dict[str, Any] = {"block_out_channels": (320, 640, 1280, 1280), "attention_head_dim": 8, "sample_size": 64}
    vae: dict[str, Any] = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 512}
    if small:
        text |= SMALL_TOWER
        unet |= {"block_out_channels": (8, 16, 16, 16), "attention_head_dim": 4, "sample_size": 8, "norm_num_groups": 4}
        vae |= {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "sample_size": 64, "norm_num_groups": 4}
    pipe = StableDiffusionPipeline(
        text_encoder=CLIPTextModel(CLIPTextConfig(vocab_size=VOCABULARY, max_position_embeddings=77, **ends, **text)),
        tokenizer=tokenizer(),
        unet=UNet2DConditionModel(cross_attention_dim=text["hidden_size"], **unet),
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4,
            **vae,
        ),
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)


def write_pickscore(folder: Path, small: bool = False) -> None:
    """A transformers CLIPModel ViT-H/14 with its processor and tokenizer."""
    torch.manual_seed(1)
    text = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    vision = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
    vision |= {"image_size": 224, "patch_size": 14}
    if small:
        text |= SMALL_TOWER
        vision |= {**SMALL_TOWER, "image_size": 32, "patch_size": 8}
    ends = {"bos_token_id": VOCABULARY - 2, "eos_token_id": VOCABULARY - 1, "pad_token_id": VOCABULARY - 1}
    config = CLIPConfig(
        text_config={**text, **ends, "vocab_size": VOCABULARY, "hidden_act": "gelu"},
        vision_config={**vision, "hidden_act": "gelu"},
        projection_dim=text["hidden_size"],
        logit_scale_init_value=4.6052,
    )
    CLIPModel(config).half().save_pretrained(folder)
    size = vision["image_size"]
    CLIPImageProcessor(size={"shortest_edge": size}, crop_size=size).save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def write_hpsv2(folder: Path, small: bool = False) -> None:
    """HPS_v2.1_compressed.pt: {"state_dict": an open_clip ViT-H-14 in half precision}."""
    torch.manual_seed(2)
    if small:
        _write_open_clip(folder, {"embed_dim": 16, **SMALL_OPEN_CLIP})
        return
    folder.mkdir(parents=True)
    model = open_clip.create_model("ViT-H-14", load_weights=False).half()
    torch.save({"epoch": 0, "state_dict": model.state_dict()}, folder / "HPS_v2.1_compressed.pt")


def write_aesthetic(folder: Path, small: bool = False) -> None:
    """The image tower of OpenAI's CLIP ViT-L/14 (quick-GELU) and the linear stack of LAION's predictor."""
    torch.manual_seed(3)
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    vision |= {"image_size": 224, "patch_size": 14}
    if small:
        vision |= {**SMALL_TOWER, "image_size": 32, "patch_size": 8}
    config = CLIPVisionConfig(projection_dim=768, hidden_act="quick_gelu", **vision)
    CLIPVisionModelWithProjection(config).half().save_pretrained(folder)
    layers: dict[str, torch.Tensor] = {}
    for index, (fan_in, fan_out) in zip((0, 2, 4, 6, 7), HEAD, strict=True):
        linear = nn.Linear(fan_in, fan_out)
        layers |= {f"layers.{index}.weight": linear.weight.detach(), f"layers.{index}.bias": linear.bias.detach()}
    save_file(layers, folder / "head.safetensors")


def write_clip(folder: Path, small: bool = False) -> None:
    """An open_clip folder: ViT-g-14, the published CLIP constraint."""
    torch.manual_seed(4)
    config = {"embed_dim": 16, **SMALL_OPEN_CLIP} if small else open_clip.get_model_config("ViT-g-14")
    _write_open_clip(folder, config)


def _write_open_clip(folder: Path, config: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    model = open_clip.CLIP(**config).half()
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")


WRITERS = {
    "base": write_base,
    "pickscore": write_pickscore,
    "hpsv2": write_hpsv2,
    "aesthetic": write_aesthetic,
    "clip": write_clip,
}


def write_all(folder: Path, small: bool = False) -> None:
    """Write what FOLDER lacks."""
    for name, write in WRITERS.items():
        if not (folder / name).is_dir():
            write(folder / name, small)


def reward_configs(folder: Path) -> dict[str, RewardConfig]:
    """The rewards that were written to `folder`, by kind."""
    published = folder / "hpsv2/HPS_v2.1_compressed.pt"
    return {
        "pickscore": RewardConfig(kind="pickscore", path=str(folder / "pickscore")),
        "hpsv2": RewardConfig(kind="hpsv2", path=str(published if published.exists() else folder / "hpsv2"), version="2.1"),
        "aesthetic": RewardConfig(kind="aesthetic", path=str(folder / "aesthetic")),
        "clip": RewardConfig(kind="clip", path=str(folder / "clip")),
    }


def with_random_weights(config: Config, folder: Path) -> Config:
    """The run on the weights in `folder`: its base, and its rewards of the kinds that are there.

    Raises ConfigError for another base than Stable Diffusion 1.5's, whose architecture is all that is written.
    """
    if config.profile != "sd15":
        raise ConfigError(f"Random weights are made for profile sd15 alone, got {config.profile}. Add --profile sd15")
    found = reward_configs(folder)
    rewards = {
        name: found[reward.kind].model_copy(update={"dtype": reward.dtype}) if reward.kind in found else reward
        for name, reward in config.rewards.items()
    }
    base = config.base.model_copy(update={"path": str(folder / "base")})
    return config.model_copy(update={"base": base, "rewards": rewards})


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("folder", type=Path)
    arguments.add_argument("--small", action="store_true")
    given = arguments.parse_args()
    write_all(given.folder, given.small)
