"""Log-probabilities by chunks against those of the whole logits: values, gradients, memory."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from cases import llama
from torch import Tensor, nn

import funclora as fl
from funclora._torch.memory import Peak
from funclora.errors import ConfigError
from funclora.losses import token_log_probs

SMALL: dict[str, Any] = {
    "vocab_size": 17, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# Kinds of what models do after the backbone: scales, caps, other outputs, other names.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaForCausalLM", {}),
    "Gemma2": ("Gemma2ForCausalLM", {"head_dim": 8, "final_logit_softcapping": 2.0}),
    "Cohere": ("CohereForCausalLM", {"logit_scale": 0.3}),
    "Granite": ("GraniteForCausalLM", {"logits_scaling": 3.0}),
    "Mixtral": (
        "MixtralForCausalLM",
        {"num_local_experts": 2, "output_router_logits": True, "experts_implementation": "eager"},
    ),
    "OPT": ("OPTForCausalLM", {"ffn_dim": 16, "word_embed_proj_dim": 16}),
    "GPT2": ("GPT2LMHeadModel", {"n_embd": 16, "n_layer": 2, "n_head": 2}),
}


def model_of(kind: str) -> Any:
    name, options = KINDS[kind]
    cls = getattr(transformers, name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return cls(cls.config_class(**SMALL | options)).double().eval()


def lora(model: Any, *targets: str, seed: int = 0) -> dict[str, fl.Rule]:
    names: Any = list(targets) or "all-linear"
    config = fl.LoraConfig(r=2, target_modules=names, init_lora_weights=False)
    return fl.init(model, config, generator=torch.Generator().manual_seed(seed))


def batch(rows: int = 3, seq: int = 9) -> tuple[dict[str, Tensor], Tensor]:
    ids = torch.randint(3, 17, (rows, seq), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :4] = -100
    labels[1, 6:] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels


def whole(bound: Any, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
    """The formula, on all logits."""
    log_probs = bound(**inputs).logits.log_softmax(-1)[:, :-1]
    own = log_probs.gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
    return F.pad(own * (labels[:, 1:] != -100), (1, 0))


def loss_of(function: Any, **options: Any) -> Any:
    inputs, labels = batch()
    weights = torch.linspace(1, 2, labels.numel()).view(labels.shape)
    return lambda bound, _: (function(bound, inputs, labels, **options) * weights).sum()


@pytest.mark.parametrize("head", [False, True], ids=["frozen", "adapted"])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_those_of_the_whole_logits(kind: str, head: bool) -> None:
    model = model_of(kind)
    params, adapters = fl.base_params(model), lora(model)
    if head:
        adapters |= lora(model, "lm_head", seed=1)
        assert any("lm_head" in name for name in adapters)
    want, want_grads = fl.value_and_grad(loss_of(whole))(model, params, adapters, None)
    for at_once in (1, 40, 10**6):
        loss, grads = fl.value_and_grad(loss_of(token_log_probs, at_once=at_once))(model, params, adapters, None)
        torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-5)
        for name, rule in want_grads.items():
            for leaf in rule.leaf_names:
                got, expected = getattr(grads[name], leaf), getattr(rule, leaf)
                torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9, msg=f"{name}.{leaf}")


def test_each_row_of_a_routed_batch_has_its_own_output_layer() -> None:
    model = model_of("Llama")
    params = fl.base_params(model)
    members = [lora(model, "q_proj", "lm_head", seed=i) for i in range(2)]
    inputs, labels = batch()
    ids = [1, -1, 0]
    got = token_log_probs(fl.bind(model, params, fl.route(fl.stack(members), ids)), inputs, labels, at_once=60)
    for row, i in enumerate(ids):
        own = {name: x[row : row + 1] for name, x in inputs.items()}
        alone = whole(fl.bind(model, params, members[i] if i >= 0 else {}), own, labels[row : row + 1])
        torch.testing.assert_close(got[row : row + 1], alone, rtol=1e-5, atol=1e-5)


def test_members_of_a_population_and_transforms_get_them_too() -> None:
    model = llama().eval()
    params = fl.base_params(model)
    members = [lora(model, "q_proj", "lm_head", seed=i) for i in range(2)]
    inputs, labels = batch(2, 6)
    sgd = fl.optim.sgd(0.0)
    step = fl.population_step(
        model, lambda bound, given: token_log_probs(bound, given[0], given[1]).sum(), sgd, shared=True
    )
    stack = fl.stack(members)
    _, _, metrics = step(params, stack, fl.optim.per_member(lambda: sgd).init(stack), (inputs, labels))
    want = torch.stack([whole(fl.bind(model, params, member), inputs, labels).sum() for member in members])
    torch.testing.assert_close(metrics["loss"], want, rtol=1e-5, atol=1e-5)

    def loss(adapters: Any) -> Tensor:
        return token_log_probs(fl.bind(model, params, adapters), inputs, labels).sum()

    value = torch.func.grad_and_value(loss)(members[0])[1]
    torch.testing.assert_close(value, want[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head", [False, True], ids=["frozen", "adapted"])
def test_the_logits_of_the_batch_never_exist(head: bool) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        cls = transformers.LlamaForCausalLM
        model = cls(cls.config_class(**SMALL | {"vocab_size": 8192, "num_hidden_layers": 1})).eval()
    params, adapters = fl.base_params(model), lora(model, "q_proj", *["lm_head"] * head)
    ids = torch.randint(3, 8000, (4, 32), generator=torch.Generator().manual_seed(1))
    logits = ids.numel() * 8192 * 4

    def peak(function: Any, **options: Any) -> int:
        step = fl.value_and_grad(lambda bound, _: function(bound, {"input_ids": ids}, ids, **options).sum())
        with Peak() as used:
            step(model, params, adapters, None)
        return int(used.peak)

    assert peak(token_log_probs, at_once=8 * 8192) < logits < 2 * logits < peak(whole)


def test_an_answer_without_labels_is_zero() -> None:
    model = llama().eval()
    inputs, labels = batch(2, 6)
    bound = fl.bind(model, fl.base_params(model), {})
    assert torch.equal(token_log_probs(bound, inputs, torch.full_like(labels, -100)), torch.zeros(2, 6))


def test_what_is_wrong_is_said() -> None:
    model = llama().eval()
    inputs, labels = batch(2, 6)
    bound = fl.bind(model, fl.base_params(model), {})
    for given in (bound, nn.Embedding(17, 17)):
        with pytest.raises(ConfigError, match=re.escape("labels: expected a label or -100 for each position, [2, 6]")):
            token_log_probs(given, inputs if given is bound else inputs["input_ids"], labels[:, :5])
    with pytest.raises(ConfigError, match="at_once: expected a positive number of logits, got 0"):
        token_log_probs(bound, inputs, labels, at_once=0)
