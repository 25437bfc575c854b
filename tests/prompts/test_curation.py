import json
import os
import random
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from textcraftor.config import FileSource, PromptsConfig, SceneSource
from textcraftor.errors import PromptError
from textcraftor.prompts import CurationSummary, curate, noise_seed, prompt_id, read_prompts
from textcraftor.prompts.curation import SourceCount, resembles_any
from textcraftor.prompts.duplicates import near_duplicates

REPOSITORY = Path(__file__).parents[2]
REAL = Path(os.environ.get("TEXTCRAFTOR_TEST_DATA", REPOSITORY.parent / "shared/data"))
NAMES = ["cat", "dog", "boat", "tower", "cup", "rose", "king", "logo", "pizza", "train"]
PROMPTS = [f"a {size} {name} in {place}" for name in NAMES for size in ("big", "old") for place in ("rain", "snow", "fog")]


def file(path: str, **more: Any) -> FileSource:
    return FileSource(kind="file", path=path, **more)


def config(**more: Any) -> PromptsConfig:
    return PromptsConfig(**{"sources": (file("p.txt"),), "heldout": 10, "heldout_share": 0.25, **more})


def curated(root: Path, prompts: list[str], **more: Any) -> tuple[CurationSummary, pl.DataFrame, pl.DataFrame]:
    (root / "p.txt").write_text("\n".join(prompts), encoding="utf-8")
    summary = curate(config(**more), root, root / "out")
    return summary, read_prompts(root / "out/train.parquet"), read_prompts(root / "out/heldout.parquet")


def test_curation_splits_and_counts(tmp_path: Path) -> None:
    summary, train, heldout = curated(tmp_path, PROMPTS)
    assert (train.height, heldout.height) == (47, 10)
    both = pl.concat([train, heldout])
    assert set(both["prompt"]) < set(PROMPTS)
    assert both["prompt_id"].to_list() == [prompt_id(prompt) for prompt in both["prompt"]]
    assert both["seed"].to_list() == [noise_seed(one, 0) for one in both["prompt_id"]]
    assert both["words"].to_list() == [5] * 57
    assert set(both["source"]) == {"p.txt"}
    assert set(heldout["category"]) <= set(train["category"])
    assert summary.notes == ()
    record = json.loads((tmp_path / "out/curation.json").read_text())
    assert record["sources"]["p.txt"]["train"] == 47
    assert record["sources"]["p.txt"]["dropped"]["reserve"] == 3
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
    dropped = {reason: count for reason, count in first.dropped.items() if count and reason != "reserve"}
    assert dropped == {"empty": 2, "too_short": 1, "too_long": 1, "blocked": 1, "repeated": 1, "benchmark": 1}
    assert {reason: count for reason, count in second.dropped.items() if count} == {"repeated": 3}
    assert second.licence == "CC0-1.0"
    for source in summary.sources.values():
        assert source.read == source.train + source.heldout + sum(source.dropped.values())
    assert (first.read, second.read) == (67, 4)
    reserve = first.dropped["reserve"] + second.dropped["reserve"]
    assert train.height + heldout.height + reserve == 61


def test_blocked_words_are_whole_words_and_may_contain_punctuation(tmp_path: Path) -> None:
    prompts = ["Nude, a study", "nudelsalat", "i write C++ here", "a c+ grade", *PROMPTS]
    summary, train, heldout = curated(tmp_path, prompts, blocklist=("nude", "c++"))
    assert summary.sources["p.txt"].dropped["blocked"] == 2
    assert {"nudelsalat", "a c+ grade"} <= {*train["prompt"], *heldout["prompt"]}


def test_one_of_two_near_duplicates_is_kept(tmp_path: Path) -> None:
    long = "a very detailed painting of a castle on a hill at night with many stars above it"
    prompts = [long, long + "!", long + " glowing", "a chain of a b c d", *PROMPTS]
    summary, train, heldout = curated(tmp_path, prompts, near_duplicate=0.9)
    assert summary.sources["p.txt"].dropped["near_duplicate"] == 2
    kept = {*train["prompt"], *heldout["prompt"]}
    assert long in kept
    assert long + " glowing" not in kept


def test_a_near_duplicate_of_a_dropped_row_is_kept(tmp_path: Path) -> None:
    """A~B and B~C, but not A~C: B is dropped, C resembles no kept row."""
    a, b, c = "a b c d e f g h i j k", "b c d e f g h i j k l", "c d e f g h i j k l m"
    _, train, heldout = curated(tmp_path, [a, b, c, *PROMPTS], near_duplicate=0.8)
    kept = {*train["prompt"], *heldout["prompt"]}
    assert {a, c} <= kept
    assert b not in kept


def test_a_threshold_of_1_drops_exact_repeats_only(tmp_path: Path) -> None:
    summary, *_ = curated(tmp_path, [*PROMPTS, PROMPTS[0] + "!", PROMPTS[0].upper()], near_duplicate=1.0)
    dropped = summary.sources["p.txt"].dropped
    assert (dropped["near_duplicate"], dropped["repeated"]) == (0, 1)


def test_near_duplicates_of_benchmark_prompts_are_dropped(tmp_path: Path) -> None:
    words = [f"word{i}" for i in range(12)]
    first, second = " ".join(words), " ".join(words[1:])
    (tmp_path / "bench.txt").write_text(f"{first}\n{second}\n")
    like_second = " ".join(words[2:])  # near the second benchmark prompt only
    summary, *_ = curated(tmp_path, [like_second, *PROMPTS], benchmarks=(file("bench.txt"),), near_duplicate=0.88)
    assert summary.sources["p.txt"].dropped["benchmark"] == 1


