"""Folders that are broken, of another kind, or ask for what the rules cannot give: each has its own error."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from funclora import LoraConfig, apply, base_params, init
from funclora.errors import (
    FormatError,
    FuncloraError,
    NonFiniteError,
    PeftFormatWarning,
    TargetError,
    UnsupportedError,
)
from funclora.io.peft.folder import load_peft, save_peft
from funclora.rules.base import Rule

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
Q = "base_model.model.layers.0.q_proj"
Tensors = dict[str, Tensor]


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(4, 3)
        self.experts = nn.ParameterDict({"up": nn.Parameter(torch.randn(2, 3, 4))})


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.conv = nn.Conv1d(4, 3, 2)
        self.head = nn.Linear(3, 2)


PLAIN: dict[str, Any] = {"target_modules": ["q_proj"]}
EVERYTHING = PLAIN | {"use_dora": True, "bias": "lora_only", "modules_to_save": ["head"]}
EXPERTS = {"target_modules": [], "target_parameters": ["up"]}


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Model()


def write(folder: Path, model: nn.Module, **config: Any) -> dict[str, Rule]:
    made = LoraConfig(**{"r": 2, "lora_alpha": 4, "init_lora_weights": False} | config)
    adapters = init(model, made, generator=torch.Generator().manual_seed(0))
    save_peft(folder, adapters, made)
    return adapters


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the configuration: by side effect, or by returning another one."""
    raw = json.loads((folder / CONFIG).read_text())
    changed = change(raw)
    (folder / CONFIG).write_text(json.dumps(raw if changed is None else changed))


