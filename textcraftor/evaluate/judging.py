"""Scores of every image by every judge, with one judge in memory at a time."""

from collections.abc import Callable, Sequence

import polars as pl
import torch
from torch import Tensor

from textcraftor.config import MATRIX, ORACLE_JUDGES, EvaluateConfig
from textcraftor.errors import RewardError
from textcraftor.evaluate.batches import Batches
from textcraftor.evaluate.generation import from_bytes
from textcraftor.evaluate.scores import DIVERSITY, ORACLE
from textcraftor.rewards import Reward
from textcraftor.rewards.base import CosineReward
from textcraftor.tiny.diversity import open_diversity, variety
from textcraftor.tiny.oracle import Oracle, detect


def score(
    images: Tensor,
    plan: pl.DataFrame,
    config: EvaluateConfig,
    load: Callable[[str], Reward],
    device: torch.device | str,
    batches: Batches | None = None,
) -> pl.DataFrame:
    """The plan with a column for every judge and one for `diversity`; complete on rank 0, each process scores its batches.

    images: (N, 3, H, W) uint8, in the plan's order; all of them on rank 0, its own on the others.  load: returns a judge by
    name; a judge is freed before the next is loaded.
    Raises RewardError for a judge REWARD_bxb whose reward is not a cosine similarity.
    """
    prompts, batches = plan["prompt"].to_list(), batches or Batches(plan.height, config.batch_size)
    columns: dict[str, Tensor] = {}
    for name in dict.fromkeys(judge.removesuffix(MATRIX) for judge in (*config.judges, config.diversity_judge)):
        if name in ORACLE_JUDGES:
            columns[name] = _score_by_oracle(name, images, prompts, batches, config.images_per_prompt)
            continue
        reward, matrix = load(name), name + MATRIX
        if matrix in config.judges:  # first, because the next call frees the text tower
            columns[matrix] = _score_against_all_prompts(reward, images, prompts, batches, device)
        if name in config.judges:
            columns[name] = _score_own_prompts(reward, images, prompts, batches, device)
        if name == config.diversity_judge:
            features = batches.collect(_features(reward, images, batches, device))
            columns[DIVERSITY] = diversity(features, config.images_per_prompt)
        del reward
    columns = {name: column if name == DIVERSITY else batches.collect(column) for name, column in columns.items()}
    series = [pl.Series(name, columns[name].numpy()).cast(pl.Float64) for name in (*config.judges, DIVERSITY)]
    return plan.with_columns(series)


def judge_images(
    images: Tensor,
    prompts: Sequence[str],
    judges: Sequence[str],
    load: Callable[[str], Reward],
    device: torch.device | str,
    batch_size: int,
) -> dict[str, Tensor]:
    """judge -> (N,) float64, for images that are no part of an evaluation's plan: one for each prompt.

    judges: the oracle, and rewards by name.
    """
    batches, columns = Batches(len(prompts), batch_size), {}
    for name in judges:
        if name == ORACLE:
            columns[name] = _score_by_oracle(name, images, prompts, batches, 1)
        else:
            columns[name] = _score_own_prompts(load(name), images, prompts, batches, device)
    return columns


def diversity(features: Tensor, images_per_prompt: int) -> Tensor:
    """Mean pairwise cosine distance between the images of one prompt; 0 when all are the same image.

    features: (N, D), the images of a prompt adjacent.  Returns (N,): the prompt's value, repeated for its images.
    """
    each = torch.nn.functional.normalize(features.double(), dim=-1).unflatten(0, (-1, images_per_prompt))
    cosine = each @ each.transpose(1, 2)  # (P, I, I), ones on the diagonal
    pairs = images_per_prompt * (images_per_prompt - 1)
    distance = 1 - (cosine.sum((1, 2)) - cosine.diagonal(dim1=1, dim2=2).sum(1)) / pairs
    return distance.clamp(min=0).repeat_interleave(images_per_prompt)


@torch.inference_mode()
def _score_own_prompts(
    reward: Reward, images: Tensor, prompts: Sequence[str], batches: Batches, device: torch.device | str
) -> Tensor:
    unique = list(dict.fromkeys(prompts))
    row_of = {prompt: row for row, prompt in enumerate(unique)}
    text = _text_features(reward, unique, batches)
    reward.drop_text_tower()
    text_of_image = text[torch.tensor([row_of[prompt] for prompt in prompts], device=text.device)]
    return batches.compute(
        lambda rows: reward.score(from_bytes(images[rows], device), text_of_image[rows].to(device)).double(),
        f"judge: {reward.name}",
    )


@torch.inference_mode()
def _score_against_all_prompts(
    reward: Reward, images: Tensor, prompts: Sequence[str], batches: Batches, device: torch.device | str
) -> Tensor:
    """Mean score of each image over all prompts: the row means of the image-prompt matrix.

    A cosine similarity is linear in the text features, so the mean over prompts is the score of their mean.
    """
    if not isinstance(reward, CosineReward):
        raise RewardError(
            f"Judge {reward.name + MATRIX!r}: {reward.name} is not a cosine similarity, and only those "
            "have a matrix of all images and prompts"
        )
    text = _text_features(reward, list(dict.fromkeys(prompts)), batches)
    mean = text.double().mean(0, keepdim=True).to(text)
    return batches.compute(
        lambda rows: reward.score(from_bytes(images[rows], device), mean.expand(rows.stop - rows.start, -1)).double(),
        f"judge: {reward.name + MATRIX}",
    )


@torch.inference_mode()
def _features(reward: Reward, images: Tensor, batches: Batches, device: torch.device | str) -> Tensor:
    return batches.compute(lambda rows: reward.image_features(from_bytes(images[rows], device)), f"diversity: {reward.name}")


def _score_by_oracle(name: str, images: Tensor, prompts: Sequence[str], batches: Batches, images_per_prompt: int) -> Tensor:
    if name == ORACLE:
        oracle = Oracle()
        return batches.compute(lambda rows: oracle.score(from_bytes(images[rows]), prompts[rows]).double(), "judge: oracle")
    if batches.work.rank > 0:  # these compare all images, and rank 0 has them all
        return torch.zeros(len(images), dtype=torch.float64)
    scenes = [scene for rows in batches.all for scene in detect(from_bytes(images[rows]))]
    measure = variety if name == "oracle_variety" else open_diversity
    return torch.from_numpy(measure(scenes, prompts, images_per_prompt))


def _text_features(reward: Reward, prompts: Sequence[str], batches: Batches) -> Tensor:
    """Text features of all prompts. Every process computes them: cheap compared with the images."""
    return torch.cat([reward.text_features(prompts[i : i + batches.size]) for i in range(0, len(prompts), batches.size)])
