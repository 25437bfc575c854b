"""Random tiny models in the file formats of the published rewards, written once per session."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel, WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer, Whitespace
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    PreTrainedTokenizerFast,
)

WORDS = ["<pad>", "<unk>", "red", "blue", "circle", "square", "a", "big", "<start>", "<end>"]
END = len(WORDS) - 1
CONTEXT = 8
SIZE = 16
WIDTH = 12


def save_tokenizer(folder: Path) -> None:
    """A word-level tokenizer whose end-of-text token has the greatest id, as in CLIP."""
    special = {"bos_token": "<start>", "eos_token": "<end>", "pad_token": "<pad>", "unk_token": "<unk>"}
    words = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, special["unk_token"]))
    words.pre_tokenizer = Whitespace()
    words.post_processor = TemplateProcessing(single="<start> $A <end>", special_tokens=[("<start>", END - 1), ("<end>", END)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=CONTEXT, **special)
    tokenizer.save_pretrained(folder)


def vision_config() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIZE,
        patch_size=4,
        projection_dim=WIDTH,
        hidden_act="quick_gelu",
    )


def spread_weights(model: nn.Module) -> nn.Module:
    """Give the model larger random weights: with the usual ones all images and prompts have nearly equal embeddings."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.25)
    return model


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def pickscore_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformers CLIPModel with tokenizer and preprocessor."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("pickscore")
    text = CLIPTextConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        projection_dim=WIDTH,
        bos_token_id=END - 1,
        eos_token_id=END,
        pad_token_id=0,
    )
    config = CLIPConfig(
        text_config=text.to_dict(),
        vision_config=vision_config().to_dict(),
        projection_dim=WIDTH,
        logit_scale_init_value=4.6,
    )
    spread_weights(CLIPModel(config)).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=SIZE).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def openclip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An open_clip "local-dir" model with half-precision weights, as the tiny rewards have."""
    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp("openclip")
    model_config = {
        "embed_dim": WIDTH,
        "vision_cfg": {"image_size": SIZE, "layers": 2, "width": 16, "head_width": 8, "patch_size": 4},
        "text_cfg": {
            "context_length": CONTEXT,
            "vocab_size": len(WORDS),
            "width": 16,
            "heads": 2,
            "layers": 2,
            "hf_tokenizer_name": "tokenizer",
        },
    }
    settings = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]}
    config = {"model_cfg": model_config, "preprocess_cfg": settings}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    model = spread_weights(open_clip.CLIP(**model_config)).half()
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def aesthetic_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformers image tower and LAION's linear head."""
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("aesthetic")
    spread_weights(CLIPVisionModelWithProjection(vision_config())).save_pretrained(folder)
    save_file(head_layers(WIDTH), folder / "head.safetensors")
    return folder


def head_layers(width: int) -> dict[str, Tensor]:
    """Random linear layers width-1024-128-64-16-1 under LAION's keys."""
    layers = {}
    for index, (fan_in, fan_out) in zip(
        (0, 2, 4, 6, 7), ((width, 1024), (1024, 128), (128, 64), (64, 16), (16, 1)), strict=True
    ):
        linear = nn.Linear(fan_in, fan_out)
        layers[f"layers.{index}.weight"] = linear.weight.detach() * 3
        layers[f"layers.{index}.bias"] = linear.bias.detach()
    return layers


@pytest.fixture
def images() -> Tensor:
    """Three smooth random images, multiples of 1/255, larger than the towers' input and not square: (3, 3, 40, 32)."""
    coarse = torch.rand(3, 3, 6, 5)
    smooth = nn.functional.interpolate(coarse, (40, 32), mode="bilinear", align_corners=True)
    return (smooth * 255).round() / 255


@pytest.fixture
def pil_images(images: Tensor) -> list[Image.Image]:
    """The same images as PIL images."""
    return [Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()) for image in images]


@pytest.fixture
def prompts() -> list[str]:
    return ["a red circle", "a big blue square", "blue"]


