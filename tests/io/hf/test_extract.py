"""The best adapter of a full fine-tuning: Eckart and Young's, and nothing is left out silently."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from checkpoints import load, save_adapter, save_base, tensors

import funclora as fl
from funclora.errors import ConfigError, FormatError, TargetError, UnsupportedError

transformers.utils.logging.disable_progress_bar()


def tune(base: Path, cls: Any, out: Path, names: str | tuple[str, ...], rank: int | None = None) -> Any:
    """Change the parameters whose names contain one of these, by noise of that rank."""
    model = load(base, cls)
    for name, parameter in model.named_parameters():
        if any(part in name for part in ((names,) if isinstance(names, str) else names)):
            noise = torch.randn_like(parameter)
            if rank is not None:
                noise = parameter.new_zeros(parameter.shape)
                noise += torch.randn(*parameter.shape[:-1], rank) @ torch.randn(
                    *parameter.shape[:-2], rank, parameter.shape[-1]
                )
            parameter.data += 0.1 * noise
    model.save_pretrained(out)
    return model


@pytest.mark.parametrize("kind", ["llama", "gpt2", "resnet"])
def test_it_is_the_best_of_its_rank(kind: str, tmp_path: Path) -> None:
    targets = {"llama": "q_proj", "gpt2": "c_fc", "resnet": "convolution"}[kind]
    changed = {"llama": "q_proj", "gpt2": "c_fc.weight", "resnet": "convolution"}[kind]
    cls = type(save_base(tmp_path / "base", kind))
    tuned = tune(tmp_path / "base", cls, tmp_path / "tuned", changed)
    report = fl.extract_adapter(
        tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", r=3, target_modules=[targets]
    )
    base = load(tmp_path / "base", cls)
    adapters, _ = fl.load_peft(tmp_path / "adapter", base)
    assert [w.name for w in report.weights] == [*adapters]
    for weight in report.weights:
        old, new = base.get_parameter(weight.name), tuned.get_parameter(weight.name)
        delta = (new - old).double()
        matrix = delta.T if kind == "gpt2" else delta.flatten(1)
        values = torch.linalg.svdvals(matrix)
        rest = (values[3:].square().sum() / values.square().sum()).sqrt()
        rule = adapters[weight.name]
        left = torch.linalg.vector_norm(new - rule.dense(old)) / torch.linalg.vector_norm(delta)
        assert weight.residual == pytest.approx(rest.item(), rel=1e-4, abs=1e-5)
        assert left.item() == pytest.approx(rest.item(), rel=1e-4, abs=1e-5)
        assert weight.norm == pytest.approx(values.square().sum().sqrt().item(), rel=1e-5)
    # PEFT reads the same from it.
    model = peft.PeftModel.from_pretrained(load(tmp_path / "base", cls), tmp_path / "adapter")
    merged = model.merge_and_unload().state_dict()
    for name, rule in adapters.items():
        torch.testing.assert_close(merged[name], rule.dense(base.get_parameter(name)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("niter", [None, 2])
def test_a_change_of_that_rank_comes_back(niter: int | None, tmp_path: Path) -> None:
    cls = type(save_base(tmp_path / "base", "llama", shard="5KB"))
    save_adapter(tmp_path / "base", cls, tmp_path / "adapter", target_modules=["q_proj", "up_proj"], use_rslora=True)
    fl.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "tuned")
    report = fl.extract_adapter(tmp_path / "base", tmp_path / "tuned", tmp_path / "back", r=2, niter=niter)
    assert len(report.weights) == 4
    assert len(report.same) == 14 - 4
    assert max(weight.residual for weight in report.weights) < 1e-4
    fl.merge_checkpoint(tmp_path / "base", tmp_path / "back", tmp_path / "again")
    want, got = tensors(tmp_path / "tuned"), tensors(tmp_path / "again")
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5)


def test_experts_have_an_update_each(tmp_path: Path) -> None:
    cls = type(save_base(tmp_path / "base", "mixtral"))
    tuned = tune(tmp_path / "base", cls, tmp_path / "tuned", ("experts.gate_up_proj", "experts.down_proj"), rank=2)
    experts = ["experts.gate_up_proj", "experts.down_proj"]
    report = fl.extract_adapter(
        tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", r=2, target_modules=None, target_parameters=experts
    )
    assert max(weight.residual for weight in report.weights) < 1e-4
    base = load(tmp_path / "base", cls)
    adapters, _ = fl.load_peft(tmp_path / "adapter", base)
    for name, value in fl.merge(fl.base_params(base), adapters).items():
        torch.testing.assert_close(value, tuned.state_dict()[name], rtol=1e-4, atol=1e-5)


def test_a_rank_above_that_of_a_weight(tmp_path: Path) -> None:
    cls = type(save_base(tmp_path / "base", "llama", num_key_value_heads=1))
    tune(tmp_path / "base", cls, tmp_path / "tuned", "k_proj")  # 8 × 16
    report = fl.extract_adapter(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", r=12)
    assert max(weight.residual for weight in report.weights) < 1e-6
    adapters, config = fl.load_peft(tmp_path / "adapter", load(tmp_path / "base", cls))
    assert config.r == 12
    assert all(rule.r == 12 for rule in adapters.values() if isinstance(rule, fl.LoRA))


@pytest.fixture
def half_covered(tmp_path: Path) -> Path:
    """A BERT of which a linear layer, a norm and biases changed."""
    cls = type(save_base(tmp_path / "base", "bert"))
    tune(tmp_path / "base", cls, tmp_path / "tuned", ("query.weight", "0.attention.output.LayerNorm", "key.bias"))
    return tmp_path


def test_what_no_target_covers_is_an_error(half_covered: Path) -> None:
    with pytest.raises(TargetError, match=r"'bert.encoder.layer.0.attention.self.key.bias', .*LayerNorm.weight.* too"):
        fl.extract_adapter(half_covered / "base", half_covered / "tuned", half_covered / "out", r=2)
    assert sorted(f.name for f in half_covered.iterdir()) == ["base", "tuned"]


def test_what_no_target_covers_is_saved(half_covered: Path) -> None:
    fl.extract_adapter(half_covered / "base", half_covered / "tuned", half_covered / "out", r=16, rest="save")
    fl.merge_checkpoint(half_covered / "base", half_covered / "out", half_covered / "merged")
    got, want = tensors(half_covered / "merged"), tensors(half_covered / "tuned")
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-5)


def test_what_no_target_covers_is_named_when_it_is_left_out(half_covered: Path) -> None:
    report = fl.extract_adapter(half_covered / "base", half_covered / "tuned", half_covered / "out", r=2, rest="ignore")
    assert len(report.weights) == 2
    assert len(report.ignored) == 4
    assert all(name.endswith(("key.bias", "LayerNorm.weight", "LayerNorm.bias")) for name in report.ignored)


def test_what_is_wrong_is_said(half_covered: Path) -> None:
    base, tuned, out = (half_covered / name for name in ("base", "tuned", "out"))
    shutil.copytree(base, half_covered / "copy")
    with pytest.raises(FormatError, match="the same weights"):
        fl.extract_adapter(base, half_covered / "copy", out, r=2)
    with pytest.raises(TargetError, match="no target differs"):
        fl.extract_adapter(base, tuned, out, r=2, target_modules=["value"])
    with pytest.raises(ConfigError, match="rest: expected"):
        fl.extract_adapter(base, tuned, out, r=2, rest="drop")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="niter: expected"):
        fl.extract_adapter(base, tuned, out, r=2, niter=-1)
    with pytest.raises(ConfigError, match="out_dir: "):
        fl.extract_adapter(base, tuned, tuned, r=2)
    save_base(half_covered / "llama", "llama")
    with pytest.raises(FormatError, match=r"\['LlamaForCausalLM'\], .* expected the same"):
        fl.extract_adapter(base, half_covered / "llama", out, r=2)
    assert not out.exists()


def test_statistics_have_no_place(tmp_path: Path) -> None:
    cls = type(save_base(tmp_path / "base", "resnet"))
    model = tune(tmp_path / "base", cls, tmp_path / "tuned", "convolution")
    model.get_buffer("resnet.embedder.embedder.normalization.running_mean").add_(1)
    model.save_pretrained(tmp_path / "tuned")
    with pytest.raises(UnsupportedError, match=r"running_mean' differs, but is a buffer"):
        fl.extract_adapter(
            tmp_path / "base", tmp_path / "tuned", tmp_path / "out", r=2, target_modules=["convolution"], rest="save"
        )
