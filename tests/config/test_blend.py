"""Weights of a blend: how they are written, and which are refused."""

import pytest

from textcraftor.config import BlendConfig, Term, Weights, is_term
from textcraftor.errors import ConfigError


def test_terms_are_read_as_they_are_written() -> None:
    assert Term.parse("balanced=0.5") == Term("balanced", 0.5)
    assert Term.parse("./data/encoders/x=-1e-1@.4..0.7") == Term("./data/encoders/x", -0.1, 0.4, 0.7)
    assert Term.parse("a=1@..0.5") == Term("a", 1.0, 0.0, 0.5)
    for text in ("original=0.25", "balanced=1.5@0.4..1"):
        assert str(Weights.parse([text])) == str(Weights.parse([str(Term.parse(text))]))
    assert not is_term("a picture with x = y") and not is_term("a red circle")


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        (["original=0.5", "balanced=0.4"], r"sum to 0.9, and must sum to 1. .* give it original=0.6"),
        (["original=0", "balanced=0"], "sum to 0, "),
        (["balanced=nan"], "balanced is nan. Give a finite number"),
        (["balanced=inf"], "balanced is inf"),
        (["balanced="], "'balanced=' is no weight"),
        (["balanced=much"], "'balanced=much' is no weight"),
        (["balanced"], "Write NAME=WEIGHT"),
        (["balanced=1@0.7..0.4"], r"0.7..0.4 is no part of the chain"),
        (["balanced=1@0.4..1.2"], r"no part of the chain"),
        (["balanced=1@0.4..0.6"], "sum to 0 from step 15 of 25 on"),
        ([], "A blend needs weights"),
    ],
)
def test_impossible_weights_are_refused(terms: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Weights.parse(terms).stages(10, 25)


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"Unknown encoder 'balancd'. Known: aesthetic, balanced, original. Did you mean"):
        Weights.parse(["balancd=1"]).require_known(["balanced", "aesthetic"])


def test_weights_hold_from_the_switch_on_and_change_where_they_say() -> None:
    constant = Weights.parse(["original=0.2", "balanced=0.5", "aesthetic=0.3"])
    assert constant.stages(10, 25) == [(10, {"original": 0.2, "balanced": 0.5, "aesthetic": 0.3})]
    by_range = Weights.parse(["a=1@0..0.6", "b=1@0.6..1"])
    assert by_range.stages(10, 25) == [(10, {"a": 1.0}), (15, {"b": 1.0})]
    assert by_range.stages(20, 25) == [(20, {"b": 1.0})]
    assert Weights.parse(["a=1"]).stages(25, 25) == [(25, {"a": 1.0})]
    assert Weights.between("a", 0.0).stages(0, 5) == [(0, {"original": 1.0})]
    assert Weights.between("a", 1.0).stages(0, 5) == [(0, {"a": 1.0})]


def test_extrapolation_is_allowed_and_said() -> None:
    beyond = Weights.parse(["original=-0.5", "balanced=1.5"])
    assert beyond.stages(0, 5) and beyond.extrapolates == "original=-0.5 balanced=1.5"
    assert not Weights.parse(["original=0", "balanced=1"]).extrapolates


def test_a_configured_blend_is_checked_when_it_is_read() -> None:
    written = BlendConfig.model_validate({"weights": {"original": 0.5, "a": "0.5@0.2..1"}})
    assert written.weights == ("original=0.5", "a=0.5@0.2..1")
    assert written == BlendConfig.model_validate({"weights": list(written.weights)})
    with pytest.raises(ValueError, match="is no weight"):
        BlendConfig.model_validate({"weights": {"a": "half"}})
