"""The lazy weight: which operations never build the dense weight, which do and say so, and where dropout acts."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, Case, gen, make_adapters, make_rule
from oracle import close, oracle, tensors
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from funclora import DoRA, LoRA, apply, base_params, bind
from funclora._bind.apply import trace_targets
from funclora.errors import DenseFallbackWarning, ParamsError, UnsupportedError
from funclora.rules import dora
from funclora.rules.layouts import Attention, Conv, Conv1D, ConvTranspose, Embedding, Layout, Linear, Parameter

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


class Op(nn.Module):
    """A module that does one thing with its weight."""

    def __init__(self, shape: tuple[int, ...], call: Callable[..., Any]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(shape))
        self.call = call

    def forward(self, *x: Tensor) -> Any:
        return self.call(self.w, *x)


class Deep(nn.Module):
    """An `Op` whose weight has the name "deep.w"."""

    def __init__(self, shape: tuple[int, ...], call: Callable[..., Any]) -> None:
        super().__init__()
        self.deep = Op(shape, call)

    def forward(self, *x: Tensor) -> Any:
        return self.deep(*x)


class Call(NamedTuple):
    """An operation on a weight of some shape: `call(weight, *inputs)`."""

    name: str
    shape: tuple[int, ...]
    layout: Layout
    inputs: tuple[Tensor, ...]
    call: Callable[..., Any]


IN_OUT = Conv1D()  # [in, out]
EXPERTS = Parameter(stored_transposed=True)  # [E, in, out]
EXPERTS_T = Parameter()  # [E, out, in]
X = torch.randn(3, 24, generator=gen(0))
Y = torch.randn(3, 32, generator=gen(0))
X3 = torch.randn(4, 3, 12, generator=gen(0))
Y3 = torch.randn(4, 3, 24, generator=gen(0))
BIAS = torch.randn(32, generator=gen(1))
LIKE_W = torch.empty(32, 24)
ROWS = torch.randn(6, 16, generator=gen(0))
OFFSETS = torch.tensor([2, 2, 5, 6], dtype=torch.int32)  # where the rows of each expert end
TOKENS = torch.randn(5, 1, 16, generator=gen(0))
grouped_mm: Any = F.grouped_mm
IDS = torch.tensor([[1, 5], [5, 0]])
IMAGE = torch.randn(1, 16, 2, 2, generator=gen(0))
ORDER = torch.tensor([2, 0])


def in_parts(w: Tensor, x: Tensor, parts: Callable[[Tensor], Any]) -> Tensor:
    return torch.cat([F.linear(x, part) for part in parts(w)], dim=-1)


def attention(w: Tensor, x: Tensor) -> Tensor:
    out = torch.eye(16), torch.zeros(16)
    attended: Tensor = F.multi_head_attention_forward(x, x, x, 16, 2, w, None, None, None, False, 0.0, *out)[0]
    return attended


FAST = [
    Call("linear", (32, 24), Linear(), (X,), lambda w, x: F.linear(x, w)),
    Call("linear-bias", (32, 24), Linear(), (X, BIAS), lambda w, x, b: F.linear(x, w, b)),
    Call("linear-kw", (32, 24), Linear(), (X, BIAS), lambda w, x, b: F.linear(input=x, weight=w, bias=b)),
    Call("linear-1d", (32, 24), Linear(), (X[0],), lambda w, x: F.linear(x, w)),
    Call("linear-4d", (32, 24), Linear(), (X[None, None],), lambda w, x: F.linear(x, w)),
    Call("linear-backwards", (24, 32), IN_OUT, (Y,), lambda w, x: F.linear(x, w)),
    Call("linear-tied", (32, 24), Embedding(), (X,), lambda w, x: F.linear(x, w)),
    Call("@", (24, 32), IN_OUT, (X,), lambda w, x: x @ w),
    Call("@-1d", (24, 32), IN_OUT, (X[0],), lambda w, x: x @ w),
    Call("@-3d", (24, 32), IN_OUT, (X[None],), lambda w, x: x @ w),
    Call("@-backwards", (32, 24), Linear(), (Y,), lambda w, x: x @ w),
    Call("left-@", (32, 24), Linear(), (X,), lambda w, x: w @ x.T),
    Call("left-@-backwards", (24, 32), IN_OUT, (Y,), lambda w, x: w @ x.T),
    Call("left-@-batch", (32, 24), Linear(), (X[None],), lambda w, x: w @ x.mT),
    Call("matmul", (24, 32), IN_OUT, (X,), lambda w, x: torch.matmul(x, w)),
    Call("matmul-kw", (24, 32), IN_OUT, (X,), lambda w, x: torch.matmul(x, other=w)),
    Call("Tensor.matmul", (24, 32), IN_OUT, (X,), lambda w, x: x.matmul(w)),
    Call("mm", (24, 32), IN_OUT, (X,), lambda w, x: torch.mm(x, w)),
    Call("mm-kw", (24, 32), IN_OUT, (X,), lambda w, x: torch.mm(x, mat2=w)),
    Call("left-mm", (32, 24), Linear(), (X,), lambda w, x: torch.mm(w, x.T)),
    Call("Tensor.mm", (24, 32), IN_OUT, (X,), lambda w, x: x.mm(w)),
    Call("addmm", (24, 32), IN_OUT, (X, BIAS), lambda w, x, b: torch.addmm(b, x, w)),
    Call("addmm-backwards", (32, 24), Linear(), (X, BIAS), lambda w, x, b: torch.addmm(b, x, w.T)),
    Call("Tensor.addmm", (24, 32), IN_OUT, (X, BIAS), lambda w, x, b: b.addmm(x, w)),
    Call("T", (32, 24), Linear(), (X,), lambda w, x: x @ w.T),
    Call("t", (32, 24), Linear(), (X,), lambda w, x: x @ w.t()),
    Call("mT", (4, 24, 12), EXPERTS_T, (X3,), lambda w, x: x @ w.mT),
    Call("transpose", (32, 24), Linear(), (X,), lambda w, x: x @ w.transpose(0, 1)),
    Call("transpose-3d", (4, 24, 12), EXPERTS_T, (X3,), lambda w, x: torch.bmm(x, torch.transpose(w, 1, 2))),
    Call("permute", (4, 24, 12), EXPERTS_T, (X3,), lambda w, x: x @ w.permute(0, 2, 1)),
    Call("permute-list", (32, 24), Linear(), (X,), lambda w, x: x @ torch.permute(w, (1, 0))),
    Call("twice", (32, 24), Linear(), (X,), lambda w, x: F.linear(x, w.T.contiguous().T)),
    Call("bmm", (4, 12, 24), EXPERTS, (X3,), lambda w, x: torch.bmm(x, w)),
    Call("Tensor.bmm", (4, 12, 24), EXPERTS, (X3,), lambda w, x: x.bmm(w)),
    Call("bmm-backwards", (4, 24, 12), EXPERTS_T, (Y3,), lambda w, x: torch.bmm(x, w)),
    Call("left-bmm", (4, 24, 12), EXPERTS_T, (X3,), lambda w, x: torch.bmm(w, x.mT)),
    Call("left-bmm-backwards", (4, 12, 24), EXPERTS, (Y3,), lambda w, x: torch.bmm(w, x.mT)),
    Call("experts-@", (4, 12, 24), EXPERTS, (X3,), lambda w, x: x @ w),
    Call("experts-@-shared", (4, 12, 24), EXPERTS, (X3[0],), lambda w, x: x @ w),
    Call("experts-@-4d", (4, 12, 24), EXPERTS, (X3[None],), lambda w, x: x @ w),
    Call("expert", (4, 12, 24), EXPERTS, (X3[0],), lambda w, x: x @ w[1]),
    Call("expert-last", (4, 24, 12), EXPERTS_T, (X3[0],), lambda w, x: F.linear(x, w[-1])),
    Call("experts-slice", (4, 24, 12), EXPERTS_T, (X3[:2],), lambda w, x: x @ w[1:3].mT),
    Call("experts-gather", (4, 12, 24), EXPERTS, (X3[:2],), lambda w, x: torch.bmm(x, w[ORDER])),
    Call("narrow", (32, 24), Linear(), (X,), lambda w, x: F.linear(x, w.narrow(0, 5, 9))),
    Call("chunk", (32, 24), Linear(), (X,), lambda w, x: in_parts(w, x, lambda w: w.chunk(3))),
    Call("split", (32, 24), Linear(), (X,), lambda w, x: in_parts(w, x, lambda w: w.split([8, 20, 4]))),
    Call("split-size", (32, 24), Linear(), (X,), lambda w, x: in_parts(w, x, lambda w: torch.split(w, 15))),
    Call("split-columns", (24, 32), IN_OUT, (X,), lambda w, x: torch.cat([x @ p for p in w.split(9, dim=1)], -1)),
    Call("rows", (32, 24), Linear(), (X,), lambda w, x: F.linear(x, w[1:5])),
    Call("last-rows", (32, 24), Linear(), (X,), lambda w, x: x @ w[-9:, ...].T),
    Call("rows-of-expert", (4, 24, 12), EXPERTS_T, (X3[0],), lambda w, x: F.linear(x, w[1, 2:9])),
    Call("inputs", (32, 24), Linear(), (X[:, 3:7],), lambda w, x: F.linear(x, w.narrow(1, 3, 4))),
    Call("inputs-of-table", (24, 32), Embedding(), (X[:, 3:7],), lambda w, x: x @ w[3:7]),
    Call(
        "inputs-in-chunks",
        (32, 24),
        Linear(),
        (X,),
        lambda w, x: torch.stack([F.linear(x[:, 12 * i :][:, :12], part) for i, part in enumerate(w.chunk(2, dim=1))]),
    ),
    Call("both", (32, 24), Linear(), (X[:, :5],), lambda w, x: F.linear(x, w[4:7, :5])),
    Call("whole", (32, 24), Linear(), (X,), lambda w, x: F.linear(x, w[..., :, :].view(32, 24).reshape(32, -1))),
    Call("unbind", (4, 12, 24), EXPERTS, (X3[0],), lambda w, x: x[0] @ w.unbind()[2]),
    Call("one-more", (32, 24), Linear(), (X,), lambda w, x: torch.bmm(x[None], w.unsqueeze(0).mT)),
    Call("one-less", (1, 12, 24), EXPERTS, (X3[0],), lambda w, x: x @ w.squeeze(0)),
    Call("select", (4, 12, 24), EXPERTS, (X3[0],), lambda w, x: x @ w.select(0, 2)),
    Call("movedim", (4, 24, 12), EXPERTS_T, (X3,), lambda w, x: x @ w.movedim(-1, 1)),
    Call("moveaxis", (32, 24), Linear(), (X,), lambda w, x: x @ torch.moveaxis(w, 0, 1)),
    Call("swapdims", (32, 24), Linear(), (X,), lambda w, x: x @ w.swapdims(0, 1)),
    Call("swapaxes", (32, 24), Linear(), (X,), lambda w, x: x @ torch.swapaxes(w, 0, -1)),
    Call("adjoint", (4, 24, 12), EXPERTS_T, (X3,), lambda w, x: x @ w.adjoint()),
    Call("H", (32, 24), Linear(), (X,), lambda w, x: x @ w.H),
    Call("mH", (32, 24), Linear(), (X,), lambda w, x: x @ w.mH),
    Call("clone", (32, 24), Linear(), (X,), lambda w, x: F.linear(x, w.clone())),
    Call("view_as", (32, 24), Linear(), (X,), lambda w, x: F.linear(x, w.view_as(LIKE_W))),
    Call("einsum", (32, 24), Linear(), (X,), lambda w, x: torch.einsum("ti,oi->to", x, w)),
    Call("einsum-turned", (32, 24), Linear(), (X,), lambda w, x: torch.einsum("oi, ti -> ot", w, x)),
    Call("einsum-backwards", (32, 24), Linear(), (Y,), lambda w, x: torch.einsum("...o,oi->...i", x, w)),
    Call("einsum-implicit", (32, 24), Linear(), (X,), lambda w, x: torch.einsum("ba,ca", x, w)),
    Call("einsum-summed", (32, 24), Linear(), (X,), lambda w, x: torch.einsum("ti,oi->o", x, w)),
    Call("einsum-three", (32, 24), Linear(), (X, Y), lambda w, x, y: torch.einsum("ti,oi,to->t", x, w, y)),
    Call("einsum-list", (32, 24), Linear(), (X,), lambda w, x: torch.einsum("ti,oi->to", [x, w])),
    Call("einsum-experts", (4, 24, 12), EXPERTS_T, (X3,), lambda w, x: torch.einsum("eti,eoi->teo", x, w)),
    Call("einsum-heads", (4, 12, 24), EXPERTS, (X3[:2],), lambda w, x: torch.einsum("btd,hdk->bthk", x, w)),
    Call("einsum-heads-out", (4, 24, 12), EXPERTS_T, (X3,), lambda w, x: torch.einsum("hbk,hdk->bd", x, w)),
    Call("tensordot", (32, 24), Linear(), (X,), lambda w, x: torch.tensordot(x, w, dims=([1], [1]))),
    Call("tensordot-one", (24, 32), IN_OUT, (X,), lambda w, x: torch.tensordot(x, w, 1)),
    Call("inner", (32, 24), Linear(), (X,), lambda w, x: torch.inner(x, w)),
    Call("inner-turned", (32, 24), Linear(), (X,), lambda w, x: w.inner(x)),
    Call("mv", (32, 24), Linear(), (X[0],), torch.mv),
    Call("@-vector", (32, 24), Linear(), (X[0],), lambda w, x: w @ x),
    Call("vector-@-experts", (4, 12, 24), EXPERTS, (X3[0, 0],), lambda w, x: x @ w),
    Call("bilinear", (5, 24, 32), EXPERTS_T, (X, Y), lambda w, x, y: F.bilinear(x, y, w)),
    Call("grouped_mm", (4, 16, 24), EXPERTS, (ROWS,), lambda w, x: grouped_mm(x, w, offs=OFFSETS)),
    Call("grouped_mm-t", (4, 24, 16), EXPERTS_T, (ROWS,), lambda w, x: grouped_mm(x, w.mT, offs=OFFSETS)),
    Call("attention", (48, 16), Attention(), (TOKENS,), attention),
    Call("embedding", (24, 32), Embedding(), (IDS,), lambda w, ids: F.embedding(ids, w, padding_idx=-19)),
    Call("embedding-norm", (24, 32), Embedding(), (IDS,), lambda w, ids: F.embedding(ids, w, max_norm=1.0)),
    Call("conv1d", (16, 16, 3), Conv(), (IMAGE[..., 0],), lambda w, x: F.conv1d(x, w, padding=1)),
    Call("conv2d", (16, 16, 3, 3), Conv(), (IMAGE,), lambda w, x: F.conv2d(x, w, padding=1)),
    Call("conv2d-groups", (16, 4, 3, 3), Conv(4), (IMAGE,), lambda w, x: F.conv2d(x, w, padding="same", groups=4)),
    Call("conv3d", (8, 16, 2, 2, 2), Conv(), (IMAGE[..., None],), lambda w, x: F.conv3d(x, w, padding=1)),
    Call("conv-t1d", (16, 16, 3), ConvTranspose(), (IMAGE[..., 0],), lambda w, x: F.conv_transpose1d(x, w)),
    Call("conv-t2d", (16, 16, 3, 3), ConvTranspose(), (IMAGE,), lambda w, x: F.conv_transpose2d(x, w)),
    Call("conv-t3d", (16, 8, 2, 2, 2), ConvTranspose(), (IMAGE[..., None],), lambda w, x: F.conv_transpose3d(x, w)),
]

SLOW = [
    Call("__getitem__", (32, 24), Linear(), (X[0],), lambda w, x: x @ w[3]),
    Call("__getitem__", (32, 24), Linear(), (X,), lambda w, x: F.linear(x, w[::2])),
    Call(
        "einsum",
        (32, 24),
        Linear(),
        (X, Y),
        lambda w, x, y: torch.einsum("ti,to,oi->", x, y, w) + torch.einsum("oi->", w),
    ),
    Call("einsum", (32, 24), Linear(), (X,), lambda w, x: torch.einsum("ti,oi->toi", x, w)),
    Call("view", (32, 24), Linear(), (X,), lambda w, x: x @ w.view(24, 32)),
    Call("mul", (32, 24), Linear(), (X,), lambda w, x: w * x[0]),
    Call("add", (32, 24), Linear(), (X,), lambda w, x: x[0] + w),
    Call("sum", (32, 24), Linear(), (), lambda w: w.sum()),
    Call("cat", (32, 24), Linear(), (X,), lambda w, x: torch.cat([x, w])),
    Call("linear", (32, 24), Linear(), (X,), F.linear),
    Call("transpose", (4, 24, 12), EXPERTS_T, (X3,), lambda w, x: w.transpose(0, 1)[0] @ x[0, 0]),
    Call("embedding", (32, 24), Linear(), (IDS,), lambda w, ids: F.embedding(ids, w)),
    Call("addmm", (24, 32), IN_OUT, (X, BIAS), lambda w, x, b: torch.addmm(b, x, w, beta=0.5, alpha=2)),
    Call("addmm", (24, 32), IN_OUT, (X, BIAS), lambda w, x, b: torch.addmm(b.expand(3, -1).clone(), x, w)),
    Call("mm", (24, 32), IN_OUT, (X,), lambda w, x: torch.mm(x, w, out=torch.empty(3, 32))),
    Call("conv2d", (16, 4, 3, 3), Conv(2), (IMAGE,), lambda w, x: F.conv2d(x, w, padding=1, groups=4)),
    Call("conv2d", (16, 16, 3, 3), ConvTranspose(), (IMAGE,), lambda w, x: F.conv2d(x, w, padding=1)),
    Call("embedding_bag", (24, 32), Embedding(), (IDS,), lambda w, ids: F.embedding_bag(ids, w)),
]


class NoDenseWeight(TorchDispatchMode):
    """Fails when an operation allocates a tensor of a weight's size."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.numel = weight.numel()
        self.storage = weight.untyped_storage().data_ptr()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        results = func(*args, **(kwargs or {}))
        for result in tensors(results):
            new = (
                result.untyped_storage().data_ptr() != self.storage and 0 not in result.stride() and not result.is_meta
            )
            assert not (new and result.numel() >= self.numel), f"{func} allocates {list(result.shape)}"
        return results


