"""Ids for each token, and experts: every position is read by its own adapter, wherever the model moves it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import gen, llama
from oracle import close
from torch import Tensor

import funclora as fl
from funclora.errors import ConfigError, UnsupportedError

# Two rows of six sequences: their lengths, and the member of each.
PACKED = [[(5, 0), (6, 2), (3, -1), (4, 1)], [(9, 1), (9, 0)]]
IDS = [[member for length, member in row for _ in range(length)] for row in PACKED]
POSITIONS = torch.tensor([[t for length, _ in row for t in range(length)] for row in PACKED])


def experts(kind: str, **more: Any) -> Callable[[], Any]:
    def make() -> Any:
        import transformers

        small = {"vocab_size": 17, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
                 "num_attention_heads": 2, "num_key_value_heads": 2, "num_experts_per_tok": 2}  # fmt: skip
        config = getattr(transformers, f"{kind}Config")(**small, **more)
        model = getattr(transformers, f"{kind}ForCausalLM")(config)
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(0.3 * torch.randn_like(p) + (p.dim() < 2))
        return model

    return make


DEEPSEEK = {"n_routed_experts": 4, "moe_intermediate_size": 8, "n_group": 1, "topk_group": 1, "v_head_dim": 4,
            "first_k_dense_replace": 1, "q_lora_rank": 4, "kv_lora_rank": 4, "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4}  # fmt: skip
MODELS: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "mixtral": experts("Mixtral", num_local_experts=4),
    "qwen3": experts("Qwen3Moe", num_experts=4, moe_intermediate_size=8, head_dim=4),
    "gpt-oss": experts("GptOss", num_local_experts=4, head_dim=4),
    "deepseek": experts("DeepseekV3", **DEEPSEEK),
}


def setup(name: str, implementation: str, *, own: bool, dora: bool = False) -> tuple[Any, Any, list[Any]]:
    """A model in float32, which the products of experts need, and three members of different ranks."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    if name != "llama":
        model.set_experts_implementation(implementation)
    if name != "gpt-oss":
        model.set_attn_implementation("sdpa")
    stacked = sorted({".".join(n.split(".")[-2:]) for n, p in model.named_parameters() if p.dim() == 3})
    targets = ["q_b_proj", "o_proj"] if name == "deepseek" else ["q_proj", "o_proj"]
    members = []
    for seed, r in enumerate((2, 1, 3)):
        config = fl.LoraConfig(r=r, lora_alpha=4, target_modules=targets, use_dora=dora and seed == 1,
                               target_parameters=stacked if own and stacked else None)  # fmt: skip
        adapters: Any = fl.init(model, config, generator=gen(seed))
        members.append({n: replace(rule, b=0.3 * torch.randn(rule.b.shape, generator=gen(seed)))
                        for n, rule in adapters.items()})  # fmt: skip
    return model, fl.base_params(model), members


def tokens(rows: int, length: int) -> Tensor:
    return torch.randint(1, 16, (rows, length), generator=gen(rows))


def alone(model: Any, params: Any, members: list[Any], member: int, ids: Tensor) -> Tensor:
    out: Tensor = fl.apply(model, params, members[member] if member >= 0 else {}, ids).logits
    return out


def sequences() -> list[tuple[int, int, int, int]]:
    """The row, the first and the last token, and the member of each sequence."""
    found = []
    for row, parts in enumerate(PACKED):
        start = 0
        for length, member in parts:
            found.append((row, start, start + length, member))
            start += length
    return found


@pytest.mark.parametrize("own", [False, True], ids=["attention", "experts"])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "llama"])
def test_rows_of_experts_equal_each_row_alone(name: str, implementation: str, own: bool) -> None:
    model, params, members = setup(name, implementation, own=own, dora=True)
    ids, chosen = tokens(5, 7), [2, 0, 1, -1, 0]
    with torch.no_grad():
        got = fl.apply(model, params, fl.route(fl.stack(members), chosen), ids).logits
        want = torch.cat([alone(model, params, members, j, ids[i : i + 1]) for i, j in enumerate(chosen)])
    close(got, want, 1e-5)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen3", "deepseek"])  # GPT-OSS does not pack at all
