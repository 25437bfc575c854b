"""Tests of the artifact paths and of the names of candidates."""

import re
from pathlib import Path

import pytest

from textcraftor.layout import candidate_name, has_tuned_unet, mix_of

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("unet", [False, True])
def test_a_candidate_name_says_its_mix_and_whether_the_unet_is_tuned(unet: bool) -> None:
    name = candidate_name("aesthetic", unet)
    assert (mix_of(name), has_tuned_unet(name)) == ("aesthetic", unet)


def test_no_other_module_spells_an_artifact_path_or_parses_a_candidate_name() -> None:
    """Strings only: docstrings and comments may say `data/...`."""
    spelled = re.compile(r"""(?<!`)["'](data/|\.textcraftor)|removesuffix\(["']-unet|endswith\(["']-unet""")
    files = [path for folder in ("textcraftor", "tasks", "flows") for path in (ROOT / folder).rglob("*.py")]
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in files
        if path != ROOT / "textcraftor/layout.py"
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if spelled.search(line)
    ]
    assert len(files) > 100 and not found