def grads(output: Any, rule: Any, inputs: tuple[Tensor, ...] = ()) -> list[Tensor]:
    leaves = [*(getattr(rule, name) for name in rule.leaf_names), *(x for x in inputs if x.requires_grad)]
    total = torch.stack([y.square().sum() for y in tensors(output)]).sum()
    return list(torch.autograd.grad(total, leaves))


def trainable(kind: str, call: Call, weight: Tensor) -> Any:
    rule = make_rule(kind, call.layout, weight, gen(1))
    return replace(rule, **{name: getattr(rule, name).requires_grad_() for name in rule.leaf_names})


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("call", FAST, ids=lambda call: call.name)
def test_fast_operations_never_build_the_dense_weight(call: Call, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Of weights as small as these, the norm looks at all at once.
    monkeypatch.setattr(dora, "SMALL_BLOCK", math.prod(call.shape) // 4)
    model = Op(call.shape, call.call)
    params = base_params(model)
    rule = trainable(kind, call, params["w"])
    # For one matrix times many, torch itself copies the base weight to differentiate by the matrix.
    by_inputs = call.name not in ("experts-@-shared", "einsum-heads", "vector-@-experts", "bilinear")
    inputs = tuple(x.clone().requires_grad_(by_inputs and x.is_floating_point()) for x in call.inputs)
    with NoDenseWeight(params["w"]) as watch:
        output = apply(model, params, {"w": rule}, *inputs)
        actual = grads(output, rule, inputs)
    assert watch.calls > 5
    expected = call.call(oracle(params["w"], rule), *inputs)
    close(output, expected, 1e-5)
    close(actual, grads(expected, rule, inputs), 1e-4)


def test_the_watch_sees_a_dense_weight() -> None:
    model = Op((32, 24), lambda w, x: x @ (w * 1).T)
    params = base_params(model)
    adapters = {"w": make_rule("lora", Linear(), params["w"], gen(1))}
    with (
        pytest.warns(DenseFallbackWarning, match="mul has no fast form"),
        pytest.raises(AssertionError, match=r"allocates \[32, 24\]"),
        NoDenseWeight(params["w"]),
    ):
        apply(model, params, adapters, X)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("call", SLOW, ids=[f"{i}-{call.name}" for i, call in enumerate(SLOW)])
def test_other_operations_get_the_dense_weight_and_say_so(call: Call, kind: str) -> None:
    model = Deep(call.shape, call.call)
    params = base_params(model)
    rule = trainable(kind, call, params["deep.w"])
    if call.name == "mm":  # torch refuses out= with gradients
        rule = make_rule(kind, call.layout, params["deep.w"], gen(1))
    with pytest.warns(DenseFallbackWarning, match=rf"'deep\.w': _*({call.name}|r{call.name})_* has no fast form"):
        output = apply(model, params, {"deep.w": rule}, *call.inputs)
    expected = call.call(oracle(params["deep.w"], rule), *call.inputs)
    close(output, expected, 1e-5)
    if rule.a.requires_grad:
        close(grads(output, rule), grads(expected, rule), 1e-4)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_layers_are_fast_or_warn_as_the_table_says(case: Case, kind: str) -> None:
    s = case.setup()
    adapters = make_adapters(case, s.params, kind, gen(1))
    with nullcontext() if case.fast else pytest.warns(DenseFallbackWarning, match="has no fast form"):
        apply(s.model, s.params, adapters, *s.args, **s.kwargs)
    uses = trace_targets(s.model, s.params, adapters, *s.args, **s.kwargs)
    assert uses == dict.fromkeys(adapters, "fast" if case.fast else "dense")


def test_two_rewritten_weights_in_one_operation() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(4, 4))

        def forward(self) -> tuple[Tensor, Tensor]:
            return F.linear(self.one, self.two), self.one @ self.two

    model = Both()
    params = base_params(model)
    adapters = {name: make_rule("lora", Linear(), params[name], gen(1)) for name in params}
    with pytest.warns(DenseFallbackWarning, match="'(one|two)'"):
        output = apply(model, params, adapters)
    one, two = (oracle(params[name], adapters[name]) for name in ("one", "two"))
    close(output, (one @ two.T, one @ two), 1e-5)


# --- warnings --------------------------------------------------------------------------------------------------


def test_one_warning_for_each_parameter_and_operation() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self) -> Tensor:
            total = torch.zeros(())
            for layer in (self.a, self.b, self.a):
                total = total + layer.weight.sum() + layer.weight.mean()
            return total

    model = Two()
    params = base_params(model)
    adapters = {f"{n}.weight": make_rule("lora", Linear(), params[f"{n}.weight"], gen(1)) for n in "ab"}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            apply(model, params, adapters)
    messages = [str(w.message).split(" has")[0] for w in caught if w.category is DenseFallbackWarning]
    assert sorted(messages) == [
        "'a.weight': mean",
        "'a.weight': sum",
        "'b.weight': mean",
        "'b.weight': sum",
    ]


