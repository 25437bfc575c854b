"""What the text encoder must say of a plain caption: exactly what the caption names, places included."""

import numpy as np
import pytest
import torch

from textcraftor.tiny.language import parse, plain_caption, scene_claims
from textcraftor.tiny.recipe import unet
from textcraftor.tiny.recipe.contrastive import ATTRIBUTES, POSITION_WEIGHT, POSITIONS
from textcraftor.tiny.recipe.reading import Reader, end_token, plain_caption_of
from textcraftor.tiny.recipe.tokenizer import new_tokenizer
from textcraftor.tiny.scenes import BACKGROUNDS, COLOURS, RELATIONS, STYLES, Scene, SceneObject, sample_scene

PAIR = Scene((SceneObject("blue", "star", "small"), SceneObject("red", "cross", "large")), "left of", "grey", "flat")


def named(attributes: torch.Tensor, colour: str) -> list[str]:
    """The positions that are set for a colour."""
    start = COLOURS.index(colour) * len(RELATIONS)
    return [name for name, index in zip(RELATIONS, POSITIONS[start : start + len(RELATIONS)], strict=True) if attributes[index]]


def test_each_object_has_its_own_place() -> None:
    caption, attributes = plain_caption_of(PAIR, np.random.default_rng(0))
    assert "a small blue star left of a large red cross" in caption
    assert (named(attributes, "blue"), named(attributes, "red"), named(attributes, "green")) == (["left of"], ["right of"], [])


def test_what_a_caption_leaves_out_is_not_read_from_it() -> None:
    rng = np.random.default_rng(1)
    left_out = {"background": 0, "style": 0}
    for _ in range(200):
        scene = sample_scene(rng)
        caption, attributes = plain_caption_of(scene, rng)
        claims = parse(caption)
        assert claims is not None and claims.objects == scene_claims(scene).objects
        style, background = attributes[-len(STYLES) :], attributes[-len(BACKGROUNDS) - len(STYLES) : -len(STYLES)]
        assert bool(style.any()) == (claims.style is not None) and bool(background.any()) == (claims.background is not None)
        left_out["background"] += claims.background is None
        left_out["style"] += claims.style is None
    assert all(5 < count < 40 for count in left_out.values())


def test_only_the_end_of_the_text_is_read_and_places_count_more() -> None:
    torch.manual_seed(0)
    tokenizer = new_tokenizer()
    ids = torch.tensor(tokenizer([plain_caption(PAIR)], padding="max_length", max_length=40)["input_ids"])
    reader, states = Reader(8, end_token(tokenizer)), torch.randn(1, 40, 8)
    is_end = ids[0] == end_token(tokenizer)
    assert 1 < is_end.sum() < 39
    inside, after = states.clone(), states.clone()
    inside[0, ~is_end] += 1
    after[0, is_end] += 1
    assert torch.equal(reader(inside, ids), reader(states, ids)) and not torch.equal(reader(after, ids), reader(states, ids))
    with torch.no_grad():
        reader.layer.weight.zero_()
        reader.layer.bias.zero_()
    one = float(torch.log(torch.tensor(2.0)))  # of a coin toss
    expected = one * (ATTRIBUTES + (POSITION_WEIGHT - 1) * len(POSITIONS))
    assert reader.loss(states, ids, torch.zeros(1, ATTRIBUTES)).item() == pytest.approx(expected, rel=1e-5)


def test_nothing_is_read_from_a_rich_caption(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unet, "RICH_FRACTION", 1.0)
    _, attributes = unet.training_caption(PAIR, np.random.default_rng(0))
    assert attributes.shape == (ATTRIBUTES,) and attributes.isnan().all()
    monkeypatch.setattr(unet, "RICH_FRACTION", 0.0)
    caption, attributes = unet.training_caption(PAIR, np.random.default_rng(0))
    assert parse(caption) is not None and attributes.isfinite().all()
