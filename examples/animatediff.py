"""A short film: AnimateDiff's motion adapter on the base, and a tuned encoder for every frame."""

import argparse

import torch
from diffusers import AnimateDiffPipeline, DDIMScheduler, MotionAdapter

from textcraftor.control import Control

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("prompt")
parser.add_argument("--base", default="stable-diffusion-v1-5/stable-diffusion-v1-5", help="diffusers folder or hub id")
parser.add_argument("--encoder", required=True, help="candidate's folder, such as data/encoders/balanced")
parser.add_argument("--adapter", default="guoyww/animatediff-motion-adapter-v1-5-2", help="diffusers folder or hub id")
parser.add_argument("--frames", type=int, default=16)
parser.add_argument("--size", type=int, help="of a frame, in pixels")
parser.add_argument("--steps", type=int, default=25)
parser.add_argument("--out", default="animatediff.gif")
options = parser.parse_args()

pipe = AnimateDiffPipeline.from_pretrained(options.base, motion_adapter=MotionAdapter.from_pretrained(options.adapter))
# Motion adapters were trained with a linear noise schedule.
pipe.scheduler = DDIMScheduler.from_config(
    pipe.scheduler.config, clip_sample=False, timestep_spacing="linspace", beta_schedule="linear", steps_offset=1
)
words = Control.from_folders({"tuned": options.encoder})(pipe, options.prompt, num_inference_steps=options.steps)
size, generator = {"height": options.size, "width": options.size}, torch.Generator().manual_seed(0)
first, *others = pipe(num_frames=options.frames, generator=generator, **size, **words).frames[0]
first.save(options.out, save_all=True, append_images=others, duration=125, loop=0)
