"""Adapters of another base: one line when the values differ, whatever the names; none after a move or a copy."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import task_models
import torch
import transformers
from damage import BYTES, Edit, damaged
from hypothesis import HealthCheck, given, settings
from typer.testing import CliRunner

import funclora as fl
from funclora.cli._app import app
from funclora.errors import FormatError, OtherBaseWarning
from funclora.io.hf.checkpoint import stored_tensors
from funclora.io.hf.origin import ORIGIN_FILE, check_origin, sample, write_origin


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, its instruct version (other values, same shapes), and an adapter that `train` made for the base."""
    root = tmp_path_factory.mktemp("root")
    torch.manual_seed(0)
    task_models.save(root / "base", "llama")
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(root / "base")
    for parameter in model.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)
    model.save_pretrained(root / "instruct")
    task_models.data(root / "data.jsonl", "text")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(root / "base" / name, root / "instruct")
    words = ["--model", "base", "--data", "data.jsonl", "--out", "run", "--steps", "1", "--rank", "2"]
    train(root, *words)
    shutil.copytree(root / "run" / "adapter", root / "bare")
    (root / "bare" / ORIGIN_FILE).unlink()
    return root


def train(root: Path, *words: str) -> None:
    paths = [str(root / word) if (root / word).exists() or word == "run" else word for word in words]
    done = CliRunner().invoke(app, ["train", *paths])
    assert done.exit_code == 0, done.output


def notes(adapter: Path, base: Path | None) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_origin([adapter], base)
    assert all(issubclass(each.category, OtherBaseWarning) for each in caught)
    return [str(each.message) for each in caught]


