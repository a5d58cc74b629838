"""PEFT as the oracle: what it saves we load, what we save it loads, and all outputs agree."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from cases import gen, gpt2, gpt2_conv1d, llama
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import distance
from peft_oracle import (
    IDS,
    Net,
    Row,
    build,
    close,
    logits,
    peft_loads,
    random_adapters,
    random_peft,
    reload_with,
    save_quietly,
)
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from funclora import Delta, Full, LoRA, LoraConfig, TrainableTokens, apply, base_params, init, merge
from funclora._config.targets import select
from funclora.errors import PeftFormatWarning, UnsupportedError
from funclora.io.peft.folder import load_peft, save_peft

# --- models ----------------------------------------------------------------------------------------------------


def net_with_unused_parameter() -> nn.Module:
    model = Net()
    model.norm.unused = nn.Parameter(torch.randn(4, 3))
    return model


class Inside(nn.Module):
    """PEFT cannot adapt the model itself, so a layer to adapt needs a module around it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Experts(nn.Module):
    """A mixture of experts as transformers has them: two stacked parameters, in either order and orientation."""

    gate_up_proj: nn.Parameter
    down_proj: nn.Parameter

    def __init__(self, *, transposed: bool, down_first: bool, n: int = 3) -> None:
        super().__init__()
        self.is_transposed = transposed
        shapes = {"gate_up_proj": (8, 5), "down_proj": (5, 4)}  # [out, in]
        for name in sorted(shapes, reverse=not down_first):
            n_out, n_in = shapes[name]
            self.register_parameter(
                name, nn.Parameter(torch.randn(n, *((n_in, n_out) if transposed else (n_out, n_in))))
            )
        self.bias = nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        up, down = (w if self.is_transposed else w.mT for w in (self.gate_up_proj, self.down_proj))
        gate, value = torch.bmm(x.expand(len(up), -1, -1), up).chunk(2, -1)
        return torch.bmm(torch.tanh(gate) * value, down).sum(0) + self.bias


class Matrix(nn.Module):
    """A parameter that is no layer's, which may say that it is stored as [in, out]."""

    def __init__(self, *, transposed: bool) -> None:
        super().__init__()
        self.is_transposed = transposed
        self.w = nn.Parameter(torch.randn(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w


class Pair(nn.Bilinear):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, torch.tanh(x))


class Attention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(6, 2, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x, x, x)[0]


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(
            vocab_size=17, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12,
            num_labels=3, max_position_embeddings=16, initializer_range=0.3, attn_implementation="eager",
        )
    )  # fmt: skip


def distilbert() -> nn.Module:
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    return DistilBertForSequenceClassification(
        DistilBertConfig(
            vocab_size=17, dim=8, n_layers=1, n_heads=2, hidden_dim=12, num_labels=3, max_position_embeddings=16,
            initializer_range=0.3, attn_implementation="eager",
        )
    )  # fmt: skip


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=17, hidden_size=8, intermediate_size=6, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, num_local_experts=3, bos_token_id=0, eos_token_id=16, initializer_range=0.3,
            attn_implementation="eager", experts_implementation="eager",
        )
    )  # fmt: skip


def tied_llama() -> nn.Module:
    model = llama()
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


# --- the table -------------------------------------------------------------------------------------------------


def layer(name: str, make: Callable[[], nn.Module], *shape: int, **config: Any) -> Row:
    x = torch.randn(shape, generator=gen(3), dtype=torch.float64) if shape else IDS
    return Row(name, {"target_modules": ["layer"], **config}, lambda: Inside(make()), x)


def experts(name: str, *, transposed: bool, down_first: bool, n: int = 3, **config: Any) -> Row:
    x = torch.randn((1, 4, 5), generator=gen(3), dtype=torch.float64)
    targets = {"target_modules": [], "target_parameters": ["gate_up_proj", "down_proj"]}
    make = lambda: Inside(Experts(transposed=transposed, down_first=down_first, n=n))  # noqa: E731
    # PEFT looks for the keys of the patterns among the modules only.
    return Row(name, targets | config, make, x, ignore="did not match any targeted module")


def parameter(name: str, make: Callable[[], nn.Module], *shape: int, where: str = "layer.weight", **config: Any) -> Row:
    return layer(name, make, *shape, **{"target_modules": [], "target_parameters": [where]} | config)


