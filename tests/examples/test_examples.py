"""Every script of examples/ runs, on random weights in the folders of the real ones."""

import copy
import runpy
import sys
from pathlib import Path

import pytest
import torch
from diffusers import ControlNetModel, MotionAdapter
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from tests.families import sd1, sdxl
from textcraftor.models.saving import save_module

EXAMPLES = Path(__file__).parents[2] / "examples"
STEPS = ("--steps", "5")  # the switch is at the second


@pytest.fixture
def here(tmp_path: Path, family_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Folders of the bases, and of an encoder that was moved a little; a picture and a mask."""
    monkeypatch.chdir(tmp_path)
    encoder = copy.deepcopy(sd1().text_encoder)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    save_module(encoder, Path("tuned/text_encoder"))
    Image.effect_noise((32, 32), 64).convert("RGB").save("picture.png")
    Image.new("L", (32, 32), "white").save("mask.png")
    return {name: str(folder) for name, folder in family_folders.items()}


def run(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: str) -> Image.Image:
    """Run a script; the picture that it writes."""
    out = "out.gif" if name == "animatediff" else "out.png"
    monkeypatch.setattr(sys, "argv", [name, "a small red circle", "--out", out, *STEPS, *arguments])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return Image.open(out)


def test_every_script_is_run_here() -> None:
    text = Path(__file__).read_text()
    assert all(f'run(monkeypatch, "{path.stem}"' in text for path in EXAMPLES.glob("*.py"))


def test_img2img(here: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = run(monkeypatch, "img2img", "--base", here["sd1"], "--encoder", "tuned", "--image", "picture.png")
    assert drawn.size == (32, 32)


def test_inpaint(here: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    files = ("--image", "picture.png", "--mask", "mask.png")
    assert run(monkeypatch, "inpaint", "--base", here["sd1"], "--encoder", "tuned", *files).size == (32, 32)


def test_controlnet(here: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    ControlNetModel.from_unet(sd1().unet, conditioning_channels=3).save_pretrained("controlnet")
    files = ("--controlnet", "controlnet", "--image", "picture.png")
    assert run(monkeypatch, "controlnet", "--base", here["sd1"], "--encoder", "tuned", *files).size == (32, 32)


def test_ip_adapter(here: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    width, tokens, image_width = 16, 4, 12
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**sizes, image_size=32, patch_size=16, projection_dim=image_width)
    CLIPVisionModelWithProjection(vision).save_pretrained("adapter/image_encoder")
    projection, norm = nn.Linear(image_width, tokens * width), nn.LayerNorm(width)
    tensors = {f"image_proj.proj.{name}": value for name, value in projection.state_dict().items()}
    tensors |= {f"image_proj.norm.{name}": value for name, value in norm.state_dict().items()}
    crossing = [each.attn2 for each in sd1().unet.modules() if hasattr(each, "attn2")]
    for number, attention in enumerate(crossing):
        for part in ("to_k", "to_v"):
            tensors[f"ip_adapter.{2 * number + 1}.{part}_ip.weight"] = getattr(attention, part).weight.detach().clone()
    save_file(tensors, "adapter/weights.safetensors")
    adapter = ("--adapter", "adapter", "--subfolder", "", "--weights", "weights.safetensors", "--size", "32")
    arguments = ("--base", here["sd1"], "--encoder", "tuned", "--image", "picture.png", *adapter)
    assert run(monkeypatch, "ip_adapter", *arguments).size == (32, 32)


def test_animatediff(here: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"block_out_channels": (8, 16), "motion_layers_per_block": 1, "motion_mid_block_layers_per_block": 1}
    MotionAdapter(**settings, motion_norm_num_groups=2, motion_num_attention_heads=2).save_pretrained("motion")
    arguments = ("--base", here["sd1"], "--encoder", "tuned", "--adapter", "motion", "--frames", "3", "--size", "32")
    film = run(monkeypatch, "animatediff", *arguments)
    assert film.size == (32, 32)


def test_encoder_from(here: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """SDXL's first encoder is the one of SD 1.x by its architecture; at strength 0 the picture is SDXL's own."""
    assert sdxl().text_encoder.config.hidden_size == sd1().text_encoder.config.hidden_size
    arguments = ("--base", here["sdxl"], "--encoder_from", "tuned", "--size", "32")
    drawn = [run(monkeypatch, "encoder_from", *arguments, "--strength", strength).tobytes() for strength in ("0", "1")]
    assert drawn[0] != drawn[1]
