"""`funclora eval`: its numbers are those of a loop, and its complaints name a remedy."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import task_models
import text_models
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification
from typer.testing import CliRunner, Result

import funclora as fl
from funclora._apps.train.run import run as train
from funclora._apps.train.settings import CAUSAL, SEQ2SEQ, SEQUENCE, TOKEN, Settings
from funclora.cli._app import app
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
    """Token by token, the plain way; each piece begins with the last token of the one before."""
    bound, nats, n = fl.bind(model, fl.base_params(model), adapters), 0.0, 0
    for ids in documents:
        for start in range(0, len(ids) - 1, context - 1):
            piece = torch.tensor(ids[start : start + context])
            out = bound(piece[None])
            logits: Tensor = getattr(out, "logits", out)
            nats += F.cross_entropy(logits[0, :-1], piece[1:], reduction="sum").item()
            n += len(piece) - 1
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
    assert "on 19 tokens" in result.output
    rows = [line.split()[0] for line in result.output.splitlines() if re.search(r"\d / \d", line)]
    assert rows == ["(base)", "ad-1", "ad-0"]
    assert [path.name for path in tmp_path.iterdir()] == ["eval.json"]  # one file makes no picture


def test_another_field_of_jsonl(base: nn.Module, folder: Path) -> None:
    result = run(folder / "adapters" / "ad-0", "--data", folder / "b.jsonl", "--text-field", "body", "--json")
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


KINDS = {
    "text": CAUSAL, "prompt": CAUSAL, "messages": CAUSAL, SEQUENCE: SEQUENCE, TOKEN: TOKEN, SEQ2SEQ: SEQ2SEQ,
    "numbers": SEQUENCE, "several": SEQUENCE,
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_the_training(kind: str, tmp_path: Path) -> None:
    """Of each kind of data: what an evaluation of the run said, and what the adapters alone have."""
    task = KINDS[kind]
    model = task_models.save(tmp_path / "model", task_models.KIND[task], template=text_models.PLAIN)
    data = task_models.data(tmp_path / "data.jsonl", kind)
    told: dict[str, dict[str, float]] = {}
    for name, method in (("one", "lora"), ("two", "dora")):
        out = tmp_path / name
        train(
            Settings(
                model=model, task=task, data=(data,), validation=data, out=out, steps=6, batch=4, rank=2, lr=0.05,
                method=method, init="gaussian",
            ),
            quiet=True,
        )  # fmt: skip
        told[name] = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
        (tmp_path / "adapters").mkdir(exist_ok=True)
        (out / "adapter").rename(tmp_path / "adapters" / name)
    result = run(tmp_path / "adapters", "--data", data, "--model", model, "--json", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    for name, line in told.items():
        assert found["loss"][name]["data.jsonl"] == pytest.approx(line["validation_loss"], rel=1e-5)
        if "validation_accuracy" in line:
            assert found["accuracy"][name]["data.jsonl"] == pytest.approx(line["validation_accuracy"])
    assert found["loss"]["one"] != found["loss"]["two"]
    classes = task in (SEQUENCE, TOKEN)
    single = kind in (SEQUENCE, TOKEN)
    assert ("perplexity" in found, "confusion" in found) == (not classes, single)
    assert ("pearson" in found, "micro_f1" in found) == (kind == "numbers", kind == "several")
    assert ("base" in found) == (not classes)  # the base has no head
    assert (tmp_path / "out" / "confusion.png").exists() == single
    (count,) = found["labels" if classes else "tokens"].values()
    if single:
        assert sum(map(sum, found["confusion"]["one"]["data.jsonl"])) == count
    alone = json.loads(run(tmp_path / "adapters" / "two", "--data", data, "--model", model, "--json").stdout)
    assert alone["loss"]["two"]["data.jsonl"] == pytest.approx(found["loss"]["two"]["data.jsonl"], rel=1e-6)
    again = run(tmp_path / "adapters", "--data", data, "--model", model, "--out", tmp_path / "out")
    assert "already contains eval.json. Give another folder, or --overwrite" in again.stderr


def test_records_are_read_with_the_options_of_the_run(tmp_path: Path) -> None:
    """The names of fields and roles, the chat template and the turns with loss: each is needed for the run's number."""
    model = task_models.save(tmp_path / "model", "llama")
    data, template, out = tmp_path / "data.jsonl", tmp_path / "chat.jinja", tmp_path / "out"
    template.write_text(text_models.PLAIN)
    said = [("human", "say red"), ("bot", "red"), ("human", "and a beast"), ("bot", "owl")]
    record = {"dialog": [{"speaker": role, "content": text} for role, text in said]}
    data.write_text(f"{json.dumps(record)}\n" * 4)
    read_as: dict[str, Any] = {
        "fields": ("messages=dialog", "role=speaker"), "roles": ("human=user", "bot=assistant"), "turns": "last",
        "chat_template": template,
    }  # fmt: skip
    train(
        Settings(model=model, data=(data,), validation=data, out=out, steps=2, batch=2, rank=2, lr=0.05, **read_as),
        quiet=True,
    )  # fmt: skip
    told = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["validation_loss"]

    def scored(without: str | None = None) -> Result:
        options = []
        for key, value in read_as.items():
            if key != without:
                options += [f"--{key.replace('_', '-')}", ",".join(value) if isinstance(value, tuple) else str(value)]
        return run(out / "adapter", "--data", data, "--model", model, "--json", *options)

    def loss_of(result: Result) -> float:
        return float(json.loads(result.stdout)["loss"]["adapter"]["data.jsonl"])

    assert loss_of(scored()) == pytest.approx(told, rel=1e-5)
    assert loss_of(scored("turns")) != pytest.approx(told, rel=1e-3)
    assert "with --chat-template, or give the data as prompt and completion." in scored("chat_template").stderr
    assert "data.jsonl:1: expected a text under 'text', prompt and" in scored("fields").stderr
    assert "Say what they mean" in scored("roles").stderr


