"""`torchrun` and `accelerate launch` on the command line: two processes write the same files as one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from tests.distributed.test_fsdp import close_to
from tests.training.test_stages import CPU, contents, run
from textcraftor.cache.prepare import prepare
from textcraftor.config import Config, load
from textcraftor.evaluate import evaluate
from textcraftor.models.base import load_base
from textcraftor.training.stages import train_text_encoder, train_unet

__all__ = ["run"]  # the fixture
ROOT = Path(__file__).parents[2]
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    # With --cpu it starts one process, whatever --num_processes says; its several are those of --multi_gpu.
    "accelerate": [
        *["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"],
        *["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"],
    ],
}


# Runs the commands given, in turn, in the same process: to start one and import the library takes longer than they do.
EACH = """
import sys
from textcraftor.cli import app
for command in sys.argv[1:]:
    app(command.split(), standalone_mode=False)
"""


def launch(launcher: str, *arguments: str, script: str = "") -> str:
    """Run the command line, or a script of it, in two processes; returns their stderr."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", *LAUNCHERS[launcher], *([script] if script else ["-m", "textcraftor.cli"]), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stderr


def params(**sections: object) -> Config:
    """Update sections of params.yaml and load it."""
    path = Path("params.yaml")
    written = yaml.safe_load(path.read_text())
    written["mix"] |= {"balanced": {"redness": 1.0}, "aesthetic": {"redness": 1.0}}
    for name, section in sections.items():
        written[name] = {**written.get(name, {}), **section}  # type: ignore[dict-item]
    path.write_text(yaml.safe_dump(written))
    return load(path)


def test_two_processes_write_the_text_encoder_of_one_with_twice_the_batch(run: Config, tmp_path: Path) -> None:
    alone = params(train={"batch_size": 4, "learning_rate": 1e-4})
    prepare(alone, tmp_path, CPU)
    expected = load_file(train_text_encoder(alone, "redder", tmp_path, CPU) / "text_encoder/model.safetensors")
    start = load_base(alone.base, CPU).text_encoder.state_dict()
    params(train={"batch_size": 2, "shard": True})
    stderr = launch("accelerate", "train", "--mix", "redder", "--device", "cpu")
    assert "2 steps of 2 x 1 x 2 processes = 4 samples" in " ".join(stderr.split())
    assert "the UNet is split over 2 processes" in stderr
    written = load_file(tmp_path / "data/encoders/redder/text_encoder/model.safetensors")
    assert close_to(written, expected, {name: start[name.removeprefix("text_model.")] for name in expected})


def test_a_split_unet_is_written_whole_and_two_processes_evaluate_to_the_same_bytes(run: Config, tmp_path: Path) -> None:
    judged = {"judges": ["redness"], "heldout_judges": [], "diversity_judge": "redness", "batch_size": 3, "bootstrap": 50}
    rank_by = {
        "rank_by": "redness",
        "champion_margin": {"redness": 0.01, "oracle": None, "heldout": None},
        "rules": [{"judge": "redness", "metric": "delta", "at_least": 0.0, "why": "it is redder"}],
    }
    alone = params(train_unet={"batch_size": 4, "learning_rate": 1e-4}, evaluate=judged, gate=rank_by)
    prepare(alone, tmp_path, CPU)
    train_text_encoder(alone, "redder", tmp_path, CPU)
    expected = UNet2DConditionModel.from_pretrained(train_unet(alone, "redder", tmp_path, CPU) / "unet").state_dict()
    for candidate in ("base", "redder"):
        evaluate(alone, candidate, tmp_path, CPU)
    files = {part: contents(tmp_path / "data" / part) for part in ("scores", "reports")}
    assert len(files["scores"]) == 4 and "redder/report.html" in files["reports"]

    params(train_unet={"batch_size": 2, "shard": True})
    (tmp_path / "each.py").write_text(EACH)
    commands = ("train-unet --mix redder --device cpu", "evaluate --candidate redder --device cpu")
    launch("torchrun", *commands, script=str(tmp_path / "each.py"))
    out = tmp_path / "data/unets/redder"
    assert json.loads((out / "unet/config.json").read_text())["_class_name"] == "UNet2DConditionModel"
    written = UNet2DConditionModel.from_pretrained(out / "unet").state_dict()
    assert close_to(written, expected, load_base(alone.base, CPU).pipe.unet.state_dict())
    assert not list(tmp_path.glob(".textcraftor/training/*/*/checkpoint.safetensors"))
    assert {part: contents(tmp_path / "data" / part) for part in ("scores", "reports")} == files
    assert torch.get_num_threads() == 1
