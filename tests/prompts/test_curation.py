import json
import os
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from textcraftor.config import FileSource, PromptsConfig, SceneSource
from textcraftor.errors import PromptError
from textcraftor.prompts import CurationSummary, curate, noise_seed, prompt_id, read_prompts
from textcraftor.prompts.duplicates import near_duplicates

REPOSITORY = Path(__file__).parents[2]
REAL = Path(os.environ.get("TEXTCRAFTOR_TEST_DATA", REPOSITORY.parent / "shared/data"))
NAMES = ["cat", "dog", "boat", "tower", "cup", "rose", "king", "logo", "pizza", "train"]
PROMPTS = [f"a {size} {name} in {place}" for name in NAMES for size in ("big", "old") for place in ("rain", "snow", "fog")]


def file(path: str, **more: Any) -> FileSource:
    return FileSource(kind="file", path=path, **more)


def config(**more: Any) -> PromptsConfig:
    return PromptsConfig(**{"sources": (file("p.txt"),), "heldout": 10, **more})


def curated(root: Path, prompts: list[str], **more: Any) -> tuple[CurationSummary, pl.DataFrame, pl.DataFrame]:
    (root / "p.txt").write_text("\n".join(prompts), encoding="utf-8")
    summary = curate(config(**more), root, root / "out")
    return summary, read_prompts(root / "out/train.parquet"), read_prompts(root / "out/heldout.parquet")


def test_curates_splits_and_counts(tmp_path: Path) -> None:
    summary, train, heldout = curated(tmp_path, PROMPTS)
    assert (train.height, heldout.height) == (50, 10)
    both = pl.concat([train, heldout])
    assert set(both["prompt"]) == set(PROMPTS)
    assert both["prompt_id"].to_list() == [prompt_id(prompt) for prompt in both["prompt"]]
    assert both["seed"].to_list() == [noise_seed(one, 0) for one in both["prompt_id"]]
    assert both["words"].to_list() == [5] * 60
    assert set(both["source"]) == {"p.txt"}
    assert set(heldout["category"]) == set(train["category"])  # stratified: each of nine kinds is held out
    assert summary.notes == ()
    record = json.loads((tmp_path / "out/curation.json").read_text())
    assert record["sources"]["p.txt"]["train"] == 50
    assert record["proof"]["inputs"].keys() == {"p.txt"}
    assert record["proof"]["config"]["prompts"]["heldout"] == 10


def test_every_drop_is_counted_by_reason_and_source(tmp_path: Path) -> None:
    faults = [
        "",
        "\u200b",
        "ab",
        "x" * 200,
        "a nude statue",
        "A  Big cat in RAIN",
        "a benchmark prompt of eight words in all",
    ]
    (tmp_path / "more.json").write_text(json.dumps([*PROMPTS[:3], "one of my own"]))
    (tmp_path / "bench.txt").write_text("A benchmark prompt, of eight words in all.\n")
    summary, train, heldout = curated(
        tmp_path,
        PROMPTS + faults,
        sources=(file("p.txt"), file("more.json", licence="CC0-1.0")),
        benchmarks=(file("bench.txt"),),
        blocklist=("nude", " ", "c++"),
        max_characters=100,
    )
    first, second = summary.sources["p.txt"], summary.sources["more.json"]
    told = {reason: count for reason, count in first.dropped.items() if count}
    assert told == {"empty": 2, "too_short": 1, "too_long": 1, "blocked": 1, "repeated": 1, "benchmark": 1}
    assert {reason: count for reason, count in second.dropped.items() if count} == {"repeated": 3}
    assert second.licence == "CC0-1.0"
    for source in summary.sources.values():
        assert source.read == source.train + source.heldout + sum(source.dropped.values())
    assert (first.read, second.read) == (67, 4)
    assert train.height + heldout.height == 61


def test_blocked_words_are_whole_words_and_may_hold_signs(tmp_path: Path) -> None:
    prompts = ["Nude, a study", "nudelsalat", "i write C++ here", "a c+ grade", *PROMPTS]
    summary, train, heldout = curated(tmp_path, prompts, blocklist=("nude", "c++"))
    assert summary.sources["p.txt"].dropped["blocked"] == 2
    assert {"nudelsalat", "a c+ grade"} <= {*train["prompt"], *heldout["prompt"]}


