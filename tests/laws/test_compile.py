"""`torch.compile(fullgraph=True)`: the values of eager mode, and one graph for all values of adapters and weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from cases import gen, llama, make_rule
from oracle import close, distance, snapshot
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from funclora import (
    LoraConfig,
    apply,
    base_params,
    init,
    optim,
    population_step,
    route,
    stack,
    train_step,
    value_and_grad,
)
from funclora.demo.model import ByteLM, ByteLMConfig
from funclora.errors import ConfigError, strict
from funclora.rules.layouts import Embedding, Linear, Parameter

pytestmark = [
    pytest.mark.slow,
    # what tracing and inductor themselves bring up
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _no_graphs_of_other_tests() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Subject(NamedTuple):
    model: Any
    params: dict[str, Tensor]
    adapters: Any  # LoRA and DoRA in turn, or a stack of members
    ids: Tensor


class Tiny(nn.Module):
    """What a language model is made of, but so small that inductor is done with it in seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(17, 6)
        self.proj = nn.Linear(6, 17)

    def forward(self, ids: Tensor) -> Tensor:
        return self.proj(self.embed(ids).tanh())


MODELS: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "bytelm": (
        lambda: ByteLM(ByteLMConfig(dim=8, layers=1, heads=2, hidden=12, context=8)),
        ("embed", "q_proj", "v_proj", "down_proj", "lm_head"),
    ),
    "llama": (llama, ("embed_tokens", "q_proj", "v_proj", "down_proj", "lm_head")),
    "tiny": (Tiny, ("embed", "proj")),
}


def subject(name: str) -> Subject:
    make, targets = MODELS[name]
    model = make().eval()
    params = base_params(model)
    names = [n for n in params if n.split(".")[-2] in targets and n.endswith("weight")]
    adapters = {
        n: make_rule(("lora", "dora")[i % 2], Embedding() if "embed" in n else Linear(), params[n], gen(i))
        for i, n in enumerate(names)
    }
    return Subject(model, params, adapters, torch.randint(17, (4, 6)))


def several(name: str) -> Subject:
    """Members of two methods and two ranks, and a batch for each."""
    s = subject(name)
    kinds = {2: "lora", 3: "dora", 1: "lora"}
    members = [
        {n: make_rule(kind, rule.layout, s.params[n], gen(r), r=r) for n, rule in s.adapters.items()}
        for r, kind in kinds.items()
    ]
    return s._replace(adapters=stack([*members, scaled(members[0], 0.5)]), ids=torch.randint(17, (4, 2, 6)))


def logits(output: Any) -> Tensor:
    return getattr(output, "logits", output)


def loss_of(model: Callable[[Tensor], Any], ids: Tensor) -> Tensor:
    return F.cross_entropy(logits(model(ids[:, :-1])).flatten(0, 1), ids[:, 1:].flatten())


def scaled(tree: Any, factor: float) -> Any:
    return pytree.tree_map(lambda x: factor * x if x.is_floating_point() else x, tree)


def stacked(adapters: Any) -> Any:
    return pytree.tree_map(lambda x: torch.stack([x, 0.5 * x, -x]), adapters)


# Entry points: given a subject, a function of (params, adapters, ids).
Entry = Callable[[Any, Any, Tensor], Any]


def forward(s: Subject) -> Entry:
    return lambda params, adapters, ids: logits(apply(s.model, params, adapters, ids))


def step(s: Subject) -> Entry:
    """A step that starts from moments that are not zero."""
    optimizer = optim.adamw(0.1)
    run = train_step(s.model, loss_of, optimizer)
    _, state, _ = run(s.params, s.adapters, optimizer.init(s.adapters), s.ids)

    def one(params: Any, adapters: Any, ids: Tensor) -> Any:
        adapters, _, metrics = run(params, adapters, state, ids)
        return adapters, metrics

    return one


def population(s: Subject, **options: Any) -> Entry:
    """A step of a population that starts from moments that are not zero."""
    optimizer = optim.per_member(optim.adamw, lr=[0.1, 0.02, 0.3, 0.05])
    run = population_step(s.model, loss_of, optimizer, **options)
    _, state, _ = run(s.params, s.adapters, optimizer.init(s.adapters), s.ids)

    def one(params: Any, members: Any, ids: Tensor) -> Any:
        members, _, metrics = run(params, members, state, ids)
        return members, metrics["loss"], metrics["grad_norm"]

    return one


def grads_of_examples(s: Subject) -> Entry:
    def loss(adapters: Any, params: Any, row: Tensor) -> Tensor:
        return loss_of(lambda ids: apply(s.model, params, adapters, ids), row[None])

    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, None, 0))
    return lambda params, adapters, ids: grads(adapters, params, ids)


