"""The tokenizer of every tiny model: CLIP's own byte-level BPE, with a vocabulary of this world's words."""

import json
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from textcraftor.tiny.language import vocabulary

CONTEXT_LENGTH = 40  # the longest rich prompt has 34 words and marks
START, END, SUFFIX = "<|startoftext|>", "<|endoftext|>", "</w>"


def _learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte pairs to merge so that each word becomes one token: BPE trained until nothing is left to merge."""
    learner = Tokenizer(models.BPE(end_of_word_suffix=SUFFIX))
    learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # Naming the letters beforehand fixes their order, and with it how ties between pairs are broken: left to itself the
    # trainer numbers them in the order of a hash table, and every run would learn another vocabulary.
    letters = sorted({letter for word in words for letter in word})
    trainer = trainers.BpeTrainer(
        vocab_size=100_000,
        end_of_word_suffix=SUFFIX,
        special_tokens=[*letters, *(letter + SUFFIX for letter in letters)],
        show_progress=False,
    )
    learner.train_from_iterator(words, trainer)
    return [(left, right) for left, right in json.loads(learner.to_str())["model"]["merges"]]


def new_tokenizer() -> CLIPTokenizer:
    """A CLIPTokenizer in which every word of the world is one token and any other text falls back to bytes.

    As in CLIP, padding is the end token.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = _learn_merges([*vocabulary(), ",", ":", "."])
    tokens = [*letters, *(letter + SUFFIX for letter in letters), *(left + right for left, right in merges), START, END]
    tokenizer = CLIPTokenizer(
        vocab={token: index for index, token in enumerate(dict.fromkeys(tokens))},
        merges=merges,
        model_max_length=CONTEXT_LENGTH,
    )
    return tokenizer


def save_tokenizer(folder: Path) -> None:
    """Write the tokenizer's files into a folder, as `CLIPTokenizer.from_pretrained` and open_clip read them."""
    new_tokenizer().save_pretrained(folder)
