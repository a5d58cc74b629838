"""Sums of products that are linear in a weight, written as one matrix product with it.

`contractions` maps an operation to a function of the class of the weight and the operation's arguments. It raises
`NoFormError` if the call is not a matrix product with the weight.
"""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from funclora._torch.functions import NoFormError

# A subclass of Tensor. Its products are called by name: the compiler does not dispatch inside a dispatch.
Kind = Any


def _einsum(kind: Kind, equation: str, *operands: Any) -> Tensor:
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    terms, result = written_out(equation, operands)
    weights = [i for i, x in enumerate(operands) if isinstance(x, kind)]
    if len(weights) != 1 or len(terms[weights[0]]) < 2:
        raise NoFormError
    weight, term = operands[weights[0]], terms[weights[0]]
    others = [(x, own) for i, (x, own) in enumerate(zip(operands, terms, strict=True)) if i != weights[0]]
    for k, (x, own) in enumerate(others):
        rest = others[:k] + others[k + 1 :]
        letters, product = [letter for _, letter in rest], None
        shared = [letter for letter in term[-2:] if letter in own]
        sizes = [{x.shape[own.index(letter)], weight.shape[term.index(letter)]} for letter in shared]
        if [*map(len, sizes)] == [1] and not any(shared[0] in each for each in (result, *letters)):
            product, found = _product(kind, x, own, weight, term, shared[0])
            if found == result and not rest:
                return product
            return torch.einsum(f"{','.join((found, *letters))}->{result}", product, *(x for x, _ in rest))
    raise NoFormError


def _product(kind: Kind, x: Tensor, own: str, weight: Any, term: str, shared: str) -> tuple[Tensor, str]:
    """The product of two operands that share one letter of the weight's matrix, and the letters of its dimensions."""
    if len(set(own)) < len(own) or len(set(term)) < len(term):
        raise NoFormError
    lead, free = term[:-2], term[-1] if shared == term[-2] else term[-2]
    rest = "".join(letter for letter in own if letter != shared and letter not in lead)
    order = "".join(letter for letter in lead if letter in own) + rest + shared
    if order != own:
        x = x.permute([own.index(letter) for letter in order])
    if not lead:
        return _call(kind, F.linear if shared == term[-1] else torch.matmul, x, weight), rest + free
    n = x.shape[len(order) - len(rest) - 1 : -1]
    x = x.reshape(*(x.shape[order.index(letter)] if letter in own else 1 for letter in lead), math.prod(n), x.shape[-1])
    y = _call(kind, torch.matmul, x, _call(kind, _MT, weight) if shared == term[-1] else weight)
    return y.reshape(*y.shape[:-2], *n, y.shape[-1]), lead + rest + free


def _call(kind: Kind, func: Callable[..., Any], *args: Any) -> Any:
    return kind.__torch_function__(func, (kind,), args)


_MT = Tensor.mT.__get__  # type: ignore[attr-defined]


def written_out(equation: str, operands: Sequence[Any]) -> tuple[list[str], str]:
    """The letters of the dimensions of an einsum's operands and of its result, one letter for each dimension.

    Raises:
        NoFormError: the equation does not fit the operands.
    """
    left, arrow, result = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != len(operands):
        raise NoFormError
    counts = [x.dim() - len(term.replace("...", "")) for term, x in zip(terms, operands, strict=True)]
    n = max(counts)
    dots = "".join([letter for letter in string.ascii_letters if letter not in equation][:n])
    if not arrow:
        once = sorted(letter for letter in set(left) - {".", ","} if left.count(letter) == 1)
        result = "..." * ("..." in left) + "".join(once)
    terms = [term.replace("...", dots[n - count :]) for term, count in zip(terms, counts, strict=True)]
    if any(x.dim() != len(term) for term, x in zip(terms, operands, strict=True)):
        raise NoFormError
    return terms, result.replace("...", dots)


def _inner(kind: Kind, input: Any, other: Any) -> Tensor:
    return _tensordot(kind, input, other, ([-1], [-1]))


def _tensordot(kind: Kind, a: Any, b: Any, dims: Any = 2, out: None = None) -> Tensor:
    if isinstance(dims, int):
        dims = range(a.dim() - dims, a.dim()), range(dims)
    if out is not None or isinstance(dims, Tensor):
        raise NoFormError
    left, right = ([dims[i]] if isinstance(dims[i], int) else dims[i] for i in (0, 1))
    first, second = list(string.ascii_lowercase[: a.dim()]), list(string.ascii_uppercase[: b.dim()])
    for i, j in zip(left, right, strict=True):
        second[j] = first[i]
    result = [letter for letter in first + second if (letter in first) != (letter in second)]
    return _einsum(kind, f"{''.join(first)},{''.join(second)}->{''.join(result)}", a, b)


def _vector(kind: Kind, input: Any, other: Any) -> Tensor:
    if input.dim() == 1:
        return _einsum(kind, "i,...io->...o", input, other)
    if other.dim() == 1:
        return _einsum(kind, "...oi,i->...o", input, other)
    raise NoFormError


def _mv(kind: Kind, input: Any, vec: Any) -> Tensor:
    return _vector(kind, input, vec)


def _bilinear(kind: Kind, input1: Any, input2: Any, weight: Any, bias: Tensor | None = None) -> Tensor:
    y = _einsum(kind, "...i,oij,...j->...o", input1, weight, input2)
    return y if bias is None else y + bias


contractions: dict[Callable[..., Any], Callable[..., Tensor]] = {
    torch.einsum: _einsum,
    torch.tensordot: _tensordot,
    torch.inner: _inner,
    Tensor.inner: _inner,
    torch.mv: _mv,
    Tensor.mv: _mv,
    F.bilinear: _bilinear,
    **dict.fromkeys((torch.matmul, torch.linalg.matmul, Tensor.matmul, Tensor.__matmul__), _vector),
}
