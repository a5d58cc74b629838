"""Where operations put the rows of a batch: claims are held against brute force, and against other rows' values."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from funclora._tracking import products
from funclora._tracking.batch import Batch
from funclora._tracking.entry import with_rows
from funclora._tracking.owners import Owners, Place, index_of
from funclora._tracking.products import aligned
from funclora._tracking.propagation import constant, exported, number, propagations, question
from funclora._tracking.tensor import ForwardCall, rows_of
from funclora.errors import UnsupportedError

N = 3
LOST = "lost"


class Given(NamedTuple):
    """An argument: a plain tensor, or one with rows."""

    value: Tensor
    place: Place | None = None

    def changed(self, row: int, fill: Callable[[Tensor], Tensor]) -> Given:
        """The same with other values in one row."""
        if self.place is None:
            return self
        value = self.value.clone()
        mine = value.narrow(self.place.dim, row * self.place.inner, self.place.inner)
        mine.copy_(fill(mine))
        return Given(value, self.place)


class Result(NamedTuple):
    value: Tensor
    place: Place | Owners | str  # "" if it never had rows, or a name if they are lost

    def owners(self) -> Tensor:
        """The owner of each position."""
        assert not isinstance(self.place, str)
        return index_of(self.place, N, self.value.dim()).expand(self.value.shape)

    def at(self, owners: Tensor, row: int) -> Tensor:
        return self.value[owners == row]


Function = Callable[..., Any]


def carry_out(func: Function, given: Any, known: dict[Any, Any]) -> tuple[list[Result], bool]:
    """All tensors that an operation returns or is given, as it leaves them; and whether Python learnt a value."""
    torch.default_generator.manual_seed(0)  # not torch.manual_seed, which is slow
    scope = ForwardCall(N, known)

    def entered(x: Any) -> Any:
        if not isinstance(x, Given):
            return x
        value = x.value.clone()
        return value if x.place is None else scope.enter(value, x.place)

    args, kwargs = pytree.tree_map(entered, given, is_leaf=lambda x: isinstance(x, Given))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = func(*args, **kwargs)
    results = []
    for x in pytree.tree_leaves((out, args, kwargs)):
        if isinstance(x, Tensor):
            plain, place = rows_of(x)
            results.append(Result(plain.clone(), scope.lost(plain) or place))
    return results, bool(scope.read)


def another(x: Tensor) -> Tensor:
    if x.dtype == torch.bool:
        return ~x
    return 1 + torch.rand(x.shape, dtype=x.dtype) if x.is_floating_point() else (x + 1) % N


def nan(x: Tensor) -> Tensor:
    return torch.full_like(x, float("nan")) if x.is_floating_point() else another(another(x))


def equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(torch.nan_to_num(one, 7.0), torch.nan_to_num(other, 7.0))


def given_rows(func: Function, given: Any) -> list[Given]:
    """The arguments whose values a result may not mix: keys, values and indices of others are the model's business."""
    found = [x for x in pytree.tree_leaves(given, is_leaf=lambda x: isinstance(x, Given))
             if isinstance(x, Given) and x.place is not None]  # fmt: skip
    if propagations.get(func) in ATTENDING:
        return found[:1]
    return [x for x in found if x.value.is_floating_point()] or found[:1]