TWO = ["q_proj", "v_proj"]
CLS = {"task_type": "SEQ_CLS"}
LAYERS = [
    layer("linear", lambda: nn.Linear(5, 3), 2, 4, 5),
    layer("linear-no-bias", lambda: nn.Linear(5, 3, bias=False), 4, 5),
    layer("linear-dora", lambda: nn.Linear(5, 3), 4, 5, use_dora=True),
    layer("embedding", lambda: nn.Embedding(11, 4)),
    layer("embedding-dora", lambda: nn.Embedding(11, 4, padding_idx=7), use_dora=True),
    layer("conv1d", lambda: nn.Conv1d(4, 3, 3, stride=2, padding=1), 2, 4, 7),
    layer("conv1d-dora", lambda: nn.Conv1d(4, 3, 3), 2, 4, 7, use_dora=True, bias="lora_only"),
    layer("conv2d", lambda: nn.Conv2d(4, 3, (3, 1), padding="same"), 2, 4, 5, 6),
    layer("conv2d-dora", lambda: nn.Conv2d(4, 3, 3, stride=(2, 1)), 2, 4, 5, 6, use_dora=True),
    layer("conv3d", lambda: nn.Conv3d(2, 3, 2), 2, 2, 3, 4, 3),
    layer("conv3d-dora", lambda: nn.Conv3d(2, 3, (1, 2, 2), padding=(0, 1, 0)), 2, 2, 3, 4, 3, use_dora=True),
    layer("hf-conv1d", gpt2_conv1d, 2, 4, 5),
    layer("hf-conv1d-dora", gpt2_conv1d, 2, 4, 5, use_dora=True, bias="all"),
    layer("linear-lora-bias", lambda: nn.Linear(5, 3), 2, 4, 5, lora_bias=True, use_rslora=True),
    layer("hf-conv1d-lora-bias", gpt2_conv1d, 2, 4, 5, lora_bias=True),
    layer("conv1d-lora-bias", lambda: nn.Conv1d(4, 3, 3, stride=2), 2, 4, 7, lora_bias=True, r=3),
    layer("conv2d-lora-bias", lambda: nn.Conv2d(4, 3, 3), 2, 4, 5, 6, lora_bias=True, alpha_pattern={"layer": 7}),
    layer("conv3d-lora-bias", lambda: nn.Conv3d(2, 3, 2), 2, 2, 3, 4, 3, lora_bias=True),
    experts("experts", transposed=False, down_first=False),
    experts("experts-down-first", transposed=False, down_first=True),
    experts("experts-transposed", transposed=True, down_first=False),
    experts("experts-transposed-down-first", transposed=True, down_first=True, bias="lora_only"),
    experts("experts-one-parameter", transposed=False, down_first=False, target_parameters=["down_proj"], bias="all"),
    experts("experts-single", transposed=False, down_first=False, n=1),
    experts("experts-patterns", transposed=True, down_first=True, rank_pattern={"down_proj": 3},
            alpha_pattern={"layer.gate_up_proj": 1}, use_rslora=True),
    parameter("parameter", lambda: Matrix(transposed=False), 3, 5, where="layer.w"),
    parameter("parameter-transposed", lambda: Matrix(transposed=True), 3, 5, where="layer.w", r=3),
    parameter("parameter-of-linear", lambda: nn.Linear(5, 3), 2, 5, bias="lora_only"),
    parameter("parameter-of-embedding", lambda: nn.Embedding(11, 4)),
    parameter("parameter-of-hf-conv1d", gpt2_conv1d, 2, 5, r=3),
    parameter("parameter-of-bag", lambda: nn.EmbeddingBag(11, 4, mode="sum")),
    parameter("parameter-of-bag-mean", lambda: nn.EmbeddingBag(11, 4, padding_idx=2), r=3),
    parameter("parameter-of-bag-max", lambda: nn.EmbeddingBag(11, 4, mode="max")),
    parameter("parameter-of-bilinear", lambda: Pair(5, 5, 3), 2, 5, r=3),
]  # fmt: skip
FIELDS = [
    Row("plain", {"target_modules": TWO}),
    Row("full-name", {"target_modules": ["layers.1.q_proj"]}),
    Row("dotted-suffix", {"target_modules": ["mlp.0", "1.v_proj"]}),
    Row("regex", {"target_modules": r"layers\.\d+\.(q_proj|mlp\.2)"}),
    Row("all-linear", {"target_modules": "all-linear"}),
    Row("all-linear-capital", {"target_modules": "All-Linear", "exclude_modules": ["head", "mlp.0"]}),
    Row("exclude-list", {"target_modules": TWO, "exclude_modules": ["0.q_proj"]}),
    Row("exclude-regex", {"target_modules": [*TWO, "head"], "exclude_modules": r"layers\.0\..*"}),
    Row("r-alpha", {"target_modules": TWO, "r": 3, "lora_alpha": 5}),
    Row("alpha-float", {"target_modules": TWO, "lora_alpha": 2.75}),
    Row("rslora", {"target_modules": TWO, "use_rslora": True, "r": 3}),
    Row("dora", {"target_modules": [*TWO, "embed", "mlp.2"], "use_dora": True, "use_rslora": True}),
    Row("dropout", {"target_modules": [*TWO, "embed"], "lora_dropout": 0.3}),
    Row("bias-all", {"target_modules": TWO, "bias": "all"}),
    Row("bias-lora-only", {"target_modules": [*TWO, "head"], "bias": "lora_only", "use_dora": True}),
    Row("modules-to-save", {"target_modules": TWO, "modules_to_save": ["head", "norm"]}),
    Row("modules-to-save-of-targets", {"target_modules": "all-linear", "modules_to_save": ["1.mlp", "head"]}),
    Row("modules-to-save-bias-all", {"target_modules": TWO, "modules_to_save": ["head"], "bias": "all"}),
    Row("layer-index", {"target_modules": TWO, "layers_to_transform": 1}, lambda: Inside(Net())),
    Row("layer-indices", {"target_modules": [*TWO, "head"], "layers_to_transform": [0, 1]}, lambda: Inside(Net())),
    Row("layer-full-name", {"target_modules": ["layer.layers.0.v_proj", "q_proj"], "layers_to_transform": [1]},
        lambda: Inside(Net())),
    Row("layers-pattern", {"target_modules": ["q_proj", "0"], "layers_to_transform": [1], "layers_pattern": "layers",
                           "exclude_modules": ["layers.0"]}),
    Row("rank-pattern", {"target_modules": TWO, "rank_pattern": {"0.q_proj": 1, "layers.1.v_proj": 4}}),
    Row("rank-pattern-regex", {"target_modules": TWO, "rank_pattern": {r"^layers\.0\..*": 3}, "use_rslora": True}),
    Row("alpha-pattern", {"target_modules": TWO, "alpha_pattern": {"q_proj": 1.5, "layers.1.v_proj": 9}}),
    Row("patterns-overlap", {"target_modules": TWO, "rank_pattern": {"layers.0.q_proj": 3, "q_proj": 1},
                             "alpha_pattern": {"layers.0.q_proj": 7, "q_proj": 1}},
        note="several keys of alpha_pattern"),
    Row("init-gaussian", {"target_modules": [*TWO, "embed"], "init_lora_weights": "gaussian"}),
    Row("init-orthogonal", {"target_modules": [*TWO, "embed"], "init_lora_weights": "orthogonal"}),
    Row("init-false", {"target_modules": [*TWO, "embed"], "init_lora_weights": False}),
    Row("lora-bias", {"target_modules": ["q_proj", "mlp.0", "head"], "lora_bias": True, "rank_pattern": {"head": 1},
                      "alpha_pattern": {"0": 5}, "modules_to_save": ["norm"]}),
    Row("lora-bias-init-false", {"target_modules": ["q_proj"], "lora_bias": True, "init_lora_weights": False}),
    Row("tokens", {"target_modules": TWO, "trainable_token_indices": {"embed": [2, 0, 10]}, "use_dora": True}),
    Row("tokens-bias-all", {"target_modules": TWO, "trainable_token_indices": {"embed": [4]}, "bias": "all",
                            "lora_dropout": 0.1}),
    Row("parameters", {"target_modules": ["q_proj"], "target_parameters": ["v_proj.weight", "norm.unused"]},
        net_with_unused_parameter),
    Row("everything", {"target_modules": [*TWO, "embed", "mlp.0"], "exclude_modules": ["1.v_proj"], "bias": "all",
                       "modules_to_save": ["norm"], "use_dora": True, "rank_pattern": {"embed": 1},
                       "alpha_pattern": {"0": 1}, "use_rslora": True}),
]  # fmt: skip
TRANSFORMERS = [
    Row("gpt2", {"target_modules": ["c_attn", "wte"], "task_type": "CAUSAL_LM", "bias": "lora_only"}, gpt2, tied=True),
    Row("gpt2-all-linear", {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}, gpt2),
    Row("gpt2-parameter", {"target_modules": [], "target_parameters": ["c_fc.weight"]}, gpt2),
    Row("llama-all-linear", {"target_modules": "all-linear", "task_type": "CAUSAL_LM", "use_dora": True}, llama),
    Row("llama-embeddings", {"target_modules": ["embed_tokens", "lm_head"], "task_type": "CAUSAL_LM"}, llama),
    Row("llama-save-head", {"target_modules": TWO, "modules_to_save": ["lm_head"], "task_type": "CAUSAL_LM"}, llama),
    Row("tied-embedding", {"target_modules": ["embed_tokens"], "task_type": "CAUSAL_LM"}, tied_llama, tied=True,
        ignore="tie_word_embeddings"),
    Row("tokens-list", {"target_modules": TWO, "trainable_token_indices": [3, 1, 2]}, llama),
    Row("tokens-of-both", {"target_modules": TWO, "trainable_token_indices": {"embed_tokens": [1], "lm_head": [2, 4]}},
        llama),
    Row("tied-tokens", {"target_modules": TWO, "trainable_token_indices": [3, 1, 2]}, tied_llama),
    Row("tied-tokens-of-both", {"target_modules": TWO, "modules_to_save": ["model.norm"],
        "trainable_token_indices": {"model.embed_tokens": [3, 1], "lm_head": [3, 1]}}, tied_llama),
    Row("tied-tokens-that-differ", {"target_modules": TWO,
        "trainable_token_indices": {"embed_tokens": [3, 1], "lm_head": [2]}}, tied_llama, tied=True),
    Row("tied-tokens-of-the-head", {"target_modules": TWO, "trainable_token_indices": {"lm_head": [2, 3]}}, tied_llama,
        tied=True),
    Row("tied-tokens-ensured", {"target_modules": TWO, "trainable_token_indices": [1], "ensure_weight_tying": True},
        tied_llama, ignore="no tied modules are added"),
    Row("gpt2-tokens", {"target_modules": ["c_attn"], "trainable_token_indices": [3, 1], "lora_bias": True}, gpt2),
    Row("tied-save-ensured", {"target_modules": TWO, "modules_to_save": ["lm_head"], "ensure_weight_tying": True},
        tied_llama),
    Row("tied-save", {"target_modules": TWO, "modules_to_save": ["embed_tokens"], "task_type": "CAUSAL_LM"},
        tied_llama, tied=True, ignore="tie_word_embeddings"),
    Row("mixtral", {"target_modules": ["q_proj"], "target_parameters": ["gate_up_proj", "1.mlp.experts.down_proj"]},
        mixtral),
    Row("bert", {"target_modules": ["query", "value"], "layers_to_transform": 0, "bias": "all"} | CLS, bert),
    Row("bert-all-linear", {"target_modules": "all-linear", "exclude_modules": ["pooler.dense"]} | CLS, bert),
    Row("distilbert-two-heads", {"target_modules": ["q_lin"]} | CLS, distilbert),
]  # fmt: skip


