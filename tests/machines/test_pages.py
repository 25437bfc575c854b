"""The validation page in a browser: nothing is cut at any width, in light and dark. The report: tests/evaluate/test_run.py."""

from pathlib import Path

import pytest

from tasks.validation_page import render_page
from tests.machines.browser import WIDTHS, measure, needs_browser

CHECK = {
    "table": "heldout",
    "meaning": "prompt_id is the digest of the prompt beside it",
    "expectation": "expect_column_pair_values_to_be_equal",
    "column": "prompt_id",
    "holds": True,
    "observed": None,
    "unexpected": 0,
    "examples": [],
}
BROKEN = {**CHECK, "holds": False, "unexpected": 12345, "observed": "4.5 %", "examples": ["x" * 200, "a red circle " * 30]}


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
def test_the_validation_page_fits_any_width(dark: bool, tmp_path: Path) -> None:
    record = {"success": False, "problem": None, "expectations": {"met": 1, "of": 2}, "great_expectations": "1.0"}
    page = tmp_path / "validation.html"
    page.write_text(render_page({**record, "expectations": {"met": 1, "of": 2}, "checks": [CHECK, BROKEN]}), encoding="utf-8")
    for measured in measure(page, *WIDTHS, dark=dark):
        assert not measured["cut"] and measured["wide"] <= int(str(measured["width"])), measured
        assert measured["cells"] == 8
        assert (measured["paper"] == "rgb(255, 255, 255)") is not dark


def test_pages_tell_a_phone_their_width_and_know_the_dark() -> None:
    for source in ("tasks/validation_page.py", "textcraftor/evaluate/report.html.j2"):
        text = (Path(__file__).parents[2] / source).read_text(encoding="utf-8")
        assert '<meta name="viewport" content="width=device-width' in text and "prefers-color-scheme: dark" in text
