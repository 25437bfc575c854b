"""The recipe's image-text models."""

import torch

from textcraftor.tiny.recipe import towers
from textcraftor.tiny.recipe.tokenizer import new_tokenizer


@torch.no_grad()
def test_a_converted_model_has_the_same_embeddings() -> None:
    tokenizer = new_tokenizer()
    model = towers.new_open_clip(tokenizer).eval()
    # Parameters that start alike (zeros, ones) would hide a mistake in their names.
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    original = towers.OpenClipTowers(model)
    converted = towers.HuggingFaceTowers(towers.to_clip_model(model, tokenizer).eval())
    images = torch.rand(2, 3, 64, 64)
    ids = towers.tokenize(tokenizer, ["a small red circle", "a square"], torch.device("cpu"))
    torch.testing.assert_close(converted.encode_image(images), original.encode_image(images), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(converted.encode_text(ids), original.encode_text(ids), rtol=1e-4, atol=1e-4)
