"""AdamW by torch's fused kernel: one pass over each leaf instead of ten.

The kernel writes to its arguments, and `vmap` is the only transform that it supports. So it runs on copies, and only
if no derivative or trace is needed; in all other cases `adamw` computes its formula.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor

from funclora._torch.functions import in_transform, is_differentiated, vmapped_once

_KINDS = {(dtype, device) for dtype in (torch.float32, torch.float64) for device in ("cpu", "cuda")}


def fits_kernel(*trees: Any) -> bool:
    """Whether the kernel can replace the formula, in this context and for these leaves."""
    if is_differentiated() or torch.compiler.is_compiling() or (in_transform() and not vmapped_once()):
        return False
    kinds = {(leaf.dtype, leaf.device) for tree in trees for leaf in optree.tree_leaves(tree)}
    return len(kinds) == 1 and all((dtype, device.type) in _KINDS for dtype, device in kinds)


@dataclass(frozen=True)
class AdamKernel:
    """The update of AdamW for whole trees.

    Attributes:
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the denominator.
        scaled: `(direction, param, rate, shrink) -> update`.
    """

    b1: float
    b2: float
    eps: float
    scaled: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

    def __call__(
        self, mu: Any, nu: Any, grads: Any, params: Any, count: Tensor, rate: Tensor, shrink: Tensor
    ) -> tuple[Any, Any, Any]:
        """Updates and both new moments.

        Args:
            mu: the first moment.
            nu: the second moment.
            grads: the gradients.
            params: the parameters.
            count: t, including this step: `[]`, or `[n_adapters]` for leaves `[n_adapters, ...]`, like `rate` and
                `shrink`.
            rate: the learning rate.
            shrink: the rate times the weight decay.
        """
        leaves, spec = optree.tree_flatten(mu)
        n = len(leaves)
        for tree in (nu, grads, params):
            leaves = [*leaves, *spec.flatten_up_to(tree)]
        out = _Adam.apply(self, count, rate, shrink, *leaves)  # type: ignore[no-untyped-call]
        updates, mu, nu = (optree.tree_unflatten(spec, out[i : i + n]) for i in (0, n, 2 * n))
        return updates, mu, nu

    def run(self, count: Tensor, rate: Tensor, shrink: Tensor, leaves: Any) -> tuple[Tensor, ...]:
        """The update of leaves, with one `count` for all of them or one for each member of `[n_adapters, ...]`."""
        counts = count.unique().tolist()
        if len(counts) == 1:
            return self._run(counts[0], rate, shrink, leaves)
        n = len(leaves) // 4
        outs = [torch.empty(leaf.shape, dtype=leaf.dtype, device=leaf.device) for leaf in leaves[:n] for _ in range(3)]
        outs = [*outs[0::3], *outs[1::3], *outs[2::3]]
        for value in counts:
            index = (count == value).nonzero().flatten()
            some = self._run(value, rate[index], shrink[index], [leaf[index] for leaf in leaves])
            for out, part in zip(outs, some, strict=True):
                out[index] = part
        return tuple(outs)

    def _run(self, count: float, rate: Tensor, shrink: Tensor, leaves: Any) -> tuple[Tensor, ...]:
        n = len(leaves) // 4
        # The kernel reads memory in order and ignores the strides.
        m, v = ([leaf.clone(memory_format=torch.contiguous_format) for leaf in leaves[i : i + n]] for i in (0, n))
        grads = [leaf.contiguous() for leaf in leaves[2 * n : 3 * n]]
        directions = [torch.zeros_like(leaf) for leaf in m]  # as parameters that are 0, with the rate 1 and no decay
        steps = [torch.tensor(float(count), device=leaf.device) for leaf in m]
        torch._fused_adamw_(
            directions, grads, m, v, [], steps, lr=1.0, beta1=self.b1, beta2=self.b2, weight_decay=0.0, eps=self.eps,
            amsgrad=False, maximize=False,
        )  # fmt: skip
        params = leaves[3 * n :]
        return (*(self.scaled(d, p, rate, shrink) for d, p in zip(directions, params, strict=True)), *m, *v)


class _Adam(torch.autograd.Function):
    """The kernel as an operation with a rule for `vmap`: all members at once."""

    @staticmethod
    def forward(kernel: AdamKernel, count: Tensor, rate: Tensor, shrink: Tensor, *leaves: Tensor) -> Any:
        return kernel.run(count, rate, shrink, leaves)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: Any, kernel: AdamKernel, *tensors: Tensor) -> Any:
        size = info.batch_size
        count, rate, shrink, *leaves = (
            x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
            for x, dim in zip(tensors, in_dims[1:], strict=True)
        )
        if count.dim() > 1:
            raise NotImplementedError("adamw: vmap over a stack of adapters whose leaves are stacks themselves")
        outs = kernel.run(count, rate, shrink, leaves)
        return outs, (0,) * len(outs)
