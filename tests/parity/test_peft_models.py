"""Parity with PEFT over families of models: each field of the configuration alone, and any of them together.

Files both ways, outputs, merged weights, and 20 steps of training with AdamW on both sides.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from cases import gen, gpt2, llama
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import distance
from peft_oracle import IDS, Row, build, close, logits, peft_loads, random_peft, reload_with, save_quietly
from torch import Tensor, nn

from funclora import LoraConfig, apply, base_params, load_peft, merge, optim, save_peft, train_step

# --- families --------------------------------------------------------------------------------------------------

TEXT: dict[str, Any] = {
    "vocab_size": 17, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2,
    "initializer_range": 0.3, "attn_implementation": "eager",
}  # fmt: skip
DECODER = TEXT | {"num_key_value_heads": 1, "bos_token_id": 0, "eos_token_id": 16, "max_position_embeddings": 16}
EXPERTS: dict[str, Any] = {"num_hidden_layers": 1, "num_experts_per_tok": 2, "experts_implementation": "eager"}


def qwen2() -> nn.Module:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(**DECODER, tie_word_embeddings=True))


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(**TEXT, num_labels=3, max_position_embeddings=16))


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(vocab_size=17, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    options = {name: value for name, value in TEXT.items() if name != "vocab_size"}
    return ViTForImageClassification(ViTConfig(**options, image_size=8, patch_size=4, num_labels=3))


def resnet() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(
        ResNetConfig(embedding_size=4, hidden_sizes=[4, 6], depths=[1, 1], layer_type="basic", num_labels=3)
    )


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(**DECODER | EXPERTS, num_local_experts=3))


def qwen_moe() -> nn.Module:
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    options = DECODER | EXPERTS | {"moe_intermediate_size": 6, "shared_expert_intermediate_size": 6, "num_experts": 3}
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**options))


IMAGES = torch.randn((2, 3, 8, 8), generator=gen(2), dtype=torch.float64)


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        model: makes a tiny one.
        targets: names of modules to adapt, those with a bias first.
        biased: how many of them have a bias.
        saved: a module to train in full.
        parameters: stacked weights of experts.
        layers: how many layers there are to choose from, 0 where names do not count them.
        tokens: it has a table of tokens.
        x: the input.
        inputs: further ones.
        tied: targets that share their weight with the output layer, which PEFT merges into both.
    """

    model: Callable[[], nn.Module]
    targets: list[str]
    biased: int
    saved: str
    parameters: tuple[str, ...] = ()
    layers: int = 2
    tokens: bool = True
    x: Tensor = IDS
    inputs: dict[str, Any] = field(default_factory=dict)
    tied: tuple[str, ...] = ()


CAUSAL = {"use_cache": False}
QKV = ["q_proj", "v_proj", "k_proj"]
MOE = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
FAMILIES = {
    "llama": Family(llama, [*QKV, "down_proj", "lm_head"], 0, "model.norm", inputs=CAUSAL),
    "qwen2": Family(qwen2, [*QKV, "up_proj", "embed_tokens"], 3, "model.norm", inputs=CAUSAL, tied=("embed_tokens",)),
    "gpt2": Family(gpt2, ["c_attn", "c_fc", "mlp.c_proj", "wte"], 3, "ln_f", inputs=CAUSAL, tied=("wte",)),
    "bert": Family(bert, ["query", "value", "intermediate.dense", "word_embeddings"], 3, "pooler", x=IDS + 1),
    "t5": Family(t5, ["q", "v", "wo"], 0, "encoder.final_layer_norm", layers=1,
                 inputs={"decoder_input_ids": IDS[:, :3], "use_cache": False}),
    "vit": Family(vit, ["q_proj", "v_proj", "fc1", "projection"], 4, "classifier", tokens=False, x=IMAGES),
    "resnet": Family(resnet, ["0.convolution", "1.convolution", "shortcut.convolution"], 0, "classifier.1", layers=0,
                     tokens=False, x=IMAGES),
    "mixtral": Family(mixtral, QKV, 0, "model.norm", MOE, layers=1, inputs=CAUSAL),
    "qwen-moe": Family(qwen_moe, [*QKV, "shared_expert.up_proj"], 3, "model.norm", MOE, layers=1, inputs=CAUSAL),
}  # fmt: skip


