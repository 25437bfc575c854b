"""The tokenizer of the tiny models: one token for each known word, bytes for everything else."""

from pathlib import Path

from transformers import CLIPTokenizer

from textcraftor.tiny.language import sample_prompts, vocabulary
from textcraftor.tiny.recipe.tokenizer import CONTEXT_LENGTH, new_tokenizer


def test_every_word_is_one_token() -> None:
    tokenizer = new_tokenizer()
    lengths = {word: len(tokenizer(word).input_ids) for word in vocabulary()}
    assert set(lengths.values()) == {3}, lengths  # start, the word, end


def test_every_prompt_fits_the_context() -> None:
    tokenizer = new_tokenizer()
    assert max(len(ids) for ids in tokenizer(sample_prompts(3000, 0, 1.0)).input_ids) <= CONTEXT_LENGTH


def test_unknown_text_falls_back_to_bytes() -> None:
    tokenizer = new_tokenizer()
    ids = tokenizer("zürich 🔴", add_special_tokens=False).input_ids
    assert tokenizer.eos_token_id not in ids  # which is also the unknown token
    assert tokenizer.decode(ids).replace(" ", "") == "zürich🔴"


def test_the_vocabulary_is_reproducible() -> None:
    assert new_tokenizer().get_vocab() == new_tokenizer().get_vocab()


def test_transformers_loads_the_saved_tokenizer(tmp_path: Path) -> None:
    new_tokenizer().save_pretrained(tmp_path)
    loaded = CLIPTokenizer.from_pretrained(tmp_path)
    batch = loaded(["a red circle", ""], padding="max_length", truncation=True, return_tensors="pt")
    assert batch.input_ids.shape == (2, CONTEXT_LENGTH)
    assert (batch.input_ids[1, 1:] == loaded.eos_token_id).all()
