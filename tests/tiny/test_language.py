"""Both languages say the same of a scene, and `parse` reads them back."""

from dataclasses import replace

import numpy as np
import pytest

from textcraftor.tiny import language
from textcraftor.tiny.language import Claims, claims_of, parse, plain_caption, reword, rich_caption, sample_prompts
from textcraftor.tiny.scenes import OPPOSITE, Scene, Thing, change_one, sample_scene


def scenes(count: int, seed: int = 0) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [sample_scene(rng) for _ in range(count)]


def canonical(claims: Claims) -> Claims:
    """The same claims with the things in a fixed order, so that "A left of B" equals "B right of A"."""
    if claims.relation in ("right of", "below"):
        return replace(claims, things=claims.things[::-1], relation=OPPOSITE[claims.relation])
    return claims


def test_plain_caption_round_trip() -> None:
    for scene in scenes(3000):
        assert parse(plain_caption(scene)) == claims_of(scene)


def test_rich_caption_round_trip() -> None:
    rng = np.random.default_rng(1)
    for scene in scenes(5000):
        prompt = rich_caption(scene, rng, omit=0.0)
        claims = parse(prompt)
        assert claims is not None, prompt
        assert canonical(claims) == canonical(claims_of(scene)), prompt


def test_rich_caption_leaves_out_only_background_and_style() -> None:
    rng = np.random.default_rng(2)
    silent = 0
    for scene in scenes(500):
        claims = parse(rich_caption(scene, rng, omit=0.5))
        assert claims is not None
        silent += claims.background is None
        told = replace(claims, background=claims.background or scene.background, style=claims.style or scene.style)
        assert canonical(told) == canonical(claims_of(scene))
    assert 150 < silent < 350


def test_rich_language_uses_every_synonym() -> None:
    rng = np.random.default_rng(3)
    spoken = set(" ".join(rich_caption(scene, rng) for scene in scenes(4000)).replace(",", " ").replace(":", " ").split())
    assert spoken <= set(language.vocabulary())
    assert {"crimson", "pyramid", "petite", "inky", "matte", "beneath", "azure"} <= spoken


def test_a_changed_scene_makes_other_claims() -> None:
    rng = np.random.default_rng(4)
    for scene in scenes(2000):
        twin = change_one(scene, rng)
        assert canonical(claims_of(twin)) != canonical(claims_of(scene))
        assert len({thing.colour for thing in twin.things}) == len(twin.things)


@pytest.mark.parametrize(
    ("prompt", "claims"),
    [
        ("a red circle", Claims((Thing("red", "circle", None),), None, None, None)),
        ("The big box is GOLDEN", Claims((Thing("yellow", "square", "large"),), None, None, None)),
        (
            "red circle and blue square",
            Claims((Thing("red", "circle", None), Thing("blue", "square", None)), None, None, None),
        ),
        (
            "left of an azure box sits a tiny ruby ball",
            Claims((Thing("red", "circle", "small"), Thing("blue", "square", None)), "left of", None, None),
        ),
        (
            "a shiny star against a snowy wall",
            Claims((Thing(None, "star", None),), None, "white", "glossy"),
        ),
    ],
)
def test_parse_reads_what_people_write(prompt: str, claims: Claims) -> None:
    assert parse(prompt) == claims


@pytest.mark.parametrize("prompt", ["", "   ", "astronaut riding a horse", "a red car", "🔴🟦", "\x00\ud800", "ﷺ" * 500])
def test_prompts_from_elsewhere_claim_nothing(prompt: str) -> None:
    assert parse(prompt) is None
    assert reword(prompt) == prompt


def test_parse_survives_any_unicode() -> None:
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
