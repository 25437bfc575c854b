"""Blends of encoders on stock diffusers pipelines, and in our own chain."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionXLImg2ImgPipeline
from safetensors.torch import load_file
from torch import Tensor

from tests.fixtures import CHAIN, own_base
from textcraftor.candidate import Candidate
from textcraftor.chain.sampler import Sampler
from textcraftor.config import Weights
from textcraftor.control import Control
from textcraftor.errors import ConfigError, ModelError
from textcraftor.models.base import Base, load_candidate
from textcraftor.models.blended import load_blend, merge
from textcraftor.models.negative_embedding import NegativeEmbedding
from textcraftor.models.saving import save_module

CPU = torch.device("cpu")
PROMPTS = ["a small red circle", "a large blue square on a black background"]
Families = Callable[[str], Base]
NO_CHECKER = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


@pytest.fixture
def family(family_folders: dict[str, Path]) -> Families:
    return lambda name: own_base(family_folders[name])


def tuned_folder(base: Base, folder: Path, seed: int) -> Path:
    """A candidate's folder: the base's encoders, moved a little."""
    torch.manual_seed(seed)
    for name, encoder in base.encoders.items():
        moved = copy.deepcopy(encoder)
        for parameter in moved.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        save_module(moved, folder / name)
    return folder


@pytest.fixture
def folders(family: Families, tmp_path: Path) -> dict[str, Path]:
    return {name: tuned_folder(family("sd1"), tmp_path / name, seed) for seed, name in enumerate(("warm", "cold"))}


def draw(pipe: Any, **arguments: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    settings = {"height": 32, "width": 32, "num_inference_steps": 5, "guidance_scale": 3.0, "output_type": "pt"}
    return pipe(generator=generator, **{**settings, **arguments}).images


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
@pytest.mark.parametrize("guidance_scale", [3.0, 1.0])
def test_strength_0_is_the_pipeline_and_strength_1_the_tuned_encoder(
    family: Families, tmp_path: Path, name: str, guidance_scale: float
) -> None:
    """Bit for bit: for a batch, several images of a prompt, with guidance and without, both of SDXL's encoders."""
    base = family(name)
    pipe, folder = base.pipe, tuned_folder(base, tmp_path / "tuned", 1)
    more = {"num_images_per_prompt": 2, "guidance_scale": guidance_scale}

    def blended(strength: float) -> Tensor:
        return draw(
            pipe, **Control.from_folders({"tuned": folder}, Weights.between("tuned", strength), 0.0)(pipe, PROMPTS), **more
        )

    tuned = load_candidate(Candidate.at(folder), base)
    assert tuned
    assert torch.equal(blended(0), draw(pipe, prompt=PROMPTS, **more))
    assert torch.equal(blended(1), draw(base._pipeline_with(tuned.encoders), prompt=PROMPTS, **more))
    assert blended(0.5).shape == (4, 3, 32, 32) and (blended(0.5) - blended(0)).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_embeddings_are_linear_in_the_weights(family: Families, tmp_path: Path, name: str) -> None:
    base = family(name)
    folders = {each: tuned_folder(base, tmp_path / each, seed) for seed, each in enumerate("ab")}

    def said(*terms: str) -> dict[str, Tensor]:
        words = Control.from_folders(folders, terms, 0.0)(base.pipe, PROMPTS, "a grey background")
        return {key: value for key, value in words.items() if key.endswith("embeds")}

    original, a, b, mixed = said("original=1"), said("a=1"), said("b=1"), said("original=0.2", "a=1.1", "b=-0.3")
    assert len(mixed) == (4 if name == "sdxl" else 2)
    for key, value in mixed.items():
        torch.testing.assert_close(value, 0.2 * original[key] + 1.1 * a[key] - 0.3 * b[key], atol=2e-5, rtol=0)
        assert not torch.allclose(original[key], a[key], atol=1e-2)


def test_our_chain_blends_as_the_stock_pipeline_does(family: Families, folders: dict[str, Path]) -> None:
    """Weights that change along the chain included."""
    base = family("sd1")
    sampler = Sampler(base, CHAIN, 0.4)
    pipe = copy.copy(base.pipe)
    pipe.scheduler = copy.deepcopy(sampler.solver._scheduler)
    for terms in (["original=0.3", "warm=0.7"], ["warm=1@0..0.6", "original=-0.5@0.6..1", "cold=1.5@0.6..1"]):
        blend = load_blend({name: Candidate.at(folder) for name, folder in folders.items()}, Weights.parse(terms), base)
        words = Control.from_folders(folders, terms, 0.4)(pipe, PROMPTS)
        stock = draw(pipe, **words, latents=sampler.noise([1, 2]))
        ours = sampler.generate(PROMPTS, [1, 2], blend)
        torch.testing.assert_close(ours, stock, atol=1e-5, rtol=0)
        assert (ours - sampler.generate(PROMPTS, [1, 2])).abs().max() > 1e-3


def test_a_blend_in_our_chain_ends_in_the_base_and_in_the_candidate(family: Families, folders: dict[str, Path]) -> None:
    base = family("sd1")
    sampler, candidate = Sampler(base, CHAIN, 0.4), Candidate.at(folders["warm"])
    drawn = [
        sampler.generate(PROMPTS, [1, 2], load_blend({"warm": candidate}, Weights.between("warm", strength), base))
        for strength in (0.0, 1.0)
    ]
    assert torch.equal(drawn[0], sampler.generate(PROMPTS, [1, 2]))
    assert torch.equal(drawn[1], sampler.generate(PROMPTS, [1, 2], load_candidate(candidate, base)))


