"""The demo at its smallest: what it promises to leave behind is there, and true."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import funclora as fl
from funclora.cli._app import app
from funclora.demo import corpus
from funclora.demo.model import load_base, next_byte_loss
from funclora.demo.run import METHODS, DemoSettings, run


@pytest.mark.slow
def test_everything_promised_is_there_and_true(tmp_path: Path) -> None:
    settings = DemoSettings(domains=2, steps=20, batch=4, context=128, windows=8)
    seen: list[str] = []
    results = run(tmp_path, settings, seen.append)

    assert len(seen) == settings.ticks
    assert results.merge_error < 1e-4
    assert results.seconds > 0
    names = [f"{domain}-{method.lower()}" for domain in settings.names for method in METHODS]
    assert [t.name for t in results.trained] == list(results.losses) == names
    for t in results.trained:
        assert results.losses[t.name][t.domain] < results.base[t.domain]

    stored = json.loads((tmp_path / "results.json").read_text())
    assert stored["losses"] == results.losses
    model = load_base()
    params = fl.base_params(model)
    for t in results.trained:  # the loss that was reported is that of the adapter in the folder
        adapters, _ = fl.load_peft(tmp_path / "adapters" / t.name, model)
        _, heldout = corpus.split(t.domain)
        windows = corpus.windows(heldout, count=settings.windows, context=settings.context)
        loss = next_byte_loss(fl.bind(model, params, adapters), windows)
        assert loss.item() == pytest.approx(results.losses[t.name][t.domain], rel=1e-5)
    for domain in settings.names:
        _, heldout = corpus.split(domain)
        windows = corpus.windows(heldout, count=settings.windows, context=settings.context)
        assert next_byte_loss(model, windows).item() == pytest.approx(results.base[domain], rel=1e-5)
    merged = load_file(tmp_path / "merged.safetensors")
    assert merged.keys() == params.keys()
    assert not torch.equal(merged["layers.0.attn.q_proj.weight"], params["layers.0.attn.q_proj.weight"])


def test_a_picture_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    from funclora.demo.plot import heatmap

    def draw() -> None:
        heatmap({"": [[-1.0]]}, ["adapter"], ["file"], tmp_path / "heatmap.png", label="loss", title="gains")

    def full(self: Figure, file: Path, **options: object) -> None:
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    draw()
    before = (tmp_path / "heatmap.png").read_bytes()
    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(OSError, match="No space left"):
        draw()
    assert [file.name for file in tmp_path.iterdir()] == ["heatmap.png"]
    assert (tmp_path / "heatmap.png").read_bytes() == before


@pytest.mark.slow
def test_the_command_prints_a_table_and_names_its_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["demo", "--out", str(out), "--domains", "2", "--steps", "2"])
    assert result.exit_code == 0, result.output
    printed = re.sub(r"\s+", "", result.output)
    assert str(out) in printed
    for word in ("asyncio", "LoRA", "DoRA", "trainable", "asonepopulation", "continues"):
        assert word in printed
    assert (out / "heatmap.png").read_bytes().startswith(b"\x89PNG")
