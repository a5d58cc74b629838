"""The page for users of other trainers: its tables are those of the code, its recipes are valid."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import task_models
import text_models
import torch
import transformers
from pages import DOCS, blocks
from typer.testing import CliRunner

import funclora as fl
from funclora._apps.train.aliases import ALIASES, PROJECTS
from funclora._apps.train.qlora import packed_names
from funclora._apps.train.reading import read
from funclora._apps.train.settings import Settings
from funclora._config.targets import select
from funclora.cli._app import app

PAGE = DOCS / "coming-from-trainers.md"
TEXT = PAGE.read_text(encoding="utf-8")

LLAMAS: dict[str, dict[str, Any]] = {
    "Llama 3.2 1B": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64,
        "num_attention_heads": 32, "tie_word_embeddings": True,
    },
    "Llama 3.1 8B": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    },
    "Llama 3.1 70B": {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
    },
}  # fmt: skip


def keys() -> str:
    """The table of keys."""
    order = [f.name for f in fields(Settings)]
    lines = [f"| here | {' | '.join(PROJECTS)} |\n|---|---|---|---|---|\n"]
    for key in sorted({alias.key for alias in ALIASES.values()}, key=lambda key: order.index(key.split(",")[0])):
        ours = {name: alias.projects for name, alias in ALIASES.items() if alias.key == key}
        theirs = [", ".join(f"`{name}`" for name, whose in ours.items() if each in whose) for each in PROJECTS]
        lines.append(f"| {', '.join(f'`{part}`' for part in key.split(', '))} | {' | '.join(theirs)} |\n")
    return "".join(lines)


def memory() -> str:
    """The table of memory: 4 bytes for each value, twice, its gradient and moments; of nf4, scales of 64 in 8 bits."""
    head = ("model", "weights in bfloat16", "weights in nf4", "values of the adapter", "adapter, gradient and AdamW")
    lines = [f"| {' | '.join(head)} | with `adamw-8bit` |\n|---|---|---|---|---|---|\n"]
    for name, options in LLAMAS.items():
        with torch.device("meta"):
            model = transformers.LlamaForCausalLM(
                transformers.LlamaConfig(vocab_size=128256, num_key_value_heads=8, **options)
            )
        params = fl.base_params(model)
        total = sum(parameter.numel() for parameter in model.parameters())
        packed = sum(params[name].numel() for name in packed_names(model, Settings(), ()))
        nf4 = packed * (1 / 2 + 1 / 64 + 4 / 64 / 256) + 2 * (total - packed)
        config = fl.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
        values = 16 * sum(sum(params[name].shape) for name in select(model, config))
        gib = [f"{n / 2**30:.1f}" for n in (2 * total, nf4)]
        states = [f"{values * n / 2**30:.2f}" for n in (20, 14)]
        lines.append(f"| {name} | {gib[0]} | {gib[1]} | {values / 1e6:.0f} million | {states[0]} | {states[1]} |\n")
    return "".join(lines)


@pytest.mark.parametrize("table", [keys, memory], ids=["keys", "memory"])
def test_the_tables_are_those_of_the_code(table: Any) -> None:
    assert table() in TEXT, f"write this into {PAGE.name}:\n\n{table()}"


def test_each_recipe_is_a_file_of_settings(tmp_path: Path) -> None:
    rows = re.findall(r"^\| ([^|]+) \| ((?:`\w+ = [^`]+`(?:, )?)+) \|$", TEXT, re.MULTILINE)
    assert len(rows) == 6
    for _, row in rows:
        file = tmp_path / "run.toml"
        file.write_text("model = 'm'\ndata = 'd'\n" + "\n".join(re.findall(r"`([^`]+)`", row)))
        assert read(file, {}).targets == ("all-linear",)


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    task_models.save(Path("llama"), "llama", template=text_models.PLAIN)
    chat = next(block for block in blocks(DOCS / "training.md") if block.title == "chat.jsonl")
    Path("chat.jsonl").write_text(chat.code, encoding="utf-8")
    for block in blocks(PAGE):
        if block.title:
            Path(block.title).write_text(block.code, encoding="utf-8")
        elif block.language in ("sh", "console"):
            for line in block.code.splitlines():
                result = CliRunner().invoke(app, line.removeprefix("$ ").split()[1:])
                assert result.exit_code == 0, (line, result.output)
                if "--dry-run" in line:
                    assert "# - loss_watchdog_threshold: " in result.stdout
                    Path("run.toml").write_text(result.stdout)
    settings = read(Path("run.toml"), {})
    assert (settings.quantize, settings.rank, settings.steps) == ("nf4", 8, 2)