def test_the_earlier_of_two_near_duplicates_stays(tmp_path: Path) -> None:
    long = "a very detailed painting of a castle on a hill at night with many stars above it"
    prompts = [long, long + "!", long + " glowing", "a chain of a b c d", *PROMPTS]
    summary, train, heldout = curated(tmp_path, prompts, near_duplicate=0.9)
    assert summary.sources["p.txt"].dropped["near_duplicate"] == 2
    kept = {*train["prompt"], *heldout["prompt"]}
    assert long in kept
    assert long + " glowing" not in kept


def test_a_near_duplicate_of_a_dropped_row_alone_stays(tmp_path: Path) -> None:
    """A~B and B~C, but not A~C: B goes, C has no kept twin and stays."""
    a, b, c = "a b c d e f g h i j k", "b c d e f g h i j k l", "c d e f g h i j k l m"
    _, train, heldout = curated(tmp_path, [a, b, c, *PROMPTS], near_duplicate=0.8)
    kept = {*train["prompt"], *heldout["prompt"]}
    assert {a, c} <= kept
    assert b not in kept


def test_one_means_exact_repeats_only(tmp_path: Path) -> None:
    summary, *_ = curated(tmp_path, [*PROMPTS, PROMPTS[0] + "!", PROMPTS[0].upper()], near_duplicate=1.0)
    dropped = summary.sources["p.txt"].dropped
    assert (dropped["near_duplicate"], dropped["repeated"]) == (0, 1)


def test_nothing_like_a_benchmark_prompt_is_kept_even_if_benchmarks_resemble_each_other(tmp_path: Path) -> None:
    words = [f"word{i}" for i in range(12)]
    first, second = " ".join(words), " ".join(words[1:])
    (tmp_path / "bench.txt").write_text(f"{first}\n{second}\n")
    like_second = " ".join(words[2:])  # near the second benchmark prompt only
    summary, *_ = curated(tmp_path, [like_second, *PROMPTS], benchmarks=(file("bench.txt"),), near_duplicate=0.88)
    assert summary.sources["p.txt"].dropped["benchmark"] == 1


