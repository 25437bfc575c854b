"""Where bases come from, and that none of it is ever loaded in part."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.checkpoints import write_single_file
from tests.families import FAMILIES
from textcraftor.candidate import Candidate
from textcraftor.chain.sampler import Sampler
from textcraftor.config import BaseConfig, ChainConfig
from textcraftor.errors import ModelError
from textcraftor.models.base import Base, load_base, load_candidate

CPU = torch.device("cpu")
CHAIN = ChainConfig(num_inference_steps=3, guidance_scale=3.0)
WEIGHTS = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
    "text_encoder_2": "text_encoder_2/model.safetensors",
}
Edit = Callable[[Callable[[dict[str, Tensor]], None]], None]


def base_of(path: Path, **settings: object) -> Base:
    return load_base(BaseConfig.model_validate({"path": str(path), "resolution": 32, **settings}), CPU)


def drawn(base: Base) -> Tensor:
    return Sampler(base, CHAIN, 0.4).generate(["a small red circle"], [3])


def edit(path: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.fixture
def xl(tmp_path: Path) -> Path:
    FAMILIES["sdxl"]().save_pretrained(tmp_path / "xl")
    return tmp_path / "xl"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_single_file_is_the_same_base_as_its_folder(name: str, tmp_path: Path) -> None:
    pipe = FAMILIES[name]()
    pipe.save_pretrained(tmp_path / "folder")
    write_single_file(pipe, tmp_path / "model.safetensors")
    for weights in WEIGHTS.values():
        path = tmp_path / "config" / weights
        if (tmp_path / "folder" / weights).exists():
            shutil.copytree((tmp_path / "folder" / weights).parent, path.parent)
            path.unlink()
    for part in ("model_index.json", "scheduler", "tokenizer", "tokenizer_2"):
        source = tmp_path / "folder" / part
        if source.exists():
            (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / "config" / part)
    single = base_of(tmp_path / "model.safetensors", config=str(tmp_path / "config"))
    assert torch.equal(drawn(single), drawn(base_of(tmp_path / "folder")))


def test_a_single_file_needs_to_be_told_its_family(tmp_path: Path) -> None:
    write_single_file(FAMILIES["sd1"](), tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"is a single file\. Set base\.config to a diffusers folder"):
        base_of(tmp_path / "model.safetensors")
    (tmp_path / "model.ckpt").write_bytes(b"")
    with pytest.raises(ModelError, match=r"must be \.safetensors"):
        base_of(tmp_path / "model.ckpt", config=str(tmp_path))


@pytest.mark.parametrize(
    ("key", "part"),
    [
        (
            "model.diffusion_model.input_blocks.1.0.in_layers.2.weight",
            r"unet\).*missing keys: down_blocks\.0\.resnets\.0\.conv1",
        ),
        ("first_stage_model.decoder.conv_in.weight", r"vae\).*missing keys: decoder\.conv_in\.weight"),
        (
            "cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc1.weight",
            r"text_encoder\).*missing keys: .*layers\.1\.mlp\.fc1\.weight",
        ),
    ],
)
def test_a_single_file_that_lacks_a_weight_is_refused_by_key(key: str, part: str, tmp_path: Path) -> None:
    pipe = FAMILIES["sd1"]()
    pipe.save_pretrained(tmp_path / "folder")
    path = tmp_path / "model.safetensors"
    write_single_file(pipe, path)
    edit(path, lambda tensors: tensors.__delitem__(key))
    with pytest.raises(ModelError, match=rf"model\.safetensors \({part}.*Nothing was loaded") as error:
        base_of(path, config=str(tmp_path / "folder"))
    assert "\n" not in str(error.value)


def test_a_single_file_of_another_family_or_truncated_is_refused(tmp_path: Path) -> None:
    for name in ("sd1", "sd2", "sdxl"):
        pipe = FAMILIES[name]()
        pipe.save_pretrained(tmp_path / name)
        write_single_file(pipe, tmp_path / f"{name}.safetensors")
    for file, config in (("sd1", "sd2"), ("sd2", "sd1"), ("sd1", "sdxl"), ("sdxl", "sd1")):
        with pytest.raises(ModelError, match=rf"{file}\.safetensors") as error:
            base_of(tmp_path / f"{file}.safetensors", config=str(tmp_path / config))
        assert "\n" not in str(error.value)
    whole = (tmp_path / "sd1.safetensors").read_bytes()
    (tmp_path / "sd1.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match=r"sd1\.safetensors is truncated: .* Download it again"):
        base_of(tmp_path / "sd1.safetensors", config=str(tmp_path / "sd1"))


@pytest.mark.parametrize("part", WEIGHTS)
@pytest.mark.parametrize("fault", ["truncated", "absent", "missing", "unexpected", "mismatched"])
def test_faulty_weights_are_refused_by_file_and_key(xl: Path, part: str, fault: str) -> None:
    path = xl / WEIGHTS[part]
    key = sorted(load_file(path))[3]
    if fault == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif fault == "absent":
        path.unlink()
    elif fault == "missing":
        edit(path, lambda tensors: tensors.__delitem__(key))
    elif fault == "unexpected":
        edit(path, lambda tensors: tensors.update({"surprise.weight": torch.zeros(1)}))
    else:
        edit(path, lambda tensors: tensors.update({key: tensors[key][..., None].repeat_interleave(2, -1)}))
    with pytest.raises(ModelError, match=rf"xl/{part}[ /]") as error:
        base_of(xl)
    told = {"missing": key, "unexpected": "surprise.weight", "mismatched": key}.get(fault, part)
    assert told.removeprefix("text_model.") in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("part", ["tokenizer_2", "scheduler"])
def test_a_base_without_a_tokenizer_or_scheduler_is_refused(xl: Path, part: str) -> None:
    shutil.rmtree(xl / part)
    with pytest.raises(ModelError, match=f"its {part} cannot be loaded"):
        base_of(xl)


def test_a_pipeline_of_no_supported_family_is_refused(xl: Path) -> None:
    index = json.loads((xl / "model_index.json").read_text())
    (xl / "model_index.json").write_text(json.dumps({**index, "_class_name": "FluxPipeline"}))
    with pytest.raises(
        ModelError, match=r"is a FluxPipeline\. Known text-to-image pipelines: StableDiffusionPipeline, StableDiffusionXL"
    ):
        base_of(xl)


def test_weights_under_their_old_names_are_read(tmp_path: Path) -> None:
    """As the hub has them: the VAE's attention before it was renamed, a buffer that CLIP no longer has."""
    FAMILIES["sd1"]().save_pretrained(tmp_path / "base")
    expected = drawn(base_of(tmp_path / "base"))

    def old(tensors: dict[str, Tensor]) -> None:
        for now, then in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            for key in [key for key in tensors if f"attentions.0.{now}." in key]:
                tensors[key.replace(now, then)] = tensors.pop(key)

    def older(tensors: dict[str, Tensor]) -> None:
        for key in list(tensors):
            if not key.startswith("text_model."):
                tensors[f"text_model.{key}"] = tensors.pop(key)
        tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]

    edit(tmp_path / "base" / WEIGHTS["vae"], old)
    edit(tmp_path / "base" / WEIGHTS["text_encoder"], older)
    assert torch.equal(drawn(base_of(tmp_path / "base")), expected)