def test_the_warning_points_at_the_operation() -> None:
    model = Op((3, 3), lambda w: w.sum())
    params = base_params(model)
    with pytest.warns(DenseFallbackWarning, match="'w': sum") as caught:
        apply(model, params, {"w": make_rule("lora", Linear(), params["w"], gen(1))})
    assert [w.filename for w in caught] == [__file__]


# --- questions that need no weight -----------------------------------------------------------------------------

QUESTIONS: dict[str, Callable[[Tensor], Any]] = {
    "shape": lambda w: w.shape,
    "size": lambda w: (w.size(), w.size(0), w.size(-1)),
    "dim": lambda w: (w.dim(), w.ndim, w.ndimension()),
    "numel": lambda w: (w.numel(), w.nelement(), torch.numel(w)),
    "len": len,
    "dtype": lambda w: w.dtype,
    "device": lambda w: (w.device, w.is_cuda, w.is_cpu, w.is_meta, w.get_device()),
    "kind": lambda w: (w.is_floating_point(), torch.is_floating_point(w), w.is_complex(), w.is_sparse, w.is_quantized),
    "bytes": lambda w: (w.element_size(), w.itemsize, w.nbytes),
    "layout": lambda w: w.layout,
    "type": lambda w: w.type(),
    "stride": lambda w: (w.stride(), w.stride(0), w.is_contiguous(), w.storage_offset()),
    "grad": lambda w: w.grad,
    "isinstance": lambda w: isinstance(w, Tensor),
    "new": lambda w: (w.new_zeros(2), w.new_ones(2, 3), w.new_full((2,), 3.0), w.new_tensor([1.0])),
    "like": lambda w: (torch.zeros_like(w), torch.ones_like(w), torch.full_like(w, 2)),
    "cast": lambda w: (torch.ones(2).to(w), torch.ones(2).type_as(w), torch.ones(2).to(w.dtype)),
    "cast to its own": lambda w: w.to(w.dtype).dtype,
    "broadcast": lambda w: torch.broadcast_shapes(w.shape, (1, 1)),
    "hash": lambda w: isinstance(hash(w), int) and len({w, w}),
}


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_questions_about_the_weight_do_not_compute_it(question: str, dtype: torch.dtype) -> None:
    ask = QUESTIONS[question]
    model = Op((3, 5), ask).to(dtype)
    params = base_params(model)
    rule = make_rule("lora", Linear(), params["w"], gen(1))
    actual, expected = apply(model, params, {"w": rule}), ask(params["w"])
    if tensors(expected):
        for got, want in zip(tensors(actual), tensors(expected), strict=True):
            assert type(got) is Tensor
            assert (got.dtype, got.device) == (want.dtype, want.device)
            assert torch.equal(got, want)
    else:
        assert actual == expected


