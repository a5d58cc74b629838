"""`funclora eval`: its numbers are those of a loop, and its complaints name a remedy."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typer.testing import CliRunner, Result

import funclora as fl
from funclora.cli._app import app
from funclora.cli._losses import cut
from funclora.demo.model import load_base

TEXT = "import os\n\n\ndef main(argv):\n    return os.path.join(*argv)\n" * 3
DOCUMENTS = ["class A:\n    pass\n", "x", "for i in range(10):\n    print(i)\n"]


def run(*args: object) -> Result:
    return CliRunner().invoke(app, ["eval", *map(str, args)])


def save(model: nn.Module, folder: Path, targets: Sequence[str], n: int = 2) -> dict[str, Any]:
    """Adapters that change much, of both methods, and what `load_peft` makes of their folders."""
    found = {}
    for i in range(n):
        config = fl.LoraConfig(
            r=2 + i, target_modules=list(targets), use_dora=i % 2 == 1, lora_alpha=8, init_lora_weights=False
        )
        fl.save_peft(folder / f"ad-{i}", fl.init(model, config, generator=torch.Generator().manual_seed(i)), config)
        found[f"ad-{i}"] = fl.load_peft(folder / f"ad-{i}", model)[0]
    return found


@pytest.fixture(scope="module")
def base() -> nn.Module:
    return load_base()


@pytest.fixture(scope="module")
def folder(base: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`adapters/`, `a.py` and `b.jsonl`."""
    path = tmp_path_factory.mktemp("eval")
    save(base, path / "adapters", ["q_proj", "up_proj"])
    (path / "a.py").write_text(TEXT)
    lines = [json.dumps({"text": text, "body": text[::-1], "id": i}) for i, text in enumerate(DOCUMENTS)]
    (path / "b.jsonl").write_text("\n".join(lines) + "\n\n")
    return path


@torch.no_grad()
def loss(model: nn.Module, adapters: Any, documents: list[list[int]], context: int) -> float:
    """Token by token, the plain way."""
    bound, nats, n = fl.bind(model, fl.base_params(model), adapters), 0.0, 0
    for ids in documents:
        for start in range(0, len(ids) - 1, context):
            window = torch.tensor(ids[start : start + context + 1])
            out = bound(window[None, :-1])
            logits: Tensor = getattr(out, "logits", out)
            nats += F.cross_entropy(logits[0], window[1:], reduction="sum").item()
            n += len(window) - 1
    return nats / n