def check(func: Function, *args: Any, known: dict[Any, Any] | None = None, **kwargs: Any) -> list[Any]:
    """Assert the law, and return what is claimed of the results.

    What belongs to a row must not depend on the values of another, and what is said to belong to no row must depend on
    none. Where values decide who a position belongs to, its value must be one of that row.
    """
    known = {} if known is None else known
    given = (args, kwargs)
    before, read = carry_out(func, given, known)
    if read:  # all that comes after is lost
        return [LOST]
    if all(isinstance(result.place, str) and result.place for result in before):
        return [result.place for result in before]
    changing = given_rows(func, given)
    for row in range(N):
        for fill in (another, nan):
            changed = pytree.tree_map(
                lambda x: x.changed(row, fill) if any(x is each for each in changing) else x,  # noqa: B023
                given, is_leaf=lambda x: isinstance(x, Given),
            )  # fmt: skip
            try:
                after, _ = carry_out(func, changed, known)
            except (RuntimeError, IndexError):  # values out of a table's range, for example
                continue
            for one, other in zip(before, after, strict=False):
                if isinstance(one.place, str) or isinstance(other.place, str):
                    assert one.place == other.place, (func, given)
                    assert one.place or equal(one.value, other.value), f"{func}: rows in a plain tensor; {given}"
                    continue
                owners, others = one.owners(), other.owners()
                if owners.shape != others.shape or not torch.equal(owners, others):
                    check_origin(one, changing)
                    continue
                for i in range(-1, N):
                    same = equal(one.at(owners, i), other.at(owners, i))
                    assert i == row or same, f"{func} claims {one.place} of {given}"
    return [result.place for result in before]


def check_origin(result: Result, given: list[Given]) -> None:
    """Every number that belongs to a row is one that the row had."""
    if not result.value.is_floating_point():
        return
    owners = result.owners()
    for i in range(N):
        sources = [Result(x.value, x.place) for x in given if x.place is not None]
        had = torch.cat([source.at(source.owners(), i) for source in sources])
        assert torch.isin(result.at(owners, i), torch.cat([had, torch.zeros(1)])).all()


# --- every function that is known, with all arguments that it takes ---------------------------------------------

# Shapes in which sizes coincide with the number of rows wherever they can.
LAYOUTS = [
    ((3, 3), Place(0, 1)), ((3, 3), Place(1, 1)), ((6, 3), Place(0, 2)), ((3, 6), Place(1, 2)), ((3,), Place(0, 1)),
    ((3, 3, 3), Place(0, 1)), ((3, 3, 3), Place(1, 1)), ((3, 3, 3), Place(2, 1)), ((3, 6, 3), Place(1, 2)),
    ((1, 3, 1), Place(1, 1)), ((3, 4, 3, 3), Place(0, 1)), ((3, 3, 3, 3), Place(1, 1)), ((9, 3, 3, 3), Place(0, 3)),
    ((3, 4, 3, 3, 3), Place(0, 1)),
]  # fmt: skip


