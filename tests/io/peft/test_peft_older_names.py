"""Adapters with the names of transformers 4: PEFT, which converts them when it loads them, is the oracle.

The models of version 4 are made of what transformers writes today: it saves checkpoints under the names of that time.
"""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft_oracle import IDS, Row, build, close, logits, random_peft, save_quietly
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import funclora as fl
from funclora.errors import FormatError, PeftFormatWarning, UnsupportedError

TEXT: dict[str, Any] = {
    "vocab_size": 17, "hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 16, "pad_token_id": 0,
    "initializer_range": 0.3,
}  # fmt: skip
EXPERTS = TEXT | {"num_experts_per_tok": 2, "experts_implementation": "eager", "attn_implementation": "eager"}


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(**EXPERTS, num_local_experts=3))


def qwen() -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**EXPERTS, num_experts=3, moe_intermediate_size=5, head_dim=4))


def qwen_vl() -> nn.Module:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    text = TEXT | {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 0]}}
    vision = {"depth": 1, "embed_dim": 8, "hidden_size": 8, "num_heads": 2, "mlp_ratio": 1}
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision))


def llava() -> nn.Module:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(hidden_size=8, intermediate_size=6, num_hidden_layers=1, num_attention_heads=2,
                              image_size=8, patch_size=4)  # fmt: skip
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=LlamaConfig(**TEXT)))


def gemma() -> nn.Module:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    vision = {"hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 8, "patch_size": 4}  # fmt: skip
    return Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=TEXT | {"head_dim": 4}, vision_config=vision, mm_tokens_per_image=4)
    )


