"""What went wrong while owners were tried: each must be right, or be refused."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from cases import gen, llama
from oracle import close
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import funclora as fl
from funclora._tracking.tensor import RowTensor
from funclora.errors import UnsupportedError
from funclora.rules import Parameter

F64 = torch.float64


def lora(seed: int, *lead: int, layout: Any = None) -> fl.LoRA:
    a, b = (torch.randn(*lead, *shape, generator=gen(seed + k), dtype=F64) for k, shape in enumerate(((2, 4), (4, 2))))
    return fl.LoRA(a, b, layout=layout) if layout is not None else fl.LoRA(a, b)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4, dtype=F64), nn.Linear(4, 4, dtype=F64)


def stack_of(*names: str, n: int = 3) -> Any:
    return fl.stack([{f"{name}.weight": lora(10 * i + j) for j, name in enumerate(names)} for i in range(n)])


def run(model: nn.Module, stack: Any, ids: Any, *inputs: Any, **options: Any) -> Any:
    return fl.apply(model, fl.base_params(model), fl.route(stack, ids, **options), *inputs)


class Chosen(nn.Module):
    """Matrices that an index of each token selects."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 4, 4, dtype=F64, generator=gen(0)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(self.w[(x.sum(-1) > 0).long()], x.unsqueeze(-1)).squeeze(-1)


class Swapped(Chosen):
    """The matrices of one row, multiplied by the tokens of another."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(self.w[(x.sum(-1) > 0).long()], x.flip(0).unsqueeze(-1)).squeeze(-1)


def test_a_weight_that_a_followed_index_selects_is_not_replaced_by_its_base() -> None:
    members = [{"w": lora(i, 3, layout=Parameter())} for i in range(3)]
    x, ids, model = torch.randn(4, 4, generator=gen(1), dtype=F64), [2, 0, -1, 1], Chosen()
    params = fl.base_params(model)
    want = [fl.apply(model, params, members[j] if j >= 0 else {}, x[i : i + 1]) for i, j in enumerate(ids)]
    close(run(model, fl.stack(members), ids, x), torch.cat(want), 1e-10)
    with pytest.raises(UnsupportedError, match="matmul"):
        run(Swapped(), fl.stack(members), ids, x)


def test_caches_keep_no_tracked_tensors() -> None:
    from transformers import DynamicCache

    model = llama().eval()
    params = fl.base_params(model)
    config = fl.LoraConfig(r=2, target_modules=["q_proj"])
    bound = fl.bind(model, params, fl.route(fl.stack([fl.init(model, config) for _ in range(2)]), [0, 1]))
    name = "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"
    given = DynamicCache()
    for cache in (given, None):
        out = bound(torch.randint(1, 16, (2, 3)), use_cache=True, **{} if cache is None else {name: cache})
        for layer in (cache or getattr(out, name)).layers:
            assert type(layer.keys) is Tensor
            assert type(layer.values) is Tensor
        assert not any(isinstance(x, RowTensor) for x in pytree.tree_leaves(out))


class Buffered(Two):
    """A buffer that is written to in place."""

    kept: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", torch.zeros(2, 4, dtype=F64))

    def forward(self, x: Tensor) -> Any:
        self.kept.copy_(self.one(x))
        return self.two(self.kept)


def test_buffers_that_are_written_to_stay_plain() -> None:
    model, x = Buffered(), torch.randn(2, 4, generator=gen(0), dtype=F64)
    params, stack = fl.base_params(model), stack_of("one", "two")
    bound = fl.bind(model, params, fl.route(stack, [2, 0]))
    for y in (bound(x), bound(x)):
        assert y.shape == (2, 4)
        assert type(bound.kept) is Tensor
    weights = [stack[j]["one.weight"].dense(params["one.weight"]) for j in (2, 0)]
    close(bound.kept, torch.stack([w @ x[i] + params["one.bias"] for i, w in enumerate(weights)]), 1e-10)


class Joined(Two):
    """Rows and a row of nobody, through an adapted layer."""

    def forward(self, x: Tensor) -> Any:
        return self.two(torch.cat([self.one(x), torch.ones(2, 4, dtype=F64)]))[: len(x)]


class Apart(Two):
    """The same, but cut off before the layer."""

    def forward(self, x: Tensor) -> Any:
        return self.two(torch.cat([self.one(x), torch.ones(2, 4, dtype=F64)])[: len(x)])


def test_positions_of_nobody_are_not_read_by_an_adapter() -> None:
    x = torch.randn(2, 4, generator=gen(0), dtype=F64)
    with pytest.raises(UnsupportedError, match="positions without a row"):
        run(Joined(), stack_of("one", "two"), [0, 1], x)
    model, stack = Apart(), stack_of("one", "two")
    params = fl.base_params(model)
    want = [fl.apply(model, params, stack[i], x[i : i + 1]) for i in range(2)]
    close(run(model, stack, [0, 1], x), torch.cat(want), 1e-10)


class Carried(Two):
    """Tokens that lose their order, and get a mask of the rows in their place."""

    def forward(self, x: Tensor, mask: Tensor) -> Any:
        lost = torch.linalg.qr(self.one(x)).Q
        return self.two(lost * (x > 0))


def test_a_mask_of_rows_does_not_lend_its_owners_to_lost_values() -> None:
    x = torch.randn(4, 4, generator=gen(0), dtype=F64)
    with pytest.raises(UnsupportedError, match="qr"):
        run(Carried(), stack_of("one", "two"), [0, 1, 2, 0], x, x > 0)


def test_packed_rows_through_a_cumulative_sum_are_refused() -> None:
    class Sums(Two):
        def forward(self, x: Tensor) -> Any:
            return self.two(self.one(x).cumsum(1))

    x = torch.randn(1, 5, 4, generator=gen(0), dtype=F64)
    with pytest.raises(UnsupportedError, match=r"cumsum, called at .*test_traps\.py"):
        run(Sums(), stack_of("one", "two"), [[0, 0, 1, 1, 2]], x)
