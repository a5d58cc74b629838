"""Data files: what they hold, or one line that names the file and the place."""

from __future__ import annotations

import csv
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from funclora._apps.train import utf8
from funclora._apps.train.records import is_text, read, texts
from funclora.errors import FormatError

Rows = list[dict[str, Any]]
ROWS: Rows = [
    {"text": "line\nbreak", "n": 1},
    {"text": 'quote " and, comma', "n": -2},
    {"text": "U+2028 \u2028 U+0085 \x85 U+000C \x0c é 😀", "n": 3},
    {"text": "", "n": 0},
]


def write(file: Path, content: str | bytes) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


def fields(path: Path, field: str = "text") -> Rows:
    return [record.fields for record in read(path, field)]


def refused(path: Path) -> str:
    """The message, which begins with the path and is one line."""
    with pytest.raises(FormatError, match=re.escape(str(path))) as caught:
        list(read(path))
    message = str(caught.value)
    assert message.startswith(str(path)), message
    assert len(message.splitlines()) == 1, message
    return message.removeprefix(str(path))


@pytest.mark.parametrize("escape", [True, False])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("bom", [b"", utf8.BOM])
@pytest.mark.parametrize("last", [True, False])
def test_jsonl(tmp_path: Path, escape: bool, end: str, bom: bytes, last: bool) -> None:
    content = end.join(json.dumps(row, ensure_ascii=escape) for row in ROWS) + (end if last else "")
    file = write(tmp_path / "a.jsonl", bom + content.encode())
    records = list(read(file))
    assert [record.fields for record in records] == ROWS
    assert [record.source for record in records] == [f"a.jsonl:{i + 1}" for i in range(len(ROWS))]
    assert [record.where for record in records] == [f"{file}:{i + 1}" for i in range(len(ROWS))]


def test_blank_lines_count_as_lines(tmp_path: Path) -> None:
    file = write(tmp_path / "a.ndjson", '\n \t\n{"text": "a"}\n\r\n{"text": "b"}\n\n')
    assert [record.source for record in read(file)] == ["a.ndjson:3", "a.ndjson:5"]


def test_json(tmp_path: Path) -> None:
    file = write(tmp_path / "a.json", json.dumps(ROWS, indent=2))
    assert fields(file) == ROWS
    assert [record.source for record in read(file)][:2] == ["a.json[0]", "a.json[1]"]


@pytest.mark.parametrize(("suffix", "separator"), [(".csv", ","), (".tsv", "\t")])
@pytest.mark.parametrize("bom", [b"", utf8.BOM])
def test_csv_values_are_texts(tmp_path: Path, suffix: str, separator: str, bom: bytes) -> None:
    rows: Rows = [
        {name: str(value) for name, value in row.items()}
        for row in [*ROWS, {"text": "NA", "n": "007"}, {"text": "x" * 200_000, "n": "1e5"}]
    ]
    with (tmp_path / "plain").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, ["text", "n"], delimiter=separator)
        writer.writeheader()
        writer.writerows(rows)
    file = write(tmp_path / f"a{suffix}", bom + (tmp_path / "plain").read_bytes())
    limit = csv.field_size_limit()
    records = list(read(file))
    assert [record.fields for record in records] == rows
    assert [record.source.split(":")[1] for record in records[:3]] == ["2", "4", "5"]  # the first is on two lines
    assert csv.field_size_limit() == limit


def test_parquet(tmp_path: Path) -> None:
    from datasets import Dataset

    rows: Rows = [{"messages": [{"role": "user", "content": row["text"]}], "n": row["n"], "none": None} for row in ROWS]
    Dataset.from_list(rows).to_parquet(str(tmp_path / "a.parquet"))
    records = list(read(tmp_path / "a.parquet"))
    assert [record.fields for record in records] == rows
    assert [record.source for record in records] == [f"a.parquet[{i}]" for i in range(len(rows))]


def test_texts_are_what_stands_in_the_file(tmp_path: Path) -> None:
    text = "\r\na\u2028b\n\n"
    assert fields(write(tmp_path / "a.txt", utf8.BOM + text.encode()), "body") == [{"body": text}]
    (record,) = read(write(tmp_path / "b.py", text))
    assert (record.fields, record.source) == ({"text": text}, "b.py")


