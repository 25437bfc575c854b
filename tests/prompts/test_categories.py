import polars as pl
import pytest

from textcraftor.prompts.categories import ANY_CATEGORIES, TINY_CATEGORIES, WORDS, categories, classify
from textcraftor.tiny.language import sample_prompts


@pytest.mark.parametrize(
    ("prompt", "category"),
    [
        ("A photo of two Dogs on a boat", "animals"),
        ("a boat with two dogs", "vehicles"),
        ("portrait of an old wizard, oil on canvas", "people"),
        ("three red BUSES", "vehicles"),
        ("a skyline at dusk", "places"),
        ("infinity", "abstract"),
        ("a poster that says hello", "text"),
        ("scattered, cathartic", "other"),  # no word, though "cat" is in there
        ("日本", "other"),
        ("", "other"),
    ],
)
def test_the_first_known_word_decides(prompt: str, category: str) -> None:
    assert classify(pl.Series("prompt", [prompt]), "any").to_list() == [category]


def test_no_word_is_listed_twice() -> None:
    words = [word for listed in WORDS.values() for word in listed.split()]
    assert len(words) == len(set(words))


def test_categories_of_the_tiny_world_are_language_and_number_of_objects() -> None:
    prompts = [
        "a small red circle on a white background, flat",
        "a small red circle left of a large blue square on a white background, flat",
        "please draw a crimson disc",
        "a tiny disc, crimson and above a big blue box, shiny",
    ]
    assert classify(pl.Series(prompts), "tiny").to_list() == ["plain_one", "plain_two", "rich_one", "rich_two"]
    with pytest.raises(ValueError, match="a photo of a dog"):
        classify(pl.Series(["a photo of a dog"]), "tiny")


def test_plain_and_rich_prompts_are_distinguished() -> None:
    plain = classify(pl.Series(sample_prompts(200, seed=0, rich_fraction=0)), "tiny")
    rich = classify(pl.Series(sample_prompts(500, seed=0, rich_fraction=1)), "tiny")
    assert set(plain) == {"plain_one", "plain_two"}
    assert rich.str.starts_with("rich").mean() > 0.95  # a rich sentence can happen to be a plain one


def test_categories_lists_all_results_of_classify() -> None:
    assert categories("any") == ANY_CATEGORIES == (*WORDS, "other")
    assert categories("tiny") == TINY_CATEGORIES
