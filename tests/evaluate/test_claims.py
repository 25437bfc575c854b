import numpy as np
import torch

from textcraftor.evaluate.claims import count_claims, tick_claims
from textcraftor.tiny.renderer import render
from textcraftor.tiny.scenes import Scene, SceneObject


def pictures(*scenes):
    drawn = [render(scene, np.random.default_rng(0)) for scene in scenes]
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2)


def test_counts_by_kind_and_by_language():
    scene = Scene((SceneObject("red", "circle", "large"),), None, "white", "flat")
    images = pictures(scene, scene, scene)
    prompts = [
        "a large red circle on a white background, flat",  # plain, and all of it holds
        "a large green circle on a white background, flat",  # plain, the colour is wrong
        "a huge scarlet disc on a black background, flat",  # rich, the background is wrong
    ]
    counts = count_claims(images, prompts, batch_size=2)
    assert counts["kind"]["colour"] == {"held": 2, "of": 3}
    assert counts["kind"]["background"] == {"held": 2, "of": 3}
    assert counts["kind"]["shape"] == {"held": 3, "of": 3}
    of = sum(count["of"] for count in counts["kind"].values())
    assert counts["language"]["rich"] == {"held": of // 3 - 1, "of": of // 3}
    assert counts["language"]["plain"] == {"held": 2 * of // 3 - 1, "of": 2 * of // 3}


def test_claims_of_a_kind_are_counted_together():
    scene = Scene((SceneObject("red", "circle", "small"), SceneObject("blue", "square", "small")), "left of", "white", "flat")
    counts = count_claims(pictures(scene), ["a small red circle left of a small yellow square"], 8)
    assert counts["kind"]["colour"] == {"held": 1, "of": 2}
    assert "background" not in counts["kind"]


def test_each_claim_is_named_by_what_the_prompt_asks_for():
    scene = Scene((SceneObject("red", "circle", "large"),), None, "white", "flat")
    (ticks, nothing) = tick_claims(pictures(scene, scene), ["a huge azure disc on a snowy wall, shiny", "a cat"])
    assert ticks == [
        ("1 object", True), ("large", True), ("blue", False), ("circle", True), ("white", True), ("glossy", False),
    ]  # fmt: skip
    assert nothing == []
