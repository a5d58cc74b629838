"""Products and layers: dimensions that they sum over must belong to one owner."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from funclora._torch.contractions import written_out
from funclora._torch.functions import NoFormError
from funclora._tracking.calls import OpCall, Owner, Places
from funclora._tracking.owners import LostError, Owners, Place, merged

Propagation = Callable[[OpCall], Places]


def aligned(call: OpCall) -> Places:
    """Elementwise operations, which broadcast: positions keep their owner, counted from the last dimension."""
    if not isinstance(call.out, Tensor):
        raise LostError
    return broadcast(call, call.owned())


def broadcast(call: OpCall, owned: list[tuple[Tensor, Owner]]) -> Owner:
    """The owners of a result `call.out` of tensors that broadcast against each other."""
    out, dims = call.out.shape, call.out.dim()
    if all(isinstance(owner, Place) for _, owner in owned):
        found = {(owner.dim - x.dim(), owner.inner) for x, owner in owned}  # type: ignore[union-attr]
        if len(found) == 1:
            ((dim, inner),) = found
            if dims + dim < 0 or out[dim] != call.n * inner:
                raise LostError
            return Place(dims + dim, inner)
    if len(owned) == 1 and owned[0][0].dim() == dims:
        return owned[0][1]
    if torch.compiler.is_compiling():
        raise LostError
    index = merged([call.index(x) for x, _ in owned], dims)
    if any(size > 1 and size != out[d] for d, size in enumerate(index.shape)):
        raise LostError
    return call.settled(index)


def own(call: OpCall) -> Places:
    """Operations that keep the shape of the first argument, and read nothing else but a dtype."""
    return call.owner_of(call.x) if call.is_tracked(call.x) else None


def along(position: int, default: Any = None) -> Propagation:
    """Operations along some dimensions (all, if none is given), which must belong to one owner."""

    def propagation(call: OpCall) -> Places:
        dims = call.arg(position, "dim", "axis", default=default)
        owner, n_dims = call.only(), call.x.dim()
        if isinstance(dims, (bool, Tensor)):
            raise LostError
        if dims is None or dims == () or dims == []:
            dims = range(n_dims)
        over = {d % n_dims for d in (dims if isinstance(dims, (tuple, list, range)) else (dims,))}
        out = call.out if isinstance(call.out, Tensor) else call.out[0]
        varying = [owner.dim] if isinstance(owner, Place) else owner.varying()
        if over & set(varying):
            raise LostError
        if out.dim() == n_dims and all(out.shape[d] == call.x.shape[d] for d in varying):
            return owner
        if out.dim() != n_dims - len(over):
            raise LostError
        if isinstance(owner, Place):
            return Place(owner.dim - sum(d < owner.dim for d in over), owner.inner)
        kept = [size for d, size in enumerate(owner.index.shape) if d not in over]
        return call.settled(owner.index.reshape(kept))

    return propagation


def extreme(call: OpCall) -> Places:
    """max and min: along a dimension, or elementwise of two tensors."""
    return aligned(call) if isinstance(call.arg(1, "dim", "axis", "other"), Tensor) else along(1)(call)


def _varies(owner: Owner, x: Tensor, last: int) -> bool:
    """Whether the owner varies along one of the last dimensions of a tensor."""
    varying = [owner.dim] if isinstance(owner, Place) else owner.varying()
    return any(d >= x.dim() - last for d in varying)


def last(call: OpCall) -> Places:
    """layer_norm, rms_norm: along the last dimensions, which the normalised shape counts."""
    return within(len(call.arg(1, "normalized_shape")))(call)


def within(dims: int) -> Propagation:
    """Operations on the last dimensions, which must belong to one owner: linear layers, pictures."""

    def propagation(call: OpCall) -> Places:
        owner = call.only()
        if _varies(owner, call.x, dims):
            raise LostError
        return owner

    return propagation


def new_last(call: OpCall) -> Places:
    """embedding, one_hot, view_as_real: a new last dimension."""
    owner = call.only()
    return owner if isinstance(owner, Place) else call.settled(owner.index.unsqueeze(-1))


def without_last(call: OpCall) -> Places:
    """view_as_complex: pairs in the last dimension become numbers."""
    owner = within(1)(call)
    return call.settled(owner.index.squeeze(-1)) if isinstance(owner, Owners) else owner


def patches(call: OpCall) -> Places:
    """unfold: the patches of pictures as the columns of a matrix."""
    owner = within(3)(call)
    return call.settled(owner.index.squeeze(-1)) if isinstance(owner, Owners) else owner


def matrices(call: OpCall) -> Places:
    """Functions of matrices in the last two dimensions, each of one owner."""
    owned = call.owned()
    if any(_varies(owner, x, 2) for x, owner in owned):
        raise LostError
    return broadcast(call, owned)


def _combined(call: OpCall) -> None:
    """Each position of the result depends on positions of several owners, as in attention between packed sequences."""
    if call.scope is not None and call.scope.apart:
        raise LostError


def product(first: int) -> Propagation:
    """matmul and similar.

    The dimension that is summed over must belong to one owner. If both factors have owners, the result belongs to those
    of the left one: in attention to those of the queries, whatever the keys and values are.
    """

    def propagation(call: OpCall) -> Places:
        left = call.arg(first, "mat1", "batch1", *(() if first else ("input", "self")))
        right = call.arg(first + 1, "other", "mat2", "batch2")
        if not (isinstance(left, Tensor) and isinstance(right, Tensor)) or left.dim() < 2 or right.dim() < 2:
            raise LostError
        owned = call.owned()
        if call.is_owned(left):
            owner = call.owner_of(left)
            if _varies(owner, left, 1):
                raise LostError
            if call.is_owned(right) and _varies(call.owner_of(right), right, 2):
                _combined(call)
                owned = [each for each in owned if each[0] is not right]
        elif call.is_owned(right) and call.index(right).shape[-2] > 1:
            raise LostError
        return broadcast(call, owned)

    return propagation


def outer(call: OpCall) -> Places:
    """torch.outer: rows of the first vector."""
    if not call.is_owned(call.x) or call.is_tracked(call.arg(1, "vec2", "other")):
        raise LostError
    return new_last(call)


def einsum(call: OpCall) -> Places:
    """Sums of products: as elementwise products with a dimension for each letter, of which some are summed."""
    equation = call.args[0]
    operands = list(call.args[1]) if isinstance(call.args[1], (list, tuple)) else list(call.args[1:])
    if not isinstance(equation, str):
        raise LostError
    try:
        terms, result = written_out(equation, operands)
    except NoFormError as error:
        raise LostError from error
    if any(len(set(term)) < len(term) for term in (*terms, result)):
        raise LostError
    call.owned()
    owned = [(term, call.owner_of(x), x) for term, x in zip(terms, operands, strict=True) if call.is_owned(x)]
    if all(isinstance(owner, Place) for _, owner, _ in owned):
        places = {(term[owner.dim], owner.inner) for term, owner, _ in owned}  # type: ignore[union-attr]
        if len(places) == 1:
            ((letter, inner),) = places
            if letter in result:
                return Place(result.index(letter), inner)
            raise LostError
    if torch.compiler.is_compiling():
        raise LostError
    every = "".join(dict.fromkeys("".join((result, *terms))))
    parts: list[Tensor] = []
    seen = ""
    for term, _, x in owned:
        index = call.index(x)
        varying = {letter for letter, size in zip(term, index.shape, strict=True) if size > 1}
        if not varying <= set(result):
            if not seen:
                raise LostError
            _combined(call)
            continue  # the values and keys of attention
        crossed = {letter for letter in varying if seen and letter not in seen}
        if crossed and parts:
            _combined(call)
            continue
        order = [letter for letter in every if letter in term]
        index = index.permute([term.index(letter) for letter in order])
        sizes = iter(index.shape)
        parts.append(index.reshape([next(sizes) if letter in term else 1 for letter in every]))
        seen += term
    found = merged(parts, len(every))
    return call.settled(found.reshape(found.shape[: len(result)]))


def attention(call: OpCall) -> Places:
    """scaled_dot_product_attention: the result belongs to the owners of the queries."""
    query, key, value = (call.arg(i, name) for i, name in enumerate(("query", "key", "value")))
    owner = call.owner_of(query)
    if _varies(owner, query, 1) or call.out.dim() != query.dim():
        raise LostError
    for x in (key, value):
        if call.is_owned(x) and _varies(call.owner_of(x), x, 2):
            if not _masks_others(call, query, x):
                _combined(call)
        elif call.is_owned(x):
            broadcast(call, [(query, owner), (x, call.owner_of(x))])  # of the same batch
    return owner


def _masks_others(call: OpCall, query: Tensor, key: Tensor) -> bool:
    """Whether the mask of an attention lets every query see keys of its own owner only."""
    mask = call.arg(3, "attn_mask")
    if call.scope is None or not call.scope.apart or not isinstance(mask, Tensor):
        return False
    seen = call.values(mask)
    seen = seen if seen.dtype == torch.bool else seen > torch.finfo(seen.dtype).min / 2
    own, other = (call.index(x, seen)[..., 0] for x in (query, key))
    mixed = (own.unsqueeze(-1) != other.unsqueeze(-2)) & (other.unsqueeze(-2) >= 0)
    return not bool((seen & mixed).any())


def sorted_product(call: OpCall) -> Places:
    """grouped_mm of experts: rows of x, each by the matrix of its expert."""
    owner = call.owner_of(call.x)
    if call.x.dim() != 2 or call.out.dim() != 2 or _varies(owner, call.x, 1):
        raise LostError
    return owner


def batched(spatial: int) -> Propagation:
    """Convolutions, pooling: the first dimension of a batch."""

    def propagation(call: OpCall) -> Places:
        out, owner = call.out if isinstance(call.out, Tensor) else call.out[0], call.only()
        if spatial and out.dim() != spatial + 2:
            raise LostError
        if owner.dim if isinstance(owner, Place) else any(owner.varying()):
            raise LostError
        if isinstance(owner, Owners) and out.dim() != call.x.dim():
            raise LostError
        return owner

    return propagation


def batch_norm(call: OpCall) -> Places:
    if call.arg(5, "training", "use_input_stats", default=True):
        raise LostError  # its statistics are over all rows
    return batched(0)(call)


def instance_norm(call: OpCall) -> Places:
    """Statistics of each row by itself, or those that are kept."""
    if call.arg(1, "running_mean") is not None and call.arg(5, "use_input_stats", default=True):
        raise LostError  # it keeps the statistics of all rows
    return batched(0)(call)


def bilinear(call: OpCall) -> Places:
    """F.bilinear: two inputs of the same rows."""
    owned = call.owned()
    inputs = call.arg(0, "input1"), call.arg(1, "input2")
    if any(_varies(owner, x, 1) or all(x is not each for each in inputs) for x, owner in owned):
        raise LostError
    return broadcast(call, owned)


def embedding_bag(call: OpCall) -> Places:
    """The sum of the rows of a table that one row of ids names; with offsets, bags of any owner."""
    owner, ids = call.owner_of(call.arg(0, "input")), call.arg(0, "input")
    weights = call.arg(7, "per_sample_weights")
    if call.is_tracked(call.arg(1, "weight")) or (call.is_tracked(weights) and call.owner_of(weights) != owner):
        raise LostError
    if call.arg(2, "offsets") is not None or ids.dim() != 2 or _varies(owner, ids, 1):
        raise LostError
    return owner


def cosine(call: OpCall) -> Places:
    """cosine_similarity: an elementwise product, summed along one dimension."""
    owned, dim = call.owned(), call.arg(2, "dim", default=1) % (call.out.dim() + 1)
    if len({x.dim() for x in call.tensors}) > 1:
        raise LostError
    indices = [call.index(x) for x, _ in owned]
    if any(index.shape[dim] > 1 for index in indices):
        raise LostError
    places = {owner for _, owner in owned}
    if len(places) == 1 and isinstance(owner := places.pop(), Place):
        return Place(owner.dim - (dim < owner.dim), owner.inner)
    return call.settled(merged([index.squeeze(dim) for index in indices], call.out.dim()))


def cell(call: OpCall) -> Places:
    """lstm_cell, gru_cell: one step of a recurrence, for rows that are first."""
    places = {owner for _, owner in call.owned()}
    if places != {Place(0, 1)} or call.args[0].dim() != 2:
        raise LostError
    return Place(0, 1)


def recurrent(states: int) -> Propagation:
    """lstm, gru, rnn over complete sequences: rows along the batch dimension, also of the last states."""

    def propagation(call: OpCall) -> Places:
        x, batch_first = call.args[0], call.args[-1]
        if not isinstance(call.args[3], bool):
            raise LostError  # packed sequences
        place, at = call.owner_of(x), 0 if batch_first else 1
        given = call.args[1] if isinstance(call.args[1], (tuple, list)) else (call.args[1],)
        if place != Place(at, 1) or any(call.is_tracked(h) and call.owner_of(h) != Place(1, 1) for h in given):
            raise LostError
        return (place, *[Place(1, 1)] * states)

    return propagation
