"""AdamW by torch's fused kernel: one pass over each leaf instead of ten.

The kernel writes to its arguments, and `vmap` is the only transform that it supports. So it runs on copies, and only
if no derivative or trace is needed; in all other cases `adamw` computes its formula.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor

from funclora._torch.functions import in_transform, is_differentiated, of_all_mapped, vmapped_once

_KINDS = {(dtype, device) for dtype in (torch.float32, torch.float64) for device in ("cpu", "cuda")}
# Leaves are copied and updated while they are in the processor's cache: so many elements, or one leaf, at a time.
_CACHED = 2**17


def fits_kernel(columns: Sequence[Sequence[Tensor]]) -> bool:
    """Whether the kernel can replace the formula, in this context and for the leaves of these trees."""
    if is_differentiated() or torch.compiler.is_compiling() or (in_transform() and not vmapped_once()):
        return False
    kinds = {(leaf.dtype, leaf.device) for leaves in columns for leaf in leaves}
    return len(kinds) == 1 and all((dtype, device.type) in _KINDS for dtype, device in kinds)


@dataclass(frozen=True)
class AdamKernel:
    """A step of AdamW for whole trees.

    Attributes:
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the denominator.
    """

    b1: float
    b2: float
    eps: float

    def __call__(
        self, count: Tensor, rate: Tensor, decay: Tensor, spec: Any, columns: Sequence[Sequence[Tensor]]
    ) -> tuple[Any, Any, Any]:
        """New parameters and moments.

        Args:
            count: t, including this step: `[]`, or, like `rate` and `decay`, `[n_adapters]` for leaves
                `[n_adapters, ...]`.
            rate: the learning rate.
            decay: the weight decay.
            spec: the structure of all trees.
            columns: the leaves of the parameters, both moments and the gradients, from `aligned`.
        """
        n = len(columns[0])
        given = [count, rate, decay, *itertools.chain.from_iterable(columns)]
        out = of_all_mapped(self.run, given) if vmapped_once() else self.run(given)
        params, mu, nu = (optree.tree_unflatten(spec, out[i : i + n]) for i in (0, n, 2 * n))
        return params, mu, nu

    def run(self, given: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The step of leaves, with one value of each number for all of them, or one for each of `[n_adapters, ...]`.

        Args:
            given: t, the learning rate, the weight decay, and the leaves of all trees.
        """
        count, rate, decay, *leaves = given
        if count.dim() > 1:
            raise NotImplementedError("adamw: vmap over a stack of adapters whose leaves are stacks themselves")
        numbers = torch.stack([x.double() for x in torch.broadcast_tensors(count, rate, decay)], -1)
        several = numbers.dim() > 1
        runs = list(_runs(numbers.reshape(-1, 3).tolist()))
        n = len(leaves) // 4
        # The kernel ignores the strides. Leaves `[n_adapters, *, k]` may lie in memory as `[n_adapters, k, *]`.
        turned = [several and x.dim() == 3 and x.mT.is_contiguous() and not x.is_contiguous() for x in leaves[:n]]
        leaves = [x.mT if turn else x for x, turn in zip(leaves, turned * 4, strict=True)]
        outs: list[list[Tensor]] = [[], [], []]
        for some in _parts([leaf.numel() for leaf in leaves[:n]]):
            p, m, v = ([leaves[k * n + i].clone(memory_format=torch.contiguous_format) for i in some] for k in range(3))
            grads = [leaves[3 * n + i].contiguous() for i in some]
            for (t, lr, wd), start, end in runs:
                q, h, m_, v_ = ([x[start:end] for x in each] if several else each for each in (p, grads, m, v))
                steps = [torch.tensor(t, dtype=torch.float32, device=p[0].device)] * len(p)  # it only reads them
                torch._fused_adamw_(
                    q, h, m_, v_, [], steps, lr=lr, beta1=self.b1, beta2=self.b2, weight_decay=wd, eps=self.eps,
                    amsgrad=False, maximize=False,
                )  # fmt: skip
            outs = [[*out, *new] for out, new in zip(outs, (p, m, v), strict=True)]
        return tuple(x.mT if turn else x for x, turn in zip(itertools.chain(*outs), turned * 3, strict=True))


def _runs(values: list[list[float]]) -> Iterator[tuple[list[float], int, int]]:
    """Equal values that follow each other, with the first place and the one after the last."""
    start = 0
    for value, same in itertools.groupby(values):
        end = start + len(list(same))
        yield value, start, end
        start = end


def _parts(sizes: list[int]) -> Iterator[list[int]]:
    """Leaves that are updated together."""
    part: list[int] = []
    total = 0
    for i, size in enumerate(sizes):
        if part and total + size > _CACHED:
            yield part
            part, total = [], 0
        part.append(i)
        total += size
    yield part
