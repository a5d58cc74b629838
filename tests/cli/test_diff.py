"""`funclora diff`: two adapters side by side, against what PEFT merges."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import load, merged_by_peft, save_adapter, save_base
from typer.testing import CliRunner, Result

from funclora.cli._app import app

transformers.utils.logging.disable_progress_bar()

ADAPTERS: dict[str, dict[str, Any]] = {
    "one": {"target_modules": ["q_proj", "o_proj"]},
    "two": {"target_modules": ["q_proj", "down_proj"], "r": 3},
    "dora": {"target_modules": ["q_proj", "o_proj"], "use_dora": True},
    "full": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


def run(*args: object) -> Result:
    return CliRunner().invoke(app, ["diff", *map(str, args)])


def report(*args: object) -> Any:
    result = run(*args, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("diff")
    torch.manual_seed(0)
    cls = type(save_base(path / "base", "llama"))
    for name, options in ADAPTERS.items():
        save_adapter(path / "base", cls, path / name, **options)
    return path


@pytest.mark.parametrize("pair", [("one", "two"), ("one", "dora"), ("dora", "full")], ids="-".join)
def test_with_the_base_it_is_what_peft_merges(pair: tuple[str, str], folders: Path) -> None:
    found = report(folders / pair[0], folders / pair[1], "--base", folders / "base")
    cls = transformers.LlamaForCausalLM
    base: Any = load(folders / "base", cls).state_dict()
    merged = [merged_by_peft(folders / "base", cls, folders / name) for name in pair]
    deltas = [{name: one[name].double() - base[name].double() for name in base} for one in merged]
    changed = {name for name in base if any(delta[name].any() for delta in deltas)}
    assert {row["update"]["name"] for row in found["rows"]} == changed
    for row in found["rows"]:
        x, y = (delta[row["update"]["name"]] for delta in deltas)
        for norm, delta, side in zip(row["update"]["norms"], (x, y), row["sides"], strict=True):
            assert (norm is None) == (side is None) == (not delta.any())
            assert norm is None or norm == pytest.approx(float(delta.norm()), rel=1e-5)
        if None not in row["sides"]:
            assert row["update"]["cosine"] == pytest.approx(float((x * y).sum() / x.norm() / y.norm()), abs=1e-5)
            assert row["update"]["relative_distance"] == pytest.approx(float((x - y).norm() / x.norm()), rel=1e-5)
    x, y = (torch.cat([delta[name].flatten() for name in changed]) for delta in deltas)
    assert found["norms"] == pytest.approx([float(x.norm()), float(y.norm())], rel=1e-5)
    assert found["cosine"] == pytest.approx(float(x @ y / x.norm() / y.norm()), abs=1e-5)
    assert found["relative_distance"] == pytest.approx(float((x - y).norm() / x.norm()), rel=1e-5)


def test_without_the_base(folders: Path) -> None:
    alone = report(folders / "one", folders / "two")
    with_base = report(folders / "one", folders / "two", "--base", folders / "base")
    rows = {row["update"]["name"]: row for row in with_base["rows"]}
    assert {row["update"]["name"] for row in alone["rows"]} == set(rows)
    for row in alone["rows"]:
        other = rows[row["update"]["name"]]
        assert row["sides"] == other["sides"]
        assert row["update"]["norms"] == pytest.approx(other["update"]["norms"])
        for of, similarity in row["similarity"].items():
            (grid,), (same,) = similarity["grids"], other["similarity"][of]["grids"]
            assert (len(grid), len(grid[0])) == (2, 3)
            torch.testing.assert_close(torch.tensor(grid), torch.tensor(same))
    dora = report(folders / "one", folders / "dora")
    assert {row["update"]["of"] for row in dora["rows"]} == {"s·B·A"}


def test_an_adapter_and_itself(folders: Path) -> None:
    found = report(folders / "one", folders / "one")
    assert (found["cosine"], found["relative_distance"]) == (pytest.approx(1), pytest.approx(0, abs=1e-12))
    for row in found["rows"]:
        for similarity in row["similarity"].values():
            assert similarity["grids"][0][-1][-1] == pytest.approx(1)


def test_the_table_and_the_picture(folders: Path, tmp_path: Path) -> None:
    result = run(folders / "one", folders / "two", "--plot", tmp_path / "x.png")
    assert result.exit_code == 0, result.output
    assert "2 weights in both, 2 in A only, 2 in B only" in result.stdout
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
    assert "Give --base to compare the whole change" in run(folders / "one", folders / "dora").stdout


def test_adapters_with_nothing_in_common(folders: Path, tmp_path: Path) -> None:
    save_adapter(folders / "base", transformers.LlamaForCausalLM, tmp_path, target_modules=["k_proj"])
    found = report(folders / "one", tmp_path)
    assert all(None in row["sides"] and not row["similarity"] for row in found["rows"])
    assert found["cosine"] == 0
    assert found["relative_distance"] == pytest.approx(math.hypot(*found["norms"]) / found["norms"][0])
    assert run(folders / "one", tmp_path, "--plot", tmp_path / "x.png").exit_code == 0


def test_complaints(folders: Path, tmp_path: Path) -> None:
    cls = type(save_base(tmp_path / "narrow", "llama", num_key_value_heads=1))
    for base, out in ((tmp_path / "narrow", tmp_path / "adapter"), (folders / "base", tmp_path / "keys")):
        save_adapter(base, cls, out, target_modules=["k_proj"])
    for args, words in (
        (
            (folders / "one", folders / "none"),
            "there is no such folder. Give a PEFT folder: it holds",
        ),
        ((folders / "one", folders / "base"), "there is no adapter_config.json"),
        ((folders / "one", folders / "full"), "Give the base model"),
        ((tmp_path / "keys", tmp_path / "adapter"), "They are not of one model"),
        ((folders / "one", tmp_path / "adapter", "--base", folders / "base"), "has shape"),
        ((folders / "one", folders / "two", "--plot", tmp_path), "--plot: expected the name of a .png file"),
    ):
        result = run(*args)
        assert result.exit_code == 2, (args, result.output)
        assert words in result.stderr, (args, result.stderr)
        assert len(result.stderr.splitlines()) == 1, result.stderr
