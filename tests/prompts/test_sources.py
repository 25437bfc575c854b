import json
from pathlib import Path

import polars as pl
import pytest

from textcraftor.config import FileSource, SceneSource
from textcraftor.errors import PromptError
from textcraftor.prompts.sources import read_file, read_source, source_name
from textcraftor.tiny.language import parse

PROMPTS = ["a red circle", "ein grüner Stern, glänzend", 'the word "STOP", painted']


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.txt", "\n".join(PROMPTS)),
        ("crlf.txt", "\r\n".join(PROMPTS) + "\r\n"),
        ("bom.txt", "\ufeff" + "\n".join(PROMPTS)),
        ("p.csv", 'id,Prompt\n1,a red circle\n2,"ein grüner Stern, glänzend"\n3,"the word ""STOP"", painted"\n'),
        ("bom.csv", '\ufeffPROMPT\na red circle\n"ein grüner Stern, glänzend"\n"the word ""STOP"", painted"\n'),
        ("p.tsv", "Prompt\tNote\n" + "".join(f'{prompt}\tsee "x\n' for prompt in PROMPTS)),
        ("strings.json", json.dumps(PROMPTS)),
        ("objects.json", json.dumps([{"text": prompt, "n": 1} for prompt in PROMPTS])),
        ("p.jsonl", "\n\n".join(json.dumps({"prompt": prompt, "include": [{}]}) for prompt in PROMPTS)),
        ("strings.JSONL", "\ufeff" + "\n".join(json.dumps(prompt, ensure_ascii=False) for prompt in PROMPTS)),
    ],
)
def test_every_text_format_gives_the_same_prompts(tmp_path: Path, name: str, content: str) -> None:
    assert [text and text.strip() for text in read_file(written(tmp_path / name, content))] == PROMPTS


def test_parquet(tmp_path: Path) -> None:
    pl.DataFrame({"id": [1, 2, 3], "Caption": PROMPTS}).write_parquet(tmp_path / "p.parquet")
    assert read_file(tmp_path / "p.parquet") == PROMPTS
    with pytest.raises(PromptError, match="'id' holds Int64, not text"):
        read_file(tmp_path / "p.parquet", "id")


def test_rows_without_a_prompt_are_kept_to_be_counted(tmp_path: Path) -> None:
    assert read_file(written(tmp_path / "p.txt", "a\n\n  \nb")) == ["a\n", None, None, "b"]
    assert read_file(written(tmp_path / "p.csv", "prompt,n\na,1\n,2\nb,3\n")) == ["a", None, "b"]
    assert read_file(written(tmp_path / "p.json", '[{"prompt": "a"}, {"prompt": null}, {}]')) == ["a", None, None]


def test_column_names_ignore_case_and_an_exact_match_wins(tmp_path: Path) -> None:
    path = written(tmp_path / "p.csv", "PROMPT,prompt,Title\nupper,lower,title\n")
    assert read_file(path) == ["lower"]
    assert read_file(path, "title") == ["title"]


def test_usual_names_replace_the_default_column_only(tmp_path: Path) -> None:
    path = written(tmp_path / "p.csv", "n,Caption,text\n1,a caption,a text\n")
    assert read_file(path) == ["a text"]
    with pytest.raises(PromptError, match=r"no column 'title'. It has: n, Caption, text"):
        read_file(path, "title")
    with pytest.raises(PromptError, match=r"no column 'prompt' or 'text' or 'caption'. It has: a, b"):
        read_file(written(tmp_path / "q.csv", "a,b\n1,2\n"))


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("p.txt", b"fine\ncaf\xe9\n", r"not UTF-8: byte 0xe9 at offset 8 \(line 2\)"),
        ("p.csv", b"prompt\ncaf\xe9\n", r"not UTF-8: byte 0xe9 at offset 10 \(line 2\)"),
        ("p.json", '["a"]'.encode("utf-16"), r"not UTF-8: byte 0xff at offset 0 \(line 1\)"),
        ("p.txt", b"", "is empty"),
        ("p.csv", b"\xef\xbb\xbf \n\n", "is empty"),
        ("p.json", b"  ", "is empty"),
        ("p.json", b'["a", ', "not well-formed JSON"),
        ("p.json", b"[" * 200_000, "not well-formed JSON"),
        ("p.json", b'{"prompt": "a"}', "must hold a list of strings or of objects, got dict"),
        ("p.json", b'["a", 3]', "item 1: a prompt must be text, got int"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": ["a"]}', "line 2: a prompt must be text, got list"),
        ("p.jsonl", b'{"prompt": "a"}\nb\n', "not well-formed JSON in line 2"),
        ("p.csv", b'prompt,n\na,1\n"b" c,2\n', "not a well-formed csv file"),
        ("p.csv", b"prompt,n\na dog, in a park,1\n", 'not a well-formed csv file.*comma in "quotation marks"'),
        ("p.parquet", b"PAR1", "not a well-formed parquet file"),
        ("p.xlsx", b"PK", r"suffix '.xlsx'. Prompts are read from .txt, .csv, .tsv, .json, .jsonl, .parquet"),
    ],
)
def test_an_unreadable_file_is_a_one_line_error(tmp_path: Path, name: str, content: bytes, complaint: str) -> None:
    with pytest.raises(PromptError, match=complaint) as raised:
        read_file(written(tmp_path / name, content))
    assert name in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_missing_file_and_a_folder_are_errors(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="does not exist"):
        read_file(tmp_path / "none.txt")
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(PromptError, match="is a folder"):
        read_file(tmp_path / "folder.txt")


def test_sources_are_relative_to_the_root(tmp_path: Path) -> None:
    written(tmp_path / "mine.txt", "a\n")
    mine = FileSource(kind="file", path="mine.txt")
    assert read_source(mine, tmp_path) == ["a\n"]
    assert source_name(mine) == "mine.txt"
    scenes = SceneSource(kind="scenes", count=20, seed=3)
    prompts = read_source(scenes, tmp_path)
    assert len(prompts) == 20
    assert all(prompt and parse(prompt) for prompt in prompts)
    assert source_name(scenes) == "scenes/3"
