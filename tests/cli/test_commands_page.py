"""The page of the commands, run from its first line to its last in an empty folder."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from funclora.cli._app import app

PAGE = (Path(__file__).parents[2] / "docs" / "commands.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


def model(folder: Path) -> None:
    """What the page calls `model`: a small Llama of the characters that the page uses."""
    torch.manual_seed(0)
    letters = {chr(code): i for i, code in enumerate(range(31, 127))}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="\x1f"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="\x1f")
    fast.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% endfor %}"
    fast.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(letters), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def spoken(text: str) -> list[tuple[list[str], str]]:
    """The commands behind `$`, each with what is printed after it."""
    parts = re.split(r"^\$ (.*)\n", text, flags=re.MULTILINE)[1:]
    return [(shlex.split(words), said) for words, said in zip(parts[::2], parts[1::2], strict=True)]


@pytest.mark.slow
def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model(Path("model"))
    for language, title, text in BLOCKS:
        if title:
            Path(title).write_text(text, encoding="utf-8")
            continue
        if language == "text":
            for (program, *words), said in spoken(text):
                assert program == "funclora"
                result = CliRunner().invoke(app, words)
                assert (result.exit_code, result.stdout, result.stderr) == (2, "", said)
            continue
        assert language == "sh"
        for line in text.splitlines():
            program, *words = shlex.split(line)
            assert program == "funclora", line
            if words[0] in ("demo", "serve"):  # minutes, and for ever; both have tests of their own
                continue
            before = set(tmp_path.iterdir())
            result = CliRunner().invoke(app, words)
            assert result.exit_code == 0, f"{line}\n{result.output}\n{result.exception!r}"
            assert result.stdout, line
            for option in ("-o", "--out", "--plot"):
                if option in words and "--dry-run" not in words:
                    assert Path(words[words.index(option) + 1]).exists(), line
            if "--dry-run" in words:
                assert set(tmp_path.iterdir()) == before
    assert len(Path("answers.jsonl").read_text().splitlines()) == 4


def test_the_page_has_all_commands() -> None:
    named = {command.name for command in app.registered_commands}
    run = {shlex.split(line)[1] for language, _, text in BLOCKS if language == "sh" for line in text.splitlines()}
    assert run == named
    for name in named:
        assert f"[`{name}`](#" in PAGE