BERT_WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "red", "blue", "circle", "square", "a", "big"]
MED = {
    "architectures": ["BertModel"],
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 24,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 40,
    "model_type": "bert",
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "type_vocab_size": 2,
    "vocab_size": len(BERT_WORDS) + 2,
    "encoder_width": 768,
    "add_cross_attention": True,
}
BLIP_WIDTH, BLIP_BLOCKS, BLIP_PATCH = 128, 2, 4


def blip_shapes() -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors of a small ImageReward, by their keys in the published file."""
    width, hidden, text, wide = BLIP_WIDTH, 4 * BLIP_WIDTH, MED["hidden_size"], MED["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(key: str, fan_in: int, fan_out: int) -> None:
        shapes[f"{key}.weight"], shapes[f"{key}.bias"] = (fan_out, fan_in), (fan_out,)

    def norm(key: str, size: int) -> None:
        shapes[f"{key}.weight"], shapes[f"{key}.bias"] = (size,), (size,)

    image = "blip.visual_encoder"
    shapes[f"{image}.cls_token"] = (1, 1, width)
    shapes[f"{image}.pos_embed"] = (1, (SIZE // BLIP_PATCH) ** 2 + 1, width)
    shapes[f"{image}.patch_embed.proj.weight"] = (width, 3, BLIP_PATCH, BLIP_PATCH)
    shapes[f"{image}.patch_embed.proj.bias"] = (width,)
    for index in range(BLIP_BLOCKS):
        block = f"{image}.blocks.{index}"
        norm(f"{block}.norm1", width)
        linear(f"{block}.attn.qkv", width, 3 * width)
        linear(f"{block}.attn.proj", width, width)
        norm(f"{block}.norm2", width)
        linear(f"{block}.mlp.fc1", width, hidden)
        linear(f"{block}.mlp.fc2", hidden, width)
    norm(f"{image}.norm", width)
    bert = "blip.text_encoder"
    shapes[f"{bert}.embeddings.word_embeddings.weight"] = (MED["vocab_size"], text)
    shapes[f"{bert}.embeddings.position_embeddings.weight"] = (MED["max_position_embeddings"], text)
    norm(f"{bert}.embeddings.LayerNorm", text)
    for index in range(MED["num_hidden_layers"]):
        layer = f"{bert}.encoder.layer.{index}"
        for attention, source in (("attention", text), ("crossattention", width)):
            linear(f"{layer}.{attention}.self.query", text, text)
            linear(f"{layer}.{attention}.self.key", source, text)
            linear(f"{layer}.{attention}.self.value", source, text)
            linear(f"{layer}.{attention}.output.dense", text, text)
            norm(f"{layer}.{attention}.output.LayerNorm", text)
        linear(f"{layer}.intermediate.dense", text, wide)
        linear(f"{layer}.output.dense", wide, text)
        norm(f"{layer}.output.LayerNorm", text)
    linear("blip.vision_proj", width, 256)
    linear("blip.text_proj", text, 256)
    return shapes


def save_bert_tokenizer(folder: Path) -> None:
    """A tokenizer like that of bert-base-uncased, without the two tokens that BLIP adds."""
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    vocabulary = {word: index for index, word in enumerate(BERT_WORDS)}
    words = Tokenizer(WordPiece(vocabulary, unk_token=names["unk_token"]))
    words.normalizer = BertNormalizer(lowercase=True)
    words.pre_tokenizer = BertPreTokenizer()
    words.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=40, **names).save_pretrained(folder)


@pytest.fixture(scope="session")
def imagereward_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small ImageReward.pt with med_config.json and BERT's tokenizer in the same folder."""
    torch.manual_seed(4)
    folder = tmp_path_factory.mktemp("imagereward")
    state = {}
    for key, shape in blip_shapes().items():
        scale = 0.08 if "visual_encoder" in key else 0.3
        state[key] = torch.randn(shape) * scale + (1.0 if "norm" in key.lower() and key.endswith("weight") else 0.0)
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(MED["max_position_embeddings"])[None]
    state |= {f"mlp.{key}": value for key, value in head_layers(MED["hidden_size"]).items()}
    torch.save(state, folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps(MED))
    save_bert_tokenizer(folder)
    return folder
