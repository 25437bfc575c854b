"""The page that compares settings of tuning, from made-up runs, and the settings that are compared."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from benchmarks import tuning
from tests.benchmarks.test_seeds import BASE, run
from textcraftor.config import load, merge

ROOT = Path(__file__).parents[2]


def test_each_setting_has_its_gains_and_its_cost() -> None:
    runs = [replace(run("a 0", 0.1), seconds=100.4), replace(run("a 1", 0.2), seconds=120.0)]
    page = tuning.page({"a": (BASE, runs), "b": (BASE, [replace(run("b", 0.3), seconds=50.0)])})
    assert "## a\n\nTraining took 100 to 120 s of a processor." in page and "took 50 to 50 s" in page
    assert "| oracle (points) | +10 [+8, +13] | +20 [+18, +23] | +15 |" in page and "+30 [+28, +33]" in page


@pytest.mark.parametrize("name", yaml.safe_load((ROOT / "benchmarks/tuning.yaml").read_text())["settings"])
def test_shipped_settings_are_valid_and_see_no_prompt_of_the_profile(name: str) -> None:
    written = yaml.safe_load((ROOT / "benchmarks/tuning.yaml").read_text())
    config = load(ROOT / "params.yaml", merge(written["all"], written["settings"][name]))
    shipped = load(ROOT / "params.yaml").prompts.sources
    assert not {source.seed for source in config.prompts.sources} & {source.seed for source in shipped}