def test_packed_sequences_equal_each_alone_with_their_gradients(name: str, implementation: str) -> None:
    if name == "llama" and implementation != "eager":
        pytest.skip("no experts")
    model, params, members = setup(name, implementation, own=True)
    ids = tokens(2, 18)
    factor = torch.randn(2, 18, 17, generator=gen(3))

    def packed(members: list[Any]) -> Tensor:
        routed = fl.route(fl.stack(members), IDS)
        given: Any = {"input_ids": ids, "position_ids": POSITIONS, "use_cache": False}
        out: Tensor = fl.apply(model, params, routed, **given).logits
        return out

    def one_by_one(members: list[Any]) -> Tensor:
        found = torch.zeros(2, 18, 17)
        for row, start, end, member in sequences():
            found[row, start:end] = alone(model, params, members, member, ids[row : row + 1, start:end])[0]
        return found

    results = []
    for function in (packed, one_by_one):
        several = [{n: replace(rule, a=rule.a.clone().requires_grad_(), b=rule.b.clone().requires_grad_())
                    for n, rule in member.items()} for member in members]  # fmt: skip
        leaves = [leaf for member in several for rule in member.values() for leaf in (rule.a, rule.b)]
        out = function(several)
        found = torch.autograd.grad((out * factor).sum(), leaves, allow_unused=True)
        results.append(
            (out.detach(), [torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)])
        )
    close(results[0][0], results[1][0], 1e-5)
    for got, want in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * float(want.abs().max()) + 1e-6)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_population_trains_on_packed_rows_as_each_member_alone(name: str) -> None:
    model, params, members = setup(name, "grouped_mm", own=True)
    ids, sgd = tokens(2, 18), fl.optim.sgd(0.1)
    owners = torch.tensor(IDS)

    def losses(logits: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view_as(ids)

    def packed(bound: Any, batch: Any, mine: Tensor) -> Tensor:
        logits = bound(input_ids=batch, position_ids=POSITIONS, use_cache=False).logits
        return torch.where(mine, losses(logits), 0.0).sum() / mine.sum()

    stack = fl.stack(members)
    state = fl.optim.per_member(lambda: sgd).init(stack)
    step = fl.population_step(model, packed, sgd)
    trained, _, metrics = step(params, stack, state, ids, ids=IDS)
    for j, member in enumerate(members):

        def alone_loss(bound: Any, batch: Any) -> Tensor:
            logits = torch.zeros(2, 18, 17)
            for row, start, end, owner in sequences():
                if owner == j:  # noqa: B023
                    logits[row, start:end] = bound(batch[row : row + 1, start:end]).logits[0]
            mine = owners == j  # noqa: B023
            return torch.where(mine, losses(logits), 0.0).sum() / mine.sum()

        own, _, own_metrics = fl.train_step(model, alone_loss, sgd)(params, member, sgd.init(member), ids)
        for key in ("loss", "grad_norm"):
            torch.testing.assert_close(metrics[key][j], own_metrics[key], rtol=1e-3, atol=1e-5)
        for target, rule in own.items():
            got: Any = trained[j][target]
            torch.testing.assert_close(got.b, rule.b, rtol=1e-3, atol=1e-4)  # type: ignore[attr-defined]


def test_what_does_not_go_with_ids_for_each_token_is_refused() -> None:
    model, params, members = setup("llama", "eager", own=False)
    stack = fl.stack(members)
    wrong: list[tuple[Any, dict[str, Any], str]] = [
        ([[0, 1], [2]], {}, "as many tokens in each row"),
        ([[0, 3]], {}, r"ids\[0\]\[1\] is 3"),
        ([[0, 1]], {"repeats": 2}, "repeats=1"),
        ([[0, 1]], {"rows_of": {"x": 1}}, "rows_of with None only"),
        ([[0, 1.5]], {}, "one int for each row or token"),
    ]
    for ids, options, message in wrong:
        with pytest.raises(ConfigError, match=message):
            fl.route(stack, ids, **options)
    for given, message in (
        (tokens(2, 17), r"shape \[2, 17\] for ids of shape \[2, 18\]"),
        (tokens(3, 18), "rows and tokens"),
    ):
        with pytest.raises(UnsupportedError, match=message):
            fl.apply(model, params, fl.route(stack, IDS), given)
