"""`init`: where the numbers come from, how they are distributed, and what they leave alone."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from funclora import DoRA, Full, LoRA, LoraConfig, apply, base_params, init, save_peft
from funclora.errors import ParamsError, PeftFormatWarning, UnsupportedError


def gen(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gpt2_conv1d(n_out: int, n_in: int) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(n_out, n_in)


class Experts(nn.Module):
    def __init__(self, *, transposed: bool) -> None:
        super().__init__()
        self.is_transposed = transposed
        self.w = nn.Parameter(torch.randn(3, *((60, 40) if transposed else (40, 60))))


class One(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Tensor) -> Any:
        return self.layer(*args)


# One layer of each kind with a fan-in of 60, enough for statistics, and the shape of its input.
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(60, 40), (3, 60)),
    "conv1d-hf": (lambda: gpt2_conv1d(40, 60), (3, 60)),
    "conv1d": (lambda: nn.Conv1d(20, 8, 3), (2, 20, 5)),
    "conv2d": (lambda: nn.Conv2d(10, 8, (3, 2)), (2, 10, 4, 4)),
    "conv2d-groups": (lambda: nn.Conv2d(20, 8, (3, 2), groups=2), (2, 20, 4, 4)),
    "conv3d": (lambda: nn.Conv3d(5, 8, (3, 2, 2)), (2, 5, 4, 4, 4)),
    "conv-transpose": (lambda: nn.ConvTranspose2d(20, 8, (3, 2), groups=2), (2, 20, 3, 3)),
    "attention": (lambda: nn.MultiheadAttention(60, 2), (3, 2, 60)),
    "lstm": (lambda: nn.LSTM(60, 60), (3, 2, 60)),
}
IN_PEFT = ["linear", "conv1d-hf", "conv1d", "conv2d", "conv3d", "attention"]
BOUND = 60**-0.5
every_layer = pytest.mark.parametrize("kind", LAYERS)


def one(kind: str) -> nn.Module:
    return One(LAYERS[kind][0]())


def inputs(kind: str) -> tuple[Tensor, ...]:
    return (torch.randn(LAYERS[kind][1]),) * (3 if kind == "attention" else 1)


def target(**fields: Any) -> LoraConfig:
    fields = {"r": 8, "target_modules": ["layer"], **fields}
    return LoraConfig(**fields)


def fresh(model: nn.Module, seed: int = 0, **fields: Any) -> dict[str, Any]:
    return dict(init(model, target(**fields), generator=gen(seed)))


def leaves(adapters: Mapping[str, Any]) -> dict[str, Tensor]:
    return {f"{name}/{leaf}": getattr(rule, leaf) for name, rule in adapters.items() for leaf in rule.leaf_names}


def same(one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    first, second = leaves(one), leaves(other)
    assert first.keys() == second.keys() != set()
    for name, leaf in first.items():
        torch.testing.assert_close(leaf, second[name], rtol=0, atol=0)


def mlp(names: str) -> nn.Module:
    """Layers of one shape with those names, in that order; each weight depends on its name alone."""
    model = nn.ModuleDict({name: nn.Linear(6, 6) for name in names})
    for name, weight in model.named_parameters():
        weight.data = torch.randn(weight.shape, generator=gen(ord(name[0])))
    return model


def in_peft(model: nn.Module, **fields: Any) -> list[LoraLayer]:
    """The layers that PEFT puts into a copy of the model, `layer` being the target."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=["layer"], **fields))
    return [module for module in wrapped.modules() if isinstance(module, LoraLayer)]


# --- where the numbers come from -------------------------------------------------------------------------------

VARIANTS: list[dict[str, Any]] = [
    {}, {"init_lora_weights": False}, {"init_lora_weights": "gaussian"}, {"init_lora_weights": "orthogonal"},
    {"use_dora": True, "init_lora_weights": False},
]  # fmt: skip
every_variant = pytest.mark.parametrize("fields", VARIANTS, ids=str)


