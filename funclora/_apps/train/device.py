"""What the machine decides: the device of a run, and the precision that it computes in."""

from __future__ import annotations

from dataclasses import replace

import torch

from funclora._apps.train.settings import Settings
from funclora.errors import ConfigError
from funclora.io.hf.library import first_line


def device_of(name: str) -> torch.device:
    """The device of a name; "auto" is CUDA, otherwise MPS, otherwise the CPU.

    Raises:
        ConfigError: it cannot be used here.

    Examples:
        >>> device_of("cpu")
        device(type='cpu')
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch without CUDA
        raise ConfigError(
            f"device: {name!r} cannot be used here: {first_line(error)}. cpu is always available."
        ) from error
    return device


def resolved(settings: Settings) -> Settings:
    """Settings in which what this machine decides has a value: `device` and `bf16`.

    Raises:
        ConfigError: the device cannot be used here.

    Examples:
        >>> resolved(Settings(device="cpu")).bf16
        False
    """
    device = device_of(settings.device)
    bf16 = settings.bf16
    if bf16 is None:
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return replace(settings, device=str(device), bf16=bf16)
