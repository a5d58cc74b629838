"""`funclora convert`: a PEFT folder to the formats of other programs and back, and its complaints."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_models import build, lora
from image_pipelines import components, pipeline
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
        ((folder, *ends, tmp_path / "x"), "Give either --to or --from, with gguf, mlx or diffusers."),
        ((folder, "--to=gguf", "--from=mlx", *ends, tmp_path / "x"), "Give either --to or --from"),
        ((folder, "--to=mlx", "--dtype=float16", *ends, tmp_path / "x"), "--dtype can only be used with --to gguf"),
        ((folder, "--to=mlx", *ends, folder), f"--out: {folder} already contains an adapter."),
        ((folder, "--from=mlx", *ends, tmp_path / "x"), "there is no adapters.safetensors in this folder"),
        (
            (folder, "--to=diffusers", *ends, tmp_path / "x.safetensors"),
            f"--base: {base}: there is no model_index.json",
        ),
        ((folder, "--to=diffusers", *ends, tmp_path / "x"), "expected a file that ends with .safetensors"),
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


def same_factors(one: Path, other: Path) -> None:
    tensors, others = (load_file(path / "adapter_model.safetensors") for path in (one, other))
    assert tensors.keys() == others.keys()
    for key, tensor in tensors.items():
        torch.testing.assert_close(tensor, others[key], rtol=1e-6, atol=1e-7)


def test_to_mlx_and_back(base: Path, tmp_path: Path) -> None:
    folder, _ = saved(tmp_path, target_modules=["q_proj", "down_proj"])
    done = run(folder, "--to=mlx", "--base", base, "-o", tmp_path / "mlx")
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout == f"{tmp_path / 'mlx'}: 4 updates\n"
    done = run(tmp_path / "mlx", "--from=mlx", "--base", base, "-o", tmp_path / "back", "--json")
    assert (done.exit_code, done.stderr) == (0, "")
    assert json.loads(done.stdout) == {"out": str(tmp_path / "back"), "updates": 4, "r": 3, "lora_alpha": 5}
    same_factors(folder, tmp_path / "back")


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    pipeline("sd", components("sd")).save_pretrained(folder)
    return folder


def test_to_diffusers_and_back(pipeline_folder: Path, tmp_path: Path) -> None:
    config = fl.LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "q_proj"], init_lora_weights=False)
    for name, targets in (("unet", ["to_q", "conv1"]), ("text_encoder", ["q_proj"])):
        config = config.replace(target_modules=targets)
        fl.save_peft(tmp_path / "peft" / name, fl.init(components("sd")[name], config), config)
    file = tmp_path / "new" / "style.safetensors"
    done = run(tmp_path / "peft", "--to=diffusers", "--base", pipeline_folder, "-o", file)
    assert (done.exit_code, done.stderr) == (0, "")
    assert re.fullmatch(rf"{file}: \d+ updates for text_encoder, unet\n", done.stdout)
    done = run(file, "--from=diffusers", "--base", pipeline_folder, "-o", tmp_path / "back")
    assert (done.exit_code, done.stderr) == (0, "")
    for name in ("unet", "text_encoder"):
        same_factors(tmp_path / "peft" / name, tmp_path / "back" / name)
    again = ("--from=diffusers", "--base", pipeline_folder, "-o", tmp_path / "back")
    assert "already contains an adapter" in run(file, *again).stderr
    assert run(file, *again, "--overwrite").exit_code == 0
    other = run(
        tmp_path / "peft" / "unet", "--to=diffusers", "--base", pipeline_folder, "-o", tmp_path / "x.safetensors"
    )
    assert "expected a PEFT folder for each component, among unet, text_encoder" in other.stderr


def test_a_pipeline_with_code_of_its_own_is_refused(pipeline_folder: Path, tmp_path: Path) -> None:
    index = json.loads((pipeline_folder / "model_index.json").read_text())
    for entry, words in (
        ({"unet": ["my_unet", "MyUNet"]}, "unet is my_unet.MyUNet, which is no model of diffusers or transformers"),
        ({"unet": ["diffusers", "DDPMScheduler"]}, "unet is diffusers.DDPMScheduler"),
        ({"_class_name": "MyPipeline"}, "'MyPipeline' is no pipeline of diffusers; code from a folder is never run"),
    ):
        (tmp_path / "model_index.json").write_text(json.dumps(index | entry))
        done = run(tmp_path / "a.safetensors", "--from=diffusers", "--base", tmp_path, "-o", tmp_path / "out")
        assert done.exit_code == 2
        assert words in done.stderr
