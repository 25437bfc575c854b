"""The page about attacks says what the tests try."""

from tests import attacks


def test_the_page_counts_what_the_tests_try() -> None:
    text = attacks.PAGE.read_text(encoding="utf-8")
    assert attacks.page(text) == text, "python -m tests.attacks --write"
    assert attacks.page(text.replace(" attacks and", "0 attacks and")) == text
