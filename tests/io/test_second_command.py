"""Two processes with one output: the second is refused before it reads or changes anything, and the first ends well."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import task_models
import text_models
from checkpoints import load, save_adapter, save_base

import funclora as fl

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks")

HERE = Path(__file__).parent
# Command -> what is there at the end.
RESULTS = {
    "train": "run/adapter/adapter_config.json",
    "sweep": "run/leaderboard.json",
    "merge": "merged/config.json",
    "extract": "extracted/adapter_config.json",
    "combine": "both/adapter_config.json",
    "to gguf": "a.gguf",
    "from gguf": "peft/adapter_config.json",
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("second")
    given = root / "in"
    cls = type(save_base(given / "base", "llama"))
    save_adapter(given / "base", cls, given / "adapter", target_modules=["q_proj"])
    save_adapter(given / "base", cls, given / "other", target_modules=["v_proj"])
    save_base(given / "tuned", "llama")
    model = load(given / "base", cls)
    fl.save_gguf(given / "adapter.gguf", fl.load_peft(given / "adapter", model)[0], model)
    task_models.save(given / "model", "llama", template=text_models.PLAIN)
    task_models.data(given / "text.jsonl", "text")
    paths = [str(HERE.parent), str(Path(fl.__file__).parents[1])]
    one = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    argv = [sys.executable, str(HERE.parent / "second.py"), str(root)]
    done = subprocess.run(argv, capture_output=True, text=True, env=one, check=False)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {line["command"]: line for line in lines}


@pytest.mark.parametrize("command", [*RESULTS])
def test_a_second_command_is_refused_and_changes_nothing(command: str, found: dict[str, Any]) -> None:
    tried = found[command]
    assert tried["waiting"], "the first command has read one of its inputs"
    assert tried["codes"] == [0, 2], tried["said"]
    assert "another process is" in tried["said"][1].splitlines()[-1]
    assert tried["same"]
    assert RESULTS[command] in tried["made"]
    assert not [name for name in tried["made"] if Path(name).name.startswith(".")], "no draft is left"
