"""The judge REWARD_bxb: the mean over the whole prompt-image matrix, which the published code reports as PickScore."""

import pytest
import torch
from torch import Tensor

from tests.evaluate.conftest import Brightness
from textcraftor.candidate import Candidate
from textcraftor.config import RewardConfig, load
from textcraftor.errors import ConfigError, RewardError
from textcraftor.evaluate.generation import from_bytes, plan
from textcraftor.evaluate.judging import score
from textcraftor.evaluate.provenance import trained_on
from textcraftor.rewards.base import CosineReward
from textcraftor.rewards.preprocess import Preprocess


class Quadrants(CosineReward):
    """A cosine similarity without a model, of quadrant means and letter counts."""

    def __init__(self, name: str) -> None:
        super().__init__(name, RewardConfig(kind="quadrants"), torch.float32, Preprocess(64), scale=100.0)
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.dropped = False

    def _encode_image(self, pixels: Tensor) -> Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(pixels[:, 0], 2).flatten(1)

    def _encode_text(self, prompts: list[str]) -> Tensor:
        assert not self.dropped
        return torch.tensor([[float(prompt.count(letter)) for letter in "aeor"] for prompt in prompts]) + 0.1

    def drop_text_tower(self) -> None:
        self.dropped = True


@pytest.mark.parametrize("judges", [("pick", "pick_bxb"), ("pick_bxb",)])
def test_the_score_is_the_row_mean_of_the_matrix(config, root, good, judges):
    rows = plan(config, root)
    settings = config.evaluate.model_copy(update={"judges": judges, "diversity_judge": "pick"})
    table = score(good, rows, settings, Quadrants, "cpu")
    reward = Quadrants("pick")
    text = reward.text_features(rows["prompt"].unique(maintain_order=True).to_list())
    matrix = 100.0 * reward.image_features(from_bytes(good)) @ text.T
    assert table["pick_bxb"].to_list() == pytest.approx(matrix.mean(1).tolist(), abs=1e-4)
    if "pick" in judges:
        assert table["pick"].to_list() != pytest.approx(table["pick_bxb"].to_list(), abs=1e-2)


def test_only_cosine_similarities_have_a_matrix(config, root, good):
    settings = config.evaluate.model_copy(update={"judges": ("bright_bxb",)})
    with pytest.raises(RewardError, match=r"'bright_bxb': bright is not a cosine"):
        score(good, plan(config, root), settings, Brightness, "cpu")


def test_a_matrix_judge_counts_as_trained_on_like_its_reward(tmp_path):
    params = tmp_path / "params.yaml"
    params.write_text(
        "profile: tiny\ngate: {champion_margin: {oracle: null}}\n"
        "evaluate: {judges: [heldout, heldout_bxb, pickscore_bxb], heldout_judges: [heldout_bxb]}\n"
    )
    with pytest.raises(ConfigError, match="no rule on a held-out judge"):
        load(params)
    run = load(params, {"gate": {"rules": [{"judge": "heldout_bxb", "metric": "mean", "at_least": 1}]}})
    trained = trained_on(run, Candidate("balanced"), {"judge_weights": {}})
    assert "pickscore_bxb" in trained and "heldout_bxb" not in trained
    assert trained_on(run, Candidate("base"), {"judge_weights": {}}) == ()


def test_an_unknown_matrix_judge_is_refused(tmp_path):
    params = tmp_path / "params.yaml"
    params.write_text("profile: tiny\nevaluate: {judges: [heldout, nope_bxb]}\n")
    with pytest.raises(ConfigError, match="Unknown judge 'nope_bxb'"):
        load(params)
