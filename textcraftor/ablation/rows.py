"""The rows of each table: what is trained, with which settings, and how it is sampled. Pure functions of the configuration."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from types import MappingProxyType
from typing import Any, Final

from textcraftor.config import Config, switch_step
from textcraftor.errors import ConfigError, unknown

TEXT, UNET = "train", "train-unet"  # stages of a training, and the verbs that run them
PAPER_STEPS: Final = 25  # of the chain, in the paper
PAPER_SWITCHES: Final = ((5, 5), (5, 10), (5, 15), (5, 25), (10, 10), (15, 15))  # table 4: K in training, tuned in sampling
NOTHING: Final[Mapping[str, Any]] = MappingProxyType({})


@dataclass(frozen=True)
class Training:
    """One candidate's training.

    mix: reward -> weight.  stages: in order, of TEXT and UNET.  settings: over those of the run.
    """

    mix: Mapping[str, float]
    stages: tuple[str, ...]
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """One evaluation.

    label: unique in its table.  facts: column -> what it says, beside the scores.
    trained: what is evaluated: a training, the run's own mix by name, or None for the base.  sampling: settings over the run's.
    """

    label: str
    facts: Mapping[str, str]
    trained: Training | str | None
    sampling: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """One table of the paper.

    about: what is compared, for the reader of the page.
    """

    title: str
    about: str
    rows: Callable[[Config], Sequence[Row]]


def table1(config: Config) -> list[Row]:
    """Base; each reward alone under the CLIP constraint; the first mix on the text encoder, the UNet, both."""
    steps, mix = config.ablation.steps, config.mixes[0]
    text, unet = steps - steps // 2, steps // 2

    def row(label: str, part: str, weights: Mapping[str, float], stages: tuple[str, ...], text: int, unet: int) -> Row:
        settings = {
            TEXT: _budget(config, "train", text or 1) | {"allow_without_clip": True},
            UNET: _budget(config, "train_unet", unet or 1) | {"encoder": "tuned" if TEXT in stages else "original"},
        }
        images = _images(config) * steps
        facts = {"rewards": label, "tuned": part, "images": f"{images:,}"}
        return Row(f"{label}, {part}", facts, Training(weights, stages, _sections(settings)))

    singles = [row(name, "text encoder", weights, (TEXT,), steps, 0) for name, weights in config.reward_mixes.items()]
    if steps < 2:
        raise ConfigError("ablation.steps = 1 cannot be halved between text encoder and UNet. Set it to 2 or more")
    every = _nonzero(config.mix[mix])
    return [
        Row("base", {"rewards": "base", "tuned": "nothing", "images": "0"}, None),
        *singles,
        row(mix, "text encoder", every, (TEXT,), steps, 0),
        row(mix, "UNet", every, (UNET,), 0, steps),
        row(mix, "text encoder + UNet", every, (TEXT, UNET), text, unet),
    ]


def table4(config: Config) -> list[Row]:
    """Base; the first mix with K steps of gradient, and some tuned in sampling, in the paper's fractions of the chain."""
    train_steps, steps = config.train_chain.num_inference_steps, config.chain.num_inference_steps
    rows: list[Row] = []
    for trained, sampled in PAPER_SWITCHES:
        switch, sampling = (float(1 - Fraction(tuned, PAPER_STEPS)) for tuned in (trained, sampled))
        grad_steps = max(1, train_steps - switch_step(switch, train_steps))
        tuned_steps = max(1, steps - switch_step(sampling, steps))
        train = {
            **_budget(config, "train", config.ablation.steps),
            **{"gradient": "truncated", "grad_steps": grad_steps, "allow_without_clip": True},
            "switch_at": (train_steps - grad_steps) / train_steps,
        }
        settings = _sections({TEXT: train, UNET: {"grad_steps": 1}})  # the UNet is not tuned here; its K must fit all the same
        facts = {
            "paper": f"{trained}/{sampled}",
            "K in training": f"{grad_steps} of {train_steps}",
            "tuned in sampling": f"{tuned_steps} of {steps}",
        }
        at = {"sampler": {"switch_at": (steps - tuned_steps) / steps}, **_fitting(UNET, 1)}
        training = Training(_nonzero(config.mix[config.mixes[0]]), (TEXT,), settings)
        rows.append(Row(f"{trained}/{sampled}", facts, training, at))
    return [Row("base", {**dict.fromkeys(rows[0].facts, ""), "paper": "base"}, None, rows[0].sampling), *rows]


