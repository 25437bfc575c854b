"""ImageReward compared with an independent BLIP: timm's vision transformer, and BERT written out tensor by tensor."""

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor
from transformers import AutoTokenizer

from tests.rewards.conftest import BLIP_BLOCKS, BLIP_PATCH, BLIP_WIDTH, MED, SIZE
from textcraftor.config import RewardConfig
from textcraftor.errors import ModelError, RewardError
from textcraftor.rewards import Reward, load_reward

PROMPTS = ["a red circle", "big blue square", "blue " * 50]
State = dict[str, Tensor]


@pytest.fixture
def reward(imagereward_folder: Path) -> Reward:
    return load_reward("imagereward", RewardConfig(kind="imagereward", path=str(imagereward_folder)))


@pytest.fixture
def state(imagereward_folder: Path) -> State:
    return torch.load(imagereward_folder / "ImageReward.pt", weights_only=True)


def with_prefix(state: State, prefix: str) -> State:
    """The tensors whose keys start with `prefix`, without it."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def encode_image(state: State, pixels: Tensor) -> Tensor:
    """Hidden states of timm's vision transformer, whose keys BLIP's image tower shares."""
    tower = timm.models.vision_transformer.VisionTransformer(
        img_size=SIZE,
        patch_size=BLIP_PATCH,
        embed_dim=BLIP_WIDTH,
        depth=BLIP_BLOCKS,
        num_heads=BLIP_WIDTH // 64,
        num_classes=0,
    ).eval()
    tower.load_state_dict(with_prefix(state, "blip.visual_encoder."))
    return tower.forward_features(pixels)


def attend(state: State, hidden: Tensor, source: Tensor, mask: Tensor | None) -> Tensor:
    """BERT's attention block with residual connection and norm (Devlin et al. 2019)."""
    query, key, value = (
        F.linear(x, state[f"self.{name}.weight"], state[f"self.{name}.bias"]).unflatten(2, (3, -1)).transpose(1, 2)
        for name, x in (("query", hidden), ("key", source), ("value", source))
    )
    mixed = F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2).flatten(2)
    mixed = F.linear(mixed, state["output.dense.weight"], state["output.dense.bias"])
    return norm(with_prefix(state, "output."), hidden + mixed)


def norm(state: State, hidden: Tensor) -> Tensor:
    return F.layer_norm(hidden, hidden.shape[-1:], state["LayerNorm.weight"], state["LayerNorm.bias"], 1e-12)