def edit_tensors(folder: Path, change: Callable[[Tensors], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, folder / WEIGHTS, {"format": "pt"})


def put(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda raw: raw.update(fields)


def drop(*names: str) -> Callable[[dict[str, Any]], None]:
    def change(raw: dict[str, Any]) -> None:
        for name in names:
            del raw[name]

    return change


# --- files -----------------------------------------------------------------------------------------------------


def test_a_missing_folder(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"nowhere: there is no such folder"):
        load_peft(tmp_path / "nowhere", model)


def test_a_missing_configuration(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"there is no adapter_config\.json in this folder\.$"):
        load_peft(tmp_path, model)
    write(tmp_path / "style", model, **PLAIN)
    with pytest.raises(FormatError, match=r"named adapters in folders of their own: .*style\.$"):
        load_peft(tmp_path, model)


def test_missing_tensors(model: nn.Module, tmp_path: Path) -> None:
    write(tmp_path, model, **PLAIN)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(FormatError, match=r"there is no adapter_model\.safetensors"):
        load_peft(tmp_path, model)


def test_a_pickle_is_never_read(model: nn.Module, tmp_path: Path) -> None:
    write(tmp_path, model, **PLAIN)
    (tmp_path / WEIGHTS).rename(tmp_path / "adapter_model.bin")
    with pytest.raises(UnsupportedError, match=r"adapter_model\.bin is a pickle.*safe_serialization=True"):
        load_peft(tmp_path, model)


@pytest.mark.parametrize("text", ["", "{", "[1, 2", "\x00", '{"r": }', "[" * 100_000])
def test_a_configuration_that_is_not_json(text: str, model: nn.Module, tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text(text)
    with pytest.raises(FormatError, match=r"adapter_config\.json: this is not JSON"):
        load_peft(tmp_path, model)


def test_a_configuration_that_is_not_text(model: nn.Module, tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_bytes(b"\xff\xfe{}")
    with pytest.raises(FormatError, match=r"adapter_config\.json: this is not JSON"):
        load_peft(tmp_path, model)


@pytest.mark.parametrize("value", [[], None, 3, "LORA", [{"r": 8}]])
def test_a_configuration_that_is_not_an_object(value: Any, model: nn.Module, tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text(json.dumps(value))
    with pytest.raises(FormatError, match="expected a JSON object"):
        load_peft(tmp_path, model)


@pytest.mark.parametrize("cut", [0, 4, 8, 100, -1])
def test_tensors_that_are_cut_off(cut: int, model: nn.Module, tmp_path: Path) -> None:
    write(tmp_path, model, **PLAIN)
    content = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(content[:cut])
    with pytest.raises(FormatError, match=r"adapter_model\.safetensors: this is not a safetensors file, or it is cut"):
        load_peft(tmp_path, model)


# --- the configuration -----------------------------------------------------------------------------------------

BAD_CONFIG: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no type": (drop("peft_type"), "peft_type: expected 'LORA', but it is missing"),
    "lower case": (put(peft_type="lora"), "peft_type: expected 'LORA', got 'lora'"),
    "other method": (put(peft_type="IA3"), "got 'IA3'. Only LoRA and DoRA"),
    "null type": (put(peft_type=None), "got None"),
    "no rank": (drop("r"), r"r is missing"),
    "null rank": (put(r=None), r"r: expected a positive integer, got None"),
    "zero rank": (put(r=0), "r: expected a positive integer, got 0"),
    "negative rank": (put(r=-2), "r: expected a positive integer, got -2"),
    "float rank": (put(r=2.0), r"r: expected a positive integer, got 2\.0"),
    "text rank": (put(r="2"), "r: expected a positive integer, got '2'"),
    "bool rank": (put(r=True), "r: expected a positive integer, got True"),
    "text alpha": (put(lora_alpha="4"), "lora_alpha: expected a finite number, got '4'"),
    "null alpha": (put(lora_alpha=None), "lora_alpha: expected a finite number, got None"),
    "infinite alpha": (put(lora_alpha=float("inf")), "lora_alpha: expected a finite number, got inf"),
    "alpha that overflows": (put(lora_alpha=1e308), r"lora_alpha: 1e\+308 .* float32 cannot represent"),
    "huge alpha": (put(lora_alpha=10**400), r"adapter_config\.json: "),
    "dropout": (put(lora_dropout=1.5), r"lora_dropout: expected a number in \[0, 1\)"),
    "bias": (put(bias="some"), "bias: expected one of 'none', 'all', 'lora_only'"),
    "no targets": (drop("target_modules"), "name what to adapt"),
    "null targets": (put(target_modules=None), "name what to adapt"),
    "empty targets": (put(target_modules=[]), "name what to adapt"),
    "targets as an object": (put(target_modules={"q_proj": 1}), "target_modules: expected a list"),
    "targets as numbers": (put(target_modules=[1]), "target_modules: expected non-empty strings, got 1"),
    "broken expression": (put(target_modules="(q_proj"), "target_modules: .* is not a regular expression"),
    "broken pattern": (put(rank_pattern={"(": 2}), "rank_pattern: .* is not a regular expression"),
    "rank of a pattern": (put(rank_pattern={"q_proj": "2"}), r"rank_pattern\['q_proj'\]: expected a positive integer"),
    "alpha of a pattern": (put(alpha_pattern={"q_proj": None}), r"alpha_pattern\['q_proj'\]: expected a finite number"),
    "pattern as a list": (put(rank_pattern=["q_proj"]), "rank_pattern: expected a dict"),
    "layers with an expression": (put(target_modules=".*q_proj", layers_to_transform=[0]), "layers_to_transform needs"),
    "layers as text": (put(layers_to_transform="0"), "layers_to_transform: expected an index"),
    "pattern without layers": (put(layers_pattern="layers"), "layers_pattern needs layers_to_transform"),
    "modules as text": (put(modules_to_save="head"), "modules_to_save: expected a list"),
    "parameters as text": (put(target_parameters="up"), "target_parameters: expected a list"),
    "task": (put(task_type="POETRY"), "task_type: expected one of"),
    "base model": (put(base_model_name_or_path=3), "base_model_name_or_path: expected a string, got 3"),
    "initialiser": (put(init_lora_weights=3), "init_lora_weights: expected one of"),
    "flag": (put(use_dora="yes"), "use_dora: expected True or False, got 'yes'"),
    "parentheses": (put(target_modules="(" * 5000 + ")" * 5000), "expression: too many nested parentheses"),
    "repetition": (put(target_modules="x{99999999999999999999}"), "is not a regular expression: the repetition"),
    "flags": (put(rank_pattern={"(?i)q_proj": 2}), "rank_pattern: .*is not a regular expression: global flags"),
    "rank beyond floats": (put(r=10**400, use_rslora=True), "r: expected a rank up to 2147483647, got one with"),
    "alpha that vanishes": (put(lora_alpha=5e-324), "lora_alpha: 5e-324 .* float32 cannot represent"),
    "layers": (put(layers_pattern="(", layers_to_transform=[0]), r"layers_pattern: '\(' is not a regular expression"),
    "layers that name the index": (
        put(layers_pattern="(?P<idx>a)", layers_to_transform=[0]), "layers_pattern: .* redefinition of group name",
    ),
    "slow layers": (put(layers_pattern="(.*)*", layers_to_transform=[0]), "may not terminate"),
    "odd rank": (put(r=3, init_lora_weights="orthogonal"), "orthogonal.* needs even ranks"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CONFIG)
def test_a_broken_configuration(name: str, model: nn.Module, tmp_path: Path) -> None:
    change, message = BAD_CONFIG[name]
    write(tmp_path, model, **PLAIN)
    edit(tmp_path, change)
    with pytest.raises(FormatError, match=message) as caught:
        load_peft(tmp_path, model)
    assert str(tmp_path / CONFIG) in str(caught.value)


UNSUPPORTED: dict[str, Any] = {
    "alora_invocation_tokens": [1, 2],
    "arrow_config": {"top_k": 3},
    "corda_config": {"cache_file": None},
    "kasa_config": {"beta": 1e-4},
    "layer_replication": [[0, 1]],
    "lora_ga_config": {"scale": "unit"},
    "megatron_config": {"x": 1},
    "monteclora_config": {"x": 1},
    "use_bdlora": {"nblocks": 2},
    "use_qalora": True,
    "velora_config": {"num_groups": 2},
}


@pytest.mark.parametrize("field", UNSUPPORTED)
def test_a_field_that_changes_the_maths(field: str, model: nn.Module, tmp_path: Path) -> None:
    write(tmp_path, model, **PLAIN)
    empties: list[Any] = [None, False, [], {}]
    for empty in empties:
        edit(tmp_path, put(**{field: empty}))
        load_peft(tmp_path, model)
    edit(tmp_path, put(**{field: UNSUPPORTED[field]}))
    with pytest.raises(UnsupportedError, match=rf"adapter_config\.json: {field}=.* is not supported"):
        load_peft(tmp_path, model)


@pytest.mark.parametrize("kind", ["pissa_niter_4", "corda", "lora_ga", "mica", "other"])
def test_an_initialiser_that_may_change_the_base(kind: str, model: nn.Module, tmp_path: Path) -> None:
    write(tmp_path, model, **PLAIN)
    edit(tmp_path, put(init_lora_weights=kind))
    with pytest.raises(UnsupportedError, match=f"init_lora_weights='{kind}'.*path_initial_model_for_weight_conversion"):
        load_peft(tmp_path, model)


@pytest.mark.parametrize("kind", [True, False, "gaussian", "orthogonal", "eva"])
def test_an_initialiser_that_does_not(kind: Any, model: nn.Module, tmp_path: Path) -> None:
    write(tmp_path, model, **PLAIN)
    edit(tmp_path, put(init_lora_weights=kind))
    assert load_peft(tmp_path, model)[1].init_lora_weights == kind


HARMLESS = {
    "auto_mapping": {"base_model_class": "Model"}, "eva_config": {"rho": 2.0}, "loftq_config": {"loftq_bits": 4},
    "fan_in_fan_out": True, "inference_mode": False, "r_": None,
    "megatron_core": "megatron.core", "peft_version": "0.99", "qalora_group_size": 32, "revision": "main",
    "runtime_config": {"ephemeral_gpu_offload": True}, "new_flag": False, "new_list": [], "new_dict": {},
    "new_text": "", "exclude_modules": [], "layers_to_transform": [], "layers_pattern": [], "rank_pattern": None,
    "alpha_pattern": None, "modules_to_save": [], "target_parameters": [], "task_type": None, "use_rslora": None,
}  # fmt: skip


def test_fields_without_effect(model: nn.Module, tmp_path: Path) -> None:
    adapters = write(tmp_path, model, **PLAIN)
    edit(tmp_path, put(**HARMLESS))
    same(load_peft(tmp_path, model)[0], adapters)


def test_unknown_fields_are_named(model: nn.Module, tmp_path: Path) -> None:
    adapters = write(tmp_path, model, **PLAIN)
    edit(tmp_path, put(new_trick=True, another={"x": 1}))
    with pytest.warns(PeftFormatWarning, match=r"unknown fields are ignored.*: another, new_trick\."):
        same(load_peft(tmp_path, model)[0], adapters)


def test_a_missing_alpha_is_eight(model: nn.Module, tmp_path: Path) -> None:
    write(tmp_path, model, **PLAIN)
    edit(tmp_path, drop("lora_alpha"))
    with pytest.warns(PeftFormatWarning, match="lora_alpha is missing; PEFT takes 8"):
        adapters, config = load_peft(tmp_path, model)
    assert config.lora_alpha == 8
    assert all(rule.scaling == 4 for rule in adapters.values())


def test_the_smallest_configuration(model: nn.Module, tmp_path: Path) -> None:
    adapters = write(tmp_path, model, **PLAIN)
    (tmp_path / CONFIG).write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}')
    same(load_peft(tmp_path, model)[0], adapters)


NO_FIT: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "targets": (put(target_modules=["k_proj"]), "nothing is left to adapt.*'k_proj' matches no module"),
    "expression": (put(target_modules="q_proj"), "matches no full name of a module"),
    "kind of module": (put(target_modules=["layers"]), "which is not supported"),
}


@pytest.mark.parametrize("name", NO_FIT)
def test_a_configuration_for_another_model(name: str, model: nn.Module, tmp_path: Path) -> None:
    change, message = NO_FIT[name]
    write(tmp_path, model, **PLAIN)
    edit(tmp_path, change)
    with pytest.raises(TargetError, match=message) as caught:
        load_peft(tmp_path, model)
    assert str(tmp_path / CONFIG) in str(caught.value)


# PEFT loads these, at most with a warning. The adapter is complete, so nothing can go wrong.
IN_EXCESS: dict[str, tuple[dict[str, Any], str]] = {
    "target": ({"target_modules": ["q_proj", "k_proj"]}, "target_modules: 'k_proj' matches no module"),
    "exclusion": ({"exclude_modules": ["k_proj"]}, "exclude_modules: 'k_proj' matches no module"),
    "expression": ({"exclude_modules": "k_proj"}, "exclude_modules: the regular expression 'k_proj' matches no full"),
    "saved": ({"modules_to_save": ["lm_head"]}, "modules_to_save: 'lm_head' matches no module"),
    "rank": ({"rank_pattern": {"k_proj": 2}}, "rank_pattern: 'k_proj' matches none"),
    "alpha": ({"alpha_pattern": {"^q_proj": 100}}, r"alpha_pattern: '\^q_proj' matches none"),
    "parameter": ({"target_parameters": ["down"]}, "target_parameters: 'down' matches no parameter"),
    "layer": ({"layers_to_transform": [0, 1, 7], "layers_pattern": ["layers"]}, "no target is in layer 7"),
}


@pytest.mark.parametrize("name", IN_EXCESS)
def test_what_matches_nothing_beside_what_does_is_left_out(name: str, model: nn.Module, tmp_path: Path) -> None:
    fields, message = IN_EXCESS[name]
    adapters = write(tmp_path, model, **PLAIN)
    edit(tmp_path, put(**fields))
    with pytest.warns(PeftFormatWarning, match=message):
        found, config = load_peft(tmp_path, model)
    same(found, adapters)
    save_peft(tmp_path / "again", found, config)  # the configuration that comes back agrees with the adapters
    same(load_peft(tmp_path / "again", model)[0], adapters)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_a_bias_mode_without_biases(bias: Any, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 3, bias=False))
    base = copy.deepcopy(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0"], bias=bias, init_lora_weights=False))
    wrapped.save_pretrained(str(tmp_path))
    with pytest.warns(PeftFormatWarning, match=f"bias='{bias}': there is no bias to train"):
        adapters, config = load_peft(tmp_path, base)
    assert config.bias == "none"
    x = torch.randn(5, 4)
    torch.testing.assert_close(apply(base, base_params(base), adapters, x), wrapped.eval()(x))


def test_where_a_tensor_has_no_place_the_entry_that_matches_nothing_is_named(model: nn.Module, tmp_path: Path) -> None:
    write(tmp_path, model, **PLAIN)
    edit(tmp_path, put(target_modules=["q_proj", "k_proj"]))
    edit_tensors(tmp_path, rename(".0.q_proj.", ".0.k_proj."))
    with pytest.raises(FormatError, match="target_modules: 'k_proj' matches no module"):
        load_peft(tmp_path, model)


# --- tensors ---------------------------------------------------------------------------------------------------


def rename(old: str, new: str) -> Callable[[Tensors], Any]:
    def change(tensors: Tensors) -> None:
        for key in [key for key in tensors if old in key]:
            tensors[key.replace(old, new)] = tensors.pop(key)

    return change


def value(key: str, tensor: Tensor) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({key: tensor})


A, B, M = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight", f"{Q}.lora_magnitude_vector"
HEAD = "base_model.model.head.weight"
BAD_TENSORS: dict[str, tuple[Callable[[Tensors], Any], type[FuncloraError], str]] = {
    "half a pair": (drop(B), FormatError, rf"there is no '{B}', which 'layers\.0\.q_proj\.weight'"),
    "no A": (drop(A), FormatError, rf"there is no '{A}'"),
    "no pair": (drop(A, B, M), FormatError, rf"there is no '{A}'"),
    "nothing": (lambda t: t.clear(), FormatError, r"there is no '.*lora_A\.weight'"),
    "no magnitude": (drop(M), FormatError, rf"there is no '{M}'"),
    "no bias": (drop(f"{Q}.base_layer.bias"), FormatError, r"there is no '.*0\.q_proj\.base_layer\.bias'"),
    "no head": (drop(HEAD), FormatError, rf"there is no '{HEAD}', which 'head\.weight' needs"),
    "rank": (value(A, torch.ones(3, 4)), FormatError, r"has 3 rows, expected 2: rank 2 by r and rank_pattern"),
    "rank of B": (value(B, torch.ones(3, 3)), FormatError, r"has shape \[3, 3\], expected \[3, 2\] for 'layers"),
    "inputs": (value(A, torch.ones(2, 5)), FormatError, r"has shape \[2, 5\], expected \[2, 4\]"),
    "transposed": (value(B, torch.ones(2, 3)), FormatError, r"has shape \[2, 3\], expected \[3, 2\]"),
    "dimensions": (value(A, torch.ones(2, 4, 1)), FormatError, r"has shape \[2, 4, 1\]"),
    "number": (value(A, torch.tensor(1.0)), FormatError, "has 0 rows, expected 2"),
    "magnitude": (value(M, torch.ones(1, 3)), FormatError, r"has shape \[1, 3\], expected \[3\]"),
    "head": (value(HEAD, torch.ones(3, 2)), FormatError, r"has shape \[3, 2\], expected \[2, 3\]"),
    "integers": (value(A, torch.ones(2, 4, dtype=torch.int32)), FormatError, r"has dtype I32"),
    "booleans": (value(B, torch.ones(3, 2, dtype=torch.bool)), FormatError, r"has dtype BOOL"),
    "eight bits": (value(B, torch.ones(3, 2).to(torch.float8_e4m3fn)), FormatError, r"has dtype F8_E4M3"),
    "NaN": (value(A, torch.full((2, 4), float("nan"))), NonFiniteError, rf"'{A}' holds NaN or infinity"),
    "infinity": (value(HEAD, torch.full((2, 3), float("inf"))), NonFiniteError, rf"'{HEAD}' holds NaN or infinity"),
    "too large": (value(B, torch.full((3, 2), 1e300, dtype=torch.float64)), NonFiniteError, "infinity in torch.float"),
    "one without prefix": (value("x.lora_A.weight", torch.ones(1)), FormatError, r"'x\.lora_A\.weight' does not start"),
    "nested": (rename("base_model.model.", "base_model.model." * 2), FormatError, rf"there is no '{A}'"),
    "other layer": (value(A.replace("0", "2"), torch.ones(2, 4)), FormatError, "unexpected key.*targets nothing"),
    "bias of B": (value(f"{Q}.lora_B.bias", torch.ones(3)), FormatError, r"unexpected key '.*lora_B\.bias'"),
    "token deltas": (
        value("base_model.model.embed.token_adapter.trainable_tokens_delta", torch.ones(1, 4)), FormatError,
        "unexpected key",
    ),
    "another base weight": (
        value(f"{Q}.base_layer.weight", torch.ones(3, 4)), FormatError, r"other values than 'layers\.0\.q_proj\.w",
    ),
    "base weight of other shape": (
        value("base_model.model.embed.weight", torch.ones(9, 4)), FormatError, r"shape \[9, 4\], expected \[7, 4\]",
    ),
    "base weight without its wrapper": (value(f"{Q}.weight", torch.ones(3, 4)), FormatError, "unexpected key"),
    "other copy of a saved bias": (
        value("base_model.model.head.modules_to_save.bias", torch.ones(2)), FormatError,
        "other values than 'head.bias'",
    ),
    "other original of a saved bias": (
        value("base_model.model.head.original_module.bias", torch.ones(2)), FormatError,
        "other values than 'head.bias'",
    ),
    "copy of what is not saved": (
        value("base_model.model.conv.modules_to_save.bias", torch.ones(3)), FormatError, "unexpected key",
    ),
    "twice": (value(f"{Q}.lora_A.default.weight", torch.ones(2, 4)), FormatError, "there twice"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_broken_tensors(name: str, model: nn.Module, tmp_path: Path) -> None:
    change, error, message = BAD_TENSORS[name]
    write(tmp_path, model, **EVERYTHING)
    edit_tensors(tmp_path, change)
    with pytest.raises(error, match=message) as caught:
        load_peft(tmp_path, model)
    assert str(tmp_path / WEIGHTS) in str(caught.value)


MISFITS: dict[str, tuple[dict[str, Any], Callable[[dict[str, Any]], Any], str]] = {
    "rank": (PLAIN, put(r=4), "has 2 rows, expected 4: rank 4"),
    "huge rank": (PLAIN, put(r=10**9), "has 2 rows, expected 1000000000"),
    "rank of a pattern": (PLAIN, put(rank_pattern={"q_proj": 4}), "expected 4.*PEFT sorts rank_pattern"),
    "rank of experts": (EXPERTS, put(r=1), "has 4 rows, expected 2: rank 1 .*, 2 experts"),
    "no DoRA": (EVERYTHING, put(use_dora=False), r"unexpected key '.*magnitude_vector'.*use_dora is false"),
    "DoRA": (PLAIN, put(use_dora=True), r"there is no '.*lora_magnitude_vector'"),
    "bias": (PLAIN, put(bias="all"), r"there is no '.*q_proj\.base_layer\.bias'"),
    "modules": (
        PLAIN,
        put(target_modules=["q_proj", "head"]),
        r"there is no 'base_model\.model\.head\.lora_A\.weight'",
    ),
    "fewer modules": (PLAIN, put(exclude_modules=["1.q_proj"]), r"unexpected key '.*1\.q_proj\.lora_A\.weight'"),
    "saved": (EVERYTHING, put(modules_to_save=None), r"'base_model\.model\.head\.(weight|bias)' holds other values"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_files_that_do_not_fit_each_other(name: str, model: nn.Module, tmp_path: Path) -> None:
    config, change, message = MISFITS[name]
    write(tmp_path, model, **config)
    edit_tensors(tmp_path, lambda tensors: [t.add_(1) for t in tensors.values()])
    edit(tmp_path, change)
    with pytest.raises(FormatError, match=message):
        load_peft(tmp_path, model)


def test_unexpected_keys_are_explained(model: nn.Module, tmp_path: Path) -> None:
    write(tmp_path, model, **PLAIN)
    edit_tensors(tmp_path, value("base_model.model.base_model.model.x.lora_A.weight", torch.ones(1)))
    with pytest.raises(FormatError, match="adapter around an adapter"):
        load_peft(tmp_path, model)


# --- what PEFT computes and we cannot --------------------------------------------------------------------------

OTHER_MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "groups": (lambda: nn.Conv1d(4, 4, 2, groups=2), {}, "mixes the groups"),
    "dilation": (lambda: nn.Conv1d(4, 4, 2, dilation=2), {}, "leaves the dilation out"),
    "padding mode": (lambda: nn.Conv1d(4, 4, 2, padding=1, padding_mode="circular"), {}, "padding_mode='circular'"),
    "max_norm": (lambda: nn.Embedding(4, 4, max_norm=1.0), {}, "max_norm"),
    "transposed convolution": (lambda: nn.ConvTranspose1d(4, 4, 2), {}, "transposed convolutions"),
    "recurrent": (lambda: nn.LSTM(4, 4), {}, "recurrent layers"),
    "attention with DoRA": (lambda: nn.MultiheadAttention(4, 2), {"use_dora": True}, "no DoRA for nn.Multihead"),
    "attention of three widths": (lambda: nn.MultiheadAttention(4, 2, kdim=3), {}, "kdim and vdim are embed_dim"),
    "attention's parameter": (
        lambda: nn.MultiheadAttention(4, 2), {"target_modules": [], "target_parameters": ["in_proj_weight"]},
        "layout Attention through target_parameters",
    ),
    "two parameters of a layer": (
        lambda: _with_parameter(nn.Linear(4, 4)), {"target_modules": [], "target_parameters": ["0.weight", "0.extra"]},
        "do not give that order",
    ),
    "four dimensions": (
        lambda: _with_parameter(nn.Identity(), 2, 2, 4, 4), {"target_modules": [], "target_parameters": ["extra"]},
        "this one has 4",
    ),
    "parameter with DoRA": (
        lambda: _with_parameter(nn.Identity()),
        {"target_modules": [], "target_parameters": ["extra"], "use_dora": True}, "no DoRA for target_parameters",
    ),
    "parameter with dropout": (
        lambda: _with_parameter(nn.Identity()),
        {"target_modules": [], "target_parameters": ["extra"], "lora_dropout": 0.1}, "lora_dropout must be 0",
    ),
}  # fmt: skip


def _with_parameter(module: nn.Module, *shape: int) -> nn.Module:
    module.extra = nn.Parameter(torch.randn(shape or (4, 4)))
    return module


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_what_no_rule_equals_is_not_read(name: str, tmp_path: Path) -> None:
    make, config, message = OTHER_MODELS[name]
    raw = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["0"]} | config
    (tmp_path / CONFIG).write_text(json.dumps(raw))
    save_file({}, tmp_path / WEIGHTS)
    with pytest.raises(UnsupportedError, match=rf"cannot be read: .*{message}"):
        load_peft(tmp_path, nn.Sequential(make()))


def test_the_model_itself_is_not_read(tmp_path: Path) -> None:
    raw = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": "all-linear"}
    (tmp_path / CONFIG).write_text(json.dumps(raw))
    save_file({}, tmp_path / WEIGHTS)
    with pytest.raises(UnsupportedError, match="parameters of the model itself"):
        load_peft(tmp_path, nn.Linear(3, 3))


# --- other forms that PEFT reads -------------------------------------------------------------------------------


def same(loaded: dict[str, Rule], adapters: dict[str, Rule]) -> None:
    assert pytree.tree_structure(loaded) == pytree.tree_structure(adapters)
    assert all(torch.equal(x, y) for x, y in zip(*map(pytree.tree_leaves, (loaded, adapters)), strict=True))


@pytest.mark.parametrize("adapter", ["default", "style"])
def test_keys_with_the_name_of_the_adapter(adapter: str, model: nn.Module, tmp_path: Path) -> None:
    config = PLAIN | {"target_modules": ["q_proj", "embed", "conv"], "use_dora": True}
    adapters = write(tmp_path, model, **config)

    def insert(tensors: Tensors) -> None:
        for key in list(tensors):
            new = key.replace(".lora_magnitude_vector", f".lora_magnitude_vector.{adapter}.weight")
            new = new.replace(".weight", f".{adapter}.weight") if "lora_magnitude" not in key else new
            new = f"{key}.{adapter}" if "lora_embedding" in key else new
            tensors[new] = tensors.pop(key)

    edit_tensors(tmp_path, insert)
    assert f"{Q}.lora_A.{adapter}.weight" in load_file(tmp_path / WEIGHTS)
    same(load_peft(tmp_path, model)[0], adapters)


def test_a_magnitude_as_its_module_keeps_it(model: nn.Module, tmp_path: Path) -> None:
    adapters = write(tmp_path, model, **EVERYTHING)
    edit_tensors(tmp_path, rename("lora_magnitude_vector", "lora_magnitude_vector.weight"))
    same(load_peft(tmp_path, model)[0], adapters)


def test_base_weights_that_are_those_of_the_model(model: nn.Module, tmp_path: Path) -> None:
    adapters = write(tmp_path, model, **PLAIN | {"target_modules": ["embed"], "modules_to_save": ["head"]})
    state = model.state_dict()
    head = adapters["head.bias"].value  # type: ignore[attr-defined]
    edit_tensors(tmp_path, put(**{
        "base_model.model.embed.base_layer.weight": state["embed.weight"],
        "base_model.model.conv.bias": state["conv.bias"],
        "base_model.model.head.original_module.bias": state["head.bias"],
        "base_model.model.head.modules_to_save.bias": head,
    }))  # fmt: skip
    same(load_peft(tmp_path, model)[0], adapters)


def test_base_weights_that_cannot_be_compared(model: nn.Module, tmp_path: Path) -> None:
    write(tmp_path, model, **PLAIN)
    edit_tensors(tmp_path, value("base_model.model.conv.bias", torch.ones(3)))
    with pytest.raises(FormatError, match=r"other values than 'conv\.bias'"):
        load_peft(tmp_path, model.to("meta"))


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("base", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dtypes(stored: torch.dtype, base: torch.dtype, model: nn.Module, tmp_path: Path) -> None:
    write(tmp_path, model, **EVERYTHING)
    edit_tensors(tmp_path, lambda tensors: tensors.update({k: v.to(stored) for k, v in tensors.items()}))

    adapters, _ = load_peft(tmp_path, model.to(base))

    wide = torch.float64 if base == torch.float64 else torch.float32
    rule: Any = adapters["layers.0.q_proj.weight"]
    full: Any = adapters["head.weight"]
    assert rule.a.dtype == rule.b.dtype == rule.magnitude.dtype == wide
    assert full.value.dtype == base
    assert torch.equal(rule.a, load_file(tmp_path / WEIGHTS)[A].to(wide))


def test_a_model_without_storage(model: nn.Module, tmp_path: Path) -> None:
    adapters = write(tmp_path, model, **EVERYTHING)
    same(load_peft(tmp_path, model.to("meta"))[0], adapters)


def test_experts_without_target_modules(model: nn.Module, tmp_path: Path) -> None:
    adapters = write(tmp_path, model, **EXPERTS)
    edit(tmp_path, put(target_modules=None))
    same(load_peft(tmp_path, model)[0], adapters)


# --- anything else ---------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.sampled_from(["q_proj", "all-linear", "(", ""]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["q_proj", "x"]), inner, max_size=2),
    max_leaves=4,
)
FIELDS = sorted({*UNSUPPORTED, *HARMLESS, "r", "lora_alpha", "target_modules", "use_dora", "bias", "peft_type",
                 "lora_dropout", "init_lora_weights", "base_model_name_or_path", "trainable_token_indices", "lora_bias",
                 "ensure_weight_tying"})  # fmt: skip


@settings(max_examples=100)
@given(st.dictionaries(st.sampled_from(FIELDS), JSON, min_size=1, max_size=2))
def test_no_configuration_gives_another_kind_of_error(
    tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any]
) -> None:
    folder, model = tmp_path_factory.mktemp("any"), Model()
    write(folder, model, **PLAIN)
    edit(folder, put(**changes))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PeftFormatWarning)
        try:
            load_peft(folder, model)
        except FuncloraError as error:
            assert str(folder) in str(error)  # noqa: PT017 (it may also load)


@settings(max_examples=60)
@given(st.data())
def test_no_file_of_tensors_gives_another_kind_of_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder, model = tmp_path_factory.mktemp("any"), Model()
    write(folder, model, **PLAIN)
    content = bytearray((folder / WEIGHTS).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (folder / WEIGHTS).write_bytes(content)
    try:
        load_peft(folder, model)
    except FuncloraError as error:
        assert str(folder) in str(error)  # noqa: PT017 (it may also load)
