"""Rules of tables of tokens, of biases that are added to, and of tied weights."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from cases import gen, llama
from oracle import close, distance
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

import funclora as fl
from funclora import Delta, Full, LoRA, LoraConfig, Tied, TrainableTokens
from funclora.errors import ConfigError, ParamsError, TargetError, TiedWeightsWarning, UnsupportedError, strict
from funclora.rules.layouts import Embedding, Linear

IDS = torch.tensor([[1, 2, 6, 2], [4, 0, 5, 2]])


class Net(nn.Module):
    """A table that is looked up, and read as an output layer in one way or another."""

    def __init__(self, read: Callable[..., Tensor], **options: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4, **options)
        self.mix = nn.Linear(4, 4)
        self.bias = nn.Parameter(torch.randn(7))
        self.read = read

    def forward(self, ids: Tensor) -> Tensor:
        h = self.mix(self.embed(ids))
        return self.read(h, self.embed.weight, self.bias)


READS: dict[str, Callable[..., Tensor]] = {
    "embedding": lambda h, w, b: h,
    "linear": lambda h, w, b: F.linear(h, w),
    "linear-bias": F.linear,
    "linear-vector": lambda h, w, b: F.linear(h[0, 0], w, b),
    "linear-transposed": lambda h, w, b: F.linear(F.linear(h, w).softmax(-1), w.T),
    "matmul-transposed": lambda h, w, b: h @ w.T + b,
    "matmul": lambda h, w, b: (h @ w.t()).softmax(-1) @ w,
    "left": lambda h, w, b: w @ h.mT,
    "left-transposed": lambda h, w, b: w.mT @ (w @ h.mT),
    "addmm": lambda h, w, b: torch.addmm(b, h[0], w.T),
    "part": lambda h, w, b: F.linear(h[..., :2], w.narrow(1, 1, 2)),
}


def tokens(*indices: int, dim: int = 4, dtype: torch.dtype = torch.float64) -> TrainableTokens:
    value = torch.randn((len(indices), dim), generator=gen(1), dtype=torch.float64)
    return TrainableTokens(value.to(dtype), token_indices=indices)


def merged_call(model: nn.Module, adapters: Any, *args: Any) -> Tensor:
    merged = {name: value.clone() for name, value in fl.merge(fl.base_params(model), adapters).items()}
    return functional_call(model, merged, args, tie_weights=False)


@pytest.mark.parametrize("name", READS)
def test_rows_are_replaced_wherever_the_table_is_read_without_a_dense_table(name: str) -> None:
    model = Net(READS[name]).double()
    adapters = {"embed.weight": tokens(2, 6, 0)}
    params = fl.base_params(model)

    with strict():
        actual = fl.apply(model, params, adapters, IDS)

    close(actual, merged_call(model, adapters, IDS), 1e-12)
    assert distance(actual, model(IDS)) > 1e-2
    grads = torch.func.grad(lambda a: fl.apply(model, params, a, IDS).square().sum())(adapters)
    expected = torch.func.grad(lambda a: merged_call(model, a, IDS).square().sum())(adapters)
    close(grads, expected, 1e-12)
    assert all(leaf.abs().sum() > 0 for leaf in pytree.tree_leaves(grads))


@pytest.mark.parametrize("options", [{"padding_idx": 2}, {"max_norm": 1.0}, {"scale_grad_by_freq": True}], ids=str)
def test_what_a_table_does_besides_is_kept(options: dict[str, Any]) -> None:
    model = Net(READS["embedding"], **options).double()
    adapters = {"embed.weight": tokens(2, 6)}
    params = fl.base_params(model)
    before = {name: value.clone() for name, value in params.items()}

    def loss(rule: TrainableTokens) -> Tensor:
        return fl.apply(model, params, {"embed.weight": rule}, IDS).square().sum()

    leaf = adapters["embed.weight"].value.clone().requires_grad_()
    table = params["embed.weight"].index_copy(0, torch.tensor([2, 6]), leaf)
    # max_norm writes into the table it is given, outside of autograd
    plain = functional_call(model, params | {"embed.weight": table * 1}, (IDS,)).square().sum()
    close(fl.apply(model, params, adapters, IDS), merged_call(model, adapters, IDS), 1e-6)
    if "max_norm" not in options:
        (expected,) = torch.autograd.grad(plain, leaf)
        close(torch.func.grad(loss)(adapters["embed.weight"]).value, expected, 1e-12)
    assert all(torch.equal(params[name], value) for name, value in before.items())


def test_a_vmap_and_a_compiled_call_are_the_loop() -> None:
    model = Net(READS["linear-bias"]).double()
    params = fl.base_params(model)
    members = [{"embed.weight": TrainableTokens(torch.randn(2, 4).double(), token_indices=(3, 2))} for _ in range(3)]
    loop = torch.stack([fl.apply(model, params, member, IDS) for member in members])

    close(fl.vmap(lambda member: fl.apply(model, params, member, IDS))(fl.stack(members)), loop, 1e-12)
    compiled = torch.compile(lambda member: fl.apply(model, params, member, IDS), fullgraph=True, backend="aot_eager")
    close(compiled(members[1]), loop[1], 1e-12)


def test_half_precision_rows_are_rounded_once() -> None:
    model = Net(READS["linear"]).bfloat16()
    adapters = {"embed.weight": tokens(1, 5, dtype=torch.float32)}
    merged = fl.merge(fl.base_params(model), adapters)["embed.weight"]
    assert torch.equal(merged[[1, 5]], adapters["embed.weight"].value.bfloat16())
    assert torch.equal(fl.apply(model, fl.base_params(model), adapters, IDS), merged_call(model, adapters, IDS))


@pytest.mark.parametrize(("rule", "message"), [
    (lambda: TrainableTokens(cast(Any, [1.0]), token_indices=(1,)), "value: expected a tensor, got list"),
    (lambda: TrainableTokens(torch.ones(1, 4), token_indices=cast(Any, [1])), "expected a tuple of ids"),
    (lambda: TrainableTokens(torch.ones(1, 4), token_indices=()), "expected a tuple of ids"),
    (lambda: TrainableTokens(torch.ones(1, 4), token_indices=(-1,)), "expected a tuple of ids from 0 up"),
    (lambda: TrainableTokens(torch.ones(2, 4), token_indices=(1, 1)), "expected different ids"),
    (lambda: TrainableTokens(torch.ones(1, 4), token_indices=(7,)), "token 7 is not in the matrix, which has 7 rows"),
    (lambda: TrainableTokens(torch.ones(2, 4), token_indices=(1,)), "value has shape [2, 4], expected [1, 4]"),
    (lambda: Tied("mix.weight"), "tied to 'mix.weight', which has no rule of its own"),
    (lambda: Tied("embed.weight"), "tied to 'embed.weight', which has no rule of its own"),
    (lambda: Delta(torch.ones(4)), "value has shape [4], expected [7, 4]"),
    (lambda: Delta(cast(Any, 1.0)), "Delta.value: expected a tensor, got float"),
])  # fmt: skip
def test_rules_that_do_not_fit_are_refused(rule: Callable[[], Any], message: str) -> None:
    model = Net(READS["embedding"])
    with pytest.raises(ParamsError, match=re.escape(message)):
        fl.apply(model, fl.base_params(model), {"embed.weight": rule()}, IDS)


def test_tokens_of_what_is_no_table_are_refused() -> None:
    with pytest.raises(ParamsError, match=r"'bias' has shape \[7\].* needs a matrix"):
        fl.merge({"bias": torch.ones(7)}, {"bias": tokens(1)})


# --- a bias that is added to -----------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [torch.float64, torch.bfloat16], ids=str)
def test_delta_adds_to_the_parameter(base: torch.dtype) -> None:
    model = Net(READS["linear-bias"]).to(base)
    adapters = {"bias": Delta(torch.randn(7), scaling=0.5), "mix.bias": Delta(torch.randn(4), scaling=-2.0)}
    params = fl.base_params(model)
    wide = {name: params[name].double() + rule.scaling * rule.value.double() for name, rule in adapters.items()}

    merged = fl.merge(params, adapters)

    for name, expected in wide.items():
        close(merged[name].double(), expected, torch.finfo(base).eps if base.itemsize < 4 else 1e-7)
    assert torch.equal(fl.apply(model, params, adapters, IDS), merged_call(model, adapters, IDS))


# --- tied weights ----------------------------------------------------------------------------------------------


class Tying(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(ids)))


RULES: dict[str, Callable[[], Any]] = {
    "tokens": lambda: tokens(2, 1),
    "lora": lambda: LoRA(torch.randn(2, 7).double(), torch.randn(4, 2).double(), scaling=0.7, layout=Embedding()),
    "full": lambda: Full(torch.randn(7, 4).double()),
}


@pytest.mark.parametrize("kind", RULES)
def test_a_tied_weight_follows(kind: str) -> None:
    model, rule = Tying().double(), RULES[kind]()
    params = fl.base_params(model)
    adapters = {"head.weight": Tied("embed.weight"), "embed.weight": rule}

    merged = fl.merge(params, adapters)  # a warning would be an error

    assert merged["head.weight"] is merged["embed.weight"]
    close(fl.apply(model, params, adapters, IDS), functional_call(model, merged, (IDS,)), 1e-12)
    both = fl.value_and_grad(lambda bound: bound(IDS).square().sum())(model, params, adapters)[1]
    assert [type(g) for g in both.values()] == [Tied, type(rule)]
    dense = torch.func.grad(lambda r: functional_call(model, {"embed.weight": r.dense(params["embed.weight"])}, (IDS,))
                            .square().sum())(rule)  # fmt: skip
    close(both["embed.weight"], dense, 1e-12)
    assert fl.summary(params, adapters).trainable == sum(leaf.numel() for leaf in pytree.tree_leaves(rule))


def test_weights_that_are_not_the_same_follow_the_rule_on_their_own() -> None:
    params = {"a": torch.zeros(2, 2), "b": torch.ones(2, 2)}
    merged = fl.merge(params, {"a": LoRA(torch.ones(1, 2), torch.ones(2, 1)), "b": Tied("a")})
    assert merged["a"].tolist() == [[1, 1], [1, 1]]
    assert merged["b"].tolist() == [[2, 2], [2, 2]]


def test_one_side_alone_is_pointed_out() -> None:
    model = Tying()
    with pytest.warns(TiedWeightsWarning, match=r"only 'head\.weight' is rewritten"):
        fl.merge(fl.base_params(model), {"head.weight": tokens(1, dtype=torch.float32)})


# --- many adapters ---------------------------------------------------------------------------------------------


def members() -> list[dict[str, Any]]:
    lora = [LoRA(torch.randn(r, 4).double(), torch.randn(4, r).double(), scaling=s) for r, s in ((1, 0.5), (2, 3.0))]
    return [
        {"embed.weight": tokens(2, 1), "bias": Delta(torch.randn(7).double(), scaling=0.5), "mix.weight": lora[0]},
        {"embed.weight": tokens(0), "bias": Delta(torch.randn(7).double(), scaling=2.0), "mix.weight": lora[1]},
        {"embed.weight": Full(torch.randn(7, 4).double()), "mix.weight": lora[1]},
        {"mix.bias": Delta(torch.randn(4).double())},
        # of the same structure as the first one
        {"embed.weight": TrainableTokens(torch.randn(2, 4).double(), token_indices=(2, 1)),
         "bias": Delta(torch.randn(7).double(), scaling=0.5), "mix.weight": replace(lora[0], scaling=5.0)},
    ]  # fmt: skip


@pytest.mark.parametrize("read", ["embedding", "linear-bias"])
def test_every_row_has_its_own(read: str) -> None:
    model = Net(READS[read]).double()
    params, stack = fl.base_params(model), fl.stack(members())
    choice = [1, -1, 0, 3, 2, 4, 0]
    ids = torch.randint(7, (7, 5), generator=gen(3))

    actual = fl.apply(model, params, fl.route(stack, choice), ids)

    for row, i in enumerate(choice):
        alone = fl.apply(model, params, {} if i < 0 else stack[i], ids[row : row + 1])
        close(actual[row : row + 1], alone, 1e-12)
    assert [type(rule) for rule in fl.unstack(stack)[0].values()] == [TrainableTokens, Delta, LoRA]


def test_tied_weights_are_routed_with_what_they_follow() -> None:
    model = Tying().double()
    params = fl.base_params(model)
    a, b = torch.randn(2, 7).double(), torch.randn(4, 2).double()
    rules: list[Any] = [LoRA(a * s, b, scaling=s, layout=Embedding()) for s in (0.5, 2.0)]
    some = [{"embed.weight": rule, "head.weight": Tied("embed.weight")} for rule in [*rules, tokens(1, 2)]]
    ids = torch.randint(7, (4, 5), generator=gen(3))
    actual = fl.apply(model, params, fl.route(fl.stack(some), [2, 0, 1, 0]), ids)
    for row, i in enumerate([2, 0, 1, 0]):
        close(actual[row : row + 1], fl.apply(model, params, some[i], ids[row : row + 1]), 1e-12)
    mapped = fl.vmap(lambda member: fl.apply(model, params, member, ids))(fl.stack(some))
    close(mapped, torch.stack([fl.apply(model, params, member, ids) for member in some]), 1e-12)


def test_tokens_have_no_form_for_ids_that_are_a_tensor() -> None:
    model = Net(READS["embedding"]).double()
    routed = fl.route(fl.stack(members()), torch.tensor([0, 1]))
    with pytest.raises(UnsupportedError, match=r"Give route the ids as a list"):
        fl.apply(model, fl.base_params(model), routed, IDS)


# --- from a configuration --------------------------------------------------------------------------------------


def tied_llama(*, declared: bool = True) -> Any:
    model = llama()
    model.config.tie_word_embeddings = declared
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


def make(model: nn.Module, **fields: Any) -> dict[str, Any]:
    defaults: dict[str, Any] = {"target_modules": ["q_proj"], "layers_to_transform": [0]}
    return dict(fl.init(model, LoraConfig(**defaults | fields)))


def test_fresh_rows_are_those_of_the_table_and_fresh_deltas_are_zero() -> None:
    model = Net(READS["embedding"])
    adapters: dict[str, Any] = fl.init(
        model, LoraConfig(target_modules=["mix"], lora_bias=True, trainable_token_indices={"embed": [5, 1]})
    )
    assert torch.equal(adapters["embed.weight"].value, model.embed.weight[[5, 1]])
    assert adapters["embed.weight"].token_indices == (5, 1)
    assert adapters["mix.bias"].value.abs().sum() == 0
    assert adapters["mix.bias"].scaling == adapters["mix.weight"].scaling
    torch.testing.assert_close(fl.apply(model, fl.base_params(model), adapters, IDS), model(IDS))


def test_what_the_model_ties_follows_and_what_it_only_shares_does_not() -> None:
    assert make(tied_llama(), trainable_token_indices=[1])["lm_head.weight"].to == "model.embed_tokens.weight"
    assert "lm_head.weight" not in make(tied_llama(declared=False), trainable_token_indices=[1])
    assert "lm_head.weight" not in make(llama(), trainable_token_indices=[1])


REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "no such table": (llama, {"trainable_token_indices": {"wte": [1]}}, "'wte' matches no module"),
    "no table": (lambda: nn.Sequential(nn.Linear(2, 2)), {"target_modules": ["0"], "layers_to_transform": None,
                 "trainable_token_indices": [1]}, "A list is for the input embeddings"),
    "a name that ends alike": (llama, {"trainable_token_indices": {"tokens": [1]}}, "'tokens' names .*embed_tokens"),
    "outside of the table": (llama, {"trainable_token_indices": [1, 17]}, "has 17 rows; token 17 does not exist"),
    "no table of tokens": (llama, {"trainable_token_indices": {"model.norm": [1]}}, "is a LlamaRMSNorm; expected"),
    "a layer with a bias": (lambda: Net(READS["linear"]), {"target_modules": ["embed"], "layers_to_transform": None,
                            "trainable_token_indices": {"mix": [1]}}, "has a bias, which PEFT would leave out"),
    "a target of LoRA": (llama, {"target_modules": ["embed_tokens"], "layers_to_transform": None,
                         "trainable_token_indices": [1]}, "is also adapted by target_modules"),
    "saved in full": (llama, {"modules_to_save": ["embed_tokens"], "trainable_token_indices": [1]},
                      "is also adapted by modules_to_save"),
    "a tied target of LoRA": (tied_llama, {"target_modules": ["lm_head"], "layers_to_transform": None,
                              "trainable_token_indices": [1]}, "'lm_head.weight' is also adapted by target_modules"),
    "other tokens": (tied_llama, {"ensure_weight_tying": True,
                     "trainable_token_indices": {"embed_tokens": [1], "lm_head": [2]}}, "different tokens for tied"),
    "nothing tied": (llama, {"ensure_weight_tying": True}, "ties no weight to its input embeddings"),
    "tied outside of the adapter": (tied_llama, {"ensure_weight_tying": True}, "has nothing to tie. Name 'model.embed"),
    "tied magnitudes": (tied_llama, {"ensure_weight_tying": True, "use_dora": True, "target_modules": ["lm_head"],
                        "layers_to_transform": None}, "cannot be tied"),
    "tied with two ranks": (tied_llama, {"ensure_weight_tying": True, "target_modules": ["embed_tokens"],
                            "layers_to_transform": None, "rank_pattern": {".*embed_tokens": 2}}, "another rank or α"),
    "tied and excluded": (tied_llama, {"ensure_weight_tying": True, "target_modules": ["embed_tokens", "lm_head"],
                          "exclude_modules": ["lm_head"], "layers_to_transform": None}, "excludes one of"),
    "lora_bias without a bias": (llama, {"lora_bias": True}, "has no bias to which the bias of B could be merged"),
    "lora_bias of a table": (lambda: Net(READS["linear"]), {"lora_bias": True, "target_modules": ["embed"],
                             "layers_to_transform": None}, "is a weight of Embedding, whose"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_configurations_that_do_not_fit_are_refused(name: str) -> None:
    model, fields, message = REFUSED[name]
    with pytest.raises(TargetError, match=message):
        make(model(), **fields)


@pytest.mark.parametrize(("fields", "message"), [
    ({"trainable_token_indices": 3}, "trainable_token_indices: expected a list of token ids, got 3"),
    ({"trainable_token_indices": "12"}, "expected a list of token ids, got '12'"),
    ({"trainable_token_indices": [1, -1]}, "expected token ids from 0 up, got -1"),
    ({"trainable_token_indices": [True]}, "expected token ids from 0 up, got True"),
    ({"trainable_token_indices": [1, 2, 1]}, "trainable_token_indices: 1 appears twice"),
    ({"trainable_token_indices": {"e": []}}, "trainable_token_indices['e']: expected at least one token id"),
    ({"trainable_token_indices": {"": [1]}}, "expected names of modules, got ''"),
    ({"lora_bias": 1}, "lora_bias: expected True or False, got 1"),
    ({"ensure_weight_tying": None}, "ensure_weight_tying: expected True or False, got None"),
    ({"lora_bias": True, "use_dora": True}, "lora_bias and use_dora"),
    ({"lora_bias": True, "bias": "all"}, "lora_bias and bias='all' would train the biases of the targets twice"),
    ({"lora_bias": True, "target_parameters": ["w"]}, "lora_bias and target_parameters"),
    ({"lora_bias": True, "init_lora_weights": "gaussian"}, "needs init_lora_weights=True or False, got 'gaussian'"),
])  # fmt: skip
def test_values_that_mean_nothing_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        LoraConfig(target_modules=["q"], **fields)


def test_tokens_are_kept_as_tuples() -> None:
    assert LoraConfig(target_modules=["q"], trainable_token_indices=[3, 1]).tokens == {None: (3, 1)}
    assert LoraConfig(target_modules=["q"], trainable_token_indices={2, 1}).tokens == {None: (1, 2)}
    assert LoraConfig(target_modules=["q"], trainable_token_indices={"e": cast(Any, iter([3]))}).tokens == {"e": (3,)}
    assert LoraConfig(target_modules=["q"], trainable_token_indices=[]).tokens == {}


def test_an_output_layer_alone_can_have_tokens() -> None:
    head = LoRA(torch.ones(1, 4), torch.ones(7, 1), layout=Linear())
    assert head.layout == Linear()
    adapters = make(tied_llama(), trainable_token_indices={"lm_head": [1]})
    assert isinstance(adapters["lm_head.weight"], TrainableTokens)
    assert "model.embed_tokens.weight" not in adapters
