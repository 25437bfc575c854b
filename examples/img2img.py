"""Redraw a picture with a tuned encoder."""

import argparse

import torch
from diffusers import AutoPipelineForImage2Image
from PIL import Image

from textcraftor.control import Control

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("prompt")
parser.add_argument("--base", default="stable-diffusion-v1-5/stable-diffusion-v1-5", help="diffusers folder or hub id")
parser.add_argument("--encoder", required=True, help="candidate's folder, such as data/encoders/balanced")
parser.add_argument("--image", required=True)
parser.add_argument("--strength", type=float, default=0.8, help="share of the chain that redraws the picture")
parser.add_argument("--steps", type=int, default=25)
parser.add_argument("--out", default="img2img.png")
options = parser.parse_args()

pipe = AutoPipelineForImage2Image.from_pretrained(options.base, safety_checker=None)
control = Control.from_folders({"tuned": options.encoder})
# The call's own strength and steps: they say where in the chain it begins, and so on which side of the switch.
words = control(pipe, options.prompt, strength=options.strength, num_inference_steps=options.steps)
generator = torch.Generator().manual_seed(0)
pipe(image=Image.open(options.image).convert("RGB"), generator=generator, **words).images[0].save(options.out)
