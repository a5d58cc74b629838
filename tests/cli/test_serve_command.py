"""`funclora serve`: its options, and the demo, which needs nothing."""

from __future__ import annotations

import re
from pathlib import Path

import httpx
import pytest
from test_serving_page import served
from typer.testing import CliRunner

from funclora.cli._app import app

WRONG = [
    ([], "Give either the folder of a model, or --demo."),
    (["model", "--demo"], "Give either the folder of a model, or --demo."),
    (["--demo", "--chat-template", "x"], "--chat-template: the demo's base reads no chats."),
    (["model", "--api-key", "a b\n"], "--api-key: expected printable ASCII characters"),
    (["model", "--api-key", ""], "--api-key: expected printable ASCII characters"),
    (["model", "--allow-loading"], "--allow-loading needs the folder of --adapters"),
    (["model", "--memory", "much"], "--memory: expected a size such as 2GiB"),
    (["nowhere"], "nowhere is not a directory"),
    (["--demo", "--adapters", "nowhere"], "--adapters: nowhere is not a folder"),
]


@pytest.mark.parametrize(("words", "said"), WRONG, ids=lambda it: " ".join(it)[:30])
def test_wrong_options(words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["serve", *words, "--port", "0"])
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("funclora serve: ")
    assert said in line


@pytest.mark.slow
def test_the_demo_needs_nothing() -> None:
    with served("--demo") as (_, facts):
        assert facts["model"] == "demo"
        assert facts["adapters"] == ["asyncio-dora", "asyncio-lora", "concurrent-dora", "concurrent-lora"]
        texts = set()
        for name in ("demo", *facts["adapters"]):
            asked = {"model": name, "prompt": "async def ", "max_tokens": 40, "temperature": 0}
            answer = httpx.post(f"{facts['url']}/v1/completions", json=asked, trust_env=False, timeout=120).json()
            texts.add(answer["choices"][0]["text"])
        assert len(texts) > 2
        assert all(re.search(r"\w\w\w", text) for text in texts)