ROWS = [*LAYERS, *FIELDS, *TRANSFORMERS]
pytestmark = pytest.mark.filterwarnings("ignore:.*embedding_bag has no fast form:funclora.errors.DenseFallbackWarning")


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_a_folder_of_peft_gives_its_outputs_gradients_and_merged_weights(row: Row, tmp_path: Path) -> None:
    model = build(row)
    wrapped = random_peft(row, model)
    save_quietly(wrapped, tmp_path)

    with pytest.warns(PeftFormatWarning, match=row.note) if row.note else contextlib.nullcontext():
        adapters, _ = load_peft(tmp_path, model)

    params = base_params(model)
    expected = wrapped(row.x, **row.inputs)
    leaves, spec = pytree.tree_flatten(adapters)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    actual = apply(model, params, pytree.tree_unflatten(leaves, spec), row.x, **row.inputs)
    close(logits(actual), logits(expected))
    assert distance(logits(model(row.x, **row.inputs)), logits(expected)) > 1e-2, "the adapter must matter"

    torch.autograd.backward([out.square().sum() for out in logits(expected)])
    grads = torch.autograd.grad([out.square().sum() for out in logits(actual)], leaves, materialize_grads=True)
    named = wrapped.named_parameters(remove_duplicate=False)
    state = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in named}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stored = peft.get_peft_model_state_dict(wrapped, state, save_embedding_layers=False)
    stored = {k: v for k, v in stored.items() if "original_module" not in k and ".modules_to_save." not in k}
    close(grads, reload_with(tmp_path, stored, model))

    if not row.tied:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            merged = merge(params, adapters)
        close([merged[n] for n in params], [wrapped.merge_and_unload().state_dict()[n] for n in params])


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_peft_loads_our_folder_without_a_warning_and_gives_our_outputs(row: Row, tmp_path: Path) -> None:
    model = build(row)
    adapters, config = random_adapters(row, model)

    save_peft(tmp_path, adapters, config)

    wrapped = peft_loads(model, tmp_path, row.ignore)
    close(logits(wrapped(row.x, **row.inputs)), logits(apply(model, base_params(model), adapters, row.x, **row.inputs)))


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_a_round_trip_keeps_every_bit(row: Row, tmp_path: Path) -> None:
    model = build(row, torch.float32)
    adapters, config = random_adapters(row, model)
    save_peft(tmp_path, adapters, config)

    loaded, loaded_config = load_peft(tmp_path, model)

    assert list(loaded) == list(adapters)
    assert pytree.tree_structure(loaded) == pytree.tree_structure(adapters)
    assert all(torch.equal(x, y) for x, y in zip(*map(pytree.tree_leaves, (loaded, adapters)), strict=True))
    assert select(model, loaded_config) == select(model, config)
    save_peft(tmp_path, loaded, loaded_config)
    assert load_peft(tmp_path, model)[1] == loaded_config


