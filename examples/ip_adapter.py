"""Take the style of a picture with an IP-Adapter, and the words from a tuned encoder."""

import argparse

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from textcraftor.control import Control

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("prompt")
parser.add_argument("--base", default="stable-diffusion-v1-5/stable-diffusion-v1-5", help="diffusers folder or hub id")
parser.add_argument("--encoder", required=True, help="candidate's folder, such as data/encoders/balanced")
parser.add_argument("--adapter", default="h94/IP-Adapter", help="folder or hub id with the adapter and its image encoder")
parser.add_argument("--subfolder", default="models")
parser.add_argument("--weights", default="ip-adapter_sd15.safetensors")
parser.add_argument("--image", required=True, help="the picture whose style is taken")
parser.add_argument("--size", type=int, help="of the result, in pixels")
parser.add_argument("--steps", type=int, default=25)
parser.add_argument("--out", default="ip_adapter.png")
options = parser.parse_args()

pipe = StableDiffusionPipeline.from_pretrained(options.base, safety_checker=None)
pipe.load_ip_adapter(options.adapter, subfolder=options.subfolder, weight_name=options.weights)
words = Control.from_folders({"tuned": options.encoder})(pipe, options.prompt, num_inference_steps=options.steps)
style, generator = Image.open(options.image).convert("RGB"), torch.Generator().manual_seed(0)
size = {"height": options.size, "width": options.size}
pipe(ip_adapter_image=style, generator=generator, **size, **words).images[0].save(options.out)
