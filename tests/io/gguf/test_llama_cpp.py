"""llama.cpp itself, with a base model and our adapter: its logits are those of `apply`.

Needs llama-cpp-python, which is built from source and so is part of no extra: `pip install llama-cpp-python`, then
`pytest -m llama_cpp`. The tests of llama.cpp's own scripts need its repository: LLAMA_CPP_REPOSITORY=folder.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_models import base_gguf, build, in_llama_cpp, lora
from torch import Tensor

import funclora as fl

pytestmark = [pytest.mark.llama_cpp, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
with_llama_cpp = pytest.mark.skipif(find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
REPOSITORY = os.environ.get("LLAMA_CPP_REPOSITORY", "")
with_scripts = pytest.mark.skipif(not REPOSITORY, reason="LLAMA_CPP_REPOSITORY names no folder")

IDS = [1, 7, 4, 11, 16, 5, 9, 9, 12, 6]


def by_llama_cpp(base: Path, adapter: Path | None = None, scale: float = 1.0) -> Tensor:
    """The logits of every position, in float32 throughout: without it the cache of keys and values has half of it."""
    import llama_cpp

    model = llama_cpp.Llama(
        str(base), lora_path=adapter and str(adapter), lora_scale=scale, n_ctx=32, n_batch=32, n_threads=1,
        n_threads_batch=1, type_k=0, type_v=0, logits_all=True, verbose=False, n_gpu_layers=0,
    )  # fmt: skip
    try:
        assert adapter is None or model._lora_adapter, "llama.cpp refused the adapter"  # the binding would crash
        model.eval(IDS)
        return torch.from_numpy(np.array(model.scores[: len(IDS)]))
    finally:
        model.close()


def by_us(model: Any, adapters: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = fl.apply(model, fl.base_params(model), adapters, torch.tensor([IDS])).logits[0]
    return logits


# llama.cpp looks GELU up in a table of half precision; SiLU is exact.
ROUNDING, HALF = 5e-6, 3e-3
TOLERANCE = {"Llama": ROUNDING, "Mistral": ROUNDING, "Qwen2": ROUNDING, "Qwen3": ROUNDING}
TOLERANCE |= {"Mixtral": ROUNDING, "Olmo2": 4 * ROUNDING, "Phi3": ROUNDING, "Qwen3Moe": ROUNDING}
TOLERANCE |= dict.fromkeys(("GPT2", "Gemma", "Gemma2", "Gemma3"), HALF)
EXPERTS = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj", "gate.weight"]}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("Llama", {}, {}),
    "llama, tied": ("Llama", {"tie_word_embeddings": True}, {}),
    "llama, embeddings": ("Llama", {}, {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "llama, rslora and patterns": (
        "Llama",
        {},
        {"use_rslora": True, "rank_pattern": {"q_proj": 5, "up_proj": 1}, "alpha_pattern": {"v_proj": 7.3}},
    ),
    "mistral": ("Mistral", {}, {}),
    "qwen2": ("Qwen2", {}, {}),
    "qwen2, embeddings": ("Qwen2", {}, {"target_modules": ["embed_tokens", "lm_head"]}),
    "qwen3": ("Qwen3", {}, {}),
    "phi3": ("Phi3", {}, {}),
    "phi3, embeddings": ("Phi3", {}, {"target_modules": ["embed_tokens", "lm_head", "qkv_proj"]}),
    "olmo2": ("Olmo2", {}, {}),
    "qwen3 moe": ("Qwen3Moe", {}, {"target_modules": ["q_proj", "v_proj", "o_proj"], **EXPERTS}),
    "qwen3 moe, attention": ("Qwen3Moe", {}, {"target_modules": ["q_proj", "k_proj", "lm_head"]}),
    "mixtral": ("Mixtral", {}, {"target_modules": ["q_proj", "k_proj"], **EXPERTS}),
    "mixtral, gates and ups": ("Mixtral", {}, {"target_modules": [], "target_parameters": ["experts.gate_up_proj"]}),
    "gpt2": ("GPT2", {}, {}),
    "gemma": ("Gemma", {"tie_word_embeddings": True}, {}),
    "gemma2": ("Gemma2", {"tie_word_embeddings": True, "query_pre_attn_scalar": 8}, {}),
    "gemma3, embeddings": (
        "Gemma3",
        {"query_pre_attn_scalar": 8},
        {"target_modules": ["embed_tokens", "lm_head", "k_proj"]},
    ),
    "gemma3": ("Gemma3", {"tie_word_embeddings": True, "query_pre_attn_scalar": 8}, {}),
}


def compared(
    kind: str, fields: dict[str, Any], config: dict[str, Any], folder: Path, dtype: torch.dtype = torch.float32
) -> tuple[float, float, float]:
    """How much an adapter moves the logits, and by how much llama.cpp's differ without and with it."""
    heads = {} if kind in ("GPT2", "Olmo2", "Phi3", "Qwen2") else {"head_dim": 8}  # else wider than hidden_size / heads
    model = build(kind, attn_implementation="eager", **heads, **fields).eval()
    for parameter in model.parameters():  # biases too, so that each tensor has a say
        parameter.data += 0.1 * torch.randn_like(parameter)
    adapters, _ = lora(model, **({"r": 4, "lora_alpha": 2} | config))
    adapters = {n: fl.LoRA(0.2 * r.a, 0.5 * r.b, scaling=r.scaling, layout=r.layout) for n, r in adapters.items()}
    base, adapter = folder / "base.gguf", folder / "adapter.gguf"
    base_gguf(model, base)
    fl.save_gguf(adapter, adapters, model, dtype=dtype)
    plain, want = by_us(model, {}), by_us(model, adapters)
    differences = by_llama_cpp(base) - plain, by_llama_cpp(base, adapter) - want
    effect, before, after = (x.abs().max().item() for x in (want - plain, *differences))
    return effect, before, after