def test_a_weight_that_is_not_computed_has_no_memory_to_point_at() -> None:
    model = Op((3, 5), lambda w: w.data_ptr())
    params = base_params(model)
    assert apply(model, params, {"w": make_rule("lora", Linear(), params["w"], gen(1))}) == 0


@pytest.mark.parametrize(("base", "leaf"), [(False, False), (True, False), (False, True), (True, True)])
def test_requires_grad_is_that_of_the_dense_weight(base: bool, leaf: bool) -> None:
    model = Op((3, 5), lambda w: w.requires_grad)
    params = {"w": torch.randn(3, 5, requires_grad=base)}
    rule = make_rule("lora", Linear(), params["w"].detach(), gen(1))
    assert apply(model, params, {"w": replace(rule, b=rule.b.requires_grad_(leaf))}) is (base or leaf)


def test_repr_names_the_parameter_and_the_rule() -> None:
    model = Deep((3, 5), lambda w: None)
    params = base_params(model)
    bound: Any = bind(model, params, {"deep.w": make_rule("lora", Linear(), params["deep.w"], gen(1))})
    assert repr(bound.deep.w) == "LazyWeight('deep.w', LoRA, [3, 5], torch.float32)"


def test_what_slips_past_the_lazy_weight_is_nan() -> None:
    model = nn.Linear(3, 2, bias=False)
    params = base_params(model)
    bound: Any = bind(model, params, {"weight": make_rule("lora", Linear(), params["weight"], gen(1))})
    with torch._C.DisableTorchFunctionSubclass():
        assert F.linear(torch.ones(3), bound.weight).isnan().all()