def reference(state: State, folder: Path, pixels: Tensor, prompts: list[str]) -> Tensor:
    """The published definition: prompts padded to 35 tokens, [CLS] of the last layer, five linear layers, normalised."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    image, bert = encode_image(state, pixels), with_prefix(state, "blip.text_encoder.")
    words, positions = bert["embeddings.word_embeddings.weight"], bert["embeddings.position_embeddings.weight"]
    hidden = norm(with_prefix(bert, "embeddings."), words[tokens.input_ids] + positions[:35])
    attended = tokens.attention_mask[:, None, None].bool()
    for index in range(MED["num_hidden_layers"]):
        layer = with_prefix(bert, f"encoder.layer.{index}.")
        hidden = attend(with_prefix(layer, "attention."), hidden, hidden, attended)
        hidden = attend(with_prefix(layer, "crossattention."), hidden, image, None)
        intermediate = F.gelu(F.linear(hidden, layer["intermediate.dense.weight"], layer["intermediate.dense.bias"]))
        hidden = norm(
            with_prefix(layer, "output."),
            hidden + F.linear(intermediate, layer["output.dense.weight"], layer["output.dense.bias"]),
        )
    score = hidden[:, 0]
    for index in (0, 2, 4, 6, 7):
        score = F.linear(score, state[f"mlp.layers.{index}.weight"], state[f"mlp.layers.{index}.bias"])
    return (score.squeeze(1) - 0.16717363) / 1.03333950


def test_score_matches_an_independent_blip(reward, state, imagereward_folder, images):
    with torch.no_grad():
        expected = reference(state, imagereward_folder, reward.preprocess(images), PROMPTS)
        score = reward.score(images, reward.text_features(PROMPTS))
    assert (score - expected).abs().max() <= 1e-4
    assert expected.std() > 0.1  # the random model's scores differ


def test_score_depends_on_prompt_and_image(reward, images):
    score = reward.score(images, reward.text_features(PROMPTS))
    other_prompts = reward.score(images, reward.text_features(PROMPTS[::-1]))
    other_images = reward.score(images.flip(0), reward.text_features(PROMPTS))
    assert (score - other_prompts)[[0, 2]].abs().min() > 1e-3 and (score - other_images)[[0, 2]].abs().min() > 1e-3


def test_pixels_match_the_published_transform(reward, images, pil_images):
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    steps = [Resize(SIZE, interpolation=InterpolationMode.BICUBIC), CenterCrop(SIZE), ToTensor(), Normalize(mean, std)]
    expected = torch.stack([Compose(steps)(picture) for picture in pil_images])
    assert reward.preprocess(images).sub(expected).abs().max() < 0.02  # a uint8 step is about 0.015


def test_features_are_token_ids_and_mask(reward, images, tmp_path):
    features = reward.text_features(PROMPTS)
    assert features.shape == (3, 70) and features.dtype == torch.float32 and not features.requires_grad
    assert features[0].tolist() == [2, 8, 4, 6, 3] + [0] * 30 + [1] * 5 + [0] * 30
    assert torch.equal(features, torch.cat([reward.text_features([prompt]) for prompt in PROMPTS]))
    score = reward.score(images, features)
    reward.drop_text_tower()  # does nothing: scoring needs the text encoder
    assert torch.equal(reward.score(images, features), score)


def test_long_prompts_are_truncated_and_counted(reward):
    assert reward.truncated(["red " * 33, "red " * 34]) == 1
    assert torch.equal(reward.text_features(["red " * 33]), reward.text_features(["red " * 50]))


def test_text_features_of_another_reward_are_rejected(reward, images):
    with pytest.raises(RewardError, match="text features are 12 wide instead of 70"):
        reward.score(images, torch.zeros(3, 12))


def test_bfloat16_keeps_the_head_in_float32(reward, imagereward_folder, images):
    config = RewardConfig(kind="imagereward", path=str(imagereward_folder), dtype="bfloat16")
    low = load_reward("imagereward", config)
    assert torch.equal(low.weight, reward.weight) and {p.dtype for p in low.parameters()} == {torch.bfloat16}
    score = low.score(images, low.text_features(PROMPTS))
    assert score.dtype == torch.float32
    torch.testing.assert_close(score, reward.score(images, reward.text_features(PROMPTS)), rtol=0.1, atol=0.3)


def test_path_may_be_the_file_or_its_folder(reward, imagereward_folder, images):
    config = RewardConfig(kind="imagereward", path=str(imagereward_folder / "ImageReward.pt"))
    features = reward.text_features(PROMPTS)
    assert torch.equal(load_reward("ir", config).score(images, features), reward.score(images, features))


def test_a_tokenizer_that_already_has_the_added_tokens(reward, imagereward_folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(imagereward_folder)
    tokenizer.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)
    tokenizer.save_pretrained(tmp_path)
    config = RewardConfig(kind="imagereward", path=str(imagereward_folder), tokenizer=str(tmp_path))
    assert torch.equal(load_reward("ir", config).text_features(PROMPTS), reward.text_features(PROMPTS))


def test_the_tokenizer_of_another_model_is_rejected(imagereward_folder, pickscore_folder):
    config = RewardConfig(kind="imagereward", path=str(imagereward_folder), tokenizer=str(pickscore_folder))
    with pytest.raises(ModelError, match=r"the text encoder expects 12\. Use the one it was trained with"):
        load_reward("imagereward", config)


def missing(state):
    del state["blip.text_encoder.encoder.layer.1.crossattention.self.key.weight"]


def without_positions(state):
    del state["blip.visual_encoder.pos_embed"]


def unexpected(state):
    state["blip.text_decoder.cls.bias"] = torch.zeros(2)


def unexpected_prefix(state):
    state["visual.proj"] = torch.zeros(2)


def misshaped(state):
    state["blip.visual_encoder.blocks.1.attn.qkv.weight"] = torch.zeros(384, 127)


def not_square(state):
    state["blip.visual_encoder.pos_embed"] = torch.zeros(1, 16, 128)


def headless(state):
    del state["mlp.layers.4.bias"]


def wide_head(state):
    state["mlp.layers.0.weight"] = torch.zeros(1024, 25)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (missing, r"missing keys: blip\.text_encoder\.encoder\.layer\.1\.crossattention\.self\.key\.weight"),
        (without_positions, r"missing keys: blip\.visual_encoder\.pos_embed"),
        (unexpected, r"unexpected keys: blip\.text_decoder\.cls\.bias"),
        (unexpected_prefix, r"unexpected keys: visual\.proj"),
        (
            misshaped,
            r"mismatched keys: blip\.visual_encoder\.blocks\.1\.attn\.qkv\.weight is \(384, 127\) instead of \(384, 128\)",
        ),
        (not_square, r"describe no image tower of BLIP"),
        (headless, r"missing or unexpected mlp\.layers\.4\.bias"),
        (wide_head, r"mlp\.layers expects width 25, the text encoder has width 24"),
    ],
)
def test_weights_that_do_not_fit_are_rejected(imagereward_folder, state, tmp_path, change, named):
    folder = shutil.copytree(imagereward_folder, tmp_path / "damaged")
    change(state)
    torch.save(state, folder / "ImageReward.pt")
    with pytest.raises(ModelError, match=rf"damaged/ImageReward\.pt.*{named}"):
        load_reward("imagereward", RewardConfig(kind="imagereward", path=str(folder)))


def test_truncated_or_missing_weights_are_reported_in_one_line(imagereward_folder, tmp_path):
    folder = shutil.copytree(imagereward_folder, tmp_path / "cut")
    config = RewardConfig(kind="imagereward", path=str(folder))
    weights = (folder / "ImageReward.pt").read_bytes()
    (folder / "ImageReward.pt").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ModelError, match=r"ImageReward\.pt cannot be read") as error:
        load_reward("imagereward", config)
    assert "\n" not in str(error.value)
    (folder / "ImageReward.pt").unlink()
    with pytest.raises(ModelError, match=r"holds no weights; expected one of ImageReward\.safetensors, ImageReward\.pt"):
        load_reward("imagereward", config)
    with pytest.raises(ModelError, match=r"nowhere does not exist"):
        load_reward("imagereward", RewardConfig(kind="imagereward", path="nowhere"))


def test_pickled_code_is_never_executed(imagereward_folder, tmp_path):
    class Payload:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    folder = shutil.copytree(imagereward_folder, tmp_path / "evil")
    torch.save({"blip.x": Payload()}, folder / "ImageReward.pt")
    with pytest.raises(ModelError, match=r"ImageReward\.pt cannot be read"):
        load_reward("imagereward", RewardConfig(kind="imagereward", path=str(folder)))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "does not exist"), ("{", "cannot be read"), (json.dumps({"vocab_size": 12}), "lacks 'hidden_size'")],
)
def test_an_unreadable_med_config_is_reported(imagereward_folder, tmp_path, content, message):
    folder = shutil.copytree(imagereward_folder, tmp_path / "unconfigured")
    (folder / "med_config.json").unlink()
    if content is not None:
        (folder / "med_config.json").write_text(content)
    with pytest.raises(ModelError, match=rf"med_config\.json {message}.*"):
        load_reward("imagereward", RewardConfig(kind="imagereward", path=str(folder)))
