"""Old forms of calls: they warn, name the new form, and give the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optree
import pytest
import torch
from torch import Tensor

import funclora as fl
from funclora import algebra, analysis

# The old forms are no longer in the signatures.
SPECTRA: Any = analysis.spectra
MOVED: Any = analysis.magnitude_direction
COMPARE: Any = analysis.compare
ADD: Any = algebra.add


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


BASE = {"w": random(4, 3)}
ONE = {"w": fl.LoRA(random(2, 3), random(4, 2), scaling=0.5)}
TWO = {"w": fl.DoRA(random(1, 3), random(4, 1), random(4).abs())}
OTHER = {"w": fl.LoRA(random(1, 3), random(4, 1))}
TUNED = {"w": random(3, 4).T}
STACK = fl.stack([ONE, {"w": fl.LoRA(random(1, 3), random(4, 1))}])
MODEL = torch.nn.Linear(3, 4)
PARAMS = fl.base_params(MODEL)


def outputs(adapters: Any, *xs: Tensor) -> Tensor:
    adapters = {"weight": adapters["w"]}
    return sum((fl.apply(MODEL, PARAMS, adapters, x) for x in xs), torch.zeros(4))


def mapped(*xs: Tensor, **options: Any) -> Callable[[], Tensor]:
    return lambda: fl.vmap(outputs, **options)(STACK, *xs)


SHARED, EACH, LAST = random(5, 3), random(2, 5, 3), random(5, 2, 3)
FORMS: list[tuple[Callable[[], Any], Callable[[], Any], str]] = [
    (lambda: SPECTRA(ONE, BASE), lambda: SPECTRA(ONE, params=BASE), r"spectra\(tuned, params=params\)"),
    (lambda: SPECTRA(TUNED, BASE), lambda: SPECTRA(TUNED, params=BASE), r"spectra\(tuned, params=params\)"),
    (lambda: MOVED(BASE, TUNED), lambda: MOVED(TUNED, params=BASE), r"magnitude_direction\(tuned, params=params\)"),
    (lambda: MOVED(BASE, tuned=TWO), lambda: MOVED(TWO, params=BASE), r"magnitude_direction\(tuned, params=params\)"),
    (lambda: MOVED(BASE, TWO, per="input"), lambda: MOVED(TWO, params=BASE, per="input"), r"\(tuned, params=params\)"),
    (
        lambda: COMPARE(ONE, TWO, BASE),
        lambda: COMPARE(ONE, TWO, params=BASE),
        r"\(first, second, params=params\)",
    ),
    (lambda: ADD(ONE, OTHER), lambda: ADD([ONE, OTHER]), r"add\(\[one, other\]\)"),
    (lambda: ADD(ONE), lambda: ADD([ONE]), r"add\(\[one, other\]\)"),
    (lambda: ADD(ONE, OTHER, OTHER, params=BASE), lambda: ADD([ONE, OTHER, OTHER], params=BASE), r"add\(\["),
    (mapped(SHARED), mapped(SHARED, in_dims=(0, None)), r"in_dims=\(0, None\)"),
    (mapped(SHARED, SHARED), mapped(SHARED, SHARED, in_dims=(0, None, None)), r"in_dims=\(0, None, None\)"),
    (mapped(EACH, SHARED, in_dims=(0, None)), mapped(EACH, SHARED, in_dims=(0, 0, None)), r"in_dims=\(0, 0, None\)"),
    (mapped(LAST, in_dims=1), mapped(LAST, in_dims=(0, 1)), r"in_dims=\(0, 1\)"),
    (mapped(LAST, in_dims=[1]), mapped(LAST, in_dims=(0, 1)), r"in_dims=\(0, 1\)"),
]


@pytest.mark.parametrize(("old", "new", "form"), FORMS, ids=[form for *_, form in FORMS])
def test_old_forms_work_with_a_warning(old: Callable[[], Any], new: Callable[[], Any], form: str) -> None:
    with pytest.warns(DeprecationWarning, match=rf"is deprecated .* 0\.2 on\. Write .*{form}") as caught:
        found = old()
    assert [warning.filename for warning in caught] == [__file__]  # it points at the caller
    wanted = new()
    if isinstance(wanted, analysis.Spectra | analysis.Movements | analysis.Comparison):
        assert found == wanted
        return
    assert optree.tree_structure(found) == optree.tree_structure(wanted)
    for one, other in zip(optree.tree_leaves(found), optree.tree_leaves(wanted), strict=True):
        assert torch.equal(one, other)


def test_the_two_orders_of_tuned_weights_are_not_mixed_up() -> None:
    """Two state dicts could be swapped without a word: only a keyword says which is the base."""
    with pytest.warns(DeprecationWarning, match="magnitude_direction"):
        old = MOVED(BASE, TUNED)
    assert old == MOVED(TUNED, params=BASE) != MOVED(BASE, params=TUNED)


def test_a_call_that_neither_version_has_is_an_error() -> None:
    with pytest.raises(TypeError, match="positional argument"):
        SPECTRA(ONE, BASE, MODEL)
    with pytest.raises(TypeError, match="argument"):
        MOVED(BASE, TUNED, params=BASE)
