"""Several processes started on the command line, by `accelerate launch` and so by torchrun: the same files as from one."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from torch.distributed import run as torchrun

from tests.distributed.test_fsdp import close_to
from tests.training.test_stages import CPU, contents, run
from textcraftor.cache.prepare import prepare
from textcraftor.config import Config, load
from textcraftor.evaluate import evaluate
from textcraftor.models.base import load_base
from textcraftor.training.stages import train_text_encoder, train_unet

__all__ = ["run"]  # the fixture
ROOT = Path(__file__).parents[2]
# With --cpu it starts one process, whatever --num_processes says; its several are those of --multi_gpu.
ACCELERATE = [
    *["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"],
    *["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"],
]
# Runs the commands given, in turn, in the same process: to start one and import the library takes longer than they do.
EACH = """
import gc, os, runpy, sys
gc.disable()  # a quarter of the time that imports take
for command in sys.argv[1:]:
    if os.environ["RANK"] == "0":
        print("command", command, file=sys.stderr, flush=True)
    sys.argv = ["textcraftor", *command.split()]
    try:
        runpy.run_module("textcraftor.cli", run_name="__main__")
    except SystemExit as stop:
        if stop.code:
            raise
"""


def launch(script: Path, *commands: str) -> list[str]:
    """Run commands in each of two processes; returns what each printed to stderr.

    `accelerate launch` adds its settings to the environment and starts the processes by torchrun's code.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    script.write_text(EACH)
    command = [sys.executable, "-m", *ACCELERATE, str(script), *commands]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return [" ".join(part.split()) for part in re.split("^command ", done.stderr, flags=re.M)[1:]]


def params(**sections: object) -> Config:
    """Update sections of params.yaml and load it."""
    path = Path("params.yaml")
    written = yaml.safe_load(path.read_text())
    written["mix"] |= {"balanced": {"redness": 1.0}, "aesthetic": {"redness": 1.0}}
    for name, section in sections.items():
        written[name] = {**written.get(name, {}), **section}  # type: ignore[dict-item]
    path.write_text(yaml.safe_dump(written))
    return load(path)


def test_two_processes_write_what_one_does_with_twice_the_batch(run: Config, tmp_path: Path) -> None:
    """Both trainings within rounding, the UNet written whole although it is split; scores and reports to the same bytes."""
    judged = {"judges": ["redness"], "heldout_judges": [], "diversity_judge": "redness", "batch_size": 3, "bootstrap": 50}
    rank_by = {
        "rank_by": "redness",
        "champion_margin": {"redness": 0.01, "oracle": None, "heldout": None},
        "rules": [{"judge": "redness", "metric": "delta", "at_least": 0.0, "why": "it is redder"}],
    }
    tune = {"batch_size": 4, "learning_rate": 1e-4}
    alone = params(train=tune, train_unet=tune, evaluate=judged, gate=rank_by)
    prepare(alone, tmp_path, CPU)
    encoder = load_file(train_text_encoder(alone, "redder", tmp_path, CPU) / "text_encoder/model.safetensors")
    unet = UNet2DConditionModel.from_pretrained(train_unet(alone, "redder", tmp_path, CPU) / "unet").state_dict()
    for candidate in ("base", "redder"):
        evaluate(alone, candidate, tmp_path, CPU)
    files = {part: contents(tmp_path / "data" / part) for part in ("scores", "reports")}
    assert len(files["scores"]) == 4 and "redder/report.html" in files["reports"]

    params(train={"batch_size": 2, "shard": True}, train_unet={"batch_size": 2, "shard": True})
    commands = [
        "train-unet --mix redder",
        "evaluate --candidate redder",
        "train --mix redder",
    ]  # two read what the third writes
    _, evaluated, trained = launch(tmp_path / "each.py", *(f"{command} --device cpu" for command in commands))
    assert evaluated.startswith("evaluate") and trained.startswith("train ")
    assert "2 steps of 2 x 1 x 2 processes = 4 samples" in trained and "the UNet is split over 2 processes" in trained
    base = load_base(alone.base, CPU)
    start = base.text_encoder.state_dict()
    written = load_file(tmp_path / "data/encoders/redder/text_encoder/model.safetensors")
    assert close_to(written, encoder, {name: start[name.removeprefix("text_model.")] for name in encoder})
    assert json.loads((tmp_path / "data/unets/redder/unet/config.json").read_text())["_class_name"] == "UNet2DConditionModel"
    written = UNet2DConditionModel.from_pretrained(tmp_path / "data/unets/redder/unet").state_dict()
    assert close_to(written, unet, base.pipe.unet.state_dict())
    assert not list(tmp_path.glob(".textcraftor/training/*/*/checkpoint.safetensors"))
    assert {part: contents(tmp_path / "data" / part) for part in ("scores", "reports")} == files
    assert torch.get_num_threads() == 1


def test_torchrun_takes_the_words_of_the_documentation() -> None:
    commands = re.findall(r"^ +torchrun (.*)$", (ROOT / "docs/many-gpus.md").read_text(encoding="utf-8"), re.M)
    assert len(commands) == 4
    for command in commands:
        settings, started, arguments = torchrun.config_from_args(torchrun.parse_args(command.split()))
        assert (settings.min_nodes, settings.max_nodes, settings.nproc_per_node) == (1, 1, 8)
        assert started == sys.executable and arguments[:3] == ["-u", "-m", "textcraftor.cli"]
