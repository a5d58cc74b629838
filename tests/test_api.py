"""The public names, as a new process finds them."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import funclora as fl


def python(code: str) -> str:
    """What a fresh interpreter prints for that code."""
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_names_load_on_first_use() -> None:
    code = (
        "import sys, funclora as fl; before = 'torch' in sys.modules; fl.apply; print(before, 'torch' in sys.modules)"
    )
    assert python(code) == "False True"


def test_every_public_name_is_there() -> None:
    assert sorted(fl.__all__) == list(fl.__all__)
    assert set(fl.__all__) <= set(dir(fl))
    assert all(getattr(fl, name).__doc__ for name in fl.__all__)
    with pytest.raises(AttributeError, match="no attribute 'aply'"):
        fl.aply  # type: ignore[attr-defined]  # noqa: B018


def test_the_command_line_starts_without_torch() -> None:
    code = "import sys; from funclora.cli._app import app; print('torch' in sys.modules)"
    assert python(code) == "False"


def test_two_weights_for_one_shared_module_are_refused_under_compile() -> None:
    shared = nn.Linear(2, 2)
    model = nn.Sequential(shared, nn.Tanh(), shared)
    params = fl.base_params(model)
    adapters = fl.init(model, fl.LoraConfig(r=1, target_modules=["0"], init_lora_weights=False))
    compiled = torch.compile(lambda adapters, x: fl.apply(model, params, adapters, x), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="one parameter of one module under two names"):
        compiled(adapters, torch.ones(1, 2))
