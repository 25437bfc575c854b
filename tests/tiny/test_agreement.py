"""Pairs of images of one prompt, ordered by a reward and by the truth."""

import math

import torch

from textcraftor.tiny.recipe.agreement import pair_agreement, within_prompt_correlation

TRUTH = torch.tensor([[0.0, 0.5, 1.0], [1.0, 1.0, 0.9]])


def test_only_pairs_that_differ_count() -> None:
    assert pair_agreement(TRUTH, TRUTH) == 1
    assert pair_agreement(-TRUTH, TRUTH) == 0
    one_wrong = torch.tensor([[0.0, 2.0, 1.0], [3.0, 1.0, 0.0]])
    assert math.isclose(pair_agreement(one_wrong, TRUTH), 4 / 5)
    assert math.isnan(pair_agreement(one_wrong, torch.ones(2, 3)))


def test_small_differences_can_be_left_out() -> None:
    wrong_on_small = torch.tensor([[0.0, 0.5, 1.0], [0.0, 0.0, 1.0]])
    assert math.isclose(pair_agreement(wrong_on_small, TRUTH), 3 / 5)
    assert pair_agreement(wrong_on_small, TRUTH, at_least=0.3) == 1


def test_correlation_ignores_differences_between_prompts() -> None:
    harder = TRUTH.clone()
    harder[1] -= 10
    assert math.isclose(within_prompt_correlation(harder, TRUTH), 1, abs_tol=1e-6)