@every_variant
def test_a_seed_decides_everything(fields: dict[str, Any]) -> None:
    model, config = mlp("abc"), target(target_modules="all-linear", **fields)
    state = torch.get_rng_state()
    first = init(model, config, generator=gen(1))
    torch.rand(7)
    same(first, init(model, config, generator=gen(1)))
    other = init(model, config, generator=gen(2))
    assert all(not torch.equal(first[n].a, other[n].a) for n in first)  # type: ignore[attr-defined]
    torch.set_rng_state(state)
    init(model, config, generator=gen(1))
    assert torch.equal(torch.get_rng_state(), state), "a given generator is the only one that is used"


def test_one_number_is_drawn_from_the_generator() -> None:
    for model in (mlp("a"), mlp("abcd")):
        generator, reference = gen(3), gen(3)
        init(model, target(target_modules="all-linear"), generator=generator)
        torch.randint(2**63 - 1, (), generator=reference)
        assert torch.equal(generator.get_state(), reference.get_state())


def test_without_a_generator_the_global_one_decides() -> None:
    model, config = mlp("ab"), target(target_modules="all-linear")
    torch.manual_seed(5)
    first, second = init(model, config), init(model, config)
    torch.manual_seed(5)
    same(first, init(model, config))
    assert not torch.equal(first["a.weight"].a, second["a.weight"].a)  # type: ignore[attr-defined]


@every_variant
def test_order_and_other_targets_change_nothing(fields: dict[str, Any]) -> None:
    every = fresh(mlp("abcd"), target_modules="all-linear", **fields)
    reordered = fresh(mlp("dbac"), target_modules="all-linear", **fields)
    same(every, {name: reordered[name] for name in every})
    for names in ("a", "bd", "cab"):
        some = fresh(mlp("abcd"), target_modules=list(names), **fields)
        same(some, {name: every[name] for name in some})


@every_variant
def test_layers_of_equal_shape_start_differently(fields: dict[str, Any]) -> None:
    adapters = fresh(mlp("abcd"), target_modules="all-linear", **fields)
    rules = list(adapters.values())
    for i, rule in enumerate(rules):
        assert all(not torch.equal(rule.a, other.a) for other in rules[:i])
        assert not rule.b.any() or all(not torch.equal(rule.b, other.b) for other in rules[:i])


def test_experts_start_differently() -> None:
    for kind in (True, False, "gaussian", "orthogonal"):
        rule = fresh(Experts(transposed=False), target_modules=None, target_parameters=["w"], init_lora_weights=kind)[
            "w"
        ]
        assert len(rule.a.flatten(1).unique(dim=0)) == 3, kind
        assert not rule.b.any() or len(rule.b.flatten(1).unique(dim=0)) == 3, kind


# --- how they are distributed ----------------------------------------------------------------------------------


def is_uniform(sample: Tensor, bound: float) -> bool:
    """All within the bound and some close to it, with the spread of a uniform distribution."""
    largest, n = sample.abs().max().item(), sample.numel()
    spread, mean = sample.std().item() / (bound / 3**0.5), sample.mean().item() / bound
    return bound * (1 - 12 / n) < largest <= bound and abs(spread - 1) < 3 / n**0.5 and abs(mean) < 3 / n**0.5


def is_normal(sample: Tensor, std: float) -> bool:
    n, z = sample.numel(), sample / std
    inside = (z.abs() < 1).double().mean().item()
    return (
        abs(z.std().item() - 1) < 4 / n**0.5 and abs(z.mean().item()) < 4 / n**0.5 and abs(inside - 0.683) < 2 / n**0.5
    )


@every_layer
def test_kaiming_uniform_a_and_zero_b(kind: str) -> None:
    for name, rule in fresh(one(kind)).items():
        assert is_uniform(rule.a, BOUND), name
        assert not rule.b.any()


