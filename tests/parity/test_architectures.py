"""PEFT over the architectures of transformers: what funclora writes PEFT computes alike, and the other way round.

Every class of `architectures` is in the test. `REFUSED` has those in which `save_peft` refuses some layers of
"all-linear", and says why; without these layers they are like all others. `PEFT_FAILS` has those that PEFT itself
cannot adapt or save.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
from architectures import MODELS, build
from torch import Tensor
from torch.utils import _pytree as pytree

from funclora import LoraConfig, apply, base_params, init, load_peft, save_peft
from funclora.errors import PeftFormatWarning, TargetError, UnsupportedError


class Refused(NamedTuple):
    """Layers that PEFT cannot hold, and why."""

    layers: list[str]
    why: str


ATTENTION = Refused(["head.attention.out_proj"], "both projections of nn.MultiheadAttention")
MAMBA = Refused(["out_proj"], "PEFT refuses out_proj and conv1d")
TIME = Refused(["dt_proj", "out_proj"], "reads the weight in place of calling")
ROUTER = Refused(["router"], "has a forward of its own")
RELATIVE = Refused(["k_proj", "q_proj", "v_proj", "out_proj"], "WavLMAttention reads the weight in place of calling")
REFUSED = {
    "AriaForConditionalGeneration": Refused(["multihead_attn.out_proj"], ATTENTION.why),
    "AyaVisionForConditionalGeneration": ATTENTION,
    "Cohere2VisionForConditionalGeneration": ATTENTION,
    "DeepseekV4ForCausalLM": Refused(["o_a_proj"], ROUTER.why),
    "DeepseekVLForConditionalGeneration": ATTENTION,
    "FalconH1ForCausalLM": MAMBA,
    "FalconMambaForCausalLM": TIME._replace(why="PEFT refuses|reads the weight"),
    "Gemma3ForConditionalGeneration": ATTENTION,
    "LagunaForCausalLM": Refused(["shared_experts.gate_proj", "shared_experts.up_proj", "shared_experts.down_proj"],
                                 "as a name of an older transformers"),
    "Lfm2VlForConditionalGeneration": ATTENTION,
    "Llama4ForCausalLM": ROUTER,
    "LlavaOnevisionForConditionalGeneration": ATTENTION,
    "Mamba2ForCausalLM": MAMBA,
    "MambaForCausalLM": TIME,
    "ModernVBertForMaskedLM": ATTENTION,
    "NemotronHForCausalLM": MAMBA,
    "PaliGemmaForConditionalGeneration": ATTENTION,
    "PhimoeForCausalLM": ROUTER,
    "SiglipForImageClassification": ATTENTION,
    "SiglipModel": ATTENTION,
    "T5Gemma2ForConditionalGeneration": ATTENTION,
    "UltraVBertForMaskedLM": ATTENTION,
    "WavLMForCTC": RELATIVE,
    "WavLMForSequenceClassification": RELATIVE,
}  # fmt: skip
# Layers that the model calls in some cases and reads in others, these among them: `save_peft` warns.
WARNED = {"JambaForCausalLM": ["dt_proj"]}
# "all-linear" and PEFT: why it makes no adapter, or none that can be saved.
NO_EMBEDDINGS = (NotImplementedError, "get_input_embeddings")
PEFT_FAILS: dict[str, tuple[type[Exception], str]] = {
    "Data2VecAudioForCTC": NO_EMBEDDINGS, "HubertForCTC": NO_EMBEDDINGS, "SEWDForCTC": NO_EMBEDDINGS,
    "SEWForCTC": NO_EMBEDDINGS, "UniSpeechForCTC": NO_EMBEDDINGS, "UniSpeechSatForCTC": NO_EMBEDDINGS,
    "Wav2Vec2BertForCTC": NO_EMBEDDINGS, "Wav2Vec2ConformerForCTC": NO_EMBEDDINGS, "Wav2Vec2ForCTC": NO_EMBEDDINGS,
    "WavLMForCTC": NO_EMBEDDINGS, "Qwen3OmniMoeThinkerForConditionalGeneration": (ValueError, "is not supported"),
}  # fmt: skip
EMPTY = "MobileBertForMaskedLM"  # PEFT adapts a weight of shape [0, 64], which funclora skips


def outputs(model: Any, inputs: dict[str, Any]) -> list[Tensor]:
    with torch.no_grad():
        found = model(**inputs)
    return [x for x in pytree.tree_leaves(found.to_tuple()) if isinstance(x, Tensor) and x.is_floating_point()]


def distance(ours: list[Tensor], theirs: list[Tensor]) -> float:
    pairs = zip(ours, theirs, strict=True)
    return max(float((a - b).abs().max() / (1e-3 + b.abs().max())) for a, b in pairs if b.numel())


def loaded_by_peft(model: Any, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")
        warnings.filterwarnings("ignore", "(?!Found missing)")
        return peft.PeftModel.from_pretrained(copy.deepcopy(model), folder).eval().base_model.model


def random_peft(model: Any, **config: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted: Any = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**config)).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return adapted


def saved_by_peft(model: Any, folder: Path, **config: Any) -> Any:
    adapted = random_peft(model, **config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted.save_pretrained(folder)
    return adapted.base_model.model


@pytest.mark.filterwarnings("ignore::funclora.errors.PeftFormatWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    "name", [name if i % 5 == 0 else pytest.param(name, marks=pytest.mark.slow) for i, name in enumerate(MODELS)]
)
def test_peft_computes_what_was_written_and_its_own_files_are_read(name: str, tmp_path: Path) -> None:
    model, inputs = build(name)
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = False
    base = outputs(model, inputs)
    params = base_params(model)
    fields: dict[str, Any] = {"r": 2, "lora_alpha": 2, "target_modules": "all-linear", "init_lora_weights": False}
    if name in REFUSED:
        config = LoraConfig(**fields)
        with pytest.raises(UnsupportedError, match=REFUSED[name].why):
            save_peft(tmp_path / "refused", init(model, config), config, model=model)
        fields["exclude_modules"] = REFUSED[name].layers
    if name in WARNED:
        config = LoraConfig(**fields)
        with pytest.warns(PeftFormatWarning, match="compare the outputs"):
            save_peft(tmp_path / "warned", init(model, config), config, model=model)
        fields["exclude_modules"] = WARNED[name]
    config = LoraConfig(**fields)

    adapters = init(model, config)
    ours = outputs(lambda **given: apply(model, params, adapters, **given), inputs)
    assert distance(ours, base) > 1e-3, "the adapter must matter"
    save_peft(tmp_path, adapters, config, model=model)
    assert distance(outputs(loaded_by_peft(model, tmp_path), inputs), ours) < 1e-5
    back, _ = load_peft(tmp_path, model)
    assert distance(outputs(lambda **given: apply(model, params, back, **given), inputs), ours) < 1e-6

    if name in PEFT_FAILS:
        kind, why = PEFT_FAILS[name]
        with pytest.raises(kind, match=why):
            saved_by_peft(model, tmp_path / "peft", **fields)
        return
    theirs = outputs(saved_by_peft(model, tmp_path / "peft", **fields), inputs)
    if name == EMPTY:
        with pytest.raises(TargetError, match="it is empty"):
            load_peft(tmp_path / "peft", model)
        return
    read, _ = load_peft(tmp_path / "peft", model)
    assert read.keys() == adapters.keys(), "all-linear means the same"
    assert distance(outputs(lambda **given: apply(model, params, read, **given), inputs), theirs) < 1e-5
