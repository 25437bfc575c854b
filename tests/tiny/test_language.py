"""`parse` recovers a scene from its plain and rich captions."""

from dataclasses import replace

import numpy as np
import pytest

from textcraftor.tiny import language
from textcraftor.tiny.language import Claims, parse, plain_caption, reword, rich_caption, sample_prompts, scene_claims
from textcraftor.tiny.scenes import OPPOSITE_RELATION, Scene, SceneObject, change_one_attribute, sample_scene


def scenes(count: int, seed: int = 0) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [sample_scene(rng) for _ in range(count)]


def canonical(claims: Claims) -> Claims:
    """The same claims with the objects in a fixed order, so that "A left of B" equals "B right of A"."""
    if claims.relation in ("right of", "below"):
        return replace(claims, objects=claims.objects[::-1], relation=OPPOSITE_RELATION[claims.relation])
    return claims


def test_plain_caption_round_trip() -> None:
    for scene in scenes(3000):
        assert parse(plain_caption(scene)) == scene_claims(scene)


def test_rich_caption_round_trip() -> None:
    rng = np.random.default_rng(1)
    for scene in scenes(5000):
        prompt = rich_caption(scene, rng, omit=0.0)
        claims = parse(prompt)
        assert claims is not None, prompt
        assert canonical(claims) == canonical(scene_claims(scene)), prompt


def test_rich_caption_leaves_out_only_background_and_style() -> None:
    rng = np.random.default_rng(2)
    omitted = 0
    for scene in scenes(500):
        claims = parse(rich_caption(scene, rng, omit=0.5))
        assert claims is not None
        omitted += claims.background is None
        completed = replace(claims, background=claims.background or scene.background, style=claims.style or scene.style)
        assert canonical(completed) == canonical(scene_claims(scene))
    assert 150 < omitted < 350


def test_rich_language_uses_every_synonym() -> None:
    rng = np.random.default_rng(3)
    words = set(" ".join(rich_caption(scene, rng) for scene in scenes(4000)).replace(",", " ").replace(":", " ").split())
    assert words <= set(language.vocabulary())
    assert {"crimson", "pyramid", "petite", "inky", "matte", "beneath", "azure"} <= words


def test_changing_one_attribute_changes_the_claims() -> None:
    rng = np.random.default_rng(4)
    for scene in scenes(2000):
        changed = change_one_attribute(scene, rng)
        assert canonical(scene_claims(changed)) != canonical(scene_claims(scene))
        assert len({obj.colour for obj in changed.objects}) == len(changed.objects)


@pytest.mark.parametrize(
    ("prompt", "claims"),
    [
        ("a red circle", Claims((SceneObject("red", "circle", None),), None, None, None)),
        ("The big box is GOLDEN", Claims((SceneObject("yellow", "square", "large"),), None, None, None)),
        (
            "red circle and blue square",
            Claims((SceneObject("red", "circle", None), SceneObject("blue", "square", None)), None, None, None),
        ),
        (
            "left of an azure box sits a tiny ruby ball",
            Claims((SceneObject("red", "circle", "small"), SceneObject("blue", "square", None)), "left of", None, None),
        ),
        (
            "a shiny star against a snowy wall",
            Claims((SceneObject(None, "star", None),), None, "white", "glossy"),
        ),
    ],
)
def test_parse_reads_incomplete_and_inverted_prompts(prompt: str, claims: Claims) -> None:
    assert parse(prompt) == claims


@pytest.mark.parametrize("prompt", ["", "   ", "astronaut riding a horse", "a red car", "🔴🟦", "\x00\ud800", "ﷺ" * 500])
def test_prompts_that_name_no_object_have_no_claims(prompt: str) -> None:
    assert parse(prompt) is None
    assert reword(prompt) == prompt


def test_parse_never_raises() -> None:
    rng = np.random.default_rng(5)
    words = ["a", "left of", "red", "circle", "on a white background", "and", ",", "glossy", "is", "é", "🟥", "‮", "\n"]
    for _ in range(3000):
        noise = [chr(point) for point in rng.integers(1, 0x10FFFF, 2)]
        parse(" ".join(rng.choice(words + noise, size=int(rng.integers(1, 14)))))


def test_reword_gives_the_plain_caption() -> None:
    prompt = "please draw a crimson and tiny disc on the left of a huge azure block against an ivory wall, in shiny finish"
    assert reword(prompt) == "a small red circle left of a large blue square on a white background, glossy"


def test_sample_prompts_are_distinct_and_reproducible() -> None:
    prompts = sample_prompts(400, seed=7, rich_fraction=0.75)
    assert len(set(prompts)) == 400
    assert prompts == sample_prompts(400, seed=7, rich_fraction=0.75)
    assert prompts[:100] == sample_prompts(100, seed=7, rich_fraction=0.75)
    assert prompts != sample_prompts(400, seed=8, rich_fraction=0.75)
    plain = sum(prompt == reword(prompt) for prompt in prompts)
    assert 60 < plain < 140
    assert all(prompt == reword(prompt) for prompt in sample_prompts(50, seed=7, rich_fraction=0.0))


def test_sample_prompts_can_be_short_and_of_two_objects() -> None:
    claims = [parse(prompt) for prompt in sample_prompts(60, seed=7, rich_fraction=1.0, pair_fraction=1.0, omit=1.0)]
    assert all(each and len(each.objects) == 2 and each.background is None and each.style is None for each in claims)
    assert all(each and len(each.objects) == 1 for each in map(parse, sample_prompts(60, seed=7, pair_fraction=0.0)))
