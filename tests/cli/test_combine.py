"""`funclora combine`: the folder that it writes, its report, and its complaints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils import _pytree as pytree
from typer.testing import CliRunner, Result

import funclora as fl
from funclora import algebra
from funclora.cli._app import app
from funclora.cli.combine import Type
from funclora.rules.base import Rule

IDS = torch.arange(12).reshape(2, 6)


def run(*args: object) -> Result:
    return CliRunner().invoke(app, ["combine", *map(str, args)])


def llama(seed: int = 0) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=17, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=16, initializer_range=0.3, bos_token_id=0, eos_token_id=16,
        )
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformers folder."""
    folder = tmp_path_factory.mktemp("base")
    llama().save_pretrained(folder)
    return folder


def save(folder: Path, *configs: dict[str, Any]) -> tuple[list[Path], list[dict[str, Rule]]]:
    model, paths, found = llama(), [], []
    for i, fields in enumerate(configs):
        given: dict[str, Any] = {"r": 2 + i, "target_modules": ["q_proj", "down_proj"]} | fields
        config = fl.LoraConfig(**given)
        generator = torch.Generator().manual_seed(i)
        adapters: dict[str, Rule] = pytree.tree_map(
            lambda leaf, g=generator: leaf + 0.5 * torch.randn(leaf.shape, generator=g), fl.init(model, config)
        )
        found.append(adapters)
        paths.append(folder / f"ad-{i}")
        fl.save_peft(paths[-1], adapters, config)
    return paths, found


def logits(adapters: Any) -> Tensor:
    model = llama()
    with torch.no_grad():
        result: Tensor = fl.apply(model, fl.base_params(model), adapters, IDS).logits
    return result


def by_peft(folder: Path) -> Tensor:
    from peft import PeftModel

    with torch.no_grad():
        result: Tensor = PeftModel.from_pretrained(llama(), folder)(IDS).logits
    return result


def test_the_folder_and_the_report(tmp_path: Path) -> None:
    paths, found = save(tmp_path, {}, {})
    out = tmp_path / "out"
    result = run(*paths, "-o", out, "--type", "cat", "--weights", "-0.5,2", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {
        "combination_type": "cat",
        "sources": [
            {"adapter": str(paths[0]), "weight": -0.5, "targets": 4, "ranks": [2], "parameters": 144},
            {"adapter": str(paths[1]), "weight": 2.0, "targets": 4, "ranks": [3], "parameters": 216},
        ],
        "result": {
            "adapter": str(out), "targets": 4, "ranks": [5], "parameters": 360, "r": 5, "lora_alpha": 5,
        },
    }  # fmt: skip
    want = logits(algebra.task_arithmetic(found, [-0.5, 2.0]))
    torch.testing.assert_close(by_peft(out), want, rtol=1e-4, atol=1e-4)
    assert (want - logits({})).abs().max() > 0.1


def test_the_table(tmp_path: Path) -> None:
    paths, _ = save(tmp_path, {}, {"target_modules": ["q_proj"]})
    result = run(*paths, "-o", tmp_path / "out", "--type", "cat")
    assert result.exit_code == 0
    assert "Combined by cat" in result.output
    assert "2–5" in result.output
    assert f"{144 + 96:,}" in result.output


@pytest.mark.parametrize("option", ["--rank", "--svd-rank"])
def test_rank_and_density(option: str, tmp_path: Path) -> None:
    paths, found = save(tmp_path, {}, {})
    options = ("--type", "ties_svd", option, 1, "--density", 0.4, "--majority-sign-method", "frequency")
    assert run(*paths, "-o", tmp_path / "out", *options).exit_code == 0
    want = algebra.ties(found, density=0.4, rank=1, majority_sign_method="frequency")
    torch.testing.assert_close(by_peft(tmp_path / "out"), logits(want), rtol=1e-4, atol=1e-4)


def test_random_numbers_have_a_seed(tmp_path: Path) -> None:
    paths, _ = save(tmp_path, {}, {"r": 2})

    def weights(name: str, *options: object) -> list[list[float]]:
        result = run(*paths, "-o", tmp_path / name, "--type", "dare_linear", "--density", 0.5, *options)
        assert result.exit_code == 0, result.output
        return [tensor.tolist() for tensor in load_file(tmp_path / name / "adapter_model.safetensors").values()]

    assert weights("one", "--seed", 3) == weights("two", "--seed", 3)
    assert weights("default") == weights("zero", "--seed", 0)
    assert weights("three", "--seed", 4) != weights("one", "--seed", 3, "--overwrite")


def test_with_a_base(base: Path, tmp_path: Path) -> None:
    paths, found = save(tmp_path, {"use_dora": True}, {"modules_to_save": ["model.norm"]})
    refused = run(*paths, "-o", tmp_path / "out")
    assert refused.exit_code == 2
    assert "use_dora=True the adapter depends on the base model" in refused.stderr
    assert "--base" in refused.stderr
    assert not (tmp_path / "out").exists()
    result = run(*paths, "-o", tmp_path / "out", "--base", base, "--rank", 8, "--weights", "0.5,0.5")
    assert result.exit_code == 0, result.output
    want = algebra.combine(found, [0.5, 0.5], svd_rank=8, params=fl.base_params(llama()))
    torch.testing.assert_close(by_peft(tmp_path / "out"), logits(want), rtol=1e-4, atol=1e-4)


def test_dtype(tmp_path: Path) -> None:
    paths, _ = save(tmp_path, {}, {})
    assert run(*paths, "-o", tmp_path / "out", "--type", "cat", "--dtype", "bfloat16").exit_code == 0
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}


WRONG: list[tuple[list[object], str]] = [
    (["--weights", "1,x"], "--weights: expected numbers with commas between"),
    (["--weights", "1,2,3"], "weights: expected 2, one for each adapter, got 3"),
    (["--type", "ties"], "density: combination_type='ties' needs it"),
    (["--type", "cat", "--rank", 2], "svd_rank: combination_type='cat' does not use it"),
    (["--type", "cat", "--seed", 2], "--seed: --type cat uses no random numbers"),
    (["--type", "linear"], "the ranks differ"),
    (["--base", "nowhere"], "--base: nowhere is not a directory"),
    (["--weights", "0,0"], "all of them are 0"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=lambda it: it if isinstance(it, str) else "")
def test_complaints(options: list[object], message: str, tmp_path: Path) -> None:
    paths, _ = save(tmp_path, {}, {})
    result = run(*paths, "-o", tmp_path / "out", *options)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("funclora combine: ")
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_nothing_is_replaced_unasked(tmp_path: Path) -> None:
    paths, _ = save(tmp_path, {}, {})
    assert run(*paths, "-o", tmp_path / "out").exit_code == 0
    before = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    again = run(*paths, "-o", tmp_path / "out", "--weights", "1,-1")
    assert (again.exit_code, "or --overwrite" in again.stderr) == (2, True)
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == before
    assert run(*paths, "-o", tmp_path / "out", "--weights", "1,-1", "--overwrite").exit_code == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() != before
    missing = run(paths[0], tmp_path / "nowhere", "-o", tmp_path / "other")
    assert (missing.exit_code, "there is no such folder" in missing.stderr) == (2, True)
    onto_itself = run(*paths, "-o", paths[0], "--overwrite")
    assert (onto_itself.exit_code, "is one of the adapters" in onto_itself.stderr) == (2, True)


def test_types_are_those_of_the_library() -> None:
    assert [kind.value for kind in Type] == list(algebra.COMBINATION_TYPES)
