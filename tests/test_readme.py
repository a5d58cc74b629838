"""The code in the README and in the guides runs, and does what it says."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
GUIDES = sorted(path.name for path in (ROOT / "docs").glob("*.md") if "```python" in path.read_text(encoding="utf-8"))


def test_the_example_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    model, params, merged = names["model"], names["params"], names["merged"]
    assert all(torch.equal(params[name], tensor) for name, tensor in model.state_dict().items())
    before = torch.nn.functional.cross_entropy(model(names["x"]), names["y"])
    assert names["metrics"]["loss"] < 0.5 * before
    model.load_state_dict(merged)
    torch.testing.assert_close(model(names["x"]), names["logits"])


@pytest.mark.parametrize("guide", GUIDES)
def test_the_code_of_a_guide_runs(guide: str) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / guide).read_text(encoding="utf-8"), re.DOTALL)
    exec("\n".join(blocks), {})


def test_there_are_guides_with_code() -> None:
    assert "many-adapters.md" in GUIDES