# --- dropout ---------------------------------------------------------------------------------------------------

P = 0.4
# Where one call reads the weight once, so that one mask says it all, and is linear in it.
SEVERAL = ("embedding", "chunk", "split", "attention", "inputs-in-chunks", "einsum-three", "bilinear")
DROPPING = [call for call in FAST if not call.name.startswith(SEVERAL)]


def dropping(kind: str, call: Call, weight: Tensor) -> Any:
    return replace(make_rule(kind, call.layout, weight, gen(1)), dropout=P)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("call", DROPPING, ids=lambda call: call.name)
def test_dropout_acts_on_the_input_of_the_low_rank_path_only(call: Call, kind: str) -> None:
    model = Op(call.shape, call.call)
    params = base_params(model)
    rule = dropping(kind, call, params["w"])
    torch.manual_seed(5)
    output = apply(model, params, {"w": rule}, *call.inputs)

    torch.manual_seed(5)
    x, *bias = call.inputs
    dropped = F.dropout(x, P)
    assert not torch.equal(dropped, x)
    lora = oracle(params["w"], LoRA(rule.a, rule.b, scaling=rule.scaling, layout=rule.layout))
    scale = oracle(params["w"], rule) / lora  # 1 for LoRA
    zero = [torch.zeros_like(b) for b in bias]
    expected = call.call(scale * params["w"], x, *bias) + call.call(scale * (lora - params["w"]), dropped, *zero)
    close(output, expected, 1e-4)