# --- which modules are targets ---------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [*FIELDS, *TRANSFORMERS], ids=str)
def test_the_targets_are_those_of_peft(row: Row) -> None:
    model = build(row)
    _, config = random_adapters(row, model)
    targets = select(model, config)
    wrapped = random_peft(row, model)

    ours = {t.module for name, t in targets.items() if t.layout and not _by_parameter(name, config)}
    assert ours == set(wrapped.targeted_module_names)
    assert {name for name in targets if _by_parameter(name, config)} == set(wrapped.targeted_parameter_names)
    trained = {n for n, p in wrapped.named_parameters() if p.requires_grad and ".lora_" not in n}
    plain = {n.removeprefix("base_model.model.").replace(".modules_to_save.default.", ".") for n in trained}
    plain = {n.replace(".base_layer.", ".") for n in plain if ".original_module." not in n}
    rows = {n.replace(".token_adapter.trainable_tokens_delta.default", ".weight") for n in plain if "_delta" in n}
    assert {name for name, target in targets.items() if target.rule is TrainableTokens} == rows
    assert {name for name, target in targets.items() if target.rule is Full} == {n for n in plain if "_delta" not in n}
    biases = {n for n, p in wrapped.named_parameters() if p.requires_grad and n.endswith(".lora_B.default.bias")}
    biases = {n.removeprefix("base_model.model.").replace(".lora_B.default.", ".") for n in biases}
    assert {name for name, target in targets.items() if target.rule is Delta} == biases


