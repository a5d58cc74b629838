"""`bind`: what works on a bound module, how long it lives, and what is refused."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, Case, gen, gpt2, llama, make_adapters, make_rule
from oracle import close, distance, oracle, rewritten, snapshot
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from funclora import LoRA, Rule, apply, base_params, bind, merge, value_and_grad
from funclora._bind.apply import trace_targets
from funclora.errors import ParamsError, PurityError, UnsupportedError
from funclora.rules.layouts import Conv1D, Embedding, Linear

pytestmark = [
    pytest.mark.filterwarnings("ignore::funclora.errors.DenseFallbackWarning"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4))
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("scale", torch.full((1,), 2.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.norm(self.encode(x))

    def encode(self, x: Tensor) -> Tensor:
        return self.body(x)


def lora(params: dict[str, Tensor], *names: str, kind: str = "lora") -> dict[str, Any]:
    return {name: make_rule(kind, Linear(), params[name], gen(i)) for i, name in enumerate(names)}


def setup() -> tuple[Net, dict[str, Tensor], dict[str, Any]]:
    model = Net()
    params = base_params(model)
    return model, params, lora(params, "body.0.weight", "body.2.weight")


# --- what works ------------------------------------------------------------------------------------------------


def test_a_bound_module_is_a_module_of_the_same_class() -> None:
    model, params, adapters = setup()
    bound = bind(model, params, adapters)
    assert type(bound) is Net
    assert bound is not model
    assert [n for n, _ in bound.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert [n for n, _ in bound.named_modules()] == [n for n, _ in model.named_modules()]
    assert bound.norm.weight is params["norm.weight"]  # base weights are shared, not copied


def test_any_method_runs_under_the_rewritten_weights() -> None:
    model, params, adapters = setup()
    x, bound = torch.randn(3, 4), bind(model, params, adapters)
    weights = rewritten(params, adapters)
    hidden = F.linear(x, weights["body.0.weight"], weights["body.0.bias"]).tanh()
    expected = F.linear(hidden, weights["body.2.weight"], weights["body.2.bias"])
    close(bound.encode(x), expected, 1e-6)
    close(bound.body(x), expected, 1e-6)
    close(bound.body[0](x).tanh(), hidden, 1e-6)


@pytest.mark.parametrize("given", [False, True])
def test_non_persistent_buffers_come_from_the_model_unless_given(given: bool) -> None:
    model, params, adapters = setup()
    model.eval()
    assert "scale" not in params
    x = torch.randn(3, 4)
    expected = apply(model, params, adapters, x)
    if given:
        params["scale"] = torch.full((1,), 6.0)
    close(apply(model, params, adapters, x), expected * (3 if given else 1), 1e-6)


def test_a_bound_module_can_be_bound_again() -> None:
    model, params, adapters = setup()
    x = torch.randn(3, 4)
    bound = bind(model, params, adapters)
    others = lora(params, "body.2.weight", kind="dora")
    for given in (others, adapters, {}):
        close(bind(bound, params, given)(x), apply(model, params, given, x), 0)
    close(bound(x), apply(model, params, adapters, x), 0)
    assert distance(bind(bound, params, {})(x), bound(x)) > 1e-2


def test_the_model_may_have_weights_of_another_dtype_or_none() -> None:
    model, params, adapters = setup()
    x = torch.randn(3, 4)
    expected = apply(model, params, adapters, x)
    close(apply(model.to("meta"), params | {"scale": torch.full((1,), 2.0)}, adapters, x), expected, 1e-6)
    close(apply(Net().double(), params | {"scale": torch.full((1,), 2.0)}, adapters, x), expected, 1e-6)


@pytest.mark.parametrize("make", [gpt2, llama])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_generate_gives_the_tokens_of_the_merged_model(make: Callable[[], Any], kind: str) -> None:
    torch.manual_seed(0)
    model = make().eval()
    params = base_params(model)
    layout = Conv1D() if make is gpt2 else Linear()
    names = [n for n in params if n.endswith(("c_attn.weight", "c_fc.weight", "q_proj.weight", "down_proj.weight"))]
    adapters = {name: make_rule(kind, layout, params[name], gen(i)) for i, name in enumerate(names)}
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}

    check = snapshot(model, params, adapters)
    base = model.generate(ids, **options)
    tokens = bind(model, params, adapters).generate(ids, **options)
    check()
    merged = make().eval()
    merged.load_state_dict(merge(params, adapters))
    assert tokens.tolist() == merged.generate(ids, **options).tolist()
    assert tokens.tolist() != base.tolist()


def test_fx_graphs_can_be_bound() -> None:
    model, params, adapters = setup()
    x = torch.randn(3, 4)
    close(apply(torch.fx.symbolic_trace(model), dict(params, scale=torch.full((1,), 2.0)), adapters, x),
          apply(model, params, adapters, x), 1e-6)  # fmt: skip


@pytest.mark.parametrize("in_place", [False, True])
def test_compiled_modules_can_be_bound(in_place: bool) -> None:
    model, params, adapters = setup()
    x = torch.randn(3, 4)
    expected = apply(model, params, adapters, x)
    if in_place:
        model.compile(backend="eager")
        close(apply(model, params, adapters, x), expected, 1e-6)
    else:
        compiled: Any = torch.compile(model, backend="eager")
        weights = {f"_orig_mod.{name}": value for name, value in params.items()}
        rules = {f"_orig_mod.{name}": rule for name, rule in adapters.items()}
        close(apply(compiled, weights, rules, x), expected, 1e-6)


def test_a_cache_of_parametrizations_is_refused() -> None:
    # It knows the model's weights, not those of a call.
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)))
    params = base_params(model)
    adapters = lora(params, "0.parametrizations.weight.original1")
    with parametrize.cached(), pytest.raises(UnsupportedError, match=r"'0\.?' is parametrized.*cached\(\)"):
        apply(model, params, adapters, torch.randn(3, 4))


# --- activation checkpointing ----------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    """Two blocks, recomputed in backward; `how` is what the checkpoint holds on to."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.run(block, x).tanh()
        return x

    def run(self, block: Any, x: Tensor) -> Tensor:
        weight, bias = block.weight, block.bias
        functions: dict[str, Callable[[Tensor], Tensor]] = {
            "module": block,
            "method": lambda x: self.call(block, x),
            "weight": lambda x: F.linear(x, weight, bias),
        }
        if self.how == "none":
            return block(x)
        return checkpoint(functions[self.how], x, use_reentrant=False)

    def call(self, block: nn.Module, x: Tensor) -> Tensor:
        return block(x)


