"""An export draws what the tuned model draws, when the tool's own loader has read it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from textcraftor.export import PROMPTS, Format, differences, export, reload
from textcraftor.models.base import Base, TunedModel


@pytest.fixture
def tuned(base: Base) -> TunedModel:
    """An encoder whose attention differs from the base's by an update of rank 2."""
    encoder = base.trainable("text_encoder").requires_grad_(False)
    torch.manual_seed(1)
    for name, weight in encoder.named_parameters():
        if name.endswith(("q_proj.weight", "out_proj.weight", "fc1.weight")):
            weight += torch.randn(len(weight), 2) @ torch.randn(2, weight.shape[1]) * 0.3
    return TunedModel(text_encoder=encoder)


@pytest.mark.parametrize("to", ["diffusers", "pipeline", "single-file", "lora-kohya", "lora-peft"])
def test_an_export_draws_the_same_pictures(base: Base, tuned: TunedModel, to: Format, tmp_path: Path) -> None:
    made = export(tuned, base, to, tmp_path / ("model" if to in ("diffusers", "pipeline") else "model.safetensors"), rank=2)
    found = differences(reload(to, made.path, base), tuned, base, steps=3)
    untuned = differences(base.pipe, tuned, base, steps=3)
    assert made.lost < 1e-3 and len(found) == len(PROMPTS)
    assert max(maximum for _, maximum in found) < 1 < max(maximum for _, maximum in untuned)


def test_keys_are_those_that_old_and_new_tools_read(base: Base, tuned: TunedModel, tmp_path: Path) -> None:
    for to in ("diffusers", "pipeline"):
        made = export(tuned, base, to, tmp_path / to)  # type: ignore[arg-type]
        assert all(key.startswith("text_model.") for key in load_file(made.path / "text_encoder/model.safetensors"))
    single = load_file(export(tuned, base, "single-file", tmp_path / "single.safetensors").path)
    assert {key.split(".")[0] for key in single} == {"model", "first_stage_model", "cond_stage_model"}
    assert "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight" in single
    kohya = load_file(export(tuned, base, "lora-kohya", tmp_path / "k.safetensors").path)
    stem = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    assert {f"{stem}.lora_down.weight", f"{stem}.lora_up.weight", f"{stem}.alpha"} <= kohya.keys()
    peft = load_file(export(tuned, base, "lora-peft", tmp_path / "p.safetensors").path)
    assert "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight" in peft


def test_a_rank_that_is_too_small_says_what_it_loses(base: Base, tuned: TunedModel, tmp_path: Path) -> None:
    assert 0.1 < export(tuned, base, "lora-peft", tmp_path / "p.safetensors", rank=1).lost < 1