class Older(nn.Module):
    """The modules that a checkpoint's keys name, all of them linear layers."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        for key, tensor in tensors.items():
            *path, last, leaf = key.split(".")
            if leaf != "weight" or tensor.dim() != 2:
                continue
            owner: nn.Module = self
            for part in path:
                if not hasattr(owner, part):
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            owner.add_module(last, nn.Linear(tensor.shape[1], tensor.shape[0], bias=False).to(tensor.dtype))


def saved(folder: Path, make: Callable[[], nn.Module], **config: Any) -> nn.Module:
    """A PEFT folder of the older model, and the model of today."""
    row = Row("model", {}, make)
    model: Any = build(row)
    model.save_pretrained(folder / "base")
    tensors = load_file(folder / "base" / "model.safetensors")
    older = Row("older", config, lambda: Older(tensors))
    save_quietly(random_peft(older, build(older)), folder)
    return model


def loaded_by_peft(folder: Path, model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(copy.deepcopy(model), str(folder)).eval()


def ours(folder: Path, model: nn.Module) -> Any:
    adapters, config = fl.load_peft(folder, model)
    return adapters, config, logits(fl.apply(model, fl.base_params(model), adapters, IDS))


MIXTRAL = ["q_proj", "w1", "w2", "w3"]
QWEN = ["q_proj", "gate_proj", "up_proj", "down_proj"]
ROWS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "mixtral": (mixtral, {"target_modules": MIXTRAL}),
    "mixtral, router": (mixtral, {"target_modules": [*MIXTRAL, "gate"]}),
    "mixtral, experts alone": (mixtral, {"target_modules": ["w1", "w2", "w3"]}),
    "mixtral, one kind": (mixtral, {"target_modules": ["v_proj", "w2"]}),
    "mixtral, attention": (mixtral, {"target_modules": ["q_proj", "v_proj"], "use_rslora": True}),
    "mixtral, head": (mixtral, {"target_modules": MIXTRAL, "modules_to_save": ["lm_head"]}),
    "qwen": (qwen, {"target_modules": QWEN}),
    "qwen, router": (qwen, {"target_modules": [*QWEN, "gate"], "r": 3}),
    "qwen, expression": (qwen, {"target_modules": r".*\.(q_proj|v_proj|gate_proj|up_proj|down_proj)"}),
    "qwen-vl": (qwen_vl, {"target_modules": ["q_proj", "down_proj"]}),
    "llava": (llava, {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "gemma": (gemma, {"target_modules": ["q_proj", "down_proj"]}),
}


@pytest.mark.parametrize("name", ROWS)
def test_outputs_are_peft_s(tmp_path: Path, name: str) -> None:
    make, config = ROWS[name]
    model = saved(tmp_path, make, **config)
    adapters, read, got = ours(tmp_path, model)
    plain = logits(fl.apply(model, fl.base_params(model), {}, IDS))
    assert not torch.allclose(got[0], plain[0], atol=1e-3)
    if name == "qwen-vl":  # PEFT loads nothing, transformers does
        theirs: Any = copy.deepcopy(model)
        theirs.load_adapter(str(tmp_path))
    else:
        theirs = loaded_by_peft(tmp_path, model)
    close(got, logits(theirs(IDS)))
    fl.save_peft(tmp_path / "again", adapters, read)
    close(ours(tmp_path / "again", model)[2], got)


def test_the_scaling_of_experts_is_kept_where_peft_refuses_it(tmp_path: Path) -> None:
    """α/√r of a parameter of two kinds has twice the rank, so that α grows by √2. Compared with the dense formula."""
    model = saved(tmp_path, mixtral, target_modules=MIXTRAL, use_rslora=True)
    with pytest.raises(AssertionError, match="not close"):
        close(logits(loaded_by_peft(tmp_path, model)(IDS)), ours(tmp_path, model)[2])
    adapters, config, _ = ours(tmp_path, model)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    weights = dict(model.named_parameters())
    for layer in range(2):
        place = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts."

        def update(expert: int, kind: str, place: str = place) -> Tensor:
            a, b = (tensors[f"{place}{expert}.{kind}.lora_{x}.weight"].double() for x in "AB")
            return 3 / math.sqrt(2) * b @ a

        for kinds, parameter in ((("w1", "w3"), "gate_up_proj"), (("w2",), "down_proj")):
            name = f"model.layers.{layer}.mlp.experts.{parameter}"
            wanted = torch.stack([torch.cat([update(e, kind) for kind in kinds]) for e in range(3)])
            rule: Any = adapters[name]
            close(rule.dense(weights[name]), weights[name] + wanted)
    fl.save_peft(tmp_path / "again", adapters, config)


def test_patterns_of_old_names_are_kept(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "target_modules": MIXTRAL,
        "rank_pattern": {"w2": 3, "layers.0.self_attn.q_proj": 1},
        "alpha_pattern": {r"layers\.1\.block_sparse_moe\.experts\.\d+\.w[13]": 7},
    }
    model = saved(tmp_path, mixtral, **options)
    adapters, config, got = ours(tmp_path, model)
    found: Any = adapters
    ranks = {name.partition("layers.")[2]: (rule.r, rule.scaling) for name, rule in found.items()}
    assert ranks == {
        "0.self_attn.q_proj.weight": (1, 3.0), "1.self_attn.q_proj.weight": (2, 1.5),
        "0.mlp.experts.gate_up_proj": (4, 1.5), "1.mlp.experts.gate_up_proj": (4, 3.5),
        "0.mlp.experts.down_proj": (3, 1.0), "1.mlp.experts.down_proj": (3, 1.0),
    }  # fmt: skip
    fl.save_peft(tmp_path / "again", adapters, config)
    close(logits(loaded_by_peft(tmp_path / "again", model)(IDS)), got)


def test_dropout_of_experts_is_left_out_with_a_note(tmp_path: Path) -> None:
    model = saved(tmp_path, mixtral, target_modules=MIXTRAL, lora_dropout=0.1)
    with pytest.warns(PeftFormatWarning, match="lora_dropout=0.1 is read as 0, because experts"):
        adapters, config = fl.load_peft(tmp_path, model)
    assert config.lora_dropout == 0
    assert {rule.dropout for rule in adapters.values() if isinstance(rule, fl.LoRA)} == {0.0}


def test_full_names_and_layers(tmp_path: Path) -> None:
    """Entries with full names, and layers, restrict the adapter as they did."""
    full = [f"model.layers.1.block_sparse_moe.experts.{e}.{w}" for e in range(3) for w in ("w1", "w2", "w3")]
    model = saved(tmp_path, mixtral, target_modules=[*full, "model.layers.0.self_attn.q_proj"])
    adapters, _, got = ours(tmp_path, model)
    assert [name.partition("layers.")[2] for name in adapters] == [
        "0.self_attn.q_proj.weight", "1.mlp.experts.gate_up_proj", "1.mlp.experts.down_proj",
    ]  # fmt: skip
    close(got, logits(loaded_by_peft(tmp_path, model)(IDS)))
    other = tmp_path / "vl"
    other.mkdir()
    model = saved(other, llava, target_modules=["language_model.model.layers.1.self_attn.q_proj"])
    assert [*ours(other, model)[0]] == ["model.language_model.layers.1.self_attn.q_proj.weight"]


def test_one_kind_of_two_leaves_the_other_alone(tmp_path: Path) -> None:
    """PEFT refuses it; the rows of the kind without an adapter have a B of zeros."""
    model = saved(tmp_path, mixtral, target_modules=["w3"])
    adapters = fl.load_peft(tmp_path, model)[0]
    name = "model.layers.0.mlp.experts.gate_up_proj"
    rule: Any = adapters[name]
    update = rule.dense(torch.zeros(rule.b.shape[0], rule.b.shape[1], rule.a.shape[2]).double())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for expert in range(3):
        place = f"base_model.model.model.layers.0.block_sparse_moe.experts.{expert}.w3."
        a, b = (tensors[f"{place}lora_{x}.weight"].double() for x in "AB")
        close(update[expert, 6:], 1.5 * b @ a)
        assert not update[expert, :6].any()


def edit(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


EXPERT = "base_model.model.model.layers.0.block_sparse_moe.experts.1."
BROKEN: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "no B": (lambda t: t.pop(f"{EXPERT}w1.lora_B.weight"), "there is no '.*experts.1.w1.lora_B.weight'"),
    "no expert": (
        lambda t: [t.pop(f"{EXPERT}w2.lora_{x}.weight") for x in "AB"],
        "'model.layers.0.mlp.experts.down_proj' holds 3 experts, but the adapter has 2 of them",
    ),
    "other rank": (
        lambda t: t.update({f"{EXPERT}w1.lora_A.weight": torch.ones(5, 8)}), r"w1.lora_A.weight' has shape \[5, 8\]"
    ),
    "other height": (
        lambda t: t.update({f"{EXPERT}w1.lora_B.weight": torch.ones(5, 2)}), "does not fit its part of"
    ),
    "a magnitude": (
        lambda t: t.update({f"{EXPERT}w1.lora_magnitude_vector": torch.ones(6)}), "unexpected key"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_incomplete_experts_are_refused(tmp_path: Path, name: str) -> None:
    model = saved(tmp_path, mixtral, target_modules=MIXTRAL)
    change, message = BROKEN[name]
    edit(tmp_path, change)
    with pytest.raises(FormatError, match=message):
        fl.load_peft(tmp_path, model)


def test_a_layer_without_its_adapter_is_noticed(tmp_path: Path) -> None:
    model = saved(tmp_path, mixtral, target_modules=MIXTRAL)
    edit(tmp_path, lambda t: [t.pop(key) for key in [*t] if "layers.1.block_sparse_moe" in key])  # type: ignore[arg-type]
    with pytest.raises(FormatError, match=r"which 'model.layers.1.mlp.experts.gate_up_proj' needs"):
        fl.load_peft(tmp_path, model)


def test_ranks_that_differ_between_experts_are_refused(tmp_path: Path) -> None:
    model = saved(tmp_path, mixtral, target_modules=MIXTRAL, rank_pattern={r"experts\.1\.w2": 3})
    with pytest.raises(UnsupportedError, match=r"'.*experts.0.w2' has rank 2 and α 3, '.*experts.1.w2' rank 3"):
        fl.load_peft(tmp_path, model)


def test_dora_of_experts_is_refused(tmp_path: Path) -> None:
    model = saved(tmp_path, mixtral, target_modules=MIXTRAL, use_dora=True)
    with pytest.raises(UnsupportedError, match="PEFT has no DoRA for target_parameters"):
        fl.load_peft(tmp_path, model)


def test_a_conversion_that_is_not_known_names_the_call_that_converts(tmp_path: Path, monkeypatch: Any) -> None:
    from transformers import conversion_mapping
    from transformers.core_model_loading import MergeModulelist, Transpose, WeightConverter

    model = saved(tmp_path, mixtral, target_modules=["w2"])
    other = WeightConverter([".block_sparse_moe.experts.*.w2.weight"], [".mlp.experts.down_proj"],
                            [MergeModulelist(dim=0), Transpose(dim0=1, dim1=2)])  # fmt: skip
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda model: [other])
    with pytest.raises(
        UnsupportedError, match=r"MergeModulelist, Transpose.*MixtralForCausalLM.*\.load_adapter\(folder\)"
    ):
        fl.load_peft(tmp_path, model)


def test_merge_and_inspect_read_them(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM
    from typer.testing import CliRunner

    from funclora.cli._app import app

    folder = tmp_path / "adapter"
    folder.mkdir()
    model = saved(folder, mixtral, target_modules=MIXTRAL)
    _, _, got = ours(folder, model)
    fl.merge_checkpoint(folder / "base", folder, tmp_path / "merged", verify=True)
    merged = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", attn_implementation="eager", experts_implementation="eager"
    ).eval()
    close(logits(merged(IDS)), got, 1e-6)
    found = CliRunner().invoke(app, ["inspect", str(folder), "--base", str(folder / "base"), "--norms", "--json"])
    rows = json.loads(found.stdout)["rows"]
    assert {row["name"]: row["r"] for row in rows}["model.layers.0.mlp.experts.gate_up_proj"] == 4