@pytest.mark.parametrize("kind", ["lora", "dora", "dora-exact", "full"])
@pytest.mark.parametrize("how", ["module", "method", "weight"])
def test_backward_through_checkpoints_after_apply_has_returned(how: str, kind: str) -> None:
    grads = {}
    for each in ("none", how):
        torch.manual_seed(0)
        model = Checkpointed(each).double()
        params = base_params(model)
        adapters = lora(params, "blocks.0.weight", "blocks.1.weight", kind=kind)
        leaves = [leaf.requires_grad_() for rule in adapters.values() for leaf in
                  (getattr(rule, name) for name in rule.leaf_names)]  # fmt: skip
        loss = apply(model, params, adapters, torch.randn(3, 4, dtype=torch.float64)).square().sum()
        grads[each] = torch.autograd.grad(loss, leaves)
    close(grads[how], grads["none"], 1e-12)
    assert all(grad.abs().max() > 1e-6 for grad in grads[how])


# --- how long it lives -----------------------------------------------------------------------------------------


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_bound_module_dies_with_its_last_reference(case: Case, kind: str) -> None:
    s = case.setup()
    adapters = make_adapters(case, s.params, kind, gen(1))
    bound = bind(s.model, s.params, adapters)
    bound(*s.args, **s.kwargs)
    dead = [weakref.ref(module) for module in bound.modules()] + [weakref.ref(p) for p in bound.parameters()]
    leaves = (getattr(rule, name) for rule in adapters.values() for name in rule.leaf_names)
    alive = {id(value) for value in (*s.params.values(), *leaves)}
    dead = [ref for ref in dead if id(ref()) not in alive]
    assert dead
    del bound
    assert not [ref() for ref in dead if ref() is not None]


@pytest.mark.usefixtures("no_collector")
def test_binding_many_times_keeps_nothing() -> None:
    model, params, adapters = setup()
    apply(model, params, adapters, torch.randn(3, 4))
    before = len(gc.get_objects())
    for _ in range(20):
        apply(model, params, adapters, torch.randn(3, 4))
    assert len(gc.get_objects()) - before < 20


# --- what is refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_script_modules_are_refused(deep: bool) -> None:
    script: Any = torch.jit.script(nn.Linear(3, 3))
    model, name = (nn.Sequential(nn.ReLU(), script), "'1") if deep else (script, "'the model'")
    with pytest.raises(UnsupportedError, match=f"{name}.*is a ScriptModule"):
        bind(model, base_params(model), {})


def distributed(model: nn.Module) -> nn.Module:
    """A DistributedDataParallel as it looks to `bind`; a real one wants a process group."""
    wrapped = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapped)
    wrapped.module = model
    return wrapped


