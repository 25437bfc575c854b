"""Serving against the stock diffusers pipeline with the same tuned encoder, on this machine, one after the other in turns.

    python -m benchmarks.serving [--rounds 20] [--steps 25] [--candidate FOLDER/]

Both draw the same prompts with the run's base, steps and guidance, and write PNGs. Ours also runs the original encoder before
the switch, as it does for users. Prints a Markdown table: milliseconds a picture (median) and the ratio ours / stock, as the
median over pairs, of the wall clock and of processor time, which other work on the machine disturbs less. Without a
candidate it changes the base's encoder at random. `http`: through `textcraftor serve`'s server, against the pipeline alone.
"""

import argparse
import http.client
import io
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPTextModel

from textcraftor.candidate import Candidate
from textcraftor.config import Config, load
from textcraftor.device import choose_device
from textcraftor.models.base import load_base
from textcraftor.models.saving import save_module
from textcraftor.serving.server import ModelServer
from textcraftor.serving.service import BATCH, Request, Service

Draw = Callable[[list[str], int], list[bytes]]


def changed_encoder(config: Config, folder: Path) -> Candidate:
    """The base's encoder with 5 % of noise, in `folder`."""
    encoder: Any = load_base(config.base, torch.device("cpu")).pipe.text_encoder
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in encoder.parameters():
            weight += 0.05 * weight.std(correction=0) * torch.randn_like(weight)
    save_module(encoder, folder / "text_encoder")
    return Candidate.at(folder)


def stock_pipeline(config: Config, candidate: Candidate, steps: int, device: torch.device) -> Draw:
    """diffusers as its documentation uses it."""
    encoder = CLIPTextModel.from_pretrained(str(candidate.text_encoder))
    pipe = StableDiffusionPipeline.from_pretrained(config.base.path, text_encoder=encoder, safety_checker=None).to(device)
    pipe.set_progress_bar_config(disable=True)
    side = config.base.resolution

    def draw(prompts: list[str], seed: int) -> list[bytes]:
        noise = [torch.Generator(device).manual_seed(seed + index) for index in range(len(prompts))]
        images = pipe(
            prompts,
            height=side,
            width=side,
            num_inference_steps=steps,
            guidance_scale=config.chain.guidance_scale,
            generator=noise,
        ).images
        return [_png(image) for image in images]

    return draw


def served(service: Service, steps: int) -> Draw:
    def draw(prompts: list[str], seed: int) -> list[bytes]:
        return service.draw([Request(prompt=each, seed=seed + index, steps=steps) for index, each in enumerate(prompts)])

    return draw


def over_http(port: int, steps: int) -> Draw:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)

    def draw(prompts: list[str], seed: int) -> list[bytes]:
        connection.request("POST", "/invocations", json.dumps({"prompt": prompts[0], "seed": seed, "steps": steps}))
        return [connection.getresponse().read()]

    return draw


def compare(ours: Draw, stock: Draw, pictures: int, rounds: int) -> tuple[list[float], list[float], list[float], list[float]]:
    """(wall of ours, wall of stock, processor time of ours, of stock), seconds a picture, for each round."""
    columns: tuple[list[float], ...] = ([], [], [], [])
    for number in range(rounds + 1):  # the first warms up
        prompts = [f"{number + index} red circles" for index in range(pictures)]
        for turn in ((0, ours), (1, stock)) if number % 2 else ((1, stock), (0, ours)):
            which, draw = turn
            wall, processor = time.perf_counter(), time.process_time()
            assert all(each.startswith(b"\x89PNG") for each in draw(prompts, number))
            if number:
                columns[which].append((time.perf_counter() - wall) / pictures)
                columns[2 + which].append((time.process_time() - processor) / pictures)
    return columns[0], columns[1], columns[2], columns[3]


def row(name: str, ours: Draw, stock: Draw, pictures: int, rounds: int) -> str:
    wall, stock_wall, processor, stock_processor = compare(ours, stock, pictures, rounds)
    ratios = [
        statistics.median(one / other for one, other in zip(*pair, strict=True))
        for pair in ((wall, stock_wall), (processor, stock_processor))
    ]
    times = [1000 * statistics.median(each) for each in (wall, stock_wall)]
    return f"| {name} | {times[0]:.1f} | {times[1]:.1f} | {ratios[0]:.2f} | {ratios[1]:.2f} |"


def _png(image: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--candidate", type=Path)
    given = parser.parse_args(arguments)
    config = load("params.yaml").at(Path.cwd())
    device = choose_device("auto", config.cpu_threads)
    with tempfile.TemporaryDirectory() as folder:
        candidate = Candidate.at(given.candidate) if given.candidate else changed_encoder(config, Path(folder))
        service, stock = Service(config, candidate, device), stock_pipeline(config, candidate, given.steps, device)
        print("| pictures | ours, ms each | stock, ms each | ratio | ratio of processor time |\n|---|---:|---:|---:|---:|")
        ours = served(service, given.steps)
        print(row("1", ours, stock, 1, given.rounds), flush=True)
        print(row(f"{BATCH} at once", ours, stock, BATCH, given.rounds), flush=True)
        with ModelServer(service, 0) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            print(row("1, http", over_http(server.server_port, given.steps), stock, 1, given.rounds))
            server.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
