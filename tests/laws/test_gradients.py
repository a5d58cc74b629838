"""Gradients are those of the dense formula, for every rule on every layer of the table in `cases`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import CASES, KINDS, Case, Setup, dense_call, gen, make_adapters, make_rule, plain_attention, stack_adapters
from hypothesis import given
from hypothesis import strategies as st
from oracle import close, oracle, tensors
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from funclora import DoRA, apply, base_params, merge
from funclora.rules import dora
from funclora.rules.base import Rule
from funclora.rules.dora import output_norms
from funclora.rules.layouts import Conv1D, Embedding, Layout, Linear

pytestmark = [
    pytest.mark.filterwarnings("ignore::funclora.errors.DenseFallbackWarning"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]

every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_kind = pytest.mark.parametrize("kind", KINDS)
Adapters = dict[str, Rule]
Loss = Callable[[Adapters], Tensor]


def loss_of(outputs: Any) -> Tensor:
    """A scalar to which every output contributes with a weight of its own."""
    total = torch.zeros((), dtype=torch.float64)
    for i, y in enumerate(tensors(outputs)):
        weight = torch.arange(i, i + y.numel(), dtype=torch.float64).sin().reshape(y.shape)
        total = total + ((y + weight) ** 2 * (1 + weight.abs())).mean()
    return total


def losses(s: Setup) -> tuple[Loss, Loss]:
    """The loss through `apply`, and through the oracle's dense weights."""

    def through_apply(adapters: Adapters) -> Tensor:
        return loss_of(apply(s.model, s.params, adapters, *s.args, **s.kwargs))

    def through_oracle(adapters: Adapters) -> Tensor:
        return loss_of(dense_call(s, s.params | {n: oracle(s.params[n], rule) for n, rule in adapters.items()}))

    return through_apply, through_oracle


def autograd(loss: Loss, adapters: Adapters) -> list[Tensor]:
    leaves, spec = pytree.tree_flatten(adapters)
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    return list(torch.autograd.grad(loss(pytree.tree_unflatten(leaves, spec)), leaves))


@every_kind
@every_case
def test_gradients_of_one_adapter(case: Case, kind: str) -> None:
    s = case.setup(torch.float64)
    adapters = make_adapters(case, s.params, kind, gen(1))
    through_apply, through_oracle = losses(s)
    expected = autograd(through_oracle, adapters)
    assert all(grad.abs().max() > 1e-6 for grad in expected)
    close(autograd(through_apply, adapters), expected, 1e-9)
    close(torch.func.grad(through_apply)(adapters), expected, 1e-9)


@every_kind
@pytest.mark.parametrize("case", [case for case in CASES if not case.no_vmap], ids=str)
def test_outputs_and_gradients_of_three_adapters_at_once(case: Case, kind: str) -> None:
    s = case.setup(torch.float64)
    each = [make_adapters(case, s.params, kind, gen(i)) for i in range(3)]
    stacked = stack_adapters(each)
    through_apply, through_oracle = losses(s)

    def output(adapters: Adapters) -> list[Tensor]:
        return tensors(apply(s.model, s.params, adapters, *s.args, **s.kwargs))

    with plain_attention():
        outputs = torch.func.vmap(output)(stacked)
        loop = [output(adapters) for adapters in each]
        close(outputs, [torch.stack(column) for column in zip(*loop, strict=True)], 1e-9)

        grads = torch.func.vmap(torch.func.grad(through_apply))(stacked)
        expected = [autograd(through_oracle, adapters) for adapters in each]
        close(grads, [torch.stack(column) for column in zip(*expected, strict=True)], 1e-9)


