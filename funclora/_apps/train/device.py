"""What the machine decides: the device of a run, and the precision that it computes in."""

from __future__ import annotations

from dataclasses import replace

import torch

from funclora._apps.train.settings import Settings
from funclora.distributed import _ranks as ranks
from funclora.errors import ConfigError
from funclora.io.hf.library import first_line


def device_of(name: str) -> torch.device:
    """The device of a name; "auto" is CUDA, otherwise MPS, otherwise the CPU. Each process of torchrun has its own GPU.

    Raises:
        ConfigError: it cannot be used here.

    Examples:
        >>> device_of("cpu")
        device(type='cpu')
    """
    name = _kind(name)
    try:
        device = torch.device(name)
        if ranks.size() > 1:
            device = _own(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch without CUDA
        raise ConfigError(
            f"device: {name!r} cannot be used here: {first_line(error)}. cpu is always available."
        ) from error
    return device


def _kind(name: str) -> str:
    """What "auto" means."""
    if name != "auto":
        return name
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() and ranks.size() == 1 else "cpu"


def _own(device: torch.device) -> torch.device:
    """The device of this process, one of several."""
    if str(device) not in ("cuda", "cpu"):
        raise ConfigError(f"device: {device} cannot be that of {ranks.size()} processes. Give cuda, cpu or auto.")
    if device.type != "cuda":
        return device
    own, there = ranks.local_rank(), torch.cuda.device_count()
    if own >= there:
        raise ConfigError(
            f"device: process {own} of this machine has no GPU: there {'is' if there == 1 else 'are'} {there}. Give "
            f"--nproc-per-node {there}, or --device cpu."
        )
    torch.cuda.set_device(own)
    return torch.device("cuda", own)


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
    return replace(settings, device=_kind(settings.device), bf16=bf16)
