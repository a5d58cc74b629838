"""The folders that `save_peft` writes: keys, shapes, configuration; what it refuses; what a failure leaves."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from funclora import DoRA, Full, LoRA, LoraConfig, init
from funclora._files import atomic as _files
from funclora.errors import ConfigError, NonFiniteError, ParamsError, UnsupportedError
from funclora.io.peft.folder import load_peft, save_peft
from funclora.rules.base import Rule
from funclora.rules.layouts import Attention, Conv, ConvTranspose, Embedding, Layout, Linear, Parameter, Recurrent

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(4, 3)
        self.norm = nn.LayerNorm(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.q_proj(x))


class Experts(nn.Module):
    """Three experts with two stacked weights, the second one in the alphabet first."""

    def __init__(self, shape: tuple[int, ...] = (3, 4, 5), *, transposed: bool = False) -> None:
        super().__init__()
        self.is_transposed = transposed
        self.up = nn.Parameter(torch.randn(shape))
        self.down = nn.Parameter(torch.randn(shape))
        self.gate = nn.Linear(5, 2)
        self.bias = nn.Parameter(torch.randn(4))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.layers = nn.ModuleList([Block(), Block()])
        self.conv = nn.Conv2d(4, 3, (2, 1))
        self.experts = Experts()
        self.head = nn.Linear(3, 2)


def conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return nn.Sequential(Conv1D(3, 5))


def make(model: nn.Module, **config: Any) -> tuple[dict[str, Rule], LoraConfig]:
    made = LoraConfig(**{"r": 2, "lora_alpha": 4} | config)
    return init(model, made, generator=torch.Generator().manual_seed(0)), made


def saved(folder: Path, model: nn.Module, **config: Any) -> dict[str, list[int]]:
    """The keys of a saved folder, without the prefix, and the shapes of the tensors."""
    save_peft(folder, *make(model, **config))
    stored = load_file(folder / WEIGHTS)
    assert all(key.startswith("base_model.model.") for key in stored)
    return {key.removeprefix("base_model.model."): list(value.shape) for key, value in stored.items()}


# --- keys and shapes -------------------------------------------------------------------------------------------

KEYS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], dict[str, list[int]]]] = {
    "linear": (Model, {"target_modules": ["layers.1.q_proj"]}, {
        "layers.1.q_proj.lora_A.weight": [2, 4],
        "layers.1.q_proj.lora_B.weight": [3, 2],
    }),
    "linear-dora": (Model, {"target_modules": ["head"], "use_dora": True}, {
        "head.lora_A.weight": [2, 3],
        "head.lora_B.weight": [2, 2],
        "head.lora_magnitude_vector": [2],
    }),
    "hf-conv1d": (conv1d, {"target_modules": ["0"], "use_dora": True}, {
        "0.lora_A.weight": [2, 5],
        "0.lora_B.weight": [3, 2],
        "0.lora_magnitude_vector": [3],
    }),
    "embedding": (Model, {"target_modules": ["embed"], "use_dora": True}, {
        "embed.lora_embedding_A": [2, 7],
        "embed.lora_embedding_B": [4, 2],
        "embed.lora_magnitude_vector": [4],
    }),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(4, 3, 5)), {"target_modules": ["0"], "use_dora": True}, {
        "0.lora_A.weight": [2, 4, 5],
        "0.lora_B.weight": [3, 2, 1],
        "0.lora_magnitude_vector": [1, 3, 1],
    }),
    "conv2d": (Model, {"target_modules": ["conv"], "use_dora": True}, {
        "conv.lora_A.weight": [2, 4, 2, 1],
        "conv.lora_B.weight": [3, 2, 1, 1],
        "conv.lora_magnitude_vector": [1, 3, 1, 1],
    }),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(4, 3, 2)), {"target_modules": ["0"], "use_dora": True}, {
        "0.lora_A.weight": [2, 4, 2, 2, 2],
        "0.lora_B.weight": [3, 2, 1, 1, 1],
        "0.lora_magnitude_vector": [1, 3, 1, 1, 1],
    }),
    "experts": (Model, {"target_parameters": ["up", "down"]}, {
        "experts.base_layer.lora_A.weight": [6, 5],
        "experts.base_layer.lora_B.weight": [4, 6],
        "experts.lora_A.weight": [6, 5],
        "experts.lora_B.weight": [4, 6],
    }),
    "one-of-the-experts": (Model, {"target_parameters": ["up"], "rank_pattern": {"up": 1}}, {
        "experts.lora_A.weight": [3, 5],
        "experts.lora_B.weight": [4, 3],
    }),
    "below-an-adapted-module": (
        Model, {"target_modules": ["gate"], "target_parameters": ["up", "down"], "bias": "lora_only"}, {
            "experts.base_layer.base_layer.bias": [4],
            "experts.base_layer.base_layer.gate.base_layer.bias": [2],
            "experts.base_layer.base_layer.gate.lora_A.weight": [2, 5],
            "experts.base_layer.base_layer.gate.lora_B.weight": [2, 2],
            "experts.base_layer.lora_A.weight": [6, 5],
            "experts.base_layer.lora_B.weight": [4, 6],
            "experts.lora_A.weight": [6, 5],
            "experts.lora_B.weight": [4, 6],
        },
    ),
    "matrix": (lambda: nn.Sequential(Experts((4, 5))), {"target_parameters": ["0.up"]}, {
        "0.lora_A.weight": [2, 5],
        "0.lora_B.weight": [4, 2],
    }),
    "matrix-transposed": (lambda: nn.Sequential(Experts((4, 5), transposed=True)), {"target_parameters": ["0.up"]}, {
        "0.lora_A.weight": [2, 5],
        "0.lora_B.weight": [4, 2],
    }),
    "bias-all": (lambda: Model().layers, {"target_modules": ["1.q_proj"], "bias": "all"}, {
        "0.norm.bias": [3],
        "0.q_proj.bias": [3],
        "1.norm.bias": [3],
        "1.q_proj.base_layer.bias": [3],
        "1.q_proj.lora_A.weight": [2, 4],
        "1.q_proj.lora_B.weight": [3, 2],
    }),
    "modules-to-save": (Model, {"target_modules": ["head"], "modules_to_save": ["0.norm", "conv"]}, {
        "conv.bias": [3],
        "conv.weight": [3, 4, 2, 1],
        "head.lora_A.weight": [2, 3],
        "head.lora_B.weight": [2, 2],
        "layers.0.norm.bias": [3],
        "layers.0.norm.weight": [3],
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", KEYS)
def test_keys_and_shapes_are_those_of_peft(name: str, tmp_path: Path) -> None:
    model, config, expected = KEYS[name]

    assert saved(tmp_path, model(), **config) == expected


def test_experts_are_in_order_in_a_and_interleaved_in_b(tmp_path: Path) -> None:
    adapters, config = make(Model(), target_parameters=["up", "down"], init_lora_weights=False)
    save_peft(tmp_path, adapters, config)
    stored = load_file(tmp_path / WEIGHTS)

    for name, path in (("up", "experts.base_layer"), ("down", "experts")):  # the first one registered is the inner one
        rule = adapters[f"experts.{name}"]
        assert isinstance(rule, LoRA)
        a, b = (stored[f"base_model.model.{path}.lora_{x}.weight"] for x in "AB")
        for e in range(3):
            assert torch.equal(a[2 * e : 2 * e + 2], rule.a[e])
            assert torch.equal(b[:, e::3], rule.b[e])


def test_the_file_of_tensors(tmp_path: Path) -> None:
    adapters, config = make(Model(), target_modules=["head", "conv"])
    base = torch.randn(6)
    rule = LoRA(base.view(2, 3), base[:4].view(2, 2), scaling=2.0)  # views of the same values
    save_peft(tmp_path, adapters | {"head.weight": rule}, config)

    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        keys = list(file.keys())
    assert keys == sorted(keys)
    stored = load_file(tmp_path / WEIGHTS)
    assert torch.equal(stored["base_model.model.head.lora_A.weight"], rule.a)
    assert torch.equal(stored["base_model.model.head.lora_B.weight"], rule.b)


# --- the configuration -----------------------------------------------------------------------------------------


def test_the_configuration_in_full(tmp_path: Path) -> None:
    adapters, config = make(
        Model(), r=3, lora_alpha=7.5, lora_dropout=0.25, target_modules=["q_proj", "head"],
        exclude_modules=["1.q_proj"], use_rslora=True, use_dora=True, bias="lora_only", modules_to_save=["conv"],
        init_lora_weights="gaussian", rank_pattern={"q_proj": 1, "head": 2}, alpha_pattern={"q_proj": 2},
        task_type="CAUSAL_LM", base_model_name_or_path="some/base",
    )  # fmt: skip
    save_peft(tmp_path, adapters, config)

    assert json.loads((tmp_path / CONFIG).read_text()) == {
        "alpha_pattern": {"q_proj": 2},
        "auto_mapping": None,
        "base_model_name_or_path": "some/base",
        "bias": "lora_only",
        "ensure_weight_tying": False,
        "exclude_modules": ["1.q_proj"],
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": "gaussian",
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": 7.5,
        "lora_bias": False,
        "lora_dropout": 0.25,
        "modules_to_save": ["conv"],
        "peft_type": "LORA",
        "r": 3,
        "rank_pattern": {"q_proj": 1, "head": 2},
        "revision": None,
        "target_modules": ["q_proj", "head"],
        "target_parameters": None,
        "task_type": "CAUSAL_LM",
        "trainable_token_indices": None,
        "use_dora": True,
        "use_rslora": True,
    }
    assert load_peft(tmp_path, Model())[1] == config


def read(folder: Path, field: str) -> Any:
    return json.loads((folder / CONFIG).read_text())[field]


def test_the_order_of_patterns_is_kept(tmp_path: Path) -> None:
    patterns = {"q_proj": 1, "layers.0.q_proj": 2, "head": 3}  # the first one wins
    saved(tmp_path, Model(), target_modules=["q_proj", "head"], rank_pattern=patterns, alpha_pattern=patterns)

    assert list(read(tmp_path, "rank_pattern")) == list(patterns)
    assert list(read(tmp_path, "alpha_pattern")) == list(patterns)
    assert list(json.loads((tmp_path / CONFIG).read_text())) == sorted(json.loads((tmp_path / CONFIG).read_text()))


@pytest.mark.parametrize(
    ("model", "config", "expected"),
    [
        (Model, {"target_modules": "all-linear"}, ["layers.0.q_proj", "layers.1.q_proj", "experts.gate", "head"]),
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU())), {"target_modules": "all-linear"}, "0"),
        (lambda: nn.ModuleList([nn.Linear(2, 2), Block()]), {"target_modules": "all-linear"}, r"0|1\.q_proj"),
        (Model, {"target_modules": r".*\.q_proj"}, r".*\.q_proj"),
        (Model, {"target_parameters": ["experts.up"]}, []),
    ],
)
def test_the_targets_in_the_configuration(model: Any, config: Any, expected: Any, tmp_path: Path) -> None:
    adapters, made = make(model(), **config)
    save_peft(tmp_path, adapters, made)

    assert read(tmp_path, "target_modules") == expected
    assert list(load_peft(tmp_path, model())[0]) == list(adapters)


def test_layers_to_transform_and_fan_in_fan_out(tmp_path: Path) -> None:
    model = nn.Sequential(Model())
    saved(tmp_path, model, target_modules=["q_proj"], layers_to_transform=1, layers_pattern="layers")
    assert (read(tmp_path, "layers_to_transform"), read(tmp_path, "layers_pattern")) == ([1], ["layers"])

    saved(tmp_path, conv1d(), target_modules=["0"])
    assert read(tmp_path, "fan_in_fan_out") is True


# --- what is refused -------------------------------------------------------------------------------------------


def lora(layout: Layout, a: tuple[int, ...], b: tuple[int, ...], **fields: Any) -> LoRA:
    return LoRA(torch.ones(a), torch.ones(b), layout=layout, **{"scaling": 2.0} | fields)


LINEAR = {"m.weight": lora(Linear(), (2, 4), (3, 2))}
TARGET: dict[str, Any] = {"target_modules": ["m"]}
EXPERT: dict[str, Any] = {"target_parameters": ["m.w"]}


def expert(*shape: int, **fields: Any) -> dict[str, Rule]:
    *lead, n_out, n_in = shape
    return {"m.w": lora(Parameter(**fields), (*lead, 2, n_in), (*lead, n_out, 2))}


CANNOT: dict[str, tuple[Mapping[str, Rule], dict[str, Any], str]] = {
    "transposed convolution": ({"m.weight": lora(ConvTranspose(), (2, 4, 3), (3, 2, 1))}, TARGET, "transposed conv"),
    "recurrent": ({"m.weight_ih_l0": lora(Recurrent(), (2, 4), (3, 2))}, TARGET, "recurrent layers"),
    "recurrent parameter": (
        {"m.weight_ih_l0": lora(Recurrent(), (2, 4), (3, 2))}, {"target_parameters": ["weight_ih_l0"]},
        "layout Recurrent through target_parameters",
    ),
    "attention": ({"m.in_proj_weight": lora(Attention(), (2, 4), (12, 2))}, TARGET, "always adapts both projections"),
    "groups": ({"m.weight": lora(Conv(groups=2), (2, 2, 3), (4, 2, 1))}, TARGET, "mixes the groups"),
    "dilation": ({"m.weight": lora(Conv(dilated=True), (2, 4, 3), (3, 2, 1))}, TARGET, "leaves the dilation out"),
    "padding mode": (
        {"m.weight": lora(Conv(padding_mode="reflect"), (2, 4, 3), (3, 2, 1))}, TARGET, "padding_mode='reflect'",
    ),
    "max_norm": ({"m.weight": lora(Embedding(max_norm=True), (2, 7), (4, 2))}, TARGET, "after max_norm"),
    "max_norm parameter": (
        {"m.weight": lora(Embedding(max_norm=True), (2, 7), (4, 2))}, {"target_parameters": ["m.weight"]}, "max_norm",
    ),
    "experts with DoRA": (
        {"m.w": DoRA(torch.ones(3, 2, 5), torch.ones(3, 4, 2), torch.ones(3, 4), scaling=2.0, layout=Parameter())},
        EXPERT | {"use_dora": True}, "no DoRA for target_parameters",
    ),
    "experts with dropout": (
        {"m.w": lora(Parameter(), (3, 2, 5), (3, 4, 2), dropout=0.1)}, EXPERT | {"lora_dropout": 0.1}, "must be 0",
    ),
    "experts with orthogonal": (expert(3, 4, 5), EXPERT | {"init_lora_weights": "orthogonal"}, r"config\.replace"),
    "two leading dimensions": (expert(2, 3, 4, 5), EXPERT, "this one has 4"),
    "one transposed expert": (expert(1, 4, 5, stored_transposed=True), EXPERT, "single expert is stored transposed"),
    "order of parameters": (expert(3, 4, 5, position=1, siblings=2), EXPERT, "do not give that order"),
    "parameter as a module": (expert(3, 4, 5), TARGET, "through target_parameters only"),
    "convolution as a parameter": (
        {"m.weight": lora(Conv(), (2, 4, 3), (3, 2, 1))}, {"target_parameters": ["m.weight"]}, "layout Conv through",
    ),
    "convolution with orthogonal": (
        {"m.weight": lora(Conv(), (2, 4, 3), (3, 2, 1))}, TARGET | {"init_lora_weights": "orthogonal"},
        "linear layers only",
    ),
    "model itself": ({"weight": lora(Linear(), (2, 4), (3, 2))}, {"target_modules": "all-linear"}, "the model itself"),
    "model's parameter": ({"w": lora(Parameter(), (2, 4), (3, 2))}, {"target_parameters": ["w"]}, "the model itself"),
    "trained in full": (LINEAR | {"n.weight": Full(torch.ones(2))}, TARGET, "'n.weight' is trained.*bias='none'"),
    "bias elsewhere": (
        LINEAR | {"n.bias": Full(torch.ones(2)), "m.bias": Full(torch.ones(3))}, TARGET | {"bias": "lora_only"},
        "'n.bias' is trained in full",
    ),
    "nested modules to save": (
        LINEAR | {"n.k.weight": Full(torch.ones(2))}, TARGET | {"modules_to_save": ["n", "n.k"]},
        "in another such module",
    ),
    "saved in an adapted module": (
        LINEAR | {"m.k.weight": Full(torch.ones(2))}, TARGET | {"modules_to_save": ["m.k"]}, "in an adapted module",
    ),
    "head that is not trained": (LINEAR, TARGET | {"task_type": "SEQ_CLS"}, r"'score' in full.*task_type=None"),
    "adapted head": (
        {"qa_outputs.weight": lora(Linear(), (2, 4), (3, 2))},
        {"target_modules": ["qa_outputs"], "task_type": "QUESTION_ANS"}, "cannot hold a low-rank update of it",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CANNOT)
def test_what_peft_cannot_compute_is_not_saved(name: str, tmp_path: Path) -> None:
    adapters, config, message = CANNOT[name]

    with pytest.raises(UnsupportedError, match=message):
        save_peft(tmp_path / "new", adapters, LoraConfig(**{"r": 2, "lora_alpha": 4} | config))
    assert not (tmp_path / "new").exists()


def test_conv1d_beside_target_parameters_is_not_saved(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": conv1d(), "b": Experts()})
    adapters, config = make(model, target_modules=["a.0"], target_parameters=["up"])

    with pytest.raises(UnsupportedError, match="Conv1D layers and target_parameters together"):
        save_peft(tmp_path, adapters, config)


def test_a_rule_of_another_kind_is_not_saved(tmp_path: Path) -> None:
    class Own(LoRA):
        pass

    with pytest.raises(UnsupportedError, match="no place for the rule Own"):
        save_peft(tmp_path, {"m.weight": Own(torch.ones(2, 4), torch.ones(3, 2))}, LoraConfig(**TARGET))


DISAGREES: dict[str, tuple[Mapping[str, Rule], dict[str, Any], str]] = {
    "rank": (LINEAR, TARGET | {"r": 4}, "'m.weight' has rank 2, but the configuration says 4"),
    "rank of a pattern": (LINEAR, TARGET | {"rank_pattern": {"m": 1}}, "has rank 2, but the configuration says 1"),
    "scaling": (LINEAR, TARGET | {"lora_alpha": 3}, r"scaling 2, but the configuration gives 1\.5 \(lora_alpha=3"),
    "scaling of rsLoRA": (LINEAR, TARGET | {"use_rslora": True}, "scaling 2, but.*use_rslora=True"),
    "scaling of a pattern": (LINEAR, TARGET | {"alpha_pattern": {"m": 1}}, "scaling 2, but.* gives 0.5"),
    "dropout": (LINEAR, TARGET | {"lora_dropout": 0.5}, "dropout 0, but lora_dropout=0.5"),
    "no DoRA": (LINEAR, TARGET | {"use_dora": True}, "rule LoRA, but use_dora=True"),
    "DoRA": (
        {"m.weight": DoRA(torch.ones(2, 4), torch.ones(3, 2), torch.ones(3), scaling=2.0)}, TARGET,
        "rule DoRA, but use_dora=False",
    ),
    "not a target": (LINEAR, {"target_modules": ["n"]}, "does not target 'm'"),
    "not a target of the expression": (LINEAR, {"target_modules": "x.*"}, "does not target 'm'"),
    "excluded": (LINEAR, TARGET | {"exclude_modules": ["m"]}, r"exclude_modules=\('m',\)"),
    "saved": (LINEAR | {"m.bias": Full(torch.ones(3))}, TARGET | {"modules_to_save": ["m"]}, "does not target 'm'"),
    "other layer": (
        {"a.l.0.m.weight": LINEAR["m.weight"]}, TARGET | {"layers_to_transform": [1]}, r"does not target 'a\.l\.0\.m'",
    ),
    "not linear": ({"m.weight": lora(Embedding(), (2, 4), (3, 2))}, {"target_modules": "all-linear"}, "not target"),
    "target without adapter": (LINEAR, {"target_modules": ["m", "k_proj"]}, "'k_proj' names none of the adapters"),
    "parameter without adapter": (LINEAR, TARGET | {"target_parameters": ["w"]}, "target_parameters: 'w' names none"),
    "module that is not saved": (LINEAR, TARGET | {"modules_to_save": ["head"]}, "modules_to_save: 'head' names none"),
    "pattern": (LINEAR, TARGET | {"rank_pattern": {"k_proj": 2}}, "rank_pattern: 'k_proj' matches none"),
    "no bias": (LINEAR, TARGET | {"bias": "all"}, "bias='all', but the adapters train no bias"),
    "twice": (LINEAR, TARGET | {"target_parameters": ["m.weight"]}, "named in target_parameters, and its module"),
    "nothing": ({}, TARGET, "no low-rank adapter"),
    "nothing of low rank": ({"m.bias": Full(torch.ones(3))}, TARGET | {"bias": "all"}, "no low-rank adapter"),
}  # fmt: skip


@pytest.mark.parametrize("name", DISAGREES)
def test_adapters_that_are_not_those_of_the_configuration_are_not_saved(name: str, tmp_path: Path) -> None:
    adapters, config, message = DISAGREES[name]

    with pytest.raises(ConfigError, match=message):
        save_peft(tmp_path, adapters, LoraConfig(**{"r": 2, "lora_alpha": 4} | config))
    assert not list(tmp_path.iterdir())


def with_leaf(rule: Any, leaf: str, value: Tensor) -> Any:
    return replace(rule, **{leaf: value})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("leaf", ["a", "b", "magnitude", "value"])
def test_what_is_not_finite_is_not_saved(leaf: str, value: float, tmp_path: Path) -> None:
    adapters, config = make(Model(), target_modules=["head"], use_dora=True, modules_to_save=["conv"])
    name = "conv.bias" if leaf == "value" else "head.weight"
    bad = getattr(adapters[name], leaf).clone()
    bad.view(-1)[-1] = value

    with pytest.raises(NonFiniteError, match=f"'{name}': {leaf} holds NaN or infinity"):
        save_peft(tmp_path, adapters | {name: with_leaf(adapters[name], leaf, bad)}, config)


def test_leaves_that_do_not_fit_are_not_saved(tmp_path: Path) -> None:
    adapters, config = make(Model(), target_modules=["head", "conv"])
    stack = pytree.tree_map(lambda leaf: torch.stack([leaf, leaf]), adapters)
    with pytest.raises(ParamsError, match=r"'(conv|head)\.weight': .*(one by one|expected)"):
        save_peft(tmp_path, stack, config)
    with pytest.raises(ParamsError, match=r"'head\.weight': a has shape \[2, 2, 3\].*one by one"):
        save_peft(tmp_path, {"head.weight": stack["head.weight"]}, config)
    with pytest.raises(ParamsError, match=r"'head\.weight': b has shape \[2, 3\], expected \[2, 2\]"):
        save_peft(tmp_path, adapters | {"head.weight": LoRA(torch.ones(2, 3), torch.ones(2, 3), scaling=2.0)}, config)
    with pytest.raises(ParamsError, match=r"'head\.weight': a has dtype torch\.int64"):
        save_peft(tmp_path, adapters | {"head.weight": LoRA(torch.ones(2, 3).long(), torch.ones(2, 2))}, config)


# --- what a failure leaves -------------------------------------------------------------------------------------


def test_an_adapter_is_replaced_and_the_rest_of_the_folder_stays(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    model = Model()
    saved(folder, model, target_modules=["head"])
    (folder / "README.md").write_text("card")
    mode = (folder / CONFIG).stat().st_mode

    adapters, config = make(model, target_modules=["q_proj"])
    save_peft(str(folder), adapters, config)

    assert sorted(file.name for file in folder.iterdir()) == ["README.md", CONFIG, WEIGHTS]
    assert list(load_peft(str(folder), model)[0]) == list(adapters)
    assert (folder / CONFIG).stat().st_mode == mode == (folder / "README.md").stat().st_mode
    assert (folder / WEIGHTS).stat().st_mode == mode


@pytest.mark.parametrize("step", ["write_bytes", "write_text", "fsync", "replace"])
@pytest.mark.parametrize("new", [True, False])
def test_a_failure_leaves_the_old_adapter_or_nothing(
    step: str, new: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, model = tmp_path / "adapter", Model()
    if not new:
        saved(folder, model, target_modules=["head"])
    before = {file.name: file.read_bytes() for file in folder.iterdir()} if folder.exists() else {}
    adapters, config = make(model, target_modules=["q_proj"], init_lora_weights=False)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left")

    def half(file: Path, data: bytes) -> None:
        with file.open("wb") as out:
            out.write(data[: len(data) // 2])
        fail()

    match step:
        case "write_bytes":
            monkeypatch.setattr(Path, "write_bytes", half)
        case "write_text":
            monkeypatch.setattr(Path, "write_text", fail)
        case "fsync":
            monkeypatch.setattr(os, "fsync", fail)
        case _:
            monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        save_peft(folder, adapters, config)
    monkeypatch.undo()

    assert folder.exists() != new
    assert before == ({file.name: file.read_bytes() for file in folder.iterdir()} if not new else {})


def test_the_weights_are_replaced_before_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    replace_file = Path.replace

    def record(self: Path, target: Path) -> Path:
        assert sorted(file.suffix for file in tmp_path.iterdir() if file.name.startswith(".")) == [".tmp"] * (
            2 - len(order)
        )
        order.append(target.name)
        return replace_file(self, target)

    monkeypatch.setattr(Path, "replace", record)
    saved(tmp_path, Model(), target_modules=["head"])
    assert order == [WEIGHTS, CONFIG]


def test_what_lies_in_a_new_folder_is_not_removed(tmp_path: Path) -> None:
    folder = tmp_path / "new"

    def write(file: Path) -> None:
        (folder / "other").write_text("theirs")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        _files.replace_files(folder, {"a": write})
    assert [file.name for file in folder.iterdir()] == ["other"]


def test_what_was_loaded_does_not_depend_on_the_file(tmp_path: Path) -> None:
    model = Model()
    adapters, config = make(model, target_modules=["head"])
    save_peft(tmp_path, adapters, config)
    loaded, _ = load_peft(tmp_path, model)

    size = (tmp_path / WEIGHTS).stat().st_size
    with (tmp_path / WEIGHTS).open("r+b") as file:  # in place, as PEFT writes
        file.write(b"\x7f" * size)

    for x, y in zip(*map(pytree.tree_leaves, (loaded, adapters)), strict=True):
        assert torch.equal(x, y)


def test_nothing_that_is_passed_in_changes(tmp_path: Path) -> None:
    model = Model()
    adapters, config = make(model, target_modules=["head", "conv"], target_parameters=["up"], bias="all")
    before = pytree.tree_map(torch.clone, adapters)
    state = {name: value.clone() for name, value in model.state_dict().items()}

    save_peft(tmp_path, adapters, config)
    loaded, _ = load_peft(tmp_path, model)

    for x, y in zip(*map(pytree.tree_leaves, (adapters, before)), strict=True):
        assert torch.equal(x, y)
    for leaf in pytree.tree_leaves(loaded):
        leaf.add_(1)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(load_peft(tmp_path, model)[0]["head.weight"].a, adapters["head.weight"].a)  # type: ignore[attr-defined]


def test_every_leaf_and_number_comes_back(tmp_path: Path) -> None:
    """With values that neither an initialisation nor the base has."""
    model = Model()
    adapters, config = make(model, target_modules=["head"], use_dora=True, bias="all", lora_dropout=0.25)
    changed: Any = pytree.tree_map(lambda leaf: leaf + torch.randn_like(leaf), adapters)
    save_peft(tmp_path, changed, config)
    loaded, _ = load_peft(tmp_path, model)
    assert pytree.tree_structure(loaded) == pytree.tree_structure(changed)  # with scaling and dropout
    assert any(getattr(rule, "dropout", 0) == 0.25 for rule in loaded.values())
    assert {"LoRA", "DoRA", "Full"} & {type(rule).__name__ for rule in loaded.values()} == {"DoRA", "Full"}
    for x, y in zip(*map(pytree.tree_leaves, (loaded, changed)), strict=True):
        assert torch.equal(x, y)
