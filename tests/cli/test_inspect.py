"""`funclora inspect`: the numbers of a folder, and one line where there are none."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from checkpoints import load, merged_by_peft, save_adapter, save_base, tensors
from image_pipelines import components, kohya, layers
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

import funclora as fl
from funclora.cli._app import app
from funclora.io import save_diffusers, save_mlx

transformers.utils.logging.disable_progress_bar()

ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"down_proj": 3}, "use_rslora": True},
    "dora": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "full": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "bias": "none"},
}


def run(*args: object) -> Result:
    return CliRunner().invoke(app, ["inspect", *map(str, args)])


def report(*args: object) -> Any:
    result = run(*args, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inspect")
    torch.manual_seed(0)
    cls = type(save_base(path / "base", "llama", shard="10KB"))
    for name, options in ADAPTERS.items():
        save_adapter(path / "base", cls, path / name, **options)
    fl.merge_checkpoint(path / "base", path / "lora", path / "tuned")
    moe = type(save_base(path / "moe", "mixtral"))
    save_adapter(path / "moe", moe, path / "experts", target_parameters=["experts.down_proj"], target_modules=[])
    return path


@pytest.mark.parametrize("name", [*ADAPTERS])
def test_with_the_base_it_is_what_peft_merges(name: str, folders: Path) -> None:
    found = report(folders / name, "--base", folders / "base")
    base: Any = load(folders / "base", transformers.LlamaForCausalLM).state_dict()
    merged = merged_by_peft(folders / "base", transformers.LlamaForCausalLM, folders / name)
    rows = {row["name"]: row for row in found["rows"]}
    assert {name for name in base if not torch.equal(merged[name], base[name])} == set(rows)
    total = 0.0
    for key, row in rows.items():
        delta = merged[key].double() - base[key].double()
        total += float(delta.square().sum())
        assert row["norm"] == pytest.approx(float(delta.norm()), rel=1e-5)
        assert row["share"] == pytest.approx(float(delta.norm() / base[key].double().norm()), rel=1e-5)
        s = torch.linalg.svdvals(delta)
        got = torch.zeros_like(s)
        values = torch.tensor(row["singular_values"][0], dtype=s.dtype)[: len(s)]
        got[: len(values)] = values
        torch.testing.assert_close(got, s, rtol=1e-4, atol=1e-5)
        assert row["of"] == "ΔW"
    assert found["norm"] == pytest.approx(math.sqrt(total), rel=1e-5)
    stored = load_file(folders / name / "adapter_model.safetensors")
    assert found["parameters"] == sum(tensor.numel() for tensor in stored.values())


def test_without_the_base(folders: Path) -> None:
    alone, with_base = (report(folders / "lora", *more) for more in ((), ("--base", folders / "base")))
    shares = {row["name"]: row["norm"] for row in with_base["rows"]}
    for row in alone["rows"]:
        assert row["norm"] == pytest.approx(shares[row["name"]])
        assert (row["share"], row["base_norm"]) == (None, None)
        r = 3 if "down_proj" in row["name"] else 2
        assert (row["rule"], row["r"], row["scaling"]) == ("LoRA", r, pytest.approx(3 / math.sqrt(r)))
        assert 1 <= row["effective_rank"][0] <= r
    assert alone["config"]["use_rslora"] is True
    assert alone["share"] is None


def test_dora_without_the_base_says_what_it_shows(folders: Path) -> None:
    found = report(folders / "dora")
    stored = load_file(folders / "dora" / "adapter_model.safetensors")
    for row in found["rows"]:
        key = f"base_model.model.{row['name'].removesuffix('.weight')}"
        product = 1.5 * stored[f"{key}.lora_B.weight"] @ stored[f"{key}.lora_A.weight"]
        assert row["norm"] == pytest.approx(float(product.norm()), rel=1e-5)
        assert (row["of"], row["rule"]) == ("s·B·A", "DoRA")
    assert found["parameters"] == sum(tensor.numel() for tensor in stored.values())
    assert "Give --base" in run(folders / "dora").stdout
    assert "Give --base" not in run(folders / "dora", "--base", folders / "base").stdout


def test_convolutions_with_dora_without_the_base(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3))
    config = fl.LoraConfig(r=2, target_modules=["0"], use_dora=True, init_lora_weights=False)
    adapters = fl.init(model, config)
    fl.save_peft(tmp_path, adapters, config)
    (row,) = report(tmp_path)["rows"]
    (want,) = fl.analysis.spectra(adapters).rows
    assert row["norm"] == pytest.approx(want.norm)
    assert (row["shape"], row["rule"]) == ([3, 18], "DoRA")


def test_experts(folders: Path) -> None:
    refused = run(folders / "experts")
    assert refused.exit_code == 2
    assert "--base" in refused.stderr
    found = report(folders / "experts", "--base", folders / "moe")
    assert [row["shape"] for row in found["rows"]] == [[3, 16, 32]] * 2
    assert all(len(row["effective_rank"]) == 3 for row in found["rows"])
    assert "–" in run(folders / "experts", "--base", folders / "moe").stdout


def test_a_model_alone_and_next_to_its_base(folders: Path) -> None:
    stored = tensors(folders / "tuned")
    alone = report(folders / "tuned")
    assert {row["name"]: row["norm"] for row in alone["rows"]} == {
        name: pytest.approx(float(tensor.double().norm())) for name, tensor in stored.items()
    }
    assert {row["of"] for row in alone["rows"]} == {"W"}
    assert alone["parameters"] == sum(tensor.numel() for tensor in stored.values())
    found = report(folders / "tuned", "--base", folders / "base")
    before = tensors(folders / "base")
    for row in found["rows"]:
        delta = stored[row["name"]].double() - before[row["name"]].double()
        assert row["norm"] == pytest.approx(float(delta.norm()))
        if delta.any() and delta.dim() == 2:
            # A merge of rank 2 or 3, and rounding.
            assert row["effective_rank"][0] < 3.01
    table = run(folders / "tuned", "--base", folders / "base").stdout
    assert "17 of them do not change and are not shown" in table
    assert "lm_head" not in table


def test_the_table(folders: Path) -> None:
    result = run(folders / "lora", "--base", folders / "base")
    assert result.exit_code == 0, result.output
    for words in ("use_rslora=True", "LoRA", "share", "eff. rank", "4 weights", "% of their ‖W‖"):
        assert words in result.stdout, result.stdout


def test_norms_only(folders: Path) -> None:
    full, norms = (report(folders / "lora", *more) for more in ((), ("--norms",)))
    for one, other in zip(full["rows"], norms["rows"], strict=True):
        assert one["norm"] == other["norm"]
        assert other["singular_values"] is None


def test_a_picture(folders: Path, tmp_path: Path) -> None:
    result = run(folders / "lora", "--base", folders / "base", "--plot", tmp_path / "new" / "x.png")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "new" / "x.png").read_bytes()[:4] == b"\x89PNG"
    assert "wrote" in result.stdout


def test_a_fresh_adapter_moves_nothing(folders: Path, tmp_path: Path) -> None:
    model = peft.get_peft_model(
        load(folders / "base", transformers.LlamaForCausalLM), peft.LoraConfig(target_modules=["q_proj"])
    )
    model.save_pretrained(tmp_path)
    found = report(tmp_path, "--base", folders / "base")
    assert [(row["norm"], row["effective_rank"], row["stable_rank"]) for row in found["rows"]] == [(0, [0], [0])] * 2


def test_complaints(folders: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_text((folders / "lora" / "adapter_config.json").read_text())
    (broken / "adapter_model.safetensors").write_bytes(b"\0" * 20)
    infinite = tmp_path / "infinite"
    infinite.mkdir()
    (infinite / "adapter_config.json").write_text((folders / "lora" / "adapter_config.json").read_text())
    stored = load_file(folders / "lora" / "adapter_model.safetensors")
    save_file({key: tensor / 0 for key, tensor in stored.items()}, infinite / "adapter_model.safetensors")
    (tmp_path / "file").write_text("")
    for args, words in (
        ((tmp_path / "none",), "there is no such folder. Give a PEFT folder, or the folder of a transformers model."),
        ((tmp_path / "file",), "there is no such folder"),
        ((tmp_path,), "neither adapter_config.json (an adapter) nor config.json (a model)"),
        ((folders,), "It contains the adapters"),
        ((folders / "full",), "Give the base model"),
        ((broken,), "is not a safetensors file"),
        ((infinite,), "NaN or infinity"),
        (
            (folders / "lora", "--base", tmp_path / "none"),
            "there is no such folder. Give the folder of a transformers model.",
        ),
        ((folders / "lora", "--base", folders / "moe"), "matches no module"),
        ((folders / "tuned", "--base", folders / "moe"), "They belong to different models"),
        ((folders / "lora", "--plot", "x.jpg"), "--plot: expected the name of a .png file"),
    ):
        result = run(*args)
        assert result.exit_code == 2, (args, result.output)
        assert words in result.stderr, (args, result.stderr)
        assert len(result.stderr.splitlines()) == 1, result.stderr
        assert not result.stdout


def test_without_matplotlib_nothing_is_read(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run(folders / "none", "--plot", "x.png")
    assert result.exit_code == 2
    assert "pip install 'funclora[demo]'" in result.stderr


def test_an_adapter_alone_needs_no_transformers(folders: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['transformers'] = None; "
        "from funclora.cli._app import app; app(['inspect', sys.argv[1], '--json'])"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(folders / "lora")], capture_output=True, text=True, env=environment, check=True
    )
    assert len(json.loads(done.stdout)["rows"]) == 4


def test_files_of_image_models(tmp_path: Path) -> None:
    """The norms are those of α / r · up · down, by the names in the file."""
    made = kohya(tmp_path / "style.safetensors", {"lora_unet": layers(components("sd")["unet"], ("to_q", "conv1"))},
                 ranks=[2, 3], alphas=[1.0, 4.0])  # fmt: skip
    found = report(tmp_path / "style.safetensors")
    rows = {row["name"]: row for row in found["rows"]}
    assert (found["kind"], len(rows)) == ("adapter", len(made))
    for name, (down, up, alpha) in made.items():
        row = rows[f"{name.replace('.', '_')}.weight"]
        want = (alpha / len(down) * up.flatten(1) @ down.flatten(1)).norm().item()
        assert row["norm"] == pytest.approx(want, rel=1e-5)
        assert row["r"] == len(down)
    unet, config = components("sd")["unet"], fl.LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "conv1"])
    adapters = fl.init(unet, config.replace(init_lora_weights=False))
    save_diffusers(tmp_path, {"unet": (adapters, config)})
    rows = {row["name"]: row for row in report(tmp_path / "pytorch_lora_weights.safetensors")["rows"]}
    for name, rule in adapters.items():
        want = rule.dense(torch.zeros_like(unet.get_parameter(name))).norm().item()
        assert rows[f"unet.{name}"]["norm"] == pytest.approx(want, rel=1e-5)
    done = run(tmp_path / "style.safetensors", "--base", tmp_path)
    assert done.exit_code == 2


def test_the_alpha_in_the_metadata_of_diffusers(tmp_path: Path) -> None:
    tensors = {"unet.to_q.lora_A.weight": torch.randn(2, 5), "unet.to_q.lora_B.weight": torch.randn(4, 2)}
    config = peft.LoraConfig(r=2, lora_alpha=7, target_modules=["to_q"]).to_dict()
    fields = {f"unet.{key}": [*value] if isinstance(value, set) else value for key, value in config.items()}
    file = tmp_path / "style.safetensors"
    save_file(tensors, file, metadata={"lora_adapter_metadata": json.dumps(fields, default=str)})
    (row,) = report(file)["rows"]
    a, b = tensors.values()
    assert row["norm"] == pytest.approx(7 / 2 * (b @ a).norm().item(), rel=1e-5)


def test_folders_of_mlx_lm(folders: Path, tmp_path: Path) -> None:
    model: Any = load(folders / "base", transformers.LlamaForCausalLM)
    adapters, _ = fl.load_peft(folders / "lora", model)
    save_mlx(tmp_path, adapters, model)
    want, have = report(folders / "lora", "--base", folders / "base"), report(tmp_path, "--base", folders / "base")
    assert len(have["rows"]) == len(want["rows"])
    for one, other in zip(have["rows"], want["rows"], strict=True):
        assert one["name"] == other["name"]
        assert one["share"] == pytest.approx(other["share"], rel=1e-5)
    assert report(tmp_path)["norm"] == pytest.approx(want["norm"], rel=1e-5)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"q.lora_down.weight": (2, 3)}, "'q.lora_down.weight' is no factor of a low-rank update with both factors"),
        (
            {"q.lora_down.weight": (2, 3), "q.lora_up.weight": (4, 3)},
            "the factors of 'q' have the shapes [2, 3] and [4, 3]",
        ),
        ({"q.lora_down.weight": (2, 3), "q.lora_up.weight": (4, 2), "q.alpha": (2,)}, "'q.alpha' has shape [2]"),
        ({}, "there are no low-rank updates in this file"),
    ],
)
def test_broken_files_of_image_models(tensors: dict[str, tuple[int, ...]], words: str, tmp_path: Path) -> None:
    save_file({key: torch.ones(shape) for key, shape in tensors.items()}, tmp_path / "a.safetensors")
    done = run(tmp_path / "a.safetensors")
    assert (done.exit_code, done.stdout) == (2, "")
    assert words in done.stderr