@pytest.mark.parametrize("name", ["embedding", "embedding-norm"])
def test_dropout_does_not_act_on_embeddings(name: str) -> None:
    call = next(call for call in FAST if call.name == name)
    model = Op(call.shape, call.call)
    params = base_params(model)
    rule = dropping("lora", call, params["w"])
    close(apply(model, params, {"w": rule}, *call.inputs), call.call(oracle(params["w"], rule), *call.inputs), 1e-5)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("mode", ["eval", "target in eval", "p=0"])
def test_without_dropout_no_random_number_is_drawn(mode: str, kind: str) -> None:
    model = Deep((4, 3), lambda w, x: F.linear(x, w))
    params, x = base_params(model), torch.randn(5, 3)
    rule = replace(make_rule(kind, Linear(), params["deep.w"], gen(1)), dropout=0.0 if mode == "p=0" else P)
    if mode == "eval":
        model.eval()
    elif mode == "target in eval":
        model.deep.eval()
    state = torch.get_rng_state()
    output = apply(model, params, {"deep.w": rule}, x)
    assert torch.equal(torch.get_rng_state(), state)
    close(output, F.linear(x, oracle(params["deep.w"], rule)), 1e-5)


def test_dropout_follows_the_mode_of_the_bound_module() -> None:
    model = Op((4, 3), lambda w, x: F.linear(x, w)).eval()
    params, x = base_params(model), torch.randn(50, 3)
    bound = bind(model, params, {"w": replace(make_rule("lora", Linear(), params["w"], gen(1)), dropout=P)})
    still = bound(x)
    assert not torch.equal(bound.train()(x), still)
    assert torch.equal(bound.eval()(x), still)


