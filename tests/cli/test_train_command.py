"""`funclora train` from files to a PEFT folder, for every task; what it refuses; what it says before it runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import peft
import pytest
import task_models
import text_models
import torch
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner, Result

import funclora as fl
from funclora._apps.train.base import load_base, load_tokenizer
from funclora._apps.train.reading import option, read
from funclora._apps.train.settings import CAUSAL, SEQ2SEQ, SEQUENCE, TOKEN, Settings
from funclora.cli._app import app

SMALL = ("--rank", 4, "--batch", 4, "--steps", 3, "--lr", 0.01)


def run(*args: object) -> Result:
    return CliRunner().invoke(app, ["train", *map(str, args)])


def done(*args: object) -> Result:
    result = run(*args)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.manual_seed(0)
    made = {
        kind: task_models.save(tmp_path_factory.mktemp(kind), kind, template=text_models.PLAIN)
        for kind in ("llama", "gpt2", "bert", "t5")
    }
    data = tmp_path_factory.mktemp("data")
    return made | {name: task_models.data(data / f"{name}.jsonl", name) for name in task_models.RECORDS}


def ours_and_theirs(out: Path, given: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The logits of the saved adapter here and in PEFT, and of the base."""
    settings = read(out / "run.toml", {})
    assert settings.model is not None
    classes = out / "adapter" / "classes.json"
    names = json.loads(classes.read_text()) if classes.is_file() else ()
    base = load_base(settings, load_tokenizer(settings), names)
    adapters, _ = fl.load_peft(out / "adapter", base.model)
    ours, plain = (base.logits(fl.bind(base.model, base.params, each), given) for each in (adapters, {}))
    labels = {"num_labels": len(names)} if names else {}
    model: Any = task_models.CLASSES[settings.task].from_pretrained(settings.model, **labels)
    if settings.quantize != "none":
        model.load_state_dict({name: fl.dequantize(base.params)[name] for name in model.state_dict()})
    wrapped = peft.PeftModel.from_pretrained(model, out / "adapter").eval()
    return ours, wrapped(**given).logits, plain


CASES: list[tuple[str, str, str, tuple[object, ...]]] = [
    ("llama", CAUSAL, "prompt", ()),
    ("llama", CAUSAL, "messages", ("--packing", "--method", "dora")),
    ("gpt2", CAUSAL, "text", ("--init", "pissa", "--accumulation", 2)),
    ("llama", CAUSAL, "messages", ("--quantize", "nf4", "--checkpointing")),
    ("llama", CAUSAL, "text", ("--dtype", "bfloat16", "--bf16", "--merge")),
    ("bert", SEQUENCE, SEQUENCE, ("--dropout", 0.1, "--merge")),
    ("bert", TOKEN, TOKEN, ("--rslora",)),
    ("t5", SEQ2SEQ, SEQ2SEQ, ("--sample", "double dog", "--sample-tokens", 4, "--lora-plus", 4)),
]


@pytest.mark.parametrize(("kind", "task", "data", "options"), CASES, ids=lambda x: str(x)[:40])
def test_from_files_to_a_folder_that_peft_loads(
    folders: dict[str, Path], tmp_path: Path, kind: str, task: str, data: str, options: tuple[object, ...]
) -> None:
    out = tmp_path / "out"
    result = done("--model", folders[kind], "--task", task, "--data", folders[data], "--out", out, *SMALL, *options)
    assert f"wrote {out / 'adapter'}" in result.stdout.replace("\n", "")
    ids = torch.tensor([[5, 6, 7, 8]])
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | ({"labels": ids} if task == SEQ2SEQ else {})
    ours, theirs, plain = ours_and_theirs(out, given)
    rtol = 2e-2 if "bfloat16" in options else 1e-4
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=rtol, atol=rtol)
    assert (ours - plain).abs().max() > 1e-3  # it has learned something
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
    assert {"run.toml", "metrics.jsonl", "checkpoints", "adapter"} <= {path.name for path in out.iterdir()}
    assert (out / "adapter" / "tokenizer.json").is_file()
    if "--merge" in options:
        merged = task_models.CLASSES[task].from_pretrained(out / "merged", dtype=torch.float32)
        torch.testing.assert_close(merged(**given).logits, theirs.float(), rtol=rtol, atol=rtol)


def test_the_file_of_a_run_makes_the_same_run(folders: dict[str, Path], tmp_path: Path) -> None:
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    done("--model", folders["llama"], "--data", folders["prompt"], "--out", first, *SMALL, "--dropout", 0.1)
    done(first / "run.toml", "--out", second)
    done(first / "run.toml", "--out", third, "--seed", 1)
    files = [folder / "adapter" / "adapter_model.safetensors" for folder in (first, second, third)]
    assert files[0].read_bytes() == files[1].read_bytes() != files[2].read_bytes()


