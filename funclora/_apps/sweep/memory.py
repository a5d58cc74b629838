"""How many members fit a memory budget: measured with steps of growing populations."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from funclora._torch.memory import free_on_host
from funclora._torch.memory import is_out_of_memory as is_out_of_memory
from funclora.distributed._ranks import processes_here
from funclora.errors import ConfigError

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_size(text: str, option: str = "--memory") -> int:
    """A number of bytes such as `2GiB`, `512 MB` or `1.5g`.

    Args:
        text: as it was given.
        option: by which it was given, for messages.

    Raises:
        ConfigError: it is not a size.

    Examples:
        >>> parse_size("2GiB"), parse_size("1.5 MB")
        (2147483648, 1500000)
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([kmgt]?i?)b?\s*", text.lower())
    if not found or found[2] not in UNITS:
        raise ConfigError(f"{option}: expected a size such as 2GiB or 500MB, got {text!r}.")
    return int(float(found[1]) * UNITS[found[2]])


def readable(size: float) -> str:
    """A number of bytes for display.

    Examples:
        >>> readable(3 * 2**29)
        '1.50 GiB'
    """
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def available(device: torch.device) -> int:
    """The default budget: four fifths of the memory that this process has or could still get."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(0.8 * (free + torch.cuda.memory_reserved(device)))
    left = free_on_host()
    return 2**31 if left is None else int(0.8 * (left + peak(device)) / processes_here())


def reset_peak(device: torch.device) -> None:
    """Reset the peak, if the system supports it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:  # the peak since the process began is an upper bound, and sizes are tried in ascending order
        return


def peak(device: torch.device) -> int:
    """The peak since the last reset: allocated memory on CUDA, resident memory on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):
        return _max_rss()


def _max_rss() -> int:
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def fitting(measure: Callable[[int], int], n: int, budget: int) -> tuple[int, int]:
    """The largest population within a budget.

    Sizes are doubled as long as the next one is expected to fit.

    Args:
        measure: runs a step with that many members and returns its peak; it may run out of memory.
        n: number of members.
        budget: in bytes.

    Returns:
        The size, and its peak: measured, or extrapolated from the last two.

    Raises:
        ConfigError: not even one member fits.

    Examples:
        >>> fitting(lambda size: 100 + 10 * size, n=32, budget=205)
        (10, 200)
    """
    size, used, slope = 0, 0, 0.0
    while size < n:
        following = min(n, 2 * size or 1)
        if size > 1 and used + slope * (following - size) > budget:
            break
        try:
            found = measure(following)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if size == 0:
                raise ConfigError(_too_small(None, budget)) from error
            return size, used
        if found > budget:
            if size == 0:
                raise ConfigError(_too_small(found, budget))
            slope = (found - used) / (following - size)
            break
        slope = max(0.0, (found - used) / (following - size)) if size else 0.0
        size, used = following, found
    if size == n or not slope:
        return size, used
    more = min(n - size, int((budget - used) / slope))
    return size + more, used + int(more * slope)


def _too_small(found: int | None, budget: int) -> str:
    need = "more memory than there is" if found is None else readable(found)
    return (
        f"--memory: one member alone needs {need}, including the base model; the budget is {readable(budget)}. "
        "Raise it, or lower --batch or --context."
    )
