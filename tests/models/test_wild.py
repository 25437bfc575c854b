"""Bases as they are found: each loads, or is refused with its true reason. The table: docs/bases.md."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.checkpoints import write_single_file
from tests.families import FAMILIES, new_unet
from textcraftor.chain.solver import Solver
from textcraftor.config import BaseConfig, ChainConfig
from textcraftor.errors import ConfigError, ModelError
from textcraftor.models.base import Base, load_base
from textcraftor.models.saving import save_module

CPU = torch.device("cpu")
UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
ENCODER = "text_encoder/model.safetensors"
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 3438167536\n"
Tensors = dict[str, Tensor]


def load(path: Path, **settings: object) -> Base:
    return load_base(BaseConfig.model_validate({"path": str(path), "resolution": 32, **settings}), CPU)


@pytest.fixture
def folder(tmp_path: Path, family_folders: dict[str, Path]) -> Path:
    """A copy of a Stable Diffusion 1 base with random weights, to be damaged."""
    shutil.copytree(family_folders["sd1"], tmp_path / "base")
    return tmp_path / "base"


def rewrite(path: Path, change: Callable[[Tensors], Tensors], metadata: dict[str, str] | None = None) -> None:
    save_file({key: value.contiguous() for key, value in change(load_file(path)).items()}, path, metadata)


def variant(*names: str) -> Callable[[Path], None]:
    """Rename each part's weights to the given variant, in that precision."""

    def change(folder: Path) -> None:
        for path in (folder / UNET, folder / VAE, folder / ENCODER):
            tensors = {key: value.half() for key, value in load_file(path).items()}
            path.unlink()
            for name in names:
                save_file(tensors, path.with_suffix(f".{name}.safetensors"), {"format": "pt"})

    return change


def write(name: str, content: str | bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content) and None


def cut(name: str, share: float) -> Callable[[Path], None]:
    return lambda folder: (
        (folder / name).write_bytes((content := (folder / name).read_bytes())[: int(len(content) * share)]) and None
    )


def tensors(name: str, change: Callable[[Tensors], Tensors], metadata: bool = True) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder / name, change, {"format": "pt"} if metadata else None)


