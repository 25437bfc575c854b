"""Finding a reward's class: our kinds, entry points, dotted paths."""

import sys
from importlib.metadata import EntryPoint

import pytest
import torch

from textcraftor.config import RewardConfig
from textcraftor.errors import RewardError
from textcraftor.rewards import load_reward, load_rewards

PLUGIN = '''
import torch
from textcraftor.rewards import Reward

class Redness(Reward):
    """How red the images are."""

    default_version = "7"
    resolution = 4

    def __init__(self, name, config, dtype):
        super().__init__(name, config, dtype)
        self.gain = torch.nn.Parameter(torch.tensor(float(config.path)))

    def text_features(self, prompts):
        return torch.zeros(len(prompts), 0)

    def image_features(self, images):
        return torch.nn.functional.normalize(images.mean(dim=(2, 3)), dim=-1)

    def score(self, images, text_features):
        return self.gain * images[:, 0].mean(dim=(1, 2))

NotAReward = dict
'''


@pytest.fixture(autouse=True)
def plugin(tmp_path, monkeypatch):
    (tmp_path / "redness_plugin.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("redness_plugin", None)


def check(reward) -> None:
    images = torch.tensor([0.5, 0.1, 0.2])[None, :, None, None].expand(1, 3, 4, 4)
    assert reward.score(images, reward.text_features(["x"])).item() == pytest.approx(1.0)
    assert (reward.name, reward.version, reward.truncated(["x"])) == ("red", "7", 0)
    assert not reward.gain.requires_grad and not reward.training
    assert reward.device == torch.device("cpu")


def test_a_class_by_its_dotted_path():
    check(load_reward("red", RewardConfig(kind="redness_plugin:Redness", path="2")))


def test_a_class_by_an_entry_point(monkeypatch):
    point = EntryPoint("redness", "redness_plugin:Redness", "textcraftor.rewards")
    monkeypatch.setattr("textcraftor.rewards.load.entry_points", lambda group: [point] if group == point.group else [])
    check(load_reward("red", RewardConfig(kind="redness", path="2")))
    with pytest.raises(RewardError, match=r"Known: .*redness.* Did you mean 'redness'"):
        load_reward("red", RewardConfig(kind="rednes"))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("hps", r"Unknown reward kind 'hps'. Known: aesthetic, clip, hpsv2, pickscore. Did you mean 'hpsv2'"),
        ("no_such_module:Reward", "cannot import no_such_module:Reward"),
        ("redness_plugin:Blueness", "cannot import redness_plugin:Blueness"),
        ("redness_plugin:NotAReward", "is not a subclass of"),
    ],
)
def test_kinds_that_name_no_reward(kind, message):
    with pytest.raises(RewardError, match=message):
        load_reward("red", RewardConfig(kind=kind))


def test_load_rewards_loads_each_name_once_and_checks_names_first():
    configs = {"red": RewardConfig(kind="redness_plugin:Redness", path="2")}
    assert list(load_rewards(configs, ["red", "red"])) == ["red"]
    with pytest.raises(RewardError, match=r"Unknown reward 'rad'. Known: bad, red. Did you mean 'red'"):
        load_rewards({**configs, "bad": RewardConfig(kind="nothing")}, ["bad", "rad"])
