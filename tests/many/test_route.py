"""An adapter for every row: equal to a loop over the rows, or refused, never mixed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import optree as _optree
import pytest
import torch
from cases import CASES, Case, gen, gpt2, llama, make_adapters, make_rule
from oracle import close, tensors
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from funclora import Full, LoraConfig, apply, base_params, bind, init, merge, route, stack
from funclora.errors import ConfigError, UnsupportedError
from funclora.rules.dora import output_norms_of_many
from funclora.rules.layouts import Linear

optree: Any = _optree
pytestmark = [
    pytest.mark.filterwarnings("ignore::funclora.errors.DenseFallbackWarning"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]

F64 = torch.float64
TOLERANCE = {F64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 4e-2}
IDS = [2, 0, -1, 2, 1]
# Cases that have no rows, lose them, or read the weight as a whole.
ROWS_NOT_FIRST = ("experts-loop", "experts-loop-t", "mha-separate")  # a first dimension of experts, or of positions
REFUSED = {
    "linear-vector": "one input, without rows",
    "experts-bmm": "experts are not rows", "experts-bmm-t": "experts are not rows",
    "lstm": "sequence first: the first dimension counts steps", "gru": "as lstm", "rnn": "as lstm",
    "mha": "sequence first: the first dimension counts positions",
    "embedding-scale-grad": "counts ids over the whole batch", "embedding-all": "counts ids over the whole batch",
    "gpt2": "wpe is read by positions, which are no rows",
}  # fmt: skip


def rows(x: Any, n: int = 5) -> Any:
    """The inputs with n different examples."""

    def more(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.dim() < 2 or x.shape[0] == x.shape[1]:
            return x
        first = torch.cat([x.roll(k, -1) if k else x for k in range(n)])
        return first[:n]

    return tree_map(more, x)


def at(x: Any, i: int) -> Any:
    return tree_map(lambda x: x[i : i + 1] if isinstance(x, Tensor) and x.dim() > 1 and len(x) == 5 else x, x)


def setup(case: Case, dtype: torch.dtype = F64) -> tuple[Any, Any, Any, Any]:
    s = case.setup(dtype)
    return s.model, s.params, rows(s.args), rows(s.kwargs)


def members(case: Case, params: Any, kind: str) -> list[Any]:
    if kind == "stack":  # of all kinds
        return [make_adapters(case, params, k, gen(i)) for i, k in enumerate(("lora", "mixed", "full"))]
    return [
        {n: r if r.scaling is None else r.with_scaling(0.5 + i)
         for n, r in make_adapters(case, params, kind, gen(i)).items()} for i in range(3)
    ]  # fmt: skip


def one(model: nn.Module, params: Any, alone: list[Any], ids: list[int], i: int, args: Any, kwargs: Any) -> Any:
    return apply(model, params, {} if ids[i] < 0 else alone[ids[i]], *at(args, i), **at(kwargs, i))


def check_rows(output: Any, expected: list[Any], tolerance: float) -> None:
    for k, got in enumerate(tensors(output)):
        want = [tensors(each)[k] for each in expected]
        if got.dim() and got.shape[0] == len(want):
            close(got, torch.cat(want), tolerance)


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("kind", ["lora", "dora", "full", "stack"])
@pytest.mark.parametrize("case", [case for case in CASES if case.name not in ROWS_NOT_FIRST], ids=str)
def test_routed_rows_equal_a_loop(case: Case, kind: str, as_tensor: bool) -> None:
    model, params, args, kwargs = setup(case)
    alone = members(case, params, kind)
    ids = torch.tensor(IDS) if as_tensor else IDS
    by_member = as_tensor and kind in ("full", "stack") and case.name != "lstm-proj"
    if case.name in REFUSED or by_member:
        if case.name in ("embedding-scale-grad", "embedding-all") and kind == "full" and not as_tensor:
            return  # a plain table: torch counts the ids itself
        # Inputs without examples are cut into rows all the same here: torch may be the one to refuse them.
        refused = (UnsupportedError, RuntimeError) if "experts" in case.name or "mha" in case.name else UnsupportedError
        with pytest.raises(refused, match=r"row|whole|form|size|shape|expected|dimension"):
            apply(model, params, route(stack(alone), ids), *args, **kwargs)
        return
    output = apply(model, params, route(stack(alone), ids), *args, **kwargs)
    expected = [one(model, params, alone, IDS, i, args, kwargs) for i in range(5)]
    check_rows(output, expected, TOLERANCE[F64])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["linear", "embedding", "conv2d", "gpt2-conv1d", "llama"])
def test_in_other_dtypes(name: str, dtype: torch.dtype) -> None:
    case = next(case for case in CASES if case.name == name)
    model, params, args, kwargs = setup(case, dtype)
    for kind in ("lora", "dora"):
        alone = [make_adapters(case, params, kind, gen(i), torch.float32) for i in range(3)]
        with torch.no_grad():
            output = apply(model, params, route(stack(alone), IDS), *args, **kwargs)
            check_rows(output, [one(model, params, alone, IDS, i, args, kwargs) for i in range(5)],
                       TOLERANCE[dtype] * (2 if name == "llama" else 1))  # fmt: skip


def mlp(dtype: torch.dtype = F64) -> tuple[nn.Module, dict[str, Tensor]]:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype).eval()
    return model, base_params(model)


def ranks(params: dict[str, Tensor], *kinds: tuple[str, int], rate: float = 0.0) -> list[Any]:
    return [
        {n: replace(make_rule(kind, Linear(), params[n], gen(7 * i + j), r=r), scaling=1 / r, dropout=rate)
         for j, n in enumerate(("0.weight", "2.weight"))}
        for i, (kind, r) in enumerate(kinds)
    ]  # fmt: skip


ALL = (("lora", 1), ("dora", 3), ("lora", 8), ("lora", 64), ("dora", 2), ("lora", 2), ("dora", 64))


@pytest.mark.parametrize(
    "ids",
    [[0], [-1], [-1, -1, -1], [6, 5, 4, 3, 2, 1, 0], [0] * 5, [3, -1, 3, 3, 0, 3, 3, 2, 2, 6, 5, 0, 1], [1, 0, 1, 0]],
)
def test_any_order_counts_and_ranks(ids: list[int]) -> None:
    model, params = mlp()
    alone = ranks(params, *ALL)
    x = torch.randn(len(ids), 3, 6, dtype=F64)
    expected = torch.cat([apply(model, params, alone[j] if j >= 0 else {}, x[i : i + 1]) for i, j in enumerate(ids)])
    for given in (ids, torch.tensor(ids)):
        close(apply(model, params, route(stack(alone), given), x), expected, 1e-11)
    close(apply(model, params, route(stack(alone), ids), x[:, 0]), expected[:, 0], 1e-11)


@pytest.mark.parametrize("ids", [[0, 1, 2, 3, 4, 5], [5, 3, 4], [1, 4, 3, -1, 3], [2, 0, 1], [5, 5, 3, 3]], ids=str)
def test_most_members_of_a_stack_are_routed_without_a_copy(ids: list[int]) -> None:
    model, params = mlp()
    alone = ranks(params, *[("dora", 2)] * 6)
    several = stack(alone)
    routed: Any = route(several, ids)
    memory = {value.untyped_storage().data_ptr() for value in several.groups[0].values}
    for rule in routed.values():
        assert {getattr(rule.rules[0], leaf).untyped_storage().data_ptr() for leaf in ("a", "b")} <= memory
    x = torch.randn(len(ids), 3, 6, dtype=F64)
    expected = torch.cat([apply(model, params, alone[j] if j >= 0 else {}, x[i : i + 1]) for i, j in enumerate(ids)])
    close(apply(model, params, routed, x), expected, 1e-11)
    bound = bind(model, params, routed)
    with torch.no_grad():  # the second time with B in another order in memory
        close(bound(x[:, :1]), expected[:, :1], 1e-11)
        close(bound(x[:, :1]), expected[:, :1], 1e-11)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_gradients_equal_a_loop(as_tensor: bool) -> None:
    model, params = mlp()
    alone = ranks(params, *ALL[:5])
    ids = [4, 0, 1, 4, -1, 2]
    x = torch.randn(6, 3, 6, dtype=F64, requires_grad=True)
    weight = torch.randn(6, 3, 4, dtype=F64)

    def grads(several: Callable[[list[Any]], Tensor]) -> list[Tensor]:
        leaves, spec = optree.tree_flatten(alone)
        leaves = [leaf.clone().requires_grad_() for leaf in leaves]
        y = several(optree.tree_unflatten(spec, leaves))
        found = torch.autograd.grad((y * weight).sum(), [*leaves, x], allow_unused=True)
        return [torch.zeros_like(w) if g is None else g for g, w in zip(found, [*leaves, x], strict=True)]

    given = torch.tensor(ids) if as_tensor else ids
    routed = grads(lambda each: apply(model, params, route(stack(each), given), x))
    loop = grads(
        lambda each: torch.cat(
            [apply(model, params, each[j] if j >= 0 else {}, x[i : i + 1]) for i, j in enumerate(ids)]
        )
    )
    for got, want in zip(routed, loop, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_weights_mix_the_changes_of_the_members() -> None:
    model, params = mlp()
    alone = [*ranks(params, *ALL[:3]), {"0.weight": Full(torch.randn(8, 6, dtype=F64)),
                                        "2.bias": Full(torch.randn(4, dtype=F64))}]  # fmt: skip
    x = torch.randn(5, 3, 6, dtype=F64)
    weights = torch.randn(5, 4, dtype=F64, requires_grad=True)
    output = apply(model, params, route(stack(alone), weights=weights), x)
    merged = [merge(params, each) for each in alone]
    expected = []
    for i in range(5):
        mixed = {n: w + sum(weights[i, j] * (merged[j][n] - w) for j in range(4)) for n, w in params.items()}
        expected.append(torch.func.functional_call(model, mixed, (x[i : i + 1],)))
    close(output, torch.cat(expected), 1e-10)
    found = torch.autograd.grad(output.square().sum(), weights)
    close(found, torch.autograd.grad(torch.cat(expected).square().sum(), weights), 1e-9)


@pytest.mark.parametrize("ids", [[0, 1, 1, -1], torch.tensor([0, 1, 1, -1])], ids=["list", "tensor"])
def test_dropout_runs_in_training_mode_alone(ids: Any) -> None:
    model, params = mlp()
    alone = ranks(params, ("lora", 2), ("dora", 2), rate=0.5)
    x = torch.randn(4, 6, dtype=F64)
    routed = route(stack(alone), ids)
    quiet = apply(model, params, routed, x)
    close(apply(model, params, routed, x), quiet, 1e-12)
    model.train()
    loud = apply(model, params, routed, x)
    assert all(not torch.allclose(loud[i], quiet[i]) for i in range(3))
    close(loud[3], quiet[3], 1e-12)  # the base model


# --- models ----------------------------------------------------------------------------------------------------


def bert() -> Any:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(vocab_size=17, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
                                intermediate_size=12, max_position_embeddings=16))  # fmt: skip


def t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(T5Config(vocab_size=17, d_model=8, d_kv=4, d_ff=12, num_layers=2, num_heads=2,
                                               decoder_start_token_id=0))  # fmt: skip


def vit() -> Any:
    from transformers import ViTConfig, ViTModel

    return ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12,
                              image_size=8, patch_size=4))  # fmt: skip


def resnet() -> Any:
    from transformers import ResNetConfig, ResNetModel

    return ResNetModel(ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1]))


def text(n: int) -> dict[str, Tensor]:
    torch.manual_seed(n)
    mask = torch.ones(n, n, dtype=torch.long)  # as many positions as rows
    mask[1, :2] = 0  # padded on the left
    return {"input_ids": torch.randint(1, 16, (n, n)), "attention_mask": mask}


def images(n: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(n, 3, 8, 8, generator=gen(n), dtype=F64)}


MODELS: dict[str, tuple[Callable[[], Any], list[str], Callable[[int], dict[str, Tensor]]]] = {
    "llama": (llama, ["q_proj", "o_proj", "down_proj", "lm_head"], text),
    "gpt2": (gpt2, ["c_attn", "c_proj", "wte"], text),
    "bert": (bert, ["query", "value", "dense", "word_embeddings"], text),
    "t5": (t5, ["q", "v", "wo", "lm_head"], lambda n: text(n) | {"decoder_input_ids": text(n)["input_ids"]}),
    "vit": (vit, ["q_proj", "query", "v_proj", "value", "projection"], images),
    "resnet": (resnet, ["convolution"], images),
}  # fmt: skip


def real(name: str) -> tuple[Any, Any, list[Any], Callable[[int], dict[str, Tensor]]]:
    make, targets, inputs = MODELS[name]
    torch.manual_seed(0)
    model = make().to(F64).eval()
    if name in ("llama", "gpt2"):
        model.set_attn_implementation("sdpa")  # eager attention makes NaN of padding in float64
    present = [t for t in targets if any(n.split(".")[-1] == t for n, _ in model.named_modules())]
    alone = []
    for seed, (r, dora) in enumerate(((1, False), (4, True), (2, False))):
        torch.manual_seed(seed)
        config = LoraConfig(r=r, lora_alpha=4, target_modules=present, use_dora=dora, init_lora_weights=False,
                            layers_to_transform=None)  # fmt: skip
        alone.append(optree.tree_map(lambda x: x.to(F64) + 0.05 * torch.randn_like(x, dtype=F64), init(model, config)))
    return model, base_params(model), alone, inputs


def output_of(name: str, model: Any, params: Any, adapters: Any, given: Any) -> Tensor:
    out = apply(model, params, adapters, **given)
    return out.logits if name in ("llama", "gpt2", "t5") else out.last_hidden_state


@pytest.mark.parametrize("name", MODELS)
def test_rows_of_a_transformer_equal_the_loop_and_see_no_other(name: str) -> None:
    model, params, alone, inputs = real(name)
    ids, given = [2, 0, 1, -1], inputs(4)
    with torch.no_grad():
        output = output_of(name, model, params, route(stack(alone), ids), given)
        for i, j in enumerate(ids):
            own = output_of(
                name, model, params, alone[j] if j >= 0 else {}, {k: v[i : i + 1] for k, v in given.items()}
            )
            seen = given["attention_mask"][i].bool() if "attention_mask" in given and name != "t5" else slice(None)
            close(output[i][seen], own[0][seen], 1e-9)
        for k in range(3):  # another member, and other data for its row
            row = ids.index(k)
            others = [optree.tree_map(lambda x: x * 3 + 1, m) if i == k else m for i, m in enumerate(alone)]
            changed = {n: v.clone() for n, v in given.items()}
            for n, v in changed.items():
                v[row] = v[row].flip(-1) if n != "attention_mask" else v[row]
            after = output_of(name, model, params, route(stack(others), ids), changed)
            for i in range(4):
                assert torch.equal(after[i], output[i]) == (i != row)


class Model(nn.Module):
    """Two layers with something in between."""

    def __init__(self, between: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.between, self.after = between, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.two(self.between(self.one(x))))


MIXING: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda x: x - x.mean(0), "array": lambda x: x + torch.from_numpy(x.detach().numpy()).flip(0),
    "list": lambda x: x + torch.tensor(x.tolist()).flip(0), "median": lambda x: x + torch.stack([x.median()] * 4),
    "softmax": lambda x: x.softmax(0), "cumsum": lambda x: x.cumsum(0), "across": lambda x: x + x.flip(0),
    "outer": lambda x: torch.einsum("bi,cj->cj", x, x), "unknown": lambda x: torch.linalg.qr(x).Q,
    "write": lambda x: x.index_copy(0, torch.tensor([0]), x[1:2]),
}  # fmt: skip


def mix_adapters(params: dict[str, Tensor]) -> list[Any]:
    return [{n: make_rule("lora", Linear(), params[n], gen(i)) for n in ("one.weight", "two.weight")} for i in range(3)]


@pytest.mark.parametrize("name", MIXING)
def test_models_that_mix_rows_are_refused(name: str) -> None:
    x = torch.randn(4, 4)  # whatever is counted, there are four
    for model in (Model(MIXING[name]), Model(lambda x: x, MIXING[name])):
        params = base_params(model)
        for ids in ([0, 1, 2, -1], torch.tensor([0, 1, 2, -1])):
            with pytest.raises(UnsupportedError, match="row"):
                apply(model, params, route(stack(mix_adapters(params)), ids), x)


KEEPING: dict[str, Callable[[Tensor], Tensor]] = {
    "sequence first": lambda x: x.transpose(0, 1), "tokens": lambda x: x.flatten(0, 1),
    "sequence first tokens": lambda x: x.transpose(0, 1).unsqueeze(0),
    "heads": lambda x: x.unflatten(-1, (2, 2)).flatten(2),
    "flip within": lambda x: x.flatten(1).view_as(x), "norm": lambda x: nn.functional.layer_norm(x, (4,)),
    "attend": lambda x: nn.functional.scaled_dot_product_attention(x, x, x),
}  # fmt: skip


@pytest.mark.parametrize("name", KEEPING)
def test_models_that_move_rows_are_followed(name: str) -> None:
    model = Model(KEEPING[name]).double()
    params = base_params(model)
    alone = mix_adapters(params)
    x = torch.randn(4, 4, 4, dtype=F64)
    output = apply(model, params, route(stack(alone), [2, 0, 1, -1]), x)
    each = [apply(model, params, alone[j] if j >= 0 else {}, x[i : i + 1]) for i, j in enumerate([2, 0, 1, -1])]
    dim = {"sequence first": 1, "sequence first tokens": 2}.get(name, 0)
    close(output, torch.cat(each, dim), 1e-11)


@pytest.mark.parametrize("last", [False, True])
def test_batch_statistics_are_refused(last: bool) -> None:
    parts = [nn.Linear(4, 4), nn.BatchNorm1d(4), *([] if last else [nn.Linear(4, 4)])]
    model = nn.Sequential(*parts).double().train()
    params = base_params(model)
    alone = [{"0.weight": make_rule("lora", Linear(), params["0.weight"], gen(i))} for i in range(2)]
    x = torch.randn(4, 4, dtype=F64)
    with pytest.raises(UnsupportedError, match="batch_norm"):
        apply(model, params, route(stack(alone), [0, 1, 0, 1]), x)
    model.eval()
    loop = [apply(model, params, alone[i % 2], x[i : i + 1]) for i in range(4)]
    close(apply(model, params, route(stack(alone), [0, 1, 0, 1]), x), torch.cat(loop), 1e-11)


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 2}], ids=str)
def test_generate_gives_the_tokens_of_separate_runs(options: dict[str, Any]) -> None:
    model, params, alone, inputs = real("llama")
    given, ids = inputs(4), [2, 0, 1, -1]
    common = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, **options}
    bound = bind(model, params, route(stack(alone), ids, repeats=options.get("num_beams", 1)))
    together = bound.generate(**given, **common)
    for i, j in enumerate(ids):
        one = bind(model, params, alone[j] if j >= 0 else {}).generate(
            **{k: v[i : i + 1] for k, v in given.items()}, **common
        )
        assert together[i, : one.shape[1]].tolist() == one[0].tolist()


def test_threads_have_routes_of_their_own() -> None:
    model, params = mlp()
    alone, x = ranks(params, *ALL[:4]), torch.randn(4, 6, dtype=F64)
    several = stack(alone)
    routes = [[0, 1, 2, 3], [3, 2, 1, 0], [-1, 0, -1, 3], [2, 2, 2, 1]]
    expected = [torch.cat([apply(model, params, alone[j] if j >= 0 else {}, x[i : i + 1]) for i, j in enumerate(ids)])
                for ids in routes]  # fmt: skip
    wrong: list[Any] = []

    def work(k: int) -> None:
        for _ in range(20):
            got = apply(model, params, route(several, routes[k]), x)
            if not torch.allclose(got, expected[k], atol=1e-9):
                wrong.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_transforms_of_a_routed_model() -> None:
    model, params = mlp()
    alone, x = ranks(params, *ALL[:3]), torch.randn(4, 6, dtype=F64)
    ids = [0, 2, 1, -1]

    def loss(members: Any, x: Tensor) -> Tensor:
        return apply(model, params, route(members, ids), x).square().sum()

    several = stack(alone)
    grads = torch.func.grad(loss)(several, x)
    leaves, spec = optree.tree_flatten(several)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    expected = torch.autograd.grad(loss(optree.tree_unflatten(spec, leaves), x), leaves)
    close(optree.tree_leaves(grads), list(expected), 1e-11)
    direction = torch.randn_like(x)
    several = optree.tree_map(Tensor.detach, several)
    _, slope, *_ = torch.func.jvp(lambda x: loss(several, x), (x,), (direction,))
    close(slope, (torch.func.grad(loss, 1)(several, x) * direction).sum(), 1e-10)
    many = torch.randn(3, 4, 6, dtype=F64)
    close(torch.func.vmap(lambda x: loss(several, x))(many), torch.stack([loss(several, x) for x in many]), 1e-10)


def test_what_does_not_fit_is_refused() -> None:
    model, params = mlp()
    several = stack(ranks(params, *ALL[:2]))
    wrong: list[Any] = [[0, 2], [-2], [], [0.5], [True]]
    for ids in wrong:
        with pytest.raises(ConfigError, match="ids"):
            route(several, ids)
    with pytest.raises(ConfigError, match="either"):
        route(several)
    with pytest.raises(ConfigError, match="weights"):
        route(several, weights=torch.ones(3, 3))
    with pytest.raises(ConfigError, match="repeats"):
        route(several, [0], repeats=0)
    with pytest.raises(UnsupportedError, match="3 rows"):
        apply(model, params, route(several, [0, 1, 0]), torch.randn(4, 6, dtype=F64))


@pytest.mark.parametrize("weight", ["rows", "columns", "half"])
@pytest.mark.parametrize("left", [1.0, 1e-2, 1e-4])
def test_the_norms_of_many_members_keep_their_digits(left: float, weight: str) -> None:
    g = torch.Generator().manual_seed(0)
    matrix = torch.randn(40, 24, generator=g)
    matrix = matrix.bfloat16() if weight == "half" else matrix.mT.contiguous().mT if weight == "columns" else matrix
    a = torch.randn(3, 24, 24, generator=g) / 5
    # Members whose updates cancel the weight up to the share that is left, and one that does not.
    b = torch.linalg.solve(a.double(), matrix.double(), left=False).float() * -(1 - left)
    b[1] = torch.randn(40, 24, generator=g)
    s = torch.tensor([1.0, 0.5, 1.0])
    dense = matrix.double() + s.double()[:, None, None] * (b.double() @ a.double())
    found = output_norms_of_many(matrix, a, b, s)
    torch.testing.assert_close(found, dense.norm(dim=-1), rtol=1e-5, atol=0)


def test_rows_that_cancel_are_zero_as_they_are_alone() -> None:
    matrix, eye = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, 2.0]]), torch.eye(2)[None]
    b = -matrix[None] * torch.tensor([1.0, 0.0, 0.5])[:, None]
    found = output_norms_of_many(matrix, eye, b, torch.ones(1))
    torch.testing.assert_close(found, torch.tensor([[0.0, 0.0, 1.25**0.5]], dtype=F64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dora_by_row_in_the_dtypes_of_models(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 8)).to(dtype)
    params, g = base_params(model), torch.Generator().manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", use_dora=True, init_lora_weights=False)
    members = [init(model, config, generator=g) for _ in range(5)]
    x = torch.randn(6, 24, generator=g).to(dtype)
    ids = [4, 0, -1, 3, 3, 1]
    found = apply(model, params, route(stack(members), ids), x)
    for i, member in enumerate(ids):
        alone = apply(model, params, members[member] if member >= 0 else {}, x[i : i + 1])
        tolerance = 1e-6 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(found[i : i + 1], alone, rtol=tolerance, atol=tolerance)


def test_a_weight_for_each_row_has_no_memory() -> None:
    model = nn.Linear(4, 3)
    params = base_params(model)
    members = stack([init(model, LoraConfig(r=1, target_modules="all-linear")) for _ in range(2)])
    assert bind(model, params, route(members, [0, 1])).weight.data_ptr() == 0
