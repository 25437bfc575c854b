"""How often a reward prefers, of two images that the base drew for one prompt, the one of which more claims hold.

That is what tuning asks of a reward: the images it is trained on are the base's own, not clean renders.
"""

from itertools import combinations
from typing import Final

import torch
from torch import Tensor

IMAGES_PER_PROMPT: Final = 4
LARGE_DIFFERENCE: Final = 0.3  # in the fraction of claims that hold; about two of seven


def pair_agreement(scores: Tensor, truth: Tensor, at_least: float = 0.0) -> float:
    """The fraction of pairs of images of one prompt that `scores` and `truth` order alike; NaN without such a pair.

    scores, truth: (P, K), K images of each of P prompts.  Only pairs whose truth differs, and by `at_least`, count.
    """
    agree, count = 0, 0
    for one, other in combinations(range(truth.shape[1]), 2):
        difference = truth[:, one] - truth[:, other]
        counts = (difference != 0) & (difference.abs() >= at_least - 1e-6)
        agree += int(((scores[:, one] - scores[:, other]).sign() == difference.sign())[counts].sum())
        count += int(counts.sum())
    return agree / count if count else float("nan")


def within_prompt_correlation(scores: Tensor, truth: Tensor) -> float:
    """Pearson's correlation of the deviations from each prompt's mean.  scores, truth: (P, K)."""
    deviations = torch.stack([(table - table.mean(1, keepdim=True)).flatten() for table in (scores, truth)])
    return float(torch.corrcoef(deviations.double())[0, 1])