def fields_of(family: Family) -> dict[str, dict[str, Any]]:
    """A value for every field that changes what is computed, where the family has a use for it."""
    first, second = family.targets[0], family.targets[1]
    found: dict[str, dict[str, Any]] = {
        "r": {"r": 3},
        "lora_alpha": {"lora_alpha": 2.5},
        "use_rslora": {"use_rslora": True, "r": 3},
        "use_dora": {"use_dora": True},
        "rank_pattern": {"rank_pattern": {first: 1}},
        "alpha_pattern": {"alpha_pattern": {second: 7}},
        "exclude_modules": {"exclude_modules": [second]},
        "modules_to_save": {"modules_to_save": [family.saved]},
        "init_lora_weights": {"init_lora_weights": False},
        "lora_dropout": {"lora_dropout": 0.5},
    }
    if family.biased or family.saved != "encoder.final_layer_norm":
        found["bias"] = {"bias": "all"}
    if family.biased:
        found["lora_only"] = {"bias": "lora_only"}
        found["lora_bias"] = {"lora_bias": True, "target_modules": family.targets[: family.biased]}
    if family.layers:
        found["layers_to_transform"] = {"layers_to_transform": [family.layers - 1], "target_modules": [first, second]}
    if family.tokens:
        found["trainable_token_indices"] = {"trainable_token_indices": [4, 2], "target_modules": [first]}
    if family.parameters:
        found["target_parameters"] = {"target_parameters": [*family.parameters]}
        found["one of target_parameters"] = {"target_parameters": [family.parameters[0]], "r": 3}
    return found


WITHOUT_BIASES = ("llama", "mixtral", "t5")  # they have none at all
WHOLE_TENSOR = [
    (name, what) for name, family in FAMILIES.items() for what in fields_of(family)
    if not (what == "bias" and name in WITHOUT_BIASES)
]  # fmt: skip


def row_of(name: str, config: dict[str, Any]) -> Row:
    family = FAMILIES[name]
    targets = config.get("target_modules", [family.targets[0], family.targets[1]])
    config = {"target_modules": targets} | config
    # PEFT looks for the keys of patterns among modules only, and warns of ties that it can do nothing about.
    ignore = "did not match any targeted module|tie_word_embeddings|no tied modules"
    tied = any(target in family.tied for target in targets) and not config.get("ensure_weight_tying")
    return Row(name, config, family.model, family.x, tied, inputs=family.inputs, ignore=f"({ignore})")


def agrees(row: Row, folder: Path) -> tuple[nn.Module, Any, dict[str, Any]]:
    """Check files, outputs and merged weights; returns the model, PEFT's model and our adapters."""
    model = build(row)
    params = base_params(model)
    wrapped = random_peft(row, model)
    expected = logits(wrapped(row.x, **row.inputs))
    save_quietly(wrapped, folder)

    adapters, config = load_peft(folder, model)

    close(logits(apply(model, params, adapters, row.x, **row.inputs)), expected)
    assert distance(logits(model(row.x, **row.inputs)), expected) > 1e-4, "the adapter must matter"
    save_peft(folder, adapters, config)
    close(logits(peft_loads(model, folder, row.ignore)(row.x, **row.inputs)), expected)
    if not row.tied:
        merged = copy.deepcopy(wrapped).merge_and_unload().state_dict()
        ours = merge(params, adapters)
        close([ours[n] for n in params if n in merged], [merged[n] for n in params if n in merged])
    return model, wrapped, adapters


@pytest.mark.parametrize(("name", "what"), WHOLE_TENSOR, ids=str)
def test_each_field_alone(name: str, what: str, tmp_path: Path) -> None:
    agrees(row_of(name, fields_of(FAMILIES[name])[what]), tmp_path)


# --- together, and trained -------------------------------------------------------------------------------------