def test_the_tiny_world_keeps_only_its_own_scenes(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a photo of a cat\na tiny crimson disc\n")
    sources = (file("p.txt"), SceneSource(kind="scenes", count=100, seed=1))
    summary = curate(config(sources=sources, world="tiny", near_duplicate=1.0), tmp_path, tmp_path / "out")
    assert summary.sources["p.txt"].dropped["foreign"] == 1
    assert summary.sources["scenes/1"].read == 100
    assert (summary.train, summary.heldout) == (91, 10)


def test_same_inputs_same_bytes_and_the_order_of_a_files_lines_is_no_input(tmp_path: Path) -> None:
    def files(name: str, prompts: list[str]) -> dict[str, bytes]:
        curated(tmp_path, prompts)
        (tmp_path / "out").rename(tmp_path / name)
        return {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}

    once = files("once", PROMPTS)
    assert once.keys() == {"train.parquet", "heldout.parquet", "curation.json"}
    assert files("twice", PROMPTS) == once
    shuffled = files("shuffled", PROMPTS[::-1])
    assert shuffled["train.parquet"] == once["train.parquet"]
    assert shuffled["heldout.parquet"] == once["heldout.parquet"]


def test_a_small_set_gives_half_of_it_and_says_so(tmp_path: Path) -> None:
    summary, train, heldout = curated(tmp_path, PROMPTS[:40], heldout=512)
    assert (train.height, heldout.height, summary.heldout_asked) == (20, 20, 512)
    assert summary.notes == (
        "prompts.heldout asks for 512, but at most half of the 40 prompts are held out: evaluation runs on 20",
    )


def test_max_train_drops_the_surplus(tmp_path: Path) -> None:
    summary, train, _ = curated(tmp_path, PROMPTS, max_train=30)
    assert train.height == 30
    assert summary.sources["p.txt"].dropped["surplus"] == 20


def test_too_few_survivors_name_what_dropped_them_and_leave_the_old_tables(tmp_path: Path) -> None:
    curated(tmp_path, PROMPTS)
    with pytest.raises(PromptError, match=r"^No prompts survive curation.*Dropped: empty 1, too_short 2\."):
        curated(tmp_path, ["ab", "", "cd"])
    with pytest.raises(PromptError, match=r"^3 prompts survive.*4 are the least.*repeated 1\."):
        curated(tmp_path, ["abc", "def", "ghi", "ABC"])
    assert read_prompts(tmp_path / "out/train.parquet").height == 50
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["out", "p.txt"]


REAL_SETS = {
    "PartiPrompts.tsv": 1632,
    "refl_prompts.json": 10_000,
    "openprompts_1k.csv": 998,
    "hps_v2_train_prompts.txt": 752,
    "geneval_metadata.jsonl": 553,
}


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no public prompt sets in {REAL}: set TEXTCRAFTOR_TEST_DATA")
def test_public_prompt_sets_curate_without_leaks(tmp_path: Path) -> None:
    sets = {name: file(str(REAL / name)) for name in REAL_SETS}
    parti = sets.pop("PartiPrompts.tsv")
    summary = curate(config(sources=tuple(sets.values()), benchmarks=(parti,), heldout=512), tmp_path, tmp_path / "out")
    assert {Path(name).name: source.read for name, source in summary.sources.items()} == {
        name: rows for name, rows in REAL_SETS.items() if name != "PartiPrompts.tsv"
    }
    assert summary.train > 11_000
    assert summary.heldout == 512
    train, heldout = read_prompts(tmp_path / "out/train.parquet"), read_prompts(tmp_path / "out/heldout.parquet")
    assert near_duplicates(pl.concat([train["prompt"], heldout["prompt"]]), 0.9).is_empty()
    assert sum(source.dropped["benchmark"] for source in summary.sources.values()) > 0


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no public prompt sets in {REAL}: set TEXTCRAFTOR_TEST_DATA")
def test_parti_prompts_read_raw_quotes_and_all(tmp_path: Path) -> None:
    summary = curate(config(sources=(file(str(REAL / "PartiPrompts.tsv")),)), tmp_path, tmp_path / "out")
    assert next(iter(summary.sources.values())).read == REAL_SETS["PartiPrompts.tsv"]
    kept = {
        *read_prompts(tmp_path / "out/train.parquet")["prompt"],
        *read_prompts(tmp_path / "out/heldout.parquet")["prompt"],
    }
    assert any(prompt.startswith('"G I G G L E" painted') for prompt in kept)


def test_a_held_out_source_is_evaluated_on_and_never_trained_on(tmp_path: Path) -> None:
    (tmp_path / "bench.txt").write_text("\n".join([PROMPTS[0], "a benchmark of four", "another of them", "and a third"]))
    sources = (file("p.txt"), file("bench.txt", held_out=True))
    summary, train, heldout = curated(tmp_path, PROMPTS, sources=sources, heldout=3, max_train=20, near_duplicate=1.0)
    assert set(heldout["source"]) == {"bench.txt"} and heldout.height == 3
    assert set(train["source"]) == {"p.txt"} and train.height == 20
    assert PROMPTS[0] not in train["prompt"].to_list()  # theirs, though ours comes first in the profile
    assert summary.sources["bench.txt"].dropped["surplus"] == 1
    everything, _, heldout = curated(tmp_path, PROMPTS, sources=sources, heldout=10, near_duplicate=1.0)
    assert heldout.height == 4 and "held_out gave 4" in everything.notes[0]


def test_held_out_sources_alone_leave_nothing_to_train_on(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"0 prompts are left to train on and 10 to evaluate on"):
        curated(tmp_path, PROMPTS, sources=(file("p.txt", held_out=True),))


def test_a_missing_source_says_where_it_comes_from(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"mine\.parquet does not exist\. Export it from the archive\."):
        curate(config(sources=(file("mine.parquet", origin="Export it from the archive."),)), tmp_path, tmp_path / "out")
