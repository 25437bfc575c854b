"""The tokenizer of every tiny model: CLIP's byte-level BPE with a vocabulary of the tiny world's words."""

import json

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from textcraftor.tiny.language import vocabulary

CONTEXT_LENGTH = 40  # tokens; the longest rich prompt has 34 words and punctuation marks
START, END, SUFFIX = "<|startoftext|>", "<|endoftext|>", "</w>"


def _learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """BPE merges under which each word is one token: trained until nothing is left to merge."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix=SUFFIX))
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # Passing the letters as special tokens fixes their order, which breaks ties between pairs. By default the trainer
    # numbers them in the order of a hash table, and every run would learn another vocabulary.
    letters = sorted({letter for word in words for letter in word})
    trainer = trainers.BpeTrainer(
        vocab_size=100_000,
        end_of_word_suffix=SUFFIX,
        special_tokens=[*letters, *(letter + SUFFIX for letter in letters)],
        show_progress=False,
    )
    bpe.train_from_iterator(words, trainer)
    return [(left, right) for left, right in json.loads(bpe.to_str())["model"]["merges"]]


def new_tokenizer() -> CLIPTokenizer:
    """A CLIPTokenizer in which every word of the tiny world is one token; other text falls back to bytes.

    As in CLIP, the padding token is the end token.
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
