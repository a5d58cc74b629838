"""Any bytes in the files of other trainers give adapters that can be applied, or a funclora error."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from damage import BYTES, JSON, Edit, damaged, edited, little_memory, with_header
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_pipelines import components, kohya, layers
from safetensors.torch import load_file, save_file
from torch import nn

import funclora as fl
from funclora.errors import FuncloraError, FuncloraWarning
from funclora.io import load_diffusers, load_mlx, save_diffusers, save_mlx
from funclora.io.foreign.bare import is_foreign, read_factors

CONFIG, WEIGHTS, IMAGE = "adapter_config.json", "adapters.safetensors", "style.safetensors"
hostile = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def language_model() -> nn.Module:
    block = nn.ModuleDict({"q_proj": nn.Linear(4, 3), "v_proj": nn.Linear(4, 3)})
    return nn.ModuleDict({"embed": nn.Embedding(7, 4), "layers": nn.ModuleList([block])})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sound files of each kind."""
    root, draw = tmp_path_factory.mktemp("whole"), torch.Generator().manual_seed(0)
    model = language_model()
    for kind in ("lora", "dora"):
        config = fl.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], use_dora=kind == "dora")
        save_mlx(root / kind, fl.init(model, config, generator=draw), model)
    unet = components("sd")["unet"]
    (root / "kohya").mkdir()
    kohya(root / "kohya" / IMAGE, {"lora_unet": layers(unet, ("attn1.to_q", "conv_in"))}, ranks=[2], alphas=[1.0])
    config = fl.LoraConfig(r=2, target_modules=["conv_in", "conv_out"])
    save_diffusers(root / "diffusers", {"unet": (fl.init(unet, config), config)}, name=IMAGE)
    fields = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["conv_in", "conv_out"]).to_dict()
    text = json.dumps({f"unet.{key}": [*v] if isinstance(v, set) else v for key, v in fields.items()}, default=str)
    (root / "metadata").mkdir()
    tensors = load_file(root / "diffusers" / IMAGE)
    save_file(tensors, root / "metadata" / IMAGE, metadata={"lora_adapter_metadata": text})
    return root


def from_mlx(folder: Path) -> None:
    model = language_model()
    adapters, config = load_mlx(folder, model)
    assert adapters
    fl.merge(fl.base_params(model), adapters)
    fl.save_peft(folder / "again", adapters, config)


def bare(folder: Path) -> None:
    path = folder / IMAGE if (folder / IMAGE).exists() else folder
    is_foreign(path)
    assert read_factors(path)[0]


def from_diffusers(folder: Path) -> None:
    found = load_diffusers(folder / IMAGE, components("sd"))
    for name, (adapters, _) in found.items():
        fl.merge(fl.base_params(components("sd")[name]), adapters)


def check(reader: Callable[[Path], None], folder: Path) -> None:
    with warnings.catch_warnings(), little_memory():
        warnings.simplefilter("ignore", FuncloraWarning)
        try:
            reader(folder)
        except FuncloraError as error:
            str(error).encode()  # it can be printed


def copied(whole: Path, kind: str, folder: Path, **files: bytes) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole / kind, folder)
    for name, content in files.items():
        (folder / {"config": CONFIG, "weights": WEIGHTS, "image": IMAGE}[name]).write_bytes(content)
    return folder


readers = st.sampled_from([from_mlx, bare])
mlx_kinds, image_kinds = st.sampled_from(["lora", "dora"]), st.sampled_from(["kohya", "diffusers", "metadata"])


@hostile
@given(mlx_kinds, readers, BYTES)
def test_bytes_of_mlx(whole: Path, tmp_path: Path, kind: str, reader: Any, edits: list[Edit]) -> None:
    weights = damaged((whole / kind / WEIGHTS).read_bytes(), edits)
    check(reader, copied(whole, kind, tmp_path / "a", weights=weights))


@hostile
@given(mlx_kinds, readers, JSON, JSON)
def test_json_of_mlx(
    whole: Path, tmp_path: Path, kind: str, reader: Any, edits: list[tuple[int, Any]], header: list[tuple[int, Any]]
) -> None:
    config = json.dumps(edited(json.loads((whole / kind / CONFIG).read_text()), edits)).encode()
    check(reader, copied(whole, kind, tmp_path / "a", config=config))
    weights = with_header((whole / kind / WEIGHTS).read_bytes(), header)
    check(reader, copied(whole, kind, tmp_path / "a", weights=weights))


@settings(hostile, max_examples=25)
@given(image_kinds, st.sampled_from([bare, from_diffusers]), BYTES, JSON)
def test_image_files(
    whole: Path, tmp_path: Path, kind: str, reader: Any, edits: list[Edit], header: list[tuple[int, Any]]
) -> None:
    content = (whole / kind / IMAGE).read_bytes()
    for image in (damaged(content, edits), with_header(content, header)):
        check(reader, copied(whole, kind, tmp_path / "a", image=image))


@settings(hostile, max_examples=25)
@given(st.sampled_from([bare, from_diffusers]), JSON)
def test_metadata_of_image_files(whole: Path, tmp_path: Path, reader: Any, edits: list[tuple[int, Any]]) -> None:
    content = (whole / "metadata" / IMAGE).read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    fields = json.loads(header["__metadata__"]["lora_adapter_metadata"])
    header["__metadata__"]["lora_adapter_metadata"] = json.dumps(edited(fields, edits))
    text = json.dumps(header).encode()
    image = len(text).to_bytes(8, "little") + text + content[8 + size :]
    check(reader, copied(whole, "metadata", tmp_path / "a", image=image))
