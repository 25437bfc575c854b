import weakref

import pytest
import torch

from tests.evaluate.conftest import IMAGES, Brightness
from textcraftor.evaluate.generation import from_bytes, plan
from textcraftor.evaluate.judging import diversity, score
from textcraftor.tiny.oracle import Oracle


def test_columns_hold_the_scores_of_the_8_bit_images(config, root, good):
    rows = plan(config, root)
    judges = {"bright": Brightness("bright"), "heldout": Brightness("heldout")}
    table = score(good, rows, config.evaluate, judges.__getitem__, "cpu")
    assert table.columns == [*rows.columns, "bright", "heldout", "oracle", "diversity"]
    images = from_bytes(good)
    assert table["bright"].to_list() == pytest.approx(images[:, 0].mean((1, 2)).tolist())
    assert table["heldout"].to_list() == pytest.approx(images[:, 2].mean((1, 2)).tolist())
    assert table["oracle"].to_list() == pytest.approx(Oracle().score(images, rows["prompt"].to_list()).tolist())
    assert table["diversity"].to_list() == pytest.approx(
        diversity(judges["heldout"].image_features(images), IMAGES).tolist(), abs=1e-6
    )


def test_the_oracle_reads_diversity_off_the_images(config, root, good):
    rows = plan(config, root)
    settings = config.evaluate.model_copy(update={"judges": ("oracle_diversity", "oracle_variety"), "batch_size": 5})
    repeated = good[::IMAGES].repeat_interleave(IMAGES, 0)
    true, alike = (score(images, rows, settings, Brightness, "cpu") for images in (good, repeated))
    assert true.columns == [*rows.columns, "oracle_diversity", "oracle_variety", "diversity"]
    assert true["oracle_diversity"].min() > 0
    assert alike["oracle_diversity"].max() == 0
    assert alike["oracle_variety"].mean() == pytest.approx(true["oracle_variety"].mean(), abs=0.3)


def test_scores_do_not_depend_on_the_batch_size(config, root, good):
    rows = plan(config, root)
    one, all_at_once = (
        score(good, rows, config.evaluate.model_copy(update={"batch_size": size}), Brightness, "cpu") for size in (1, 99)
    )
    for judge in (*config.evaluate.judges, "diversity"):
        assert one[judge].to_list() == pytest.approx(all_at_once[judge].to_list(), abs=1e-6)


def test_each_prompt_is_encoded_once_and_the_text_tower_is_freed(config, root, good):
    rows = plan(config, root)
    loaded = []

    def load(name):
        loaded.append(Brightness(name))
        return loaded[-1]

    score(good, rows, config.evaluate, load, "cpu")
    assert [judge.name for judge in loaded] == ["bright", "heldout"]
    for judge in loaded:
        assert judge.asked == rows["prompt"].unique(maintain_order=True).to_list()
        assert judge.dropped


def test_memory_holds_one_judge_at_a_time(config, root, good):
    alive = weakref.WeakSet()

    def load(name):
        assert not alive
        judge = Brightness(name)
        alive.add(judge)
        return judge

    score(good, plan(config, root), config.evaluate, load, "cpu")


def test_a_judge_of_diversity_alone_encodes_no_prompts(config, root, good):
    settings = config.evaluate.model_copy(update={"judges": ("oracle",), "diversity_judge": "clip"})
    judge = Brightness("clip")
    table = score(good, plan(config, root), settings, lambda name: judge, "cpu")
    assert judge.asked == []
    assert "clip" not in table.columns


def test_diversity_is_the_mean_distance_of_pairs():
    alike = torch.tensor([[1.0, 2.0], [2.0, 4.0], [0.5, 1.0]])
    right_angles = torch.eye(3)[:, :2] + torch.tensor([[0.0, 0], [0, 0], [-3, 0]])  # e1, e2, -e1
    features = torch.zeros(6, 2)
    features[:3], features[3:] = alike, right_angles
    spread = diversity(features, 3)
    assert spread[:3].tolist() == pytest.approx([0, 0, 0], abs=1e-7)
    assert spread[3:].tolist() == pytest.approx([(1 + 2 + 1) / 3] * 3)
    assert (spread >= 0).all()
