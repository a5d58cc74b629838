"""Values in the user's cache folder: kept where possible, never needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from funclora._files import cache
from funclora._files.cache import cache_folder, digest_of, get, put

KEY, OTHER = digest_of("one"), digest_of("other")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FUNCLORA_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "things"


@pytest.mark.parametrize("value", [{"a": [1, 2.5, None, "é"]}, "text", [], 0, float("inf")])
def test_there_and_back(folder: Path, value: Any) -> None:
    assert get("things", KEY) is None
    put("things", KEY, value)
    assert get("things", KEY) == value
    assert get("things", OTHER) is None
    assert get("others", KEY) is None
    assert [file.name for file in folder.iterdir()] == [f"{KEY}.json"]


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({"FUNCLORA_CACHE_DIR": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/b/funclora"),
        ({"XDG_CACHE_HOME": "not/absolute", "HOME": "/c"}, "/c/.cache/funclora"),
        ({"HOME": "/c"}, "/c/.cache/funclora"),
        ({"FUNCLORA_CACHE_DIR": "", "XDG_CACHE_HOME": "/b"}, None),
    ],
)
def test_where_it_is(variables: dict[str, str], wanted: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FUNCLORA_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == (None if wanted is None else Path(wanted))


def test_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("FUNCLORA_CACHE_DIR", "")
    put("things", KEY, 1)
    assert get("things", KEY) is None
    assert not [*tmp_path.iterdir()]


DAMAGED = {
    "nothing": lambda text: b"",
    "half": lambda text: text[: len(text) // 2],
    "a digit": lambda text: text.replace(b"12345", b"12346"),
    "no JSON": lambda text: b"\x80" + text,
    "another value": lambda text: b"[]",
    "a number": lambda text: b"3",
    "another field": lambda text: text.replace(b'"value"', b'"Value"'),
    "another key": lambda text: text.replace(KEY.encode(), OTHER.encode()),
    "deep": lambda text: b"[" * 100_000,
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_what_is_damaged_is_made_again(folder: Path, damage: str) -> None:
    put("things", KEY, {"number": 12345})
    file = folder / f"{KEY}.json"
    sound = file.read_bytes()
    file.write_bytes(DAMAGED[damage](sound))
    assert file.read_bytes() != sound
    assert get("things", KEY) is None
    put("things", KEY, {"number": 12345})
    assert get("things", KEY) == {"number": 12345}


def test_what_was_not_used_for_longest_is_removed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [digest_of(i) for i in range(4)]
    for age, key in enumerate(keys[:3]):
        put("things", key, "x" * 200)
        os.utime(folder / f"{key}.json", ns=(0, 10**9 * age))
    (folder / "of the user.json").write_text("x" * 5000)
    draft = folder / f".{KEY}.json.{'0' * 32}.tmp"  # of a process that was killed
    draft.write_text("x" * 200)
    os.utime(draft, ns=(0, 1))
    assert get("things", keys[0]) is not None  # which is used now
    monkeypatch.setattr(cache, "_MOST", 1000)
    put("things", keys[3], "x" * 200)
    assert sorted(file.name for file in folder.iterdir()) == sorted(
        [f"{keys[0]}.json", f"{keys[3]}.json", "of the user.json"]
    )


def test_a_very_large_value_is_not_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_LARGEST", 1000)
    put("things", KEY, "x" * 1001)
    assert get("things", KEY) is None
    put("things", KEY, "x" * 500)
    assert get("things", KEY) == "x" * 500


@pytest.mark.parametrize("kind", ["file", "nowhere"])
def test_an_unwritable_folder_is_no_error(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FUNCLORA_CACHE_DIR", {"file": str(tmp_path / "file"), "nowhere": "/proc/nowhere"}[kind])
    put("things", KEY, 1)
    assert get("things", KEY) is None


WRITER = """
import sys
from funclora._files.cache import get, put
for i in range(60):
    put("things", sys.argv[1], {"by": sys.argv[2], "text": sys.argv[2] * 5000})
    found = get("things", sys.argv[1])
    assert found is not None and found["text"] == found["by"] * 5000
"""


def test_several_processes_write_the_same_entry(folder: Path) -> None:
    running = [
        subprocess.Popen([sys.executable, "-c", WRITER, KEY, each], stderr=subprocess.PIPE, text=True) for each in "ab"
    ]
    try:
        said = [process.communicate(timeout=60)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert ([process.returncode for process in running], said) == ([0, 0], ["", ""])
    assert [file.name for file in folder.iterdir()] == [f"{KEY}.json"]
    assert json.loads((folder / f"{KEY}.json").read_text())["key"] == KEY
