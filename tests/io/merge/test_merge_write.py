"""The order in which the parts of a merge are written."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from funclora.io.merge.write import _in_turn


@given(sizes=st.lists(st.integers(0, 5), max_size=6), n=st.integers(1, 4))
def test_neighbouring_parts_belong_to_different_files_and_none_is_left_out(sizes: list[int], n: int) -> None:
    read: list[int] = []

    def jobs(file: int) -> Any:
        for i in range(sizes[file]):
            read.append(file)
            yield file, i

    order: list[Any] = []
    for job in _in_turn([jobs(file) for file in range(len(sizes))], n):
        order.append(job)
        assert len(read) == len(order), "no part is prepared before it is asked for"
    for file, size in enumerate(sizes):
        assert [i for k, i in order if k == file] == list(range(size))
    for k, (one, other) in enumerate(pairwise(order)):
        left = {file for file, _ in order[k + 1 :]}
        assert one[0] != other[0] or n == 1 or left == {one[0]}
