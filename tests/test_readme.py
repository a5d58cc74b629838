"""The README's example runs, and does what its comments say."""

import re
from pathlib import Path
from typing import Any

import torch

README = Path(__file__).parents[1] / "README.md"


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