@every_kind
@every_case
def test_gradients_of_the_base_weights_and_inputs(case: Case, kind: str) -> None:
    s = case.setup(torch.float64)
    adapters = make_adapters(case, s.params, kind, gen(1))
    params = {n: p.clone().requires_grad_() if p.is_floating_point() else p for n, p in s.params.items()}
    args = tuple(x.clone().requires_grad_() if x.is_floating_point() else x for x in s.args)
    wanted = [t for t in (*params.values(), *args) if t.requires_grad]

    def grads(outputs: Any) -> list[Tensor | None]:
        if not loss_of(outputs).requires_grad:
            return [None] * len(wanted)
        return list(torch.autograd.grad(loss_of(outputs), wanted, allow_unused=True))

    actual = grads(apply(s.model, params, adapters, *args, **s.kwargs))
    dense = params | {n: oracle(params[n], rule) for n, rule in adapters.items()}
    expected = grads(dense_call(Setup(s.model, params, args, s.kwargs), dense))
    used = [i for i, grad in enumerate(expected) if grad is not None]
    assert used == [i for i, grad in enumerate(actual) if grad is not None]
    if used:
        close([actual[i] for i in used], [expected[i] for i in used], 1e-9)


LAYERS = [case for case in CASES if case.fast and case.name not in ("gpt2", "llama")]
# Where torch does not differentiate its own backward: its forward mode knows neither padding_idx nor
# frequencies, its double backward no frequencies.
FORWARD = [case for case in LAYERS if case.name not in ("embedding-padding", "embedding-scale-grad", "embedding-all")]
TWICE = [case for case in LAYERS if case.name not in ("embedding-scale-grad", "embedding-all")]


@pytest.mark.parametrize("kind", ["lora", "dora", "dora-exact"])
@pytest.mark.parametrize("case", TWICE, ids=str)
def test_second_derivatives(case: Case, kind: str) -> None:
    s = case.setup(torch.float64)
    adapters, direction = (make_adapters(case, s.params, kind, gen(i)) for i in (1, 2))

    def slope(loss: Loss) -> Loss:
        def along_direction(adapters: Adapters) -> Tensor:
            grads = pytree.tree_leaves(torch.func.grad(loss)(adapters))
            return torch.stack([(g * d).sum() for g, d in zip(grads, tensors(direction), strict=True)]).sum()

        return along_direction

    through_apply, through_oracle = losses(s)
    with plain_attention():
        expected = torch.func.grad(slope(through_oracle))(adapters)
        close(torch.func.grad(slope(through_apply))(adapters), expected, 1e-9)


@pytest.mark.parametrize("kind", ["lora", "dora", "dora-exact"])
@pytest.mark.parametrize("case", FORWARD, ids=str)
def test_forward_mode(case: Case, kind: str) -> None:
    s = case.setup(torch.float64)
    adapters, direction = (make_adapters(case, s.params, kind, gen(i)) for i in (1, 2))
    through_apply, through_oracle = losses(s)
    with plain_attention():
        for function in (lambda loss: loss, torch.func.grad):  # the slope, and the Hessian times the direction
            actual = torch.func.jvp(function(through_apply), (adapters,), (direction,))
            close(actual, torch.func.jvp(function(through_oracle), (adapters,), (direction,)), 1e-9)


def along_two_directions(case: Case, kind: str) -> tuple[Callable[[Tensor], Tensor], ...]:
    """Two numbers as a function of how far the adapters have moved: through `apply`, `merge` and the oracle."""
    s = case.setup(torch.float64)
    start, *directions = (make_adapters(case, s.params, kind, gen(i)) for i in (1, 2, 3))

    def of(output: Callable[[Adapters], Any]) -> Callable[[Tensor], Tensor]:
        def numbers(t: Tensor) -> Tensor:
            ys = tensors(output(pytree.tree_map(lambda x, d, e: x + t[0] * d + t[1] * e, start, *directions)))
            return torch.stack([loss_of(ys), loss_of([y + 1 for y in ys])])

        return numbers

    return (
        of(lambda adapters: apply(s.model, s.params, adapters, *s.args, **s.kwargs)),
        of(lambda adapters: dense_call(s, merge(s.params, adapters))),
        of(lambda adapters: dense_call(s, s.params | {n: oracle(s.params[n], rule) for n, rule in adapters.items()})),
    )


HERE = torch.tensor([0.1, -0.2], dtype=torch.float64)


