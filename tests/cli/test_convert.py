"""`funclora convert`: a PEFT folder to GGUF and back, and its complaints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_models import build, lora
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

import funclora as fl
from funclora.cli._app import app


def run(*args: object) -> Result:
    return CliRunner().invoke(app, ["convert", *map(str, args)])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    build("Llama").save_pretrained(folder)
    return folder


def saved(folder: Path, **fields: Any) -> tuple[Path, dict[str, Any]]:
    adapters, config = lora(build("Llama"), **fields)
    fl.save_peft(folder / "peft", adapters, config)
    return folder / "peft", adapters


def test_there_and_back(base: Path, tmp_path: Path) -> None:
    folder, _ = saved(tmp_path, target_modules=["q_proj", "down_proj"])
    file, back = tmp_path / "new" / "a.gguf", tmp_path / "back"
    done = run(folder, "--to", "gguf", "--base", base, "-o", file)
    assert (done.exit_code, done.stderr) == (0, "")
    assert f"4 updates in float32, {file.stat().st_size:,} bytes" in done.stdout
    done = run(file, "--from", "gguf", "--base", base, "-o", back)
    assert (done.exit_code, done.stderr) == (0, "")
    assert "4 updates, r=3, lora_alpha=5" in done.stdout
    one, other = (load_file(path / "adapter_model.safetensors") for path in (folder, back))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    config = json.loads((back / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == ["down_proj", "q_proj"]
    assert config["base_model_name_or_path"] == str(base)


def test_the_command_writes_what_the_function_writes(base: Path, tmp_path: Path) -> None:
    folder, adapters = saved(tmp_path)
    fl.save_gguf(tmp_path / "want.gguf", adapters, build("Llama"), dtype=torch.float16)
    assert run(folder, "--to=gguf", "--dtype=float16", "--base", base, "-o", tmp_path / "a.gguf").exit_code == 0
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "want.gguf").read_bytes()


def test_tables_in_the_folder_are_compared_with_the_base(base: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(build("Llama"), LoraConfig(r=2, target_modules=["embed_tokens"]))
    model.save_pretrained(tmp_path / "peft", save_embedding_layers=True)
    assert any("base_layer" in key for key in load_file(tmp_path / "peft" / "adapter_model.safetensors"))
    assert run(tmp_path / "peft", "--to=gguf", "--base", base, "-o", tmp_path / "a.gguf").exit_code == 0
    other = tmp_path / "other"
    changed = build("Llama")
    changed.model.embed_tokens.weight.data += 1
    changed.save_pretrained(other)
    done = run(tmp_path / "peft", "--to=gguf", "--base", other, "-o", tmp_path / "b.gguf")
    assert done.exit_code == 2
    assert "holds other values" in done.stderr


def test_complaints(base: Path, tmp_path: Path) -> None:
    folder, _ = saved(tmp_path)
    file = tmp_path / "a.gguf"
    file.write_text("not gguf")
    ends = ("--base", base, "-o")
    cases = [
        ((folder, *ends, tmp_path / "x"), "Give either --to gguf or --from gguf."),
        ((folder, "--to=gguf", "--from=gguf", *ends, tmp_path / "x"), "Give either --to gguf or --from gguf."),
        ((folder, "--from=gguf", "--dtype=float16", *ends, tmp_path / "x"), "--dtype can only be used with --to gguf"),
        ((folder, "--to=gguf", *ends, file), f"--out: {file} already exists. Give another file"),
        ((file, "--from=gguf", *ends, folder), f"--out: {folder} already contains an adapter."),
        ((file, "--from=gguf", *ends, tmp_path / "x"), f"{file}: this is not a GGUF file"),
        ((tmp_path / "none", "--to=gguf", *ends, tmp_path / "x"), f"{tmp_path / 'none'}: there is no"),
        ((folder, "--to=gguf", "--base", tmp_path, "-o", tmp_path / "x"), "--base: "),
    ]
    for args, message in cases:
        done = run(*args)
        assert done.exit_code == 2
        assert done.stderr.startswith("funclora convert: ")
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
    assert not (tmp_path / "x").exists()
    assert run(folder, "--to=gguf", *ends, file, "--overwrite").exit_code == 0
    assert file.read_bytes()[:4] == b"GGUF"


def test_dora_is_refused_with_advice(base: Path, tmp_path: Path) -> None:
    model = build("Llama")
    config = fl.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)
    fl.save_peft(tmp_path / "peft", fl.init(model, config), config)
    done = run(tmp_path / "peft", "--to=gguf", "--base", base, "-o", tmp_path / "a.gguf")
    assert done.exit_code == 2
    assert "llama.cpp does not support the rule DoRA" in done.stderr
    assert "Merge the adapter into the base" in done.stderr
    assert not (tmp_path / "a.gguf").exists()
