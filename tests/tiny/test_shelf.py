"""Everything that ships loads with the stock loaders, and does what the model card says."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from transformers import AutoTokenizer, CLIPModel, CLIPVisionModelWithProjection

from textcraftor.tiny.language import sample_prompts
from textcraftor.tiny.oracle import Oracle
from textcraftor.tiny.recipe.exam import GUIDANCE_SCALE, generate, load_beholder, load_towers, twin_accuracy
from textcraftor.tiny.recipe.tokenizer import CONTEXT_LENGTH, new_tokenizer

SHELF = Path(__file__).parents[2] / "data" / "tiny"
CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(not (SHELF / "README.md").exists(), reason="the tiny models are not checked out")


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    loaded = StableDiffusionPipeline.from_pretrained(SHELF / "base", dtype=torch.float32, safety_checker=None)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_base_is_a_stock_pipeline(pipeline: StableDiffusionPipeline) -> None:
    index = json.loads((SHELF / "base/model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["scheduler"] == ["diffusers", "DDIMScheduler"]
    scheduler = pipeline.scheduler.config
    assert (scheduler.beta_start, scheduler.beta_end, scheduler.beta_schedule) == (0.00085, 0.012, "scaled_linear")
    assert (scheduler.prediction_type, scheduler.clip_sample, scheduler.steps_offset) == ("epsilon", False, 1)
    assert pipeline.vae_scale_factor * pipeline.unet.config.sample_size == 64
    assert pipeline.tokenizer.model_max_length == CONTEXT_LENGTH


def test_base_draws_what_plain_prompts_say(pipeline: StableDiffusionPipeline) -> None:
    prompts = sample_prompts(24, seed=31, rich_fraction=0.0)
    images = generate(pipeline, prompts, GUIDANCE_SCALE)
    assert images.shape == (24, 3, 64, 64)
    right, wrong = Oracle().score(images, prompts).mean(), Oracle().score(images.roll(1, 0), prompts).mean()
    assert right > 0.7 > 0.55 > wrong


def test_a_prompt_keeps_its_picture_in_any_batch(pipeline: StableDiffusionPipeline) -> None:
    prompts = sample_prompts(4, seed=32, rich_fraction=0.5)
    together, alone = generate(pipeline, prompts, 3.0), generate(pipeline, prompts, 3.0, batch=1)
    torch.testing.assert_close(together[:1], alone[:1], atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", ["clip", "hpsv2", "heldout"])
def test_open_clip_reads_its_folders(name: str) -> None:
    where = f"local-dir:{SHELF / 'rewards' / name}"
    model, _, preprocess = open_clip.create_model_and_transforms(where)
    assert preprocess is not None
    ids = open_clip.get_tokenizer(where)(["a small red circle", "a picture of an azure box"])
    assert ids.shape == (2, CONTEXT_LENGTH)
    assert torch.equal(model.encode_text(ids[:1]), model.encode_text(ids)[:1]) or ids[0].ne(ids[1]).any()
    assert model.visual.image_size in (64, (64, 64))


def test_pickscore_is_a_clip_model() -> None:
    folder = SHELF / "rewards/pickscore"
    _, report = CLIPModel.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ids = AutoTokenizer.from_pretrained(folder)(["a red circle"], padding="max_length", return_tensors="pt").input_ids
    assert ids.shape == (1, CONTEXT_LENGTH)


def test_aesthetic_has_laions_head() -> None:
    folder = SHELF / "rewards/aesthetic"
    tower, report = CLIPVisionModelWithProjection.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert tower.config.hidden_act == "quick_gelu"
    head = load_file(folder / "head.safetensors")
    assert sorted(head) == sorted(f"layers.{index}.{part}" for index in (0, 2, 4, 6, 7) for part in ("weight", "bias"))
    assert [tuple(head[f"layers.{index}.weight"].shape) for index in (0, 2, 4, 6, 7)] == [
        (1024, 128),
        (128, 1024),
        (64, 128),
        (16, 64),
        (1, 16),
    ]


def test_rewards_see_single_attributes() -> None:
    for name, towers in load_towers(SHELF, CPU).items():
        assert twin_accuracy(towers, new_tokenizer(), CPU, count=200) > 0.75, name


def test_rewards_have_gradients_on_images() -> None:
    images = torch.rand(2, 3, 64, 64, requires_grad=True)
    load_beholder(SHELF)(images).sum().backward()
    assert images.grad is not None and images.grad.abs().sum() > 0


def test_it_all_stays_small() -> None:
    weights = list(SHELF.rglob("*.safetensors"))
    assert sum(file.stat().st_size for file in weights) < 25e6
    assert not list(SHELF.rglob("*.bin")) and not list(SHELF.rglob("*.pt")) and not list(SHELF.rglob("*.part"))
    for file in weights:
        assert {tensor.dtype for tensor in load_file(file).values()} <= {torch.float16, torch.int64}, file


@pytest.mark.parametrize("folder", ["base/tokenizer", "rewards/clip", "rewards/hpsv2", "rewards/heldout", "rewards/pickscore"])
def test_all_speak_with_the_same_tokenizer(folder: str) -> None:
    assert AutoTokenizer.from_pretrained(SHELF / folder).get_vocab() == new_tokenizer().get_vocab()
