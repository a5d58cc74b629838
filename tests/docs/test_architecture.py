"""The page of the architecture has every package, in the order that the test of the imports holds them to."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pages import CONTRIBUTING, DOCS, README, ROOT
from test_structure import ORDER

PAGE = (DOCS / "architecture.md").read_text(encoding="utf-8")
PICTURE = (DOCS / "packages.svg").read_text(encoding="utf-8")


def test_the_table_has_the_packages_in_their_order() -> None:
    assert re.findall(r"^\| `([^` ]+)` \| .*\?", PAGE, re.MULTILINE) == [*reversed(ORDER)]


def test_the_picture_has_the_packages_in_their_order() -> None:
    """From the bottom up, and from left to right in a row."""
    boxes = re.findall(r'<text class="code" x="([\d.]+)" y="([\d.]+)">([^<]+)</text>', PICTURE)
    drawn = sorted(boxes, key=lambda box: (-float(box[1]), float(box[0])))
    assert [name for _, _, name in drawn] == ["funclora" if name == "__init__" else name for name in ORDER]


@pytest.mark.parametrize("page", [README, CONTRIBUTING, *sorted(DOCS.glob("*.md"))], ids=lambda page: page.name)
def test_the_files_that_pages_name_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:funclora|tests|docs|examples)/[\w./-]+?)/?`", text))
    if page.name == "architecture.md":
        named |= {f"funclora/{path}" for path in re.findall(r"`((?:_\w+|io/\w+|cli|rules)/\w+\.py)`", text)}
        assert len(named) > 25
    assert sorted(path for path in named if not (ROOT / path).exists()) == []
