"""Weights of few bits: what the dense ones give, a dense weight for one layer at a time, and what PEFT gives."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import peft
import pytest
import torch
import torch.nn.functional as F
from cases import CASES, Case, Setup, gen, make_adapters, make_rule, plain_attention
from oracle import close, distance, snapshot
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, LlamaConfig

import funclora as fl
from funclora import DoRA, Full, LoRA, apply, base_params, bind, dequantize, merge, quantize
from funclora._quant.tensor import Quantized
from funclora._torch.memory import Peak, nbytes
from funclora.errors import (
    ConfigError,
    NonFiniteError,
    ParamsError,
    PurityError,
    TargetError,
    UnsupportedError,
)
from funclora.rules.layouts import Embedding, Linear

pytestmark = pytest.mark.filterwarnings(
    "ignore:LSTM with projections is not supported with oneDNN",
    "ignore:.*has no fast form:funclora.errors.DenseFallbackWarning",
)

FORMS: dict[str, dict[str, Any]] = {
    "nf4": {"kind": "nf4"},
    "nf4-double": {"kind": "nf4", "double_quant": True},
    "fp4-32": {"kind": "fp4", "blocksize": 32},
    "int8": {"kind": "int8"},
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
forms = pytest.mark.parametrize("form", FORMS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def packed(weight: Tensor, form: str = "nf4") -> Any:
    return quantize({"w": weight}, ["w"], **FORMS[form])["w"]


def leaves_of(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


# --- the weight itself -----------------------------------------------------------------------------------------


@dtypes
@forms
def test_a_weight_unpacks_to_what_bitsandbytes_unpacks(form: str, dtype: torch.dtype) -> None:
    w = torch.randn(48, 128).to(dtype)
    weight = packed(w, form)
    if form == "int8":
        values, scales, _ = bnb.functional.int8_vectorwise_quant(w.half())
        expected = bnb.functional.int8_vectorwise_dequant(values, scales).to(dtype)
        size, error = 48 * 128 + 4 * 48, 0.02
    else:
        options = FORMS[form]
        expected = bnb.functional.dequantize_4bit(*bnb.functional.quantize_4bit(
            w, quant_type=options["kind"], blocksize=options.get("blocksize", 64),
            compress_statistics=options.get("double_quant", False),
        ))  # fmt: skip
        blocks = 48 * 128 // options.get("blocksize", 64)
        scales = blocks + 4 * (1 + -(-blocks // 256) + 256) if options.get("double_quant") else 4 * blocks
        size, error = 48 * 128 // 2 + scales + 4 * 16, 0.25
    torch.testing.assert_close(weight.dequantize(), expected, rtol=0, atol=0)
    assert (weight.dequantize() - w).abs().max() < error * w.abs().max()
    assert weight.nbytes == nbytes(weight) == size
    assert (weight.shape, weight.dtype, weight.device, weight.requires_grad) == (w.shape, dtype, w.device, False)


@pytest.mark.parametrize("shape", [(7, 33), (1, 1), (1, 2), (2, 1), (5, 3, 3, 3), (10, 7), (3, 64)], ids=str)
@pytest.mark.parametrize("form", ["nf4", "fp4-32", "nf4-double"])
def test_any_shape_and_order_in_memory_unpacks(form: str, shape: tuple[int, ...]) -> None:
    w = torch.randn(shape)
    dense = packed(w, form).dequantize()
    assert dense.shape == w.shape
    assert (dense - w).abs().max() <= 0.35 * w.abs().max()
    order = (1, 0, *range(2, w.dim()))
    turned = w.permute(order).contiguous().permute(order)  # the same values, stored otherwise
    torch.testing.assert_close(packed(turned, form).dequantize(), dense, rtol=0, atol=0)


VIEWS: dict[str, Callable[[Any], Any]] = {
    "T": lambda w: w.T,
    "mT": lambda w: w.mT,
    "transpose": lambda w: w.transpose(0, 1),
    "permute": lambda w: w.permute(1, 0),
    "movedim": lambda w: torch.movedim(w, 0, 1),
    "by name": lambda w: w.transpose(dim0=0, dim1=1),
    "chunk": lambda w: w.chunk(3)[1],
    "split": lambda w: torch.split(w, [5, 11], dim=0)[1],
    "unbind of T": lambda w: w.T.unbind()[7],
    "reshape": lambda w: w.reshape(4, 4, 64)[2],
    "one more": lambda w: w.unsqueeze(0).mT,
    "rows": lambda w: w.narrow(0, 3, 5),
    "columns": lambda w: w.narrow(1, 3, 5),
    "row": lambda w: w[-2],
    "slice": lambda w: w[1:9:2, None],
    "rows of T": lambda w: w.T.narrow(0, 3, 5).T[1],
}


@forms
@pytest.mark.parametrize("view", VIEWS)
def test_views_are_those_of_the_dense_weight(view: str, form: str) -> None:
    weight = packed(torch.randn(16, 64), form)
    actual, expected = VIEWS[view](weight), VIEWS[view](weight.dequantize())
    assert isinstance(actual, Quantized)
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual.dequantize(), expected, rtol=0, atol=0)


CONTRACTIONS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "einsum": lambda w, x: torch.einsum("ti,oi->to", x, w),
    "einsum turned": lambda w, x: torch.einsum("oi,...i->o...", w, x),
    "einsum backwards": lambda w, x: torch.einsum("to,oi->ti", x[:, :16], w),
    "einsum of blocks": lambda w, x: torch.einsum("ti,eoi->teo", x, w.view(4, 4, 64)),
    "tensordot": lambda w, x: torch.tensordot(x, w, ([1], [1])),
    "inner": torch.inner,
    "mv": lambda w, x: torch.mv(w, x[0]),
    "matmul": lambda w, x: w[3:7] @ x[0],
}


@pytest.mark.parametrize("name", CONTRACTIONS)
def test_sums_of_products_are_those_of_the_dense_weight_and_keep_none(name: str) -> None:
    weight = packed(torch.randn(16, 64))
    x = torch.randn(3, 64, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        actual = CONTRACTIONS[name](weight, x)
    assert all(t.numel() < weight.numel() or not t.is_floating_point() for t in saved)
    expected = CONTRACTIONS[name](weight.dequantize(), x)
    close(actual, expected, 1e-5)
    close(torch.autograd.grad(actual.square().sum(), x), torch.autograd.grad(expected.square().sum(), x), 1e-5)


@forms
def test_a_slice_of_rows_unpacks_no_other_rows(form: str) -> None:
    weight = packed(torch.randn(3, 16, 64), form) if form != "int8" else packed(torch.randn(48, 64), form)
    with Peak() as memory:
        some = weight[1].dequantize()
    assert memory.peak < 3 * some.nbytes if form != "int8" else some.shape == (64,)


@forms
def test_copies_and_casts_stay_quantised(form: str) -> None:
    weight = packed(torch.randn(16, 64), form)
    dense = weight.dequantize()
    for same in (copy.deepcopy(weight), pickle.loads(pickle.dumps(weight)), weight.clone(), weight.detach(),
                 weight.contiguous(), weight.to("cpu"), weight.data, weight.requires_grad_(False)):  # fmt: skip
        assert isinstance(same, Quantized)
        torch.testing.assert_close(same.dequantize(), dense, rtol=0, atol=0)
    assert weight.clone().parts[0].data_ptr() != weight.parts[0].data_ptr()
    for cast, dtype in ((weight.bfloat16(), torch.bfloat16), (weight.to(torch.float16), torch.float16),
                        (weight.double(), torch.float64)):  # fmt: skip
        assert isinstance(cast, Quantized)
        assert cast.dtype == cast.dequantize().dtype == dtype
        torch.testing.assert_close(cast.dequantize(), dense.to(dtype), rtol=0, atol=0)
    assert torch.ones(2).to(weight.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(weight + 1, dense + 1, rtol=0, atol=0)
    assert torch.zeros_like(weight).shape == weight.new_zeros(16, 64).shape == dense.shape


def test_what_would_write_to_a_weight_is_refused() -> None:
    weight = packed(torch.randn(16, 64))
    with pytest.raises(PurityError, match="mul_ would write to a quantised weight"):
        weight.mul_(2)
    with pytest.raises(PurityError, match="would write to a quantised weight"):
        weight[0] = 1.0
    with pytest.raises(UnsupportedError, match="cannot require a gradient"):
        weight.requires_grad_()


# --- models under adapters -------------------------------------------------------------------------------------

SMALL = [case for case in CASES if case.name not in ("gpt2", "llama")]


def quantised(case: Case, form: str, dtype: torch.dtype = torch.float32) -> tuple[Setup, dict[str, Tensor]]:
    """The case with quantised targets, and the params that these unpack to."""
    s = case.setup(dtype)
    s = s._replace(params=quantize(s.params, case.targets, **FORMS[form]))
    assert all(isinstance(s.params[name], Quantized) for name in case.targets)
    return s, dequantize(s.params)


def results(s: Setup, params: dict[str, Tensor], adapters: dict[str, Any]) -> tuple[Any, list[Tensor]]:
    """The output, and the gradients with respect to the adapters and the inputs."""
    inputs = [x.detach().clone().requires_grad_() if x.is_floating_point() else x for x in s.args]
    tree = pytree.tree_map(lambda leaf: leaf.detach().clone().requires_grad_(), adapters)
    out = apply(s.model, params, tree, *inputs, **s.kwargs)
    total = torch.stack([y.float().square().sum() for y in leaves_of(out) if y.requires_grad]).sum()
    wanted = [*leaves_of(tree), *(x for x in inputs if x.requires_grad)]
    return out, [g for g in torch.autograd.grad(total, wanted, allow_unused=True) if g is not None]


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_every_layer_computes_with_the_unpacked_weight(case: Case, kind: str) -> None:
    form = "nf4-double" if kind == "lora" else "fp4-32"
    with plain_attention():
        s, dense = quantised(case, form)
        adapters = make_adapters(case, dense, kind, gen(1))
        check = snapshot(s.model, dense, adapters)
        out, grads = results(s, s.params, adapters)
        expected, expected_grads = results(s, dense, adapters)
        close(out, expected, 1e-6)
        close(grads, expected_grads, 1e-5)
        assert distance(out, apply(s.model, s.params, {}, *s.args, **s.kwargs)) > 1e-3  # the adapter does something
        close(apply(s.model, s.params, {}, *s.args, **s.kwargs), apply(s.model, dense, {}, *s.args, **s.kwargs), 1e-6)
        check()


@dtypes
@pytest.mark.parametrize("form", ["nf4", "int8"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("name", ["linear", "gpt2-conv1d", "embedding", "matmul-t"])
def test_every_form_and_dtype(name: str, kind: str, form: str, dtype: torch.dtype) -> None:
    case = next(case for case in CASES if case.name == name)
    s, dense = quantised(case, form, dtype)
    adapters = make_adapters(case, dense, kind, gen(1), torch.float32)
    out, grads = results(s, s.params, adapters)
    expected, expected_grads = results(s, dense, adapters)
    # The bias is added to a rounded product, where the dense layer rounds once.
    tolerance = {torch.float32: 1e-6, torch.float16: 4e-3, torch.bfloat16: 2e-2}[dtype]
    close(out, expected, tolerance)
    close(grads, expected_grads, 4 * tolerance)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("case", [c for c in CASES if c.name in ("gpt2", "llama")], ids=str)
def test_whole_models(case: Case, kind: str) -> None:
    with plain_attention():
        s, dense = quantised(case, "nf4")
        adapters = make_adapters(case, dense, kind, gen(1))
        (out, grads), (expected, expected_grads) = (results(s, params, adapters) for params in (s.params, dense))
        close(out, expected, 1e-5)
        close(grads, expected_grads, 1e-4)


@pytest.mark.parametrize("case", [case for case in SMALL if not case.no_vmap], ids=str)
def test_vmap_over_members(case: Case) -> None:
    with plain_attention():
        s, dense = quantised(case, "nf4")
        members = fl.stack(
            [make_adapters(case, dense, kind, gen(i)) for i, kind in enumerate(("lora", "dora", "lora"))]
        )

        def grads(params: dict[str, Tensor]) -> Any:
            def loss(adapters: Any) -> Tensor:
                out = leaves_of(apply(s.model, params, adapters, *s.args, **s.kwargs))
                return torch.stack([y.square().sum() for y in out]).sum()

            return [torch.func.vmap(torch.func.grad_and_value(loss))(group.tree()) for group in members.groups]

        close(grads(s.params), grads(dense), 1e-5)


def test_transforms_reach_params_that_are_arguments() -> None:
    """torch.func.grad wraps every tensor that it is given, those of params too."""
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 16))
    params = quantize(base_params(model), ["0", "2"], "nf4")
    adapters = {"0.weight": make_rule("dora", Linear(), params["0.weight"].dequantize(), gen(0))}
    x = torch.randn(3, 16)

    def loss(adapters: Any, params: Any, x: Tensor) -> Tensor:
        return apply(model, params, adapters, x).square().sum()

    for transform in (torch.func.grad, torch.func.jacfwd, torch.func.hessian):
        close(transform(loss)(adapters, params, x), transform(loss)(adapters, dequantize(params), x), 1e-5)
        by_x = transform(loss, argnums=2)
        close(by_x(adapters, params, x), by_x(adapters, dequantize(params), x), 1e-5)


@pytest.mark.parametrize("op", ["linear", "matmul", "left", "row"])
def test_second_derivatives_and_forward_mode_by_the_input(op: str) -> None:
    weight = packed(torch.randn(6, 8)).double()
    call: Callable[[Tensor], Tensor] = {
        "linear": lambda x: F.linear(x, weight),
        "matmul": lambda x: x @ weight.T,
        "left": lambda x: weight @ x.T,
        "row": lambda x: torch.matmul(x, weight[0]),
    }[op]
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(call, (x,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda x: call(x).square(), (x,))


def test_convolutions_have_second_derivatives_and_forward_mode() -> None:
    weight = packed(torch.randn(3, 2, 2, 2)).double()
    x = torch.randn(1, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    for call in (lambda x: F.conv2d(x, weight, padding=1), lambda x: F.conv_transpose2d(x, weight[:2], stride=2)):
        assert torch.autograd.gradcheck(call, (x,), check_forward_ad=True)
        assert torch.autograd.gradgradcheck(lambda x, call=call: call(x).square(), (x,))


def test_autocast_and_inputs_of_another_dtype() -> None:
    model = nn.Linear(16, 64)
    params = quantize(base_params(model), ["weight"])
    dense = dequantize(params)
    x = torch.randn(3, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = apply(model, params, {}, x), apply(model, dense, {}, x)
    assert y.dtype == expected.dtype == torch.bfloat16
    close(y, expected, 2e-2)
    close(torch.autograd.grad(y.sum(), x), torch.autograd.grad(expected.sum(), x), 2e-2)
    y = apply(model, params, {}, x.bfloat16())  # computed in float32, as the modules of bitsandbytes do
    assert y.dtype == torch.bfloat16
    close(y, apply(model, dense, {}, x.bfloat16().float()).bfloat16(), 0)


# --- many adapters ---------------------------------------------------------------------------------------------


def mlp(layers: int = 2, dim: int = 64) -> nn.Module:
    return nn.Sequential(*(part for _ in range(layers) for part in (nn.Linear(dim, dim), nn.Tanh())))


def members_of(params: dict[str, Tensor], *, bias: bool = False) -> list[dict[str, Any]]:
    """A LoRA, a DoRA of another rank, and one that leaves a quantised layer alone."""
    weights = {name: value.dequantize() for name, value in params.items() if isinstance(value, Quantized)}
    members: list[dict[str, Any]] = [
        {name: make_rule(kind, Linear(), weight, gen(i), r=r) for name, weight in weights.items()}
        for i, (kind, r) in enumerate((("lora", 2), ("dora", 3), ("lora", 2)))
    ]
    del members[2]["0.weight"]
    if bias:
        members[0]["0.bias"] = Full(torch.randn(64))
    return members


@pytest.mark.parametrize("bias", [False, True], ids=["weights", "bias"])
def test_rows_of_different_members(bias: bool) -> None:
    model = mlp()
    params = quantize(base_params(model), ["0", "2"], "nf4", double_quant=True)
    members, x = members_of(params, bias=bias), torch.randn(6, 64, requires_grad=True)
    ids = [2, 0, -1, 1, 0, 2]
    y = apply(model, params, fl.route(fl.stack(members), ids), x)
    for row, j in enumerate(ids):
        alone = apply(model, params, members[j] if j >= 0 else {}, x[row])
        close(y[row], alone, 1e-5)
    dense = apply(model, dequantize(params), fl.route(fl.stack(members), ids), x)
    close(torch.autograd.grad(y.square().sum(), x), torch.autograd.grad(dense.square().sum(), x), 1e-5)


def loss_of(bound: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(bound(batch[0]), batch[1])


def test_a_population_trains_as_each_member_alone() -> None:
    model = mlp()
    params = quantize(base_params(model), ["0", "2"], "nf4")
    members = members_of(params)
    optimizer = fl.optim.adamw(1e-2)
    together = fl.optim.per_member(fl.optim.adamw, lr=[1e-2] * 3)
    batch = torch.randn(3, 5, 64), torch.randn(3, 5, 64)
    several, state = fl.stack(members), together.init(fl.stack(members))
    alone: list[Any] = [[member, optimizer.init(member)] for member in members]
    step, one = fl.population_step(model, loss_of, together), fl.train_step(model, loss_of, optimizer)
    for _ in range(3):
        several, state, metrics = step(params, several, state, batch)
        for i in range(3):
            *alone[i], expected = one(params, *alone[i], (batch[0][i], batch[1][i]))
            close(metrics["loss"][i], expected["loss"], 1e-5)
    for i, (member, _) in enumerate(alone):
        close(several[i], member, 1e-4)


# --- memory ----------------------------------------------------------------------------------------------------

LAYERS, DIM = 8, 256
DENSE = DIM * DIM * 4  # bytes of one dense weight


def train_steps() -> dict[str, Callable[[nn.Module, Any, Any, Tensor], Any]]:
    def loss(bound: Any, x: Tensor) -> Tensor:
        return bound(x).square().mean()

    def functional(model: nn.Module, params: Any, adapters: Any, x: Tensor) -> Any:
        return torch.func.grad(lambda a: loss(bind(model, params, a), x))(adapters)

    def mapped(model: nn.Module, params: Any, adapters: Any, x: Tensor) -> Any:
        return fl.vmap(lambda a: functional(model, params, a, x))(fl.stack([adapters] * 3))

    def population(model: nn.Module, params: Any, adapters: Any, x: Tensor) -> Any:
        sgd, several = fl.optim.per_member(fl.optim.sgd, lr=[0.1] * 3), fl.stack([adapters] * 3)
        step = fl.population_step(model, loss, sgd)
        return step(params, several, sgd.init(several), x.expand(3, *x.shape))

    def routed(model: nn.Module, params: Any, adapters: Any, x: Tensor) -> Any:
        rule = fl.route(fl.stack([adapters] * 2), [1, 0])
        return torch.autograd.grad(apply(model, params, rule, x).square().sum(), x)

    return {
        "rows": routed,
        "autograd": fl.value_and_grad(loss),
        "func.grad": functional,
        "vmap": mapped,
        "population": population,
        "inference": lambda model, params, adapters, x: apply(model, params, adapters, x.detach()),
    }


class Deep(nn.Module):
    """Linear layers; recomputed in backward, if asked."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(LAYERS))
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False).tanh() if self.checkpointed else layer(x).tanh()
        return x


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("step", train_steps())
def test_a_dense_weight_exists_for_one_layer_at_a_time(step: str, kind: str) -> None:
    """Also of the layers without an adapter: every other one."""
    model = Deep()
    params = quantize(base_params(model), [f"layers.{i}" for i in range(LAYERS)], "nf4")
    weights = [f"layers.{i}.weight" for i in range(0, LAYERS, 2)]
    adapters = {name: make_rule(kind, Linear(), params[name].dequantize(), gen(0)) for name in weights}
    assert nbytes(params) < 0.17 * nbytes(base_params(model))
    run, x = train_steps()[step], torch.randn(2, DIM, requires_grad=True)
    with Peak() as memory:
        run(model, params, adapters, x)
    with Peak() as of_dense:
        run(model, dequantize(params), adapters, x)
    # Activations, adapters and their gradients are there in either case. DoRA's norms look at blocks of the weight.
    assert memory.peak < of_dense.peak - LAYERS * DENSE + 2.5 * DENSE
    assert of_dense.peak > LAYERS * DENSE


