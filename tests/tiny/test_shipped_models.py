"""The shipped models load with the stock loaders and perform as their model card says."""

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
from textcraftor.tiny.recipe.tokenizer import CONTEXT_LENGTH, new_tokenizer
from textcraftor.tiny.recipe.validation import generate, hard_negative_accuracy, load_aesthetic, load_towers

MODELS = Path(__file__).parents[2] / "data" / "tiny"
CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(not (MODELS / "README.md").exists(), reason="the tiny models are not checked out")


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    loaded = StableDiffusionPipeline.from_pretrained(MODELS / "base", dtype=torch.float32, safety_checker=None)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_base_is_a_stock_pipeline(pipeline: StableDiffusionPipeline) -> None:
    index = json.loads((MODELS / "base/model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["scheduler"] == ["diffusers", "DDIMScheduler"]
    scheduler = pipeline.scheduler.config
    assert (scheduler.beta_start, scheduler.beta_end, scheduler.beta_schedule) == (0.00085, 0.012, "scaled_linear")
    assert (scheduler.prediction_type, scheduler.clip_sample, scheduler.steps_offset) == ("v_prediction", False, 1)
    assert pipeline.vae_scale_factor * pipeline.unet.config.sample_size == 64
    assert pipeline.tokenizer.model_max_length == CONTEXT_LENGTH


def test_base_draws_in_one_line_without_arguments() -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(MODELS / "base")
    assert pipeline("a small red circle", num_inference_steps=1).images[0].size == (64, 64)


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.float32])
def test_all_parts_of_base_load_in_one_precision(dtype: torch.dtype | None) -> None:
    loaded = StableDiffusionPipeline.from_pretrained(MODELS / "base", **({} if dtype is None else {"dtype": dtype}))
    assert {loaded.unet.dtype, loaded.vae.dtype, loaded.text_encoder.dtype} == {dtype or torch.float32}


def test_base_follows_plain_prompts(pipeline: StableDiffusionPipeline) -> None:
    prompts = sample_prompts(24, seed=31, rich_fraction=0.0)
    images = generate(pipeline, prompts)[:, 0]
    assert images.shape == (24, 3, 64, 64)
    right, wrong = Oracle().score(images, prompts).mean(), Oracle().score(images.roll(1, 0), prompts).mean()
    assert right > 0.93 and wrong < 0.6


def test_images_do_not_depend_on_the_batch_size(pipeline: StableDiffusionPipeline) -> None:
    prompts = sample_prompts(4, seed=32, rich_fraction=0.5)
    together, alone = generate(pipeline, prompts), generate(pipeline, prompts, batch=1)
    torch.testing.assert_close(together[:1], alone[:1], atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", ["clip", "hpsv2", "heldout"])
def test_open_clip_loads_its_rewards(name: str) -> None:
    source = f"local-dir:{MODELS / 'rewards' / name}"
    model, _, preprocess = open_clip.create_model_and_transforms(source)
    assert preprocess is not None
    ids = open_clip.get_tokenizer(source)(["a small red circle", "a picture of an azure box"])
    assert ids.shape == (2, CONTEXT_LENGTH)
    one, other = model.encode_text(ids, normalize=True)
    assert one @ other < 0.9
    assert model.visual.image_size in (64, (64, 64))


def test_transformers_loads_pickscore() -> None:
    folder = MODELS / "rewards/pickscore"
    _, report = CLIPModel.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ids = AutoTokenizer.from_pretrained(folder)(["a red circle"], padding="max_length", return_tensors="pt").input_ids
    assert ids.shape == (1, CONTEXT_LENGTH)


def test_aesthetic_head_has_laions_layers() -> None:
    folder = MODELS / "rewards/aesthetic"
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


def test_rewards_distinguish_hard_negatives() -> None:
    for name, towers in load_towers(MODELS, CPU).items():
        assert hard_negative_accuracy(towers, new_tokenizer(), CPU, count=200) > 0.75, name


def test_aesthetic_has_a_gradient_with_respect_to_the_images() -> None:
    images = torch.rand(2, 3, 64, 64, requires_grad=True)
    load_aesthetic(MODELS)(images).sum().backward()
    assert images.grad is not None and images.grad.abs().sum() > 0


def test_weights_are_small_half_precision_safetensors() -> None:
    weights = list(MODELS.rglob("*.safetensors"))
    assert sum(file.stat().st_size for file in weights) < 25e6
    assert not list(MODELS.rglob("*.bin")) and not list(MODELS.rglob("*.pt")) and not list(MODELS.rglob("*.part"))
    for file in weights:
        assert {tensor.dtype for tensor in load_file(file).values()} <= {torch.float16, torch.int64}, file


@pytest.mark.parametrize("folder", ["base/tokenizer", "rewards/clip", "rewards/hpsv2", "rewards/heldout", "rewards/pickscore"])
def test_all_models_have_the_same_tokenizer(folder: str) -> None:
    assert AutoTokenizer.from_pretrained(MODELS / folder).get_vocab() == new_tokenizer().get_vocab()