PARALLEL: dict[str, tuple[Callable[[Any], Any], str]] = {
    "data": (nn.DataParallel, r"is a DataParallel.*Pass the module that it wraps \(DataParallel\.module\)"),
    "distributed": (distributed, r"is a DistributedDataParallel.*\(DistributedDataParallel\.module\)"),
    "replica": (lambda model: model._replicate_for_data_parallel(), r"is a replica.*Pass the module that was rep"),
}


@pytest.mark.parametrize("call", [bind, apply], ids=["bind", "apply"])
@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("name", PARALLEL)
def test_wrappers_that_copy_the_model_are_refused(name: str, deep: bool, call: Callable[..., Any]) -> None:
    wrap, message = PARALLEL[name]
    plain = nn.Linear(3, 3)
    model = nn.Sequential(nn.Linear(3, 3), wrap(plain)) if deep else wrap(plain)
    # With the names of the inner model too: what is wrong is the wrapper, not the names.
    for params in [base_params(model)] if deep else [base_params(model), base_params(plain)]:
        with pytest.raises(UnsupportedError, match=f"{'.1' if deep else '.the model'}. {message}"):
            call(model, params, {} if deep else lora(base_params(plain), "weight"))
    bind(plain, base_params(plain), {})


def write_out(w: Tensor) -> None:
    torch.add(w, 1, out=w)


WRITES: dict[str, Callable[[Tensor], object]] = {
    "add_": lambda w: w.add_(1),
    "mul_": lambda w: torch.Tensor.mul_(w, 2),
    "zero_": lambda w: w.zero_(),
    "copy_": lambda w: w.copy_(torch.zeros(4)),
    "__setitem__": lambda w: w.__setitem__(0, 0.0),
    "__iadd__": lambda w: w.__iadd__(1),
    "__imul__": lambda w: w.__imul__(2),
    "data": lambda w: setattr(w, "data", torch.zeros(4, 4)),
    "normal_": nn.init.normal_,
    "requires_grad_": lambda w: w.requires_grad_(False),
    "add": write_out,
    "relu": lambda w: F.relu(w, inplace=True),
    "_foreach_add_": lambda w: torch._foreach_add_([w], 1.0),
}


