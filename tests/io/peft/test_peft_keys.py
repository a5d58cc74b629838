"""Keys that PEFT did not write: what is read all the same, and what is refused with a way on."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft_oracle import IDS, Net, Row, build, close, random_peft, save_quietly
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from funclora import apply, base_params, load_peft
from funclora.errors import FormatError, PeftFormatWarning, UnsupportedError

ROW = Row("all", {"target_modules": ["q_proj", "embed"], "use_dora": True, "modules_to_save": ["head"],
                  "bias": "lora_only"})  # fmt: skip
OTHER = Row("other", {"target_modules": ["q_proj"], "lora_bias": True, "trainable_token_indices": {"embed": [3, 1]}})


def renamed(folder: Path, rename: Callable[[str], str]) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({rename(key): value.clone() for key, value in load_file(file).items()}, file, {"format": "pt"})


def named(key: str) -> str:
    """The key as PEFT's modules have it in memory, for an adapter called "mine"."""
    for part in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"):
        key = key.replace(f".{part}.", f".{part}.mine.")
        key = f"{key}.mine" if key.endswith(part) else key
    if key.endswith("trainable_tokens_delta"):
        return f"{key}.mine"
    return f"{key}.mine.weight" if key.endswith("lora_magnitude_vector") else key


READ: dict[str, tuple[Callable[[str], str], str]] = {
    "adapter's name": (named, ""),
    "magnitude with suffix": (lambda key: key + ".weight" * key.endswith("magnitude_vector"), ""),
    "no prefix": (lambda key: key.removeprefix("base_model.model."), "no key starts with 'base_model.model.'"),
    "compiled model": (lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."), "compiled model"),
    "compiled layer": (lambda key: key.replace("q_proj.", "q_proj._orig_mod."), "compiled model"),
    "FSDP": (lambda key: key.replace("q_proj.", "_fsdp_wrapped_module.q_proj."), "without '_fsdp_wrapped_module'"),
    "DDP": (lambda key: f"module.{key}", "without 'module'"),
    "DDP inside": (lambda key: key.replace("base_model.model.", "base_model.model.module."), "without 'module'"),
    "several": (lambda key: f"_orig_mod.module.{key}", "without '_orig_mod', 'module'"),
}


@pytest.mark.parametrize("row", [ROW, OTHER], ids=str)
@pytest.mark.parametrize("name", READ)
def test_other_spellings_are_read(name: str, row: Row, tmp_path: Path) -> None:
    rename, warning = READ[name]
    model = build(row)
    wrapped = random_peft(row, model)
    save_quietly(wrapped, tmp_path)
    renamed(tmp_path, rename)

    if warning:
        with pytest.warns(PeftFormatWarning, match=warning):
            adapters, _ = load_peft(tmp_path, model)
    else:
        adapters, _ = load_peft(tmp_path, model)

    close(apply(model, base_params(model), adapters, IDS), wrapped(IDS))


@pytest.mark.parametrize("name", ["no prefix", "compiled model"])
def test_where_we_warn_peft_reads_nothing(name: str, tmp_path: Path) -> None:
    row = Row("plain", {"target_modules": ["q_proj"]})
    model = build(row)
    save_quietly(random_peft(row, model), tmp_path)
    renamed(tmp_path, READ[name][0])
    with pytest.warns(UserWarning, match="Found missing adapter keys"):
        wrapped = peft.PeftModel.from_pretrained(build(row), tmp_path).eval()
    close(wrapped(IDS), model(IDS))


@pytest.mark.parametrize("row", [ROW, OTHER], ids=str)
def test_what_is_saved_of_a_compiled_peft_model_is_read(row: Row, tmp_path: Path) -> None:
    model = build(row)
    wrapped = random_peft(row, model)
    save_quietly(wrapped, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of shapes that PEFT takes for those of sharded tensors
        tensors = peft.get_peft_model_state_dict(torch.compile(wrapped))
    assert all(key.startswith("_orig_mod.base_model.model.") for key in tensors)
    save_file({key: value.clone() for key, value in tensors.items()}, tmp_path / "adapter_model.safetensors")
    with pytest.warns(PeftFormatWarning, match="without '_orig_mod'; PEFT would not load them"):
        adapters, _ = load_peft(tmp_path, model)
    close(apply(model, base_params(model), adapters, IDS), wrapped(IDS))


def test_a_module_of_the_model_that_is_called_as_a_wrapper_is_its_own(tmp_path: Path) -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = Net()

        def forward(self, ids: Tensor) -> Tensor:
            return self.module(ids)

    row = Row("own", {"target_modules": ["q_proj"]}, Wrapper)
    model = build(row)
    wrapped = random_peft(row, model)
    save_quietly(wrapped, tmp_path)
    adapters, _ = load_peft(tmp_path, model)
    assert all(name.startswith("module.") for name in adapters)
    close(apply(model, base_params(model), adapters, IDS), wrapped(IDS))


def test_a_compiled_model_keeps_its_names(tmp_path: Path) -> None:
    class Compiled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self._orig_mod = Net()

        def forward(self, ids: Tensor) -> Tensor:
            return self._orig_mod(ids)

    row = Row("compiled", {"target_modules": ["q_proj"]}, Compiled)
    model = build(row)
    wrapped = random_peft(row, model)
    save_quietly(wrapped, tmp_path)
    adapters, _ = load_peft(tmp_path, model)
    assert all(name.startswith("_orig_mod.") for name in adapters)
    close(apply(model, base_params(model), adapters, IDS), wrapped(IDS))


def test_two_names_for_one_tensor_are_refused(tmp_path: Path) -> None:
    row = Row("plain", {"target_modules": ["q_proj"]})
    model = build(row)
    save_quietly(random_peft(row, model), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    twin = {key.replace("q_proj.", "q_proj._orig_mod."): value.clone() for key, value in tensors.items()}
    save_file(tensors | twin, file)
    with pytest.raises(FormatError, match="there twice, under another name"):
        load_peft(tmp_path, model)


FOREIGN: dict[str, list[str]] = {
    "kohya's scripts.*load_diffusers": [
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight",
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha",
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight",
        "diffusion_model.double_blocks.0.img_attn.qkv.lora_down.weight",
    ],
    "diffusers before 0.22.*load_diffusers": [
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.down.weight",
        "unet.mid_block.attentions.0.to_q.lora.up.weight",
    ],
    "LyCORIS": ["blocks.0.attn.hada_w1_a", "blocks.0.attn.lokr_w1"],
}


@pytest.mark.parametrize(("whose", "key"), [(whose, key) for whose, keys in FOREIGN.items() for key in keys])
def test_keys_of_other_programs_are_named(whose: str, key: str, tmp_path: Path) -> None:
    row: Any = Row("plain", {"target_modules": ["q_proj"]})
    model = build(row)
    save_quietly(random_peft(row, model), tmp_path)
    save_file({key: torch.ones(2, 2)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UnsupportedError, match=f"is not a key of PEFT, but of {whose}"):
        load_peft(tmp_path, model)
