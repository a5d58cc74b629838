"""`funclora merge` and `funclora extract`: what they print, and one line where they cannot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers
from checkpoints import save_adapter, save_base, tensors
from typer.testing import CliRunner, Result

import funclora as fl
from funclora.cli._app import app

transformers.utils.logging.disable_progress_bar()


def run(*args: object) -> Result:
    return CliRunner().invoke(app, [*map(str, args)])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("merge")
    cls = type(save_base(path / "base", "llama", shard="10KB"))
    save_adapter(path / "base", cls, path / "one", target_modules=["q_proj"])
    save_adapter(path / "base", cls, path / "two", target_modules=["o_proj"])
    return path


def test_merge_prints_what_changed(folders: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run("merge", folders / "base", folders / "one", folders / "two", "-o", out, "--weight", 0.5, "--weight", 1,
                 "--dtype", "bfloat16", "--max-shard-size", "1GB", "--verify")  # fmt: skip
    assert result.exit_code == 0, result.output
    for words in ("4 weights", "17 other tensors", "units of rounding", "probe input: relative difference", "wrote"):
        assert words in result.stdout, result.stdout
    fl.merge_checkpoint(folders / "base", folders / "one", tmp_path / "half", weights=[0.5])
    name = "model.layers.0.self_attn.q_proj.weight"
    assert (tensors(out)[name] - tensors(tmp_path / "half")[name]).abs().max() < 1e-2
    assert str(tensors(out)[name].dtype) == "torch.bfloat16"
    assert [f.name for f in out.glob("*.safetensors")] == ["model.safetensors"]


def test_merge_as_json(folders: Path, tmp_path: Path) -> None:
    args = ("merge", folders / "base", folders / "one", "-o", tmp_path / "out", "--json")
    dry = run(*args, "--dry-run")
    assert dry.exit_code == 0, dry.output
    assert not (tmp_path / "out").exists()
    done = json.loads(run(*args, "--verify").stdout)
    assert set(done["verification"]["deviations"]) == {w["name"] for w in done["weights"]}
    assert done | {"out": None, "verification": None} == json.loads(dry.stdout)
    assert done["weights"][0]["change"] == "LoRA r=2"


def test_merge_says_in_one_line_what_is_wrong(folders: Path, tmp_path: Path) -> None:
    for args, words in (
        (("merge", folders / "base", folders / "none", "-o", tmp_path / "out"), "there is no such folder"),
        (("merge", folders / "base", folders / "one", "-o", folders / "two"), "is not empty"),
        (
            ("merge", folders / "base", folders / "one", "-o", tmp_path / "out", "--dtype", "int8"),
            "Invalid value for '--dtype': 'int8' is not one of",
        ),
        (("extract", folders / "base", folders / "base", "-o", tmp_path / "out", "--rank", 2), "the same weights"),
    ):
        result = run(*args)
        assert result.exit_code == 2
        assert words in result.stderr
        assert len(result.stderr.splitlines()) == 1
        assert not (tmp_path / "out").exists()


def test_extract(folders: Path, tmp_path: Path) -> None:
    fl.merge_checkpoint(folders / "base", folders / "one", tmp_path / "tuned")
    args = ("extract", folders / "base", tmp_path / "tuned", "--rank", 2)
    printed = run(*args, "-o", tmp_path / "a")
    assert printed.exit_code == 0, printed.output
    assert "residual" in printed.stdout
    assert "q_proj" in printed.stdout
    found = json.loads(run(*args, "-o", tmp_path / "b", "--json", "--targets", "q_proj").stdout)
    assert max(weight["residual"] for weight in found["weights"]) < 1e-4
    assert (tmp_path / "a" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "b" / "adapter_model.safetensors"
    ).read_bytes()
    both = run(*args, "-o", tmp_path / "c", "--save-rest", "--ignore-rest")
    assert both.exit_code == 2
