"""The notebook runs, and what is stored in it is what its code gives."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "demo.ipynb"
AGAIN = "write it anew: jupyter execute --inplace examples/demo.ipynb"
NUMBER = re.compile(r"\d+\.\d+")
VARIES = "varies"  # tag of cells whose text hangs on rounding: samples of a trained model


def stored() -> list[Any]:
    return [cell for cell in nbformat.read(NOTEBOOK, 4).cells if cell.cell_type == "code"]


def shown(cell: Any) -> tuple[str, list[str]]:
    """What a cell printed, and the kinds of its other outputs."""
    text = "".join(output.text for output in cell.outputs if output.output_type == "stream")
    return text, [kind for output in cell.outputs for kind in sorted(output.get("data", {}))]


def same_text(one: str, other: str) -> bool:
    """The same words, and numbers with a point in them that are near."""
    pairs = zip(NUMBER.findall(one), NUMBER.findall(other), strict=False)
    return NUMBER.sub("#", one) == NUMBER.sub("#", other) and all(
        float(a) == pytest.approx(float(b), rel=0.05, abs=0.03) for a, b in pairs
    )


def test_every_cell_was_run_in_order_and_none_failed() -> None:
    cells = stored()
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), AGAIN
    for cell in cells:
        assert all(output.output_type != "error" for output in cell.outputs), AGAIN
        assert not any(output.get("name") == "stderr" for output in cell.outputs), AGAIN
    assert sum("image/png" in shown(cell)[1] for cell in cells) >= 3


def test_texts_are_compared_with_their_numbers() -> None:
    assert same_text("loss 0.50 of 3\n", "loss 0.51 of 3\n")
    assert not same_text("loss 0.50 of 3\n", "loss 0.60 of 3\n")
    assert not same_text("loss 0.50 of 3\n", "loss 0.50 of 4\n")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_the_stored_outputs_are_those_of_the_code(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, 4)
    NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    ran = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for old, new in zip(stored(), ran, strict=True):
        (text, kinds), (new_text, new_kinds) = shown(old), shown(new)
        assert kinds == new_kinds, f"{AGAIN}\n{old.source}"
        if VARIES not in old.metadata.get("tags", []):
            assert same_text(text, new_text), f"{AGAIN}\nstored:\n{text}\nnow:\n{new_text}"
    assert not [*tmp_path.iterdir()]


def test_the_page_of_the_site_has_all_of_it() -> None:
    spec = importlib.util.spec_from_file_location("notebook_page", ROOT / "docs" / "notebook_page.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text, pictures = module.page(json.loads(NOTEBOOK.read_text(encoding="utf-8")))
    for cell in nbformat.read(NOTEBOOK, 4).cells:
        assert cell.source in text
        if cell.cell_type == "code":
            assert shown(cell)[0].strip() in text
    assert all(f"]({name})" in text and data.startswith(b"\x89PNG") for name, data in pictures.items())
    assert len(pictures) == sum("image/png" in shown(cell)[1] for cell in stored())
