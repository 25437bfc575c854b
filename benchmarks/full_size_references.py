"""Compares each reward at full size with its own library's computation, on the same random weights and images.

    python -m textcraftor.bench.random_weights FOLDER
    python -m benchmarks.full_size_references FOLDER [--head sac+logos+ava1-l14-linearMSE.pth]

Prints the table of docs/rewards.md. The gradient is compared with a central difference along its own direction; the
tests do both for every kind at small size, ImageReward among them.
"""

import argparse
import gc
import logging
from collections.abc import Callable
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer, CLIPModel, CLIPVisionModelWithProjection

from textcraftor.config import RewardConfig
from textcraftor.models.weights import read_tensors
from textcraftor.rewards import load_reward
from textcraftor.rewards.head import LAYERS
from textcraftor.rewards.preprocess import Preprocess

PROMPTS = ["a lighthouse on a cliff at dusk, oil painting", "two cats and a dog wearing sunglasses"]
Reference = Callable[[Tensor], Tensor]  # pixels (B, 3, 224, 224), preprocessed -> scores (B,)


def diagonal_cosine(model: open_clip.CLIP, architecture: str, pixels: Tensor) -> Tensor:
    """Scores under open_clip's own towers and normalisation, (B,)."""
    tokens = open_clip.get_tokenizer(architecture)(PROMPTS)
    return (model.encode_image(pixels, normalize=True) @ model.encode_text(tokens, normalize=True).T).diagonal()


def hpsv2(folder: Path, pixels: Tensor) -> Tensor:
    model = open_clip.create_model("ViT-H-14", load_weights=False).eval()
    model.load_state_dict(torch.load(folder / "HPS_v2.1_compressed.pt", weights_only=True)["state_dict"])
    return diagonal_cosine(model, "ViT-H-14", pixels)


def clip(folder: Path, pixels: Tensor) -> Tensor:
    return diagonal_cosine(open_clip.create_model(f"local-dir:{folder}", precision="fp32").eval(), "ViT-g-14", pixels)


def pickscore(folder: Path, pixels: Tensor) -> Tensor:
    model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = AutoTokenizer.from_pretrained(folder)(PROMPTS, padding=True, return_tensors="pt")
    return model(**tokens, pixel_values=pixels).logits_per_image.diagonal()


def aesthetic(folder: Path, head: Path, pixels: Tensor) -> Tensor:
    tower = CLIPVisionModelWithProjection.from_pretrained(folder, dtype=torch.float32).eval()
    hidden, layers = F.normalize(tower(pixel_values=pixels).image_embeds, dim=-1), read_tensors(head, "the linear head")
    for index in LAYERS:
        hidden = F.linear(hidden, layers[f"layers.{index}.weight"], layers[f"layers.{index}.bias"])
    return hidden.squeeze(1)


def row(what: str, config: RewardConfig, reference: Reference, images: Tensor) -> str:
    """One line of the table: the largest difference of a score, and the gradient's relative error."""
    with torch.no_grad():
        expected = reference(Preprocess(224)(images))
    gc.collect()
    reward = load_reward(what, config)
    features = reward.text_features(PROMPTS)
    reward.drop_text_tower()
    inputs = images.clone().requires_grad_()
    scores = reward.score(inputs, features)
    (gradient,) = torch.autograd.grad(scores.sum(), inputs)
    step = 0.1 * gradient / gradient.norm()
    with torch.no_grad():
        ends = [reward.score(images + sign * step, features).double().sum() for sign in (1, -1)]
    slope = float(ends[0] - ends[1]) / 0.2
    size = sum(parameter.numel() for parameter in reward.parameters()) / 1e6
    difference = float((scores.detach() - expected).abs().max())
    error = abs(slope / float(gradient.norm()) - 1)
    return f"| `{config.kind}` | {what}, {size:,.0f} M | {float(expected.abs().max()):.4f} | {difference:.1e} | {error:.1%} |"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("folder", type=Path, help="written by textcraftor.bench.random_weights")
    arguments.add_argument("--head", type=Path, help="LAION's published head; by default a random one")
    given = arguments.parse_args()
    folder: Path = given.folder
    head: Path = given.head or folder / "aesthetic/head.safetensors"
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    images = F.interpolate(torch.rand(2, 3, 12, 12), (512, 512), mode="bicubic").clamp(0.1, 0.9)  # clips nowhere
    checkpoint = folder / "hpsv2/HPS_v2.1_compressed.pt"
    aesthetic_config = RewardConfig(kind="aesthetic", path=str(folder / "aesthetic"), head=str(head))
    pick_config = RewardConfig(kind="pickscore", path=str(folder / "pickscore"))
    hps_config = RewardConfig(kind="hpsv2", path=str(checkpoint), version="2.1")
    clip_config = RewardConfig(kind="clip", path=str(folder / "clip"))
    layers = "the published head" if given.head else "a random head"
    print("| reward | image tower | largest score | largest difference | gradient against finite differences |")
    print("|---|---|---:|---:|---:|")
    print(row(f"ViT-L/14 and {layers}", aesthetic_config, lambda px: aesthetic(folder / "aesthetic", head, px), images))
    print(row("transformers ViT-H/14", pick_config, lambda px: pickscore(folder / "pickscore", px), images), flush=True)
    print(row("open_clip ViT-H-14", hps_config, lambda px: hpsv2(folder / "hpsv2", px), images), flush=True)
    print(row("open_clip ViT-g-14", clip_config, lambda px: clip(folder / "clip", px), images), flush=True)


if __name__ == "__main__":
    main()
