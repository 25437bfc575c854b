"""Finding the class of a reward: built-in kinds, entry points, dotted paths."""

import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch

from textcraftor import config as configuration
from textcraftor.config import RewardConfig
from textcraftor.errors import ModelError, RewardError
from textcraftor.rewards import RewardMix, load_reward, load_rewards

INSTALLED = Path(__file__).parent / "plugin"  # a third party's package with its metadata, as pip installs it


@pytest.fixture(autouse=True)
def plugin(monkeypatch):
    monkeypatch.syspath_prepend(INSTALLED)
    yield
    sys.modules.pop("vivid_reward", None)


def check(reward) -> None:
    images = torch.tensor([0.6, 0.3, 0.3])[None, :, None, None].expand(1, 3, 4, 4).clone().requires_grad_()
    total, parts = RewardMix({"mine": reward}, {"mine": 10.0})(images, {"mine": reward.text_features(["x"])})
    assert parts["mine"].item() == pytest.approx(0.4 / 3) and total.item() == pytest.approx(4 / 3)
    total.sum().backward()
    assert images.grad.abs().max() > 0
    assert (reward.name, reward.version, reward.truncated(["x"])) == ("mine", "1", 0)
    assert not reward.gain.requires_grad and not reward.training
    assert reward.device == torch.device("cpu")


def test_a_dotted_path_names_a_class():
    check(load_reward("mine", RewardConfig(kind="vivid_reward:Vivid")))


def test_an_entry_point_of_an_installed_package_names_a_class():
    check(load_reward("mine", RewardConfig(kind="vivid")))
    with pytest.raises(RewardError, match=r"Known: .*vivid.* Did you mean 'vivid'"):
        load_reward("mine", RewardConfig(kind="vivd"))


def test_a_profile_uses_an_entry_point_like_a_built_in_kind(tmp_path):
    params = tmp_path / "params.yaml"
    params.write_text("profile: tiny\nrewards: {mine: {kind: vivid}}\nmix: {balanced: {mine: 2}}\n")
    run = configuration.load(params)
    assert run.mix["balanced"]["mine"] == 2
    check(load_rewards(run.rewards, ["mine"])["mine"])


def test_an_entry_point_cannot_replace_a_built_in_kind(monkeypatch):
    point = EntryPoint("clip", "vivid_reward:Vivid", "textcraftor.rewards")
    monkeypatch.setattr("textcraftor.rewards.load.entry_points", lambda group: [point])
    with pytest.raises(ModelError, match="open_clip"):
        load_reward("mine", RewardConfig(kind="clip"))


def test_dtype_defaults_to_the_profiles():
    assert load_reward("mine", RewardConfig(kind="vivid")).dtype == torch.float32
    low = RewardConfig(kind="vivid", dtype="bfloat16")
    assert load_reward("mine", low).dtype == torch.bfloat16
    assert load_reward("mine", low, dtype="float32").dtype == torch.float32


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("hps", r"Unknown reward kind 'hps'. Known: aesthetic, clip, .*vivid. Did you mean 'hpsv2'"),
        ("no_such_module:Reward", "cannot import no_such_module:Reward"),
        ("vivid_reward:Dull", "cannot import vivid_reward:Dull"),
        ("vivid_reward:Tensor", "is not a subclass of"),
    ],
)
def test_unknown_kinds_are_rejected(kind, message):
    with pytest.raises(RewardError, match=message):
        load_reward("red", RewardConfig(kind=kind))


def test_load_rewards_loads_each_name_once_and_checks_all_names_first():
    configs = {"red": RewardConfig(kind="vivid_reward:Vivid")}
    assert list(load_rewards(configs, ["red", "red"])) == ["red"]
    with pytest.raises(RewardError, match=r"Unknown reward 'rad'. Known: bad, red. Did you mean 'red'"):
        load_rewards({**configs, "bad": RewardConfig(kind="nothing")}, ["bad", "rad"])