def test_checkpointing() -> None:
    model, plain = Deep(checkpointed=True), Deep()
    plain.load_state_dict(model.state_dict())
    params = quantize(base_params(model), [f"layers.{i}" for i in range(LAYERS)], "nf4")
    adapters = {name: make_rule("dora", Linear(), w.dequantize(), gen(0)) for name, w in params.items() if w.dim() > 1}
    batch = torch.randn(2, DIM), torch.randn(2, DIM)
    grads = fl.value_and_grad(loss_of)
    close(grads(model, params, adapters, batch), grads(plain, dequantize(params), adapters, batch), 1e-5)


def test_an_embedding_unpacks_the_rows_that_it_reads() -> None:
    table = torch.randn(5000, 64)
    ids = torch.tensor([[3, 4999], [0, 3]])
    for form in FORMS:
        weight = packed(table, form)
        with Peak() as memory:
            rows = F.embedding(ids, weight)
        torch.testing.assert_close(rows, weight.dequantize()[ids], rtol=0, atol=0)
        assert memory.peak < table.nbytes / 8
    with pytest.raises((IndexError, RuntimeError), match="out of range"):
        F.embedding(torch.tensor([-1]), packed(table))


# --- params ----------------------------------------------------------------------------------------------------


def test_targets_are_named_as_in_configurations() -> None:
    model = nn.ModuleDict({"q_proj": nn.Linear(8, 8), "old_q_proj": nn.Linear(8, 8), "norm": nn.LayerNorm(8)})
    params = base_params(model)

    def found(*targets: str) -> list[str]:
        return [name for name, value in quantize(params, targets).items() if isinstance(value, Quantized)]

    assert found("q_proj") == found("q_proj.weight") == ["q_proj.weight"]
    assert found("q_proj", "old_q_proj.weight") == ["q_proj.weight", "old_q_proj.weight"]
    adapters = fl.init(model, fl.LoraConfig(target_modules=["q_proj"]))
    assert [n for n, v in quantize(params, adapters).items() if isinstance(v, Quantized)] == ["q_proj.weight"]
    packed_params = quantize(params, ["q_proj"])
    assert packed_params["norm.weight"] is params["norm.weight"]
    assert list(packed_params) == list(params)


