"""The page "Which files work": its functions are public, and the tests that it names check them."""

from __future__ import annotations

import re

import pytest
from pages import DOCS, ROOT

import funclora as fl

PAGE = (DOCS / "files.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.partition("| written by")[2].partition("\n\n")[0].splitlines()[2:]
]
# Program -> what stands for its files in the tests that its row names.
MADE_BY = {
    "PEFT": "test_a_folder_of_peft", "axolotl": "axolotl", "LLaMA-Factory": "LLaMA-Factory",
    "unsloth": "unsloth", "torchtune": "test_folders_of_torchtune", "mlx-lm": "test_folders_of_mlx_lm",
    "llama.cpp": "test_logits", "diffusers": "test_files_of_diffusers", "diffusers before 0.22": "test_old_names",
    "kohya's scripts": "test_files_of_kohya", "full fine-tuning": "full fine-tuning", "any trainer": "extract_adapter",
    "experts": "test_experts",
}  # fmt: skip


def names(cell: str) -> list[str]:
    return re.findall(r"`(\w+)`", cell)


def test_the_table_is_found() -> None:
    assert len(ROWS) > 8
    assert all(len(row) == 5 for row in ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_a_row_of_the_table(row: list[str]) -> None:
    writer, _, read, written, checked = row
    (place,) = re.findall(r"`(tests/\S+?)`", checked)
    text = (ROOT / place).read_text(encoding="utf-8")
    for name in names(read) + names(written):
        assert name in fl.__all__ or name in fl.io.__all__
    assert any(name in text for name in names(read))
    for each in writer.split(", "):
        assert MADE_BY[each] in text, each
