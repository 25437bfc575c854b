import random
import unicodedata

import pytest

from textcraftor.prompts.text import clean, normalise


@pytest.mark.parametrize(
    ("typed", "cleaned"),
    [
        ("  a\tred \n circle\r\n", "a red circle"),
        ("a\x00red\x1bcircle\x9f", "a red circle"),
        ("\ufeffa r\u200bed c\u202eircle", "a red circle"),
        ("cafe\u0301", "café"),
        ("e\u200b\u0301", "é"),  # what the invisible character parted composes once it is gone
        ("a\u2003red\u2028circle\u3000", "a red circle"),
        ("half \ud83d a pair", "half \ufffd a pair"),
        ("👩\u200d🚀 Ünïcode, KEPT!", "👩\u200d🚀 Ünïcode, KEPT!"),
        ("\u200b \x07", ""),
    ],
)
def test_clean(typed: str, cleaned: str) -> None:
    assert clean(typed) == cleaned


def test_cleaning_twice_changes_nothing() -> None:
    rng = random.Random(0)
    alphabet = [chr(rng.randrange(0x110000)) for _ in range(3000)] + [chr(code) for code in range(0x3000)]
    for _ in range(3000):
        once = clean("".join(rng.choices(alphabet, k=12)))
        assert clean(once) == once
        assert unicodedata.is_normalized("NFC", once)
        once.encode()
        assert not any(unicodedata.category(character) in ("Cc", "Cs") for character in once)


def test_prompts_that_differ_in_case_and_spacing_are_duplicates() -> None:
    assert normalise("  A Red\nCIRCLE ") == normalise("a red circle") == "a red circle"
    assert normalise("a red circle") != normalise("a red circle.")
