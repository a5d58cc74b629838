"""Any bytes in an adapter's folder give an adapter that can be applied, or a funclora error that names the folder."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import BYTES, JSON, TREES, Edit, damaged, edited, little_memory, with_header
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import funclora as fl
from funclora.errors import FormatError, FuncloraError, PeftFormatWarning

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.q_proj = nn.Linear(4, 3)
        self.conv = nn.Conv1d(4, 3, 2)
        self.experts = nn.ParameterDict({"up": nn.Parameter(torch.randn(2, 3, 4))})
        self.head = nn.Linear(3, 2)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        y: Tensor = self.q_proj(x) + self.conv(x.mT).sum(-1, keepdim=True).mT + x @ self.experts["up"][0].mT
        z: Tensor = self.head(y)
        return z


KINDS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ["q_proj", "embed"], "rank_pattern": {"embed": 1}, "alpha_pattern": {"embed": 3}},
    "dora": {"target_modules": ["q_proj", "conv"], "use_dora": True, "bias": "lora_only", "modules_to_save": ["head"]},
    "experts": {"target_parameters": ["up"], "target_modules": ["head"]},
    "rows": {"target_modules": ["head"], "trainable_token_indices": {"embed": [1, 3]}, "lora_bias": True},
}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Net()


@pytest.fixture(scope="module")
def whole(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound folder of each kind."""
    root = tmp_path_factory.mktemp("whole")
    for kind, chosen in KINDS.items():
        config = fl.LoraConfig(**{"r": 2, "lora_alpha": 4, "init_lora_weights": False} | chosen)
        fl.save_peft(root / kind, fl.init(model, config, generator=torch.Generator().manual_seed(0)), config)
    return root


def load_and_apply(folder: Path, model: nn.Module) -> None:
    adapters, config = fl.load_peft(folder, model)
    assert adapters
    fl.apply(model, fl.base_params(model), adapters, torch.tensor([[0, 1, 3]]))
    fl.save_peft(folder / "again", adapters, config)


def through_the_cache(folder: Path, model: nn.Module) -> None:
    cache = fl.AdapterCache(model, folder.parent, 1 << 20)
    fl.apply(model, fl.base_params(model), cache[folder.name], torch.tensor([[0, 1, 3]]))


def combined(folder: Path, model: nn.Module) -> None:
    fl.combine_peft([folder, folder], folder / "sum", combination_type="cat")


def combined_on_a_model(folder: Path, model: nn.Module) -> None:
    fl.combine_peft([folder, folder], folder / "sum", combination_type="cat", model=model)


READERS = [load_and_apply, through_the_cache, combined, combined_on_a_model]


def check(reader: Callable[[Path, nn.Module], None], folder: Path, model: nn.Module) -> None:
    """The reader gives a result, or an error that says which folder or argument it is about."""
    with warnings.catch_warnings(), little_memory():
        warnings.simplefilter("ignore", PeftFormatWarning)
        try:
            reader(folder, model)
        except FuncloraError as error:
            str(error).encode()  # it can be printed
    for left in folder.iterdir():
        if left.is_dir():
            shutil.rmtree(left)
        else:
            assert left.name in (CONFIG, WEIGHTS)


@pytest.fixture
def broken(whole: Path, model: nn.Module, tmp_path: Path) -> Callable[..., None]:
    """Reads a folder with some of its files replaced."""

    def read(kind: str, reader: Callable[[Path, nn.Module], None], **files: bytes) -> None:
        folder = tmp_path / "adapters" / "any"
        folder.mkdir(parents=True, exist_ok=True)
        for name, key in ((CONFIG, "config"), (WEIGHTS, "weights")):
            (folder / name).write_bytes(files.get(key, (whole / kind / name).read_bytes()))
        check(reader, folder, model)

    return read


kinds, readers = st.sampled_from(sorted(KINDS)), st.sampled_from(READERS)
hostile = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def _entry(dtype: str, shape: list[Any], begin: int = 0, end: int = 0) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


# What the header says of a tensor more, or of all.
LIES: dict[str, dict[str, Any]] = {
    "beyond torch's integers": {"base_model.model.x": _entry("F32", [0, 2**63])},
    "huge and empty": {"base_model.model.x": _entry("F32", [0, 2**62, 2**62])},
    "billions": {"base_model.model.x": _entry("F32", [10**6, 10**6], 0, 4 * 10**12)},
    "negative": {"base_model.model.x": _entry("F32", [-1, -1], 0, 4)},
    "seventy dimensions": {"base_model.model.x": _entry("F32", [0] * 70)},
    "overlap": {"base_model.model.x": _entry("F32", [1], 0, 4)},
    "backwards": {"base_model.model.x": _entry("F32", [1], 8, 4)},
    "a type that torch has not": {"base_model.model.x": _entry("F6_E2M3", [0])},
    "a type that nobody has": {"base_model.model.x": _entry("F1", [0])},
    "complex": {"base_model.model.x": _entry("C64", [0])},
    "no text": {"__metadata__": {"format": 1}},
}


@pytest.mark.parametrize("lie", LIES)
def test_headers_that_lie(lie: str, model: nn.Module, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / "lora", tmp_path / "a")
    raw = (whole / "lora" / WEIGHTS).read_bytes()
    size = int.from_bytes(raw[:8], "little")
    end = len(raw) - 8 - size
    header = json.loads(raw[8 : 8 + size])
    for key, entry in LIES[lie].items():
        empty = "shape" in entry and 0 in entry["shape"]
        header[key] = entry | {"data_offsets": [end, end]} if empty else entry
    text = json.dumps(header).encode()
    (tmp_path / "a" / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])
    with little_memory(), pytest.raises(FormatError, match=WEIGHTS):
        fl.load_peft(tmp_path / "a", model)


@hostile
@given(kinds, readers, BYTES, BYTES | st.none())
def test_bytes(
    broken: Callable[..., None], whole: Path, kind: str, reader: Any, edits: list[Edit], config: list[Edit] | None
) -> None:
    files = {"weights": damaged((whole / kind / WEIGHTS).read_bytes(), edits)}
    if config is not None:
        files["config"] = damaged((whole / kind / CONFIG).read_bytes(), config)
    broken(kind, reader, **files)


@hostile
@given(kinds, readers, JSON)
def test_configurations(
    broken: Callable[..., None], whole: Path, kind: str, reader: Any, edits: list[tuple[int, Any]]
) -> None:
    raw = json.loads((whole / kind / CONFIG).read_text())
    broken(kind, reader, config=json.dumps(edited(raw, edits)).encode())


@hostile
@given(kinds, readers, JSON)
def test_headers(
    broken: Callable[..., None], whole: Path, kind: str, reader: Any, edits: list[tuple[int, Any]]
) -> None:
    broken(kind, reader, weights=with_header((whole / kind / WEIGHTS).read_bytes(), edits))


@hostile
@given(st.dictionaries(st.sampled_from([field.name for field in fields(fl.LoraConfig)]), TREES))
def test_dicts(given_fields: dict[str, Any]) -> None:
    try:
        config = fl.LoraConfig.from_peft({"peft_type": "LORA", "target_modules": ["q"]} | given_fields)
    except FuncloraError as error:
        str(error).encode()
        return
    assert fl.LoraConfig.from_peft({"peft_type": "LORA"} | config.to_peft().to_dict()) is not None
