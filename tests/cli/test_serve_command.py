"""`funclora serve`: its options, and the demo, which needs nothing."""

from __future__ import annotations

import gc
import json
import re
import tempfile
from pathlib import Path

import httpx
import pytest
import task_models
import text_models
from test_serving_page import served
from typer.testing import CliRunner

from funclora._apps.serve.server import Server
from funclora.cli._app import app

WRONG = [
    ([], "Give either the folder of a model, or --demo."),
    (["model", "--demo"], "Give either the folder of a model, or --demo."),
    (["--demo", "--chat-template", "x"], "--chat-template: the demo's base reads no chats."),
    (["model", "--api-key", "a b\n"], "--api-key: expected printable ASCII characters"),
    (["model", "--api-key", ""], "--api-key: expected printable ASCII characters"),
    (["model", "--allow-loading"], "--allow-loading needs the folder of --adapters"),
    (["model", "--memory", "much"], "--memory: expected a size such as 2GiB"),
    (["model", "--prefix-memory", "-1"], "--prefix-memory: expected a size such as 2GiB"),
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


def test_the_collector_of_garbage_spares_what_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task_models.save(tmp_path / "model", "llama", template=text_models.PLAIN)
    frozen: list[int] = []

    def run(self: Server) -> None:
        frozen.append(gc.get_freeze_count())
        self._socket.close()

    monkeypatch.setattr(Server, "run", run)
    result = CliRunner().invoke(app, ["serve", str(tmp_path / "model"), "--port", "0", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert frozen[0] > 10_000
    assert gc.get_freeze_count() == 0
    assert "begin alike" not in result.output


@pytest.mark.parametrize(("options", "told"), [((), True), (("--prefix-memory", "0"), False)])
def test_what_is_not_shared_is_said(options: tuple[str, ...], told: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo's base remembers nothing of a prompt."""
    monkeypatch.setattr(Server, "run", lambda self: self._socket.close())
    with tempfile.TemporaryDirectory() as adapters:
        words = ["serve", "--demo", "--adapters", adapters, "--port", "0", "--device", "cpu", *options]
        result = CliRunner().invoke(app, words)
        assert ("Prompts that begin alike are each read whole" in result.stdout) == told
        facts = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert bool(facts["notes"]) == told


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
