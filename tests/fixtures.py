"""What tests share: a random Stable Diffusion, small enough to run in milliseconds, in the folder layout of the real one."""

import copy
import functools
import os
from pathlib import Path
from typing import Literal

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from tests.families import FAMILIES
from textcraftor.config import BaseConfig, ChainConfig, RewardConfig
from textcraftor.models.base import Base, load_base
from textcraftor.rewards import Reward
from textcraftor.tiny.recipe.tokenizer import new_tokenizer

# Prefect reads them when it is imported, its server when it starts: the tests report to nobody.
os.environ.update(DO_NOT_TRACK="1", PREFECT_SERVER_ANALYTICS_ENABLED="false")
torch.set_num_threads(1)  # models this small only wait for each other on more

CHAIN = ChainConfig(num_inference_steps=5, guidance_scale=3.0)


def random_pipeline() -> StableDiffusionPipeline:
    torch.manual_seed(0)
    tokenizer = new_tokenizer()
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    )
    with torch.no_grad():  # fresh weights hardly hear the prompt: turn it up, so that what is said matters
        for name, parameter in [*text_encoder.named_parameters(), *unet.named_parameters()]:
            if parameter.ndim > 1 and ("attn2" in name or "embedding" in name):
                parameter.mul_(6)
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database with its tables, which take seconds to make: once for all workers. To be copied."""
    from mlflow import MlflowClient

    from tasks import store
    from tasks.environment import sqlite_url

    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    with store.locked(folder / "mlflow.lock"):
        if not (folder / "mlflow.db").exists():
            MlflowClient(sqlite_url(folder / "making.db")).search_experiments()
            (folder / "making.db").rename(folder / "mlflow.db")
    return folder / "mlflow.db"


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random pipeline on disk."""
    folder = tmp_path_factory.mktemp("base") / "pipeline"
    random_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def family_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random pipeline of each family on disk: sd1, sd2, sdxl."""
    folders = {name: tmp_path_factory.mktemp("family") / name for name in FAMILIES}
    for name, make in FAMILIES.items():
        make().save_pretrained(folders[name])
    return folders


@functools.cache
def loaded_base(folder: Path, dtype: Literal["float32", "bfloat16"] = "float32") -> Base:
    """The base in `folder`, which is read once for all tests: they leave it as it is."""
    return load_base(BaseConfig(path=str(folder), resolution=32, dtype=dtype), torch.device("cpu"))


def own_base(folder: Path, dtype: Literal["float32", "bfloat16"] = "float32") -> Base:
    """A copy of every module of the base in `folder`, for a test that may change them. The tokenizers are shared."""
    loaded = loaded_base(folder, dtype)
    tokenizers = [part for name, part in loaded.pipe.components.items() if name.startswith("tokenizer")]
    return copy.deepcopy(loaded, {id(tokenizer): tokenizer for tokenizer in tokenizers})


@pytest.fixture
def base(base_folder: Path) -> Base:
    return own_base(base_folder)


@pytest.fixture
def exact_base(base: Base) -> Base:
    """The same in float64, where gradients that are equal in exact arithmetic agree on any processor."""
    for module in (base.pipe.unet, base.pipe.vae, base.pipe.text_encoder):
        module.double()
    return base


class Redness(Reward):
    """A reward with no model: how red an image is, more so for longer prompts."""

    resolution = 32

    def __init__(self, name: str = "redness", config: RewardConfig | None = None, dtype: torch.dtype = torch.float32):
        super().__init__(name, config or RewardConfig(kind="redness", version="1"), dtype)
        self.scale = nn.Parameter(torch.ones(()), requires_grad=False)

    def text_features(self, prompts: list[str]) -> Tensor:
        return torch.tensor([[1 + len(prompt) / 100] for prompt in prompts])

    def image_features(self, images: Tensor) -> Tensor:
        return nn.functional.normalize(images.mean((2, 3)), dim=-1)

    def score(self, images: Tensor, text_features: Tensor) -> Tensor:
        red, green, blue = images.mean((2, 3)).unbind(1)
        return self.scale * (red - (green + blue) / 2) * text_features[:, 0]


@pytest.fixture
def redness() -> Redness:
    return Redness()
