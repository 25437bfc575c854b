"""Puts trained models on the shelf: the files, in half precision, that each format's stock loader reads."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from open_clip.model import CLIP
from transformers import CLIPImageProcessor, CLIPModel, CLIPTextModel, CLIPTokenizer

from textcraftor.tiny.recipe.aesthetic import Beholder
from textcraftor.tiny.recipe.files import folder_aside, save_tensors
from textcraftor.tiny.recipe.towers import IMAGE_SIZE, MEAN, STD
from textcraftor.tiny.recipe.unet import new_scheduler


def shelve_base(
    folder: Path, vae: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, unet: UNet2DConditionModel
) -> None:
    """A `StableDiffusionPipeline` folder."""
    pipeline = StableDiffusionPipeline(
        vae=vae.half(),
        text_encoder=text_encoder.half(),
        tokenizer=tokenizer,
        unet=unet.half(),
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    with folder_aside(folder) as aside:
        pipeline.save_pretrained(aside)


def shelve_open_clip(folder: Path, model: CLIP, config: dict[str, object], tokenizer: CLIPTokenizer) -> None:
    """An open_clip folder, for `open_clip.create_model_and_transforms("local-dir:...")`."""
    preprocess = {"size": IMAGE_SIZE, "mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "shortest"}
    with folder_aside(folder) as aside:
        tokenizer.save_pretrained(aside)
        text = json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}, indent=2)
        (aside / "open_clip_config.json").write_text(text + "\n")
        save_tensors(model.half().state_dict(), aside / "open_clip_model.safetensors")


def _image_processor() -> CLIPImageProcessor:
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=side, image_mean=MEAN, image_std=STD)


def shelve_hugging_face(folder: Path, model: CLIPModel, tokenizer: CLIPTokenizer) -> None:
    """A `CLIPModel` folder, as PickScore comes."""
    with folder_aside(folder) as aside:
        tokenizer.save_pretrained(aside)
        _image_processor().save_pretrained(aside)
        model.half().save_pretrained(aside)


def shelve_beholder(folder: Path, beholder: Beholder) -> None:
    """A `CLIPVisionModelWithProjection` folder with LAION's `head.safetensors` in it."""
    with folder_aside(folder) as aside:
        _image_processor().save_pretrained(aside)
        beholder.tower.half().save_pretrained(aside)
        head = {f"layers.{name}": tensor for name, tensor in beholder.layers.half().state_dict().items()}
        save_tensors(head, aside / "head.safetensors")


def pick_device(name: str) -> torch.device:
    """The device of that name; for "auto" CUDA where there is one, else the CPU."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
