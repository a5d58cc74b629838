"""Any bytes in the folder of a model: it is loaded, or there is one line that names it, and no code of it has run."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import task_models
import torch
from damage import BYTES, JSON, Edit, damaged, edited, little_memory
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from text_models import PLAIN
from typer.testing import CliRunner

from funclora._apps.train.base import context_limit, known_classes, load_base, load_tokenizer
from funclora._apps.train.settings import CAUSAL, SEQ2SEQ, SEQUENCE, TOKEN, Settings
from funclora.cli._app import app
from funclora.errors import FuncloraError
from funclora.io.hf.library import check_config

FILES = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
         "model.safetensors"]  # fmt: skip
KINDS = {CAUSAL: "llama", SEQUENCE: "bert", TOKEN: "bert", SEQ2SEQ: "t5"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole")
    torch.manual_seed(0)
    for kind in {*KINDS.values()}:
        task_models.save(root / kind, kind, template=PLAIN)
    return root


@pytest.fixture
def attempt(whole: Path, tmp_path: Path) -> Callable[..., str]:
    """Loads a folder with one of its files replaced; what is said of it, empty if it is loaded."""
    for kind in {*KINDS.values()}:
        shutil.copytree(whole / kind, tmp_path / kind)

    def load(task: str, name: str, content: bytes) -> str:
        folder = tmp_path / KINDS[task]
        for file in (whole / KINDS[task]).iterdir():  # what an example that failed may have left
            shutil.copyfile(file, folder / file.name)
        (folder / name).write_bytes(content)
        given = Settings(model=folder, task=task)
        with warnings.catch_warnings(), little_memory():
            warnings.simplefilter("ignore")
            try:
                tokenizer = load_tokenizer(given)
                context_limit(given)
                classes = known_classes(given)
                base = load_base(given, tokenizer, classes or (("a", "b") if task in (SEQUENCE, TOKEN) else ()))
                assert base.tokenizer("red dog")["input_ids"] is not None
            except FuncloraError as error:
                str(error).encode()
                assert str(folder) in str(error)  # noqa: PT017
                assert len(str(error).splitlines()) == 1  # noqa: PT017
                return str(error)
        return ""

    return load


tasks, names = st.sampled_from(sorted(KINDS)), st.sampled_from(FILES)
hostile = settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])


def content_of(whole: Path, task: str, name: str) -> bytes:
    file = whole / KINDS[task] / name
    return file.read_bytes() if file.exists() else b"{}"


@hostile
@given(tasks, names, BYTES)
def test_bytes(attempt: Callable[..., str], whole: Path, task: str, name: str, edits: list[Edit]) -> None:
    attempt(task, name, damaged(content_of(whole, task, name), edits))


@hostile
@given(tasks, st.sampled_from([name for name in FILES if name.endswith(".json")]), JSON)
def test_json(attempt: Callable[..., str], whole: Path, task: str, name: str, edits: list[tuple[int, Any]]) -> None:
    attempt(task, name, json.dumps(edited(json.loads(content_of(whole, task, name)), edits)).encode())


# A file, what is changed in it, and what is said.
SEEDS: dict[str, tuple[str, dict[str, Any], str]] = {
    "an activation": ("config.json", {"hidden_act": 5}, r"config\.json cannot be read|does not describe a model"),
    "a padding id": ("config.json", {"pad_token_id": 10**6}, r"does not describe a model: Padding_idx must be within"),
    "no heads": ("config.json", {"num_attention_heads": 0}, r"cannot be read|does not describe a model"),
    "layers": ("config.json", {"num_hidden_layers": 10**9}, r"num_hidden_layers: expected at most 10000"),
    "labels": ("config.json", {"num_labels": 10**9}, r"num_labels: expected at most 10000"),
    "a vocabulary": ("config.json", {"vocab_size": 10**12}, r"describes .* values, but the weight files contain"),
    "positions": (
        "config.json",
        {"rope_parameters": {"rope_type": "x"}},
        r"rope_type|cannot|does not describe",
    ),
    "a kind": ("config.json", {"model_type": []}, r"cannot be read|no tokenizer"),
    "a class": ("tokenizer_config.json", {"tokenizer_class": 5}, r"finds no tokenizer in"),
    "a length": ("tokenizer_config.json", {"model_max_length": []}, r"finds no tokenizer in"),
    "added tokens": ("tokenizer_config.json", {"added_tokens_decoder": {"x": 1}}, r"finds no tokenizer in"),
    "tokens": ("tokenizer.json", {"model": None}, r"finds no tokenizer in"),
    "merges": ("tokenizer.json", {"model": {"type": "BPE", "vocab": {}, "merges": ["a b"]}}, r"finds no tokenizer in"),
}


@pytest.mark.parametrize("what", SEEDS)
def test_what_failed(what: str, attempt: Callable[..., str], whole: Path) -> None:
    name, changes, message = SEEDS[what]
    content = json.loads(content_of(whole, CAUSAL, name)) | changes
    assert re.search(message, attempt(CAUSAL, name, json.dumps(content).encode()))


def test_sizes_that_models_have_are_taken() -> None:
    """Only counts of layers and labels are looked at."""
    sizes = {"vocab_size_per_layer_input": 262144, "layer_width": 16384, "vocab_size": 10**6, "num_hidden_layers": 512}
    check_config(Path("x"), sizes | {"text_config": sizes, "id2label": {"0": "a"}, "layer_types": ["full"] * 512})


GENERATION: list[Any] = [
    {"eos_token_id": "x"}, {"eos_token_id": ["x"]}, {"eos_token_id": {}}, {"eos_token_id": 10**30},
    {"eos_token_id": -1},
    {"bos_token_id": []}, {"temperature": "hot"}, {"repetition_penalty": "x"}, {"repetition_penalty": 0},
    {"suppress_tokens": [10**9]}, {"bad_words_ids": 5}, {"num_beams": 10**9}, {"max_length": "x"},
    {"forced_eos_token_id": {}},
    {"sequence_bias": 5}, {"watermarking_config": {"x": 1}}, {"cache_implementation": "x"}, {"guidance_scale": "x"},
    {"stop_strings": [5]}, {"penalty_alpha": 1.0}, {"dola_layers": "high"}, {"num_return_sequences": 10**9},
    {"transformers_version": 5}, {"use_cache": "x"}, {"no_repeat_ngram_size": "x"}, {"custom_generate": "evil"}, [], 5,
]  # fmt: skip


@pytest.mark.parametrize("settings", GENERATION, ids=repr)
def test_generation_settings_of_any_kind(settings: Any, whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole / "llama", tmp_path / "model"))
    (folder / "generation_config.json").write_text(json.dumps(settings))
    words = ["generate", "--model", str(folder), "--prompt", "red", "--max-tokens", "2"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = CliRunner().invoke(app, words)
    if result.exit_code:
        assert (result.exit_code, result.stdout) == (2, ""), result.exception
        (line,) = result.stderr.splitlines()
        assert str(folder) in line