def copied(root: Path, to: Path, **options: Any) -> Path:
    """The base, as transformers writes it again."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(root / "base", dtype=options.pop("dtype", "auto"))
    model.save_pretrained(to, **options)
    return to


def renamed(root: Path, to: Path) -> Path:
    return Path(shutil.copytree(root / "base", to / "quite-another-name"))


SAME: dict[str, Callable[[Path, Path], Path]] = {
    "itself": lambda root, to: root / "base",
    "moved and renamed": renamed,
    "in several files": lambda root, to: copied(root, to / "shards", max_shard_size="20KB"),
    "in bfloat16": lambda root, to: copied(root, to / "half", dtype=torch.bfloat16),
    "in float64": lambda root, to: copied(root, to / "double", dtype=torch.float64),
}


@pytest.mark.parametrize("what", SAME)
def test_the_same_weights_give_no_note(what: str, root: Path, tmp_path: Path) -> None:
    assert notes(root / "run" / "adapter", SAME[what](root, tmp_path)) == []


def test_other_weights_give_one_line(root: Path) -> None:
    (note,) = notes(root / "run" / "adapter", root / "instruct")
    assert note.startswith(f"{root}/run/adapter: it belongs to other weights than those in {root}/instruct: ")
    assert note.endswith(f"It was trained on '{root}/base'.")
    assert notes(root / "run" / "adapter", None) == []


def test_one_weight_that_differs_is_seen(root: Path, tmp_path: Path) -> None:
    """A merged adapter changes some weights only."""
    fl.merge_checkpoint(root / "base", root / "run" / "adapter", tmp_path / "merged", weights=[1e4])
    assert notes(root / "run" / "adapter", tmp_path / "merged")


def test_other_tensors_beside_the_same_ones_are_the_same_base(root: Path, tmp_path: Path) -> None:
    """Tied heads and buffers are written or not, by version."""
    file = shutil.copytree(root / "run" / "adapter", tmp_path / "adapter") / ORIGIN_FILE
    tensors = json.loads(file.read_text())["tensors"]
    file.write_text(json.dumps({"tensors": {**tensors, "rotary.inv_freq": "0123456789abcdef"}}))
    assert notes(tmp_path / "adapter", root / "base") == []


@pytest.mark.parametrize(
    ("named", "base", "said"),
    [
        ("BASE", "instruct", True),
        ("BASE", "base", False),
        (None, "instruct", False),
        ("", "instruct", False),
        ("meta/Llama", "instruct", True),
        ("meta/Instruct", "instruct", False),
        ("/gone/before/instruct/", "instruct", False),
        ("C:\\models\\instruct", "instruct", False),
        ("meta/Llama-Instruct", "models--meta--Llama-Instruct/snapshots/0123", False),
        ("meta/Llama", "models--meta--Llama-Instruct/snapshots/0123", True),
        ("\x00", "instruct", True),
        ("a" * 5000, "instruct", True),
    ],
)
def test_without_a_sample_names_are_compared(
    root: Path, tmp_path: Path, named: str | None, base: str, said: bool
) -> None:
    adapter = Path(shutil.copytree(root / "bare", tmp_path / "adapter"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(root / "base") if named == "BASE" else named
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    folder = root / base
    if "/" in base:
        folder = Path(shutil.copytree(root / "instruct", tmp_path / base))
    found = notes(adapter, folder)
    assert len(found) == said
    assert all("adapter_config.json names" in note and len(note.splitlines()) == 1 for note in found)


COMMANDS = {
    "merge": ["merge", "MODEL", "ADAPTER", "-o", "OUT"],
    "generate": ["generate", "ADAPTER", "--model", "MODEL", "--prompt", "a", "--max-tokens", "2"],
    "eval": ["eval", "ADAPTER", "--model", "MODEL", "--data", "DATA"],
    "convert": ["convert", "ADAPTER", "--to", "gguf", "--base", "MODEL", "-o", "OUT"],
    "inspect": ["inspect", "ADAPTER", "--base", "MODEL"],
    "diff": ["diff", "ADAPTER", "ADAPTER", "--base", "MODEL"],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("adapter", ["run/adapter", "bare"])
def test_every_command_says_so_in_one_line(command: str, adapter: str, root: Path, tmp_path: Path) -> None:
    for model, said in (("base", 0), ("instruct", 1)):
        places = {
            "MODEL": root / model, "ADAPTER": root / adapter, "OUT": tmp_path / f"{model}.out",
            "DATA": root / "data.jsonl",
        }  # fmt: skip
        done = CliRunner().invoke(app, [str(places.get(word, word)) for word in COMMANDS[command]])
        assert done.exit_code == 0, done.output
        lines = done.stderr.splitlines()
        assert len(lines) == said
        assert all(line.startswith(f"funclora {command}: warning: {root / adapter}: ") for line in lines)


def test_a_sweep_writes_the_sample_too(root: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("red green blue " * 200)
    words = ["--model", root / "base", "--data", tmp_path / "text.txt", "--out", tmp_path / "out", "--steps", "2",
             "--lr", "1e-3,1e-2", "--rank", "1", "--context", "8", "--batch", "1", "--save", "1"]  # fmt: skip
    done = CliRunner().invoke(app, ["sweep", *map(str, words)])
    assert done.exit_code == 0, done.output
    (adapter,) = (tmp_path / "out" / "adapters").iterdir()
    assert notes(adapter, root / "base") == []
    assert notes(adapter, root / "instruct")


def test_the_sample_is_of_all_kinds_of_weights(root: Path, tmp_path: Path) -> None:
    tensors = stored_tensors(root / "base")
    assert {*sample(tensors)} == {*tensors}  # of a small model
    write_origin(tmp_path, root / "base")
    first = (tmp_path / ORIGIN_FILE).read_bytes()
    write_origin(tmp_path, root / "base")
    assert (tmp_path / ORIGIN_FILE).read_bytes() == first


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(BYTES)
def test_any_bytes(root: Path, tmp_path: Path, edits: list[Edit]) -> None:
    adapter = Path(shutil.copytree(root / "bare", tmp_path / "adapter", dirs_exist_ok=True))
    (adapter / ORIGIN_FILE).write_bytes(damaged((root / "run" / "adapter" / ORIGIN_FILE).read_bytes(), edits))
    try:
        assert len(notes(adapter, root / "base")) <= 1
    except FormatError as error:
        assert str(adapter / ORIGIN_FILE) in str(error)  # noqa: PT017
