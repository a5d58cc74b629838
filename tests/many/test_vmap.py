"""`vmap` over the members of a stack: the loop over them, with torch's own meaning of its options."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import funclora as fl
from funclora.errors import ConfigError

MODEL = nn.Linear(3, 2).double()
PARAMS = fl.base_params(MODEL)


def close(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def low(kind: Any, r: int, scaling: float) -> dict[str, Any]:
    leaves = [torch.randn(r, 3), torch.randn(2, r), *([torch.rand(2)] if kind is fl.DoRA else [])]
    return {"weight": kind(*(leaf.double() for leaf in leaves), scaling=scaling)}


def mixed() -> list[dict[str, Any]]:
    """Members of five groups, their positions interleaved."""
    bias = {"bias": fl.Full(torch.randn(2).double())}
    return [low(fl.LoRA, 1, 2.0), low(fl.DoRA, 2, 0.5), low(fl.LoRA, 1, 3.0), bias, low(fl.DoRA, 2, 1.5),
            low(fl.LoRA, 3, 1.0)]  # fmt: skip


def output(adapters: Any, x: Tensor) -> Tensor:
    return fl.apply(MODEL, PARAMS, adapters, x)


def alike() -> list[dict[str, Any]]:
    return [low(fl.LoRA, 2, 1.5) for _ in range(6)]


@pytest.mark.parametrize("members", [mixed, alike, lambda: [{}, *mixed()[:5]]], ids=["mixed", "alike", "base"])
@pytest.mark.parametrize(
    ("in_dims", "shape"), [((0, None), (4, 3)), (0, (6, 4, 3)), ((0, 1), (4, 6, 3)), ([0, -2], (4, 6, 3))], ids=str
)
@pytest.mark.parametrize("out_dims", [0, 1, -1])
def test_equals_the_loop(members: Any, in_dims: Any, shape: tuple[int, ...], out_dims: int) -> None:
    some, x = members(), torch.randn(shape).double()
    dim = in_dims if isinstance(in_dims, int) else in_dims[1]
    loop = [output(member, x if dim is None else x.select(dim, i)) for i, member in enumerate(some)]
    got = fl.vmap(output, in_dims, out_dims)(fl.stack(some), x)
    close(got, torch.stack(loop, dim=out_dims))


def test_means_what_it_means_in_torch() -> None:
    """On a stack of one group its options give what torch's give on the tree of its leaves."""
    members = alike()
    a, b = (torch.stack([getattr(member["weight"], leaf) for member in members]) for leaf in "ab")
    tree = {"weight": fl.LoRA(a, b, scaling=1.5)}
    batch = {"x": torch.randn(4, 6, 3).double(), "shift": torch.randn(2).double()}

    def both(adapters: Any, batch: Any, times: Tensor) -> Any:
        y = output(adapters, batch["x"]) + batch["shift"]
        return {"y": y * times, "loss": y.square().mean()}

    times = torch.randn(6).double()
    options: Any = {"in_dims": (0, {"x": 1, "shift": None}, 0), "out_dims": {"y": 2, "loss": 0}}
    got = fl.vmap(both, **options)(fl.stack(members), batch, times)
    want = torch.func.vmap(both, **options)(tree, batch, times)
    assert got.keys() == want.keys()
    for name in want:
        close(got[name], want[name])


def test_differentiates_and_nests() -> None:
    members, x = mixed(), torch.randn(4, 3).double()

    def loss(x: Tensor) -> Tensor:
        return fl.vmap(output, in_dims=(0, None))(fl.stack(members), x).square().sum()

    got = torch.func.vmap(torch.func.grad(loss))(x.unsqueeze(1))
    want = torch.stack([torch.func.grad(lambda x: sum(output(m, x).square().sum() for m in members))(row) for row in x])
    close(got.squeeze(1), want)


def test_randomness() -> None:
    def noise(adapters: Any) -> Tensor:
        return torch.rand(3)

    same, other = (fl.vmap(noise, randomness=kind)(fl.stack(alike())) for kind in ("same", "different"))
    assert torch.equal(same, same[:1].expand(6, 3))
    assert not torch.equal(other[0], other[1])


ROWS: list[tuple[Any, Any, str]] = [
    ({"in_dims": (0, None, 0)}, torch.ones(2, 3), "an entry for each of 2 arguments, the stack's 0 first, got"),
    ({"in_dims": (1, None)}, torch.ones(2, 3), r"in_dims\[0\] is the stack's dimension of members, 0; got 1"),
    ({"in_dims": (None, 0)}, torch.ones(2, 3), r"in_dims\[0\] is the stack's"),
    ({"in_dims": "0"}, torch.ones(2, 3), "in_dims: expected an int or a tuple"),
    ({"in_dims": (0, "x")}, torch.ones(2, 3), "in_dims: expected ints or None, got 'x'"),
    ({"in_dims": (0, True)}, torch.ones(2, 3), "in_dims: expected ints or None, got True"),
    ({"in_dims": (0, {"y": 0})}, {"x": torch.ones(2, 3)}, "in_dims.* is not nested like"),
    ({"in_dims": 0}, torch.ones(5, 3), r"shape \[5, 3\] has no 6 members along dimension 0"),
    ({"in_dims": (0, 2)}, torch.ones(6, 3), r"shape \[6, 3\] has no 6 members along dimension 2"),
    ({"in_dims": 0}, 3, "in_dims has 0 for a int, which is not a tensor. Pass None"),
    ({"in_dims": (0, None), "out_dims": 4}, torch.ones(2, 3), r"out_dims has 4 for a result of shape \[6, 2, 2\]"),
    ({"in_dims": (0, None), "out_dims": (0, 1)}, torch.ones(2, 3), "out_dims.* is not nested like"),
    ({"in_dims": (0, None), "randomness": "some"}, torch.ones(2, 3), "randomness: expected 'error', 'same' or"),
]


@pytest.mark.parametrize(("options", "x", "match"), ROWS, ids=[match for *_, match in ROWS])
def test_what_does_not_fit_is_refused(options: Any, x: Any, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        fl.vmap(output, **options)(fl.stack(alike()), x.double() if isinstance(x, Tensor) else x)


def test_results_that_cannot_be_joined() -> None:
    members = mixed()
    with pytest.raises(ConfigError, match="the members' results cannot be joined"):
        fl.vmap(lambda a: a["weight"].a)(fl.stack([members[0], members[5]]))
