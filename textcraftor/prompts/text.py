"""One prompt's text: what a person typed, made clean, and the form under which two prompts are the same."""

import unicodedata
from typing import Final

_CONTROL = [*range(0x20), *range(0x7F, 0xA0)]
# Zero-width space, byte order mark, and the marks that turn the writing direction. The joiners
# U+200C and U+200D stay: emoji and several scripts are spelled with them.
_INVISIBLE = [0x200B, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2060, 0x206A), 0xFEFF]
_LONE_SURROGATES = range(0xD800, 0xE000)

_TRANSLATION: Final[dict[int, str | None]] = {
    **dict.fromkeys(_CONTROL, " "),
    **dict.fromkeys(_INVISIBLE, None),
    **dict.fromkeys(_LONE_SURROGATES, "\N{REPLACEMENT CHARACTER}"),
}


def clean(text: str) -> str:
    """Unicode NFC, no control or invisible characters, single spaces, none at the ends.

    What the text says is untouched: case, punctuation and spelling stay. Cleaning twice changes nothing.
    """
    return unicodedata.normalize("NFC", " ".join(text.translate(_TRANSLATION).split()))


def normalise(text: str) -> str:
    """The form under which two prompts are one: clean, and without case (CLIP's tokenizer ignores it too)."""
    return clean(clean(text).casefold())
