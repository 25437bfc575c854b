"""Cheap stages that write the same files as the real ones, so that the whole flow runs in seconds (no torch).

    python toy.py STAGE [CANDIDATE]

`train.steps` sets how good the tuned models get: scores rise by steps / 1000. `break` in prompts.blocklist makes
`validate` fail. Files in the workspace change how a stage runs:

    slow           it waits until the file is removed
    preempt        the first stage to find it removes it and exits with status 75, as training does after SIGTERM
    devices.log    it appends "begin" and "end" lines with its GPU, and takes half a second in between
"""

import hashlib
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
from PIL import Image

from textcraftor.artifact import digest, write_json
from textcraftor.config import load

DATA = Path("data")
CONFIG = load("params.yaml")
PROMPTS = 32


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
    write_json(folder / "proof.json", {"seed": 0})
    (folder / "grids").mkdir()
    Image.new("RGB", (16, 16), "red").save(folder / "grids/step-000001.png")


def evaluate(name: str) -> None:
    gain = 0.0 if name == "base" else CONFIG.train.steps / 1000 + 0.001 * len(name)
    noise = np.random.default_rng(len(name)).random(2 * PROMPTS)
    columns = {
        "prompt_id": pa.array([f"{i // 2:016x}" for i in range(2 * PROMPTS)]),
        "prompt": pa.array([f"prompt {i // 2}" for i in range(2 * PROMPTS)]),
        "seed": pa.array(range(2 * PROMPTS)),
        "image_index": pa.array([i % 2 for i in range(2 * PROMPTS)]),
        **{judge: pa.array(0.5 + gain + 0.01 * noise) for judge in CONFIG.evaluate.judges},
        "diversity": pa.array(np.full(2 * PROMPTS, 0.3)),
    }
    about = {
        "candidate": name,
        "digest": weights(name),
        "judges": CONFIG.evaluate.judges,
        "trained_on": ["clip"],
        "proof": {},
    }
    (DATA / "scores").mkdir(parents=True, exist_ok=True)
    table = pa.table(columns).replace_schema_metadata({b"textcraftor": json.dumps(about).encode()})
    parquet.write_table(table, DATA / f"scores/{name}.parquet")
    report = DATA / "reports" / name
    report.mkdir(parents=True)
    write_json(report / "metrics.json", {"candidate": name, "base": "base", **figures(gain)})
    write_json(report / "claims.json", claims(0 if name == "base" else CONFIG.train.steps))
    Image.new("RGB", (64, 32), "blue").save(report / "grid.png")
    (report / "report.html").write_text("<p>report</p>")


def judge() -> None:
    records = {}
    for mix in CONFIG.mixes:
        metrics = json.loads((DATA / "reports" / mix / "metrics.json").read_text())
        delta = metrics["judges"]["oracle"]["delta"]
        rule = {
            "rule": "oracle.delta",
            "judge": "oracle",
            "metric": "delta",
            "value": delta,
            "bound": 0.05,
            "why": "better",
        }
        passed = delta >= 0.05
        records[mix] = {
            "passed": passed, "digest": weights(mix), "rules": [{**rule, "passed": passed}], "metrics": metrics,
        }  # fmt: skip
    passing = sorted(mix for mix, record in records.items() if record["passed"])
    winner = passing[0] if passing else None
    write_json(DATA / "reports/gate.json", {"passed": bool(passing), "winner": winner, "candidates": records})


def figures(gain: float) -> dict[str, object]:
    one = {
        "mean": 0.5 + gain,
        "base_mean": 0.5,
        "delta": gain,
        "ci_low": gain - 0.01,
        "ci_high": gain + 0.01,
        "win_rate": 0.9,
    }
    judges = {judge: {**one, "trained_on": judge == "clip"} for judge in CONFIG.evaluate.judges}
    spread = {**one, "mean": 0.3, "base_mean": 0.3, "ratio": 1.0}
    return {"n_prompts": PROMPTS, "judges": judges, "diversity": spread}


def claims(steps: int) -> dict[str, object]:
    """Tuning gains colours and rich prompts, and loses shapes."""
    up, down = {"held": 400 + steps, "of": 1000}, {"held": 400 - steps // 4, "of": 1000}
    return {"kind": {"colour": up, "shape": down}, "language": {"rich": up}}


def weights(name: str) -> str:
    """The digest that `Candidate.digest` gives, without torch."""
    if name == "base":
        return ""
    parts = {"text_encoder": digest(DATA / "encoders" / name / "text_encoder")}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


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