def grads_of_adapters(s: Subject) -> Entry:
    def loss(adapters: Any, params: Any, ids: Tensor) -> Tensor:
        return loss_of(lambda ids: apply(s.model, params, adapters, ids), ids)

    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(0, None, None))
    return lambda params, adapters, ids: grads(stacked(adapters), params, ids)


def losses_and_grads(s: Subject) -> Entry:
    def one(adapters: Any, params: Any, ids: Tensor) -> Any:
        return value_and_grad(loss_of)(s.model, params, adapters, ids)

    return lambda params, adapters, ids: torch.func.vmap(one, (0, None, None))(stacked(adapters), params, ids)


def check(s: Subject, entry: Entry, backend: str, tolerance: float = 1e-5) -> None:
    """Other adapters, other weights and other ids: the results of eager mode, from one graph."""
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(entry, fullgraph=True, backend=counter)
    unchanged = snapshot(s.model, s.params, s.adapters)
    before = None
    for params, adapters, ids in (
        (s.params, s.adapters, s.ids),
        (s.params, scaled(s.adapters, 1.5), s.ids),
        (scaled(s.params, 0.7), s.adapters, s.ids),
        (s.params, s.adapters, s.ids.flip(0, 1)),
    ):
        expected = entry(params, adapters, ids)
        close(compiled(params, adapters, ids), expected, tolerance)
        if before is not None:
            assert distance(before, expected) > 1e-3, "a stale graph would be seen"
        before = expected
    assert counter.frame_count == 1
    unchanged()


real_models = pytest.mark.parametrize("name", ["bytelm", "llama"])


@real_models
def test_apply_and_its_gradients(name: str) -> None:
    s = subject(name)
    entry = forward(s)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(entry, fullgraph=True, backend=counter)

    def with_grads(entry: Entry, params: Any, adapters: Any) -> Any:
        leaves, spec = pytree.tree_flatten((params, adapters))
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        params, adapters = pytree.tree_unflatten(leaves, spec)
        output = entry(params, adapters, s.ids)
        return output, torch.autograd.grad(output.square().sum(), leaves)

    unchanged = snapshot(s.model, s.params, s.adapters)
    results = []
    for params, adapters in (
        (s.params, s.adapters),
        (s.params, scaled(s.adapters, 1.5)),
        (scaled(s.params, 0.7), s.adapters),
    ):
        expected = with_grads(entry, params, adapters)
        close(with_grads(compiled, params, adapters), expected, 1e-5)
        results.append(expected)
    assert all(distance(results[0], other) > 1e-3 for other in results[1:]), "a stale graph would be seen"
    assert counter.frame_count == 1
    unchanged()


@real_models
def test_train_step(name: str) -> None:
    s = subject(name)
    check(s, step(s), "eager")


@pytest.mark.parametrize(  # crosswise, as each takes seconds
    ("entry", "name"),
    [
        (grads_of_examples, "bytelm"),
        (losses_and_grads, "llama"),
        pytest.param(losses_and_grads, "bytelm", marks=pytest.mark.slow),
        pytest.param(grads_of_examples, "llama", marks=pytest.mark.slow),
    ],
)
def test_gradients_under_vmap(entry: Callable[[Subject], Entry], name: str) -> None:
    s = subject(name)
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no batching rule
        check(s, entry(s), "eager")


@pytest.mark.skipif(
    not any(shutil.which(name) for name in ("c++", "g++", "clang++")), reason="inductor needs a C++ compiler"
)
@pytest.mark.parametrize("entry", [forward, step, grads_of_adapters, population], ids=lambda f: f.__name__)
def test_inductor(entry: Callable[[Subject], Entry]) -> None:
    s = several("tiny") if entry is population else subject("tiny")
    check(s, entry(s), "inductor", 1e-4)