@pytest.mark.parametrize(
    ("name", "img2img"), [("sd1", StableDiffusionImg2ImgPipeline), ("sdxl", StableDiffusionXLImg2ImgPipeline)]
)
def test_img2img_begins_within_the_chain(family: Families, tmp_path: Path, name: str, img2img: Any) -> None:
    """The switch is a place in the whole chain: what begins after it is tuned from its first step on."""
    base = family(name)
    known = {name: part for name, part in base.pipe.components.items() if part is not None}
    pipe = img2img(**known, **({"add_watermarker": False} if name == "sdxl" else NO_CHECKER))
    pipe.set_progress_bar_config(disable=True)
    folders = {"tuned": tuned_folder(base, tmp_path / "tuned", 1)}
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(3))

    def drawn(switch_at: float, strength: float, told: float | None = None) -> Tensor:
        control = Control.from_folders(folders, switch_at=switch_at)
        words = control(pipe, PROMPTS[0], strength=told or strength, num_inference_steps=10)
        generator = torch.Generator().manual_seed(0)
        call = {**words, "strength": strength, "image": picture, "guidance_scale": 3.0, "output_type": "pt"}
        return pipe(generator=generator, **call).images

    start = 0.6 if name == "sdxl" else 0.5  # PNDM makes one call more, so it begins one step earlier
    assert torch.equal(drawn(0.4, start), drawn(0.0, start))  # it begins at step 4, where the switch is
    assert not torch.equal(drawn(0.4, start + 0.1), drawn(0.0, start + 0.1))
    with pytest.raises(ConfigError, match=r"begins at UNet call 6 of 1., .* control\(pipe, prompt, strength"):
        drawn(0.4, 0.4, told=1.0)


def test_a_learned_negative_embedding_stands_for_the_empty_prompt(family: Families, folders: dict[str, Path]) -> None:
    base = family("sd1")
    shape = base.conditioning([""]).prompt_embeds.shape[1:]
    learned = torch.randn(1, *shape)
    NegativeEmbedding(learned).save_pretrained(folders["warm"] / "negative_embedding")
    control = Control.from_folders({"warm": folders["warm"]}, {"original": 0.5, "warm": 0.5}, 0.0)
    own = base.conditioning([""]).prompt_embeds[:1]
    torch.testing.assert_close(control(base.pipe, "a")["negative_prompt_embeds"], (own + learned) / 2)
    said = control(base.pipe, "a", "a grey background")["negative_prompt_embeds"]
    assert (said - (own + learned) / 2).abs().max() > 1e-2


def test_prompt_weighting_is_left_to_the_caller(family: Families, folders: dict[str, Path]) -> None:
    pipe = family("sd1").pipe

    def louder(pipe: Any) -> list[Tensor]:
        positive, negative = pipe.encode_prompt("a red circle", "cpu", 1, True)
        return [1.3 * positive, negative]

    control = Control.from_folders({"warm": folders["warm"]}, switch_at=0.0)
    ours = control(pipe, encode=louder)["prompt_embeds"]
    torch.testing.assert_close(ours, 1.3 * control(pipe, "a red circle")["prompt_embeds"])


def test_an_encoder_of_another_base_is_refused(family: Families, folders: dict[str, Path]) -> None:
    wider = family("sd2").pipe
    with pytest.raises(ModelError, match="does not fit the text_encoder of this pipeline"):
        Control.from_folders({"warm": folders["warm"]})(wider, "a")
    config = folders["warm"] / "text_encoder/config.json"  # the same shapes, another computation
    config.write_text(json.dumps({**json.loads(config.read_text()), "hidden_act": "gelu"}))
    with pytest.raises(ModelError, match="tuned on another base: hidden_act of its text_encoder is gelu, and quick_gelu in"):
        Control.from_folders({"warm": folders["warm"]})(family("sd1").pipe, "a")


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"original": 0.5, "warm": 0.4}, "sum to 0.9"),
        ({"original": 0.5, "wram": 0.5}, "Unknown encoder 'wram'"),
        ({"warm": float("nan")}, "finite"),
        ({}, "needs weights"),
        (None, "2 encoders need weights"),
    ],
)
def test_wrong_weights_are_refused_at_once(folders: dict[str, Path], weights: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Control.from_folders(folders, weights)


def test_merged_weights_are_the_weighted_sum(family: Families, folders: dict[str, Path]) -> None:
    base = family("sd1")
    candidates = {name: Candidate.at(folder) for name, folder in folders.items()}
    merged = merge(candidates, Weights.parse(["original=0.2", "warm=1", "cold=-0.2"]), base)
    assert list(merged) == ["text_encoder"]
    states = [load_file(folders[name] / "text_encoder/model.safetensors") for name in ("warm", "cold")]
    for key, value in base.text_encoder.state_dict().items():
        warm, cold = (state.get(key, state.get(f"text_model.{key}")) for state in states)
        torch.testing.assert_close(merged["text_encoder"].state_dict()[key], 0.2 * value + warm - 0.2 * cold)
    alone = merge(candidates, Weights.parse(["warm=1"]), base)["text_encoder"].state_dict()
    assert all(torch.equal(alone[key], states[0].get(key, states[0].get(f"text_model.{key}"))) for key in alone)
    with pytest.raises(ModelError, match="the same in every step"):
        merge(candidates, Weights.parse(["warm=1@0..0.5", "cold=1@0.5..1"]), base)
