"""Views, casts, copies and contractions of a rewritten weight: those of the dense one, alone, by row, on packed bases.

The table of `test_lazy` says which operations never build the dense weight. Here each of them meets all rules.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import gen, make_rule
from oracle import close, oracle
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import funclora as fl
from funclora import TrainableTokens, apply, route, stack
from funclora._torch.views import seen
from funclora.errors import DenseFallbackWarning, PurityError, UnsupportedError, strict
from funclora.rules.base import Rule
from funclora.rules.layouts import Conv1D, Embedding, Layout, Linear, Parameter


class Reader(nn.Module):
    """A module that does one thing with its weight."""

    def __init__(self, weight: Tensor, read: Callable[..., Any]) -> None:
        super().__init__()
        self.w = nn.Parameter(weight, requires_grad=False)
        self.read = read

    def forward(self, *x: Tensor) -> Any:
        return self.read(self.w, *x)


OUT, IN = 16, 64
LIKE_M = torch.empty(OUT, IN)

# Ways to read a matrix M, `[out, in]`, with inputs `[rows, tokens, in]`. Every row goes its own way.
FORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": lambda m, x: F.linear(x, m),
    "first rows": lambda m, x: F.linear(x, m[:3]),
    "rows": lambda m, x: F.linear(x, m[3:7, ...]),
    "last row": lambda m, x: F.linear(x, m[-1:]),
    "narrow": lambda m, x: F.linear(x, m.narrow(0, 4, 8)),
    "chunk": lambda m, x: torch.cat([F.linear(x, part) for part in m.chunk(3)], -1),
    "split": lambda m, x: torch.cat([F.linear(x, part) for part in torch.split(m, [2, 14])], -1),
    "inputs": lambda m, x: F.linear(x[..., :20], m[:, :20]),
    "both": lambda m, x: F.linear(x[..., :20], m[5:, :20]),
    "whole": lambda m, x: F.linear(x, m[..., :, :].view(OUT, IN).reshape(-1, IN).view_as(LIKE_M)),
    "T": lambda m, x: x @ m.T,
    "mT": lambda m, x: x @ m.mT,
    "H": lambda m, x: x @ m.H,
    "mH": lambda m, x: x @ m.mH,
    "adjoint": lambda m, x: x @ m.adjoint(),
    "t": lambda m, x: x @ m.t(),
    "transpose": lambda m, x: x @ m.transpose(-1, 0),
    "permute": lambda m, x: x @ m.permute(1, 0),
    "movedim": lambda m, x: x @ torch.movedim(m, 0, 1),
    "swapdims": lambda m, x: x @ m.swapdims(0, 1),
    "swapaxes": lambda m, x: x @ torch.swapaxes(m, 0, 1),
    "rows of T": lambda m, x: x[..., :20] @ m.T[:20, 2:],
    "clone": lambda m, x: F.linear(x, m.clone()),
    "contiguous": lambda m, x: x @ m.T.contiguous(),
    "backwards": lambda m, x: F.linear(x[..., :OUT], m.T),
    "einsum": lambda m, x: torch.einsum("bti,oi->bto", x, m),
    "einsum with dots": lambda m, x: torch.einsum("...i,oi->...o", x, m),
    "einsum turned": lambda m, x: torch.einsum("oi,bti->bot", m, x),
    "einsum backwards": lambda m, x: torch.einsum("bto,oi->bti", x[..., :OUT], m),
    "einsum of three": lambda m, x: torch.einsum("bti,oi,bto->bt", x, m, x[..., :OUT]),
    "inner": lambda m, x: torch.inner(x, m),
    "tensordot": lambda m, x: torch.tensordot(x, m, dims=([2], [1])),
}  # fmt: skip

LAYOUTS: dict[str, Layout] = {"lora": Linear(), "dora": Linear(), "lora.T": Conv1D(), "dora.T": Conv1D()}


def stored(kind: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """A base weight for rules of that kind, as its module stores it."""
    shape = (OUT, IN) if kind in ("lora", "dora", "full", "mixed") else (IN, OUT)
    return torch.randn(shape, generator=gen(0)).to(dtype)


def rule_of(kind: str, weight: Tensor, seed: int) -> Any:
    if kind == "tokens":
        indices = (1, 7, 50, 19)[: 2 + seed % 2]
        value = torch.randn(len(indices), OUT, generator=gen(seed))
        return TrainableTokens(value.to(weight.dtype), token_indices=indices, layout=Embedding())
    if kind == "mixed":
        kind = ("lora", "full", "dora")[seed % 3]
    return make_rule(kind.partition(".")[0], LAYOUTS.get(kind, Linear()), weight, gen(seed))


def dense(weight: Tensor, rule: Rule | None) -> Tensor:
    """The rewritten weight by the formulas of the tests, differentiable in the leaves."""
    if rule is None:
        return weight
    if isinstance(rule, TrainableTokens):
        return weight.index_copy(0, torch.tensor(rule.token_indices), rule.value.to(weight.dtype))
    return oracle(weight, rule)


def leaves_of(rules: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(rules) if isinstance(leaf, Tensor)]


def with_grad(rule: Any) -> Any:
    return pytree.tree_map(lambda leaf: leaf.clone().requires_grad_(), rule)


def grads(y: Tensor, rules: Any, x: Tensor) -> list[Tensor]:
    leaves = [*leaves_of(rules), x]
    found = torch.autograd.grad(y.float().square().sum(), leaves, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)]


def reader(form: str, weight: Tensor) -> Reader:
    """A module that reads M of the weight, which stores it as it is or transposed."""
    read = FORMS[form]
    return Reader(weight, read if weight.shape == (OUT, IN) else lambda w, x: read(w.T, x))


# base, tolerance of results, of gradients
BASES = {"float32": (1e-5, 1e-4), "bfloat16": (5e-2, 1e-1), "nf4": (1e-5, 1e-4)}


def based(kind: str, base: str) -> tuple[dict[str, Any], Tensor]:
    """The parameters, and the dense values of the base weight."""
    weight = stored(kind, torch.bfloat16 if base == "bfloat16" else torch.float32)
    if base != "nf4":
        return {"w": weight}, weight
    params = fl.quantize({"w": weight}, ["w"], "nf4")
    return dict(params), params["w"].dequantize()


@pytest.mark.parametrize("kind", ["lora", "dora", "lora.T", "dora.T", "tokens"])
@pytest.mark.parametrize("form", FORMS)
def test_of_one_adapter(form: str, kind: str) -> None:
    for base, (near, near_grads) in BASES.items():
        params, weight = based(kind, base)
        rule = with_grad(rule_of(kind, weight, 1))
        model = reader(form, weight)
        x = torch.randn(5, 2, IN, generator=gen(2)).to(weight.dtype).requires_grad_()
        with strict():
            y = apply(model, params, {"w": rule}, x)
        assert fl.trace_targets(model, params, {"w": rule}, x) == {"w": "fast"}
        expected = model.read(dense(weight, rule), x)
        close(y, expected, near)
        close(grads(y, rule, x), grads(expected, rule, x), near_grads)


IDS = [2, 0, -1, 2, 1]
WAYS = [
    *((kind, how) for kind in ("lora", "dora", "lora.T", "dora.T") for how in ("list", "tensor", "weights")),
    *((kind, how) for kind in ("tokens", "full", "mixed") for how in ("list", "weights")),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "how"), WAYS)
@pytest.mark.parametrize("form", FORMS)
def test_of_another_adapter_for_every_row(form: str, kind: str, how: str) -> None:
    for base, (near, near_grads) in BASES.items():
        if base == "nf4" and kind in ("full", "mixed"):
            continue  # refused: a packed weight is not replaced
        if base == "bfloat16" and form == "einsum of three":
            continue  # two products in a row, in eight bits
        params, weight = based(kind, base)
        rules = [with_grad(rule_of(kind, weight, seed)) for seed in range(3)]
        model = reader(form, weight)
        x = torch.randn(5, 2, IN, generator=gen(2)).to(weight.dtype).requires_grad_()
        weights = torch.rand(5, 3, generator=gen(3)).to(weight.dtype)
        ids: Any = IDS if how == "list" else torch.tensor(IDS)
        several = stack([{"w": rule} for rule in rules])
        routed = route(several, weights=weights) if how == "weights" else route(several, ids)
        if kind == "mixed" and form in ("inputs", "both", "rows of T"):  # a norm of all inputs, a weight replaced
            with pytest.raises(UnsupportedError, match="'w' is a different weight for every row of the batch"):
                apply(model, params, routed, x)
            continue
        with strict():
            y = apply(model, params, routed, x)
        changed = [dense(weight, rule) for rule in rules]
        each = [
            weight + sum(weights[i, j] * (w - weight) for j, w in enumerate(changed))
            if how == "weights" else weight if IDS[i] < 0 else changed[IDS[i]]
            for i in range(5)
        ]  # fmt: skip
        expected = torch.cat([model.read(w.to(weight.dtype), x[i : i + 1]) for i, w in enumerate(each)])
        close(y, expected, near)
        close(grads(y, rules, x), grads(expected, rules, x), near_grads)


# --- views of stacks of matrices ---------------------------------------------------------------------------------

EXPERTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "one": lambda w, x: F.linear(x, w[1]),
    "part of one": lambda w, x: F.linear(x[..., :4], w[-1, 2:, :4]),
    "some": lambda w, x: torch.einsum("bti,eoi->beto", x, w[1:]),
    "at positions": lambda w, x: torch.einsum("bti,eoi->beto", x, w[torch.tensor([2, 0])]),
    "of each": lambda w, x: torch.stack([F.linear(x, each) for each in w.unbind()]),
    "outputs of each": lambda w, x: torch.stack([F.linear(x, each[0]) for each in w[:, :5].split(1)]),
    "transposed": lambda w, x: x @ w.movedim(1, 2)[2],
    "one more": lambda w, x: F.linear(x, w[None, 1][0]),
    "heads": lambda w, x: torch.einsum("bti,hki->bthk", x, w),
    "heads joined": lambda w, x: torch.einsum("bthk,hki->bti", x[..., None, :6].expand(-1, -1, 3, -1), w),
    "bilinear": lambda w, x: F.bilinear(x[..., :6].contiguous(), x, w),
}


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("form", EXPERTS)
def test_of_stacks_of_matrices(form: str, kind: str) -> None:
    weight = torch.randn(3, 6, 8, generator=gen(0))
    rule = with_grad(make_rule(kind, Parameter(), weight, gen(1)))
    x = torch.randn(5, 2, 8, generator=gen(2)).requires_grad_()
    model = Reader(weight, EXPERTS[form])
    with strict():
        y = apply(model, {"w": weight}, {"w": rule}, x)
    expected = model.read(oracle(weight, rule), x)
    close(y, expected, 1e-5)
    close(grads(y, rule, x), grads(expected, rule, x), 1e-4)


def test_a_tensor_of_ids_looks_rows_of_a_table_up() -> None:
    weight = torch.randn(9, 4, generator=gen(0))
    rule, ids = make_rule("lora", Embedding(), weight, gen(1)), torch.tensor([[3, -1], [0, 3]])
    with strict():
        y = apply(Reader(weight, lambda w, ids: w[ids]), {"w": weight}, {"w": rule}, ids)
    close(y, oracle(weight, rule)[ids], 1e-5)


# --- casts, copies, gradients ------------------------------------------------------------------------------------

CASTS: dict[str, tuple[Callable[[Tensor], Tensor], torch.dtype]] = {
    "float": (lambda w: w.float(), torch.float32),
    "double": (lambda w: w.double(), torch.float64),
    "half": (lambda w: w.half(), torch.float16),
    "bfloat16": (lambda w: w.bfloat16(), torch.bfloat16),
    "to": (lambda w: w.to(torch.float64), torch.float64),
    "to other": (lambda w: w.to(torch.empty(0, dtype=torch.float64)), torch.float64),
    "to copy": (lambda w: w.to(torch.float32, copy=True), torch.float32),
    "type": (lambda w: w.type(torch.float16), torch.float16),
    "type_as": (lambda w: w.type_as(torch.empty(0, dtype=torch.bfloat16)), torch.bfloat16),
    "cpu": (lambda w: w.cpu().double(), torch.float64),
}


@pytest.mark.parametrize("kind", ["lora", "dora", "tokens"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASTS)
def test_a_cast_is_that_of_the_dense_weight_up_to_its_rounding(name: str, dtype: torch.dtype, kind: str) -> None:
    cast, wanted = CASTS[name]
    weight = stored(kind, dtype)
    rule = with_grad(rule_of(kind, weight, 1))
    x = torch.randn(5, 2, OUT if kind == "tokens" else IN, generator=gen(2)).requires_grad_()
    model = Reader(weight, lambda w, x: F.linear(x.to(cast(w).dtype), cast(w)))
    with strict():
        y = apply(model, {"w": weight}, {"w": rule}, x)
    assert y.dtype == wanted
    expected = F.linear(x.to(wanted), cast(dense(weight, rule).to(dtype)))
    coarse = max(torch.finfo(dtype).eps, torch.finfo(wanted).eps)
    close(y, expected, 8 * coarse)
    close(grads(y, rule, x), grads(expected, rule, x), 16 * coarse)


def test_a_cast_to_what_a_weight_is_not_is_dense() -> None:
    weight = 9 * stored("lora")
    rule = rule_of("lora", weight, 1)
    with pytest.warns(DenseFallbackWarning, match="'w': int has no fast form"):
        y = apply(Reader(weight, lambda w: w.int()), {"w": weight}, {"w": rule})
    assert torch.equal(y, rule.dense(weight).int())


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("name", ["detach", "data"])
def test_a_detached_weight_has_values_but_no_gradient(name: str, kind: str) -> None:
    cut: Any = {"detach": lambda w: w.detach(), "data": lambda w: w.data}[name]
    weight = stored(kind)
    rule = with_grad(rule_of(kind, weight, 1))
    x = torch.randn(5, IN, generator=gen(2)).requires_grad_()
    model = Reader(weight, lambda w, x: (F.linear(x, w), F.linear(x, cut(w)), cut(w).requires_grad))
    with strict():
        y, z, asks = apply(model, {"w": weight}, {"w": rule}, x)
    assert asks is False
    close(z, F.linear(x, oracle(weight, rule)), 1e-5)
    expected = F.linear(x, oracle(weight, rule))
    assert not any(g.any() for g in grads(z, rule, x)[:-1])
    close(grads(y + z, rule, x), grads(expected + F.linear(x, oracle(weight, rule).detach()), rule, x), 1e-4)
    grad = torch.func.grad(lambda rule: apply(model, {"w": weight}, {"w": rule}, x)[1].sum())(rule)
    assert not any(leaf.any() for leaf in leaves_of(grad))


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "mul_": lambda w: w.mul_(2),
    "fill": lambda w: w.__setitem__(0, 3.0),
    "in a row": lambda w: w.add_(1).clamp_(min=0),
    "zeros": lambda w: w.zero_(),
}


@pytest.mark.parametrize("copy", ["clone", "double", "to copy"])
@pytest.mark.parametrize("write", WRITES)
def test_a_copy_can_be_written_to(write: str, copy: str) -> None:
    copied: Any = {"clone": torch.clone, "double": torch.Tensor.double, "to copy": lambda w: w.to(w.dtype, copy=True)}

    def read(w: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        own = copied[copy](w)
        WRITES[write](own)
        WRITES[write](own)
        return F.linear(x.to(own.dtype), own), F.linear(x, w)

    weight = stored("lora")
    rule = with_grad(rule_of("lora", weight, 1))
    x = torch.randn(5, IN, generator=gen(2)).requires_grad_()
    before = weight.clone()
    with pytest.warns(DenseFallbackWarning, match="'w': .* has no fast form"):
        y, z = apply(Reader(weight, read), {"w": weight}, {"w": rule}, x)
    expected, other = read(oracle(weight, rule), x)
    close((y, z), (expected, other), 1e-5)
    close(grads(y + z, rule, x), grads(expected + other, rule, x), 1e-4)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("view", ["detach", "data", "T", "[:3]", "clone()[:3]", "float"])
def test_what_is_no_copy_cannot_be_written_to(view: str) -> None:
    views: dict[str, Callable[[Tensor], Tensor]] = {
        "detach": lambda w: w.detach(), "T": lambda w: w.T, "[:3]": lambda w: w[:3], "float": lambda w: w.float(),
        "clone()[:3]": lambda w: w.clone()[:3], "data": lambda w: w.data,
    }  # fmt: skip
    weight = stored("lora")
    with pytest.raises(PurityError, match="'w': the model calls mul_, which would write to a rewritten weight"):
        apply(Reader(weight, lambda w: views[view](w).mul_(2)), {"w": weight}, {"w": rule_of("lora", weight, 1)})


# --- what a view shows -------------------------------------------------------------------------------------------

SHAPES = [(4, 6), (1, 6), (6, 1), (1, 1), (3, 4, 6), (1, 4, 6), (2, 3, 4, 5), (3,), ()]
INDICES: list[Any] = [
    0, -1, slice(1, 3), slice(-2, None), slice(None, None, 2), slice(0, 1), ..., None, (None, 0), (0, None),
    (slice(1, 2), None), (..., slice(1, 3)), (..., 0), (slice(None), 0), (..., None), (0, slice(None), slice(0, 2)),
]  # fmt: skip


def operations(shape: tuple[int, ...]) -> list[tuple[Any, tuple[Any, ...]]]:
    """Views and reshapes with arguments, some of which do not fit."""
    t = torch.Tensor
    calls: list[tuple[Any, tuple[Any, ...]]] = [(t.__getitem__, (index,)) for index in INDICES]
    for pair in ((0, 1), (-1, -2), (0, -1), (1, 1)):
        calls += [(f, pair) for f in (t.transpose, t.swapaxes, torch.movedim, t.select, t.flatten)]
    for dim in (0, 1, -1):
        calls += [(t.narrow, (dim, 1, 2)), (t.chunk, (2, dim)), (t.split, (2, dim)), (t.unbind, (dim,))]
        calls += [(t.squeeze, (dim,)), (t.unsqueeze, (dim,)), (t.tensor_split, (2, dim))]
    for target in (shape, (-1,), (*shape, 1), (1, *shape), shape[::-1], (2, *shape)):
        calls += [(f, (target,)) for f in (t.view, t.reshape, t.expand) if target or f is not t.expand]
    return [*calls, (t.squeeze, ()), (t.permute, ((1, 0),)), (t.permute, ((0, 2, 1),)), (t.diagonal, ())]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_view_that_is_seen_shows_what_it_says(shape: tuple[int, ...]) -> None:
    x = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    found = 0
    for func, args in operations(shape):
        views = seen(func, shape, args, {})
        if views is None:
            continue
        outs = func(x, *args)
        for out, view in zip(*([outs], [views]) if isinstance(outs, Tensor) else (outs, views), strict=True):
            if view is None:
                continue
            found += 1
            part = x
            for dim, (start, length) in enumerate(zip(view.starts, view.lengths, strict=True)):
                part = part.narrow(dim, start, length)
            kept = [dim for dim in view.dims if dim is not None]
            part = part.permute([*kept, *(dim for dim in range(x.dim()) if dim not in kept)]).reshape(out.shape)
            assert torch.equal(part, out), (func, args, view)
            assert [size for dim, size in zip(view.dims, out.shape, strict=True) if dim is None] == [1] * (
                len(view.dims) - len(kept)
            )
    assert found > 10


SINGLE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a list": lambda w, x: F.linear(x[:, :1], w[[2], 3:4]),
    "a tensor": lambda w, x: F.linear(x[:, :1], w[torch.tensor([2]), 3:4]),
    "a column": lambda w, x: F.linear(x[:, :1], w[2:3, [3]]),
    "a slice": lambda w, x: F.linear(x[:, :1], w[2:3, 3:4]),
}


@pytest.mark.filterwarnings("ignore::funclora.errors.DenseFallbackWarning")
@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("part", SINGLE)
def test_a_single_number_is_that_at_its_place(part: str, kind: str) -> None:
    """A copy of one number has no strides that would tell it from a view."""
    weight, x = stored(kind), torch.randn(5, IN, generator=gen(2))
    rule = rule_of(kind, weight, 1)
    close(
        apply(Reader(weight, SINGLE[part]), {"w": weight}, {"w": rule}, x), SINGLE[part](dense(weight, rule), x), 1e-5
    )


@pytest.mark.filterwarnings("ignore::funclora.errors.DenseFallbackWarning")
@pytest.mark.parametrize("equation", ["bi,oi->bo", "bi,oi->bio", "bo,oi->bi"])
def test_einsum_repeats_dimensions_of_size_one(equation: str) -> None:
    weight, x = stored("lora"), torch.randn(5, 1, generator=gen(2))
    rule = rule_of("lora", weight, 1)
    model = Reader(weight, lambda w, x: torch.einsum(equation, x, w))
    close(apply(model, {"w": weight}, {"w": rule}, x), model.read(dense(weight, rule), x), 1e-4)


def test_a_truth_value_is_no_number_among_indices() -> None:
    experts = (3, 4, 5)
    assert seen(Tensor.__getitem__, experts, (1,), {}) is not None
    assert seen(Tensor.__getitem__, experts, (True,), {}) is None
    assert seen(Tensor.__getitem__, experts, (0,), {}) is not None
    assert seen(Tensor.__getitem__, experts, (False,), {}) is None