def values(shape: tuple[int, ...], *, whole: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    if whole:
        return torch.randint(N, shape, generator=generator)
    return 0.1 + torch.rand(shape, generator=generator)


def arguments(shape: tuple[int, ...], place: Place, whole: bool) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Arguments for a function of unknown kind: most do not fit, and the function says so."""
    x = Given(values(shape, whole=whole), place)
    same, plain, square = Given(values(shape) + 1, place), Given(values(shape) + 2), Given(values((3, 3)))
    yield (x,), {}
    for dims in (0, 1, 2, -1, -2, (0,), (1,), (1, 2), (0, -1), [0, 1], (), None):
        yield (x, dims), {}
        yield (x,), {"dim": dims}
        yield (x, dims, True), {}
        yield (x, 2, dims), {}
        yield (x, 2), {"dim": dims, "keepdim": True}
    yield (x,), {"axis": 0}
    yield (x,), {"axis": 1}
    for pair in ((0, 1), (1, 0), (-1, 0), (2, 1), (1, -1), (3, 3), (-1, 3), (9, -1), (3, -1), (0, 3), (1, 3), (2, 2)):
        yield (x, *pair), {}
        yield (x, pair), {}
        yield (x,), dict(zip(("dim0", "dim1"), pair, strict=True))
        yield (x,), dict(zip(("start_dim", "end_dim"), pair, strict=True))
    for three in ((1, 0, 2), (0, 2, 1), (2, 1, 0), (3, 3, 3), (-1, 3, 3), (3, -1, 3), (0, 0, 3), (1, 0, 3), (3, 1, -1)):
        yield (x, *three), {}
        yield (x, three), {}
    for split in ([1, 2], [3], [2, 4]):
        for dim in (0, 1, -1):
            yield (x, split, dim), {}
    others = (same, plain, square, Given(values((3,)) + 3, Place(0, 1)), Given(values((3,)) + 3), 0.5,
              Given(values((3, 3)), Place(0, 1)), Given(values((3, 3)), Place(1, 1)))  # fmt: skip
    for other in others:
        yield (x, other), {}
        yield (other, x), {}
        yield (x,), {"other": other}
        yield (other,), {"other": x}
        yield (x, other, same), {}
        yield (plain, x, other), {}
        yield (x, other, plain), {}
        yield ([x, other],), {}
        yield ([other, x, other], 1), {}
        yield ([x, x, other],), {"dim": -1}
        yield ([x, x, x],), {"axis": 1}
        yield (x, other), {"out": Given(values(shape), place)}
        yield (x, other), {"out": Given(values(shape))}
    yield (x,), {"out": Given(values(shape), place)}
    yield (x,), {"out": Given(values((3, 3)), Place(0, 1))}
    for dim in (0, 1, -1):
        for index in (Given(values(shape, whole=True)), Given(values(shape, whole=True), place),
                      Given(values((3,), whole=True)), Given(values((3,), whole=True), Place(0, 1))):  # fmt: skip
            yield (x, dim, index), {}
            yield (x, index), {}
            yield (square, index), {}
            yield (x, dim), {"index": index}
            yield (x, index, dim), {}
    channels = (1, 4, 1, 1, 1)[: len(shape)]
    for weight in (
        Given(values((2, *channels[1:]))),
        Given(values((4, 2, *channels[2:]))),
        Given(values((3,)), Place(0, 1)),
    ):
        yield (x, weight), {}
        yield (x, weight), {"stride": 1}
    yield (x, [3]), {}
    yield (x, [3, 3]), {}
    yield (x, (1, 1)), {}
    yield (x, (1, 1, 0, 1)), {}
    yield (x, Given(torch.zeros(4)), Given(torch.ones(4))), {}
    yield (x, Given(torch.zeros(4)), Given(torch.ones(4))), {"training": True}
    yield (x, Given(torch.zeros(4)), Given(torch.ones(4)), None, None, True), {}
    for part in (0, -1, slice(None), slice(1, None), slice(0, 3), (slice(None), 0), (0, slice(None)), (..., 0),
                  (None, slice(None)), (..., None), True, [0, 1, 2], (0, 1), [0, 1], ([0, 1, 2],),
                  (slice(None), [2, 1, 0]), (slice(None), None, 0)):  # fmt: skip
        yield (x, part), {}


def name_of(func: Any) -> str:
    owner = getattr(func, "__objclass__", None) or getattr(func, "__module__", None) or ""
    prop = getattr(getattr(func, "__self__", None), "__name__", "")
    return f"{getattr(owner, '__name__', owner)}.{prop}{func.__name__}"


ATTENDING = (products.attention, products.einsum, propagations[torch.matmul], propagations[torch.addmm])
NEUTRAL = (question, constant, number, exported)
KNOWN = sorted((f for f, rule in propagations.items() if rule not in NEUTRAL), key=name_of)
CALLS = [list(arguments(shape, place, whole)) for shape, place in LAYOUTS for whole in (False, True)]
PARTS = 3


@pytest.mark.parametrize("part", range(PARTS))
def test_no_known_function_claims_what_is_not_so(part: int) -> None:
    claims = 0
    for func in KNOWN[part::PARTS]:
        draw = random.Random(name_of(func))
        known: dict[Any, Any] = {}  # shared by all calls: what was found for one must not be taken for another
        # Arguments that do not fit in one layout are not tried in the next; few are tried of elementwise functions.
        fits = draw.sample(range(len(CALLS[0])), 8 if propagations[func] is aligned else 60)
        for calls in draw.sample(CALLS, len(CALLS)):
            fitting = []
            for k in fits:
                args, kwargs = calls[k]
                try:
                    found = check(func, *args, known=known, **kwargs)
                except AssertionError:
                    raise
                except TypeError:
                    continue
                except Exception:  # noqa: BLE001 -- shapes, dtypes
                    fitting.append(k)
                    continue
                fitting.append(k)
                claims += sum(isinstance(each, (Place, Owners)) for each in found)
            fits = draw.sample(fitting, min(len(fitting), 1 if propagations[func] is aligned else 4))
    assert claims > 100


# --- by hand: what the table above does not reach ----------------------------------------------------------------

X = Given(values((3, 4, 3)), Place(0, 1))
SQUARE = Given(values((3, 3)), Place(0, 1))


@pytest.mark.parametrize(
    "func",
    [
        lambda x: x[:, 0].__rmatmul__(torch.ones(3, 3)),
        lambda x: x.new_tensor(x.flip(0)) + x,
        lambda x: torch.full_like(x, x.max()) + x,
        lambda x: x + torch.tensor(x.tolist()).flip(0),
        lambda x: x + torch.from_numpy(x.numpy()).flip(0),
        lambda x: x[0, 0] + x[[0, 1]],  # after the same with a tuple
        lambda x: torch.meshgrid(x[:, 0, 0], x[:, 1, 0], indexing="ij")[0],
        lambda x: x.unsqueeze(0).squeeze_(0).flip(0),
        lambda x: torch.ops.aten.flip(x, [0]),
        lambda x: torch.max(x, 0, out=(torch.empty(4, 3), torch.empty(4, 3, dtype=torch.long)))[0] + x,
        lambda x: torch.cumsum(x, torch.tensor(0)),  # type: ignore[arg-type]
    ],
)
def test_rows_that_are_mixed_are_lost(func: Function) -> None:
    places = check(func, X)
    assert places[0] != Place(0, 1)


def copies_to_plain(x: Tensor) -> Tensor:
    plain = torch.zeros(3, 4, 3)
    torch.ops.aten.copy_(plain, x.flip(0))
    return plain + x


def sums_to_plain(x: Tensor) -> Tensor:
    plain = torch.zeros(4, 3)
    torch.sum(x, 0, out=plain)
    return plain + x


def keeps_statistics(x: Tensor) -> Tensor:
    mean, var = torch.zeros(4), torch.ones(4)
    torch.nn.functional.batch_norm(x, mean, var, training=True)
    return torch.nn.functional.batch_norm(x, mean, var)


def by_a_cast(x: Tensor) -> Tensor:
    plain = torch.zeros(3, 4, 3)
    plain.to(x).add_(x)
    return plain.flip(0) + x


def by_an_index(x: Tensor) -> Tensor:
    x[0] = x[1]
    return x


def by_a_view(x: Tensor) -> Tensor:
    x.view(12, 3)[:4].add_(x[1])
    return x


def by_scatter(x: Tensor) -> Tensor:
    x.index_add_(0, torch.tensor([0]), x[1:2].clone())
    return x.scatter_(0, torch.tensor([[[2, 2, 2]]]), 1.0)


def by_squeezing(x: Tensor) -> Tensor:
    y = x[:, :3, 0].unsqueeze(0).clone()
    y.squeeze_(0)
    return y


def by_foreach(x: Tensor) -> Tensor:
    plain = torch.zeros(3, 4, 3)
    torch._foreach_add_([plain], [x.flip(0)])
    return plain + x


WRITES = [copies_to_plain, sums_to_plain, keeps_statistics, by_a_cast, by_an_index, by_a_view, by_scatter, by_squeezing,
          by_foreach]  # fmt: skip


@pytest.mark.parametrize("func", WRITES)
def test_memory_that_was_written_to_is_lost(func: Function) -> None:
    places = check(func, X)
    assert isinstance(places[0], str)
    assert places[0]


def test_writes_that_keep_rows_apart_are_followed() -> None:
    def func(x: Tensor) -> Tensor:
        x.mul_(2).transpose(0, 1).add_(x.transpose(0, 1))
        x += 1
        return torch.nn.functional.relu(x, inplace=True)

    assert check(func, X)[0] == Place(0, 1)


def test_ways_to_call_an_operation_give_the_same_place() -> None:
    ways: list[tuple[Function, Place]] = [
        (lambda x: x.permute(1, 0, 2), Place(1, 1)),
        (lambda x: x.permute((1, 0, 2)), Place(1, 1)),
        (lambda x: torch.permute(x, dims=(1, 0, 2)), Place(1, 1)),
        (lambda x: torch.transpose(input=x, dim0=0, dim1=1), Place(1, 1)),
        (lambda x: x.sum((1, 2)), Place(0, 1)),
        (lambda x: x.sum(-1, keepdim=True), Place(0, 1)),
        (lambda x: x.mean(axis=1), Place(0, 1)),
        (lambda x: torch.max(x, x), Place(0, 1)),
        (lambda x: x.max(1).values, Place(0, 1)),
        (lambda x: torch.max(x, dim=1)[1], Place(0, 1)),
        (lambda x: x.reshape(-1, 3), Place(0, 4)),
        (lambda x: x.view(3, 2, -1), Place(0, 1)),
        (lambda x: x.flatten(1), Place(0, 1)),
        (lambda x: x[None, :, ..., 0], Place(1, 1)),
        (lambda x: torch.cat([x, x], -1), Place(0, 1)),
        (lambda x: torch.stack([x, x], 0), Place(1, 1)),
        (lambda x: torch.stack([x[:, 0]] * 3, axis=1), Place(0, 1)),  # type: ignore[call-arg]
        (lambda x: torch.einsum("bth,h->bt", x, torch.ones(3)), Place(0, 1)),
        (lambda x: x @ torch.ones(3, 5), Place(0, 1)),
        (lambda x: torch.ones(2, 4) @ x, Place(0, 1)),
        (lambda x: x.repeat_interleave(2, 0), Place(0, 2)),
    ]
    for func, place in ways:
        assert check(func, X)[0] == place


def test_a_result_with_lost_rows_does_not_leave_the_model() -> None:
    with pytest.raises(UnsupportedError, match="cumsum"):
        with_rows(lambda x: x.cumsum(0), (X.value,), {}, Batch(N), {})
    assert with_rows(torch.mean, (X.value,), {}, Batch(N), {}).dim() == 0  # what is reduced is the model's own affair


def test_a_row_that_holds_another_row_does_not_leave_the_model() -> None:
    def first_frames(x: Tensor) -> Tensor:
        return x.repeat_interleave(2, 0)[: len(x)]

    with pytest.raises(UnsupportedError, match="row 1 holds values of row 0"):
        with_rows(first_frames, (X.value,), {}, Batch(N), {})
    with pytest.raises(UnsupportedError, match="row 0 holds values of row 2"):
        with_rows(lambda x: x.flip(0), (X.value,), {}, Batch(N), {})
    kept = with_rows(lambda x: x.flip(0).flip(0), (X.value,), {}, Batch(N), {})
    assert torch.equal(kept, X.value)


def test_names_made_of_numbers() -> None:
    names = with_rows(lambda x: [f"expert_{i}" for i in x.flatten()[:2].long()], (X.value,), {}, Batch(N), {})
    assert names == [f"expert_{int(i)}" for i in X.value.flatten()[:2].long()]


def test_writes_to_fresh_memory_in_another_order_of_dimensions() -> None:
    def scan(x: Tensor) -> Tensor:
        turned = x.transpose(0, 1)
        fresh = torch.zeros_like(turned)  # in the order of its argument in memory
        assert not fresh.is_contiguous()
        for i in range(len(turned)):
            fresh[i] = 2 * turned[i]
        return fresh.transpose(0, 1)

    assert torch.equal(with_rows(scan, (X.value,), {}, Batch(N), {}), 2 * X.value)
    assert torch.equal(with_rows(scan, (torch.ones(N, 2, 3, 4),), {}, Batch(N), {}), torch.full((N, 2, 3, 4), 2.0))
