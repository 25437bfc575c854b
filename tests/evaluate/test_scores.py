import json
import subprocess
import sys

import polars as pl
import pyarrow.parquet as pq
import pytest

from textcraftor.errors import ModelError
from textcraftor.evaluate.scores import Scores


@pytest.fixture
def scores():
    table = pl.DataFrame({"prompt_id": ["a", "b"], "prompt": ["é", "雪"], "judge": [0.1, 0.2], "diversity": [0.3, 0.3]})
    return Scores("balanced", "d1e2", ("judge",), ("clip",), {"seed": 0}, table)


def test_round_trip(scores, tmp_path):
    path = tmp_path / "data/scores/balanced.parquet"
    scores.write(path)
    read = Scores.read(path)
    assert read.table.equals(scores.table)
    assert (read.candidate, read.digest, read.judges, read.trained_on, read.proof) == (
        "balanced",
        "d1e2",
        ("judge",),
        ("clip",),
        {"seed": 0},
    )
    assert [each.name for each in path.parent.iterdir()] == ["balanced.parquet"]


def test_any_parquet_reader_finds_the_proof(scores, tmp_path):
    scores.write(tmp_path / "scores.parquet")
    metadata = pq.read_schema(tmp_path / "scores.parquet").metadata
    assert json.loads(metadata[b"textcraftor"])["digest"] == "d1e2"


def test_the_same_scores_give_the_same_bytes(scores, tmp_path):
    scores.write(tmp_path / "one.parquet")
    scores.write(tmp_path / "two.parquet")
    assert (tmp_path / "one.parquet").read_bytes() == (tmp_path / "two.parquet").read_bytes()


def test_missing_scores_say_what_to_run(tmp_path):
    with pytest.raises(ModelError, match="textcraftor evaluate --candidate base"):
        Scores.read(tmp_path / "base.parquet")


@pytest.mark.parametrize("damage", ["text", "truncated", "no proof"])
def test_a_file_that_is_not_a_table_of_scores_is_refused(scores, tmp_path, damage):
    path = tmp_path / "balanced.parquet"
    scores.write(path)
    if damage == "text":
        path.write_text("not parquet at all")
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-20])
    else:
        scores.table.write_parquet(path)
    with pytest.raises(ModelError, match=r"balanced.parquet is not a table of scores"):
        Scores.read(path)


def test_the_gate_needs_no_model_library():
    """Importing the gate is quick, and works without torch."""
    code = (
        "import sys, textcraftor.evaluate.gate; print([m for m in ('torch', 'diffusers', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