def _by_parameter(name: str, config: LoraConfig) -> bool:
    return any(f".{name}".endswith(f".{entry}") for entry in config.target_parameters or ())


NAMES = ["q_proj", "v_proj", "0.q_proj", "mlp.0", "layers.1.mlp.2", "embed", "head"]


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    targets = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=4, unique=True))
    config: dict[str, Any] = {
        "target_modules": targets,
        "r": draw(st.integers(1, 4)),
        "lora_alpha": draw(st.sampled_from([1, 3, 0.5])),
        "use_rslora": draw(st.booleans()),
        "use_dora": draw(st.booleans()),
        "bias": draw(st.sampled_from(["none", "all"])),
        "modules_to_save": draw(st.sampled_from([None, ["norm"]])),
    }
    first, *others = targets
    # To exclude "q_proj" excludes "0.q_proj" too, and a pattern for it would then match nothing, which is an error.
    if others and not any(other.endswith(f".{first}") for other in others) and draw(st.booleans()):
        config["exclude_modules"] = [first]
    if draw(st.booleans()):
        patterns = st.dictionaries(st.sampled_from([*targets[1:], "(.*)", targets[-1]]), st.integers(1, 3), max_size=3)
        config["rank_pattern"], config["alpha_pattern"] = draw(patterns), draw(patterns)
    return config


