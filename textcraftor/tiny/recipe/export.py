"""Exports trained models in half precision, in the files that each format's stock loader reads, as float32 by default."""

import json
from pathlib import Path

from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from open_clip.model import CLIP
from transformers import CLIPImageProcessor, CLIPModel, CLIPTextModel, CLIPTokenizer

from textcraftor.tiny.recipe.aesthetic import AestheticModel
from textcraftor.tiny.recipe.files import replace_folder, save_tensors
from textcraftor.tiny.recipe.towers import IMAGE_SIZE, MEAN, STD
from textcraftor.tiny.recipe.unet import new_scheduler


def new_pipeline(
    vae: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, unet: UNet2DConditionModel
) -> StableDiffusionPipeline:
    """The parts as a Stable Diffusion pipeline."""
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def export_base(folder: Path, pipeline: StableDiffusionPipeline) -> None:
    """A `StableDiffusionPipeline` folder."""
    for part in (pipeline.vae, pipeline.text_encoder, pipeline.unet):
        part.half()
    with replace_folder(folder) as temporary:
        pipeline.save_pretrained(temporary)
        _load_as_float32(temporary / "text_encoder")


def export_open_clip(folder: Path, model: CLIP, config: dict[str, object], tokenizer: CLIPTokenizer) -> None:
    """An open_clip folder, for `open_clip.create_model_and_transforms("local-dir:...")`.  config: its `model_cfg`."""
    preprocess = {"size": IMAGE_SIZE, "mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "shortest"}
    with replace_folder(folder) as temporary:
        tokenizer.save_pretrained(temporary)
        text = json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}, indent=2)
        (temporary / "open_clip_config.json").write_text(text + "\n")
        save_tensors(model.half().state_dict(), temporary / "open_clip_model.safetensors")


def _image_processor() -> CLIPImageProcessor:
    crop = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=crop, image_mean=MEAN, image_std=STD)


def export_clip_model(folder: Path, model: CLIPModel, tokenizer: CLIPTokenizer) -> None:
    """A transformers `CLIPModel` folder, the format of PickScore."""
    with replace_folder(folder) as temporary:
        tokenizer.save_pretrained(temporary)
        _image_processor().save_pretrained(temporary)
        model.half().save_pretrained(temporary)
        _load_as_float32(temporary)


def export_aesthetic(folder: Path, model: AestheticModel) -> None:
    """A `CLIPVisionModelWithProjection` folder with `head.safetensors`, the linear layers under LAION's keys."""
    with replace_folder(folder) as temporary:
        _image_processor().save_pretrained(temporary)
        model.tower.half().save_pretrained(temporary)
        _load_as_float32(temporary)
        head = {f"layers.{name}": tensor for name, tensor in model.layers.half().state_dict().items()}
        save_tensors(head, temporary / "head.safetensors")


def _load_as_float32(folder: Path) -> None:
    """Make float32 the precision in which transformers loads a model that is stored in half precision.

    Without a `dtype` argument transformers loads in the dtype that config.json names, and diffusers always in float32. The
    text encoder of a pipeline would then differ from its UNet, and the first call would fail.
    """
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "dtype": "float32"}, indent=2, sort_keys=True) + "\n")
