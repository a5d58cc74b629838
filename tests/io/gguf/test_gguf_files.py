"""GGUF adapters: what is in the files, what llama.cpp would make of it, the way back, and what is refused.

llama.cpp's layout of a base weight is written in `gguf_models` anew, for the dense weight: the update must lie alike.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_models import EXPERTS, build, in_llama_cpp, lora
from torch import Tensor, nn

import funclora as fl
from funclora.errors import (
    ConfigError,
    FormatError,
    FuncloraError,
    NonFiniteError,
    ParamsError,
    UnsupportedError,
)

# kind -> architecture, targets, and names in llama.cpp of what is targeted in layer 1.
ATTENTION = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
             "self_attn.o_proj": "attn_output"}  # fmt: skip
MLP = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
FUSED = {"attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}
PHI3 = {"self_attn.qkv_proj": "attn_qkv", "self_attn.o_proj": "attn_output", "mlp.gate_up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down"}  # fmt: skip
KINDS = {
    "Llama": ("llama", ATTENTION | MLP),
    "Mistral": ("llama", ATTENTION | MLP),
    "Qwen2": ("qwen2", ATTENTION | MLP),
    "Qwen3": ("qwen3", ATTENTION | MLP),
    "Gemma": ("gemma", ATTENTION | MLP),
    "Gemma2": ("gemma2", ATTENTION | MLP),
    "Gemma3": ("gemma3", ATTENTION | MLP),
    "GPT2": ("gpt2", FUSED),
    "Olmo2": ("olmo2", ATTENTION | MLP),
    "Phi3": ("phi3", PHI3),
    "Mixtral": ("llama", ATTENTION),
    "Qwen3Moe": ("qwen3moe", ATTENTION),
}


def read(file: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    reader = gguf.GGUFReader(file)
    return (
        {key: field.contents() for key, field in reader.fields.items()},
        {tensor.name: np.array(tensor.data) for tensor in reader.tensors},
    )


def load(file: Path, model: nn.Module) -> dict[str, Any]:
    return {**fl.load_gguf(file, model)[0]}


def delta_of(fields: dict[str, Any], tensors: dict[str, np.ndarray], name: str) -> Tensor:
    """The change of a weight as llama.cpp computes it: in float32, alpha over the last dimension of lora_b."""
    a, b = (torch.from_numpy(tensors[f"{name}.lora_{leaf}"]).float() for leaf in "ab")
    scale = np.float32(fields["adapter.lora.alpha"]) / np.float32(b.shape[-1])
    if name == "token_embd.weight":  # rows of a are looked up
        a = a.T
    return float(scale) * (b @ a)


@pytest.mark.parametrize("kind", KINDS)
def test_names_shapes_and_the_update_in_llama_cpps_layout(kind: str, tmp_path: Path) -> None:
    arch, names = KINDS[kind]
    model = build(kind)
    options = {"target_modules": [ours.rpartition(".")[2] for ours in names]} if kind in EXPERTS else {}
    adapters, _ = lora(model, **options)
    file = tmp_path / "new" / "adapter.gguf"
    fl.save_gguf(file, adapters, model)
    fields, tensors = read(file)
    assert fields["general.architecture"] == arch
    assert fields["general.type"] == "adapter"
    assert fields["adapter.type"] == "lora"
    assert fields["adapter.lora.alpha"] == 5
    prefix = "transformer.h" if kind == "GPT2" else "model.layers"
    found = {
        f"{prefix}.{i}.{ours}.weight": f"blk.{i}.{theirs}.weight" for i in (0, 1) for ours, theirs in names.items()
    }
    assert adapters.keys() == found.keys()
    assert tensors.keys() == {f"{tensor}.lora_{leaf}" for tensor in found.values() for leaf in "ab"}
    params = fl.base_params(model)
    for name, tensor in found.items():
        dense = adapters[name].dense(torch.zeros_like(params[name]))
        torch.testing.assert_close(
            delta_of(fields, tensors, tensor), in_llama_cpp(model, name, dense), rtol=1e-6, atol=1e-6
        )
    assert [p.name for p in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_written_is_read(kind: str, tmp_path: Path) -> None:
    model = build(kind)
    targets = {
        "GPT2": ["c_attn"],
        "Phi3": ["qkv_proj", "down_proj"],
        **{each: ["q_proj", "k_proj"] for each in EXPERTS},
    }
    adapters, config = lora(model, target_modules=targets.get(kind, ["q_proj", "k_proj", "down_proj"]))
    fl.save_gguf(tmp_path / "a.gguf", adapters, model)
    loaded, read_config = fl.load_gguf(tmp_path / "a.gguf", model)
    assert list(loaded) == list(adapters)
    for name, rule in adapters.items():
        other = loaded[name]
        assert isinstance(other, fl.LoRA)
        assert torch.equal(other.a, rule.a)
        assert torch.equal(other.b, rule.b)
        assert (other.scaling, other.layout) == (rule.scaling, rule.layout)
    assert sorted(read_config.target_modules or ()) == sorted(config.target_modules or ())
    assert (read_config.r, read_config.lora_alpha, read_config.use_rslora) == (3, 5, False)
    fl.save_peft(tmp_path / "peft", loaded, read_config)  # the configuration is the adapters'
    again, _ = fl.load_peft(tmp_path / "peft", model)
    assert torch.equal(again[name].a, loaded[name].a)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("targets", "brief"),
    [
        (["mlp.c_proj"], ("mlp.c_proj",)),
        (["c_proj"], ("c_proj",)),
        (["transformer.h.1.attn.c_attn"], ("transformer.h.1.attn.c_attn",)),
    ],
)
def test_targets_are_named_briefly(targets: list[str], brief: tuple[str, ...], tmp_path: Path) -> None:
    model = build("GPT2")
    adapters, _ = lora(model, target_modules=targets)
    fl.save_gguf(tmp_path / "a.gguf", adapters, model)
    loaded, config = fl.load_gguf(tmp_path / "a.gguf", model)
    assert config.target_modules == brief
    assert loaded.keys() == adapters.keys() == fl.init(model, config).keys()


MIXED: list[dict[str, Any]] = [
    {"use_rslora": True},
    {"use_rslora": True, "rank_pattern": {"q_proj": 5, "up_proj": 1}},
    {"alpha_pattern": {"v_proj": 7.3, "layers.0.*down_proj": -2}},
    {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {"k_proj": 0.37}},
]


@pytest.mark.parametrize("fields", MIXED, ids=str)
def test_one_alpha_for_all_scalings(fields: dict[str, Any], tmp_path: Path) -> None:
    model = build("Llama")
    adapters, _ = lora(model, **fields)
    file = tmp_path / "a.gguf"
    fl.save_gguf(file, adapters, model)
    loaded, _ = fl.load_gguf(file, model)
    stored = read(file)
    names = {f"model.layers.{i}.{ours}.weight": f"blk.{i}.{theirs}.weight"
             for i in (0, 1) for ours, theirs in (ATTENTION | MLP).items()}  # fmt: skip
    for name, rule in adapters.items():
        other: Any = loaded[name]
        assert torch.equal(other.a, rule.a)
        # Two roundings to float32 at most: one of alpha, one of B.
        torch.testing.assert_close(other.scaling * other.b.double(), rule.scaling * rule.b.double(), rtol=2e-7, atol=0)
        dense = in_llama_cpp(model, name, rule.dense(torch.zeros_like(model.get_parameter(name))))
        torch.testing.assert_close(delta_of(*stored, names[name]), dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("r", [3, 5, 6, 7])
def test_rslora_of_one_rank_leaves_the_factors_as_they_are(r: int, tmp_path: Path) -> None:
    model = build("Llama")
    adapters, _ = lora(model, r=r, use_rslora=True)  # alpha·√r is no float32
    fl.save_gguf(tmp_path / "a.gguf", adapters, model)
    loaded = load(tmp_path / "a.gguf", model)
    assert all(torch.equal(loaded[name].b, rule.b) for name, rule in adapters.items())
    assert all(loaded[name].scaling == pytest.approx(rule.scaling, rel=6e-8) for name, rule in adapters.items())


def test_an_outlier_leaves_the_others_as_they_are(tmp_path: Path) -> None:
    model = build("Llama")
    adapters, _ = lora(model, target_modules=["q_proj", "v_proj"], alpha_pattern={"layers.0.self_attn.v_proj": 10})
    fl.save_gguf(tmp_path / "a.gguf", adapters, model)
    fields, tensors = read(tmp_path / "a.gguf")
    assert fields["adapter.lora.alpha"] == 5
    layer = "model.layers.{}.self_attn.v_proj.weight".format
    assert np.array_equal(tensors["blk.1.attn_v.weight.lora_b"], adapters[layer(1)].b.numpy())
    assert np.array_equal(tensors["blk.0.attn_v.weight.lora_b"], 2 * adapters[layer(0)].b.numpy())


def test_embedding_and_output_of_an_untied_model(tmp_path: Path) -> None:
    model = build("Llama")
    adapters, _ = lora(model, target_modules=["embed_tokens", "lm_head"])
    fl.save_gguf(tmp_path / "a.gguf", adapters, model)
    fields, tensors = read(tmp_path / "a.gguf")
    assert {name: array.shape for name, array in tensors.items()} == {
        "token_embd.weight.lora_a": (17, 3),
        "token_embd.weight.lora_b": (16, 3),
        "output.weight.lora_a": (3, 16),
        "output.weight.lora_b": (17, 3),
    }
    for name, tensor in (("model.embed_tokens.weight", "token_embd.weight"), ("lm_head.weight", "output.weight")):
        dense = adapters[name].dense(torch.zeros(17, 16))
        have = delta_of(fields, tensors, tensor)
        torch.testing.assert_close(have.T if "embd" in tensor else have, dense, rtol=1e-6, atol=1e-6)
    loaded = load(tmp_path / "a.gguf", model)
    assert all(torch.equal(loaded[name].a, rule.a) for name, rule in adapters.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_adapters_of_other_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    model = build("Llama")
    adapters = {n: fl.LoRA(r.a.to(dtype), r.b.to(dtype), scaling=r.scaling) for n, r in lora(model)[0].items()}
    fl.save_gguf(tmp_path / "a.gguf", adapters, model)
    loaded = load(tmp_path / "a.gguf", model.to(torch.bfloat16))
    for name, rule in adapters.items():
        assert loaded[name].a.dtype == torch.float32
        assert torch.equal(loaded[name].a, rule.a.float())


def test_half_precision_is_one_rounding(tmp_path: Path) -> None:
    model = build("Llama")
    adapters, _ = lora(model)
    fl.save_gguf(tmp_path / "a.gguf", adapters, model, dtype=torch.float16)
    assert {str(array.dtype) for array in read(tmp_path / "a.gguf")[1].values()} == {"float16"}
    loaded = load(tmp_path / "a.gguf", model)
    for name, rule in adapters.items():
        assert torch.equal(loaded[name].a, rule.a.half().float())
        assert torch.equal(loaded[name].b, rule.b.half().float())


def test_the_meta_device_is_enough(tmp_path: Path) -> None:
    model = build("Llama")
    adapters, _ = lora(model)
    with torch.device("meta"):
        bare = type(model)(model.config)
    fl.save_gguf(tmp_path / "a.gguf", adapters, model)
    fl.save_gguf(tmp_path / "b.gguf", adapters, bare)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    loaded = load(tmp_path / "a.gguf", bare)
    assert {rule.a.device.type for rule in loaded.values()} == {"cpu"}


@pytest.mark.parametrize("kind", ["BF16", "Q8_0"])
def test_packed_tensors_are_unpacked(kind: str, tmp_path: Path) -> None:
    model = build("Llama", hidden_size=32, head_dim=8)
    adapters, _ = lora(model, r=32, target_modules=["v_proj"])
    fl.save_gguf(tmp_path / "a.gguf", adapters, model)
    _, tensors = read(tmp_path / "a.gguf")
    qtype = gguf.GGMLQuantizationType[kind]
    rewrite(tmp_path / "b.gguf", {n: gguf.quants.quantize(t, qtype) for n, t in tensors.items()}, qtype=qtype)
    loaded = load(tmp_path / "b.gguf", model)
    for name, rule in adapters.items():
        torch.testing.assert_close(loaded[name].b, rule.b, rtol=1e-2, atol=2e-2)
        assert not torch.equal(loaded[name].b, rule.b)


# Experts: one parameter for all in transformers, of which gate_up_proj is two in llama.cpp.

ALL_OF_THEM = {"target_modules": ["v_proj"], "target_parameters": [
    "experts.gate_up_proj", "experts.down_proj", "gate.weight"]}  # fmt: skip


@pytest.mark.parametrize("kind", EXPERTS)
def test_experts(kind: str, tmp_path: Path) -> None:
    model = build(kind)
    adapters, _ = lora(model, **ALL_OF_THEM)
    fl.save_gguf(tmp_path / "a.gguf", adapters, model)
    fields, tensors = read(tmp_path / "a.gguf")
    layer = "model.layers.1.mlp."
    names = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}
    assert {key for key in tensors if "blk.1" in key} == {
        f"blk.1.{name}.weight.lora_{leaf}" for name in (*names, "ffn_gate_inp", "attn_v") for leaf in "ab"
    }
    change = {name: rule.dense(torch.zeros_like(model.get_parameter(name))) for name, rule in adapters.items()}
    gate, up = change[f"{layer}experts.gate_up_proj"].chunk(2, dim=1)
    want = {"ffn_gate_exps": gate, "ffn_up_exps": up, "ffn_down_exps": change[f"{layer}experts.down_proj"]}
    for name, dense in (want | {"ffn_gate_inp": change[f"{layer}gate.weight"]}).items():
        torch.testing.assert_close(delta_of(fields, tensors, f"blk.1.{name}.weight"), dense, rtol=1e-5, atol=1e-5)
    loaded, config = fl.load_gguf(tmp_path / "a.gguf", model)
    assert list(loaded) == list(adapters)
    for name, rule in adapters.items():
        other: Any = loaded[name]
        assert torch.equal(other.a, rule.a)
        assert torch.equal(other.b, rule.b)
        assert (other.scaling, other.layout) == (rule.scaling, rule.layout)
    fl.save_peft(tmp_path / "peft", loaded, config)
    again, _ = fl.load_peft(tmp_path / "peft", model)
    assert again.keys() == adapters.keys()


def some_experts(file: Path, changes: dict[str, Any]) -> Any:
    """A file for experts whose tensors in layer 0 were changed, or taken out with None."""
    model = build("Mixtral")
    adapters, _ = lora(model, target_modules=[], target_parameters=["experts.gate_up_proj"])
    fl.save_gguf(file, adapters, model)
    _, tensors = read(file)
    for name, change in changes.items():
        for leaf in "ab":
            key = f"blk.0.{name}.weight.lora_{leaf}"
            if change is None:
                del tensors[key]
            else:
                tensors[key] = change(tensors[key], leaf)
    rewrite(file, tensors)
    return model


def test_gate_and_up_with_factors_of_their_own(tmp_path: Path) -> None:
    """As a trainer that adapts them apart leaves them."""
    file = tmp_path / "a.gguf"
    model = some_experts(file, {"ffn_up_exps": lambda x, leaf: x + 1})
    fields, tensors = read(file)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    rule = load(file, model)[name]
    assert rule.r == 6
    dense = rule.dense(torch.zeros_like(model.get_parameter(name)))
    for half, part in zip(dense.chunk(2, dim=1), ("gate", "up"), strict=True):
        torch.testing.assert_close(delta_of(fields, tensors, f"blk.0.ffn_{part}_exps.weight"), half)


def test_a_half_without_an_adapter(tmp_path: Path) -> None:
    file = tmp_path / "a.gguf"
    model = some_experts(file, {"ffn_gate_exps": None})
    fields, tensors = read(file)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    gate, up = load(file, model)[name].dense(torch.zeros_like(model.get_parameter(name))).chunk(2, dim=1)
    assert not gate.any()
    torch.testing.assert_close(delta_of(fields, tensors, "blk.0.ffn_up_exps.weight"), up)


def test_halves_of_several_ranks(tmp_path: Path) -> None:
    def shorter(x: np.ndarray, leaf: str) -> np.ndarray:
        return x[:, :2] if leaf == "a" else x[..., :2]

    file = tmp_path / "a.gguf"
    model = some_experts(file, {"ffn_up_exps": shorter})
    with pytest.raises(UnsupportedError, match="are one weight in transformers, but their adapters have ranks"):
        fl.load_gguf(file, model)


# What is refused.


def target(kind: str, entry: str, **fields: Any) -> Callable[[], tuple[Any, dict[str, Any]]]:
    def make() -> tuple[Any, dict[str, Any]]:
        model = build(kind, **fields)
        return model, lora(model, target_modules=[entry])[0]

    return make


def rules(**changes: Any) -> Callable[[], tuple[Any, dict[str, Any]]]:
    def make() -> tuple[Any, dict[str, Any]]:
        model = build("Llama")
        return model, fl.init(model, fl.LoraConfig(target_modules=["q_proj"], r=2, **changes))

    return make


def other_model() -> tuple[Any, dict[str, Any]]:
    model = nn.Sequential(nn.Linear(4, 4))
    return model, lora(model, target_modules=["0"])[0]


def bert() -> tuple[Any, dict[str, Any]]:
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                                 intermediate_size=8))  # fmt: skip
    return model, lora(model, target_modules=["query"])[0]


def biased() -> tuple[Any, dict[str, Any]]:
    model = build("GPT2")
    return model, fl.init(model, fl.LoraConfig(target_modules=["c_attn"], bias="lora_only"))


REFUSED = {
    "dora": (rules(use_dora=True), UnsupportedError, r"q_proj.*rule DoRA.*Merge the adapter"),
    "modules_to_save": (rules(modules_to_save=["lm_head"]), UnsupportedError, "'lm_head.weight'.*rule Full.*Merge"),
    "bias": (biased, UnsupportedError, r"'transformer.h.0.*bias'.*rule Full.*Merge"),
    "other module": (other_model, UnsupportedError, "model: Sequential has no form.*LlamaForCausalLM.*Merge"),
    "bert": (bert, UnsupportedError, "model: BertModel has no form"),
    "positions": (
        target("GPT2", "wpe"),
        UnsupportedError,
        "'transformer.wpe.weight'.* does not apply adapters to 'position_embd.weight'",
    ),
    "tied table": (target("GPT2", "wte"), UnsupportedError, "'transformer.wte.weight'.*tied"),
    "tied output": (target("Llama", "lm_head", tie_word_embeddings=True), UnsupportedError, "lm_head.*tied"),
    "tied embed": (target("Llama", "embed_tokens", tie_word_embeddings=True), UnsupportedError, "embed_tokens.*tied"),
    "gemma embed": (target("Gemma", "embed_tokens"), UnsupportedError, "embed_tokens.*tied"),
    "gemma output": (target("Gemma", "lm_head"), UnsupportedError, "lm_head.*no such weight"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str, tmp_path: Path) -> None:
    make, error, message = REFUSED[case]
    model, adapters = make()
    with pytest.raises(error, match=message):
        fl.save_gguf(tmp_path / "a.gguf", adapters, model)
    assert not list(tmp_path.iterdir())


Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "dtype", "error", "message"),
    [
        ({"a": float("nan")}, torch.float32, NonFiniteError, "q_proj.weight': a contains NaN"),
        ({"b": 1e5}, torch.float16, NonFiniteError, r"q_proj.weight': b reaches .*beyond.*float16 \(65504\).*float32"),
        ({"b": 1e-12}, torch.float16, NonFiniteError, "b reaches .*rounds to 0"),
        ({"scaling": 0.0}, torch.float32, ParamsError, "scaling 0, so it has no effect"),
        ({"scaling": 1e-60}, torch.float32, NonFiniteError, "alpha=0"),
        ({"scaling": 3e38}, torch.float32, NonFiniteError, "alpha=inf"),
        ({}, torch.bfloat16, ConfigError, "dtype: expected torch.float32 or torch.float16, got torch.bfloat16"),
        ({"a": torch.ones(2, 5)}, torch.float32, ParamsError, r"q_proj.*a has shape \[2, 5\]"),
    ],
)
def test_bad_numbers(
    change: dict[str, Any], dtype: torch.dtype, error: type[Exception], message: str, tmp_path: Path
) -> None:
    model = build("Llama")
    given: dict[str, Any] = {"a": torch.ones(2, 16), "b": torch.ones(16, 2), "scaling": 1.0}
    for leaf, value in change.items():
        given[leaf] = value * given[leaf] if leaf in "ab" and not isinstance(value, Tensor) else value
    (tmp_path / "a.gguf").write_text("old")
    with pytest.raises(error, match=message):
        fl.save_gguf(tmp_path / "a.gguf", {Q: fl.LoRA(**given)}, model, dtype=dtype)
    assert (tmp_path / "a.gguf").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_names_that_are_not_there(tmp_path: Path) -> None:
    model = build("Llama")
    rule = fl.LoRA(torch.ones(2, 16), torch.ones(16, 2))
    with pytest.raises(ConfigError, match="no low-rank adapter"):
        fl.save_gguf(tmp_path / "a.gguf", {}, model)
    with pytest.raises(UnsupportedError, match=r"'model.nothing.weight' cannot be written.*no such weight"):
        fl.save_gguf(tmp_path / "a.gguf", {"model.nothing.weight": rule}, model)
    with pytest.raises(ParamsError, match=r"q_proj.*a has shape"):
        fl.save_gguf(tmp_path / "a.gguf", {Q: fl.LoRA(torch.ones(3, 2, 16), torch.ones(3, 16, 2))}, model)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    model = build("Llama")
    adapters, _ = lora(model)
    (tmp_path / "file").write_text("here")
    with pytest.raises(OSError, match="file"):
        fl.save_gguf(tmp_path / "file" / "a.gguf", adapters, model)
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        fl.save_gguf(tmp_path / "folder", adapters, model)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


# Files of others, broken and odd.


def rewrite(file: Path, tensors: dict[str, Any], qtype: Any = None, **changes: Any) -> None:
    given = {"arch": "llama", "type": "adapter", "kind": "lora", "alpha": 5.0} | changes
    writer = gguf.GGUFWriter(file, given["arch"])
    writer.add_string("general.type", given["type"])
    writer.add_string("adapter.type", given["kind"])
    if given["alpha"] is not None:
        writer.add_float32("adapter.lora.alpha", given["alpha"])
    if "tokens" in given:
        writer.add_array("adapter.alora.invocation_tokens", given["tokens"])
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor, raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


A, B = np.ones((2, 16), np.float32), np.ones((16, 2), np.float32)
PAIR = {"blk.0.attn_q.weight.lora_a": A, "blk.0.attn_q.weight.lora_b": B}
ODD: list[tuple[dict[str, Any], dict[str, Any], type[Exception], str]] = [
    (PAIR, {"arch": "qwen2"}, FormatError, "the adapter is for 'qwen2', but LlamaForCausalLM is 'llama'"),
    (PAIR, {"type": "model"}, FormatError, "general.type: expected 'adapter', got 'model'"),
    (PAIR, {"kind": "other"}, FormatError, "adapter.type: expected 'lora', got 'other'"),
    (PAIR, {"tokens": [1, 2]}, UnsupportedError, "aLoRA is not supported"),
    (PAIR, {"alpha": float("inf")}, NonFiniteError, "alpha is inf"),
    ({}, {}, FormatError, "no tensors"),
    ({"blk.0.attn_q.weight.lora_a": A}, {}, FormatError, "no 'blk.0.attn_q.weight.lora_b'"),
    (PAIR | {"blk.0.attn_norm.weight": A[0]}, {}, UnsupportedError, "'blk.0.attn_norm.weight' is not a factor"),
    ({k.replace("0", "7"): t for k, t in PAIR.items()}, {}, FormatError, "has no weight 'blk.7.attn_q.weight'"),
    (PAIR | {"blk.0.attn_q.weight.lora_a": A.T}, {}, FormatError, r"lora_a' has shape \[16, 2\], expected \[2, 16\]"),
    (PAIR | {"blk.0.attn_q.weight.lora_b": B[:8]}, {}, FormatError, r"lora_b' has shape \[8, 2\], expected \[16, 2\]"),
    (PAIR | {"blk.0.attn_q.weight.lora_a": A * np.nan}, {}, NonFiniteError, "lora_a' contains NaN"),
]


@pytest.mark.parametrize(("tensors", "changes", "error", "message"), ODD, ids=[case[3][:20] for case in ODD])
def test_files_that_do_not_fit(
    tensors: dict[str, Any], changes: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    rewrite(tmp_path / "a.gguf", tensors, **changes)
    with pytest.raises(error, match=message) as caught:
        fl.load_gguf(tmp_path / "a.gguf", build("Llama"))
    assert str(tmp_path / "a.gguf") in str(caught.value)


def test_a_table_that_llama_cpp_would_stop_at_is_not_read(tmp_path: Path) -> None:
    rewrite(tmp_path / "a.gguf", {"token_embd.weight.lora_a": np.ones((17, 2), np.float32),
                                  "token_embd.weight.lora_b": B})  # fmt: skip
    with pytest.raises(UnsupportedError, match=r"'model.embed_tokens.weight' cannot be read.*tied"):
        fl.load_gguf(tmp_path / "a.gguf", build("Llama", tie_word_embeddings=True))


@pytest.mark.parametrize("alpha", [0.0, None])
def test_without_alpha_the_scale_is_one(alpha: float | None, tmp_path: Path) -> None:
    rewrite(tmp_path / "a.gguf", PAIR, alpha=alpha)
    loaded, config = fl.load_gguf(tmp_path / "a.gguf", build("Llama"))
    assert loaded[Q].scaling == 1
    assert (config.r, config.lora_alpha) == (2, 2)


def test_cut_and_damaged_files(tmp_path: Path) -> None:
    model = build("Llama")
    rewrite(tmp_path / "a.gguf", PAIR)
    whole = (tmp_path / "a.gguf").read_bytes()
    file = tmp_path / "b.gguf"
    for length in [*range(0, len(whole) - 1, 7), len(whole) - 1]:
        file.write_bytes(whole[:length])
        with pytest.raises(FuncloraError, match=r"b\.gguf"):
            fl.load_gguf(file, model)
    generator = np.random.default_rng(0)
    head = len(whole) - A.nbytes - B.nbytes
    complaints: list[str] = []
    for position in range(0, head, 3):
        damaged = bytearray(whole)
        damaged[position] ^= int(generator.integers(1, 256))
        file.write_bytes(bytes(damaged))
        try:
            fl.load_gguf(file, model)
        except FuncloraError as error:
            complaints.append(str(error))
    assert len(complaints) > 50
    assert all(str(file) in complaint for complaint in complaints)
    file.write_bytes(whole[:8] + struct.pack("<QQ", 2**63, 2**63) + whole[24:])
    with pytest.raises(FormatError, match="broken or cut off"):
        fl.load_gguf(file, model)
    with pytest.raises(FormatError, match="no such file"):
        fl.load_gguf(tmp_path / "missing.gguf", model)


def test_big_endian_files(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 4.0)
    for name, tensor in PAIR.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedError, match="byte order"):
        fl.load_gguf(tmp_path / "a.gguf", build("Llama"))


def test_the_package_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'funclora\[gguf\]'"):
        fl.load_gguf(tmp_path / "a.gguf", build("Llama"))
