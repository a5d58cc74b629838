"""Any file of settings gives settings, or an error that names the file: soon, and in little memory."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from damage import BYTES, TREES, Edit, damaged, little_memory
from hypothesis import example, given, settings
from hypothesis import strategies as st

from funclora._apps.train import config_file, strict_json
from funclora._apps.train.reading import as_toml, read
from funclora._apps.train.records import read as read_records
from funclora._apps.train.settings import Settings
from funclora.errors import FormatError, FuncloraError

hostile = settings(max_examples=150)
SOUND = {
    ".toml": as_toml(Settings(data=(Path("d.jsonl"),), targets=("q_proj", "v_proj"), sample=("a\nb", "é"))),
    ".yaml": "lr: 2e-4\nrank: 8\ntargets: [q_proj, v_proj]\nsample:\n- |\n  a\n  b\n- 'x'\ninit: true\n"
    "data: &d x\nout: *d\n",
}


def attempt(suffix: str, content: bytes) -> str:
    """What is said of a file; empty if it is taken."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, f"run{suffix}")
        file.write_bytes(content)
        with little_memory():
            try:
                assert isinstance(read(file, {}), Settings)
            except FuncloraError as error:
                str(error).encode()  # it can be printed
                assert str(file) in str(error)  # noqa: PT017
                return str(error)
    return ""


@pytest.mark.parametrize("suffix", SOUND)
def test_the_sound_ones_are_taken(suffix: str) -> None:
    assert attempt(suffix, SOUND[suffix].encode()) == ""


@hostile
@given(st.sampled_from(sorted(SOUND)), BYTES)
def test_bytes(suffix: str, edits: list[Edit]) -> None:
    attempt(suffix, damaged(SOUND[suffix].encode(), edits))


# What stands for a value: a tag that it need not fit, and a text.
TAGS = ["", "!!bool ", "!!int ", "!!float ", "!!null ", "!!timestamp ", "!!binary ", "!!set ", "!!omap ",
        "!!pairs ", "!!map ", "!!seq ", "!!str ",
        "!!merge ", "!!value ", "!x ", "&a ", "*a ", "!!python/name:os.system "]  # fmt: skip
VALUES = st.sampled_from(
    ["", "x", "''", "-", "1", "0x", "0b2", "1_", "1:2:3", "2020-01-01", "2020-13-40 25:61:61", "[1, *a]",
     "{a: 1, a: 1}", "{[1]: 2}", "{<<: {a: 1}}", ".inf", ".nan", "~", "1" * 5000, "0x" + "f" * 5000, "[" * 400,
     "{" * 400, "\x07", "\ud800"]
)  # fmt: skip


@hostile
@example("!!bool ", "x", "rank")
@example("!!int ", "''", "rank")
@example("!!timestamp ", "x", "data")
@example("", "1" * 5000, "rank")
@example("", "0x" + "f" * 5000, "rank")
@given(st.sampled_from(TAGS), VALUES | st.text(), st.sampled_from(["rank", "lr", "data", "targets", "<<", "? "]))
def test_yaml(tag: str, value: str, key: str) -> None:
    attempt(".yaml", f"{key}: {tag}{value}\n".encode("utf-8", "surrogatepass"))


@hostile
@example("rank", "0x" + "f" * 5000)
@example("rank", "1" * 5000)
@given(
    st.sampled_from(["rank", "lr", "data", "targets", "x.y", "[rank]", "[[rank]]", '"rank"']),
    VALUES | st.text() | TREES.map(lambda tree: json.dumps(tree, allow_nan=False) if _finite(tree) else "nan"),
)
def test_toml(key: str, value: str) -> None:
    attempt(".toml", f"{key} = {value}\n".encode("utf-8", "surrogatepass"))


def _finite(tree: Any) -> bool:
    try:
        json.dumps(tree, allow_nan=False)
    except ValueError:
        return False
    return True


N = 10_000
LARGE = {
    "yaml keys": (".yaml", "".join(f"k{i}: 1\n" for i in range(N // 2)), "not a key of a run"),
    "a yaml key twice": (".yaml", "".join(f"k{i}: 1\n" for i in range(N // 2)) + "k1: 1\n", "'k1' appears twice"),
    "a number in base 60": (".yaml", f"rank: 1{':1' * N}\n", "a value of 20001 characters is no text"),
    "yaml in yaml": (".yaml", "rank: " + "[" * N, "nested too deeply"),
    "merges of merges": (
        ".yaml", "a0: &a0 {k: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 60)),
        "maps are not merged here",
    ),
    "lists of lists": (
        ".yaml", "a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60)),
        "not a key of a run",
    ),
    "toml keys": (".toml", "".join(f"k{i} = 1\n" for i in range(N // 2)), "not a key of a run"),
    "keys in keys": (".toml", "a." * N + "a = 1", "nested too deeply"),
    "keys in keys, quoted": (".toml", "'a'.\"b\" ." * (N // 4) + "a = 1", "nested too deeply"),
    "toml in toml": (".toml", "rank = " + "[" * N, "nested too deeply"),
    "a number in base 16": (".toml", "rank = 0x" + "f" * N, "a number of more than 100 digits"),
    "too large": (".toml", "#" * config_file.LARGEST + "#", "is larger than"),
}  # fmt: skip


@pytest.mark.parametrize("what", LARGE)
def test_large(what: str) -> None:
    suffix, content, message = LARGE[what]
    assert message in attempt(suffix, content.encode())


class Counted(str):
    """A text that counts how often it is compared."""

    comparisons = 0
    __slots__ = ()
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        Counted.comparisons += 1
        return str.__eq__(self, other)


def test_a_key_is_compared_with_no_other_one() -> None:
    """Twenty thousand keys took a minute: each was compared with all."""
    loader = config_file._yaml_loader(yaml)("")
    pairs = [
        (yaml.ScalarNode("tag:yaml.org,2002:str", Counted(f"k{i}")), yaml.ScalarNode("tag:yaml.org,2002:int", "1"))
        for i in range(2000)
    ]
    Counted.comparisons = 0
    assert len(loader.construct_mapping(yaml.MappingNode("tag:yaml.org,2002:map", pairs))) == 2000
    assert Counted.comparisons < 20_000
    Counted.comparisons = 0
    with pytest.raises(ValueError, match="'k1999' appears twice"):
        strict_json._unique([*((key.value, 1) for key, _ in pairs), (Counted("k1999"), 1)])
    assert Counted.comparisons < 20_000


@hostile
@given(st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt"]), BYTES, st.binary(max_size=200))
def test_records(suffix: str, edits: list[Edit], other: bytes) -> None:
    lines = '{"text": "a", "n": [1, 2.5, null, {"x": "é"}]}\n' * 3
    sound = {".json": f"[{lines.strip().replace(chr(10), ', ')}]", ".csv": 'a,b\n"x\ny",2\n', ".tsv": "a\tb\n1\t2\n"}
    content = other if suffix == ".parquet" else damaged(sound.get(suffix, lines).encode(), edits)
    with tempfile.TemporaryDirectory() as folder, little_memory():
        file = Path(folder, f"data{suffix}")
        file.write_bytes(content)
        try:
            found: Iterator[Any] = read_records(file)
            assert all(isinstance(record.fields, dict) for record in found)
        except FormatError as error:
            str(error).encode()
            assert str(file) in str(error)  # noqa: PT017