def test_adapters_of_different_tasks_have_no_loss_in_common(folder: Path, tmp_path: Path) -> None:
    def adapter(name: str, task_type: str | None, classes: object = None) -> Path:
        target = tmp_path / name
        shutil.copytree(folder / "adapters" / "ad-0", target)
        config = json.loads((target / "adapter_config.json").read_text())
        (target / "adapter_config.json").write_text(json.dumps(config | {"task_type": task_type}))
        if classes is not None:
            (target / "classes.json").write_text(json.dumps(classes))
        return target

    causal, texts = adapter("causal", "CAUSAL_LM"), adapter("texts", "SEQ_CLS", ["a", "b"])
    others, unknown = adapter("others", "SEQ_CLS", ["b", "a"]), adapter("unknown", None, ["a"])
    asks, broken = adapter("asks", "QUESTION_ANS"), adapter("broken", "SEQ_CLS", ["a", "a"])
    cases: list[tuple[list[object], str]] = [
        ([causal, texts], "causal was trained for causal-lm, texts for sequence-classification, which have no loss"),
        ([texts, others], 'texts has the classes ["a", "b"], others has ["b", "a"].'),
        ([unknown], "adapter_config.json does not say the task of these classes. Give it with --task."),
        ([asks], "was trained for 'QUESTION_ANS', which has no loss here."),
        ([broken], "classes.json: expected a list of the names of the classes, without repetition."),
        ([causal, "--task", "speech"], "--task: expected one of causal-lm, "),
    ]
    for args, message in cases:
        result = run(*args, "--data", folder / "b.jsonl", "--model", tmp_path)
        assert (result.exit_code, result.stdout) == (2, "")
        assert message in result.stderr, args


def test_a_class_that_no_adapter_knows(tmp_path: Path) -> None:
    model = task_models.save_classifier(tmp_path / "model", "bert", ["colour", "beast", "verb"])
    save(AutoModelForSequenceClassification.from_pretrained(model), tmp_path / "adapters", ["query"], n=1)
    config = tmp_path / "adapters" / "ad-0" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"task_type": "SEQ_CLS"}))
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "red", "label": "colour"}\n{"text": "owl", "label": "beasts"}\n')
    result = run(tmp_path / "adapters", "--data", data, "--model", model)
    assert "data.jsonl:2: label: 'beasts' is none of the classes colour, beast, verb. Near names" in result.stderr


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
        ([adapters, "--data", tmp_path / "none.txt"], "none.txt: there is no such file."),
        ([adapters, "--data", tmp_path / "x.jsonl"], "x.jsonl:1: text: expected a text, got 1."),
        (
            [adapters, "--data", tmp_path / "w.jsonl"],
            "w.jsonl:1: expected a text under 'text', prompt and completion, or messages; it has 'b'.",
        ),
        ([adapters, "--data", tmp_path / "y.jsonl"], "y.jsonl:2: expected JSON in each line"),
        ([adapters, "--data", tmp_path / "z.txt"], "z.txt: no token is left to compute a loss on."),
        (
            [adapters, "--data", text, "--model", tmp_path],
            "contains no config.json. Give the folder of a",
        ),
        ([adapters, "--data", text, "--device", "toaster"], "device: 'toaster' cannot be used here"),
        ([adapters, "--data", text, "--chat-template", text], "--chat-template: the demo's base reads no chats."),
        ([adapters, "--data", text, "--turns", "first"], "--turns: expected one of all, last, got 'first'."),
    ]
    for args, message in cases:
        result = run(*args)
        assert result.exit_code == 2, (args, result.output)
        assert result.stdout == ""
        (line,) = result.stderr.splitlines()
        assert line.startswith("funclora eval: ")
        assert message in line
