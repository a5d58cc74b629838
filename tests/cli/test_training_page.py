"""The guide of `funclora train`: its keys are those of the settings, its commands run and print what it shows."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import task_models
import text_models
import torch
from pages import DOCS, blocks
from typer.testing import CliRunner

from funclora._apps.train.records import READERS
from funclora._apps.train.settings import TASKS, Settings
from funclora.cli._app import app

PAGE = DOCS / "training.md"
TEXT = PAGE.read_text(encoding="utf-8")


def written(value: Any) -> str:
    """A default, as TOML has it."""
    if value is None or value == ():
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return f"`[{', '.join(map(repr, value))}]`".replace("'", '"')
    return f"`{value!r}`" if isinstance(value, int | float) else f'`"{value}"`'


def tables() -> Iterator[str]:
    """A table for each group of keys, as the page must have it."""
    groups: dict[str, list[str]] = {}
    for f in fields(Settings):
        choices = f.metadata.get("choices")
        text = f.metadata["help"] + (f" {', '.join(f'`{name}`' for name in choices)}." if choices else "")
        groups.setdefault(f.metadata["group"], []).append(f"| `{f.name}` | {written(f.default)} | {text} |\n")
    for group, rows in groups.items():
        yield f"### {group}\n\n| key | default | |\n|---|---|---|\n{''.join(rows)}"


def test_the_tables_are_those_of_the_settings() -> None:
    for table in tables():
        assert table in TEXT, f"write this into {PAGE.name}:\n\n{table}"
    listed = re.findall(r"^\| `(\w+)` \|", TEXT.partition("## All keys")[2], re.MULTILINE)
    assert listed == [f.name for f in fields(Settings)]


def test_all_that_the_page_names_is_there() -> None:
    for name in (*TASKS, *READERS, ".ndjson"):
        assert f"`{name}`" in TEXT, name
    keys = {f.name for f in fields(Settings)}
    options = set(re.findall(r"`--([a-z0-9-]+)", TEXT)) - {"dry-run"}
    assert {option.replace("-", "_") for option in options} <= keys


@pytest.mark.slow
def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for kind in ("llama", "bert", "t5"):
        torch.manual_seed(0)
        task_models.save(Path(kind), kind, template=text_models.PLAIN)
    for block in blocks(PAGE):
        if block.title:
            Path(block.title).write_text(block.code, encoding="utf-8")
        elif block.language == "console":
            parts = re.split(r"^\$ (.*)\n", block.code, flags=re.MULTILINE)[1:]
            for command, shown in zip(parts[::2], parts[1::2], strict=True):
                printed = done(command)
                memory = re.compile(r"^.* MiB of memory.*$", re.MULTILINE)  # differs with the version of torch
                for text in (printed, shown):
                    assert len(memory.findall(text)) == 1
                assert stripped(memory.sub("", printed)) == stripped(memory.sub("", shown)), f"{block.place}\n{printed}"
        elif block.language == "sh":
            for command in block.code.splitlines():
                done(command)
    assert len(Path("early/metrics.jsonl").read_text().splitlines()) > 8


def stripped(text: str) -> list[str]:
    return "\n".join(line.rstrip() for line in text.splitlines()).strip("\n").splitlines()


def done(command: str) -> str:
    """What a command prints."""
    program, *words = shlex.split(command)
    if program == "python":
        subprocess.run([sys.executable, *words], check=True, capture_output=True)
        return ""
    assert program == "funclora"
    result = CliRunner().invoke(app, words, env={"COLUMNS": "80"})
    assert result.exit_code == 0, f"{command}\n{result.output}\n{result.exception!r}"
    return result.output
