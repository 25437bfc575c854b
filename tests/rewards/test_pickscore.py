"""PickScore compared with transformers' own processor and model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

from textcraftor.config import RewardConfig
from textcraftor.errors import ModelError, RewardError
from textcraftor.rewards import Reward, load_reward


@pytest.fixture
def reward(pickscore_folder: Path) -> Reward:
    return load_reward("pickscore", RewardConfig(kind="pickscore", path=str(pickscore_folder)))


def reference(folder: Path, pixels: Tensor, prompts: list[str]) -> Tensor:
    """The diagonal of transformers' own logits."""
    model = CLIPModel.from_pretrained(folder).eval()
    tokens = AutoTokenizer.from_pretrained(folder)(prompts, padding=True, return_tensors="pt")
    with torch.no_grad():
        output = model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, pixel_values=pixels)
    return output.logits_per_image.diagonal()


def test_score_is_the_diagonal_of_the_models_own_logits(reward, pickscore_folder, images, prompts):
    expected = reference(pickscore_folder, reward.preprocess(images), prompts)
    score = reward.score(images, reward.text_features(prompts))
    torch.testing.assert_close(score, expected, rtol=1e-5, atol=1e-4)
    assert expected.std() > 0.5  # the random model's scores differ


def test_pixels_match_the_models_own_processor(reward, pickscore_folder, images, pil_images):
    processor = CLIPImageProcessor.from_pretrained(pickscore_folder)
    expected = processor(pil_images, return_tensors="pt").pixel_values
    assert reward.preprocess(images).sub(expected).abs().max() < 0.02  # a uint8 step is about 0.015


def test_scores_do_not_depend_on_the_batch(reward, images, prompts):
    features = reward.text_features(prompts)
    together = reward.score(images, features)
    alone = torch.cat([reward.score(images[i : i + 1], features[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-4)


def test_text_features_do_not_depend_on_the_batch(reward, prompts):
    alone = torch.cat([reward.text_features([prompt]) for prompt in prompts])
    torch.testing.assert_close(reward.text_features(prompts), alone, rtol=1e-5, atol=1e-6)
    assert not reward.text_features(prompts).requires_grad


def test_scale_is_exact_in_half_precision(pickscore_folder):
    config = RewardConfig(kind="pickscore", path=str(pickscore_folder))
    reward = load_reward("pickscore", config, dtype="bfloat16")
    assert reward.scale == pytest.approx(99.484, abs=1e-3)
    assert reward.range == (-reward.scale, reward.scale)


def test_bfloat16_towers_give_float32_scores(reward, pickscore_folder, images, prompts):
    config = RewardConfig(kind="pickscore", path=str(pickscore_folder))
    low = load_reward("pickscore", config, dtype="bfloat16")
    score = low.score(images, low.text_features(prompts))
    assert score.dtype == torch.float32
    torch.testing.assert_close(score, reward.score(images, reward.text_features(prompts)), rtol=0, atol=2.0)


def test_long_prompts_are_truncated_and_counted(reward):
    long = " ".join(["red"] * 20)
    assert reward.truncated([long, " ".join(["red"] * 6)]) == 1  # six words, start and end fill the context of 8
    cut = " ".join(["red"] * 6)  # the context of 8 less start and end
    torch.testing.assert_close(reward.text_features([long]), reward.text_features([cut]))


def test_scoring_works_without_the_text_tower(reward, images, prompts):
    features = reward.text_features(prompts)
    before = reward.score(images, features)
    parameters = sum(p.numel() for p in reward.parameters())
    reward.drop_text_tower()
    reward.drop_text_tower()  # idempotent
    assert sum(p.numel() for p in reward.parameters()) < 0.7 * parameters
    assert torch.equal(reward.score(images, features), before)
    with pytest.raises(RewardError, match="text tower was dropped"):
        reward.text_features(prompts)


def test_the_tokenizer_may_be_in_another_folder(pickscore_folder, tmp_path, prompts):
    bare = shutil.copytree(pickscore_folder, tmp_path / "bare")
    for file in bare.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match="tokenizer"):
        load_reward("pickscore", RewardConfig(kind="pickscore", path=str(bare)))
    config = RewardConfig(kind="pickscore", path=str(bare), tokenizer=str(pickscore_folder))
    assert load_reward("pickscore", config).text_features(prompts).shape == (3, 12)


def test_the_tokenizer_of_another_model_is_rejected(pickscore_folder, tmp_path):
    foreign = shutil.copytree(pickscore_folder, tmp_path / "foreign")
    config = json.loads((foreign / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 4
    (foreign / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"end of text 9.* end of text 4"):
        load_reward("pickscore", RewardConfig(kind="pickscore", path=str(foreign)))


def damaged(folder: Path, target: Path, change) -> RewardConfig:
    shutil.copytree(folder, target)
    state = load_file(target / "model.safetensors")
    change(state)
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    return RewardConfig(kind="pickscore", path=str(target))


def missing(state):
    del state["text_projection.weight"]


def unexpected(state):
    state["surplus.weight"] = torch.zeros(2)


def misshaped(state):
    state["vision_model.embeddings.position_embedding.weight"] = torch.zeros(5, 16)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (missing, r"missing keys: text_projection\.weight"),
        (unexpected, r"unexpected keys: surplus\.weight"),
        (misshaped, r"mismatched keys: .*position_embedding.* is \(5, 16\) instead of \(17, 16\)"),
    ],
)
def test_weights_that_do_not_fit_are_rejected(pickscore_folder, tmp_path, change, named):
    config = damaged(pickscore_folder, tmp_path / "damaged", change)
    with pytest.raises(ModelError, match=rf"damaged/model\.safetensors does not fit.*{named}"):
        load_reward("pickscore", config)


def test_truncated_weights_are_reported_in_one_line(pickscore_folder, tmp_path):
    target = shutil.copytree(pickscore_folder, tmp_path / "cut")
    weights = (target / "model.safetensors").read_bytes()
    (target / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ModelError) as error:
        load_reward("pickscore", RewardConfig(kind="pickscore", path=str(target)))
    assert str(target) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("path", ["", "nowhere/at/all", "/nonexistent"])
def test_a_missing_path_reports_what_is_expected(path):
    with pytest.raises(ModelError, match=r"does not exist; expected a CLIPModel \(config.json and"):
        load_reward("pickscore", RewardConfig(kind="pickscore", path=path))
