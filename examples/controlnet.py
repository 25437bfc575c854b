"""Follow a control picture (edges, depth, a pose) with a tuned encoder. The ControlNet hears the tuned encoder too."""

import argparse

import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from PIL import Image

from textcraftor.control import Control

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("prompt")
parser.add_argument("--base", default="stable-diffusion-v1-5/stable-diffusion-v1-5", help="diffusers folder or hub id")
parser.add_argument("--encoder", required=True, help="candidate's folder, such as data/encoders/balanced")
parser.add_argument("--controlnet", default="lllyasviel/control_v11p_sd15_canny", help="diffusers folder or hub id")
parser.add_argument("--image", required=True, help="the control picture")
parser.add_argument("--steps", type=int, default=25)
parser.add_argument("--out", default="controlnet.png")
options = parser.parse_args()

controlnet = ControlNetModel.from_pretrained(options.controlnet)
pipe = StableDiffusionControlNetPipeline.from_pretrained(options.base, controlnet=controlnet, safety_checker=None)
words = Control.from_folders({"tuned": options.encoder})(pipe, options.prompt, num_inference_steps=options.steps)
generator = torch.Generator().manual_seed(0)
pipe(image=Image.open(options.image).convert("RGB"), generator=generator, **words).images[0].save(options.out)
