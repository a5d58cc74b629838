"""Names from files and from requests cannot steer the terminal that they are shown on, nor flood it."""

from __future__ import annotations

import json
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import save_adapter, save_base
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

import funclora as fl
from funclora.cli._app import app
from funclora.errors import ConfigError, FormatError, FuncloraWarning, PeftFormatWarning, near, printable
from funclora.io.peft.files import CONFIG_FILE, WEIGHTS_FILE

# A title of the window, a cleared screen, a line over the one before, letters that go backwards, C1, half a pair.
EVIL = "q\x1b]0;owned\x07\x1b[2J\rgood\u202egnp\x9b31m\ud800"
STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def test_what_steers_is_escaped_and_the_rest_stays() -> None:
    assert printable(EVIL) == r"q\x1b]0;owned\x07\x1b[2J\rgood\u202egnp\x9b31m\ud800"
    for text in ("Ж漢字 \N{ELECTRIC LIGHT BULB} é", "two\nlines\tand a tab", r"C:\x1b", "\N{NO-BREAK SPACE}"):
        assert printable(text) == text
    assert printable(printable(EVIL)) == printable(EVIL)


@pytest.mark.parametrize("kind", [ConfigError, FormatError, FuncloraWarning, PeftFormatWarning])
def test_no_error_and_no_warning_shows_it(kind: type[Exception]) -> None:
    made = kind(f"there is no {EVIL}", 3)
    assert not STEERING.search(str(made))
    assert made.args[1] == 3
    assert str(pickle.loads(pickle.dumps(made))) == str(made)


def test_a_name_that_is_near_is_shown_short() -> None:
    assert len(near("a" * 100_000, ["b" * 100_000, "a" * 90_000])) < 600
    assert near("q_prj", ["q_proj", "v" * 10**6], n=1) == " Near names: q_proj."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter whose modules, fields and keys have such names."""
    root = tmp_path_factory.mktemp("evil")
    cls = type(save_base(root / "base", "llama"))
    save_adapter(root / "base", cls, root / "adapter", target_modules=["q_proj"])
    name = EVIL.encode(errors="ignore").decode()  # a half pair fits into no file
    config = json.loads((root / "adapter" / CONFIG_FILE).read_text())
    changed = {**config, "target_modules": [name], name: 1, "base_model_name_or_path": name}
    (root / "adapter" / CONFIG_FILE).write_text(json.dumps(changed))
    tensors = {key.replace("q_proj", name): value for key, value in load_file(root / "adapter" / WEIGHTS_FILE).items()}
    save_file(tensors, root / "adapter" / WEIGHTS_FILE)
    return root


@pytest.mark.parametrize(
    "line",
    [
        ["inspect", "adapter"],
        ["inspect", "adapter", "--base", "base"],
        ["diff", "adapter", "adapter"],
        ["combine", "adapter", "adapter", "-o", "out"],
        ["merge", "base", "adapter", "-o", "merged"],
        ["convert", "adapter", "--to", "gguf", "--base", "base", "-o", "out.gguf"],
    ],
    ids=" ".join,
)
def test_no_command_shows_it(line: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    result = CliRunner().invoke(app, line)
    assert result.exit_code in (0, 2), repr(result.exception)
    assert "owned" in result.output, "the name is shown"
    assert not STEERING.search(result.output)


def test_loading_shows_it_neither(folder: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(fl.errors.FuncloraError, match="owned") as error:
            fl.load_peft(folder / "adapter", nn.Sequential(nn.Linear(2, 2)))
    assert not STEERING.search("".join(str(each.message) for each in caught) + str(error.value))


@pytest.mark.parametrize(
    "name", ["a" * 5000, "a" * 10**6, "../x", "x/..", "..", "", "a\0b", EVIL, 7, None, ("x",), ["x"], b"x", 1.5],
    ids=lambda name: repr(name)[:20],
)  # fmt: skip
def test_an_id_of_any_type_and_length(name: Any, tmp_path: Path) -> None:
    """Ids come with requests."""
    model = nn.Sequential(nn.Linear(2, 2))
    config = fl.LoraConfig(r=1, target_modules=["0"])
    (tmp_path / "adapters").mkdir()
    fl.save_peft(tmp_path / "adapters" / "x", fl.init(model, config), config)
    fl.save_peft(tmp_path / "x", fl.init(model, config), config)
    for source in (tmp_path / "adapters", {"x": tmp_path / "x"}):
        cache = fl.AdapterCache(model, source, memory=2**20)
        with pytest.raises(ConfigError, match=r"AdapterCache: (there is no adapter|ids: expected texts)") as caught:
            cache[name]
        assert len(str(caught.value)) < 1000
        assert not STEERING.search(str(caught.value))
        assert name not in cache
        assert cache.drop(name) is False
        if name is not None:  # in a batch, the base
            with pytest.raises(ConfigError, match="AdapterCache: "):
                cache.route([name, "x"])
        assert torch.equal(cache["x"]["0.weight"].b, torch.zeros(2, 1))  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["a" * 10_000, "../x.safetensors", "/etc/passwd", "..", "", EVIL, 7, None])
def test_a_weight_map_names_files_of_its_folder(name: Any, tmp_path: Path) -> None:
    cls = type(save_base(tmp_path / "base", "llama", shard="10KB"))
    save_adapter(tmp_path / "base", cls, tmp_path / "adapter", target_modules=["q_proj"])
    index = tmp_path / "base" / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    raw["weight_map"][next(iter(raw["weight_map"]))] = name
    index.write_text(json.dumps(raw))
    with pytest.raises(FormatError, match="weight_map: expected names of files in this folder, got") as caught:
        fl.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert len(str(caught.value)) < 1000