def test_the_resolution_must_fit_the_vae(xl: Path) -> None:
    with pytest.raises(ModelError, match=r"base\.resolution = 36 is not a multiple of 8"):
        base_of(xl, resolution=36)


def test_a_tiny_vae_decodes_in_the_vaes_place(xl: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4)
    small.save_pretrained(tmp_path / "tiny")
    base = base_of(xl, tiny_vae=str(tmp_path / "tiny"))
    images = drawn(base)
    assert images.shape == (1, 3, 32, 32) and not torch.allclose(images, drawn(base_of(xl)), atol=1e-2)
    latents = torch.randn(2, 4, 4, 4, requires_grad=True)
    Sampler(base, CHAIN, 0.4).decode(latents).mean().backward()
    assert latents.grad is not None and latents.grad.abs().sum() > 0
    with pytest.raises(ModelError, match=r"vae does not fit AutoencoderTiny \(missing keys"):
        base_of(xl, tiny_vae=str(xl / "vae"))


def test_slicing_and_checkpointing_the_vae_change_memory_only(xl: Path) -> None:
    torch.manual_seed(0)
    latents = torch.randn(3, 4, 4, 4)
    results = []
    for settings in ({}, {"vae_slicing": True}, {"vae_gradient_checkpointing": True}):
        base = base_of(xl, **settings)
        calls: list[int] = []
        resnet = base.pipe.vae.decoder.up_blocks[0].resnets[0]
        resnet.register_forward_hook(lambda *call, calls=calls: calls.append(len(call[2])))
        wanted = latents.clone().requires_grad_(True)
        images = Sampler(base, CHAIN, 0.4).decode(wanted)
        images.square().mean().backward()
        results.append((images, wanted.grad, calls))
    plain, sliced, recomputed = results
    assert (plain[2], sliced[2], recomputed[2]) == ([3], [1, 1, 1], [3, 3])
    for images, grad, _ in (sliced, recomputed):
        torch.testing.assert_close(images, plain[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(grad, plain[1], atol=1e-7, rtol=1e-4)


def candidate_of(base: Base, folder: Path, *names: str) -> Candidate:
    for name in names:
        base.trainable(name).save_pretrained(folder / name)  # type: ignore[operator]
    return Candidate.find(str(folder), Path())


def test_a_candidate_may_hold_either_encoder_or_both(xl: Path, tmp_path: Path) -> None:
    base = base_of(xl)
    digests = set()
    for names in (("text_encoder",), ("text_encoder_2",), ("text_encoder", "text_encoder_2"), ("text_encoder_2", "unet")):
        candidate = candidate_of(base, tmp_path / "+".join(names), *names)
        tuned = load_candidate(candidate, base)
        assert tuned is not None and set(candidate.parts) == set(names)
        assert set(tuned.encoders) == set(names) - {"unet"} and (tuned.unet is not None) == ("unet" in names)
        digests.add(candidate.digest)
    assert len(digests) == 4
    both = tmp_path / "text_encoder+text_encoder_2"
    before = Candidate.find(str(both), Path()).digest
    edit(both / WEIGHTS["text_encoder_2"], lambda tensors: next(iter(tensors.values())).add_(1))
    assert Candidate.find(str(both), Path()).digest != before
    with pytest.raises(ModelError, match=r"text_encoder holds no model"):
        candidate_of(base, tmp_path / "unet_alone", "unet")


@pytest.mark.parametrize("fault", ["missing", "mismatched", "architecture", "no such module"])
def test_a_candidate_that_does_not_fit_is_refused(xl: Path, tmp_path: Path, fault: str) -> None:
    base = base_of(xl)
    candidate = candidate_of(base, tmp_path / "candidate", "text_encoder_2")
    folder = tmp_path / "candidate/text_encoder_2"
    key = sorted(load_file(folder / "model.safetensors"))[4]
    said = key.removeprefix("text_model.")
    if fault == "missing":
        edit(folder / "model.safetensors", lambda tensors: tensors.__delitem__(key))
    elif fault == "mismatched":
        edit(folder / "model.safetensors", lambda tensors: tensors.update({key: torch.zeros(2, 2, 2)}))
    elif fault == "architecture":
        shutil.rmtree(folder)
        shutil.copytree(xl / "text_encoder", folder)
        said = "text_projection.weight"
    else:
        FAMILIES["sd1"]().save_pretrained(tmp_path / "sd1")
        base, said = base_of(tmp_path / "sd1"), "has a text_encoder_2, and base"
    with pytest.raises(ModelError, match=r"candidate") as error:
        load_candidate(candidate, base)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_whole_candidate_of_another_size_is_refused_by_key(xl: Path, tmp_path: Path) -> None:
    FAMILIES["sd2"]().save_pretrained(tmp_path / "sd2")
    folder = tmp_path / "candidate"
    shutil.copytree(tmp_path / "sd2/text_encoder", folder / "text_encoder")
    with pytest.raises(ModelError, match=r"does not fit the text_encoder of base .*mismatched keys: .*and \d+ more"):
        load_candidate(Candidate.find(str(folder), Path()), base_of(xl))