@every_layer
def test_random_b_as_well(kind: str) -> None:
    for name, rule in fresh(one(kind), init_lora_weights=False).items():
        assert is_uniform(rule.a, BOUND), name
        assert is_uniform(rule.b, 8**-0.5), name


@pytest.mark.parametrize("r", [2, 8])
@every_layer
def test_gaussian_a_has_the_deviation_1_over_r(kind: str, r: int) -> None:
    for name, rule in fresh(one(kind), r=r, init_lora_weights="gaussian").items():
        assert is_normal(rule.a, 1 / r), name
        assert not rule.b.any()


@pytest.mark.parametrize("kind", IN_PEFT)
def test_peft_has_the_same_distributions(kind: str) -> None:
    """The checks above hold for its factors too, as far as it knows the layer."""
    model = one(kind)
    rows: list[tuple[dict[str, Any], Callable[[Tensor], bool], Callable[[Tensor], bool]]] = [
        ({}, lambda a: is_uniform(a, BOUND), lambda b: not b.any()),
        ({"init_lora_weights": False}, lambda a: is_uniform(a, BOUND), lambda b: is_uniform(b, 8**-0.5)),
        ({"init_lora_weights": "gaussian"}, lambda a: is_normal(a, 1 / 8), lambda b: not b.any()),
    ]
    for fields, a_fits, b_fits in rows:
        adapters, layers = fresh(model, **fields), in_peft(model, r=8, **fields)
        assert len(layers) == len(adapters)
        for layer, rule in zip(layers, adapters.values(), strict=True):
            a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
            assert (a.shape, b.shape) == (rule.a.shape, rule.b.shape)
            assert a_fits(a)
            assert b_fits(b)


@every_layer
def test_orthogonal_factors_cancel_and_do_not_vanish(kind: str) -> None:
    for name, rule in fresh(one(kind).double(), r=6, init_lora_weights="orthogonal").items():
        a, b = rule.layout.factors(rule.a, rule.b)
        assert (b @ a).abs().max() < 1e-15, name
        for factor in (a.mT, b):  # normal combinations of half of an orthogonal basis, a tenth in size
            assert torch.linalg.matrix_rank(factor) == 3
            assert factor.square().sum().item() / len(factor) == pytest.approx(0.03, rel=0.5)


def test_orthogonal_is_the_formula_of_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the normal numbers that `init` drew, PEFT's initialiser makes the same factors."""
    model, randn = One(nn.Linear(10, 7)), torch.randn
    drawn: list[Tensor] = []

    def record(*args: Any, **kwargs: Any) -> Tensor:
        drawn.append(randn(*args, **kwargs))
        return drawn[-1]

    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn", record)
        rule = fresh(model, r=4, init_lora_weights="orthogonal")["layer.weight"]
    (layer,) = in_peft(model, r=4)
    basis, for_a, for_b = drawn
    numbers = iter([basis, for_a, for_b.T])
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn", lambda *shape: next(numbers).reshape(shape))
        layer.orthogonal_init("default")
    torch.testing.assert_close(rule.a, layer.lora_A["default"].weight.detach())
    torch.testing.assert_close(rule.b, layer.lora_B["default"].weight.detach())