def test_tied_weights_are_packed_once_and_counted_once() -> None:
    model = nn.ModuleDict({"a": nn.Embedding(8, 64), "b": nn.Linear(64, 8, bias=False)})
    model["b"].weight = model["a"].weight
    params = quantize(base_params(model), ["a", "b"])
    assert params["a.weight"] is params["b.weight"]
    adapters = {"a.weight": LoRA(torch.ones(1, 8), torch.ones(64, 1), layout=Embedding())}
    assert fl.summary(params, adapters).total == 8 * 64


def test_summary_counts_values_not_bytes() -> None:
    model = mlp()
    params = base_params(model)
    adapters = fl.init(model, fl.LoraConfig(r=2, target_modules="all-linear"))
    assert str(fl.summary(quantize(params, ["0", "2"]), adapters)) == str(fl.summary(params, adapters))


@pytest.mark.parametrize(
    ("weight", "options", "error", "message"),
    [
        (torch.ones(4, 4), {"kind": "nf5"}, ConfigError, "kind: expected 'nf4', 'fp4' or 'int8', got 'nf5'"),
        (torch.ones(4, 4), {"blocksize": 48}, ConfigError, "blocksize: expected one of .* got 48"),
        (torch.ones(4, 4), {"kind": "int8", "double_quant": True}, ConfigError, "options of 4 bits"),
        (torch.ones(4, 4), {"dtype": torch.float64}, ConfigError, "dtype: expected one of .* got torch.float64"),
        (torch.ones(4, 4).double(), {}, ParamsError, "'w' has dtype torch.float64, expected one of"),
        (torch.ones(4, 4, device="meta"), {}, ParamsError, "'w' is on the meta device"),
        (torch.ones(0, 4), {}, ParamsError, r"'w' has shape \[0, 4\]: there are no values"),
        (torch.full((4, 4), float("nan")), {}, NonFiniteError, "'w' holds NaN or infinity"),
        (torch.full((4, 4), 1e5), {"kind": "int8"}, NonFiniteError, "packed from float16, in which a weight overflows"),
        (torch.ones(4), {}, TargetError, r"'w' has shape \[4\]. Only matrices"),
        (torch.ones(4, 4, 2), {"kind": "int8"}, UnsupportedError, "int8 holds one scale for each row of a matrix"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_cannot_be_quantised(weight: Tensor, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        quantize({"w": weight}, ["w"], **options)


def test_targets_that_name_nothing() -> None:
    params = base_params(mlp())
    with pytest.raises(TargetError, match="'q_prj' matches no weight of params"):
        quantize(params, ["0", "q_prj"])
    with pytest.raises(ConfigError, match=r"targets: expected names .* got the string 'all-linear'"):
        quantize(params, "all-linear")
    with pytest.raises(ParamsError, match=r"'0.weight' is quantised already"):
        quantize(quantize(params, ["0"]), ["0"])


def test_without_bitsandbytes_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'funclora\[quant\]'"):
        quantize({"w": torch.ones(4, 4)}, ["w"])


def test_a_quantised_weight_is_not_trained_in_full() -> None:
    model = mlp()
    params = quantize(base_params(model), ["0"])
    with pytest.raises(ParamsError, match=r"'0.weight' is quantised and cannot be trained fully"):
        apply(model, params, {"0.weight": Full(torch.ones(64, 64))}, torch.ones(64))
    config = fl.LoraConfig(target_modules=["2"], modules_to_save=["0"])
    with pytest.raises(ParamsError, match=r"'0.weight' is quantised and cannot be trained fully"):
        fl.init(model, config, params=params)
    apply(model, params, {"2.weight": Full(torch.ones(64, 64)), "0.bias": Full(torch.ones(64))}, torch.ones(64))


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_merge_says_into_which_base(kind: str) -> None:
    model = mlp()
    original = base_params(model)
    params = quantize(original, ["0", "2"], "nf4")
    adapters = {"0.weight": make_rule(kind, Linear(), original["0.weight"], gen(0))}
    with pytest.raises(UnsupportedError, match=r"merge\(dequantize\(params\), adapters\) .* merge\(original_params"):
        merge(params, adapters)
    x = torch.randn(3, 64)
    trained = merge(dequantize(params), adapters)
    close(apply(model, trained, {}, x), apply(model, params, adapters, x), 1e-5)
    close(apply(model, merge(original, adapters), {}, x), apply(model, original, adapters, x), 1e-5)
    assert not torch.allclose(merge(original, adapters)["0.weight"], trained["0.weight"], atol=1e-3)
    half = dequantize(quantize(original, ["0"], dtype=torch.float32), torch.float16)
    assert (half["0.weight"].dtype, half["2.weight"].dtype) == (torch.float16, torch.float32)


def test_dora_starts_at_the_norms_of_the_unpacked_weight() -> None:
    model = mlp()
    params = quantize(base_params(model), ["0"])
    adapters = fl.init(model, fl.LoraConfig(r=2, target_modules=["0"], use_dora=True), params=params)
    rule = adapters["0.weight"]
    assert isinstance(rule, DoRA)
    close(rule.magnitude, params["0.weight"].dequantize().norm(dim=1), 1e-6)
    x = torch.randn(3, 64)
    close(apply(model, params, adapters, x), apply(model, params, {}, x), 1e-6)


def test_bind_works_norms_out_once() -> None:
    model = mlp()
    params = quantize(base_params(model), ["0"])
    adapters = {"0.weight": make_rule("dora", Linear(), params["0.weight"].dequantize(), gen(0))}
    bound = bind(model, params, adapters)
    unpacked: list[torch.Size] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if "bitsandbytes" in str(func):
                unpacked.append(out.shape)
            return out

    with Watch(), torch.no_grad():
        bound(torch.ones(1, 64))
    assert len(unpacked) == 1  # by the product
    unpacked.clear()
    rule = adapters["0.weight"]
    with Watch():
        y = apply(model, params, {"0.weight": replace(rule, a=rule.a.clone().requires_grad_())}, torch.ones(1, 64))
        assert len(unpacked) == 1  # for the norms and the product together
        y.sum().backward()
    assert len(unpacked) == 1  # no gradient by the input is wanted


# --- torch.compile ---------------------------------------------------------------------------------------------


def test_compiled_functions_compute_the_same() -> None:
    model = mlp()
    params = quantize(base_params(model), ["0", "2"], "nf4", double_quant=True)
    adapters = {"0.weight": make_rule("dora", Linear(), params["0.weight"].dequantize(), gen(0))}
    batch = torch.randn(3, 64), torch.randn(3, 64)
    torch._dynamo.reset()
    call = torch.compile(lambda p, a, x: apply(model, p, a, x), fullgraph=True, backend="aot_eager")
    close(call(params, adapters, batch[0]), apply(model, params, adapters, batch[0]), 1e-5)
    grads = torch.compile(lambda p, a: fl.value_and_grad(loss_of)(model, p, a, batch), fullgraph=True,
                          backend="aot_eager")  # fmt: skip
    close(grads(params, adapters), fl.value_and_grad(loss_of)(model, params, adapters, batch), 1e-5)
    view = torch.compile(lambda w, x: x @ w.T, fullgraph=True, backend="aot_eager")
    close(view(params["0.weight"], batch[0]), batch[0] @ params["0.weight"].T, 1e-6)


# --- models that bitsandbytes quantised, and PEFT --------------------------------------------------------------

LLAMA = LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=32, initializer_range=0.2, attn_implementation="eager",
)  # fmt: skip
GPT2 = GPT2Config(vocab_size=64, n_positions=32, n_embd=64, n_layer=2, n_head=2, initializer_range=0.2,
                  resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, attn_implementation="eager")  # fmt: skip
IDS = torch.arange(24).reshape(2, 12) * 7 % 64


def folder_of(config: Any, path: Path) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


def load(path: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A model that transformers quantises while it loads it."""
    options = options or {
        "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": dtype,
    }  # fmt: skip
    return AutoModelForCausalLM.from_pretrained(
        path, quantization_config=BitsAndBytesConfig(**options), device_map="cpu", dtype=dtype
    )


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(LLAMA, tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(GPT2, tmp_path_factory.mktemp("gpt2"))


def changed(adapters: Any, seed: int = 0) -> Any:
    """The adapters with updates that are not zero."""
    generator = gen(seed)
    return {
        name: replace(rule, b=torch.randn(rule.b.shape, generator=generator) / 8) for name, rule in adapters.items()
    }


def language_loss(model: Any, ids: Tensor) -> Tensor:
    logits = model(ids).logits[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def grads_of_peft(model: Any) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            path, _, leaf = name.removeprefix("base_model.model.").partition(".lora_")
            leaf = {"A": "a", "B": "b", "m": "magnitude"}[leaf[0]]
            found[f"{path}.weight.{leaf}"] = parameter.grad
    return found


def by_leaf(adapters: Any) -> dict[str, Tensor]:
    return {f"{name}.{leaf}": getattr(rule, leaf) for name, rule in adapters.items() for leaf in rule.leaf_names}


@pytest.fixture(params=[False, True], ids=["plain", "avx512-bf16"])
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What bitsandbytes takes this processor for.

    With AVX512-BF16 its layers repack their weights in evaluation mode, with a loss of precision. References are in
    training mode, where they do not, and without dropout.
    """
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: request.param)


on_both_processors = pytest.mark.usefixtures("processor")


@on_both_processors
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_model_loaded_in_4_bits_is_peft_s(
    name: str, dora: bool, dtype: torch.dtype, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(name)
    model = load(folder, dtype)
    params = base_params(model)
    config = fl.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", use_dora=dora, task_type="CAUSAL_LM")
    adapters = changed(fl.init(model, config, params=params))
    assert {type(params[name]) for name in adapters} == {Quantized}
    assert len(adapters) == {"llama": 14, "gpt2": 8}[name]
    fl.save_peft(tmp_path, adapters, config)
    reference = peft.PeftModel.from_pretrained(load(folder, dtype), tmp_path, is_trainable=True).train()
    tolerance = 2e-6 if dtype == torch.float32 else 4e-2
    close(apply(model, params, adapters, IDS).logits, reference(IDS).logits, tolerance)
    loss, grads = fl.value_and_grad(language_loss)(model, params, adapters, IDS)
    expected = language_loss(reference, IDS)
    expected.backward()
    close(loss, expected.detach(), tolerance)
    actual, wanted = by_leaf(grads), grads_of_peft(reference)
    assert actual.keys() == wanted.keys()
    for key in actual:
        close(actual[key], wanted[key], 50 * tolerance if dtype == torch.float32 else 0.3)
    if dtype == torch.float32:
        close(apply(model, params, fl.load_peft(tmp_path, model)[0], IDS).logits, reference(IDS).logits, tolerance)


@on_both_processors
def test_training_in_4_bits_is_peft_s(llama: Path, tmp_path: Path) -> None:
    model = load(llama)
    params = base_params(model)
    config = fl.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    adapters = changed(fl.init(model, config, params=params))
    fl.save_peft(tmp_path, adapters, config)
    reference = peft.PeftModel.from_pretrained(load(llama), tmp_path, is_trainable=True).train()
    theirs = torch.optim.SGD([p for p in reference.parameters() if p.requires_grad], lr=0.1)
    ours = fl.optim.sgd(0.1)
    step, state = fl.train_step(model, language_loss, ours), ours.init(adapters)
    for _ in range(10):
        adapters, state, metrics = step(params, adapters, state, IDS)
        theirs.zero_grad()
        expected = language_loss(reference, IDS)
        expected.backward()
        theirs.step()
        close(metrics["loss"], expected.detach(), 1e-5)
    fl.save_peft(tmp_path / "ours", adapters, config)
    again = peft.PeftModel.from_pretrained(load(llama), tmp_path / "ours").train()
    close(again(IDS).logits, reference(IDS).logits, 1e-4)


@on_both_processors
def test_a_loaded_model_keeps_its_weights_and_takes_others(llama: Path) -> None:
    model, plain = load(llama), AutoModelForCausalLM.from_pretrained(llama)
    expected = model(IDS).logits
    params = base_params(model)
    target = "model.layers.0.mlp.down_proj.weight"
    weight = params[target]
    assert isinstance(weight, Quantized)
    assert weight.parts[0].data_ptr() == model.get_parameter(target).data_ptr()  # not copied
    own = quantize(base_params(plain), [n for n, value in params.items() if isinstance(value, Quantized)],
                   "nf4", double_quant=True)  # fmt: skip
    dense = dequantize(params)
    for run, given in ((model, params), (plain, params), (model, own), (plain, own), (model, dense), (plain, dense)):
        close(apply(run, given, {}, IDS).logits, expected, 1e-6)
    check = {name: (type(module), module.__dict__.copy()) for name, module in model.named_modules()}
    adapters = changed(fl.init(model, fl.LoraConfig(target_modules="all-linear"), params=params))
    bound = bind(model, params, adapters)
    with torch.no_grad():
        tokens = bound.generate(IDS[:1], max_new_tokens=4, do_sample=False, pad_token_id=0)
        merged = apply(plain, merge(dense, adapters), {}, IDS).logits
    assert tokens.shape == (1, 16)
    close(merged, bound(IDS).logits, 1e-5)
    close(model(IDS).logits, expected, 0)
    for name, module in model.named_modules():
        assert (type(module), module.__dict__) == check[name], name
    assert isinstance(bound.model.layers[0].mlp.down_proj, bnb.nn.Linear4bit)


@on_both_processors
def test_a_loaded_model_trains_under_checkpointing(llama: Path) -> None:
    model = load(llama)
    params = base_params(model)
    adapters = changed(fl.init(model, fl.LoraConfig(target_modules="all-linear"), params=params))
    grads = fl.value_and_grad(language_loss)
    expected = grads(model, params, adapters, IDS)
    model.activation_checkpointing_enable()
    model.train()
    close(grads(model, params, adapters, IDS), expected, 1e-6)


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_a_model_loaded_in_8_bits(llama: Path, tmp_path: Path) -> None:
    """bitsandbytes quantises the inputs of such layers too. Here they are not, so outputs are nearer to the truth."""
    model, plain = load(llama, load_in_8bit=True), AutoModelForCausalLM.from_pretrained(llama)
    config = fl.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    params = base_params(model)
    weight = params["model.layers.0.self_attn.q_proj.weight"]
    assert isinstance(weight, Quantized)
    close(weight.dequantize(), plain.model.layers[0].self_attn.q_proj.weight, 5e-3)
    adapters = changed(fl.init(model, config, params=params))
    logits = apply(model, params, adapters, IDS).logits
    close(logits, apply(plain, dequantize(params), adapters, IDS).logits, 1e-6)
    model(IDS)  # moves the scales to another place
    close(apply(model, base_params(model), adapters, IDS).logits, logits, 0)
    fl.save_peft(tmp_path, adapters, config)
    theirs = peft.PeftModel.from_pretrained(load(llama, load_in_8bit=True), tmp_path)(IDS).logits
    close(theirs, logits, 5e-2)
    truth = apply(plain, base_params(plain), adapters, IDS).logits
    assert (logits - truth).abs().mean() < (theirs - truth).abs().mean()


def repack(layer: Any) -> None:
    """What a forward pass in evaluation mode does to a 4-bit layer on a processor with AVX512-BF16."""
    layer.weight.data, layer.weight.quant_state = bnb.functional._convert_weight_packed_for_cpu(
        layer.weight.data, layer.weight.quant_state
    )


def test_a_weight_that_was_repacked_for_this_cpu_is_refused(llama: Path) -> None:
    model = load(llama)
    repack(model.model.layers[0].self_attn.q_proj)
    with pytest.raises(UnsupportedError, match=r"q_proj.weight' was repacked .* Load the model again"):
        base_params(model)


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_weight_that_lost_precision_is_refused_in_its_old_order_too(double_quant: bool) -> None:
    layer = bnb.nn.Linear4bit(128, 32, compress_statistics=double_quant, quant_type="nf4").to("cpu")
    repack(layer)
    layer.state_dict()  # brings the values back into their old order, and plain magnitudes not
    with pytest.raises(UnsupportedError, match="'weight' was repacked"):
        base_params(layer)


def test_params_outlive_the_repacking_of_their_model(llama: Path, tmp_path: Path) -> None:
    model = load(llama)
    params = base_params(model)
    config = fl.LoraConfig(r=4, target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM")
    adapters = changed(fl.init(model, config, params=params, generator=gen(0)))
    fl.save_peft(tmp_path, adapters, config)
    expected = apply(model, params, adapters, IDS).logits
    for block in model.model.layers:
        repack(block.self_attn.q_proj)
    close(apply(model, params, adapters, IDS).logits, expected, 0)
    close(by_leaf(changed(fl.init(model, config, params=params, generator=gen(0)))), by_leaf(adapters), 0)
    close(by_leaf(fl.load_peft(tmp_path, model)[0]), by_leaf(adapters), 0)


@on_both_processors
@pytest.mark.parametrize(
    "options",
    [{"quant_storage": torch.bfloat16}, {"compute_dtype": torch.bfloat16}, {"compress_statistics": False}],
    ids=["storage", "compute", "plain scales"],
)
def test_options_of_a_4_bit_layer(options: Any) -> None:
    layer, x = bnb.nn.Linear4bit(64, 32, **options).to("cpu"), torch.randn(3, 64)
    params = base_params(layer)
    assert params["weight"].dtype == options.get("compute_dtype", torch.float32)
    close(apply(layer, params, {}, x), layer(x), 2e-2 if "compute_dtype" in options else 0)
    adapters = {"weight": make_rule("lora", Linear(), params["weight"].dequantize(), gen(0), torch.float32)}
    grads = torch.func.grad(lambda a, p: apply(layer, p, a, x).square().sum())
    close(grads(adapters, params), grads(adapters, dequantize(params)), 5e-2)
    assert fl.trace_targets(layer, params, adapters, x) == {"weight": "fast"}


@pytest.mark.parametrize("as_floats", [False, True], ids=["packed", "16 bits"])
def test_8_bit_layers(as_floats: bool) -> None:
    layer, x = bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=as_floats), torch.randn(3, 64)
    original = layer.weight.detach().clone()
    layer = layer.to("cpu")
    params = base_params(layer)
    assert isinstance(params["weight"], Quantized) != as_floats
    close(apply(layer, params, {}, x), F.linear(x, original, layer.bias), 0 if as_floats else 2e-2)


def test_threads_share_a_quantised_base() -> None:
    model = mlp(4)
    params = quantize(base_params(model), ["0", "2", "4", "6"])
    members, x = [member for _ in range(8) for member in members_of(params)], torch.randn(3, 64)
    expected = [apply(model, params, member, x) for member in members]
    with ThreadPoolExecutor(4) as pool:
        close(list(pool.map(lambda member: apply(model, params, member, x), members)), expected, 0)


def test_bitsandbytes_layers_of_other_kinds() -> None:
    table = bnb.nn.EmbeddingNF4(32, 64)
    table.weight.data.normal_()
    table = table.to("cpu")
    params = base_params(table)
    ids = torch.tensor([3, 31, 3])
    close(apply(table, params, {}, ids), table(ids), 0)
    rule = make_rule("dora", Embedding(), params["weight"].dequantize(), gen(0))
    plain = nn.Embedding(32, 64)
    close(apply(table, params, {"weight": rule}, ids), apply(plain, dequantize(params), {"weight": rule}, ids), 1e-6)

    table8 = bnb.nn.Embedding8bit(32, 64).to("cpu")
    close(apply(table8, base_params(table8), {}, ids), table8(ids), 1e-6)

    class Own(bnb.nn.Linear4bit):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    layer = Own(64, 64, quant_type="nf4").to("cpu")
    with pytest.raises(UnsupportedError, match="'weight' belongs to a Own, whose own forward"):
        apply(layer, base_params(layer), {}, torch.ones(1, 64))
    layer, x = bnb.nn.Linear4bit(64, 64, quant_type="nf4").to("cpu"), torch.randn(1, 64)
    close(apply(layer, base_params(layer), {}, x), layer(x), 1e-6)
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"belongs to a Linear4bit of bitsandbytes, which torch.compile cannot"):
        torch.compile(lambda p, x: apply(layer, p, {}, x), backend="eager", fullgraph=True)(base_params(layer), x)
