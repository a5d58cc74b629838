"""PEFT folders as other trainers leave them: their fields, their names of targets, and what is not PEFT's meaning."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from gguf_models import build
from safetensors.torch import load_file, save_file
from torch import Tensor

import funclora as fl
from funclora.errors import FormatError, PeftFormatWarning, UnsupportedError

IDS = torch.arange(12).reshape(2, 6)
COMPONENTS = "self_attn|attention|attn|mlp|feed_forward|ffn|dense"
LINEAR = "(?:k_proj|v_proj|q_proj|o_proj|down_proj)"
UNSLOTH = (
    rf"(?:.*?(?:language|text).*?(?:{COMPONENTS}).*?\.{LINEAR})|"
    rf"(?:\bmodel\.layers\.[\d]{{1,}}(?!.*\.experts\.\d)\..*?(?:{COMPONENTS}).*?\.(?:{LINEAR}))"
)
AUTO = {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers.models.llama.modeling_llama"}
# What each trainer gives PEFT, and the fields that its folders have then.
TRAINERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "unsloth": (
        {"target_modules": UNSLOTH, "lora_alpha": 16},
        {"auto_mapping": AUTO | {"unsloth_fixed": True}, "base_model_name_or_path": "unsloth/llama-3-8b-bnb-4bit",
         "loftq_config": {}, "layers_pattern": None},
    ),
    "unsloth, some layers left out": (
        {"target_modules": rf"(?!(?:model\.layers\.0\.mlp\.down_proj)$)(?:{UNSLOTH})"}, {"task_type": "CAUSAL_LM"},
    ),
    "axolotl": (
        {"target_modules": r"model.layers.[\d]+.(mlp|cross_attn|self_attn).(up|down|gate|q|k|v|o)_proj"},
        {"fan_in_fan_out": None, "modules_to_save": None, "layers_to_transform": None, "rank_pattern": {}},
    ),
    "axolotl, lora_target_linear": (
        {"target_modules": ["q_proj", "gate_proj", "down_proj"], "use_rslora": True, "lora_dropout": 0.05},
        {"fan_in_fan_out": None, "use_dora": False, "loftq_config": None},
    ),
    "LLaMA-Factory": ({"target_modules": ["q_proj", "v_proj"], "lora_alpha": 32.0}, {"task_type": "CAUSAL_LM"}),
    "LLaMA-Factory, vision towers left out": (
        {"target_modules": "^(?!.*(?:visual|vision_tower|lm_head)).*(?:q_proj|v_proj).*", "use_dora": True}, {},
    ),
    "PEFT 0.3": (
        {"target_modules": ["q_proj", "v_proj"]},
        {"enable_lora": None, "merge_weights": False, "fan_in_fan_out": False, "revision": None},
    ),
}  # fmt: skip


def saved(folder: Path, given: dict[str, Any], fields: dict[str, Any], kind: str = "Llama") -> Any:
    """A folder that PEFT has saved for a trainer, and its model."""
    config = peft.LoraConfig(**({"r": 4, "init_lora_weights": False} | given))
    model = peft.get_peft_model(build(kind), config).eval()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data + 0.1 * torch.rand_like(parameter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT looks for the base's configuration on the hub
        model.save_pretrained(folder)
    edit(folder, fields)
    return model


def edit(folder: Path, fields: dict[str, Any]) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def logits(model: Any, adapters: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = fl.apply(model, fl.base_params(model), adapters, IDS).logits
    return found


@pytest.mark.parametrize("trainer", TRAINERS)
def test_folders_of_trainers(trainer: str, tmp_path: Path) -> None:
    given, fields = TRAINERS[trainer]
    theirs = saved(tmp_path, given, fields)
    model = build("Llama").eval()
    adapters, config = fl.load_peft(tmp_path, model)
    with torch.no_grad():
        want = theirs(IDS).logits
    torch.testing.assert_close(logits(model, adapters), want, rtol=1e-5, atol=1e-5)
    assert (logits(model, {}) - want).abs().max() > 1e-2
    fl.save_peft(tmp_path / "again", adapters, config)
    again, _ = fl.load_peft(tmp_path / "again", model)
    assert again.keys() == adapters.keys()


# torchtune writes the files itself.

TORCHTUNE = {"q_proj": "self_attn.q_proj", "k_proj": "self_attn.k_proj", "v_proj": "self_attn.v_proj",
             "output_proj": "self_attn.o_proj", "w2": "mlp.down_proj"}  # fmt: skip


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection in torchtune's order, from those of transformers."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def torchtune_folder(folder: Path, *, dora: bool = False) -> dict[str, Tensor]:
    """What torchtune's checkpointer writes, and the change of each weight in torchtune's own order of rows."""
    model, draw = build("Llama"), torch.Generator().manual_seed(3)
    tensors: dict[str, Tensor] = {}
    changes = {}
    for i in range(2):
        for ours in TORCHTUNE.values():
            name = f"model.layers.{i}.{ours}"
            out, inner = model.get_parameter(f"{name}.weight").shape
            a, b = torch.randn(2, inner, generator=draw) / 4, torch.randn(out, 2, generator=draw) / 4
            changes[f"{name}.weight"] = 16 / 2 * b @ a
            if "q_proj" in name or "k_proj" in name:  # b is in torchtune's order, and is written in transformers'
                heads = 4 if "q_proj" in name else 2
                b = b.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
            tensors |= {
                f"base_model.model.{name}.lora_A.weight": a,
                f"base_model.model.{name}.lora_B.weight": b.contiguous(),
            }
            if dora:
                tensors[f"base_model.model.{name}.lora_magnitude_vector"] = torch.ones(out)
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"r": 2, "lora_alpha": 16, "target_modules": [ours.partition(".")[2] for ours in TORCHTUNE.values()],
              "peft_type": "LORA", "base_model_name_or_path": "meta-llama/Llama-3.2-1B"}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    torch.save({}, folder / "adapter_model.pt")  # its own checkpoint lies beside
    return changes


def test_folders_of_torchtune(tmp_path: Path) -> None:
    changes, model = torchtune_folder(tmp_path), build("Llama").eval()
    adapters, _ = fl.load_peft(tmp_path, model)
    assert adapters.keys() == changes.keys()
    for name, change in changes.items():
        dense = adapters[name].dense(torch.zeros_like(model.get_parameter(name)))
        if "q_proj" in name or "k_proj" in name:
            dense = interleaved(dense, 4 if "q_proj" in name else 2)
        torch.testing.assert_close(dense, change, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        want = peft.PeftModel.from_pretrained(build("Llama"), tmp_path).eval()(IDS).logits
    torch.testing.assert_close(logits(model, adapters), want, rtol=1e-5, atol=1e-5)


def test_dora_of_torchtune_is_refused(tmp_path: Path) -> None:
    """It forgets `use_dora`, and leaves the magnitudes of q and k in its own order: PEFT would drop them."""
    torchtune_folder(tmp_path, dora=True)
    with pytest.raises(FormatError, match=r"lora_magnitude_vector.*belongs to a DoRA adapter, but use_dora is false"):
        fl.load_peft(tmp_path, build("Llama"))


def test_weights_that_zero_3_has_not_gathered(tmp_path: Path) -> None:
    saved(tmp_path, {"target_modules": ["q_proj"]}, {})
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file({key: torch.empty(0) for key in tensors}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(FormatError, match=r"lora_A\.weight' is empty\. DeepSpeed's ZeRO-3 .* Gather them when saving"):
        fl.load_peft(tmp_path, build("Llama"))


# Experts of unsloth, whose releases differ in the order of B's columns.

EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
FIXED = {"auto_mapping": AUTO | {"unsloth_fixed": True}}


def detail(layout: str) -> dict[str, Any]:
    parameters = {name: {"lora_B_layout": layout} for name in ("gate_up_proj", "down_proj")}
    return {"unsloth_fused_expert_lora": {"parameters": parameters}}


@pytest.mark.parametrize(
    "fields",
    [FIXED, FIXED | {"lora_B_layout": "grouped_by_expert"}, detail("grouped_by_expert"),
     {"auto_mapping": {**AUTO, **detail("grouped_by_expert")}}],
)  # fmt: skip
def test_experts_of_older_releases_of_unsloth_are_refused(fields: dict[str, Any], tmp_path: Path) -> None:
    saved(tmp_path, EXPERTS, fields, "Mixtral")
    with pytest.raises(UnsupportedError, match=r"unsloth before 2026\.9\.6 has stored B of the experts by expert"):
        fl.load_peft(tmp_path, build("Mixtral"))


@pytest.mark.parametrize("fields", [{}, FIXED | {"lora_B_layout": "rank_major"}, FIXED | detail("rank_major")])
def test_experts_of_newer_releases_of_unsloth(fields: dict[str, Any], tmp_path: Path) -> None:
    theirs = saved(tmp_path, EXPERTS, fields, "Mixtral")
    model = build("Mixtral").eval()
    adapters, _ = fl.load_peft(tmp_path, model)
    with torch.no_grad():
        torch.testing.assert_close(logits(model, adapters), theirs(IDS).logits, rtol=1e-5, atol=1e-5)


# Fields that no trainer writes are still named.


def test_fields_that_nobody_knows_are_named(tmp_path: Path) -> None:
    saved(tmp_path, {"target_modules": ["q_proj"]}, {"router_aux_loss": 0.1})
    with pytest.warns(PeftFormatWarning, match="unknown fields are ignored, as PEFT 0.21 does: router_aux_loss"):
        fl.load_peft(tmp_path, build("Llama"))