@settings(max_examples=25)
@given(configurations())
def test_any_combination_of_fields(tmp_path_factory: pytest.TempPathFactory, config: dict[str, Any]) -> None:
    row = Row("any", config)
    model = build(row)
    excluded = set(config.get("exclude_modules", ()))
    if all(_covered(name, excluded) for name in config["target_modules"]):
        return
    adapters, ours = random_adapters(row, model)
    folder = tmp_path_factory.mktemp("any")

    save_peft(folder, adapters, ours)

    wrapped = peft_loads(model, folder)
    close(wrapped(row.x, **row.inputs), apply(model, base_params(model), adapters, row.x, **row.inputs))
    loaded, _ = load_peft(folder, model)
    assert all(torch.equal(x, y) for x, y in zip(*map(pytree.tree_leaves, (loaded, adapters)), strict=True))


def _covered(name: str, excluded: set[str]) -> bool:
    return any(name == e or name.endswith(f".{e}") for e in excluded)


# --- what PEFT computes by its own lights ----------------------------------------------------------------------


@pytest.mark.parametrize("bias", ["none", "lora_only"])
def test_attention_is_read_with_peft_s_doubled_output_projection(bias: str, tmp_path: Path) -> None:
    x = torch.randn((4, 2, 6), generator=gen(3), dtype=torch.float64)
    row = Row("attention", {"target_modules": ["attn"], "bias": bias, "lora_dropout": 0.5}, Attention, x)
    model = build(row)
    wrapped = random_peft(row, model)
    save_quietly(wrapped, tmp_path)

    with pytest.warns(PeftFormatWarning, match=r"out_proj twice.*'attn\.out_proj\.weight'"):
        adapters, config = load_peft(tmp_path, model)

    params = base_params(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the dense fallback
        close(apply(model, params, adapters, x), wrapped(x))
        close(apply(model.train(), params, adapters, x), wrapped.train()(x))
    merged = wrapped.merge_and_unload().state_dict()
    close([merge(params, adapters)[n] for n in params], [merged[n] for n in params])
    with pytest.raises(UnsupportedError, match=r"both projections.*Merge the adapter"):
        save_peft(tmp_path / "new", adapters, config)


@pytest.mark.parametrize("targets", [["out_proj"], ["attn", "out_proj"], "all-linear", ".*"], ids=str)
def test_an_output_projection_alone_is_not_read(targets: Any, tmp_path: Path) -> None:
    row = Row("out", {"target_modules": targets}, Attention)
    model = build(row)
    save_quietly(random_peft(row, model), tmp_path)

    with pytest.raises(UnsupportedError, match=r"no effect until it is merged"):
        load_peft(tmp_path, model)


def test_a_module_under_two_names_is_not_read(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = self.b = nn.Linear(3, 3)

    row = Row("twice", {"target_modules": ["a", "b"]}, Twice)
    save_quietly(random_peft(row, build(row)), tmp_path)

    with pytest.raises(UnsupportedError, match=r"'a.weight'.*holds its module as 'b' too"):
        load_peft(tmp_path, build(row))


def test_a_forward_of_its_own_is_pointed_out(tmp_path: Path) -> None:
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    row = Row("own", {"target_modules": ["layer"]}, lambda: Inside(Doubled(3, 3)))
    save_quietly(random_peft(row, build(row)), tmp_path)

    with pytest.warns(PeftFormatWarning, match=r"'layer' is a Doubled with a forward of its own"):
        load_peft(tmp_path, build(row))


def test_sorted_patterns_of_alpha_are_pointed_out(tmp_path: Path) -> None:
    """PEFT trains with the first pattern and saves them sorted: what it loads again has another scaling."""
    row = Row("alphas", {"target_modules": TWO, "alpha_pattern": {"q_proj": 2, "layers.0.q_proj": 16}})
    model = build(row)
    save_quietly(random_peft(row, model), tmp_path)

    with pytest.warns(PeftFormatWarning, match=r"several keys of alpha_pattern match 'layers\.0\.q_proj'"):
        adapters, _ = load_peft(tmp_path, model)

    rule = adapters["layers.0.q_proj.weight"]
    assert isinstance(rule, LoRA)
    assert rule.scaling == 8
    close(apply(model, base_params(model), adapters, IDS), peft_loads(model, tmp_path)(IDS))


# --- half precision --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_half_precision_base_has_float32_adapters(dtype: torch.dtype, tmp_path: Path) -> None:
    row = Row("half", {"target_modules": TWO, "bias": "all", "modules_to_save": ["norm"], "lora_alpha": 4})
    model = build(row, dtype)
    wrapped = random_peft(row, model)
    save_quietly(wrapped, tmp_path)

    adapters, config = load_peft(tmp_path, model)

    assert {leaf.dtype for n, r in adapters.items() if isinstance(r, LoRA) for leaf in (r.a, r.b)} == {torch.float32}
    assert {r.value.dtype for r in adapters.values() if isinstance(r, Full)} == {dtype}
    params = base_params(model)
    assert torch.equal(apply(model, params, adapters, IDS), wrapped(IDS)), "scaling is a power of two: all bits agree"
    save_peft(tmp_path / "ours", adapters, config)
    assert torch.equal(peft_loads(model, tmp_path / "ours")(IDS), wrapped(IDS))
    merged = wrapped.merge_and_unload().state_dict()
    close([merge(params, adapters)[n] for n in params], [merged[n] for n in params], torch.finfo(dtype).eps)


def test_the_formula_of_a_half_precision_base(tmp_path: Path) -> None:
    row = layer("linear", lambda: nn.Linear(5, 3), 2, 4, 5, lora_alpha=4)
    model = build(row, torch.bfloat16)
    save_quietly(random_peft(row, model), tmp_path)
    rule = load_peft(tmp_path, model)[0]["layer.weight"]
    assert isinstance(rule, LoRA)
    x = row.x.bfloat16()

    low_rank = F.linear(F.linear(x.float(), rule.a), rule.b) * rule.scaling
    expected = (model(x) + low_rank).to(torch.bfloat16)
    assert torch.equal(apply(model, base_params(model), {"layer.weight": rule}, x), expected)


# --- initial values --------------------------------------------------------------------------------------------


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 80, 96))


