"""The full-size step at small size: the same layout and the same code."""

from pathlib import Path

import pytest
import torch

from benchmarks import full_size_step
from textcraftor.bench.random_weights import tokenizer, write_all


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("full_size")
    write_all(folder, small=True)
    return folder


def test_the_page_names_every_part_and_its_peak(folder: Path) -> None:
    ledger, outcome = full_size_step.run(folder, torch.bfloat16, steps=3, grad_steps=1)
    page = full_size_step.page(ledger, outcome, torch.bfloat16)
    assert "Peak memory" in page and "no frozen parameter received one" in page
    for part in ("prefix", "the gradient", *full_size_step.MIX, "AdamW"):
        assert part in page


def test_the_tokenizer_is_clips_own() -> None:
    ours = tokenizer()
    assert (len(ours), ours.bos_token_id, ours.eos_token_id) == (49408, 49406, 49407)
    assert ours("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