def test_a_folder_is_read_in_order_without_what_is_hidden(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.md", "a/b.txt", "c/d/e.txt", ".git/x.txt", ".hidden"):
        write(tmp_path / "texts" / name, name)
    (tmp_path / "texts" / "link").symlink_to(write(tmp_path / "other" / "o.txt", "o").parent)
    names = ["a/b.txt", "a/z.md", "b.txt", "c/d/e.txt", "link/o.txt"]
    assert [record.source for record in read(tmp_path / "texts")] == names


def test_a_folder_of_shards(tmp_path: Path) -> None:
    for i in range(3):
        write(tmp_path / f"part-{i}.jsonl", json.dumps({"text": str(i)}))
    assert [(r.fields["text"], r.source) for r in read(tmp_path)] == [(str(i), f"part-{i}.jsonl:1") for i in range(3)]


def test_folders_that_cannot_be_read_as_one(tmp_path: Path) -> None:
    assert refused(tmp_path) == ": there is no file in this folder."
    write(tmp_path / "a.jsonl", "{}")
    write(tmp_path / "b" / "b.txt", "b")
    assert "several kinds, such as a.jsonl and b.txt. Give one file" in refused(tmp_path)
    (tmp_path / "b" / "up").symlink_to(tmp_path)
    assert refused(tmp_path).startswith("/b/up: this link leads back")


BAD: list[tuple[str, str | bytes, str]] = [
    ("a.jsonl", "", ": this file is empty."),
    ("a.jsonl", "\n \n", ": contains no records."),
    ("a.jsonl", utf8.BOM, ": contains no records."),
    ("a.jsonl", '{"a": 1}\n{"a": "xy', ":2: expected JSON in each line: Unterminated string starting at column 7."),
    ("a.jsonl", '{"a": 1}\n{"a": "xy', "The file ends in this line: is it cut off?"),
    ("a.jsonl", '{"a": 1}\n{"a": [1,', ":2: expected JSON in each line: Expecting value at column 10. The file ends"),
    ("a.jsonl", '{"a": 1}\n{"a"\n{}', ":2: expected JSON in each line: Expecting ':' delimiter"),
    ("a.jsonl", '{"a": 1} {"a": 2}', ":1: expected JSON in each line: Extra data at column 10."),
    (
        "a.jsonl",
        '[{"a": 1}]',
        ":1: expected an object in each line, got [{'a': 1}]. A file that is one array of objects is",
    ),
    ("a.jsonl", '[\n {"a": 1}\n]', "A file that is one array of objects is named .json."),
    (
        "a.csv",
        "text;label\na;b\n",
        ":1: expected names with ',' between them, got 'text;label'. Are the values separated by ';'",
    ),
    ("a.tsv", "text,label\n", ": contains no records."),
    ("a.jsonl", '{"a": 1}\n"text"\n', ":2: expected an object"),
    ("a.jsonl", '{"a": 1}\nnull\n', ":2: expected an object"),
    ("a.jsonl", '{"a": 1, "b": {"c": 1, "c": 2}}', ":1: expected JSON in each line: the name 'c' appears twice"),
    ("a.jsonl", '{"a": NaN}', ":1: expected JSON in each line: NaN is not a number in JSON."),
    ("a.jsonl", '{"a": -Infinity}', ":1: expected JSON in each line: -Infinity is not"),
    ("a.jsonl", '{"a": 1e999}', ":1: expected JSON in each line: '1e999' is too large"),
    ("a.jsonl", '{"a": ' + "9" * 5000 + "}", ":1: expected JSON in each line: Exceeds the limit"),
    ("a.jsonl", '{"a": ' + "[" * 200_000, ":1: expected JSON in each line: maximum recursion depth"),
    ("a.jsonl", '{"a": ["x", {"b": "\\ud83d"}]}', r":1: '\ud83d' contains half of a surrogate pair"),
    ("a.jsonl", '{"a": 1}\n{"a": "é"}\n'.encode("latin-1"), ":2: byte 16 of the file, 0xe9, is not UTF-8."),
    ("a.jsonl", utf8.BOM + '{"a": "é"}\n'.encode("latin-1"), ":1: byte 10 of the file, 0xe9, is not UTF-8."),
    ("a.jsonl", '{"a": "é"}\n'.encode("utf-16"), ":1: this is UTF-16, expected UTF-8. Convert the file."),
    ("a.jsonl", b'{"a": "\xf0\x9f\x98', ":1: byte 7 of the file, 0xf0, is not UTF-8."),
    ("a.jsonl", b'{"a": "\x00"}', ":1: expected JSON in each line: Invalid control character"),
    ("a.json", '{"text": "a"}\n{"text": "b"}', ": expected JSON: Extra data at line 2, column 1."),
    ("a.json", '{"data": []}', ": expected an array of objects, got {'data': []}. A file with one object in each"),
    ("a.json", '[{"a": 1}, 2]', "[1]: expected an object"),
    ("a.json", "[]", ": contains no records."),
    ("a.json", '[{"a": 1}', ": expected JSON: Expecting ',' delimiter"),
    ("a.json", '[\n{"a": "é"}]'.encode("latin-1"), ":2: byte 9 of the file, 0xe9, is not UTF-8."),
    ("a.csv", "text,text\na,b\n", ":1: column 2: the name 'text' appears twice."),
    ("a.csv", "text,\na,b\n", ":1: column 2: the name '' is blank."),
    ("a.csv", "text,n\na,b\n\nc\n", ":4: expected 2 values, one for each name in the first row, got 1."),
    ("a.csv", 'text,n\n"a\nb",1\nc,d,e\n', ":4: expected 2 values"),
    ("a.csv", 'text\n"abc\n\n', ":3: expected a row of values: unexpected end of data."),
    ("a.csv", 'text\n"a"b\n', ":2: expected a row of values: ',' expected after"),
    ("a.csv", "text\na\0b\n", ":2: contains a zero byte"),
    ("a.csv", "text\n\n", ": contains no records."),
    ("a.csv", "text\né\n".encode("latin-1"), ":2: byte 5 of the file, 0xe9"),
    ("a.parquet", "no table", ": this is not a complete Parquet file: "),
    ("a.parquet", b"PAR1" + bytes(20) + b"PAR1", ": this is not a complete Parquet file: "),
    ("a.txt", b"one\ntwo \xff\n", ":2: byte 8 of the file, 0xff, is not UTF-8."),
    ("a.txt", b"one\ntwo \0\n", ":2: contains a zero byte, so this is not a text."),
    ("a.bin", b"\xff\xfea\0", ":1: this is UTF-16"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD, ids=[f"{name}-{i}" for i, (name, *_) in enumerate(BAD)])
def test_bad_files_are_named_with_the_line(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    assert message in refused(write(tmp_path / name, content))


def test_a_parquet_file_that_is_cut_off(tmp_path: Path) -> None:
    from datasets import Dataset

    Dataset.from_list(ROWS).to_parquet(str(tmp_path / "whole.parquet"))
    whole = (tmp_path / "whole.parquet").read_bytes()
    for part in (whole[:-1], whole[: len(whole) // 2], whole[: len(whole) // 2] + whole[-len(whole) // 3 :]):
        assert ": this is not a complete Parquet file: " in refused(write(tmp_path / "a.parquet", part))


def test_what_is_no_file(tmp_path: Path) -> None:
    assert refused(tmp_path / "none.jsonl") == ": there is no such file."
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert refused(tmp_path / "pipe.jsonl") == ": this is not a regular file."


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", "{}").chmod(0)
    assert refused(tmp_path / "a.jsonl") == ": cannot be read: Permission denied."


def test_a_huge_line_is_refused_before_it_is_read(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", '{"text": "a"}\n')
    with file.open("r+b") as stream:
        stream.seek(1 << 40)  # a hole of a terabyte
        stream.write(b"}")
    assert refused(file).startswith(":2: this line is longer than 64 MiB.")


@pytest.mark.parametrize("name", ["a.json", "a.txt"])
def test_a_huge_file_is_refused_before_it_is_read(tmp_path: Path, name: str) -> None:
    with (tmp_path / name).open("wb") as stream:
        stream.truncate(1 << 40)
    assert refused(tmp_path / name).startswith(": this file is read at once, but is larger than 4 GiB.")


def test_records_are_read_as_they_are_asked_for(tmp_path: Path) -> None:
    records = read(write(tmp_path / "a.jsonl", '{"text": "a"}\nbroken'))
    assert next(records).fields == {"text": "a"}
    with pytest.raises(FormatError, match=r"a.jsonl:2"):
        next(records)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(st.dictionaries(st.text(), JSON, max_size=3), min_size=1, max_size=5), st.booleans())
def test_what_json_writes_is_read(tmp_path_factory: pytest.TempPathFactory, rows: Rows, escape: bool) -> None:
    folder = tmp_path_factory.getbasetemp()
    lines = [json.dumps(row, ensure_ascii=escape) for row in rows]
    assert fields(write(folder / "written.jsonl", "\n".join(lines))) == rows
    assert fields(write(folder / "written.json", f"[{','.join(lines)}]")) == rows


PIECES = st.sampled_from(
    [b'{"text": "a"}\n', b'{"text": ', b'"\\ud800"', b"\xef\xbb\xbf", b"\xff\xfe", b"\r", b"\n", b'"', b"\\", b"NaN",
     b"1e999", b"[", b"]", b"}", b",", b":", b"\0", b"\xe2\x80\xa8", b"PAR1", b"text,n\n", b"-0"]
)  # fmt: skip


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet", ".txt"])
@given(content=st.binary(max_size=200) | st.lists(PIECES, max_size=12).map(b"".join))
def test_any_bytes_are_records_or_a_format_error(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, content: bytes
) -> None:
    file = write(tmp_path_factory.getbasetemp() / f"any{suffix}", content)
    try:
        records = list(read(file))
    except FormatError:
        refused(file)
        return
    assert records
    for record in records:
        assert json.dumps(record.fields, allow_nan=False, ensure_ascii=False).encode()


def test_texts_of_records(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", "a,b\n1,2\n3,4\n")
    assert texts(file, "b") == ["2", "4"]
    with pytest.raises(FormatError, match=r"a.csv:2: expected a text under 'c'; it has 'a', 'b'\. Say another\.$"):
        texts(file, "c", " Say another.")
    assert all(is_text(Path(name)) for name in ("a.txt", "a.py", "a"))
    assert not any(is_text(Path(name)) for name in ("a.JSONL", "a.ndjson", "a.parquet"))