@with_llama_cpp
@pytest.mark.parametrize("case", CASES)
def test_logits(case: str, tmp_path: Path) -> None:
    effect, before, after = compared(*CASES[case], tmp_path)
    print(f"{case}: effect {effect:.2g}, base {before:.2g}, adapter {after:.2g}")  # noqa: T201
    tolerance = TOLERANCE[CASES[case][0]]
    assert max(before, after) < tolerance
    assert effect > 100 * tolerance


@with_llama_cpp
def test_logits_of_half_precision(tmp_path: Path) -> None:
    config = {"target_modules": ["embed_tokens", "lm_head", "q_proj", "down_proj"]}
    effect, _, after = compared("Llama", {}, config, tmp_path, torch.float16)
    assert ROUNDING < after < HALF
    assert effect > 100 * HALF


def script(name: str, *args: object) -> None:
    """Run a script of llama.cpp."""
    command = [sys.executable, str(Path(REPOSITORY, name)), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def tensors_of(file: Path) -> dict[str, np.ndarray]:
    return {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(file).tensors}


# Not GPT-2: the script takes the factors of its transposed layers for those of the weights as they are stored.
@with_scripts
@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen2", "Qwen3", "Phi3", "Olmo2", "Gemma", "Gemma2", "Gemma3"])
def test_their_converter_of_adapters_writes_the_same(kind: str, tmp_path: Path) -> None:
    model = build(kind)
    model.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {}}, "added_tokens": []}))
    adapters, config = lora(model)
    fl.save_peft(tmp_path / "adapter", adapters, config)
    theirs, ours = tmp_path / "theirs.gguf", tmp_path / "ours.gguf"
    script("convert_lora_to_gguf.py", "--base", tmp_path / "base", "--outfile", theirs, tmp_path / "adapter")
    fl.save_gguf(ours, adapters, model)
    one, other = tensors_of(ours), tensors_of(theirs)
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name]) for name in one)
    loaded, _ = fl.load_gguf(theirs, model)
    assert loaded.keys() == adapters.keys()


@with_scripts
def test_their_converter_takes_the_merged_model(tmp_path: Path) -> None:
    model = build("Llama", vocab_size=263)
    tokenizer().save_pretrained(tmp_path)
    adapters, _ = lora(model)
    merged = fl.merge(fl.base_params(model), adapters)
    model.load_state_dict(merged)
    model.save_pretrained(tmp_path)
    script("convert_hf_to_gguf.py", "--outtype", "f32", "--outfile", tmp_path / "merged.gguf", tmp_path)
    found = tensors_of(tmp_path / "merged.gguf")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name in adapters:
        want = in_llama_cpp(model, name, merged[name]).numpy()
        assert np.array_equal(found[names.get_name(name, (".weight",))], want)
    if find_spec("llama_cpp") is not None:
        assert (by_llama_cpp(tmp_path / "merged.gguf") - by_us(model, {})).abs().max() < ROUNDING


def tokenizer() -> Any:
    """One of Llama's kind: pairs of characters, and bytes for the rest."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "ab"]
    vocab = {word: i for i, word in enumerate(words)}
    fast = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b")], byte_fallback=True, unk_token="<unk>"))
    fast.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
