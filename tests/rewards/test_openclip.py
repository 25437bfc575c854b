"""The CLIP constraint and HPSv2 compared with open_clip's own loader, preprocessing and model."""

import json
import shutil
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from textcraftor.config import RewardConfig
from textcraftor.errors import ModelError, RewardError
from textcraftor.rewards import Reward, load_reward
from textcraftor.rewards.openclip import OpenClipReward


@pytest.fixture
def reward(openclip_folder: Path) -> Reward:
    return load_reward("clip", RewardConfig(kind="clip", path=str(openclip_folder)))


@pytest.fixture
def architecture(tmp_path, monkeypatch) -> str:
    """The name of a tiny architecture registered with open_clip, with open_clip's default tokenizer."""
    config = {
        "embed_dim": 12,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 4},
        "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    (tmp_path / "tiny-arch.json").write_text(json.dumps(config))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", [])
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", dict(open_clip.factory._MODEL_CONFIGS))
    open_clip.add_model_config(tmp_path / "tiny-arch.json")
    return "tiny-arch"


def test_score_is_the_diagonal_cosine_of_open_clip(reward, openclip_folder, images, pil_images, prompts):
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{openclip_folder}")
    pixels = torch.stack([preprocess(picture) for picture in pil_images])
    assert reward.preprocess(images).sub(pixels).abs().max() < 0.03  # a uint8 step is about 0.02 here
    tokens = open_clip.get_tokenizer(f"local-dir:{openclip_folder}")(prompts)
    with torch.no_grad():
        image_features = model.encode_image(reward.preprocess(images), normalize=True)
        expected = (image_features @ model.encode_text(tokens, normalize=True).T).diagonal()
    torch.testing.assert_close(reward.score(images, reward.text_features(prompts)), expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 0.02  # the random model's scores differ


def test_preprocess_settings_of_the_folder_are_used(reward):
    assert (reward.preprocess.mean, reward.preprocess.std) == ([0.4, 0.5, 0.6], [0.2, 0.25, 0.3])
    assert reward.resolution == 16


@pytest.mark.parametrize("prefix", ["", "local-dir:"])
def test_a_folder_may_have_the_local_dir_prefix(openclip_folder, prefix, prompts):
    reward = load_reward("clip", RewardConfig(kind="clip", path=f"{prefix}{openclip_folder}"))
    assert reward.text_features(prompts).shape == (3, 12)


def test_half_precision_weights_are_loaded_as_float32(reward, images, prompts):
    assert {p.dtype for p in reward.parameters()} == {torch.float32}
    assert reward.score(images, reward.text_features(prompts)).dtype == torch.float32


def test_long_prompts_are_truncated_and_counted(reward):
    long = " ".join(["red"] * 20)
    assert reward.truncated([long, " ".join(["red"] * 6)]) == 1  # six words, start and end fill the context of 8
    torch.testing.assert_close(reward.text_features([long]), reward.text_features([" ".join(["red"] * 6)]))


def test_scoring_works_without_the_text_tower(reward, images, prompts):
    features = reward.text_features(prompts)
    before = reward.score(images, features)
    parameters = sum(p.numel() for p in reward.parameters())
    reward.drop_text_tower()
    assert sum(p.numel() for p in reward.parameters()) < 0.7 * parameters
    assert torch.equal(reward.score(images, features), before)
    with pytest.raises(RewardError, match="text tower was dropped"):
        reward.text_features(prompts)


def test_hpsv2_is_the_cosine_without_scale_and_has_its_version(reward, openclip_folder, images, prompts):
    hpsv2 = load_reward("hpsv2", RewardConfig(kind="hpsv2", path=str(openclip_folder), version="2.1"))
    features = reward.text_features(prompts)
    assert torch.equal(hpsv2.score(images, features), reward.score(images, features))
    assert (hpsv2.version, hpsv2.range) == ("2.1", (-1.0, 1.0))


@pytest.mark.parametrize("version", ["", "2", "2.2"])
def test_hpsv2_without_a_known_version_is_rejected(openclip_folder, version):
    with pytest.raises(RewardError, match=r"Known: 2\.0, 2\.1, tiny.*Set rewards\.hps\.version"):
        load_reward("hps", RewardConfig(kind="hpsv2", path=str(openclip_folder), version=version))


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_checkpoint_file_of_a_known_architecture(architecture, tmp_path, suffix, images):
    model = open_clip.create_model(architecture).eval()
    path = tmp_path / f"HPS.{suffix}"
    if suffix == "pt":
        state = {f"module.{key}": value for key, value in model.state_dict().items()}
        torch.save({"epoch": 3, "state_dict": state}, path)
    else:
        save_file(model.state_dict(), path)
    config = RewardConfig(kind="hpsv2", path=str(path), version="2.1")
    reward = OpenClipReward("hps", config, torch.float32, file_architecture=architecture)
    prompt = "a prompt of many more words than eight of them, at least twelve"
    with torch.no_grad():
        expected = model.encode_text(open_clip.get_tokenizer(architecture)([prompt]), normalize=True)
    torch.testing.assert_close(reward.text_features([prompt]), expected)
    assert reward.truncated([prompt, "red"]) == 1


def test_a_published_tag_brings_its_own_activation_and_preprocessing(architecture, tmp_path, monkeypatch):
    model = open_clip.create_model(architecture, force_quick_gelu=True)
    save_file(model.state_dict(), tmp_path / "published.safetensors")
    published = {"quick_gelu": True, "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.5, 0.5), "resize_mode": "squash"}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, architecture, {"mine": published})
    monkeypatch.setattr("textcraftor.rewards.openclip.download_pretrained", lambda _: str(tmp_path / "published.safetensors"))
    reward = load_reward("clip", RewardConfig(kind="clip", path=f"{architecture}:mine"))
    images = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        expected = model.eval().encode_image(reward.preprocess(images), normalize=True)
    torch.testing.assert_close(reward.image_features(images), expected)
    assert reward.preprocess.mean == [0.1, 0.2, 0.3] and reward.preprocess.resize_mode == "squash"
    assert reward.version == "tiny-arch:mine"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", r"'' does not exist; expected an open_clip model"),
        ("no/where", r"'no/where' does not exist; expected an open_clip model"),
        ("local-dir:nowhere", r"'local-dir:nowhere' does not exist"),
        ("ViT-H-14", r"'ViT-H-14' does not exist; expected .*ARCHITECTURE:TAG"),
        (
            "ViT-h-14:laion2b_s32b_b79k",
            r"Unknown open_clip architecture 'ViT-h-14'. The nearest: .*ViT-H-14,",
        ),
        ("ViT-H-14:laion2b", r"Unknown pretrained tag of ViT-H-14.*laion2b_s32b_b79k"),
    ],
)
def test_unknown_models_are_named_with_what_is_known(path, message):
    with pytest.raises(ModelError, match=message):
        load_reward("clip", RewardConfig(kind="clip", path=path))


