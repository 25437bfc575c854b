"""The configuration of a whole run: all sections, and the checks across them."""

import os
from pathlib import Path

from pydantic import Field, model_validator

from textcraftor.config.ablation import AblationConfig
from textcraftor.config.base import BaseConfig, ChainConfig, PrepareConfig, SamplerConfig, switch_step
from textcraftor.config.blend import ORIGINAL, BlendConfig, Weights
from textcraftor.config.downloads import Download
from textcraftor.config.judging import MATRIX, ORACLE_JUDGES, EvaluateConfig, GateConfig, RegistryConfig
from textcraftor.config.prompts import PromptsConfig
from textcraftor.config.rewards import Mix, RewardConfig
from textcraftor.config.section import Name, Positive, Section
from textcraftor.config.training import TrainConfig, TrainUnetConfig
from textcraftor.errors import ConfigError, unknown
from textcraftor.layout import ENCODERS, blend_candidate, candidate_name

REGISTRY_NAMES = ("champion", "challenger", "base")


class Config(Section):
    """A whole run, resolved and checked."""

    profile: str = Field(description="name or file of the profile, as written")
    mixes: tuple[Name, ...] = Field(min_length=1, description="mixes to train, of those in `mix`")
    curriculum: dict[Name, Name] = Field(
        default_factory=dict,
        description="mixes to train after others: mix -> the mix whose tuned encoder it starts from. The frozen encoder, "
        "before the switch, stays the base's",
    )
    unet_mixes: tuple[Name, ...] = Field((), description="of all these mixes, those whose UNet is tuned too")
    blends: tuple[Name, ...] = Field((), description="blends to save and judge, of those in `blend`")
    prompts: PromptsConfig
    downloads: dict[Name, Download] = Field(
        default_factory=dict, description="what `textcraftor fetch` downloads; empty when everything is shipped"
    )
    mirror: str = Field("", description="URL of a hub mirror. Empty: HF_ENDPOINT of the environment, else the hub itself")
    base: BaseConfig
    chain: ChainConfig = ChainConfig()
    sampler: SamplerConfig = SamplerConfig()
    cpu_threads: Positive | None = Field(
        None, description="threads of a run on the CPU; fixed, because another number changes the rounding. None: all cores"
    )
    rewards: dict[Name, RewardConfig] = Field(description="reward models by name, for mixes and as judges")
    mix: dict[Name, Mix] = Field(description="reward mixes by name: reward -> weight; loss = -sum of weight * reward")
    blend: dict[Name, BlendConfig] = Field(default_factory=dict, description="blends of the original and mixes, by name")
    prepare: PrepareConfig = PrepareConfig()
    train: TrainConfig = TrainConfig()
    train_unet: TrainUnetConfig = TrainUnetConfig()
    evaluate: EvaluateConfig
    gate: GateConfig
    registry: RegistryConfig
    ablation: AblationConfig = AblationConfig()

    @model_validator(mode="after")
    def _facts_across_sections(self) -> "Config":
        for name in self.mix:
            if name in REGISTRY_NAMES or name.isdigit():
                raise ValueError(
                    f"mix.{name}: {', '.join(REGISTRY_NAMES)} and numbers stand for models of the registry. Rename the mix"
                )
        self._check_curriculum()
        for name in self.all_mixes:
            if name not in self.mix:
                raise ValueError(f"mixes: {unknown('mix', name, self.mix)}")
            self._check_mix(name, self.mix[name])
        for name, weights in self.ablation.rewards.items():
            for reward in weights:
                if reward not in self.rewards:
                    raise ValueError(f"ablation.rewards.{name}: {unknown('reward', reward, self.rewards)}")
        for name in self.unet_mixes:
            if name not in self.all_mixes:
                raise ValueError(f"unet_mixes: {unknown('mix', name, self.all_mixes)}")
        for name in self.blends:
            self._check_blend(name)
        for name in ORACLE_JUDGES:
            if name in self.rewards:
                raise ValueError(
                    f"rewards.{name}: the name is the tiny world's oracle's, which judges and trains nothing. Rename it"
                )
        known = {*self.rewards, *(name + MATRIX for name in self.rewards), *ORACLE_JUDGES}
        for judge in self.evaluate.judges:
            if judge not in known:
                raise ValueError(unknown("judge", judge, known))
        for judge in self.gate.champion_margin:
            if judge not in self.evaluate.judges:
                raise ValueError(f"gate.champion_margin: {unknown('judge', judge, self.evaluate.judges)}")
        self._check_heldout_judges()
        if self.gate.rank_by not in self.evaluate.judges:
            raise ValueError(f"gate.rank_by: {unknown('judge', self.gate.rank_by, self.evaluate.judges)}")
        for rule in self.gate.rules:
            if rule.judge != "diversity" and rule.judge not in self.evaluate.judges:
                raise ValueError(f"gate.rules: {unknown('judge', rule.judge, {*self.evaluate.judges, 'diversity'})}")
            if (rule.metric == "ratio") != (rule.judge == "diversity") and rule.metric != "mean":
                raise ValueError(
                    f"gate.rules: {rule.judge} has no {rule.metric}. Diversity has mean and ratio, a judge the rest"
                )
        for name in (*self.evaluate.judges, *(reward for mix in self.mix.values() for reward in mix)):
            if name in self.rewards and self.rewards[name].kind == "vae":
                raise ValueError(f"{name} (kind vae) scores no picture: it may be evaluate.diversity_judge, no judge or reward")
        if self.evaluate.diversity_judge not in self.rewards:
            raise ValueError(unknown("reward", self.evaluate.diversity_judge, self.rewards))
        if self.evaluate.prompts > self.prompts.heldout:
            raise ValueError(
                f"evaluate.prompts = {self.evaluate.prompts} is more than prompts.heldout = {self.prompts.heldout}"
            )
        steps = self.train_chain.num_inference_steps
        tuned_steps = steps - switch_step(self.train.switch_at, steps)
        for section, tune in (("train", self.train), ("train_unet", self.train_unet)):
            if tune.grad_steps > tuned_steps:
                raise ValueError(
                    f"{section}.grad_steps = {tune.grad_steps} is more than the {tuned_steps} steps that "
                    f"train.switch_at = {self.train.switch_at} leaves of {steps}"
                )
            for key, size in (("batch_size", tune.batch_size), ("decode_size", tune.decode_size)):
                if size is not None and size % self.train.images_per_prompt:
                    raise ValueError(
                        f"{section}.{key} = {size} is no multiple of train.images_per_prompt = {self.train.images_per_prompt}: "
                        "the images of a prompt belong together"
                    )
        return self

    def _check_heldout_judges(self) -> None:
        """No mix trains on a held-out judge, by its name or path; by their bytes, `textcraftor.heldout` compares weights."""
        heldout = self.evaluate.heldout_judges
        for judge in heldout:
            if judge not in self.evaluate.judges:
                raise ValueError(f"evaluate.heldout_judges: {unknown('judge', judge, self.evaluate.judges)}")
        if heldout and not any(rule.judge in heldout for rule in self.gate.rules):
            raise ValueError(
                f"gate.rules has no rule on a held-out judge. Add one on {' or '.join(heldout)} (evaluate.heldout_judges): "
                "scores of judges that were trained on rise whether or not the images get better"
            )
        held_out = {judge.removesuffix(MATRIX) for judge in heldout}
        for mix, weights in self.mix.items():
            for reward in sorted(reward for reward, weight in weights.items() if weight and reward in self.rewards):
                for judge in sorted(held_out):
                    if reward == judge or (judge in self.rewards and self._same_model(reward, judge)):
                        same = "" if reward == judge else f", which has the weights of {judge!r} ({self.rewards[judge].path})"
                        raise ValueError(
                            f"mix.{mix} trains on {reward!r}{same}, and {judge!r} is held out (evaluate.heldout_judges). "
                            "Take the one out of the mix, or the other out of evaluate.heldout_judges"
                        )

    def _same_model(self, one: str, other: str) -> bool:
        """Whether two rewards name a file in common, or are of one kind that has no files."""
        first, second = self.rewards[one], self.rewards[other]
        paths = [
            {os.path.realpath(path.removeprefix("local-dir:")) for path in (each.path, each.head) if path}
            for each in (first, second)
        ]
        return bool(paths[0] & paths[1]) or (not any(paths) and first.kind == second.kind)

    def _check_curriculum(self) -> None:
        for name in self.curriculum:
            if name in self.mixes:
                raise ValueError(f"curriculum: {name} starts from {self.curriculum[name]}, so take it out of `mixes`")
        for name, start in self.curriculum.items():
            if start not in (*self.mixes, *self.curriculum):
                raise ValueError(f"curriculum.{name}: {unknown('mix', start, (*self.mixes, *self.curriculum))}")
        if left := self.curriculum.keys() - self.all_mixes:
            raise ValueError(
                f"curriculum: {', '.join(sorted(left))} start from each other. Let one start from a mix in `mixes`"
            )
        if self.train.start_from and Path(self.train.start_from).is_relative_to(ENCODERS):
            raise ValueError(
                f"train.start_from = {self.train.start_from} is an output of this run. Name the mixes in `curriculum` instead"
            )

    def _check_blend(self, name: str) -> None:
        if name not in self.blend:
            raise ValueError(f"blends: {unknown('blend', name, self.blend)}")
        weights, steps = Weights.of(self.blend[name].weights), self.chain.num_inference_steps
        for part in weights.names:
            if part not in (ORIGINAL, *self.all_mixes):
                raise ValueError(f"blend.{name}: {unknown('encoder', part, (ORIGINAL, *self.all_mixes))}")
        try:
            weights.stages(switch_step(self.sampler.switch_at, steps), steps)
        except ConfigError as error:
            raise ValueError(f"blend.{name}: {error}") from None

    def _check_mix(self, name: str, weights: Mix) -> None:
        for reward in weights:
            if reward not in self.rewards:
                raise ValueError(f"mix.{name}: {unknown('reward', reward, self.rewards)}")
            if weights[reward] and self.rewards[reward].kind == "diversity" and self.train.images_per_prompt < 2:
                raise ValueError(
                    f"mix.{name}: {reward} compares the images of a prompt, and train.images_per_prompt is 1. Set it to 2"
                )
        constrained = any(self.rewards[r].kind == "clip" and w > 0 for r, w in weights.items())
        if not constrained and not self.train.allow_without_clip:
            raise ValueError(
                f"mix.{name} has no CLIP constraint (a reward of kind 'clip' with weight > 0). Without it a single "
                "reward collapses the model (paper figure 6). Add one, or set train.allow_without_clip: true"
            )

    @property
    def train_chain(self) -> ChainConfig:
        """The chain as training runs it: `chain`, with `train.num_inference_steps` where that is set."""
        steps = self.train.num_inference_steps or self.chain.num_inference_steps
        return self.chain.model_copy(update={"num_inference_steps": steps})

    @property
    def all_mixes(self) -> tuple[str, ...]:
        """Every mix that is trained, each after the one that it starts from."""
        ordered = list(self.mixes)
        for _ in self.curriculum:
            ordered += [mix for mix, start in self.curriculum.items() if start in ordered and mix not in ordered]
        return tuple(ordered)

    @property
    def reward_mixes(self) -> dict[str, Mix]:
        """Mixes of one reward each under the CLIP constraint, which `textcraftor ablate` trains on."""
        if self.ablation.rewards:
            return self.ablation.rewards
        weights = {reward: weight for reward, weight in self.mix[self.mixes[0]].items() if weight}
        constraint = {reward: weight for reward, weight in weights.items() if self.rewards[reward].kind == "clip"}
        return {reward: {**constraint, reward: weight} for reward, weight in weights.items()}

    @property
    def candidates(self) -> tuple[str, ...]:
        """Every candidate of the run, the base excluded: each mix, each mix with its UNet, each blend."""
        unets = (candidate_name(mix, unet=True) for mix in self.unet_mixes)
        return (*self.all_mixes, *unets, *map(blend_candidate, self.blends))
