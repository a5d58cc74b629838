"""`funclora.analysis` against dense formulas in numpy, for every layer and rule of the table."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import CASES, Case, gen, make_adapters, make_rule
from hypothesis import given
from hypothesis import strategies as st
from oracle import oracle
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import funclora as fl
from funclora import analysis
from funclora.analysis import _changes, _spectrum
from funclora.errors import ArgumentError, ConfigError, NonFiniteError, ParamsError, UnsupportedError
from funclora.rules.layouts import Conv, ConvTranspose, Layout, Linear, Matrices, Parameter

KINDS = ("lora", "dora", "full")
# A case of every layout.
NAMES = (
    "linear", "embedding", "conv1d", "conv2d-groups", "conv3d", "conv-t2d-groups", "gpt2-conv1d", "matmul",
    "experts-bmm", "experts-bmm-t", "mha-separate", "lstm",
)  # fmt: skip
ALL = pytest.mark.parametrize("case", [case for case in CASES if case.name in NAMES], ids=str)
Array = Any


def matrices(layout: Layout, weight: Tensor) -> Array:
    """The weight as `[n, out, in]`, by numpy alone."""
    w = weight.detach().double().numpy()
    if isinstance(layout, Conv):
        return w.reshape(1, len(w), -1)
    if isinstance(layout, ConvTranspose):
        parts = np.split(w, layout.groups)
        return np.concatenate([np.moveaxis(p, 0, 1).reshape(p.shape[1], -1) for p in parts])[None]
    assert isinstance(layout, Matrices)
    w = np.swapaxes(w, -1, -2) if layout.transposed else w
    return w.reshape(-1, *w.shape[-2:])


def setup(case: Case, kind: str, seed: int = 0) -> tuple[nn.Module, dict[str, Tensor], dict[str, Any]]:
    s = case.setup(seed=0)
    adapters = make_adapters(case, s.params, kind, gen(seed))
    if any(isinstance(layout, Parameter) and layout.transposed for layout in case.targets.values()):
        s.model.is_transposed = True  # type: ignore[assignment]  # as the owners of expert weights in transformers say it
    return s.model, s.params, {name: rule for name, rule in adapters.items() if name in case.targets}


def tuned(params: dict[str, Tensor], adapters: dict[str, Any], name: str) -> Tensor:
    wide = pytree.tree_map(lambda leaf: leaf.double(), adapters[name])
    return oracle(params[name].double(), wide)


def change(case: Case, params: dict[str, Tensor], adapters: dict[str, Any], name: str) -> Array:
    """ΔW, `[n, out, in]`."""
    layout = case.targets[name]
    return matrices(layout, tuned(params, adapters, name)) - matrices(layout, params[name])


def close(got: Any, want: Any, tolerance: float = 1e-9) -> None:
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * max(1e-30, float(np.abs(want).max())))


# --- spectra -----------------------------------------------------------------------------------------------------


@ALL
@pytest.mark.parametrize("kind", KINDS)
def test_spectra_are_those_of_the_dense_change(case: Case, kind: str) -> None:
    model, params, adapters = setup(case, kind)
    found = analysis.spectra(adapters, params=params, model=model)
    assert [row.name for row in found.rows] == list(adapters)
    for row in found.rows:
        delta, weight = change(case, params, adapters, row.name), params[row.name].double().numpy()
        assert row.singular_values is not None
        assert row.effective_rank is not None
        assert row.stable_rank is not None
        assert row.shape[-2:] == delta.shape[1:]
        close(row.norm, np.linalg.norm(delta), 1e-7)
        close(row.base_norm, np.linalg.norm(weight))
        close(row.share, np.linalg.norm(delta) / np.linalg.norm(weight), 1e-7)
        assert len(row.singular_values) == len(delta) == math.prod(row.shape[:-2])
        for m, one in enumerate(delta):
            s = np.linalg.svd(one, compute_uv=False)
            got = np.zeros_like(s)
            got[: len(row.singular_values[m])] = row.singular_values[m][: len(s)]
            close(got, s, 1e-7)
            p = s[s > 1e-12 * s[0]] / s.sum()
            close(row.effective_rank[m], np.exp(-(p * np.log(p)).sum()), 1e-6)
            close(row.stable_rank[m], (s**2).sum() / s[0] ** 2, 1e-7)
        assert row.of == "ΔW"
        assert row.r == (None if kind == "full" else 2)


def test_lora_and_delta_need_no_base() -> None:
    rule = make_rule("lora", Linear(), torch.randn(6, 5), gen(0))
    (row,) = analysis.spectra({"w": rule}).rows
    close(row.norm, float((rule.scaling * rule.b @ rule.a).norm()), 1e-6)
    assert (row.base_norm, row.share, row.shape, row.r, row.scaling) == (None, None, (6, 5), 2, rule.scaling)
    (row,) = analysis.spectra({"w": fl.Delta(torch.ones(2, 2), scaling=0.5)}).rows
    assert row.norm == 1.0
    (row,) = analysis.spectra({"w": fl.Delta(torch.tensor([3.0, 4.0]))}).rows
    assert (row.norm, row.singular_values, row.effective_rank) == (5.0, None, None)


def test_dora_without_a_base_is_said_to_be_a_part() -> None:
    rule = make_rule("dora", Linear(), torch.randn(6, 5), gen(0))
    (row,) = analysis.spectra({"w": rule}).rows
    (part,) = analysis.spectra({"w": fl.LoRA(rule.a, rule.b, scaling=rule.scaling)}).rows
    assert (row.of, row.rule, part.of, part.rule) == ("s·B·A", "DoRA", "ΔW", "LoRA")
    assert (row.norm, row.singular_values) == (part.norm, part.singular_values)


def test_other_rules() -> None:
    params = {"emb": torch.randn(7, 4), "head": torch.randn(7, 4), "bias": torch.zeros(3)}
    new = torch.randn(2, 4)
    adapters = {
        "emb": fl.TrainableTokens(new, token_indices=(5, 1)),
        "head": fl.Tied("emb"),
        "bias": fl.Full(torch.tensor([3.0, 0.0, 4.0])),
    }
    rows = {row.name: row for row in analysis.spectra(adapters, params=params).rows}
    for name in ("emb", "head"):
        delta = params[name].clone()
        delta[[5, 1]] = new
        close(rows[name].norm, float((delta - params[name]).double().norm()), 1e-6)
        assert rows[name].shape == (4, 7)
        assert len(rows[name].singular_values[0]) == 4  # type: ignore[index]
        assert rows[name].singular_values[0][2] < 1e-9  # type: ignore[index]
    assert (rows["bias"].norm, rows["bias"].share, rows["bias"].singular_values) == (5.0, None, None)


@ALL
def test_blocks_and_large_weights_give_the_same(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in KINDS:
        model, params, adapters = setup(case, kind)
        others = {name: make_rule("dora", layout, params[name], gen(5)) for name, layout in case.targets.items()}

        def results(model: Any = model, params: Any = params, one: Any = adapters, two: Any = others) -> list[Any]:
            return [
                analysis.spectra(one, params=params, model=model),
                analysis.magnitude_direction(one, params=params, per="output", model=model),
                analysis.magnitude_direction(one, params=params, per="input", model=model),
                analysis.compare(one, two, params=params, model=model),
            ]

        whole = results()
        with monkeypatch.context() as patch:
            patch.setattr(_changes, "NORM_BLOCK", 7)
            patch.setattr(_spectrum, "NORM_BLOCK", 7)
            patch.setattr(_changes, "_DOUBLE", 0)
            cut = results()
        for one, other in zip(whole, cut, strict=True):
            for x, y in zip(numbers(one.to_dict()), numbers(other.to_dict()), strict=True):
                assert x == pytest.approx(y, rel=2e-6, abs=1e-6)


def numbers(tree: Any) -> list[float]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, float)]


def test_a_quantised_base() -> None:
    params = fl.quantize({"w": torch.randn(64, 128)}, ["w"], "nf4")
    dense = fl.dequantize(params)
    for kind in ("lora", "dora"):
        adapters = {"w": make_rule(kind, Linear(), dense["w"], gen(1))}
        assert analysis.spectra(adapters, params=params) == analysis.spectra(adapters, params=dense)
        assert analysis.magnitude_direction(adapters, params=params) == analysis.magnitude_direction(
            adapters, params=dense
        )


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=8), st.floats(1e-3, 1e3))
def test_laws_of_ranks(values: list[float], factor: float) -> None:
    s = torch.tensor(values, dtype=torch.float64)
    s[0] = 1.0
    effective, stable = float(analysis.effective_rank(s)), float(analysis.stable_rank(s))
    assert 1 - 1e-9 <= stable <= len(values) + 1e-9
    assert 1 - 1e-9 <= effective <= len(values) + 1e-9
    assert float(analysis.effective_rank(factor * s)) == pytest.approx(effective)
    assert float(analysis.stable_rank(factor * s)) == pytest.approx(stable)
    assert float(analysis.effective_rank(torch.cat([s, torch.zeros(3)]))) == pytest.approx(effective)


# --- magnitude and direction -------------------------------------------------------------------------------------


def moved_by_hand(old: Array, new: Array, per: str) -> tuple[float, float, float, int]:
    """Equations 3 and 4 of arXiv 2402.09353, unit by unit."""
    changed, turned, sizes = [], [], []
    for w, v in zip(old, new, strict=True):
        units = zip(w, v, strict=True) if per == "output" else zip(w.T, v.T, strict=True)
        for a, b in units:
            sizes.append(np.linalg.norm(a))
            changed.append(abs(np.linalg.norm(b) - sizes[-1]))
            turned.append(1 - a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
    return float(np.mean(changed)), float(np.mean(turned)), float(np.mean(sizes)), len(sizes)


@ALL
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("per", ["output", "input"])
def test_magnitude_and_direction(case: Case, kind: str, per: Any) -> None:
    model, params, adapters = setup(case, kind)
    for name in adapters:  # padding rows are zero, and have no direction
        params[name] = params[name] + 0.1 * torch.randn(params[name].shape, generator=gen(3))
    found = analysis.magnitude_direction(adapters, params=params, per=per, label=kind, step=3, model=model)
    for row in found.rows:
        layout = case.targets[row.name]
        old, new = matrices(layout, params[row.name]), matrices(layout, tuned(params, adapters, row.name))
        got = (row.delta_m, row.delta_d, row.magnitude, row.units)
        for value, want in zip(got, moved_by_hand(old, new, per), strict=True):
            assert value == pytest.approx(want, rel=1e-9, abs=1e-12)
        assert (row.label, row.step) == (kind, 3)


@ALL
def test_two_state_dicts(case: Case) -> None:
    model, params, adapters = setup(case, "lora")
    state = {name: tuned(params, adapters, name) for name in adapters}
    by_rule = analysis.magnitude_direction(adapters, params=params)
    by_state = analysis.magnitude_direction(state, params=params, model=model)
    for one, other in zip(by_rule.rows, by_state.rows, strict=True):
        assert numbers(one.to_dict()) == pytest.approx(numbers(other.to_dict()), rel=1e-6)
    both = zip(
        analysis.spectra(adapters, params=params).rows,
        analysis.spectra(state, params=params, model=model).rows,
        strict=True,
    )
    for a, b in both:
        assert a.shape == b.shape
        assert (a.norm, a.share) == pytest.approx((b.norm, b.share))
        assert a.effective_rank == pytest.approx(b.effective_rank)


def test_a_base_that_did_not_move_and_units_without_direction() -> None:
    base = {"w": torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 0.0], [5.0, 0.0]])}
    tuned = {"w": torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 2.0], [0.0, 0.0]])}
    (row,) = analysis.magnitude_direction(tuned, params=base).rows
    assert (row.delta_m, row.delta_d) == ((2 + 5) / 4, (1 + 1) / 4)
    (row,) = analysis.magnitude_direction(base, params=base).rows
    assert (row.delta_m, row.delta_d) == (0, 0)


def test_close_directions_keep_their_digits() -> None:
    angle = 1e-9
    base = {"w": torch.tensor([[1.0, 0.0]], dtype=torch.float64)}
    turned = {"w": torch.tensor([[math.cos(angle), math.sin(angle)]], dtype=torch.float64)}
    (row,) = analysis.magnitude_direction(turned, params=base).rows
    assert row.delta_d == pytest.approx(angle**2 / 2, rel=1e-6)


def test_a_model_says_which_dimensions_are_the_matrix() -> None:
    model = nn.Embedding(5, 3)
    params = fl.base_params(model)
    tuned = {"weight": params["weight"] + torch.randn(5, 3)}
    assert analysis.magnitude_direction(tuned, params=params, model=model).rows[0].units == 3
    assert analysis.magnitude_direction(tuned, params=params).rows[0].units == 5


def test_trend() -> None:
    def rows(points: list[tuple[float, float]], magnitude: float = 2.0) -> analysis.Movements:
        return analysis.Movements(
            tuple(analysis.Movement("w", "", i, y, x, magnitude, 1) for i, (x, y) in enumerate(points)), "output"
        )

    x, y = torch.randn(2, 9, dtype=torch.float64, generator=gen(0)).numpy()
    trend = rows([*zip(x, y, strict=True)]).trend()
    slope, intercept = np.polyfit(x, y, 1)
    assert trend.n == 9
    assert (trend.slope, trend.intercept) == pytest.approx((slope, intercept))
    assert trend.correlation == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert rows([*zip(x, y, strict=True)]).trend(relative=True).slope == pytest.approx(slope / 2)
    assert rows([(0, 0), (1, 1)]).trend() == analysis.Trend(2, None, None, None)
    assert rows([(0, 0), (0, 1), (0, 2)]).trend() == analysis.Trend(3, None, None, None)


def test_movements_are_joined() -> None:
    base, tuned = {"w": torch.randn(2, 2)}, {"w": torch.randn(2, 2)}
    one = analysis.magnitude_direction(tuned, params=base, label="a")
    both = one + analysis.magnitude_direction(tuned, params=base, label="b")
    assert both.labels == ("a", "b")
    assert both.of("a") == one
    with pytest.raises(ConfigError, match="per: one of the movements is per output"):
        one + analysis.magnitude_direction(tuned, params=base, per="input")


# --- subspaces ---------------------------------------------------------------------------------------------------


def phi_by_hand(u: Array, v: Array) -> Array:
    """Equation 4 of arXiv 2106.09685."""
    return np.array([
        [np.linalg.norm(u[:, :i].T @ v[:, :j]) ** 2 / min(i, j) for j in range(1, v.shape[1] + 1)]
        for i in range(1, u.shape[1] + 1)
    ])  # fmt: skip


def span(m: Array, side: str) -> Array:
    u, s, vh = np.linalg.svd(m, full_matrices=False)
    n = int((s > 1e-6 * s[0]).sum())
    return u[:, :n] if side == "left" else vh[:n].T


@ALL
@pytest.mark.parametrize("of", ["A", "B", "right", "left"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_subspace_similarity(case: Case, of: Any, kind: str) -> None:
    model, params, one = setup(case, kind)
    two = {name: make_rule(kind, layout, params[name], gen(9), r=3) for name, layout in case.targets.items()}
    found = analysis.subspace_similarity(one, two, of=of, params=params, model=model)
    for row in found.rows:
        layout = case.targets[row.name]
        sides = []
        for adapters in (one, two):
            rule = adapters[row.name]
            if of in ("A", "B"):
                factor = rule.a if of == "A" else rule.b
                if not isinstance(layout, Matrices):
                    factor = factor.flatten(1)
                factors = factor.double().numpy().reshape(-1, *factor.shape[-2:])
                sides.append([span(m, "right" if of == "A" else "left") for m in factors])
            else:
                sides.append([span(m, of) for m in change(case, params, adapters, row.name)])
        for grid, u, v in zip(row.grids, *sides, strict=True):
            np.testing.assert_allclose(np.array(grid), phi_by_hand(u, v), atol=1e-6)


def test_subspaces_of_what_is_zero_or_padded() -> None:
    a, b = torch.randn(2, 5), torch.randn(4, 2)
    rule, zero = fl.LoRA(a, b), fl.LoRA(a, torch.zeros(4, 2))
    padded = fl.LoRA(torch.cat([a, torch.zeros(3, 5)]), torch.cat([b, torch.zeros(4, 3)], 1))
    found = analysis.subspace_similarity({"w": rule}, {"w": zero}, of="B").rows[0]
    assert (found.grids, found.whole) == (((),), (None,))
    found = analysis.subspace_similarity({"w": rule}, {"w": padded}).rows[0]
    assert np.array(found.grids[0]).shape == (2, 2)
    assert found.whole[0] == pytest.approx(1)
    assert found.chance == (2 / 5,)
    capped = analysis.subspace_similarity({"w": rule}, {"w": padded}, k=1).rows[0]
    assert np.array(capped.grids[0]).shape == (1, 1)


@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 4))
def test_laws_of_phi(seed: int, m: int, n: int) -> None:
    u, v = (torch.linalg.qr(torch.randn(6, k, dtype=torch.float64, generator=gen(seed + k)))[0] for k in (m, n))
    grid = analysis.phi(u, v)
    assert grid.shape == (m, n)
    assert (grid >= 0).all()
    assert (grid <= 1).all()
    torch.testing.assert_close(grid, analysis.phi(v, u).mT)
    torch.testing.assert_close(analysis.phi(u, u).diagonal(), torch.ones(m, dtype=torch.float64))


# --- two adapters ------------------------------------------------------------------------------------------------


@ALL
@pytest.mark.parametrize("kinds", [("lora", "lora"), ("lora", "dora"), ("dora", "full")], ids="-".join)
def test_compare(case: Case, kinds: tuple[str, str]) -> None:
    model, params, one = setup(case, kinds[0])
    two = {name: make_rule(kinds[1], layout, params[name], gen(9), r=3) for name, layout in case.targets.items()}
    found = analysis.compare(one, two, params=params, model=model)
    deltas = [[change(case, params, adapters, name).ravel() for name in one] for adapters in (one, two)]
    for row, x, y in zip(found.rows, *deltas, strict=True):
        close(row.norms, (np.linalg.norm(x), np.linalg.norm(y)), 1e-7)
        assert row.cosine == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y), abs=1e-7)
        close(row.distance, np.linalg.norm(x - y), 1e-7)
        close(row.relative_distance, np.linalg.norm(x - y) / np.linalg.norm(x), 1e-7)
    x, y = (np.concatenate(side) for side in deltas)
    close(found.norms, (np.linalg.norm(x), np.linalg.norm(y)), 1e-7)
    assert found.cosine == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y), abs=1e-7)
    close(found.relative_distance, np.linalg.norm(x - y) / np.linalg.norm(x), 1e-7)


def test_compare_with_missing_and_zero_updates() -> None:
    one = {"p": fl.LoRA(torch.tensor([[3.0]]), torch.tensor([[1.0]])), "q": fl.Delta(torch.ones(1))}
    two = {"q": fl.Delta(torch.zeros(1)), "r": fl.Delta(torch.tensor([4.0]))}
    found = analysis.compare(one, two)
    assert [(row.name, row.norms, row.cosine, row.distance) for row in found.rows] == [
        ("p", (3.0, None), None, None),
        ("q", (1.0, 0.0), None, 1.0),
        ("r", (None, 4.0), None, None),
    ]
    assert found.norms == pytest.approx((math.sqrt(10), 4))
    assert found.cosine == 0
    assert found.relative_distance == pytest.approx(math.sqrt(26 / 10))


@given(st.integers(0, 10**6), st.floats(-8, 8).filter(lambda x: abs(x) > 1e-2))
def test_multiples_have_the_same_direction(seed: int, factor: float) -> None:
    one = {"w": make_rule("lora", Linear(), torch.ones(4, 5), gen(seed))}
    row = analysis.compare(one, fl.algebra.scale(one, factor)).rows[0]
    assert row.cosine == pytest.approx(math.copysign(1, factor))
    assert row.relative_distance == pytest.approx(abs(1 - factor), abs=1e-9)


def test_nearly_equal_updates_keep_their_digits() -> None:
    rule = make_rule("lora", Linear(), torch.ones(40, 50), gen(0))
    other = replace(rule, b=rule.b.double() * (1 + 1e-9))
    row = analysis.compare({"w": replace(rule, b=rule.b.double())}, {"w": other}).rows[0]
    assert row.relative_distance == pytest.approx(1e-9, rel=1e-4)


# --- all of them -------------------------------------------------------------------------------------------------


def test_data_and_pictures(tmp_path: Path) -> None:
    params = {f"layers.{i}.weight": torch.randn(6, 5, generator=gen(i)) for i in range(3)}
    one, two = ({n: make_rule("dora", Linear(), w, gen(s)) for n, w in params.items()} for s in (1, 2))
    moved = analysis.magnitude_direction(one, params=params, label="DoRA", step=1)
    results: list[Any] = [
        analysis.spectra(one, params=params),
        analysis.spectra(one),
        moved + analysis.magnitude_direction(two, params=params, label="other"),
        analysis.subspace_similarity(one, two),
        analysis.compare(one, two, params=params),
    ]
    for i, result in enumerate(results):
        tree = json.loads(result.to_json())
        assert len(tree["rows"]) == len(result.rows)
        assert tree["rows"][0]["name"] == "layers.0.weight"
        result.plot(tmp_path / f"{i}.png")
        assert (tmp_path / f"{i}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert len([*tmp_path.iterdir()]) == len(results)


def test_inputs_stay_as_they_are() -> None:
    params = {"w": nn.Parameter(torch.randn(6, 5))}
    adapters = {"w": pytree.tree_map(nn.Parameter, make_rule("dora", Linear(), params["w"].detach(), gen(0)))}
    before = [t.detach().clone() for t in (params["w"], *pytree.tree_leaves(adapters))]
    analysis.spectra(adapters, params=params)
    analysis.magnitude_direction(adapters, params=params)
    analysis.compare(adapters, adapters, params=params)
    analysis.subspace_similarity(adapters, adapters, of="left", params=params)
    assert all(map(torch.equal, before, (params["w"], *pytree.tree_leaves(adapters))))
    assert params["w"].grad is None


LORA: Any = fl.LoRA(torch.ones(1, 3), torch.ones(2, 1))
BASE = {"w": torch.zeros(2, 3)}
WRONG: Any = {"stack": fl.stack([{"w": LORA}]), "adapter": {"w": 1}, "word": "row"}


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: analysis.spectra({}), ParamsError, "with nothing in it"),
        (lambda: analysis.spectra(WRONG["stack"]), ArgumentError, r"stack\[i\]"),
        (lambda: analysis.spectra(WRONG["adapter"]), ArgumentError, "expected a rule"),
        (lambda: analysis.spectra({"w": fl.Full(torch.ones(2, 3))}), ParamsError, "depends on the base weight"),
        (lambda: analysis.spectra({"v": LORA}, params=BASE), ParamsError, "params lack 'v'.* Near names: w"),
        (lambda: analysis.spectra({"w": LORA}, params={"w": torch.zeros(2, 4)}), ParamsError, "a has shape"),
        (
            lambda: analysis.spectra({"w": LORA}, params={"w": torch.zeros(2, 3, device="meta")}),
            ParamsError,
            "meta device",
        ),
        (lambda: analysis.spectra({"w": fl.Tied("v")}, params=BASE), ParamsError, "tied to 'v'"),
        (lambda: analysis.spectra({"w": replace(LORA, scaling=torch.ones(()))}), UnsupportedError, "inside vmap"),
        (lambda: analysis.spectra({"w": replace(LORA, a=torch.full((1, 3), torch.nan))}), NonFiniteError, "'w'"),
        (lambda: analysis.spectra({"w": LORA}, params={"w": torch.full((2, 3), torch.inf)}), NonFiniteError, "'w'"),
        (
            lambda: analysis.magnitude_direction({"w": LORA}, params=BASE, per=WRONG["word"]),
            ConfigError,
            "per: expected",
        ),
        (
            lambda: analysis.magnitude_direction({"b": torch.ones(2)}, params={"b": torch.ones(2)}),
            ParamsError,
            "is a matrix",
        ),
        (
            lambda: analysis.magnitude_direction({"e": torch.ones(2, 2, 2)}, params={"e": torch.ones(2, 2, 2)}),
            ParamsError,
            "experts or a convolution.*model=",
        ),
        (lambda: analysis.subspace_similarity({"w": LORA}, {"w": LORA}, of=WRONG["word"]), ConfigError, "of: expected"),
        (lambda: analysis.subspace_similarity({"w": LORA}, {"w": LORA}, k=0), ConfigError, "k: expected"),
        (lambda: analysis.subspace_similarity({"w": LORA}, {"v": LORA}), ParamsError, "no parameter is in both"),
        (
            lambda: analysis.subspace_similarity({"w": fl.Full(BASE["w"])}, {"w": LORA}, params=BASE),
            ParamsError,
            "has factors",
        ),
        (
            lambda: analysis.compare({"w": LORA}, {"w": replace(LORA, b=torch.ones(4, 1))}),
            ParamsError,
            r"\[2, 3\], the other one of \[4, 3\]",
        ),
        (lambda: analysis.compare({"w": LORA}, {}), ParamsError, "with nothing in it"),
    ],
)
def test_complaints(call: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()


def test_what_draws_nothing_says_so(tmp_path: Path) -> None:
    zero = {"w": replace(LORA, b=torch.zeros(2, 1))}
    with pytest.raises(ParamsError, match="nothing to draw"):
        analysis.subspace_similarity(zero, zero, of="B").plot(tmp_path / "x.png")
    assert not [*tmp_path.iterdir()]


def test_experts_have_ranks_of_their_own() -> None:
    rule = make_rule("lora", Parameter(), torch.randn(3, 4, 5), gen(0))
    (row,) = analysis.spectra({"w": rule}).rows
    assert row.shape == (3, 4, 5)
    assert len(row.effective_rank or ()) == 3


@pytest.mark.parametrize("of", ["A", "B", "right"])
def test_the_whole_is_that_of_all_directions(of: Any) -> None:
    """However few of them the grid shows: two adapters of rank 5 that share all but their leading direction."""
    basis = torch.linalg.qr(torch.randn(12, 12, generator=gen(0), dtype=torch.float64)).Q
    sizes = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0], dtype=torch.float64)

    def rule(columns: list[int]) -> fl.LoRA:
        u = basis[:, columns] * sizes.sqrt()
        return fl.LoRA(u.mT.contiguous(), u)

    one, two = rule([0, 1, 2, 3, 4]), rule([5, 1, 2, 3, 4])
    row = analysis.subspace_similarity({"w": one}, {"w": two}, of=of, k=2).rows[0]
    np.testing.assert_allclose(row.grids[0], [[0.0, 0.0], [0.0, 0.5]], atol=1e-9)
    assert row.whole[0] == pytest.approx(4 / 5)


def test_a_picture_says_what_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from funclora.analysis import _spectrum

    titles: list[list[str]] = []

    def titles_of(figure: Any, file: Any) -> None:
        titles.append([title for axis in figure.axes if (title := axis.get_title().partition(":")[0])])

    monkeypatch.setattr(_spectrum, "write_figure", titles_of)
    (row,) = analysis.spectra({"w": torch.eye(3)}, params={"w": torch.zeros(3, 3)}).rows
    weight = replace(row, of="W", base_norm=None)
    zero = replace(row, base_norm=0.0, share=None)
    moved = replace(row, base_norm=2.0, share=0.5)
    for rows in ([weight], [moved, zero], [replace(row, base_norm=None), replace(row, of="s·B·A", base_norm=None)]):
        analysis.Spectra(tuple(rows)).plot(tmp_path / "x.png")
    assert titles == [
        ["‖W‖", "singular values of the weights"],
        ["‖ΔW‖ / ‖W‖", "singular values of the updates"],
        ["‖ΔW, s·B·A‖", "singular values of the updates"],
    ]


def test_a_picture_of_many_weights_is_a_table_of_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    from funclora.analysis import _compare, _spectrum

    figures: list[Any] = []
    for module in (_spectrum, _compare):
        monkeypatch.setattr(module, "write_figure", lambda figure, file: figures.append(figure))
    modules = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    names = [f"model.layers.{i}.{module}.weight" for i in range(32) for module in modules] + ["lm_head.weight"]
    one = {n: make_rule("lora", Linear(), torch.ones(6, 5), gen(i)) for i, n in enumerate(names)}
    found = analysis.spectra(one)
    found.plot("x.png")
    other = {name: rule for name, rule in one.items() if ".3." not in name}
    analysis.compare(one, other).plot("x.png")
    table, curves = figures[0].axes[:2]
    sizes = table.images[0].get_array()
    assert sizes.shape == (33, 8)
    assert sizes[5, 2] == pytest.approx(found.rows[5 * 7 + 2].norm)
    assert sizes.mask[5].tolist() == [False] * 7 + [True]
    assert sizes.mask[32].tolist() == [True] * 7 + [False]
    assert [label.get_text() for label in table.get_xticklabels()] == [*modules, "lm_head"]
    assert [label.get_text() for label in table.get_yticklabels()] == [*map(str, range(32)), ""]
    assert [text.get_text() for text in curves.get_legend().get_texts()] == [*modules, "lm_head"]
    ticks = curves.xaxis.get_major_locator()()
    assert all(tick == int(tick) for tick in ticks)
    cosines = figures[1].axes[2].images[0].get_array()
    assert cosines.mask[3, :7].all()
    assert cosines[4, 0] == pytest.approx(1)