def test_it_goes_on_by_its_folder_alone(folders: dict[str, Path], tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    args = ("--model", folders["llama"], "--data", folders["prompt"], *SMALL, "--save-every", 1, "--keep", 9)
    done(*args, "--out", whole)
    done(*args, "--out", cut)
    for name in ("00000002", "00000003"):  # as if it had been killed in the second step
        (cut / "checkpoints" / f"{name}.safetensors").unlink()
    for file in (cut / "adapter").iterdir():
        file.unlink()
    refused = run(*args, "--out", cut)
    assert (refused.exit_code, "contains a run. Continue it with --resume" in refused.stderr) == (2, True)
    done("--out", cut, "--resume")
    a, b = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (whole, cut))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    other = run("--out", cut, "--resume", "--lr", 0.5)
    assert (other.exit_code, "lr = 0.01 there and 0.5 here" in other.stderr) == (2, True)


def test_without_arguments_the_demo_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("funclora._apps.train.setup.DOMAIN", "concurrent")
    result = json.loads(done("--json", "--steps", 6, "--batch", 4, "--context", 64, "--eval-every", 2).stdout)
    assert result["adapter"] == "funclora-run/adapter"
    assert (result["step"], result["stopped"]) == (6, "finished")
    losses = [each["loss"] for each in result["losses"]["validation"]]
    assert losses[-1] < losses[0]
    assert result["best"]["validation_loss"] == result["losses"]["validation"][-1]["loss"]
    from funclora.demo.model import load_base as demo

    adapters, config = fl.load_peft("funclora-run/adapter", demo())
    assert (len(adapters), config.r) == (29, 16)


def test_a_dry_run_says_all_and_writes_nothing(folders: dict[str, Path], tmp_path: Path) -> None:
    args = ("--model", folders["llama"], "--data", folders["messages"], "--out", tmp_path / "out", "--dry-run", *SMALL)
    text = done(*args).stdout
    for words in ("model.layers.{0,1}.self_attn.q_proj", "frozen weights", "values are trained", "3 steps",
                  "⟦red<|im_end|>", "<|im_start|>user", "Nothing was written."):  # fmt: skip
        assert words in text, text
    plan = json.loads(done(*args, "--json").stdout)
    assert plan["memory"]["total"] == sum(plan["memory"][key] for key in ("base", "adapters", "step"))
    assert ["red<|im_end|>\n", True] in plan["examples"][0]["parts"]
    assert len(plan["summary"]["rows"]) == 14
    assert list(tmp_path.iterdir()) == []
    demo = json.loads(done("--dry-run", "--json", "--out", tmp_path / "out").stdout)
    assert demo["rows"][0] > 100
    assert list(tmp_path.iterdir()) == []


def test_every_key_is_an_option_of_its_group() -> None:
    text = CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "200"}).stdout
    for f in fields(Settings):
        assert option(f.name) in text, f.name
        assert f" {f.metadata['group']} " in text
    for words in (
        "lora|dora",
        "One of causal-lm, ",
        "[default: 16]",
        "[default: 0.0002]",
        "[default: all-linear]",
        "--no-packing",
    ):
        assert words in text, words


def refused(*args: object) -> str:
    result = run(*args)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("funclora train: ")]
    assert len(lines) == 1, result.stderr
    return lines[0]


def test_what_is_wrong_is_one_line(folders: dict[str, Path], tmp_path: Path) -> None:
    model, data, out = ("--model", folders["llama"]), ("--data", folders["prompt"]), ("--out", tmp_path / "out")
    for args, words in (
        (("--rank", 0), "--rank: expected at least 1, got 0"),
        (("--rank", "x"), "--rank: expected a whole number, got 'x'"),
        (("--method", "dra"), "--method: expected one of lora, dora, got 'dra'. Near names: dora"),
        (("--rnak", 3), "No such option: --rnak"),
        (model, "--data: there is no data to train"),
        ((*model, "--data", tmp_path / "none.jsonl"), "none.jsonl: there is no such file"),
        (("--model", tmp_path / "none", *data), "none is not a directory"),
        ((*model, *data, "--task", "seq2seq"), "does not support seq2seq"),
        ((*model, *data, "--targets", "q_prj"), "'q_prj' matches no module. Near names: q_proj"),
        ((*model, *data, "--device", "cuda:7"), "'cuda:7' cannot be used here"),
        ((*model, *data, "--steps", 2, "--epochs", 2), "--steps and --epochs exclude each other"),
        ((tmp_path / "none.toml",), "none.toml: there is no such file"),
        (("--resume",), "contains no run to continue"),
        ((*model, *data, "--init", "orthogonal", "--rank", 3), "needs even ranks"),
        (("--data", folders["text"], "--packing"), "packing: the demo's base cannot separate"),
        ((*model, *data, "--wandb", "x"), "wandb: it is requested, but not installed"),
    ):  # fmt: skip
        assert words in refused(*args, *out), args
        assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir()), args


def test_a_model_without_chat_template(tmp_path: Path, folders: dict[str, Path]) -> None:
    plain = task_models.save(tmp_path / "plain", "llama")
    line = refused("--model", plain, "--data", folders["messages"], "--out", tmp_path / "out")
    assert "chat template" in line


def test_results_of_another_run_are_not_written_over(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "out" / "adapter").mkdir(parents=True)
    (tmp_path / "out" / "adapter" / "mine").write_text("x")
    args = ("--model", folders["llama"], "--data", folders["prompt"], "--out", tmp_path / "out", *SMALL)
    assert "is not empty" in refused(*args)
    assert (tmp_path / "out" / "adapter" / "mine").read_text() == "x"
