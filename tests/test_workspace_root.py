"""Everything that a profile names is relative to the workspace root, whatever the current folder is."""

import shutil
import sys
from pathlib import Path

import pytest
import yaml

from textcraftor import cli
from textcraftor.config import BaseConfig, load, locate

ROOT = Path(__file__).parents[1]
TINY = "data/tiny/rewards"
PARAMS = {
    "profile": "tiny",
    "mixes": ["balanced"],
    "unet_mixes": ["balanced"],
    "cpu_threads": 1,
    "prompts": {"sources": [{"kind": "file", "path": "mine.txt"}], "heldout": 2, "world": "any"},
    "base": {"tiny_vae": None},
    "chain": {"num_inference_steps": 2},
    "rewards": {
        "aesthetic": {"head": f"{TINY}/aesthetic/head.safetensors"},
        "pickscore": {"tokenizer": f"{TINY}/pickscore"},
    },
    "mix": {"balanced": {"clip": 1, "aesthetic": 1, "pickscore": 1, "contrast": 0, "hpsv2": 0}},
    "prepare": {"batch_size": 2, "shard_rows": 4, "cpu_threads": 1},
    "train": {"steps": 1, "batch_size": 2, "grad_steps": 1, "switch_at": 0.5, "decode_size": 2},
    "train_unet": {"steps": 1, "batch_size": 2, "grad_steps": 1},
    "evaluate": {
        "prompts": 2,
        "images_per_prompt": 2,
        "batch_size": 4,
        "bootstrap": 10,
        "judges": ["clip", "aesthetic", "pickscore"],
        "heldout_judges": [],
        "diversity_judge": "clip",
    },
    "gate": {
        "rank_by": "clip",
        "champion_margin": {"oracle": None, "heldout": None},
        "rules": [{"judge": "clip", "metric": "delta", "at_least": -9}],
    },
}


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    root = tmp_path / "workspace"
    (root / "data").mkdir(parents=True)
    (root / "data/tiny").symlink_to(ROOT / "data/tiny")
    (root / "mine.txt").write_text("".join(f"a red circle above {number} blue squares\n" for number in range(12)))
    (root / "params.yaml").write_text(yaml.safe_dump(PARAMS))
    return root


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: it has files of the workspace's names, and none of them is of use."""
    folder = tmp_path / "elsewhere"
    for name in ("base", "rewards/clip", "rewards/aesthetic", "rewards/pickscore"):
        (folder / "data/tiny" / name).mkdir(parents=True)
        (folder / "data/tiny" / name / "config.json").write_text("{}")
    (folder / "mine.txt").write_text("")
    monkeypatch.chdir(folder)
    return folder


def textcraftor(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Output of a command that succeeds."""
    monkeypatch.setattr(sys, "argv", ["textcraftor", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    printed = capsys.readouterr()
    assert not stop.value.code, printed.err
    return printed.out + printed.err


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_every_verb_works_from_another_folder_and_a_moved_workspace_is_not_stale(
    workspace: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before, params = names(elsewhere), str(workspace / "params.yaml")
    for verb in (
        ["config"],
        ["curate"],
        ["prepare"],
        ["train", "--mix", "balanced", "--dry-run"],
        ["train", "--mix", "balanced"],
        ["train-unet", "--mix", "balanced"],
        ["evaluate", "--candidate", "base"],
        ["evaluate", "--candidate", "balanced"],
        ["evaluate", "--candidate", "balanced-unet"],
        ["gate"],
        ["fetch"],
        ["doctor"],
        ["generate", "a red circle", "--model", "balanced", "--out", str(workspace / "picture.png")],
        ["bench", "train", "--mix", "balanced", "--repeats", "1"],
    ):
        device = [] if verb[0] in ("config", "curate", "gate", "fetch") else ["--device", "cpu"]
        textcraftor(monkeypatch, capsys, *verb, *device, "--params", params)
    assert names(elsewhere) == before
    assert {"text_encoder", "unet", "base"} <= {path.name for path in (workspace / "data").glob("*/*/") if path.is_dir()} | {
        path.parent.name for path in (workspace / "data").rglob("config.json")
    }
    for proof in (workspace / "data").rglob("proof.json"):
        assert str(workspace) not in proof.read_text(encoding="utf-8"), "paths are saved as they are written"

    moved = workspace.with_name("moved")
    shutil.move(workspace, moved)
    monkeypatch.chdir(moved)
    told = textcraftor(monkeypatch, capsys, "prepare", "--device", "cpu")
    assert "reused" in told and "computed" not in told
    textcraftor(monkeypatch, capsys, "evaluate", "--candidate", "balanced", "--device", "cpu")


def test_a_path_is_below_the_root_and_a_hub_id_stays_one(workspace: Path, elsewhere: Path) -> None:
    assert locate("data/tiny/base", workspace) == str(workspace / "data/tiny/base")
    assert locate("local-dir:data/tiny/rewards/clip", workspace) == f"local-dir:{workspace / TINY}/clip"
    assert locate(str(elsewhere), workspace) == str(elsewhere), "an absolute path is what it is"
    assert locate("openai/clip-vit-large-patch14", workspace) == "openai/clip-vit-large-patch14"
    assert locate("ViT-L-14:openai", workspace) == "ViT-L-14:openai"
    (elsewhere / "mine").mkdir()
    assert locate("mine", workspace) == str(workspace / "mine"), "never what is in the current folder"
    assert locate("mine.txt", Path()) == "mine.txt"


def test_what_is_located_is_the_same_configuration_otherwise(workspace: Path) -> None:
    run = load(workspace / "params.yaml")
    located = run.at(workspace)
    assert located.rewards["aesthetic"].head == str(workspace / TINY / "aesthetic/head.safetensors")
    assert located.model_copy(update={name: getattr(run, name) for name in ("prompts", "base", "rewards")}) == run
    assert BaseConfig(path="a", config="b", tiny_vae="c").own_files() == {"path": "a", "config": "b", "tiny_vae": "c"}
