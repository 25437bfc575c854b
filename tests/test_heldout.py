"""Held-out judges are held out by their weights, whatever name or file those go by."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from textcraftor.config import Config, RewardConfig, load
from textcraftor.errors import ConfigError
from textcraftor.heldout import fingerprint, require_held_out
from textcraftor.training.stages import train_text_encoder

ROOT = Path(__file__).parents[1]
JUDGE = ROOT / "data/tiny/rewards/heldout"
FILE = "open_clip_model.safetensors"


def reward(path: Path | str, **more: str) -> RewardConfig:
    return RewardConfig(kind="clip", path=str(path), **more)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The held-out judge under another name."""
    return shutil.copytree(JUDGE, tmp_path / "innocent")


def settings(folder: Path, **sections: Any) -> Config:
    """The tiny profile with absolute paths, overlaid by `sections`."""
    rewards = {name: {"path": str(ROOT / f"data/tiny/rewards/{name}")} for name in ("clip", "heldout")}
    path = folder / "params.yaml"
    path.write_text(yaml.safe_dump({"profile": "tiny", "rewards": rewards}))
    return load(path, sections)


def with_another_mix(folder: Path, path: Path | str, kind: str = "clip") -> Config:
    """A run whose mix `balanced` trains on one more reward."""
    return settings(folder, rewards={"extra": {"kind": kind, "path": str(path)}}, mix={"balanced": {"extra": 1.0}})


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"mix": {"balanced": {"heldout": 1.0}}}, r"mix\.balanced trains on 'heldout', and 'heldout' is held out"),
        ({"mix": {"paper": {"heldout": -0.1}}}, r"mix\.paper trains on 'heldout'"),  # though it is none of `mixes`
        (
            {"rewards": {"extra": {"kind": "contrast", "path": str(JUDGE)}}, "mix": {"balanced": {"extra": 1.0}}},
            r"mix\.balanced trains on 'extra', which has the weights of 'heldout'",
        ),
        (
            {"rewards": {"extra": {"kind": "clip", "path": f"{JUDGE}/../heldout"}}, "mix": {"balanced": {"extra": 1.0}}},
            r"mix\.balanced trains on 'extra', which has the weights of 'heldout'",
        ),
        ({"rewards": {"oracle": {"kind": "clip", "path": "a"}}}, r"rewards\.oracle: the name is the tiny world's oracle's"),
        ({"evaluate": {"heldout_judges": ["heldout", "nobody"]}}, r"evaluate\.heldout_judges: Unknown judge 'nobody'"),
        (
            {"gate": {"rules": [{"judge": "clip", "metric": "ci_low", "at_least": 0.0}]}},
            r"gate\.rules has no rule on a held-out judge\. Add one on heldout or oracle",
        ),
    ],
)
def test_the_configuration_refuses_what_it_can_see(tmp_path: Path, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(tmp_path, **sections)


def test_a_weight_of_zero_trains_on_nothing(tmp_path: Path) -> None:
    assert require_held_out(settings(tmp_path, mix={"balanced": {"heldout": 0.0}}), {"heldout": 0.0}, tmp_path) == {}


def resave(folder: Path) -> None:
    """The same tensors with other metadata, in another order."""
    tensors = load_file(folder / FILE)
    save_file(dict(reversed(tensors.items())), folder / FILE, {"made by": "somebody"})


def rename_tensors(folder: Path) -> None:
    save_file({f"model.{name}": tensor for name, tensor in load_file(folder / FILE).items()}, folder / FILE)


def pickle(folder: Path) -> None:
    torch.save(load_file(folder / FILE), folder / "open_clip_pytorch_model.bin")
    (folder / FILE).unlink()


def change_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / FILE)
    max(tensors.values(), key=lambda tensor: tensor.numel()).view(-1)[0] += 1
    save_file(tensors, folder / FILE)


def add_a_file(folder: Path) -> None:
    (folder / "README.md").write_text("not the judge")


@pytest.mark.parametrize("disguise", [lambda folder: None, resave, rename_tensors, pickle, change_a_tensor, add_a_file])
def test_training_on_the_judges_weights_is_refused_before_it_starts(tmp_path: Path, copy: Path, disguise: Any) -> None:
    disguise(copy)
    config = with_another_mix(tmp_path, copy)
    with pytest.raises(ConfigError, match=r"trains on 'extra' \(.*innocent\), which has the weights of the held-out judge"):
        train_text_encoder(config, "balanced", tmp_path, torch.device("cpu"))


def test_other_weights_are_not_the_judges(tmp_path: Path) -> None:
    config = settings(tmp_path)
    trained = require_held_out(config, {"clip": 1.0}, ROOT)
    assert trained.keys() == {"clip"} and len(trained["clip"]["largest"]) == 16
    judge = fingerprint(config.rewards["heldout"])
    for name in ("clip", "hpsv2", "pickscore", "aesthetic"):
        assert not judge.same_weights(fingerprint(reward(ROOT / f"data/tiny/rewards/{name}")))


def test_models_that_are_not_here_are_known_by_their_names() -> None:
    one, other = reward("ViT-B-32:openai"), reward("ViT-L-14:openai")
    assert fingerprint(one).same_weights(fingerprint(one)) and not fingerprint(one).same_weights(fingerprint(other))
    assert fingerprint(RewardConfig(kind="detail")).same_weights(fingerprint(RewardConfig(kind="detail", version="2")))


def test_a_head_elsewhere_belongs_to_the_weights(tmp_path: Path) -> None:
    tower = ROOT / "data/tiny/rewards/aesthetic"
    save_file({"weight": torch.ones(3)}, tmp_path / "head.safetensors")
    alone, with_head = reward(tower), reward(tower, head=str(tmp_path / "head.safetensors"))
    assert fingerprint(alone).digest != fingerprint(with_head).digest
    assert fingerprint(alone).same_weights(fingerprint(with_head))  # the tower, which is nearly all of it


def test_a_file_of_no_known_format_is_known_by_its_bytes(tmp_path: Path) -> None:
    for name, content in (("one.pt", b"x"), ("same.pt", b"x"), ("other.safetensors", b"y")):
        (tmp_path / name).write_bytes(content)
    one, same, other = (fingerprint(reward(tmp_path / name)) for name in ("one.pt", "same.pt", "other.safetensors"))
    assert one.same_weights(same) and not one.same_weights(other)
