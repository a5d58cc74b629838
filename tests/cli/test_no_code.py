"""No command runs code from a model's folder, or asks whether it may: one line, and nothing of stdin is read."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import task_models
import torch
from checkpoints import save_adapter
from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM
from typer.testing import CliRunner

import funclora
from funclora.cli._app import app

CODE = """
from pathlib import Path
Path({mark!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class EvilConfig(LlamaConfig):
    model_type = "evil"
class EvilForCausalLM(LlamaForCausalLM):
    config_class = EvilConfig
class EvilTokenizer(PreTrainedTokenizerFast):
    pass
"""


def change(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, an adapter of it, and data, in a folder."""
    root = tmp_path_factory.mktemp("sound")
    torch.manual_seed(0)
    task_models.save(root / "model", "llama", template="{{ messages }}")
    save_adapter(root / "model", LlamaForCausalLM, root / "adapter", target_modules=["q_proj"])
    task_models.data(root / "data.jsonl", "text")
    return root


def evil(kind: str, sound: Path, root: Path) -> Path:
    """The same model, whose classes, or whose tokenizer's, are in a file next to it."""
    folder = copied(sound, root / "evil", root / "ran")
    if kind == "model":
        own: Any = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilForCausalLM"}
        change(folder / "config.json", model_type="evil", architectures=["EvilForCausalLM"], auto_map=own)
    else:
        own = {"AutoTokenizer": ["evil.EvilTokenizer", "evil.EvilTokenizer"]}
        change(folder / "tokenizer_config.json", tokenizer_class="EvilTokenizer", auto_map=own)
    return folder


def copied(sound: Path, folder: Path, mark: Path) -> Path:
    """A copy of the model with a file of code, which leaves a mark when it runs."""
    shutil.copytree(sound / "model", folder)
    (folder / "evil.py").write_text(CODE.format(mark=str(mark)))
    return folder


# ADAPTER, DATA, MODEL and OUT are replaced. Those in the second table read no tokenizer.
COMMANDS = {
    "generate": ["generate", "ADAPTER", "--model", "MODEL"],
    "generate a file": ["generate", "--model", "MODEL", "--prompt", "a"],
    "train": ["train", "--model", "MODEL", "--data", "DATA", "--out", "OUT"],
    "train --dry-run": ["train", "--model", "MODEL", "--data", "DATA", "--out", "OUT", "--dry-run"],
    "eval": ["eval", "ADAPTER", "--model", "MODEL", "--data", "DATA"],
    "sweep": ["sweep", "--model", "MODEL", "--data", "DATA", "--out", "OUT"],
}
STRUCTURE = {
    "convert": ["convert", "ADAPTER", "--to", "gguf", "--base", "MODEL", "-o", "OUT"],
    "inspect": ["inspect", "ADAPTER", "--base", "MODEL"],
    "diff": ["diff", "ADAPTER", "ADAPTER", "--base", "MODEL"],
    "merge": ["merge", "MODEL", "ADAPTER", "-o", "OUT"],
    "extract": ["extract", "MODEL", "MODEL", "-o", "OUT", "--rank", "1"],
}


def filled(words: list[str], sound: Path, model: Path, out: Path) -> list[str]:
    places = {"ADAPTER": sound / "adapter", "DATA": sound / "data.jsonl", "MODEL": model, "OUT": out}
    return [str(places.get(word, word)) for word in words]


CASES = [*(("model", command) for command in COMMANDS | STRUCTURE), *(("tokenizer", command) for command in COMMANDS)]


@pytest.mark.parametrize(("kind", "command"), CASES)
def test_no_command_runs_code(kind: str, command: str, sound: Path, tmp_path: Path) -> None:
    model = evil(kind, sound, tmp_path)
    words = filled((COMMANDS | STRUCTURE)[command], sound, model, tmp_path / "out")
    result = CliRunner().invoke(app, words, input="y\ny\n")
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    (line,) = result.stderr.splitlines()
    assert f"{model} needs code that is not in transformers (auto_map in config.json" in line
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()


def test_stdin_is_left_alone(sound: Path, tmp_path: Path) -> None:
    words = filled(COMMANDS["generate"], sound, evil("model", sound, tmp_path), tmp_path / "out")
    script = "from funclora.cli import main; main()"
    reads, writes = os.pipe()
    os.write(writes, b"y\n")
    os.close(writes)
    with os.fdopen(reads, "rb", buffering=0) as stdin:
        command = [sys.executable, "-c", script, *words]
        done = subprocess.run(command, stdin=stdin, capture_output=True, text=True, check=False)
        assert stdin.read() == b"y\n"  # what the command has not read, the next one finds
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["model", "tokenizer"])
def test_the_code_would_run(kind: str, sound: Path, tmp_path: Path) -> None:
    """The folder is as dangerous as it should be."""
    cls = AutoConfig if kind == "model" else AutoTokenizer
    cls.from_pretrained(str(evil(kind, sound, tmp_path)), trust_remote_code=True)
    assert (tmp_path / "ran").exists()


def test_code_that_is_not_needed_is_not_looked_at(sound: Path, tmp_path: Path) -> None:
    """Many folders name code from before the model came into transformers."""
    folder = copied(sound, tmp_path / "model", tmp_path / "ran")
    change(folder / "config.json", auto_map={"AutoConfig": "evil.EvilConfig"})
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text((folder / "evil.py").read_text())
    words = [str(sound / "adapter"), "--model", str(folder), "--prompt", "a", "--max-tokens", "2"]
    result = CliRunner().invoke(app, ["generate", *words], input="y\n")
    assert (result.exit_code, result.stderr) == (0, "")
    assert not (tmp_path / "ran").exists()


def test_a_kernel_is_code(sound: Path, tmp_path: Path) -> None:
    folder = copied(sound, tmp_path / "model", tmp_path / "ran")
    change(folder / "config.json", attn_implementation="somebody/kernel")
    result = CliRunner().invoke(app, ["generate", "--model", str(folder), "--prompt", "a"])
    assert result.exit_code == 2
    said = "needs code that is not in transformers (attn_implementation in config.json: 'somebody/kernel')"
    assert said in result.stderr


def test_a_model_that_is_an_adapter_too(sound: Path, tmp_path: Path) -> None:
    """transformers would load the model that the adapter names."""
    folder = copied(sound, tmp_path / "model", tmp_path / "ran")
    shutil.copytree(sound / "adapter", folder, dirs_exist_ok=True)
    result = CliRunner().invoke(app, ["generate", "--model", str(folder), "--prompt", "a"])
    assert result.exit_code == 2
    assert f"{folder} also contains an adapter (adapter_config.json), so transformers would load" in result.stderr


def calls() -> list[tuple[str, str, list[str]]]:
    """Every call of a method in the package: where, its name, and the names of its keywords."""
    found = []
    for file in sorted(Path(funclora.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                keywords = [keyword.arg or f"**{ast.unparse(keyword.value)}" for keyword in node.keywords]
                found.append((f"{file.name}:{node.lineno}", ast.unparse(node.func), keywords))
    return found


def test_every_call_that_loads_says_that_no_code_may_run() -> None:
    loading = [call for call in calls() if call[1].rpartition(".")[2] in ("from_pretrained", "from_config")]
    assert len(loading) >= 5
    for where, name, keywords in loading:
        assert {"**OPTIONS", "trust_remote_code"} & {*keywords}, f"{where}: {name}"
    weights = [
        call
        for call in loading
        if not re.search("Auto|config_class|GenerationConfig", call[1]) and call[1].endswith("from_pretrained")
    ]
    assert len(weights) == 2
    for where, name, keywords in weights:
        assert "use_safetensors" in keywords, f"{where}: {name}"  # else a pickle would do


def test_nothing_is_unpickled() -> None:
    for file in Path(funclora.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {"pickle", "shelve", "marshal", "joblib", "dill"} & {name.partition(".")[0] for name in names}, (
                file
            )
    assert not [call for call in calls() if call[1] in ("torch.load", "np.load", "numpy.load", "torch.jit.load")]