def table5(config: Config) -> list[Row]:
    """The run's own tuned encoder and the base, with other samplers and numbers of steps; nothing is trained."""
    own, steps = config.chain.scheduler, config.chain.num_inference_steps
    chains = [(own, max(2, steps // 2)), (own, steps), (own, 2 * steps), ("dpmsolver", steps), ("euler", steps)]
    fixed = {"train": {"num_inference_steps": config.train_chain.num_inference_steps}}  # or K might not fit a short chain
    rows = []
    for scheduler, count in dict.fromkeys(chains):
        sampling = {"chain": {"scheduler": scheduler, "num_inference_steps": count}, **fixed}
        for name in (None, config.mixes[0]):
            facts = {"sampler": scheduler, "steps": str(count), "encoder": name or "base"}
            rows.append(Row(f"{scheduler} {count}, {name or 'base'}", facts, name, sampling))
    return rows


def figure6(config: Config) -> list[Row]:
    """One reward with and without the CLIP constraint, along the training.

    Trainings of other lengths share batches and learning rate, so that a shorter one is the beginning of the longer.
    """
    name, mixes, ablation = config.ablation.collapse, config.reward_mixes, config.ablation
    if name not in mixes:
        raise ConfigError(f"ablation.collapse: {unknown('mix', name, mixes)}")
    alone = {reward: weight for reward, weight in _nonzero(mixes[name]).items() if config.rewards[reward].kind != "clip"}
    if not alone:
        raise ConfigError(f"ablation.collapse = {name!r} is the CLIP constraint itself. Name a mix with another reward")
    budget = _budget(config, "train", ablation.steps) | {"allow_without_clip": True}
    if config.train.decay != "constant":
        budget["decay"] = "constant"
    points = sorted({max(1, ablation.steps // 2**halvings) for halvings in range(ablation.points)})
    rows = [Row("base", {"constraint": "base", "steps": "0"}, None)]
    for constraint, mix in (("with", _nonzero(mixes[name])), ("without", alone)):
        for steps in points:
            training = Training(mix, (TEXT,), _sections({TEXT: budget | {"steps": steps}}))
            rows.append(Row(f"{constraint}, {steps}", {"constraint": constraint, "steps": str(steps)}, training))
    return rows


TABLES: Final[Mapping[str, Table]] = {
    "table1": Table(
        "Rewards and tuned parts (paper, table 1)",
        "Each reward alone under the CLIP constraint, then all rewards of the first mix: on the text encoder, on the UNet with "
        "the original text encoder, and on both. Every row has been trained on the same number of images; text encoder + UNet "
        "on half of them each.",
        table1,
    ),
    "table4": Table(
        "Steps with gradient, and tuned steps in sampling (paper, table 4)",
        "K is the number of denoising steps that carry gradient in training (`truncated`); the tuned encoder conditions just "
        "these. In sampling it conditions the last steps, as many as the next column says. The paper's figures are of 25 "
        "steps; ours are the same fractions of the chain.",
        table4,
    ),
    "table5": Table(
        "Samplers and numbers of steps (paper, table 5)",
        "The encoder of the run's first mix as it is in `data/encoders`, and the base. Nothing is trained again. Differences "
        "are to the base with the same sampler.",
        table5,
    ),
    "figure6": Table(
        "A reward without the CLIP constraint (paper, figure 6)",
        "One reward with and without the constraint, along the training.",
        figure6,
    ),
}


def _nonzero(mix: Mapping[str, float]) -> dict[str, float]:
    return {reward: weight for reward, weight in mix.items() if weight}


def _images(config: Config) -> int:
    """Images of an optimiser step."""
    return config.ablation.batch_size or config.train.batch_size * config.train.accumulation


def _budget(config: Config, section: str, steps: int) -> dict[str, Any]:
    """Settings of a training of `steps` optimiser steps, each of the ablation's number of images.

    Micro batches are at most as large as the run's, whatever fits its memory. Raises ConfigError when the images of a prompt
    cannot stay together.
    """
    tune, images, together = getattr(config, section), _images(config), config.train.images_per_prompt
    if images % together:
        raise ConfigError(f"ablation.batch_size = {images} is no multiple of train.images_per_prompt = {together}")
    sizes = [size for size in range(together, images + 1, together) if images % size == 0]
    size = max([size for size in sizes if size <= tune.batch_size] or sizes[:1])
    warmup = min(tune.warmup_steps, steps // 4)
    return {
        **{"steps": steps, "batch_size": size, "accumulation": images // size, "warmup_steps": warmup},
        "grid_every": config.ablation.steps,
    }


def _sections(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by the names of their sections, from those by stage."""
    return {stage.replace("-", "_"): values for stage, values in settings.items()}


def _fitting(stage: str, grad_steps: int) -> dict[str, Any]:
    return {stage.replace("-", "_"): {"grad_steps": grad_steps}}
