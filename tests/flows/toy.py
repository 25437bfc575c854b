"""Cheap stages that write the same files as the real ones, so that the whole flow runs in seconds (no torch).

    python toy.py STAGE [CANDIDATE]

A stage imports only what it needs itself, because dozens of them are started. `train.steps` sets how good the tuned
models get: scores rise by steps / 1000. `break` in prompts.blocklist makes `validate` fail. Files in the workspace change
how a stage runs:

    slow           it waits until the file is removed
    preempt        the first stage to find it removes it and exits with status 75, as training does after SIGTERM
    devices.log    it appends "begin" and "end" lines with its GPU, and takes half a second in between
"""

import os
import sys
import time
from pathlib import Path

from PIL import Image

from textcraftor import training_proof
from textcraftor.artifact import write_json
from textcraftor.candidate import Candidate
from textcraftor.config import load
from textcraftor.heldout import fingerprint
from textcraftor.layout import scores_file
from textcraftor.prompts.table import prompt_id
from textcraftor.signing import Keyring

DATA = Path("data")
CONFIG = load("params.yaml")
PROMPTS, IMAGES = 32, 4


def curate() -> None:
    (DATA / "prompts/curated").mkdir(parents=True)
    source = CONFIG.prompts.sources[0]
    text = Path(source.path).read_text() if source.kind == "file" else "a small red circle\n"
    (DATA / "prompts/curated/train.txt").write_text(text)


def validate() -> None:
    if "break" in CONFIG.prompts.blocklist:
        print("some table of expectations")
        print("textcraftor: expect_column_values_to_be_unique(prompt_id) failed for 3 rows", file=sys.stderr)
        sys.exit(2)
    write_json(DATA / "prompts/validation.json", {"success": True})


def prepare() -> None:
    (DATA / "latents").mkdir(parents=True, exist_ok=True)
    (DATA / "latents/train.bin").write_bytes(b"latents")


def train(mix: str) -> None:
    folder = DATA / "encoders" / mix
    (folder / "text_encoder").mkdir(parents=True)
    (folder / "text_encoder/config.json").write_text("{}")
    (folder / "text_encoder/model.safetensors").write_text(f"weights of {mix}, {CONFIG.train.steps} steps")
    (folder / "history.csv").write_text("step,loss,clip\n0,1.0,0.2\n1,0.5,0.3\n")
    clip = fingerprint(CONFIG.rewards["clip"]).as_json()
    write_json(folder / "proof.json", {"seed": 0, "trained_weights": {"clip": clip}})
    training_proof.write(folder, ["text_encoder"], ["a small red circle"], {"clip": clip}, Keyring(Path()))
    (folder / "grids").mkdir()
    Image.new("RGB", (16, 16), "red").save(folder / "grids/step-000001.png")


def evaluate(name: str) -> None:
    """Every judge sees the same gain on every prompt."""
    import numpy as np
    import polars as pl

    from textcraftor.evaluate.provenance import comparable_settings, trained_on, weights_record
    from textcraftor.evaluate.scores import Scores
    from textcraftor.evaluate.signed_scores import write_signed
    from textcraftor.evaluate.statistics import compare

    gain = 0.0 if name == "base" else CONFIG.train.steps / 1000 + 0.001 * len(name)
    rows = range(IMAGES * PROMPTS)
    noise = np.random.default_rng(0).random(len(rows))
    table = pl.DataFrame(
        {
            "prompt_id": [prompt_id(f"prompt {row // IMAGES}") for row in rows],
            "prompt": [f"prompt {row // IMAGES}" for row in rows],
            "seed": list(rows),
            "image_index": [row % IMAGES for row in rows],
            **dict.fromkeys(CONFIG.evaluate.judges, 0.5 + gain + 0.01 * noise),
            "diversity": np.full(len(rows), 0.3),
        }
    )
    candidate = Candidate.find(name, Path())
    proof = {"config": comparable_settings(CONFIG), **weights_record(CONFIG, candidate, Path())}
    scores = Scores(name, candidate.digest, CONFIG.evaluate.judges, trained_on(CONFIG, candidate, proof), proof, table)
    write_signed(scores, Path())
    report = DATA / "reports" / name
    report.mkdir(parents=True)
    base = Scores.read(scores_file("base"))
    figures = compare(table, base.table, scores.judges, scores.trained_on, CONFIG.evaluate)
    write_json(report / "metrics.json", {"candidate": name, "base": "base", **figures})
    write_json(report / "claims.json", claims(0 if name == "base" else CONFIG.train.steps))
    Image.new("RGB", (64, 32), "blue").save(report / "grid.png")
    (report / "report.html").write_text("<p>report</p>")


def judge() -> None:
    from textcraftor.evaluate.gate import gate

    gate(CONFIG, Path())


def claims(steps: int) -> dict[str, object]:
    """Tuning gains colours and rich prompts, and loses shapes."""
    up, down = {"held": 400 + steps, "of": 1000}, {"held": 400 - steps // 4, "of": 1000}
    return {"kind": {"colour": up, "shape": down}, "language": {"rich": up}}


def log_device(event: str) -> None:
    log = Path("devices.log")
    if log.exists():
        with log.open("a") as lines:
            lines.write(f"{event} {os.environ.get('CUDA_VISIBLE_DEVICES')}\n")


if __name__ == "__main__":
    stage, *arguments = sys.argv[1:]
    with Path("stages.log").open("a") as log:
        log.write(" ".join(sys.argv[1:]) + "\n")
    print(f"this is {stage}", flush=True)
    log_device("begin")
    while Path("slow").exists():
        time.sleep(0.1)
    if Path("preempt").exists():
        Path("preempt").unlink()
        print("textcraftor: stopped by SIGTERM at step 7; the checkpoint is written", file=sys.stderr)
        sys.exit(75)
    if Path("devices.log").exists():
        time.sleep(0.5)
    globals()[stage](*arguments)
    log_device("end")