def big_hf_conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(80, 96)


BIG: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "linear": (lambda: nn.Linear(96, 80), "layer.weight"),
    "embedding": (lambda: nn.Embedding(96, 80), "layer.weight"),
    "conv2d": (lambda: nn.Conv2d(24, 80, 3), "layer.weight"),
    "hf-conv1d": (big_hf_conv1d, "layer.weight"),
    "experts": (Stack, "layer.w"),
}


@pytest.mark.parametrize(
    ("kind", "initialiser"),
    [(kind, how) for kind in BIG for how in (True, False, "gaussian")]
    + [("linear", "orthogonal"), ("hf-conv1d", "orthogonal")],  # the only ones that PEFT has it for
)
def test_initial_values_have_peft_s_distribution(kind: str, initialiser: Any, tmp_path: Path) -> None:
    make, name = BIG[kind]
    target = {"target_modules": [], "target_parameters": [name]} if kind == "experts" else {"target_modules": ["layer"]}
    fields: dict[str, Any] = target | {"r": 16, "init_lora_weights": initialiser}
    model = Inside(make())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**fields))
        wrapped.save_pretrained(tmp_path)
    theirs = load_peft(tmp_path, model)[0][name]

    ours = init(model, LoraConfig(**fields), generator=gen(1))[name]

    for leaf in ("a", "b"):
        x, y = getattr(ours, leaf), getattr(theirs, leaf)
        assert x.shape == y.shape
        assert x.std().item() == pytest.approx(y.std().item(), rel=0.1, abs=1e-6)
        assert x.mean().item() == pytest.approx(y.mean().item(), abs=0.15 * y.std().item() + 1e-6)
        bound = y.abs().max().item()
        sharp = initialiser in (True, False) and kind != "embedding"
        assert x.abs().max().item() == pytest.approx(bound, rel=0.02 if sharp else 0.4)