@pytest.mark.parametrize("kind", [True, False, "gaussian"])
def test_embeddings_start_with_a_random_b_and_a_zero_a(kind: Any) -> None:
    model = One(nn.Embedding(50, 40))
    rule = fresh(model, init_lora_weights=kind)["layer.weight"]
    (layer,) = in_peft(model, r=8, init_lora_weights=kind)
    for a, b in [(rule.a, rule.b), (layer.lora_embedding_A["default"], layer.lora_embedding_B["default"])]:
        assert (a.shape, b.shape) == ((8, 50), (40, 8))
        assert is_normal(a.detach(), 1) if kind is False else not a.any()
        assert is_normal(b.detach(), 1)


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_are_initialised_as_layers_are(transposed: bool) -> None:
    model = Experts(transposed=transposed)
    for kind, fits in [(True, lambda a: is_uniform(a, BOUND)), ("gaussian", lambda a: is_normal(a, 1 / 8))]:
        rule = fresh(model, target_modules=None, target_parameters=["w"], init_lora_weights=kind)["w"]
        assert (rule.a.shape, rule.b.shape) == ((3, 8, 60), (3, 40, 8))
        assert all(fits(a) for a in rule.a)
        assert not rule.b.any()
    rule = fresh(model.double(), target_modules=None, target_parameters=["w"], init_lora_weights="orthogonal")["w"]
    assert (rule.b @ rule.a).abs().max() < 1e-15
    assert rule.a.any()
    assert rule.b.any()


# --- DoRA's magnitudes -----------------------------------------------------------------------------------------


def norms(model: nn.Module, name: str, weight: Tensor) -> Tensor:
    """The norm of each output unit's weights, by the sums that the layer's documentation implies."""
    layer = getattr(model, "layer", model)
    squares = weight.square()
    if isinstance(layer, nn.ConvTranspose2d):  # [in, out/groups, *kernel], groups of inputs after each other
        return torch.cat([part.sum((0, 2, 3)) for part in squares.chunk(layer.groups)]).sqrt()
    if isinstance(layer, nn.Embedding) or type(layer).__name__ == "Conv1D":
        return squares.sum(0).sqrt()
    if isinstance(layer, Experts):
        return squares.sum(1 if layer.is_transposed else 2).sqrt()
    return squares.flatten(1).sum(1).sqrt()


