"""The text encoder tuned on SD 1.5 as the first of SDXL's two: both are CLIP ViT-L (the paper's zero-shot transfer)."""

import argparse

import torch
from diffusers import StableDiffusionXLPipeline

from textcraftor.control import Control

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("prompt")
parser.add_argument("--base", default="stabilityai/stable-diffusion-xl-base-1.0", help="an SDXL: diffusers folder or hub id")
parser.add_argument("--encoder_from", required=True, help="candidate's folder, tuned on an SD 1.x")
parser.add_argument("--strength", type=float, default=1.0, help="of the tuned encoder; the rest is SDXL's own")
parser.add_argument("--size", type=int, help="in pixels")
parser.add_argument("--steps", type=int, default=25)
parser.add_argument("--out", default="encoder_from.png")
options = parser.parse_args()

pipe = StableDiffusionXLPipeline.from_pretrained(options.base, add_watermarker=False)
weights = {"original": 1 - options.strength, "tuned": options.strength}
control = Control.from_folders({"tuned": options.encoder_from}, weights)
words = control(pipe, options.prompt, num_inference_steps=options.steps)
size, generator = {"height": options.size, "width": options.size}, torch.Generator().manual_seed(0)
pipe(generator=generator, **size, **words).images[0].save(options.out)