@pytest.mark.slow
@every_kind
@every_case
def test_jacobians_and_hessians(case: Case, kind: str) -> None:
    ours, merged, formula = along_two_directions(case, kind)
    tolerance = 1e-5 if case.name == "llama" else 1e-9  # its norms compute in float32
    with plain_attention():
        expected = torch.func.jacrev(formula)(HERE)
        assert expected.abs().min() > 1e-6
        close(torch.func.jacrev(ours)(HERE), expected, tolerance)
        close(torch.func.jacrev(merged)(HERE), expected, tolerance)
        if kind != "full" or case in FORWARD or case not in LAYERS:  # a plain table is looked up by torch itself
            close(torch.func.jacfwd(ours)(HERE), expected, tolerance)
        if case in TWICE or case not in LAYERS:
            expected = torch.func.jacrev(torch.func.jacrev(formula))(HERE)
            close(torch.func.jacrev(torch.func.jacrev(ours))(HERE), expected, tolerance)
            close(torch.func.hessian(ours)(HERE), expected, tolerance)


# Tracing takes a second; gpt2 and llama it cannot trace, because their masks depend on values.
LINEARIZED = [("linear", kind) for kind in KINDS] + [
    (name, "lora") for name in ("embedding", "conv2d", "conv-t1d-groups", "gpt2-conv1d", "experts-loop", "mha")
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")  # the tracer's own
@pytest.mark.parametrize(("name", "kind"), LINEARIZED)
def test_linearize(name: str, kind: str) -> None:
    ours, _, formula = along_two_directions(next(case for case in CASES if case.name == name), kind)
    with plain_attention():
        value, push = torch.func.linearize(ours, HERE)
        jacobian = torch.func.jacrev(formula)(HERE)
    close(value, formula(HERE), 1e-9)
    for direction in torch.eye(2, dtype=torch.float64):
        close(push(direction), jacobian @ direction, 1e-9)


@every_kind
@pytest.mark.parametrize("name", ["linear", "embedding", "conv-t2d-groups", "experts-bmm"])
def test_merge_can_be_differentiated_and_mapped(name: str, kind: str) -> None:
    case = next(case for case in CASES if case.name == name)
    s = case.setup(torch.float64)
    _, through_oracle = losses(s)

    def through_merge(adapters: Adapters) -> Tensor:
        return loss_of(dense_call(s, merge(s.params, adapters)))

    each = [make_adapters(case, s.params, kind, gen(i)) for i in range(3)]
    expected = [autograd(through_oracle, adapters) for adapters in each]
    for adapters, want in zip(each, expected, strict=True):
        close(torch.func.grad(through_merge)(adapters), want, 1e-9)
    grads = torch.func.vmap(torch.func.grad(through_merge))(stack_adapters(each))
    close(grads, [torch.stack(column) for column in zip(*expected, strict=True)], 1e-9)


# --- embeddings ------------------------------------------------------------------------------------------------


def embedding_grads(module: nn.Embedding, ids: Tensor, rule: Any) -> tuple[list[Tensor], list[Tensor]]:
    s = Setup(module, base_params(module), (ids,), {})
    return tuple(autograd(loss, {"weight": rule}) for loss in losses(s))  # type: ignore[return-value]


@pytest.mark.parametrize("kind", ["lora", "dora", "dora-exact"])
@pytest.mark.parametrize("padding_idx", [0, 2, -1])
def test_the_padding_row_gets_no_gradient(padding_idx: int, kind: str) -> None:
    module = nn.Embedding(4, 3, padding_idx=padding_idx).double()
    nn.init.normal_(module.weight)  # the row of the padding is not zero
    rule = make_rule(kind, Embedding(), module.weight.detach(), gen(1))
    ids = torch.tensor([[0, 1, 2, 3, 3, 2, 0]])
    actual, expected = embedding_grads(module, ids, rule)
    close(actual, expected, 1e-9)
    if kind != "dora-exact":  # there the norm of each column sees the padding row
        assert not actual[0][:, padding_idx].any()
    assert actual[0][:, 1].abs().min() > 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scale_grad_by_freq_counts_any_number_of_ids(dtype: torch.dtype) -> None:
    # bfloat16 cannot count beyond 256, float16 not beyond 2048.
    ids = torch.cat([torch.zeros(2500), torch.ones(3)]).long()
    module = nn.Embedding(2, 3, scale_grad_by_freq=True, dtype=dtype)
    params = base_params(module)
    rule = make_rule("lora", Embedding(), params["weight"], gen(1), torch.float32)
    leaf = rule.a.detach().requires_grad_()
    y = apply(module, params, {"weight": replace(rule, a=leaf)}, ids)
    (grad,) = torch.autograd.grad(y.float().sum(), leaf)
    # Each id's rows are averaged, so each id counts once.
    b_sum = rule.b.sum(0) * rule.scaling
    close(grad, torch.stack([b_sum, b_sum], dim=1), 2e-2)


# --- DoRA's norm -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [Linear(), Conv1D()], ids=lambda layout: type(layout).__name__)
def test_a_zero_row_stays_zero_and_finite(layout: Linear | Conv1D, dtype: torch.dtype, exact: bool) -> None:
    weight = torch.randn(3, 5)
    weight[1] = 0
    b = torch.randn(3, 2)
    b[1] = 0
    if layout.transposed:
        weight = weight.T.contiguous()
    params = {"w": weight.to(dtype)}
    rule = DoRA(torch.randn(2, 5), b, torch.rand(3) + 1, scaling=2.0, layout=layout, exact_norm_grad=exact)

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(params["w"].clone())

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.w if layout.transposed else nn.functional.linear(x, self.w)

    x = torch.randn(4, 5).to(dtype)

    def loss(adapters: Adapters) -> Tensor:
        return apply(Layer(), params, adapters, x).float().square().sum()

    y = apply(Layer(), params, {"w": rule}, x)
    assert not y[:, 1].any()
    assert y[:, 0].all()
    dense = merge(params, {"w": rule})["w"]
    assert not (dense[:, 1] if layout.transposed else dense[1]).any()
    for grads in (autograd(loss, {"w": rule}), tensors(torch.func.grad(loss)({"w": rule}))):
        assert all(grad.isfinite().all() for grad in grads)
        assert grads[2].tolist()[1] == 0
        assert all(grad.any() for grad in grads)


@given(
    lead=st.lists(st.integers(1, 3), max_size=2), n_in=st.integers(1, 9), n_out=st.integers(1, 9),
    r=st.integers(1, 3), transposed=st.booleans(), block=st.integers(1, 40), share=st.integers(1, 9),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_row_norms_of_any_shape_in_blocks_of_any_size(
    lead: list[int], n_in: int, n_out: int, r: int, transposed: bool, block: int, share: int, seed: int
) -> None:
    torch.manual_seed(seed)
    matrix = torch.randn(*lead, n_in, n_out).mT if transposed else torch.randn(*lead, n_out, n_in)
    a, b = torch.randn(*lead, r, n_in), torch.randn(*lead, n_out, r)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dora, "NORM_BLOCK", block)
        patch.setattr(dora, "NORM_SHARE", share)
        patch.setattr(dora, "SMALL_BLOCK", 1)
        norms = output_norms(matrix, a, b, 1.5)
    expected = (matrix.double() + 1.5 * b.double() @ a.double()).square().sum(-1).sqrt()
    torch.testing.assert_close(norms, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", [Linear(), Conv1D()], ids=lambda layout: type(layout).__name__)
def test_row_norms_survive_cancellation(layout: Layout) -> None:
    # B·A cancels the weight to one part in a million: a formula of squared norms would give noise.
    weight = torch.randn(3, 4, dtype=torch.float64)
    v = 1e-6 * torch.randn(3, 4, dtype=torch.float64)
    a, b = v - weight, torch.eye(3, dtype=torch.float64)
    norms = output_norms(layout.to_matrix(weight if isinstance(layout, Linear) else weight.T.contiguous()), a, b, 1.0)
    torch.testing.assert_close(norms, v.square().sum(-1).sqrt(), rtol=1e-8, atol=0)