MODELS: dict[str, Callable[[], nn.Module]] = {
    **{kind: (lambda kind=kind: one(kind)) for kind in LAYERS},  # type: ignore[misc]
    "embedding": lambda: One(nn.Embedding(50, 40)),
    "experts": lambda: Experts(transposed=False),
    "experts-t": lambda: Experts(transposed=True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", MODELS)
def test_magnitudes_are_the_norms_of_the_weights_in_float32_at_least(kind: str, dtype: torch.dtype) -> None:
    model = MODELS[kind]().to(dtype)
    names: dict[str, Any] = {"target_modules": None, "target_parameters": ["w"]} if kind.startswith("experts") else {}
    for name, rule in fresh(model, use_dora=True, **names).items():
        assert isinstance(rule, DoRA)
        expected = norms(model, name, model.get_parameter(name).detach().double())
        wide = torch.promote_types(dtype, torch.float32)
        assert {rule.a.dtype, rule.b.dtype, rule.magnitude.dtype} == {wide}
        torch.testing.assert_close(rule.magnitude, expected.to(wide), rtol=2 * torch.finfo(wide).eps * 8, atol=0)


def test_magnitudes_with_a_random_b_are_those_of_the_updated_weight() -> None:
    model = One(nn.Linear(9, 5)).double()
    rule = fresh(model, use_dora=True, init_lora_weights=False, lora_alpha=24)["layer.weight"]
    updated = model.get_parameter("layer.weight").detach() + 3.0 * rule.b @ rule.a
    torch.testing.assert_close(rule.magnitude, updated.norm(dim=1), rtol=1e-14, atol=0)
    assert (rule.magnitude / model.get_parameter("layer.weight").norm(dim=1) - 1).abs().min() > 1e-3


@pytest.mark.parametrize("kind", ["linear", "conv1d-hf", "conv2d", "embedding"])
def test_magnitudes_are_those_of_peft(kind: str) -> None:
    model = MODELS[kind]()
    (rule,) = fresh(model, use_dora=True).values()
    theirs = in_peft(model, r=8, use_dora=True)[0].lora_magnitude_vector["default"].weight
    torch.testing.assert_close(rule.magnitude, theirs.detach().flatten())


# --- dtypes, params and devices --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_factors_are_float32_at_least_unless_told_otherwise(dtype: torch.dtype) -> None:
    model = nn.ModuleDict({"layer": nn.Linear(4, 3), "head": nn.Linear(3, 2)}).to(dtype)
    config = target(use_dora=True, modules_to_save=["head"])
    for given in (None, torch.bfloat16, torch.float64):
        adapters = init(model, config, generator=gen(0), dtype=given)
        wide = given or torch.promote_types(dtype, torch.float32)
        assert {leaf.dtype for name, leaf in leaves(adapters).items() if name.startswith("layer")} == {wide}
        assert {leaf.dtype for name, leaf in leaves(adapters).items() if name.startswith("head")} == {dtype}


def test_a_narrow_dtype_rounds_the_same_numbers() -> None:
    model = one("linear")
    wide, narrow = (
        init(model, target(), generator=gen(0)),
        init(model, target(), generator=gen(0), dtype=torch.bfloat16),
    )
    for name, leaf in leaves(narrow).items():
        assert torch.equal(leaf, leaves(wide)[name].bfloat16())


def test_params_take_the_place_of_the_model_s_own() -> None:
    model = nn.ModuleDict({"layer": nn.Linear(4, 3), "head": nn.Linear(3, 2)})
    params = {name: 2 * value.double() for name, value in base_params(model).items()}
    config = target(use_dora=True, modules_to_save=["head"])
    adapters: dict[str, Any] = dict(init(model, config, generator=gen(0), params=params))
    torch.testing.assert_close(adapters["layer.weight"].magnitude, params["layer.weight"].norm(dim=1))
    torch.testing.assert_close(adapters["head.bias"].value, params["head.bias"], rtol=0, atol=0)
    del params["head.weight"]
    with pytest.raises(ParamsError, match=r"params lack 'head.weight', which .* Near names: layer.weight, head.bias"):
        init(model, config, params=params)


@every_variant
def test_a_model_on_the_meta_device(fields: dict[str, Any]) -> None:
    real, config = mlp("ab"), target(target_modules="all-linear", bias="all", **fields)
    meta = copy.deepcopy(real).to("meta")
    same(init(meta, config, generator=gen(0), params=base_params(real)), init(real, config, generator=gen(0)))
    with pytest.raises(ParamsError, match=r"is on the meta device, but its values are needed. Pass params="):
        init(meta, config)
    if config.use_dora:
        with pytest.raises(ParamsError, match=r"'a.weight' is on the meta device"):
            init(meta, config.replace(bias="none"))
    else:
        config = config.replace(bias="none")
        same(init(meta, config, generator=gen(0)), init(real, config, generator=gen(0)))


# --- what is left alone ----------------------------------------------------------------------------------------


def test_full_values_are_copies_in_the_dtype_of_the_base() -> None:
    model = nn.ModuleDict({"layer": nn.Linear(4, 3), "head": nn.Linear(3, 2).bfloat16()})
    adapters = fresh(model, modules_to_save=["head"], bias="all")
    full = {name: rule for name, rule in adapters.items() if isinstance(rule, Full)}
    assert full.keys() == {"head.weight", "head.bias", "layer.bias"}
    for name, rule in full.items():
        parameter = model.get_parameter(name)
        assert torch.equal(rule.value, parameter)
        assert rule.value.dtype == parameter.dtype
        assert rule.value.data_ptr() != parameter.data_ptr()


@pytest.mark.parametrize("own", [True, False])
def test_adapters_are_plain_values_and_the_inputs_stay_as_they_were(own: bool) -> None:
    model = nn.ModuleDict({"layer": nn.Linear(4, 3), "head": nn.Linear(3, 2)})
    params = dict(model.named_parameters())  # they require gradients
    before = {name: (value, value.detach().clone(), value._version) for name, value in params.items()}
    config = target(use_dora=True, init_lora_weights=False, modules_to_save=["head"], bias="lora_only")
    adapters = init(model, config, params=None if own else params)
    for name, leaf in leaves(adapters).items():
        assert not leaf.requires_grad, name
        assert leaf.is_contiguous(), name
        assert type(leaf) is Tensor
    assert params.keys() == before.keys()
    for name, (value, copied, version) in before.items():
        assert params[name] is value is model.get_parameter(name)
        assert torch.equal(value, copied)
        assert (value._version, value.requires_grad, value.grad) == (version, True, None)


def test_what_the_configuration_says_stands_in_the_rules() -> None:
    model = mlp("ab")
    adapters = fresh(
        model, target_modules=["a", "b"], lora_alpha=6, lora_dropout=0.25, use_rslora=True,
        rank_pattern={"a": 4}, alpha_pattern={"b": 5},
    )  # fmt: skip
    found = {name: (type(rule), rule.r, rule.scaling, rule.dropout) for name, rule in adapters.items()}
    assert found == {"a.weight": (LoRA, 4, 6 / 4**0.5, 0.25), "b.weight": (LoRA, 8, 5 / 8**0.5, 0.25)}


@pytest.mark.filterwarnings("ignore::funclora.errors.DenseFallbackWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_layer
def test_fresh_adapters_change_nothing(kind: str, dtype: torch.dtype) -> None:
    model = one(kind).to(dtype)
    args = tuple(x.to(dtype) for x in inputs(kind))

    def outputs(**fields: Any) -> list[Tensor]:
        return tensors(apply(model, base_params(model), fresh(model, **fields), *args))

    with torch.no_grad():
        expected = tensors(model(*args))
        for zero in (outputs(), outputs(init_lora_weights="gaussian")):
            assert len(zero) == len(expected)
            assert all(map(torch.equal, zero, expected))
        for nearly in (outputs(use_dora=True), outputs(init_lora_weights="orthogonal")):
            for got, want in zip(nearly, expected, strict=True):
                tolerance = 4 * torch.finfo(dtype).eps * want.abs().max().item()
                torch.testing.assert_close(got, want, rtol=0, atol=tolerance)
        changed = outputs(init_lora_weights=False)
        assert (changed[0] - expected[0]).abs().max() > 0.02, "the comparison would show a difference"


ATTENTION: dict[str, tuple[dict[str, Any], int]] = {
    "the layer": ({"target_modules": ["attn"]}, 2),
    "all-linear": ({"target_modules": "all-linear"}, 1),
    "a parameter": ({"target_parameters": ["in_proj_weight"]}, 1),
    "dora": ({"target_modules": ["attn", "linear"], "use_dora": True}, 2),
    "nothing of it": ({"target_modules": "all-linear", "exclude_modules": ["out_proj"]}, 0),
    "its bias": ({"target_modules": ["linear"], "bias": "all"}, 0),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_that_no_folder_holds_is_named_at_once(name: str, tmp_path: Path) -> None:
    fields, count = ATTENTION[name]
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2), "linear": nn.Linear(8, 8)})
    config = LoraConfig(r=2, **fields)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapters = init(model, config)
    messages = [str(each.message) for each in caught if each.category is PeftFormatWarning]
    named = [name for name in adapters if messages and repr(name) in messages[0]]
    assert named == [name for name in adapters if name.startswith("attn") and "bias" not in name]
    assert (len(messages), len(named)) == (min(count, 1), count)
    if count:
        assert [each.filename for each in caught] == [__file__]
        with pytest.raises(UnsupportedError, match=r"nn\.MultiheadAttention|layout Attention"):
            save_peft(tmp_path / "a", adapters, config)
    else:
        save_peft(tmp_path / "a", adapters, config)


def test_many_projections_are_counted() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8), 5, enable_nested_tensor=False)
    with pytest.warns(PeftFormatWarning, match=r"'layers.2.self_attn.out_proj.weight' and 2 more: PEFT counts"):
        init(model, LoraConfig(r=2, target_modules="all-linear"))


def tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
