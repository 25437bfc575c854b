"""Cleaning and normalisation of a prompt's text."""

import unicodedata
from typing import Final

_CONTROL = [*range(0x20), *range(0x7F, 0xA0)]
# Zero-width space, byte order mark and marks of writing direction. The joiners U+200C and U+200D
# are kept: emoji and several scripts need them.
_INVISIBLE = [0x200B, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2060, 0x206A), 0xFEFF]
_LONE_SURROGATES = range(0xD800, 0xE000)

_TRANSLATION: Final[dict[int, str | None]] = {
    **dict.fromkeys(_CONTROL, " "),
    **dict.fromkeys(_INVISIBLE, None),
    **dict.fromkeys(_LONE_SURROGATES, "\N{REPLACEMENT CHARACTER}"),
}


def clean(text: str) -> str:
    """Unicode NFC, without control or invisible characters, with single spaces and none at the ends.

    Case, punctuation and spelling are unchanged. Cleaning twice changes nothing.
    """
    return unicodedata.normalize("NFC", " ".join(text.translate(_TRANSLATION).split()))


def normalise(text: str) -> str:
    """The form in which duplicate prompts are equal: clean and case-folded (CLIP's tokenizer ignores case too)."""
    return clean(clean(text).casefold())
