"""Text files as documents."""

from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from recoup.tasks import task as task_module
from recoup.tasks.texts import find, read

TEXTS = ["One  speech.\nIts second line.\n", "\u201cAnother\u201d\u2028one"]


def written(folder: Path, kind: str) -> Path:
    path = folder / f"file{kind}"
    if kind == ".txt":
        path.write_bytes(b"\xef\xbb\xbf" + TEXTS[0].encode())
    elif kind == ".jsonl":
        import json

        rows = (json.dumps({"text": text, "year": 1}, ensure_ascii=False) for text in TEXTS)
        path.write_bytes("\r\n\n".join(rows).encode("utf-8-sig"))
    else:
        parquet.write_table(pa.table({"text": TEXTS, "year": [1, 2]}), path)
    return path


@pytest.mark.parametrize(("kind", "count"), [(".txt", 1), (".jsonl", 2), (".parquet", 2)])
def test_documents_are_what_was_written(tmp_path: Path, kind: str, count: int) -> None:
    assert read(written(tmp_path, kind), "text") == TEXTS[:count]


BAD = {
    "Latin-1.txt": (b"caf\xe9", r"Latin-1\.txt: not UTF-8 text at byte 3; save it as UTF-8"),
    "empty.txt": (b"\n \n", r"empty\.txt: no text found; the file is empty or blank"),
    "empty.jsonl": (b"", r"empty\.jsonl: no text found"),
    "blank.jsonl": (
        b'{"text": " "}\n{"text": ""}\n',
        r"blank\.jsonl: no text found; the file is empty or blank",
    ),
    "null.jsonl": (b'{"text": null}\n', r"null\.jsonl:1: 'text' is None, expected a text"),
    "Latin-1.jsonl": (
        b'{"text": "a"}\n{"text": "\xe9"}',
        r"Latin-1\.jsonl:2: not UTF-8 text at byte 10 of the line",
    ),
    "broken.jsonl": (b'{"text": "a"}\nplain\n', r"broken\.jsonl:2: not JSON at column 1"),
    "list.jsonl": (b"[1]\n", r"list\.jsonl:1: list found; every line is one object"),
    "other.jsonl": (
        b'{"text": "a"}\n{"body": "a"}\n',
        r"other\.jsonl:2: no key 'text', there are 'body'; set task\.data\.text",
    ),
    "number.jsonl": (b'{"text": 3}\n', r"number\.jsonl:1: 'text' is 3, expected a text"),
    "broken.parquet": (b"PAR1 nothing", r"broken\.parquet: not a parquet file \("),
    "page.html": (b"<p>", r"page\.html: \.html found; there are \.txt, \.jsonl, \.parquet"),
    "README": (b"a", r"README: no ending found; there are \.txt"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_one_line(tmp_path: Path, name: str) -> None:
    data, message = BAD[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path / name, "text")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"body": ["a"], "year": [1]}, r"no key 'text', there are 'body', 'year'; set task\.data\.text"),
        ({"text": ["", "\n"]}, r"file\.parquet: no text found; the file is empty or blank"),
        ({"text": ["a", None]}, r"file\.parquet, row 2: 'text' is None, expected a text"),
    ],
)
def test_a_bad_table_is_one_line(tmp_path: Path, table: dict[str, list[str]], message: str) -> None:
    parquet.write_table(pa.table(table), tmp_path / "file.parquet")
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "file.parquet", "text")


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, ".parquet")
    monkeypatch.setattr(task_module, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"file\.parquet needs pyarrow: pip install 'recoup\[demo\]'"):
        read(path, "text")


def test_files_are_found_by_name_list_and_pattern(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c[1].txt", "more/d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert list(find("b.txt", tmp_path, "")) == ["b.txt"]
    assert list(find(("b.txt", "a.txt"), tmp_path, "")) == ["b.txt", "a.txt"]
    assert list(find("?.txt", tmp_path, "")) == ["a.txt", "b.txt"]
    assert list(find("**/*.txt", tmp_path, "")) == ["a.txt", "b.txt", "c[1].txt", str(Path("more/d.txt"))]
    assert list(find("c[1].txt", tmp_path, "")) == ["c[1].txt"]  # a name first, then a pattern
    outside = str(tmp_path / "*.txt")
    assert list(find(outside, tmp_path / "more", "")) == [
        str(tmp_path / f"{n}.txt") for n in ("a", "b", "c[1]")
    ]


@pytest.mark.parametrize("name", ["absent.txt", "*.jsonl", "."])
def test_a_file_that_is_not_there_is_one_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such file; task\.data\.train wants \.txt, \.jsonl"):
        find(name, tmp_path, "task.data.train")