def test_dropout_keeps_the_mean() -> None:
    model = Op((4, 3), lambda w, x: F.linear(x, w))
    params, x = base_params(model), torch.randn(3).expand(20_000, 3)
    rule = replace(make_rule("lora", Linear(), params["w"], gen(1)), dropout=P)
    output = apply(model, params, {"w": rule}, x)
    error = (output.mean(0) - F.linear(x[0], oracle(params["w"], rule))).abs()
    assert (error < 6 * output.std(0) / math.sqrt(len(x))).all()
    assert (output.std(0) > 0.1).all()


def test_adapters_under_vmap_drop_inputs_of_their_own() -> None:
    model = Op((4, 8), lambda w, x: F.linear(x, w))
    params, x = base_params(model), torch.randn(5, 8)
    rule = replace(make_rule("lora", Linear(), params["w"], gen(1)), dropout=P)
    twice = replace(rule, a=torch.stack([rule.a] * 2), b=torch.stack([rule.b] * 2))
    mapped = torch.func.vmap(lambda rule: apply(model, params, {"w": rule}, x), randomness="different")
    one, other = mapped(twice)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_dropout_that_cannot_act_is_refused(kind: str) -> None:
    model = Deep((4, 3), lambda w, x: x @ (w * 1).T)
    params, x = base_params(model), torch.randn(5, 3)
    rule = replace(make_rule(kind, Linear(), params["deep.w"], gen(1)), dropout=P)
    with pytest.raises(UnsupportedError, match=r"'deep\.w': dropout 0\.4 cannot act, because mul needs the dense"):
        apply(model, params, {"deep.w": rule}, x)
    with pytest.warns(DenseFallbackWarning, match=r"'deep\.w': mul"):
        close(apply(model.eval(), params, {"deep.w": rule}, x), x @ oracle(params["deep.w"], rule).T, 1e-5)


@pytest.mark.parametrize("dropout", [-0.1, 1.0, 2, math.nan])
def test_a_dropout_that_is_no_probability_is_refused(dropout: float) -> None:
    with pytest.raises(ParamsError, match=r"LoRA.dropout: expected a number in \[0, 1\)"):
        LoRA(torch.ones(1, 3), torch.ones(2, 1), dropout=dropout)
    with pytest.raises(ParamsError, match=r"DoRA.dropout: expected a number in \[0, 1\)"):
        DoRA(torch.ones(1, 3), torch.ones(2, 1), torch.ones(2), dropout=dropout)
