"""Methods written outside of the package, from public names: all that holds for LoRA holds for them."""

from __future__ import annotations

import copy
import importlib.util
import pickle
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import optree as _optree
import pytest
import torch
import torch.utils._pytree as torch_pytree
from cases import CASES, Case, Setup, dense_call, gen, make_adapters, plain_attention
from oracle import close, delta, factor_shapes, snapshot, tensors
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor

import funclora as fl
from funclora import algebra
from funclora.errors import ConfigError, ParamsError, UnsupportedError
from funclora.rules import Conv, ConvTranspose, Layout, Rule, map_tensors

optree: Any = _optree
pytestmark = [
    pytest.mark.filterwarnings("ignore::funclora.errors.DenseFallbackWarning"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]
EXAMPLES = Path(__file__).parents[2] / "examples"
KINDS = ("vera", "loha")
F64 = torch.float64


def example(name: str) -> Any:
    """An example as a module, as whoever copies the file has it."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


VeRA = example("method_vera").VeRA
LoHa = example("method_loha").LoHa


def drawn(shape: tuple[int, ...], generator: Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=F64)


def frozen_pair(layout: Layout, shape: tuple[int, ...], r: int) -> tuple[Tensor, Tensor]:
    """The same matrices for every call with the same arguments, though not the same tensors."""
    generator = gen(99)
    a, b = (drawn(each, generator) for each in factor_shapes(layout, shape, r))
    return a, b


def make_rule(kind: str, layout: Layout, shape: tuple[int, ...], generator: Generator, r: int = 2) -> Rule:
    a_shape, b_shape = factor_shapes(layout, shape, r)
    rule: Rule
    if kind == "vera":
        a, b = frozen_pair(layout, shape, r)
        of_conv = isinstance(layout, (Conv, ConvTranspose))
        d, out = (drawn(each[:1] if of_conv else each[:-1], generator) for each in (a_shape, b_shape))
        rule = VeRA(d, 0.5 * out, shared_a=a, shared_b=b, layout=layout)
    else:
        a1, b1, a2, b2 = (drawn(each, generator) for each in (a_shape, b_shape, a_shape, b_shape))
        rule = LoHa(a1, b1, a2, 0.5 * b2, scaling=0.7, layout=layout)
    return rule


def adapters_of(kind: str, case: Case, params: Mapping[str, Tensor], seed: int, r: int = 2) -> dict[str, Rule]:
    generator = gen(seed)
    return {n: make_rule(kind, layout, tuple(params[n].shape), generator, r) for n, layout in case.targets.items()}


def formula(rule: Any, shape: tuple[int, ...]) -> Tensor:
    """What the papers add to the weight, by explicit sums."""
    if type(rule).__name__ == "LoHa":
        first, second = delta(rule.layout, shape, rule.a1, rule.b1), delta(rule.layout, shape, rule.a2, rule.b2)
        return rule.scaling * first * second
    of_conv = isinstance(rule.layout, (Conv, ConvTranspose))
    a = torch.einsum("r,r...->r..." if of_conv else "...r,...ri->...ri", rule.d, rule.shared_a)
    b = torch.einsum("o,o...->o..." if of_conv else "...o,...or->...or", rule.b, rule.shared_b)
    return delta(rule.layout, shape, a, b)


def rewritten(params: Mapping[str, Tensor], adapters: Mapping[str, Rule]) -> dict[str, Tensor]:
    return dict(params) | {n: params[n] + formula(rule, tuple(params[n].shape)) for n, rule in adapters.items()}


def set_up(case: Case) -> Setup:
    return case.setup(F64)


def output(s: Setup, adapters: Mapping[str, Rule]) -> Any:
    return fl.apply(s.model, s.params, adapters, *s.args, **s.kwargs)


# --- one adapter -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_apply_and_merge_compute_the_formula(case: Case, kind: str) -> None:
    s = set_up(case)
    adapters = adapters_of(kind, case, s.params, 0)
    weights = rewritten(s.params, adapters)
    with plain_attention():
        expected = dense_call(s, weights)  # before: torch's recurrent layers keep what functional_call gave them
        check = snapshot(s.model, s.params, s.args, s.kwargs, adapters, [frozen_of(rule) for rule in adapters.values()])
        close(output(s, adapters), expected, 1e-11)
        uses = fl.trace_targets(s.model, s.params, adapters, *s.args, **s.kwargs)
    merged = fl.merge(s.params, adapters)
    for name in adapters:
        close(merged[name], weights[name], 1e-13)
    if case.fast:
        assert set(uses.values()) == {"fast"}
    check()


# An embedding with these options has gradients of its own: those of LoRA are held to them elsewhere.
OWN_GRADIENTS = (
    "embedding-padding",
    "embedding-max-norm",
    "embedding-max-norm-1",
    "embedding-scale-grad",
    "embedding-all",
)
DIFFERENTIATED = [case for case in CASES if case.fast and case.name not in OWN_GRADIENTS]


def scalar(output: Any) -> Tensor:
    leaves = [x for x in torch_pytree.tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point()]
    weighted: list[Tensor] = [(x * torch.linspace(-1, 1, x.numel(), dtype=F64).view_as(x)).sum() for x in leaves]
    return torch.stack(weighted).sum()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", DIFFERENTIATED, ids=str)
def test_gradients_are_those_of_the_formula_and_of_leaves_alone(case: Case, kind: str) -> None:
    s = set_up(case)
    adapters = adapters_of(kind, case, s.params, 0)
    with plain_attention():
        grads = torch.func.grad(lambda adapters: scalar(output(s, adapters)))(adapters)
        expected = torch.func.grad(lambda adapters: scalar(dense_call(s, rewritten(s.params, adapters))))
        close(optree.tree_leaves(grads), optree.tree_leaves(expected(adapters)), 1e-9)
    leaves = optree.tree_leaves(adapters)
    assert len(leaves) == sum(len(rule.leaf_names) for rule in adapters.values())
    assert not any(leaf is frozen for rule in adapters.values() for frozen in frozen_of(rule) for leaf in leaves)


def frozen_of(rule: Rule) -> list[Tensor]:
    return [getattr(rule, name) for name in rule.frozen_names]


# --- many ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", [case for case in CASES if not case.no_vmap], ids=str)
def test_vmap_equals_the_loop(case: Case, kind: str) -> None:
    s = set_up(case)
    alone = [adapters_of(kind, case, s.params, seed, r=1 + seed % 2) for seed in range(3)]
    if kind == "loha":
        alone[2] = {n: rule.with_scaling(1.9) for n, rule in alone[2].items()}
    with plain_attention():
        mapped = fl.vmap(lambda adapters: tensors(output(s, adapters)), in_dims=(0,))(fl.stack(alone))
        each = [tensors(output(s, adapters)) for adapters in alone]
        close(mapped, [torch.stack(several) for several in zip(*each, strict=True)], 1e-11)


ROUTED = [case for case in CASES if case.name in
          ("linear", "embedding", "conv2d", "conv-t2d", "gpt2-conv1d", "matmul", "matmul-t", "llama")]  # fmt: skip
IDS = [2, 0, -1, 2, 1, 3]


def batch(case: Case, s: Setup) -> tuple[Any, ...]:
    """Six different examples."""
    x = s.args[0][:1]
    return (torch.cat([x.roll(k, -1) for k in range(len(IDS))]),)


def members_of(case: Case, s: Setup, kind: str) -> list[dict[str, Rule]]:
    """Members of the kind, of other ranks and scalings; the last of a kind of the library."""
    members = [adapters_of(kind, case, s.params, seed, r) for seed, r in enumerate((2, 3, 2))]
    if kind == "loha":
        members[2] = {n: rule.with_scaling(-1.4) for n, rule in members[2].items()}
    return [*members, make_adapters(case, s.params, "dora", gen(7))]


def alone(case: Case, s: Setup, members: list[dict[str, Rule]], args: tuple[Any, ...]) -> list[Any]:
    """The output of each member, and at last of the base, on all rows."""
    return [fl.apply(s.model, s.params, adapters, *args, **s.kwargs) for adapters in [*members, {}]]


def first_tensor(output: Any) -> Tensor:
    found: Tensor = output if isinstance(output, Tensor) else output.logits
    return found


@pytest.mark.parametrize("given", ["list", "tensor", "weights"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ROUTED, ids=str)
def test_route_equals_the_loop(case: Case, kind: str, given: str) -> None:
    s = set_up(case)
    members = members_of(case, s, kind)
    args = batch(case, s)
    if case.name == "llama" and given == "weights":
        pytest.skip("a weighted sum of updates is not linear through a whole model")
    each = [first_tensor(out) for out in alone(case, s, members, args)]
    if given == "weights":
        weights = torch.randn(len(IDS), len(members), generator=gen(3), dtype=F64)
        routed = fl.route(fl.stack(members), weights=weights)
        spread = weights.T.reshape(len(members), len(IDS), *[1] * (each[0].dim() - 1))
        want = each[-1] + sum(w * (out - each[-1]) for w, out in zip(spread, each, strict=False))
    else:
        routed = fl.route(fl.stack(members), torch.tensor(IDS) if given == "tensor" else IDS)
        want = torch.stack([each[member][row] for row, member in enumerate(IDS)])
    got = first_tensor(fl.apply(s.model, s.params, routed, *args, **s.kwargs))
    close(got, want, 1e-10)


@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_members_of_near_ranks_are_computed_together(name: str) -> None:
    """LoHa names the dimensions that count ranks, so ranks 2 and 3 need one product."""
    case = next(case for case in CASES if case.name == name)
    s = set_up(case)
    members = fl.stack([adapters_of("loha", case, s.params, seed, r) for seed, r in enumerate((2, 3))])
    assert len(members.groups) == 2
    routed: Any = fl.route(members, [0, 1])["weight"]
    assert len(routed.rules) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_population_trains_as_its_members_do_alone(kind: str) -> None:
    case = next(case for case in CASES if case.name == "linear-no-bias")
    s = set_up(case)
    members = [adapters_of(kind, case, s.params, seed) for seed in range(3)]
    x, y = drawn((3, 4, 5), gen(5)), drawn((3, 4, 3), gen(6))

    def loss(bound: Any, batch: Any) -> Tensor:
        error: Tensor = (bound(batch[0]) - batch[1]).square().mean()
        return error

    optimizer = fl.optim.adamw(1e-2)
    step = fl.population_step(s.model, loss, optimizer)
    several, state = fl.stack(members), None
    state = fl.optim.per_member(lambda: optimizer).init(several)
    one = fl.train_step(s.model, loss, optimizer)
    states = [optimizer.init(member) for member in members]
    for _ in range(3):
        several, state, *_ = step(s.params, several, state, (x, y))
        for i, member in enumerate(members):
            members[i], states[i], *_ = one(s.params, member, states[i], (x[i], y[i]))
    close(optree.tree_leaves(list(several)), optree.tree_leaves(members), 1e-11)


# --- transforms, quantised bases, files -------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["linear", "conv2d", "embedding"])
def test_compiles_as_one_graph(name: str, kind: str) -> None:
    case = next(case for case in CASES if case.name == name)
    s = set_up(case)
    torch.compiler.reset()

    def outputs(adapters: dict[str, Rule]) -> Any:
        return output(s, adapters)

    gradients = torch.func.grad(lambda adapters: scalar(output(s, adapters)))
    run: Any = torch.compile(outputs, fullgraph=True, backend="eager")
    grads: Any = torch.compile(gradients, fullgraph=True, backend="eager")
    for seed in range(2):
        adapters = adapters_of(kind, case, s.params, seed)
        close(run(adapters), output(s, adapters), 1e-12)
        close(optree.tree_leaves(grads(adapters)), optree.tree_leaves(gradients(adapters)), 1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_on_a_base_of_four_bits(kind: str) -> None:
    model = torch.nn.Linear(64, 32, bias=False)
    params = fl.quantize(fl.base_params(model), ["weight"], "nf4")
    rule = map_tensors(lambda x: x.float(), make_rule(kind, fl.rules.Linear(), (32, 64), gen(0)))
    x = torch.randn(3, 64, generator=gen(1))
    expected = x @ (params["weight"].dequantize() + formula(rule, (32, 64))).T
    close(fl.apply(model, params, {"weight": rule}, x), expected, 1e-5)


def test_the_leaves_are_all_that_a_file_must_hold(tmp_path: Path) -> None:
    params = {"a.weight": torch.randn(6, 4, generator=gen(0)), "b.weight": torch.randn(6, 4, generator=gen(1))}
    adapters = example("method_vera").init_vera(params, params, r=3, seed=5)
    trained = optree.tree_map(lambda x: x + torch.randn(x.shape, generator=gen(2)), adapters)
    names = ["/".join(path) for path in optree.tree_paths(trained)]
    assert names == ["a.weight/d", "a.weight/b", "b.weight/d", "b.weight/b"]
    save_file(dict(zip(names, optree.tree_leaves(trained), strict=True)), tmp_path / "vera.safetensors")
    fresh = example("method_vera").init_vera(params, params, r=3, seed=5)
    stored = load_file(tmp_path / "vera.safetensors")
    loaded = optree.tree_unflatten(optree.tree_structure(fresh), [stored[name] for name in names])
    for name, weight in fl.merge(params, trained).items():
        assert torch.equal(weight, fl.merge(params, loaded)[name])


# --- frozen tensors ---------------------------------------------------------------------------------------------


def vera(seed: int = 0, **changes: Any) -> Any:
    rule: Any = make_rule("vera", fl.rules.Linear(), (4, 6), gen(seed))
    return replace(rule, **changes)


STRUCTURES: list[Callable[[Any], Any]] = [optree.tree_structure, torch_pytree.tree_structure]


@pytest.mark.parametrize("structure", STRUCTURES, ids=["optree", "torch"])
def test_structures_are_equal_if_the_frozen_tensors_are(structure: Callable[[Any], Any]) -> None:
    one, same = vera(), vera(1)
    assert one.shared_a is not same.shared_a  # equal in value
    assert structure({"w": one}) == structure({"w": same})
    assert hash(optree.tree_structure(one)) == hash(optree.tree_structure(same))
    changed = one.shared_a.clone()
    changed[0, 0] += 1
    for other in (vera(shared_a=changed), vera(shared_a=one.shared_a.float()), vera(shared_a=one.shared_a[:, :5])):
        assert structure({"w": one}) != structure({"w": other})


@pytest.mark.parametrize(
    "through", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
def test_copies_and_pickles_keep_them(through: Callable[[Any], Any]) -> None:
    shared = vera().shared_a
    adapters = {"x": vera(0, shared_a=shared), "y": vera(1, shared_a=shared)}
    for tree in (adapters, fl.stack([adapters, adapters])[1]):
        back = through(tree)
        assert torch.equal(back["x"].shared_a, shared)
        assert back["x"].shared_a is back["y"].shared_a is not shared
        assert optree.tree_structure(back) == optree.tree_structure(adapters)
    several = through(fl.stack([adapters, adapters]))
    assert torch.equal(several[1]["y"].shared_a, shared)
    spec = through(optree.tree_structure(adapters))
    assert spec == optree.tree_structure(adapters)


def test_map_tensors_reaches_leaves_and_frozen_tensors_once() -> None:
    shared = vera().shared_a
    members = [{"x": vera(i, shared_a=shared), "y": vera(i, shared_a=shared)} for i in range(2)]
    calls = []

    def single(x: Tensor) -> Tensor:
        calls.append(x)
        return x.float()

    moved = map_tensors(single, members[0])
    assert {x.dtype for x in (moved["x"].d, moved["x"].shared_a, moved["y"].shared_b)} == {torch.float32}
    assert moved["x"].shared_a is moved["y"].shared_a
    assert sum(x is shared for x in calls) == 1
    several = map_tensors(lambda x: x.float(), fl.stack(members))
    assert {x.dtype for m in several for rule in m.values() for x in (rule.d, rule.shared_a)} == {torch.float32}
    assert len({id(rule.shared_a) for m in several for rule in m.values()}) == 1
    mapped = optree.tree_map(lambda x: x.float(), members[0])
    assert mapped["x"].shared_a is shared  # tree_map does not reach it
    assert mapped["x"].d.dtype == torch.float32


def test_members_with_other_frozen_tensors_are_stacked_apart() -> None:
    one, other = {"weight": vera()}, {"weight": vera(1, shared_a=vera().shared_a.flip(0))}
    same = {"weight": vera(2)}
    members = fl.stack([one, other, same])
    assert sorted(len(group.members) for group in members.groups) == [1, 2]
    for given, back in zip((one, other, same), fl.unstack(members), strict=True):
        assert back["weight"].shared_a is given["weight"].shared_a
        assert torch.equal(back["weight"].d, given["weight"].d)
    model, params = torch.nn.Linear(6, 4, bias=False), {"weight": drawn((4, 6), gen(0))}
    x = drawn((3, 6), gen(1))
    rows = fl.apply(model, params, fl.route(members, [1, 0, 2]), x)
    want = [fl.apply(model, params, each, x[i : i + 1]) for i, each in enumerate((other, one, same))]
    close(rows, torch.cat(want), 1e-12)


def test_optimizers_and_transforms_leave_them_alone() -> None:
    adapters = {"weight": vera()}
    before = adapters["weight"].shared_a.clone()
    optimizer = fl.optim.adamw(1e-2, weight_decay=0.1)
    updates, _ = optimizer.update(adapters, optimizer.init(adapters), adapters)
    after = fl.optim.apply_updates(adapters, updates)
    assert after["weight"].shared_a is adapters["weight"].shared_a
    assert torch.equal(after["weight"].shared_a, before)
    assert not torch.equal(after["weight"].d, adapters["weight"].d)


def test_a_frozen_tensor_that_would_be_trained_is_refused() -> None:
    rule = vera(shared_a=torch.nn.Parameter(vera().shared_a))
    params = {"weight": drawn((4, 6), gen(0))}
    with pytest.raises(ParamsError, match=r"shared_a: expected a frozen tensor, got one that requires gradients"):
        fl.merge(params, {"weight": rule})


def test_a_field_is_a_leaf_or_frozen() -> None:
    @dataclass(frozen=True, eq=False)
    class Both:
        gain: Tensor = field(metadata=fl.rules.FROZEN)
        leaf_names = ("gain",)

    with pytest.raises(ParamsError, match=r"Both: gain is in leaf_names and marked as frozen"):
        fl.rules.pytree_node(Both)


def test_as_module_moves_them() -> None:
    model = torch.nn.Linear(6, 4, bias=False)
    module = fl.as_module(model, {"weight": drawn((4, 6), gen(0))}, {"weight": vera()})
    moved = module.to(torch.float32)
    rule: Any = moved.adapters["weight"]
    assert {rule.d.dtype, rule.shared_a.dtype, rule.shared_b.dtype} == {torch.float32}
    assert moved(torch.ones(1, 6)).dtype == torch.float32
    assert [name for name, _ in moved.named_parameters()] == ["adapter.weight.d", "adapter.weight.b"]
    copied = copy.deepcopy(moved)
    assert torch.equal(copied(torch.ones(1, 6)), moved(torch.ones(1, 6)))


# --- what uses rules --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_algebra_computes_with_them(kind: str) -> None:
    weight = drawn((4, 6), gen(0))
    params = {"weight": weight}
    one: dict[str, Rule] = {"weight": make_rule(kind, fl.rules.Linear(), (4, 6), gen(1))}
    other: dict[str, Rule] = {"weight": fl.LoRA(drawn((1, 6), gen(2)), drawn((4, 1), gen(3)), scaling=0.5)}
    change = formula(one["weight"], (4, 6))
    second = fl.merge(params, other)["weight"] - weight

    def of(adapters: Mapping[str, Rule]) -> Tensor:
        return fl.merge(params, adapters)["weight"] - weight

    close(of(algebra.scale(one, -0.5)), -0.5 * change, 1e-12)
    assert algebra.scale(one, 1.0) == one
    close(of(algebra.add([one, other])), change + second, 1e-12)
    close(of(algebra.interpolate(one, other, 0.25)), 0.75 * change + 0.25 * second, 1e-12)
    close(of(algebra.combine([one, other], [1.0, 2.0], "svd", svd_rank=4)), change + 2 * second, 1e-12)
    close(of(algebra.recompress(one, 4)), change, 1e-12)


def test_lora_plus_trains_the_leaves_next_to_the_output_faster() -> None:
    optimizer = fl.optim.lora_plus(0.1, ratio=4.0, base=fl.optim.sgd)
    for rule, ups in ((vera(), {"b"}), (make_rule("loha", fl.rules.Linear(), (4, 6), gen(0)), {"b1", "b2"})):
        grads = optree.tree_map(torch.ones_like, {"w": rule})
        updates = optimizer.update(grads, optimizer.init(grads))[0]["w"]
        for leaf in rule.leaf_names:
            expected = torch.full_like(getattr(rule, leaf), -0.4 if leaf in ups else -0.1)
            torch.testing.assert_close(getattr(updates, leaf), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_analysis_needs_no_base_for_an_update(kind: str) -> None:
    rule = make_rule(kind, fl.rules.Linear(), (4, 6), gen(1))
    (row,) = fl.analysis.spectra({"weight": rule}).rows
    assert (row.rule, row.r) == (type(rule).__name__, 2)
    assert row.singular_values is not None
    values = torch.tensor(row.singular_values[0], dtype=F64)
    close(values, torch.linalg.svdvals(formula(rule, (4, 6)))[: len(values)], 1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_the_weight_have_rules(kind: str) -> None:
    w = drawn((3, 4, 5), gen(0))
    rule: Any = make_rule(kind, fl.rules.Parameter(), (3, 4, 5), gen(1))
    dense = w + formula(rule, (3, 4, 5))
    for dim in range(3):
        part = rule.narrow(w.shape, dim, 1, 2)
        close(part.dense(w.narrow(dim, 1, 2)), dense.narrow(dim, 1, 2), 1e-12)
    close(rule.transposed().dense(w.mT), dense.mT, 1e-12)
    close(rule.select_experts(1).dense(w[1]), dense[1], 1e-12)


# --- other forms ------------------------------------------------------------------------------------------------


class Bare(Rule):
    """What the rules of the tests below share."""

    layout = fl.rules.Linear()

    def dense(self, weight: Tensor) -> Tensor:
        low: Any = self.low_rank()
        scale = self.output_scale(weight)
        updated: Tensor = low.dense(weight)
        return updated if scale is None else updated * scale[:, None]

    def check(self, name: str, weight: Tensor) -> None: ...


@fl.rules.pytree_node
@dataclass(frozen=True, eq=False)
class Offset(Bare):
    """An update that is not zero where its leaf is zero: B = 1 + b."""

    b: Tensor
    leaf_names: ClassVar[tuple[str, ...]] = ("b",)

    def as_lora(self) -> fl.LoRA:
        return fl.LoRA(torch.ones(1, 6, dtype=F64), 1 + self.b, layout=self.layout)


@fl.rules.pytree_node
@dataclass(frozen=True, eq=False)
class Gained(Bare):
    """g ∘ (W + B·A), without being a `LowRank`."""

    up: Tensor
    down: Tensor
    gain: Tensor
    leaf_names: ClassVar[tuple[str, ...]] = ("up", "down", "gain")

    def low_rank(self) -> fl.LoRA:
        return fl.LoRA(self.down, self.up, scaling=0.5, layout=self.layout)

    def output_scale(self, weight: Tensor) -> Tensor:
        return self.gain * weight.abs().sum(-1)


@pytest.mark.parametrize("given", ["list", "tensor", "weights"])
@pytest.mark.parametrize("kind", [Offset, Gained])
def test_forms_that_no_class_of_the_library_has(kind: type[Rule], given: str) -> None:
    model, params = torch.nn.Linear(6, 4), {"weight": drawn((4, 6), gen(0)), "bias": drawn((4,), gen(1))}
    shapes = [(4, 1)] if kind is Offset else [(4, 1), (1, 6), (4,)]
    members: list[dict[str, Rule]] = [{"weight": kind(*(drawn(shape, gen(i)) for shape in shapes))} for i in (2, 3)]
    x, ids = drawn((3, 6), gen(4)), [1, -1, 0]
    each = [x @ fl.merge(params, adapters)["weight"].T + params["bias"] for adapters in [*members, {}]]
    for adapters, want in zip(members, each, strict=False):
        close(fl.apply(model, params, adapters, x), want, 1e-12)
        assert fl.trace_targets(model, params, adapters, x) == {"weight": "fast"}
    if given == "weights":
        weights = drawn((3, 2), gen(5))
        routed = fl.route(fl.stack(members), weights=weights)
        rows = each[2] + sum(w[:, None] * (y - each[2]) for w, y in zip(weights.T, each, strict=False))
    else:
        routed = fl.route(fl.stack(members), torch.tensor(ids) if given == "tensor" else ids)
        rows = torch.stack([each[i][row] for row, i in enumerate(ids)])
    close(fl.apply(model, params, routed, x), rows, 1e-12)
    svd = algebra.combine(members, [0.5, 0.5], "svd", svd_rank=4, params=params)
    half = sum(0.5 * (fl.merge(params, adapters)["weight"] - params["weight"]) for adapters in members)
    close(fl.merge(params, svd)["weight"] - params["weight"], half, 1e-11)


# --- a rule that gives its dense form alone ---------------------------------------------------------------------


class Negated(Rule):
    """−W: nothing but what a rule must have."""

    leaf_names: ClassVar[tuple[str, ...]] = ()

    def dense(self, weight: Tensor) -> Tensor:
        return -weight

    def check(self, name: str, weight: Tensor) -> None: ...


@fl.rules.pytree_node
@dataclass(frozen=True, eq=False)
class Gain(Negated):
    """One gain for each output unit."""

    value: Tensor
    leaf_names: ClassVar[tuple[str, ...]] = ("value",)

    def dense(self, weight: Tensor) -> Tensor:
        return weight * self.value[:, None]


def gain(value: float) -> dict[str, Rule]:
    return {"weight": Gain(torch.full((4,), value, dtype=F64))}


def test_a_rule_with_a_dense_form_alone_is_right_or_refused_by_name(tmp_path: Path) -> None:
    model, params = torch.nn.Linear(6, 4, bias=False), {"weight": drawn((4, 6), gen(0))}
    x = drawn((3, 6), gen(1))
    members = fl.stack([gain(2.0), gain(3.0)])
    want = x @ params["weight"].T * torch.tensor([[3.0], [2.0], [1.0]], dtype=F64)
    close(fl.apply(model, params, fl.route(members, [1, 0, -1]), x), want, 1e-12)
    weights = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 0.0]], dtype=F64)
    close(fl.apply(model, params, fl.route(members, weights=weights), x), want, 1e-12)
    with pytest.raises(UnsupportedError, match=r"'weight': a tensor of ids .* Gain has no such form.*ids as a list"):
        fl.apply(model, params, fl.route(members, torch.tensor([1, 0, -1])), x)
    with pytest.raises(UnsupportedError, match=r"has as_lora or low_rank, got Gain\. Leave"):
        algebra.add([gain(2.0), gain(3.0)])
    with pytest.raises(ConfigError, match=r"up_leaf_names"):
        fl.optim.lora_plus(0.1).init(gain(1.0))
    for adapters, remedy in ((gain(1.0), r"Merge the adapter"), ({"weight": vera()}, r"rule\.as_lora\(\)")):
        with pytest.raises(UnsupportedError, match=rf"'weight': a PEFT folder has no place for the rule .*{remedy}"):
            fl.save_peft(tmp_path / "out", adapters, fl.LoraConfig(target_modules=["x"]))
    assert not (tmp_path / "out").exists()
    assert torch.equal(fl.merge(params, {"weight": Negated()})["weight"], -params["weight"])


def test_a_form_of_another_type_is_refused() -> None:
    class Wrong(Negated):
        layout = fl.rules.Linear()

        def as_lora(self) -> Any:
            return "LoRA"

    with pytest.raises(ParamsError, match=r"Wrong\.low_rank: expected a LoRA or None, got str"):
        algebra.add([{"weight": Wrong()}, {"weight": Wrong()}])


@fl.rules.pytree_node
@dataclass(frozen=True, eq=False)
class Unit(fl.rules.LowRank):
    """A method with norms of its own."""

    def output_scale(self, weight: Tensor) -> Tensor:
        return 1 / self.update(weight).norm(dim=-1)


def test_a_scale_worked_out_from_the_weight_is_that_of_the_whole_weight() -> None:
    class Part(torch.nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x[..., :2] @ self.weight[:, :2].T

    model, x = Part(5, 4).double(), drawn((3, 5), gen(0))
    params = fl.base_params(model)
    rule = Unit(drawn((2, 5), gen(1)).requires_grad_(), drawn((4, 2), gen(2)))
    updated = params["weight"] + rule.b @ rule.a
    expected = x[..., :2] @ (updated / updated.norm(dim=-1, keepdim=True))[:, :2].T
    close(fl.apply(model, params, {"weight": rule}, x), expected, 1e-12)


def test_dropout_that_a_method_does_not_know_is_refused() -> None:
    class Dropping(Negated):
        layout = fl.rules.Linear()
        dropout_p = 0.5

    model = torch.nn.Linear(2, 2)
    with pytest.raises(UnsupportedError, match=r"Dropping: dropout 0\.5 cannot act"):
        fl.apply(model, fl.base_params(model), {"weight": Dropping()}, torch.ones(1, 2))


# --- PEFT -------------------------------------------------------------------------------------------------------


def peft_model(config: Any) -> tuple[Any, Any]:
    from peft import get_peft_model

    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Tanh(), torch.nn.Linear(4, 6)).double()
    return copy.deepcopy(base), get_peft_model(base, config)


def test_vera_computes_what_peft_computes() -> None:
    from peft import VeraConfig

    base, wrapped = peft_model(VeraConfig(r=3, target_modules=["0", "2"], d_initial=0.7))
    adapters: dict[str, Rule] = {}
    for i in (0, 2):
        layer = wrapped.base_model.model[i]
        with torch.no_grad():
            layer.vera_lambda_b["default"].copy_(torch.randn(layer.out_features, generator=gen(i)))
            layer.vera_lambda_d["default"].copy_(torch.randn(3, generator=gen(i + 1)))
        shared_a, shared_b = layer.vera_A["default"], layer.vera_B["default"]
        adapters[f"{i}.weight"] = VeRA(
            layer.vera_lambda_d["default"].detach().double(),
            layer.vera_lambda_b["default"].detach().double(),
            shared_a=shared_a[:, : layer.in_features].double(),
            shared_b=shared_b[: layer.out_features].double(),
        )
    x = drawn((5, 6), gen(9))
    close(fl.apply(base, fl.base_params(base), adapters, x), wrapped.double()(x), 1e-11)


def test_loha_computes_what_peft_computes() -> None:
    from peft import LoHaConfig

    base, wrapped = peft_model(LoHaConfig(r=2, alpha=3, target_modules=["0", "2"], init_weights=False))
    adapters: dict[str, Rule] = {}
    for i in (0, 2):
        layer = wrapped.base_model.model[i]
        b1, a1, b2, a2 = (
            getattr(layer, f"hada_{name}")["default"].detach().double() for name in ("w1_a", "w1_b", "w2_a", "w2_b")
        )
        adapters[f"{i}.weight"] = LoHa(a1, b1, a2, b2, scaling=1.5)
    x = drawn((5, 6), gen(9))
    close(fl.apply(base, fl.base_params(base), adapters, x), wrapped.double()(x), 1e-11)


@pytest.mark.parametrize("name", ["method_vera", "method_loha"])
def test_the_examples_train(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    first, last, *_ = example(name).main(["--steps=60"])
    assert last < 0.5 * first
    assert f"{last:.4f}" in capsys.readouterr().out


@pytest.mark.parametrize("names", [None, "value", ("valu",), ["value"]])
def test_leaf_names_are_names_of_fields(names: Any) -> None:
    @dataclass(frozen=True, eq=False)
    class Wrong:
        value: Tensor
        leaf_names = names

    with pytest.raises(ParamsError, match=r"Wrong\.leaf_names: expected a tuple with names of the fields \['value'\]"):
        fl.rules.pytree_node(Wrong)


@pytest.mark.filterwarnings("ignore::funclora.errors.DenseFallbackWarning")
@pytest.mark.parametrize(("given", "got"), [(lambda w: w[:1], r"shape \[1, 3\]"), (lambda w: None, "a NoneType")])
@pytest.mark.parametrize("free", [False, True])
def test_a_dense_form_of_another_shape_is_refused(given: Any, got: str, free: bool) -> None:
    @fl.rules.pytree_node
    @dataclass(frozen=True, eq=False)
    class Cut(fl.Rule):
        value: Tensor
        leaf_names = ("value",)
        bind_dense = free

        def dense(self, weight: Tensor) -> Any:
            return given(weight)

        def check(self, name: str, weight: Tensor) -> None:
            pass

    model = torch.nn.Linear(3, 2)
    params: Any = fl.base_params(model)
    message = rf"'weight': Cut\.dense returned {got}, expected a tensor of the weight's shape \[2, 3\]"
    with pytest.raises(ParamsError, match=message):
        fl.merge(params, {"weight": Cut(torch.ones(1))})
    with pytest.raises(ParamsError, match=message):
        fl.apply(model, params, {"weight": Cut(torch.ones(1))}, torch.ones(1, 3))