def test_losses_are_those_of_a_loop(base: nn.Module, folder: Path, tmp_path: Path) -> None:
    a, b = folder / "a.py", folder / "b.jsonl"
    result = run(folder / "adapters", "--data", a, "--data", b, "--context", 50, "--json", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    documents = {"a.py": [list(TEXT.encode())], "b.jsonl": [list(text.encode()) for text in DOCUMENTS]}
    assert found["tokens"] == {name: sum(len(ids) - 1 for ids in some) for name, some in documents.items()}
    for name, some in documents.items():
        assert found["base"]["loss"][name] == pytest.approx(loss(base, {}, some, 50), rel=1e-5)
        for adapter in ("ad-0", "ad-1"):
            adapters = fl.load_peft(folder / "adapters" / adapter, base)[0]
            expected = loss(base, adapters, some, 50)
            assert abs(expected - found["base"]["loss"][name]) > 0.01
            assert found["loss"][adapter][name] == pytest.approx(expected, rel=1e-5)
            assert found["perplexity"][adapter][name] == pytest.approx(math.exp(expected), rel=1e-4)
    assert json.loads((tmp_path / "out" / "eval.json").read_text()) == found
    assert (tmp_path / "out" / "heatmap.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_has_a_row_for_each_adapter(folder: Path, tmp_path: Path) -> None:
    adapters, file = folder / "adapters", folder / "a.py"
    result = run(adapters / "ad-1", adapters, "--data", file, "--rows", 1, "--context", 20, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "on 20 tokens" in result.output
    rows = [line.split()[0] for line in result.output.splitlines() if re.search(r"\d / \d", line)]
    assert rows == ["(base)", "ad-1", "ad-0"]
    assert [path.name for path in tmp_path.iterdir()] == ["eval.json"]  # one file makes no picture


def test_another_field_of_jsonl(base: nn.Module, folder: Path) -> None:
    result = run(folder / "adapters" / "ad-0", "--data", folder / "b.jsonl", "--field", "body", "--json")
    documents = [list(text[::-1].encode()) for text in DOCUMENTS]
    assert json.loads(result.stdout)["base"]["loss"]["b.jsonl"] == pytest.approx(
        loss(base, {}, documents, 256), rel=1e-5
    )


def test_files_and_adapters_of_one_name_are_told_apart(base: nn.Module, folder: Path, tmp_path: Path) -> None:
    save(base, tmp_path, ["o_proj"], n=1)
    (tmp_path / "a.py").write_text("pass\n")
    ours, theirs = tmp_path / "ad-0", folder / "adapters" / "ad-0"
    result = run(ours, theirs, "--data", tmp_path / "a.py", "--data", folder / "a.py", "--json", "--context", 20)
    found = json.loads(result.stdout)
    assert list(found["loss"]) == [str(ours), str(theirs)]
    assert list(found["tokens"].items()) == [(str(tmp_path / "a.py"), 4), (str(folder / "a.py"), len(TEXT) - 1)]


def test_a_transformers_model(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = {chr(code): i for i, code in enumerate(range(9, 127))}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="~"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="~").save_pretrained(tmp_path / "model")
    config = LlamaConfig(
        vocab_size=128, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "model")
    adapters = save(model, tmp_path / "adapters", ["q_proj", "v_proj", "down_proj"])
    (tmp_path / "a.py").write_text(TEXT)
    result = run(tmp_path / "adapters", "--data", tmp_path / "a.py", "--model", tmp_path / "model", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["loss"]
    documents = [[letters[letter] for letter in TEXT]]
    for name, some in adapters.items():
        expected = loss(model, some, documents, 32)  # the model's own limit
        assert found[name]["a.py"] == pytest.approx(expected, rel=1e-4)


def test_errors_are_one_line_with_a_remedy(folder: Path, tmp_path: Path) -> None:
    adapters, text = folder / "adapters", folder / "a.py"
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_text("{")
    for name, content in {"x.jsonl": '{"text": 1}', "y.jsonl": "\n{", "z.txt": "1", "w.jsonl": '{"b": ""}'}.items():
        (tmp_path / name).write_text(content)
    cases: list[tuple[list[object], str]] = [
        ([tmp_path / "none", "--data", text], "none: there is no such folder. Give PEFT folders"),
        ([folder.parent / folder.name, "--data", text], "there is no adapter_config.json in it"),
        ([broken, "--data", text], "broken/adapter_config.json"),
        ([adapters, "--data", tmp_path / "none.txt"], "none.txt: there is no such file. Give --data"),
        ([adapters, "--data", tmp_path / "x.jsonl"], "x.jsonl:1: expected a text under 'text'; it has 'text'."),
        (
            [adapters, "--data", tmp_path / "w.jsonl"],
            "w.jsonl:1: expected a text under 'text'; it has 'b'. Give another field with --field",
        ),
        ([adapters, "--data", tmp_path / "y.jsonl"], "y.jsonl:2: expected JSON in each line"),
        ([adapters, "--data", tmp_path / "z.txt"], "contains no text with at least two tokens"),
        (
            [adapters, "--data", text, "--model", tmp_path],
            "contains no config.json. Give the folder of a",
        ),
        ([adapters, "--data", text, "--device", "toaster"], "device: 'toaster' cannot be used here"),
    ]
    for args, message in cases:
        result = run(*args)
        assert result.exit_code == 2, (args, result.output)
        assert result.stdout == ""
        (line,) = result.stderr.splitlines()
        assert line.startswith("funclora eval: ")
        assert message in line


def test_every_token_but_the_first_is_predicted_once() -> None:
    document = list(range(11))
    for context in (1, 2, 3, 5, 10, 11):
        windows = cut([document, [7], []], context)
        assert [token for window in windows for token in window[1:]] == document[1:]
        assert all(len(window) <= context + 1 for window in windows)
