"""Adapters of another model, vocabulary, depth or rank: the error names file, key, what came, and what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import MODELS, contents, save_adapter, save_base

import funclora as fl
from funclora.errors import FormatError, FuncloraError, TargetError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")

ELSEWHERE = r"If the adapter is for another model than this LlamaForCausalLM, load it on the one of '.*trained'\.$"
LARGER = r"trained with 48 tokens, and the model has 40\. Call model\.resize_token_embeddings\(48\)"
Q = r"base_model\.model\.model\.layers\.{}\.self_attn\.q_proj\.lora_A\.weight"


def rank_in_the_configuration(folder: Path) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"r": 4}))


# The base that was trained, the adapter's options, and what is said of it on another.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], type[FuncloraError], str]] = {
    "table": (
        {"vocab_size": 48}, {"target_modules": ["embed_tokens"]}, FormatError,
        rf"model\.embed_tokens\.lora_embedding_A' has shape \[2, 48\], expected \[2, 40\].*{LARGER}",
    ),
    "head": (
        {"vocab_size": 48}, {"target_modules": ["lm_head"]}, FormatError,
        rf"lm_head\.lora_B\.weight' has shape \[48, 2\], expected \[40, 2\].*{LARGER}",
    ),
    "saved head": (
        {"vocab_size": 48}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, FormatError,
        rf"lm_head\.weight' has shape \[48, 16\], expected \[40, 16\].*{LARGER}",
    ),
    "tokens": (
        {"vocab_size": 48}, {"target_modules": ["q_proj"], "trainable_token_indices": [45]}, TargetError,
        rf"'model\.embed_tokens' has 40 rows; token 45 does not exist\. {ELSEWHERE}",
    ),
    "width": (
        {"hidden_size": 32}, {"target_modules": ["q_proj"]}, FormatError,
        rf"{Q.format(0)}' has shape \[2, 32\], expected \[2, 16\].*{ELSEWHERE}",
    ),
    "more layers": (
        {"num_hidden_layers": 3}, {"target_modules": ["q_proj"]}, FormatError,
        rf"unexpected key '{Q.format(2)}'.*{ELSEWHERE}",
    ),
    "fewer layers": (
        {"num_hidden_layers": 1}, {"target_modules": ["q_proj"]}, FormatError,
        rf"there is no '{Q.format(1)}'.*{ELSEWHERE}",
    ),
}  # fmt: skip


def llama(**changes: Any) -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**sizes, "vocab_size": 40, **changes}))


# What a merge says where it is not the same: it makes room for the tokens, and the base's own values are others.
OTHER_VALUES = r"base_layer\.weight' holds other values than .* has, and PEFT would overwrite it"
MERGES = {
    "table": OTHER_VALUES,
    "head": OTHER_VALUES,
    "saved head": r"needs 'model\.embed_tokens\.weight', which neither this folder nor an adapter contains",
}


def refused(root: Path, error: type[FuncloraError], message: str, merge: str | None = None) -> None:
    """By the reader of adapters, and by a merge, which leaves nothing."""
    save_base(root / "base", "llama")
    before = contents(root)
    jobs: list[tuple[str, Callable[[], Any]]] = [
        (message, lambda: fl.load_peft(root / "adapter", llama())),
        (merge or message, lambda: fl.merge_checkpoint(root / "base", root / "adapter", root / "out")),
    ]
    for said, job in jobs:
        with pytest.raises(error, match=said) as caught:
            job()
        assert str(root) in str(caught.value)
    assert contents(root) == before


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_of_another_base(case: str, tmp_path: Path) -> None:
    changes, options, error, message = CASES[case]
    llama(**changes).save_pretrained(tmp_path / "trained")
    save_adapter(
        tmp_path / "trained", transformers.LlamaForCausalLM, tmp_path / "adapter", **options,
        base_model_name_or_path=str(tmp_path / "trained"),
    )  # fmt: skip
    refused(tmp_path, error, message, MERGES.get(case))


def test_an_adapter_of_another_architecture(tmp_path: Path) -> None:
    cls = type(save_base(tmp_path / "trained", "gpt2"))
    save_adapter(tmp_path / "trained", cls, tmp_path / "adapter", target_modules=["c_attn"])
    refused(tmp_path, TargetError, rf"'c_attn' matches no module\. Near names: .*{ELSEWHERE}")


def test_a_rank_that_the_configuration_does_not_have(tmp_path: Path) -> None:
    cls = type(save_base(tmp_path / "trained", "llama"))
    save_adapter(tmp_path / "trained", cls, tmp_path / "adapter", target_modules=["q_proj"])
    rank_in_the_configuration(tmp_path / "adapter")
    refused(tmp_path, FormatError, rf"{Q.format(0)}' has 2 rows, expected 4: rank 4 .* Give it the rank of the tensors")


def test_extracting_from_a_model_of_other_sizes(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    for name, changes, message in (
        (
            "vocabulary",
            {"vocab_size": 48},
            r"'model\.embed_tokens\.weight' has the shape \[40, 16\].*\[48, 16\]; .*resize",
        ),
        ("fewer", {"num_hidden_layers": 1}, r"'model\.layers\.1.*does not have it; expected the same"),
        (
            "more",
            {"num_hidden_layers": 3},
            r"it has 'model\.layers\.2.*does not; expected models with the same structure",
        ),
    ):
        llama(**changes).save_pretrained(tmp_path / name)
        with pytest.raises(FormatError, match=message):
            fl.extract_adapter(tmp_path / "base", tmp_path / name, tmp_path / "out", r=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_a_gguf_file_of_another_model(kind: str, tmp_path: Path) -> None:
    config = fl.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    fl.save_gguf(tmp_path / "a.gguf", fl.init(llama(), config), llama())
    with torch.device("meta"):
        model = MODELS[kind]()
    with pytest.raises(
        FuncloraError, match=r"the adapter is for 'llama', but GPT2|BertForMaskedLM has no form in GGUF"
    ):
        fl.load_gguf(tmp_path / "a.gguf", model)
    with pytest.raises(FormatError, match=r"lora_a' has shape \[2, 16\], expected \[2, 32\]"):
        fl.load_gguf(tmp_path / "a.gguf", llama(hidden_size=32))