def pad_embeddings(rows: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = folder / "text_encoder/config.json"
        settings = json.loads(config.read_text())
        config.write_text(json.dumps({**settings, "vocab_size": settings["vocab_size"] + rows}))
        key = "embeddings.token_embedding.weight"
        rewrite(
            folder / ENCODER, lambda t: {**t, key: torch.cat([t[key], torch.zeros(rows, t[key].shape[1])])}, {"format": "pt"}
        )

    return change


def unet_with(channels: int) -> Callable[[Path], None]:
    return lambda folder: new_unet(16, in_channels=channels).save_pretrained(folder / "unet")


def pipeline_class(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        index = folder / "model_index.json"
        index.write_text(json.dumps({**json.loads(index.read_text()), "_class_name": name}))

    return change


LOADED = {
    "half precision only": variant("fp16"),
    "bfloat16 by name only": variant("bf16"),
    "an EMA twin beside the weights": lambda folder: (folder / "unet/diffusion_pytorch_model.non_ema.safetensors").write_bytes(
        (folder / UNET).read_bytes()
    ),
    "no metadata": tensors(UNET, dict, metadata=False),
    "no metadata in the encoder": tensors(ENCODER, dict, metadata=False),
    "position_ids": tensors(ENCODER, lambda t: {**t, "embeddings.position_ids": torch.arange(40)[None]}),
    "position_ids under the old prefix": tensors(
        ENCODER,
        lambda t: (
            {f"text_model.{key}": each for key, each in t.items()}
            | {"text_model.embeddings.position_ids": torch.arange(40)[None]}
        ),
    ),
    "keys with the prefix": tensors(ENCODER, lambda t: {f"text_model.{key}": each for key, each in t.items()}),
    "a padded embedding table": pad_embeddings(57),
}
REFUSED = {
    "an LFS pointer for the UNet": (write(UNET, POINTER), r"unet/.*is a Git LFS pointer.*git lfs pull"),
    "an LFS pointer for the encoder": (write(ENCODER, POINTER), r"text_encoder/.*is a Git LFS pointer"),
    "an LFS pointer for a config": (write("vae/config.json", POINTER), r"vae/config\.json is a Git LFS pointer"),
    "a sign-in page": (write(UNET, "<!doctype html><title>Sign in</title>"), "is a web page, not weights"),
    "an empty file": (write(VAE, b""), r"vae/.*is empty\. Download it again"),
    "half a file": (cut(UNET, 0.5), r"is truncated: [\d,]+ bytes of [\d,]+"),
    "a file without its end": (cut(ENCODER, 0.99), "is truncated"),
    "a file cut in its header": (cut(UNET, 0.01), "is truncated or no safetensors file"),
    "a pickle renamed": (write(UNET, b"PK\x03\x04" + b"0" * 400), "pickled torch file that was renamed"),
    "non-EMA weights only": (variant("non_ema"), r"holds .*non_ema\.safetensors and no weights that can be read"),
    "a pickle only": (
        lambda folder: (folder / UNET).rename(folder / "unet/diffusion_pytorch_model.bin"),
        r"holds diffusion_pytorch_model\.bin and no weights that can be read",
    ),
    "an inpainting UNet": (unet_with(9), r"takes 9 channels and the VAE's latents have 4, as inpainting models do"),
    "an editing UNet": (unet_with(8), r"takes 8 channels .*as models that edit"),
    "an inpainting pipeline": (
        pipeline_class("StableDiffusionInpaintPipeline"),
        r"is a StableDiffusionInpaintPipeline\. Known",
    ),
    "another model's tokenizer": (pad_embeddings(500), "or of another model"),
}


@pytest.mark.parametrize("change", LOADED.values(), ids=LOADED)
def test_loads(change: Callable[[Path], None], folder: Path) -> None:
    expected = load(folder).conditioning(["a small red circle"]).prompt_embeds
    change(folder)
    torch.testing.assert_close(load(folder).conditioning(["a small red circle"]).prompt_embeds, expected, atol=2e-2, rtol=1e-2)


@pytest.mark.parametrize(("change", "reason"), REFUSED.values(), ids=REFUSED)
def test_is_refused_with_its_reason(change: Callable[[Path], None], reason: str, folder: Path) -> None:
    change(folder)
    with pytest.raises(ModelError, match=reason) as error:
        load(folder)
    assert "\n" not in str(error.value)


def float8(tensors: Tensors) -> Tensors:
    return {k: v.to(torch.float8_e4m3fn) if v.is_floating_point() and "diffusion_model" in k else v for k, v in tensors.items()}


def twin(tensors: Tensors) -> Tensors:
    """With the EMA weights of a training checkpoint, which are others."""
    ours = {k: v for k, v in tensors.items() if k.startswith("model.diffusion_model.")}
    return {**tensors, **{f"model_ema.{k.removeprefix('model.').replace('.', '')}": v + 1 for k, v in ours.items()}}


def without(part: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: value for key, value in tensors.items() if not key.startswith(part)}


SINGLE = {
    "half": (lambda tensors: {k: v.half() if v.is_floating_point() else v for k, v in tensors.items()}, ""),
    "float8": (float8, ""),
    "EMA twins": (twin, ""),
    "scaled float8": (lambda tensors: {**float8(tensors), "scaled_fp8": torch.zeros(2)}, "quantized with scales of its own"),
    "pruned of its VAE": (without("first_stage_model."), r"is pruned: it has no VAE"),
    "pruned of its encoder": (without("cond_stage_model."), r"is pruned: it has no text encoder"),
    "UNet alone": (
        lambda tensors: {"input_blocks.0.0.weight": torch.zeros(8, 4, 3, 3)},
        "no checkpoint in the original layout",
    ),
    "LoRA": (lambda tensors: {"lora_unet_mid.lora_up.weight": torch.zeros(2, 2)}, "is a LoRA, not a checkpoint"),
    "inpainting": (
        lambda tensors: {**tensors, "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(8, 9, 3, 3)},
        r"conv_in\.weight is \(8, 9, 3, 3\) instead of \(8, 4, 3, 3\)",
    ),
}


@pytest.mark.parametrize(("change", "reason"), SINGLE.values(), ids=SINGLE)
def test_single_files(change: Callable[[Tensors], Tensors], reason: str, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_single_file(FAMILIES["sd1"](), path)
    whole = load(path, config=str(folder)).pipe.unet.conv_in.weight
    rewrite(path, change)
    if reason:
        with pytest.raises(ModelError, match=reason):
            load(path, config=str(folder))
    else:
        weight = load(path, config=str(folder)).pipe.unet.conv_in.weight
        torch.testing.assert_close(weight, whole, atol=0.03, rtol=0.1)


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_zero_terminal_snr_is_named_for_what_it_is(prediction: str, spacing: str) -> None:
    config = {**FAMILIES["sd2"]().scheduler.config, "prediction_type": prediction, "rescale_betas_zero_snr": True}
    config |= {"timestep_spacing": spacing, "_use_default_values": []}
    if prediction == "epsilon" and spacing != "leading":
        with pytest.raises(ConfigError, match=r"zero terminal SNR .* with prediction_type epsilon.*set prediction_type"):
            Solver(ChainConfig(num_inference_steps=3), config, CPU)
    else:
        Solver(ChainConfig(num_inference_steps=3), config, CPU)


@pytest.mark.parametrize(("family", "part"), [("sd1", "text_encoder"), ("sd2", "text_encoder"), ("sdxl", "text_encoder_2")])
def test_old_readers_find_the_keys_of_a_tuned_encoder(family: str, part: str, tmp_path: Path) -> None:
    encoder = getattr(FAMILIES[family](), part)
    save_module(encoder, tmp_path / part)
    keys = load_file(tmp_path / part / "model.safetensors").keys()
    assert all(key.startswith(("text_model.", "text_projection.")) for key in keys)
    loaded, info = type(encoder).from_pretrained(tmp_path / part, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, value in encoder.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_clip_skip_is_an_encoder_without_its_last_layers(folder: Path) -> None:
    """As docs/bases.md says: cut the layers off, and the base is one that was trained with clip-skip 2."""
    pipe = load(folder).pipe
    ids = pipe.tokenizer(["a red circle"], padding="max_length", return_tensors="pt").input_ids
    layers = pipe.text_encoder(ids, output_hidden_states=True).hidden_states
    expected = pipe.text_encoder.final_layer_norm(layers[-2])
    config = json.loads((folder / "text_encoder/config.json").read_text())
    last = config["num_hidden_layers"] - 1
    (folder / "text_encoder/config.json").write_text(json.dumps({**config, "num_hidden_layers": last}))
    rewrite(folder / ENCODER, lambda t: {k: v for k, v in t.items() if f"layers.{last}." not in k}, {"format": "pt"})
    assert torch.equal(load(folder).pipe.encode_prompt(["a red circle"], CPU, 1, False)[0], expected)