def test_folder_without_config_or_weights(openclip_folder, tmp_path):
    with pytest.raises(ModelError, match=r"holds no open_clip_config\.json"):
        load_reward("clip", RewardConfig(kind="clip", path=str(tmp_path)))
    shutil.copy(openclip_folder / "open_clip_config.json", tmp_path)
    with pytest.raises(ModelError, match="holds no weights"):
        load_reward("clip", RewardConfig(kind="clip", path=str(tmp_path)))


def missing(state):
    del state["ln_final.weight"]


def unexpected(state):
    state["surplus"] = torch.zeros(2)


def other_context_length(state):
    state["positional_embedding"] = torch.zeros(11, 16)  # open_clip's own loader would interpolate this


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (missing, "missing keys: ln_final.weight"),
        (unexpected, "unexpected keys: surplus"),
        (other_context_length, r"mismatched keys: positional_embedding is \(11, 16\) instead of \(8, 16\)"),
    ],
)
def test_weights_that_do_not_fit_are_rejected(openclip_folder, tmp_path, change, named):
    folder = shutil.copytree(openclip_folder, tmp_path / "damaged")
    state = load_file(folder / "open_clip_model.safetensors")
    change(state)
    save_file(state, folder / "open_clip_model.safetensors")
    with pytest.raises(ModelError, match=rf"open_clip_model\.safetensors does not fit.*{named}"):
        load_reward("clip", RewardConfig(kind="clip", path=str(folder)))


def test_truncated_weights_are_reported_in_one_line(openclip_folder, tmp_path):
    folder = shutil.copytree(openclip_folder, tmp_path / "cut")
    weights = (folder / "open_clip_model.safetensors").read_bytes()
    (folder / "open_clip_model.safetensors").write_bytes(weights[:-100])
    with pytest.raises(ModelError, match=r"open_clip_model\.safetensors is truncated: .* Download it again") as error:
        load_reward("clip", RewardConfig(kind="clip", path=str(folder)))
    assert "\n" not in str(error.value)


def test_end_of_text_must_have_the_greatest_token_id(openclip_folder, tmp_path):
    folder = shutil.copytree(openclip_folder, tmp_path / "foreign")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["zebra"] = 10
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError, match=r"must have the greatest id, 10.*tokenizer's is 9"):
        load_reward("clip", RewardConfig(kind="clip", path=str(folder)))


def test_contrast_is_clips_training_loss(openclip_folder, images, prompts):
    reward = load_reward("contrast", RewardConfig(kind="contrast", path=str(openclip_folder)))
    model = open_clip.create_model(f"local-dir:{openclip_folder}", precision="fp32").eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{openclip_folder}")(prompts)
    with torch.no_grad():
        to_image, to_text, scale = model(reward.preprocess(images), tokens)
        expected = -torch.nn.functional.cross_entropy(scale * to_image @ to_text.T, torch.arange(3), reduction="none")
    assert (reward.score(images, reward.text_features(prompts)) - expected).abs().max() <= 1e-4
    low = load_reward("contrast", RewardConfig(kind="contrast", path=str(openclip_folder), dtype="bfloat16"))
    assert low.logit_scale == reward.logit_scale


@pytest.mark.parametrize(
    ("file", "version", "holds"),
    [
        ("HPS_v2_compressed.pt", "2.1", "2.0"),
        ("HPS_v2.1_compressed.safetensors", "2.0", "2.1"),
        ("hpsv2.1-vit-h.safetensors", "2.0", "2.1"),
        ("HPS_v2_compressed.safetensors", "tiny", "2.0"),
    ],
)
def test_a_published_file_of_another_version_is_refused(file, version, holds, tmp_path):
    config = RewardConfig(kind="hpsv2", path=str(tmp_path / file), version=version)
    with pytest.raises(RewardError, match=rf"is the file of HPSv2 {holds}, and rewards\.hps\.version = {version}"):
        load_reward("hps", config)
