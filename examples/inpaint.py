"""Redraw the white part of a mask with a tuned encoder."""

import argparse

import torch
from diffusers import AutoPipelineForInpainting
from PIL import Image

from textcraftor.control import Control

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("prompt")
parser.add_argument("--base", default="stable-diffusion-v1-5/stable-diffusion-v1-5", help="diffusers folder or hub id")
parser.add_argument("--encoder", required=True, help="candidate's folder, such as data/encoders/balanced")
parser.add_argument("--image", required=True)
parser.add_argument("--mask", required=True, help="white is redrawn, black is kept")
parser.add_argument("--strength", type=float, default=1.0, help="share of the chain that redraws the masked part")
parser.add_argument("--steps", type=int, default=25)
parser.add_argument("--out", default="inpaint.png")
options = parser.parse_args()

pipe = AutoPipelineForInpainting.from_pretrained(options.base, safety_checker=None)
image, mask = Image.open(options.image).convert("RGB"), Image.open(options.mask).convert("L")
words = Control.from_folders({"tuned": options.encoder})(
    pipe, options.prompt, strength=options.strength, num_inference_steps=options.steps
)
generator = torch.Generator().manual_seed(0)
size = {"height": image.height, "width": image.width}
pipe(image=image, mask_image=mask, generator=generator, **size, **words).images[0].save(options.out)