class Parts(nn.Module):
    """A model that reads its weights in parts, transposed, cast, copied, and in sums of products."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(17, 8)
        self.qkv, self.mix, self.head = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 17)
        self.experts = nn.Parameter(torch.randn(3, 8, 8))

    def forward(self, ids: Tensor) -> Tensor:
        x, w = self.embed(ids), self.qkv.weight
        q, (k, v) = F.linear(x, w[:8]), (x @ part.T for part in w[8:].chunk(2))
        x = q.tanh() + torch.einsum("bti,oi->bto", k, self.mix.weight) + torch.inner(v, self.mix.weight.detach())
        x = x + F.linear(x.double(), self.mix.weight.clone().double()).float()
        x = torch.einsum("bti,eio->beto", x, self.experts).sum(1) + x @ self.experts.unbind()[1].movedim(0, 1)
        first, second = self.head.weight.split([10, 7])
        return torch.cat([F.linear(x[..., :4], first[:, :4]), torch.tensordot(x, second, ([2], [1]))], -1)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_parts_of_weights(backend: str) -> None:
    model = Parts()
    params = base_params(model)
    layouts = {"embed.weight": Embedding(), "qkv.weight": Linear(), "mix.weight": Linear(), "head.weight": Linear(),
               "experts": Parameter(stored_transposed=True)}  # fmt: skip
    adapters = {
        name: make_rule(("lora", "dora")[i % 2], layout, params[name], gen(i))
        for i, (name, layout) in enumerate(layouts.items())
    }
    s = Subject(model, params, adapters, torch.randint(17, (4, 6)))
    with strict():
        check(s, forward(s), backend)
        check(s, step(s), backend)


# --- what is static, and what a call must not write to ---------------------------------------------------------


class Stateful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.drop(self.norm(self.one(x))))


class Watched(NamedTuple):
    model: nn.Module
    params: dict[str, Tensor]
    adapters: dict[str, Any]
    graphs: Callable[[Any], int]


@pytest.fixture
def watched() -> Watched:
    """A model, and a check of its compiled output under given adapters that tells how many graphs there are."""
    model = Stateful()
    nn.init.uniform_(model.norm.weight)
    params = base_params(model)
    adapters: Any = init(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, lora_dropout=0.4))
    x = torch.randn(6, 4)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(lambda adapters: apply(model, params, adapters, x), fullgraph=True, backend=counter)

    def graphs(adapters: Any) -> int:
        with torch.random.fork_rng(devices=[]):
            actual = compiled(adapters)
        close(actual, apply(model, params, adapters, x), 1e-6)
        return counter.frame_count

    return Watched(model, params, adapters, graphs)


def test_another_scaling_is_never_stale(watched: Watched) -> None:
    watched.model.eval()

    def at(scaling: float) -> Any:
        return {name: replace(rule, scaling=scaling) for name, rule in watched.adapters.items()}

    # A number is first taken for a constant. Once it has changed it is an input, and one graph serves all others.
    assert watched.graphs(at(1.0)) == 1
    assert [watched.graphs(at(scaling)) for scaling in (3.0, 0.5, 7.0, -2.0)] == [2, 2, 2, 2]
    assert watched.graphs(at(1.0)) == 2


def test_another_structure_is_another_graph(watched: Watched) -> None:
    watched.model.eval()
    first = dict(list(watched.adapters.items())[:1])
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, use_dora=True)
    dora: Any = init(watched.model, config)
    variants: list[Any] = [watched.adapters, first, {}, dora] * 2
    assert [watched.graphs(adapters) for adapters in variants] == [1, 2, 3, 4, 4, 4, 4, 4]


def test_dropout_and_buffers_in_training_mode(watched: Watched) -> None:
    unchanged = snapshot(watched.model, watched.params, watched.adapters)
    no_drop = {name: replace(rule, dropout=0.0) for name, rule in watched.adapters.items()}
    assert watched.graphs(watched.adapters) == 1
    assert watched.graphs(no_drop) == 2
    unchanged()
    watched.model.eval()
    assert watched.graphs(watched.adapters) == 3
    watched.model.train()
    assert watched.graphs(watched.adapters) == 3


# --- special layers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("need_weights", [True, False])
def test_attention_has_the_weights_of_eager_mode(need_weights: bool) -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            attended: Tensor = self.attention(x, x, x, need_weights=need_weights)[0]
            return attended

    model = Attends()
    params = base_params(model)
    names = ("attention.in_proj_weight", "attention.out_proj.weight")
    adapters = {name: make_rule("lora", Linear(), params[name], gen(i)) for i, name in enumerate(names)}
    compiled = torch.compile(lambda adapters, x: apply(model, params, adapters, x), fullgraph=True, backend="eager")
    x = torch.randn(2, 3, 8)
    torch.testing.assert_close(compiled(adapters, x), apply(model, params, adapters, x))


def test_two_weights_for_one_shared_module_are_refused() -> None:
    shared = nn.Linear(2, 2)
    model = nn.Sequential(shared, nn.Tanh(), shared)
    params = base_params(model)
    adapters = init(model, LoraConfig(r=1, target_modules=["0"], init_lora_weights=False))
    compiled = torch.compile(lambda adapters, x: apply(model, params, adapters, x), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="one parameter of one module under two names"):
        compiled(adapters, torch.ones(1, 2))


# --- many adapters ----------------------------------------------------------------------------------------------


def test_population_step() -> None:
    s = several("llama")
    check(s, population(s), "eager")


@pytest.mark.parametrize("options", [{"shared": True}, {"accumulate": 2}], ids=lambda options: next(iter(options)))
def test_population_step_with_options(options: dict[str, Any]) -> None:
    s = several("tiny")
    s = s._replace(ids=s.ids[0]) if options.get("shared") else s
    check(s, population(s, **options), "eager")


def test_a_compiled_population_goes_on_from_its_own_results() -> None:
    s = several("tiny")
    optimizer = optim.per_member(optim.adamw, lr=[0.1, 0.02, 0.3, 0.05])
    step = population_step(s.model, loss_of, optimizer)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(step, fullgraph=True, dynamic=False, backend=counter)
    results = []
    members: Any = None
    state: Any = None
    metrics: dict[str, Any] = {}
    for run in (step, compiled):
        members, state = s.adapters, optimizer.init(s.adapters)
        for _ in range(3):
            members, state, metrics = run(s.params, members, state, s.ids)
        results.append((members, state, metrics["loss"]))
    close(results[1], results[0], 1e-5)
    assert [list(rules) for rules in results[1][0]] == [list(rules) for rules in s.adapters]
    assert counter.frame_count == 1
    kept = [2, 0]
    some = s.params, members[kept], state[kept], s.ids[kept]
    close(compiled(*some)[:2], step(*some)[:2], 1e-5)


def test_a_population_step_on_mixed_rows_is_one_graph_for_all_ids() -> None:
    s = several("tiny")
    optimizer = optim.per_member(optim.adamw, lr=[0.1, 0.02, 0.3, 0.05])

    def loss(bound: Any, ids: Tensor, mine: Tensor) -> Tensor:
        each = F.cross_entropy(bound(ids[:, :-1]).transpose(1, 2), ids[:, 1:], reduction="none").mean(1)
        return torch.where(mine, each, 0.0).sum()

    step, state = population_step(s.model, loss, optimizer), optimizer.init(s.adapters)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for ids in ([0, 3, 1, 2], [2, 2, 0, -1], [1, 0, 2, 3]):
        given = s.params, s.adapters, state, s.ids[:, 0]
        after, _, metrics = compiled(*given, ids=torch.tensor(ids))
        wanted, _, expected = step(*given, ids=ids)
        close((after, metrics["loss"]), (wanted, expected["loss"]), 1e-4)
    assert counter.frame_count == 1


def test_dropout_in_a_compiled_population_is_that_of_eager_mode() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.5), nn.Linear(5, 4)).train()
    config = LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False, lora_dropout=0.4)
    members, sgd = stack([init(model, config) for _ in range(3)]), optim.per_member(optim.sgd, lr=[0.1] * 3)
    step = population_step(model, lambda bound, x: F.dropout(bound(x), 0.3).square().mean(), sgd)
    x, state = torch.ones(3, 2, 6), sgd.init(members)
    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="eager")):
        torch.manual_seed(0)
        after, _, metrics = run(base_params(model), members, state, x)
        results.append((after, metrics["loss"]))
    close(results[1], results[0], 1e-6)
    assert distance(results[0][1][:1], results[0][1][1:2]) > 1e-3
    with pytest.raises(Exception, match="cannot trace generators"):
        torch.compile(step, fullgraph=True, backend="eager")(base_params(model), members, state, x, seeds=[0, 1, 2])


@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
def test_a_mixed_batch_is_one_graph_for_all_ids(inside: bool) -> None:
    s = several("tiny")
    counter = CompileCounterWithBackend("eager")
    if inside:
        compiled = torch.compile(
            lambda ids, x: apply(s.model, s.params, route(s.adapters, ids), x), fullgraph=True, backend=counter
        )
    else:
        of_routed = torch.compile(
            lambda routed, x: apply(s.model, s.params, routed, x), fullgraph=True, backend=counter
        )

        def compiled(ids: Tensor, x: Tensor) -> Any:
            return of_routed(route(s.adapters, ids), x)

    x = s.ids[:3, 0]
    for ids in ([0, 1, -1], [2, 2, 0], [1, 3, 2]):
        found = compiled(torch.tensor(ids), x)
        for row, member in enumerate(ids):
            alone = apply(s.model, s.params, s.adapters[member] if member >= 0 else {}, x[row : row + 1])
            close(found[row], alone[0], 1e-5)
    assert counter.frame_count == 1
    for wrong in (-2, 4):
        with pytest.raises((IndexError, ConfigError), match=r"out of|is -2|is 4"):
            compiled(torch.tensor([0, wrong, 1]), x)


def test_ids_for_each_token_are_refused() -> None:
    s = several("tiny")
    ids = torch.tensor([[0, 1, 2, 0, 1, 2]] * 3)
    inside = torch.compile(
        lambda ids, x: apply(s.model, s.params, route(s.adapters, ids), x), backend="eager", fullgraph=True
    )
    with pytest.raises(Exception, match=r"whole numbers \[n_rows\]"):
        inside(ids, s.ids[:3, 0])
    outside = torch.compile(lambda routed, x: apply(s.model, s.params, routed, x), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="for each token are not supported"):
        outside(route(s.adapters, ids), s.ids[:3, 0])