@pytest.mark.parametrize("operation", WRITES)
def test_writing_to_a_rewritten_weight_is_refused(operation: str) -> None:
    class Writing(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                WRITES[operation](self.weight)
            return super().forward(x)

    model = Writing(4, 4)
    params = base_params(model)
    adapters = lora(params, "weight")
    check = snapshot(model, params, adapters)
    with pytest.raises(PurityError, match=r"'weight': the model calls .*which would write"):
        apply(model, params, adapters, torch.randn(2, 4))
    check()


def gradient(model: nn.Module, params: dict[str, Tensor], adapters: dict[str, Rule], x: Tensor) -> object:
    return value_and_grad(lambda bound, x: bound(x).sum())(model, params, adapters, x)


class WritesElsewhere(nn.Module):
    """Writes to a weight that the adapter may or may not rewrite."""

    def __init__(self, write: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.write = write
        self.lin = nn.Linear(4, 4)
        self.gain = nn.Parameter(torch.ones(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.write(self.gain)
        return self.lin(x @ self.gain)


@pytest.mark.parametrize("call", [apply, trace_targets, gradient])
@pytest.mark.parametrize("kind", ["none", "full"])
@pytest.mark.parametrize("operation", [n for n in WRITES if n not in ("data", "requires_grad_")])
def test_writing_to_a_weight_that_is_not_rewritten_is_noticed(
    operation: str, kind: str, call: Callable[..., object]
) -> None:
    model = WritesElsewhere(WRITES[operation])
    params = base_params(model)
    adapters = lora(params, "lin.weight") | (lora(params, "gain", kind="full") if kind == "full" else {})
    message = r"params\['gain'\] was written to" if kind == "none" else r"adapters\['gain'\]\.value was written to"
    if kind == "full" and call is trace_targets:  # is lazy there, to see whether it is read
        message = "'gain': the model calls"
    with pytest.raises(PurityError, match=message):
        call(model, params, adapters, torch.randn(2, 4))


def test_writing_to_a_weight_is_noticed_in_inference_mode_and_under_vmap() -> None:
    model = WritesElsewhere(lambda w: w.mul_(0.9))
    params, x = base_params(model), torch.randn(2, 4)
    adapters = lora(params, "lin.weight")
    with torch.inference_mode(), pytest.raises(PurityError, match=r"params\['gain'\] was written"):
        apply(model, params, adapters, x)
    with pytest.raises(PurityError, match=r"params\['gain'\] was written"):
        torch.vmap(lambda x: apply(model, params, adapters, x))(x)


def test_tensors_without_a_count_of_writes_can_be_applied() -> None:
    model, params, adapters = setup()
    with torch.inference_mode():
        params = {name: value.clone() for name, value in params.items()}
        x = torch.randn(3, 4)
        close(apply(model, params, adapters, x), apply(model, dict(params), adapters, x), 0)


def test_writing_to_weights_between_calls_is_allowed() -> None:
    model, params, _ = setup()
    adapters, x = lora(params, "body.0.bias", kind="full"), torch.randn(3, 4)
    first = apply(model, params, adapters, x)
    params["norm.weight"].mul_(2)
    adapters["body.0.bias"].value.add_(1)
    assert distance(apply(model, params, adapters, x), first) > 1e-2


def test_the_error_of_the_model_comes_before_that_of_a_write() -> None:
    def write(w: Tensor) -> None:
        w.mul_(2)
        raise ZeroDivisionError("the model's own")

    model = WritesElsewhere(write)
    with pytest.raises(ZeroDivisionError, match="the model's own"):
        apply(model, base_params(model), {}, torch.randn(2, 4))


def test_embedding_bag_with_max_norm_does_not_write_to_params() -> None:
    model = nn.EmbeddingBag(5, 3, max_norm=0.5)
    params, ids = base_params(model), torch.tensor([[0, 1, 1]])
    for adapters in ({}, {"weight": make_rule("lora", Embedding(), params["weight"], gen(1))},
                     {"weight": make_rule("full", Embedding(), params["weight"], gen(1))}):  # fmt: skip
        check = snapshot(model, params, adapters)
        output = apply(model, params, adapters, ids)
        check()
        weight = oracle(params["weight"], adapters["weight"]) if adapters else params["weight"].clone()
        close(output, F.embedding_bag(ids, weight, max_norm=0.5), 1e-6)


ONE = torch.ones(1)
ONES = LoRA(torch.ones(1, 4), torch.ones(5, 1))


@pytest.mark.parametrize("call", [bind, lambda *args: apply(*args, torch.randn(3, 4))], ids=["bind", "apply"])
@pytest.mark.parametrize(
    ("remove", "add", "adapters", "message"),
    [
        ("body.0.bias", {}, {}, r"lack 'body.0.bias', which Net needs.*base_params.*Near names: body.2.bias"),
        ("norm.running_mean", {}, {}, r"lack 'norm.running_mean'.*Near names: norm.running_var"),
        ("", {"body.0.wieght": ONE}, {}, r"hold 'body.0.wieght', which Net.*Near names: body.0.weight"),
        ("", {"body.0.bias": ONE}, {}, r"params\['body.0.bias'\] has shape \[1\], expected \[5\]"),
        ("", {"norm.running_mean": ONE}, {}, r"'norm.running_mean'.* has shape \[1\], expected \[4\]"),
        ("", {}, {"body.0.wieght": ONES}, r"rewrite 'body.0.wieght', which params do not hold.*body.0.weight"),
        ("", {}, {"body.2.weight": ONES}, r"'body.2.weight': a has shape \[1, 4\], expected \[1, 5\]"),
        ("", {}, {"body.0.bias": ONES}, r"'body.0.bias' has shape \[5\]; a low-rank update needs two"),
    ],
    ids=["missing", "missing-buffer", "unexpected", "shape", "buffer-shape", "unknown", "factor", "vector"],
)
def test_names_and_shapes_that_do_not_fit_are_refused(
    remove: str, add: dict[str, Tensor], adapters: dict[str, Any], message: str, call: Callable[..., Any]
) -> None:
    model, params, _ = setup()
    params = {name: value for name, value in (params | add).items() if name != remove}
    with pytest.raises(ParamsError, match=message):
        call(model, params, adapters)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_rewriting_a_buffer_is_refused(kind: str) -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.randn(4, 3))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.table)  # type: ignore[arg-type]

    model, x = Table(), torch.randn(2, 3)
    params = base_params(model)
    adapters = lora(params, "table", kind=kind)
    with pytest.raises(ParamsError, match=r"'table'.*buffer"):
        apply(model, params, adapters, x)


def test_lazy_modules_are_refused_until_they_are_initialised() -> None:
    model = nn.LazyLinear(3)
    with pytest.raises(ParamsError, match=r"'weight' is not initialised yet\. Run the model once"):
        base_params(model)


def test_base_params_are_detached_and_share_storage() -> None:
    model, params, _ = setup()
    assert set(params) == set(model.state_dict())
    for name, value in params.items():
        assert not value.requires_grad
        assert value.data_ptr() == model.state_dict()[name].data_ptr()
    tied = nn.ModuleList([nn.Linear(2, 2)] * 2)
    assert list(base_params(tied)) == list(tied.state_dict())
