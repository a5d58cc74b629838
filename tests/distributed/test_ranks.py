"""What processes tell each other, where there is one; the sums that they share."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from funclora.distributed import _ranks as ranks
from funclora.distributed._mean import TreeSum, ordered_sums, tree_sum


def test_a_process_alone_is_not_connected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")  # as some clusters set it, without what torchrun sets
    with ranks.connected(), ranks.first_alone():
        assert not dist.is_initialized()
        assert (ranks.rank(), ranks.size(), ranks.is_first(), ranks.is_restarted()) == (0, 1, True, False)
        ranks.meet()
    assert ranks.gathered("a") == ["a"]
    assert ranks.from_first("a") == "a"
    assert ranks.dealt(["a", "b"]) == ["a", "b"]
    assert [*ranks.computed([1, 2, 3], str)] == ["1", "2", "3"]
    assert ranks.sums(3, 4) == [3, 4]
    assert [*ranks.part_of(5)] == [0, 1, 2, 3, 4]
    ranks.check_equal({"data": "a"})


@pytest.mark.parametrize("n", [*range(1, 18), 31])
def test_a_sum_of_parts_that_come_one_by_one_is_that_of_all(n: int) -> None:
    parts = torch.randn(n, 50, generator=torch.Generator().manual_seed(n)) * 10.0 ** torch.arange(50).remainder(7)
    wanted = tree_sum([*parts.clone()])
    sums = TreeSum()
    for part in parts:
        sums.add([part.clone(), -part])
    found, negative = sums.total()
    assert torch.equal(found, wanted)
    assert torch.equal(negative, -wanted)
    assert n < 8 or not torch.equal(found, parts.cumsum(0)[-1])  # the order of the sum matters


def test_one_process_sums_nothing() -> None:
    own = [torch.ones(3), torch.zeros((), dtype=torch.float64)]
    assert all(a is b for a, b in zip(ordered_sums(own, 1), own, strict=True))
