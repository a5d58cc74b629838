"""Any bytes in a model's folder, and any adapter next to it: a result, or an error, and nothing half-written."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import contents, save_adapter, save_base
from damage import BYTES, JSON, Edit, damaged, edited, little_memory, with_header
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import funclora as fl
from funclora.errors import FormatError, FuncloraError, UnsupportedError

hostile = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
FILES = {
    "config": "base/config.json",
    "index": "base/model.safetensors.index.json",
    "shard": "base/model-00002-of-00003.safetensors",
    "adapter": "adapter/adapter_config.json",
    "tensors": "adapter/adapter_model.safetensors",
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole")
    cls = type(save_base(root / "base", "llama", shard="10KB"))
    save_adapter(root / "base", cls, root / "adapter", target_modules=["q_proj", "down_proj"])
    save_base(root / "tuned", "llama", shard="10KB")
    assert all((root / file).is_file() for file in FILES.values())
    return root


def merged(root: Path) -> None:
    fl.merge_checkpoint(root / "base", root / "adapter", root / "out")


def planned(root: Path) -> None:
    fl.merge_checkpoint(root / "base", root / "adapter", root / "out", dry_run=True)


def extracted(root: Path) -> None:
    fl.extract_adapter(root / "base", root / "tuned", root / "out", r=1, rest="ignore")


JOBS = [merged, planned, extracted]


@pytest.fixture
def attempt(whole: Path, tmp_path: Path) -> Callable[..., None]:
    """Does a job on folders with one of the files replaced."""
    for name in ("base", "adapter", "tuned"):
        shutil.copytree(whole / name, tmp_path / name)

    def run(job: Callable[[Path], None], name: str, content: bytes) -> None:
        for other in FILES.values():  # what an example that failed may have left
            shutil.copyfile(whole / other, tmp_path / other)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        (tmp_path / FILES[name]).write_bytes(content)
        before = contents(tmp_path)
        with warnings.catch_warnings(), little_memory():
            warnings.simplefilter("ignore")
            try:
                job(tmp_path)
            except FuncloraError as error:
                str(error).encode()
        if job is not planned:
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
        assert contents(tmp_path) == before

    return run


jobs, names = st.sampled_from(JOBS), st.sampled_from(sorted(FILES))


@hostile
@given(jobs, names, BYTES)
def test_bytes(attempt: Callable[..., None], whole: Path, job: Any, name: str, edits: list[Edit]) -> None:
    attempt(job, name, damaged((whole / FILES[name]).read_bytes(), edits))


@hostile
@example(planned, "config", [(0, [])])
@given(jobs, st.sampled_from(["config", "index", "adapter"]), JSON)
def test_json(attempt: Callable[..., None], whole: Path, job: Any, name: str, edits: list[tuple[int, Any]]) -> None:
    attempt(job, name, json.dumps(edited(json.loads((whole / FILES[name]).read_text()), edits)).encode())


CONFIGS: dict[str, tuple[dict[str, Any], type[FuncloraError], str]] = {
    "layers without end": ({"num_hidden_layers": 10**9}, FormatError, "num_hidden_layers: expected at most 10000"),
    "more layers than tensors": ({"num_hidden_layers": 900}, FormatError, "has more than 1210 parameters"),
    "a vocabulary": ({"vocab_size": 10**15}, FormatError, "has shape"),
    "no number": ({"hidden_size": "16"}, FormatError, "LlamaForCausalLM cannot be made from config.json: "),
    "no heads": ({"num_attention_heads": 0}, FormatError, "LlamaForCausalLM cannot be made from config.json: "),
    "a module": ({"architectures": ["utils"]}, UnsupportedError, "has no model class 'utils'"),
    "a function": ({"architectures": ["__init__"]}, UnsupportedError, "has no model class '__init__'"),
    "a list of kinds": ({"model_type": []}, FormatError, "model_type: expected a string, got "),
    "no name": ({"architectures": [{}]}, UnsupportedError, "has no model class {}"),
}


@pytest.mark.parametrize("what", CONFIGS)
def test_a_configuration_that_no_model_has(what: str, whole: Path, tmp_path: Path) -> None:
    changes, error, message = CONFIGS[what]
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    file = tmp_path / FILES["config"]
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with little_memory(), pytest.raises(error, match=message):
        planned(tmp_path)


@hostile
@given(jobs, st.sampled_from(["shard", "tensors"]), JSON)
def test_headers(attempt: Callable[..., None], whole: Path, job: Any, name: str, edits: list[tuple[int, Any]]) -> None:
    attempt(job, name, with_header((whole / FILES[name]).read_bytes(), edits))