def test_the_tiny_world_drops_other_prompts(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a photo of a cat\na tiny crimson disc\n")
    sources = (file("p.txt"), SceneSource(kind="scenes", count=100, seed=1))
    summary = curate(config(sources=sources, world="tiny", near_duplicate=1.0), tmp_path, tmp_path / "out")
    assert summary.sources["p.txt"].dropped["foreign"] == 1
    assert summary.sources["scenes/1"].read == 100
    assert summary.heldout == 10
    assert summary.train + sum(source.dropped["reserve"] for source in summary.sources.values()) == 91


def test_the_bytes_do_not_depend_on_the_order_of_lines(tmp_path: Path) -> None:
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


def test_too_few_held_out_prompts_are_noted(tmp_path: Path) -> None:
    summary, train, heldout = curated(tmp_path, PROMPTS[:40], heldout=512)
    assert train.height + heldout.height == 40
    assert (summary.heldout, summary.heldout_asked) == (heldout.height, 512)
    assert summary.notes == (
        "prompts.heldout asks for 512; prompts.heldout_share = 0.25 of 40 prompts gave "
        f"{heldout.height}: evaluation runs on those",
    )


@pytest.mark.parametrize("count", [40, 200])
def test_a_growing_set_never_evaluates_on_what_was_trained_on(tmp_path: Path, count: int) -> None:
    """Under other quotas, orders of sources and with a source removed; near duplicates included."""
    rng = random.Random(count)
    words = [f"word{number}" for number in range(40)]
    originals = [" ".join(rng.choices(words, k=12)) for _ in range(count)]
    near = [f"{prompt} more" for prompt in originals]  # 11 of 12 word pairs are the same
    trained: list[str] = []
    few, many = sorted(rng.sample(range(count // 3, count), 2))
    for first, second in ((few, count // 4), (few, many), (many, many), (count, count)):
        (tmp_path / "near.txt").write_text("\n".join(near[:second]))
        (tmp_path / "other.txt").write_text("\n".join(PROMPTS))
        sources = [file("p.txt"), file("near.txt"), *([file("other.txt")] if rng.random() < 0.5 else [])]
        rng.shuffle(sources)
        _, train, heldout = curated(tmp_path, originals[:first], sources=tuple(sources), heldout=rng.randrange(2, count))
        trained += train["prompt"].to_list()
        assert not resembles_any(heldout["prompt"], pl.Series("prompt", trained), 0.9).any()


def test_max_train_drops_the_surplus(tmp_path: Path) -> None:
    summary, train, heldout = curated(tmp_path, PROMPTS, max_train=30)
    assert train.height == 30
    dropped = summary.sources["p.txt"].dropped
    assert dropped["surplus"] + dropped["reserve"] + heldout.height == 30


def test_too_few_prompts_are_an_error_that_keeps_the_old_tables(tmp_path: Path) -> None:
    curated(tmp_path, PROMPTS)
    with pytest.raises(PromptError, match=r"^No prompts survive curation.*Dropped: empty 1, too_short 2\."):
        curated(tmp_path, ["ab", "", "cd"])
    with pytest.raises(PromptError, match=r"^3 prompts survive.*4 are the least.*repeated 1\."):
        curated(tmp_path, ["abc", "def", "ghi", "ABC"])
    assert read_prompts(tmp_path / "out/train.parquet").height == 47
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
    summary = curate(
        config(sources=tuple(sets.values()), benchmarks=(parti,), heldout=512, heldout_share=0.06), tmp_path, tmp_path / "out"
    )
    assert {Path(name).name: source.read for name, source in summary.sources.items()} == {
        name: rows for name, rows in REAL_SETS.items() if name != "PartiPrompts.tsv"
    }
    assert summary.train > 11_000
    assert summary.heldout == 512
    train, heldout = read_prompts(tmp_path / "out/train.parquet"), read_prompts(tmp_path / "out/heldout.parquet")
    assert near_duplicates(pl.concat([train["prompt"], heldout["prompt"]]), 0.9).is_empty()
    assert sum(source.dropped["benchmark"] for source in summary.sources.values()) > 0


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no public prompt sets in {REAL}: set TEXTCRAFTOR_TEST_DATA")
def test_parti_prompts_keep_their_quotation_marks(tmp_path: Path) -> None:
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
    assert summary.sources["bench.txt"].dropped["reserve"] == 1
    everything, _, heldout = curated(tmp_path, PROMPTS, sources=sources, heldout=10, near_duplicate=1.0)
    assert heldout.height == 4 and "held_out gave 4" in everything.notes[0]


def test_held_out_sources_alone_leave_nothing_to_train_on(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"0 prompts are left to train on and 10 to evaluate on"):
        curated(tmp_path, PROMPTS, sources=(file("p.txt", held_out=True),))


def test_a_missing_source_says_where_it_comes_from(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"mine\.parquet does not exist\. Export it from the archive\."):
        curate(config(sources=(file("mine.parquet", origin="Export it from the archive."),)), tmp_path, tmp_path / "out")


def test_the_summary_reads_as_one_line_and_its_notes() -> None:
    source = SourceCount("MIT", read=1200, train=930, heldout=256, dropped={"empty": 0, "reserve": 14})
    summary = CurationSummary(930, 256, 256, {}, {"a": source, "b": source}, notes=("a note",))
    assert str(summary) == "2,400 prompts read: 930 to train on, 256 held out; dropped: reserve 28\na note"
