"""The public names, as a new process finds them."""

import subprocess
import sys

import pytest

import funclora as fl
from funclora import _api


def python(code: str) -> str:
    """What a fresh interpreter prints for that code."""
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_names_load_on_first_use() -> None:
    code = (
        "import sys, funclora as fl; before = 'torch' in sys.modules; fl.apply; print(before, 'torch' in sys.modules)"
    )
    assert python(code) == "False True"


def test_a_name_loads_what_it_needs() -> None:
    code = (
        "import sys, funclora as fl; fl.apply; "
        "print(*(f'funclora.{name}' in sys.modules for name in ('_bind.apply', 'io.merge.merge')))"
    )
    assert python(code) == "True False"


def test_every_public_name_is_there() -> None:
    assert sorted(fl.__all__) == list(fl.__all__) == sorted(_api.__all__)
    assert all(getattr(fl, name) is getattr(_api, name) for name in fl.__all__)
    assert set(fl.__all__) <= set(dir(fl))
    assert all(getattr(fl, name).__doc__ for name in fl.__all__)
    with pytest.raises(AttributeError, match="no attribute 'aply'"):
        fl.aply  # type: ignore[attr-defined]  # noqa: B018


def test_the_command_line_starts_without_torch() -> None:
    code = "import sys; from funclora.cli._app import app; print('torch' in sys.modules)"
    assert python(code) == "False"
