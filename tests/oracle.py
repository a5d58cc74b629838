"""What the library must compute, the rewritten weights by explicit sums over the factors, and what it must leave alone.

The formulas are written here a second time, without the library's code. They are differentiable in the leaves of
a rule, with DoRA's norm held constant unless the rule says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from funclora import DoRA, Full, LoRA
from funclora.rules.base import Rule
from funclora.rules.layouts import Conv, ConvTranspose, Layout, Matrices


def tensors(output: Any) -> list[Tensor]:
    """All tensors that a model returned."""
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def close(actual: Any, expected: Any, tolerance: float) -> None:
    """Assert that every element of every tensor agrees, to a part of the tensor's largest."""
    actual, expected = tensors(actual), tensors(expected)
    assert len(actual) == len(expected) > 0
    for got, want in zip(actual, expected, strict=True):
        scale = want.abs().max().item() if want.numel() else 0
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * scale)


def distance(one: Any, other: Any) -> float:
    """The smallest over all tensors of the largest difference, relative to the largest value."""
    pairs = zip(tensors(one), tensors(other), strict=True)
    return min(((x - y).abs().max() / y.abs().max()).item() for x, y in pairs)


def snapshot(model: nn.Module, params: Mapping[str, Tensor], *trees: Any) -> Callable[[], None]:
    """Returns a check that all of these are what they are now: identities, values, versions, attributes."""

    def modules() -> dict[str, nn.Module]:
        return dict(model.named_modules(remove_duplicate=False))

    def contents(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value._version, value.tolist()
        if isinstance(value, Mapping):
            return [(key, id(item)) for key, item in value.items()]
        return [id(item) for item in value] if isinstance(value, (list, tuple, set)) else value

    registered = {f"model {name}": t for name, t in (*model.named_parameters(), *model.named_buffers())}
    given = {f"params {name}": value for name, value in params.items()}
    leaves = {f"argument {i}": tensor for i, tensor in enumerate(tensors(trees))}
    values = {
        name: (tensor, tensor._version, tensor.clone(), tensor.requires_grad, tensor.grad)
        for name, tensor in (registered | given | leaves).items()
    }
    attributes = {
        f"{path}.{key}": (module, key, value, contents(value))
        for path, module in modules().items()
        for key, value in module.__dict__.items()
    }
    classes = {path: type(module) for path, module in modules().items()}

    def check() -> None:
        for name, (tensor, version, value, requires_grad, grad) in values.items():
            assert torch.equal(tensor, value), f"{name} changed"
            assert tensor._version == version, f"{name} was written to"
            assert (tensor.requires_grad, tensor.grad) == (requires_grad, grad), f"{name} took part in autograd"
        assert [f"params {name}" for name in params] == list(given), "params changed"
        assert {path: type(module) for path, module in modules().items()} == classes
        assert {f"{path}.{key}" for path, module in modules().items() for key in module.__dict__} == set(attributes)
        for name, (module, key, value, content) in attributes.items():
            assert module.__dict__[key] is value, f"{name} was replaced"
            assert contents(value) == content, f"{name} changed"

    return check


def oracle(weight: Tensor, rule: Rule) -> Tensor:
    """The rewritten weight by explicit sums, in the dtype of the widest operand; differentiable in the leaves."""
    if isinstance(rule, Full):
        return rule.value.clone()
    assert isinstance(rule, (LoRA, DoRA))
    v = weight + rule.scaling * delta(rule.layout, tuple(weight.shape), rule.a, rule.b)
    if isinstance(rule, LoRA):
        return v
    norm = weight_norm(rule.layout, v if rule.exact_norm_grad else v.detach())
    return from_outputs(rule.layout, rule.magnitude, tuple(weight.shape)) * v / norm


def rewritten(params: Mapping[str, Tensor], adapters: Mapping[str, Rule]) -> dict[str, Tensor]:
    """All weights, computed by the oracle in float64 and rounded to the dtype of the base."""
    wide = {name: pytree.tree_map(lambda leaf: leaf.double(), rule) for name, rule in adapters.items()}
    return dict(params) | {n: oracle(params[n].double(), rule).to(params[n].dtype) for n, rule in wide.items()}


def factor_shapes(layout: Layout, shape: tuple[int, ...], r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of A and B as PEFT has them."""
    if isinstance(layout, Conv):
        return (r, *shape[1:]), (shape[0], r, *(1 for _ in shape[2:]))
    if isinstance(layout, ConvTranspose):
        n_in, n_out, *kernel = shape
        return (r, n_in // layout.groups, *kernel), (n_out * layout.groups, r, *(1 for _ in kernel))
    assert isinstance(layout, Matrices)
    *lead, n_out, n_in = shape
    if layout.transposed:
        n_out, n_in = n_in, n_out
    return (*lead, r, n_in), (*lead, n_out, r)


def delta(layout: Layout, shape: tuple[int, ...], a: Tensor, b: Tensor) -> Tensor:
    """B·A as the tensor that the module stores."""
    if isinstance(layout, Conv):
        return torch.einsum("or,ri...->oi...", b.flatten(1), a)
    if isinstance(layout, ConvTranspose):
        return torch.cat([torch.einsum("or,ri...->io...", b_g.flatten(1), a) for b_g in b.chunk(layout.groups)])
    assert isinstance(layout, Matrices)
    return torch.einsum("...or,...ri->...io" if layout.transposed else "...or,...ri->...oi", b, a)


def weight_norm(layout: Layout, v: Tensor) -> Tensor:
    """The norm of each output unit's weights, broadcast to the weight's shape."""
    if isinstance(layout, Conv):
        norm = v.square().sum(tuple(range(1, v.dim())), keepdim=True).sqrt()
    elif isinstance(layout, ConvTranspose):
        dims = (0, *range(2, v.dim()))
        return torch.cat(
            [part.square().sum(dims, keepdim=True).sqrt().expand_as(part) for part in v.chunk(layout.groups)]
        )
    else:
        assert isinstance(layout, Matrices)
        norm = v.square().sum(-2 if layout.transposed else -1, keepdim=True).sqrt()
    return norm.expand_as(v)


def to_outputs(layout: Layout, full: Tensor) -> Tensor:
    """One value per output unit, `[*lead, out]`, of a tensor that is constant over each unit's weights."""
    if isinstance(layout, Conv):
        return full.flatten(1)[:, 0]
    if isinstance(layout, ConvTranspose):
        return torch.cat([part[0].flatten(1)[:, 0] for part in full.chunk(layout.groups)])
    assert isinstance(layout, Matrices)
    return full[..., 0, :] if layout.transposed else full[..., 0]


def from_outputs(layout: Layout, vector: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `to_outputs`: `vector: [*lead, out]` over the weight's shape."""
    if isinstance(layout, Conv):
        return vector.reshape(-1, *(1 for _ in shape[1:])).expand(shape)
    if isinstance(layout, ConvTranspose):
        n_in, n_out, *kernel = shape
        parts = [part.reshape(1, n_out, *(1 for _ in kernel)) for part in vector.chunk(layout.groups)]
        return torch.cat([part.expand(n_in // layout.groups, n_out, *kernel) for part in parts])
    assert isinstance(layout, Matrices)
    return vector.unsqueeze(-2 if layout.transposed else -1).expand(shape)
