"""`merge`: one rounding, nothing shared that could be written to, and errors that say where."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import CASES, Case, dense_call, gen, gpt2, make_adapters, make_rule
from hypothesis import given
from hypothesis import strategies as st
from oracle import close, oracle, rewritten, tensors
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from funclora import DoRA, Full, LoRA, LoraConfig, base_params, init, merge
from funclora.errors import NonFiniteError, ParamsError, TiedWeightsWarning
from funclora.rules.layouts import Conv, Conv1D, Embedding, Linear, Parameter

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

HALF = [torch.bfloat16, torch.float16]
DTYPES = [torch.float64, torch.float32, *HALF]


def layer(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).to(dtype)
    model[1].running_mean.normal_()
    return model


# --- what the result holds -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
@pytest.mark.parametrize("leaf", DTYPES, ids=str)
@pytest.mark.parametrize("base", DTYPES, ids=str)
def test_keys_dtypes_and_devices_are_those_of_params(base: torch.dtype, leaf: torch.dtype, kind: str) -> None:
    params = base_params(layer(base))
    merged = merge(params, {"2.weight": make_rule(kind, Linear(), params["2.weight"], gen(1), leaf)})
    assert list(merged) == list(params)
    for name, value in merged.items():
        assert (value.dtype, value.device, value.shape) == (
            params[name].dtype,
            params[name].device,
            params[name].shape,
        )
        assert (value is params[name]) == (name != "2.weight"), name


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_result_aliases_nothing_that_was_rewritten(case: Case, kind: str) -> None:
    s = case.setup()
    adapters = make_adapters(case, s.params, kind, gen(1))
    merged = merge(s.params, adapters)
    assert merged is not s.params
    theirs = {t.untyped_storage().data_ptr() for t in (*s.params.values(), *tensors(adapters))}
    for name in adapters:
        assert merged[name].untyped_storage().data_ptr() not in theirs
        assert merged[name].untyped_storage().nbytes() == merged[name].nbytes  # no larger tensor is kept alive


@pytest.mark.parametrize("kind", ["lora", "dora", "full", "mixed"])
@pytest.mark.parametrize("case", [case for case in CASES if case.name != "gpt2"], ids=str)
def test_a_fresh_model_loads_the_result(case: Case, kind: str) -> None:
    s = case.setup()
    merged = merge(s.params, make_adapters(case, s.params, kind, gen(1)))
    fresh = case.setup(seed=1).model
    fresh.load_state_dict(merged)
    with torch.no_grad():
        close(fresh(*s.args, **s.kwargs), dense_call(s, merged), 1e-6)


def test_merging_nothing_is_a_copy_of_the_dict() -> None:
    params = base_params(layer())
    merged = merge(params, {})
    assert merged is not params
    assert all(merged[name] is params[name] for name in params)


def test_parameters_come_back_as_plain_tensors() -> None:
    model = layer()
    params = dict(model.state_dict(keep_vars=True))
    merged = merge(params, {"0.weight": make_rule("lora", Linear(), params["0.weight"].detach(), gen(1))})
    assert type(merged["0.weight"]) is Tensor
    assert merged["2.weight"] is params["2.weight"]


# --- one rounding ----------------------------------------------------------------------------------------------

# Multiples of 1/64 below 32, and products of small integers, are exact in float32: what the dense weight should be
# is known exactly, and so is its one rounding.
fractions = st.integers(-2047, 2047).map(lambda n: n / 64)
integers = st.integers(-7, 7)


def exact(values: Any, shape: tuple[int, ...], data: st.DataObject, dtype: torch.dtype) -> Tensor:
    n = torch.Size(shape).numel()
    return (
        torch.tensor(data.draw(st.lists(values, min_size=n, max_size=n)), dtype=torch.float64).reshape(shape).to(dtype)
    )


@pytest.mark.parametrize("base", HALF, ids=str)
@given(data=st.data(), leaf=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), transposed=st.booleans())
def test_lora_rounds_once(base: torch.dtype, data: st.DataObject, leaf: torch.dtype, transposed: bool) -> None:
    weight = exact(fractions, (4, 3) if transposed else (3, 4), data, base)
    layout = Conv1D() if transposed else Linear()
    rule = LoRA(exact(integers, (2, 4), data, leaf), exact(integers, (3, 2), data, leaf), scaling=0.125, layout=layout)
    update = 0.125 * (rule.b.double() @ rule.a.double())
    expected = (weight.double() + (update.T if transposed else update)).to(base)
    assert torch.equal(merge({"w": weight}, {"w": rule})["w"], expected)


@pytest.mark.parametrize("base", HALF, ids=str)
@given(data=st.data(), gain=st.integers(1, 255).map(lambda n: n / 64))
def test_dora_rounds_once(base: torch.dtype, data: st.DataObject, gain: float) -> None:
    # Rows whose norm is an integer, split between the base and the update.
    rows = [(3, 4, 0), (2, 3, 6), (1, 4, 8), (2, 6, 9), (4, 4, 7), (6, 6, 7)]
    v = torch.tensor([data.draw(st.sampled_from(rows)) for _ in range(4)], dtype=torch.float64)
    weight = exact(integers, (4, 3), data, base)
    update = v - weight.double()
    rule = DoRA(torch.eye(3), (update / 2).float(), (gain * v.square().sum(1).sqrt()).float(), scaling=2.0)
    assert torch.equal(merge({"w": weight}, {"w": rule})["w"], (gain * v).to(base))


@pytest.mark.parametrize("base", HALF, ids=str)
@pytest.mark.parametrize("name", ["conv2d-groups", "conv-t2d-groups", "embedding", "experts-bmm", "experts-loop-t"])
def test_every_layout_rounds_once(name: str, base: torch.dtype) -> None:
    case = next(case for case in CASES if case.name == name)
    s = case.setup(base)
    adapters = make_adapters(case, s.params, "lora", gen(1), torch.float32)
    expected, merged = rewritten(s.params, adapters), merge(s.params, adapters)
    for target in adapters:
        assert torch.equal(merged[target], expected[target])


@pytest.mark.parametrize("leaf", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_float64_is_kept(kind: str, leaf: torch.dtype) -> None:
    weight = torch.randn(6, 7, dtype=torch.float64)
    rule = make_rule(kind, Linear(), weight, gen(1), leaf)
    wide = pytree.tree_map(lambda t: t.double(), rule)
    torch.testing.assert_close(merge({"w": weight}, {"w": rule})["w"], oracle(weight, wide), rtol=1e-13, atol=1e-13)


def test_a_float64_adapter_is_rounded_once_to_float32() -> None:
    # 1 + 2⁻²⁴ + 2⁻⁴⁰ rounds up; with the adapter rounded to float32 first it would be a tie, and round down.
    rule = LoRA(torch.tensor([[1.0]]).double(), torch.tensor([[2.0**-24 + 2.0**-40]]).double())
    merged = merge({"w": torch.ones(1, 1)}, {"w": rule})["w"]
    assert merged.item() == 1 + 2.0**-23


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_autocast_does_not_reach_the_arithmetic(kind: str) -> None:
    params = base_params(layer())
    adapters = {"0.weight": make_rule(kind, Linear(), params["0.weight"], gen(1))}
    expected = merge(params, adapters)
    with torch.autocast("cpu", torch.bfloat16):
        merged = merge(params, adapters)
    assert torch.equal(merged["0.weight"], expected["0.weight"])


# --- what is refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "rule", "message"),
    [
        (
            torch.float16,
            LoRA(torch.full((1, 3), 300.0), torch.full((2, 1), 300.0)),
            "gives NaN or infinity in torch.float16",
        ),
        (
            torch.float32,
            LoRA(torch.full((1, 3), 1e30), torch.full((2, 1), 1e30)),
            "infinity before rounding in torch.float32",
        ),
        (
            torch.float32,
            LoRA(torch.full((1, 3), torch.nan), torch.ones(2, 1)),
            "infinity before rounding in torch.float32",
        ),
        (torch.bfloat16, Full(torch.full((2, 3), torch.inf)), "infinity before rounding in torch.bfloat16"),
        (torch.float16, Full(torch.full((2, 3), 1e6)), "gives NaN or infinity in torch.float16"),
        (torch.float32, DoRA(torch.ones(1, 3), torch.ones(2, 1), torch.tensor([1.0, torch.nan])), "NaN or infinity"),
    ],
    ids=["overflow-fp16", "overflow-fp32", "nan", "full-inf", "full-overflow", "magnitude"],
)
def test_a_result_that_is_not_finite_is_refused(base: torch.dtype, rule: Any, message: str) -> None:
    with pytest.raises(NonFiniteError, match=f"'deep.weight'.*{message}.*Check the adapter's training"):
        merge({"deep.weight": torch.ones(2, 3, dtype=base)}, {"deep.weight": rule})


def test_the_largest_finite_value_is_not_refused() -> None:
    rule = Full(torch.full((2, 3), 65504.0))
    assert merge({"w": torch.ones(2, 3, dtype=torch.float16)}, {"w": rule})["w"].max() == 65504


LORA = LoRA(torch.ones(2, 5), torch.ones(4, 2))


@pytest.mark.parametrize(
    ("name", "rule", "message"),
    [
        ("0.wieght", LORA, r"adapters rewrite '0.wieght', which params do not hold. Near names: 0.weight"),
        ("0.weight", replace(LORA, a=torch.ones(2, 6)), r"'0.weight': a has shape \[2, 6\], expected \[2, 5\]"),
        ("0.weight", replace(LORA, b=torch.ones(5, 2)), r"b has shape \[5, 2\], expected \[4, 2\] .* rank 2"),
        ("0.weight", replace(LORA, b=torch.ones(4, 3)), r"b has shape \[4, 3\], expected \[4, 2\]"),
        ("0.weight", replace(LORA, layout=Conv1D()), r"a has shape \[2, 5\], expected \[2, 4\].*layout Conv1D"),
        ("0.weight", DoRA(LORA.a, LORA.b, torch.ones(5)), r"magnitude has shape \[5\], expected \[4\]"),
        ("0.weight", Full(torch.ones(5, 4)), r"'0.weight': value has shape \[5, 4\], expected \[4, 5\]"),
        ("0.bias", LORA, r"'0.bias' has shape \[4\]; a low-rank update needs two or more dimensions.*Full"),
        ("1.num_batches_tracked", Full(torch.tensor(1)), "'1.num_batches_tracked' has dtype torch.int64"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value and " " not in value else "",
)
def test_what_does_not_fit_is_refused(name: str, rule: Any, message: str) -> None:
    with pytest.raises(ParamsError, match=message):
        merge(base_params(layer()), {name: rule})


@pytest.mark.parametrize("layout", [Linear(), Embedding(), Conv(), Parameter()], ids=lambda x: type(x).__name__)
def test_a_layout_that_does_not_fit_the_weight_is_refused(layout: Any) -> None:
    rule = make_rule("lora", Linear(), torch.ones(3, 4), gen(1))
    with pytest.raises(ParamsError, match=r"'w'.*shape"):
        merge({"w": torch.ones(5, 3, 4, 2)}, {"w": replace(rule, layout=layout)})


def test_integer_and_empty_weights_are_refused() -> None:
    rule = LoRA(torch.ones(1, 3), torch.ones(2, 1))
    with pytest.raises(ParamsError, match=r"'w' has dtype torch.int8; .* floating-point"):
        merge({"w": torch.ones(2, 3, dtype=torch.int8)}, {"w": rule})
    with pytest.raises(ParamsError, match=r"'w' has shape \[0, 3\]; it is empty|'w' has shape \[0, 3\]: it is empty"):
        merge({"w": torch.ones(0, 3)}, {"w": replace(rule, b=torch.ones(0, 1))})


# --- tied parameters -------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids))


@pytest.mark.parametrize(("target", "other"), [("embed.weight", "head.weight"), ("head.weight", "embed.weight")])
def test_one_of_two_tied_parameters_is_rewritten_alone(target: str, other: str) -> None:
    params = base_params(Tied())
    layout = Embedding() if target == "embed.weight" else Linear()
    rule = make_rule("lora", layout, params[target], gen(1))
    with pytest.warns(
        TiedWeightsWarning, match=f"'embed.weight', 'head.weight' are one tied .*'{target}' is rewritten"
    ):
        merged = merge(params, {target: rule})
    assert merged[other] is params[other]
    assert not torch.equal(merged[target], merged[other])
    close(merged[target], oracle(params[target], rule), 1e-6)

    untied = Tied()
    untied.head.weight = nn.Parameter(untied.head.weight.detach().clone())
    untied.load_state_dict(merged)
    expected = torch.nn.functional.embedding(torch.arange(6), merged["embed.weight"]) @ merged["head.weight"].T
    close(untied(torch.arange(6)), expected, 1e-6)


def test_parameters_that_are_not_tied_do_not_warn() -> None:
    whole = torch.randn(4, 3)
    params = {"all": whole, "part": whole[:2], "other": torch.randn(4, 3), "none": torch.empty(0), "no": torch.empty(0)}
    merge(params, {"part": make_rule("lora", Linear(), whole[:2], gen(1))})
    merge(base_params(Tied()), {})


def test_a_tied_transformers_model_loads_the_result_once_its_tie_is_removed() -> None:
    model = gpt2()
    params = base_params(model)
    rule = make_rule("lora", Embedding(), params["transformer.wte.weight"], gen(1))
    with pytest.warns(TiedWeightsWarning, match="tie_word_embeddings"):
        merged = merge(params, {"transformer.wte.weight": rule})
    untied = copy.deepcopy(model)
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach().clone())
    untied.load_state_dict(merged)
    assert torch.equal(untied.lm_head.weight, params["lm_head.weight"])
    assert torch.equal(untied.transformer.wte.weight, merged["transformer.wte.weight"])


@pytest.mark.parametrize(("module", "name"), [(nn.Embedding(5, 4), "e"), (nn.ConvTranspose2d(4, 6, 3, groups=2), "c")])
@pytest.mark.parametrize("use_dora", [False, True])
def test_merged_weights_lie_in_memory_as_the_base_does(module: nn.Module, name: str, use_dora: bool) -> None:
    model = nn.ModuleDict({name: module})
    params = base_params(model)
    adapters = init(model, LoraConfig(r=2, target_modules=[name], use_dora=use_dora, init_lora_weights=False))
    merged = merge(params, adapters)
    assert {n: t.stride() for n, t in merged.items()} == {n: t.stride() for n, t in params.items()}