@st.composite
def configurations(draw: st.DrawFn, name: str) -> dict[str, Any]:
    """Any combination of fields that PEFT takes."""
    family = FAMILIES[name]
    biased = family.targets[: family.biased]
    config: dict[str, Any] = {"lora_bias": bool(biased) and draw(st.booleans())}
    among = biased if config["lora_bias"] else family.targets
    targets = draw(st.lists(st.sampled_from(among), min_size=1, max_size=3, unique=True))
    config |= {
        "target_modules": targets,
        "r": draw(st.integers(1, 4)),
        "lora_alpha": draw(st.sampled_from([1, 3, 0.5])),
        "use_rslora": draw(st.booleans()),
        "modules_to_save": draw(st.sampled_from([None, [family.saved]])),
        "init_lora_weights": draw(st.booleans()),
    }
    if family.parameters and not config["lora_bias"] and draw(st.booleans()):
        config["target_parameters"] = list(draw(st.permutations(family.parameters)))[: draw(st.integers(1, 2))]
    else:
        config["use_dora"] = not config["lora_bias"] and draw(st.booleans())
        config["lora_dropout"] = draw(st.sampled_from([0.0, 0.5]))
    if not config["lora_bias"] and name not in WITHOUT_BIASES:
        biases = ["none", "all", "lora_only"] if any(target in biased for target in targets) else ["none", "all"]
        config["bias"] = draw(st.sampled_from(biases))
    if draw(st.booleans()):
        config["rank_pattern"] = {targets[-1]: draw(st.integers(1, 3))}
    if draw(st.booleans()):
        config["alpha_pattern"] = {targets[0]: draw(st.sampled_from([2, 5]))}
    if family.layers and len(targets) > 1 and "lm_head" not in targets and draw(st.booleans()):
        layered = [
            target for target in targets if target not in ("embed_tokens", "wte", "word_embeddings", "projection")
        ]
        if layered == targets:
            config["layers_to_transform"] = [draw(st.integers(0, family.layers - 1))]
    tables = {"embed_tokens", "wte", "word_embeddings", "lm_head"}
    if family.tokens and not tables & {*targets} and draw(st.booleans()):
        config["trainable_token_indices"] = draw(st.lists(st.integers(0, 16), min_size=1, max_size=4, unique=True))
    return config


def objective(output: Any) -> Tensor:
    return torch.stack([out.square().mean() for out in logits(output)]).sum()


def trains_alike(row: Row, folder: Path) -> None:
    """Check all that `agrees` does, and 20 steps of AdamW from there."""
    model, wrapped, adapters = agrees(row, folder)
    params = base_params(model)

    # Attention's softmax is in float32, so the gradient of a key's bias, which is zero, is rounding of about 1e-9.
    # With AdamW's own eps of 1e-8 it would count as much as any other.
    theirs = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2, eps=1e-4)
    ours = optim.adamw(1e-2, eps=1e-4)
    state = ours.init(adapters)
    step = train_step(model, lambda bound, x: objective(bound(x, **row.inputs)), ours)
    for _ in range(20):
        theirs.zero_grad()
        objective(wrapped(row.x, **row.inputs)).backward()
        theirs.step()
        adapters, state, _ = step(params, adapters, state, row.x)

    expected = logits(wrapped(row.x, **row.inputs))
    close(logits(apply(model, params, adapters, row.x, **row.inputs)), expected, 1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stored = peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    stored = {k: v for k, v in stored.items() if "original_module" not in k and ".modules_to_save." not in k}
    close(adapters, reload_with(folder, stored, model), 1e-6)


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=3)
@given(data=st.data())
def test_any_combination_of_fields_trains_alike(
    name: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    trains_alike(row_of(name, data.draw(configurations(name))), tmp_path_factory.mktemp("any"))


TIED: list[tuple[str, dict[str, Any]]] = [
    ("qwen2", {"trainable_token_indices": [3, 1], "lora_bias": True}),
    ("qwen2", {"modules_to_save": ["lm_head"], "ensure_weight_tying": True, "use_dora": True}),
    ("gpt2", {"trainable_token_indices": [16], "bias": "lora_only"}),
    ("t5", {"trainable_token_indices": [3, 1, 2]}),
]


@pytest.mark.parametrize(("name", "config"), TIED, ids=str)
def test_tied_weights_train_alike(name: str, config: dict[str, Any], tmp_path: Path) -> None:
    trains_alike(row_of(name, config), tmp_path)


@pytest.mark.parametrize("name", FAMILIES)
def test_configurations_go_to_peft_and_back(name: str) -> None:
    for fields in fields_of(FAMILIES[name]).values():
        config = LoraConfig(**row_of(name, fields).config)
        assert LoraConfig.from_peft(config.to_peft()) == config.replace(
            target_modules=sorted(config.target_modules or ())
        )
