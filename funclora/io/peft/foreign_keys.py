"""Keys of adapters that are not PEFT's: whose they are, and how to go on."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from funclora.errors import UnsupportedError

_READ = "Read the file with funclora.io.load_diffusers."
# The first pattern that a key matches says whose it is.
_FOREIGN = (
    (
        re.compile(r"^lora_(unet|te\d?|transformer)_|.*\.(lora_down|lora_up)\.weight$"),
        f"kohya's scripts: '_' for '.' in the path, lora_down and lora_up, an α for each layer. {_READ}",
    ),
    (
        re.compile(r".*(_lora|\.lora)\.(down|up)\.weight$"),
        f"diffusers before 0.22: lora.down and lora.up, and no α, which means that it is the rank. {_READ}",
    ),
    (
        re.compile(r".*\.(hada_w|lokr_w|oft_)"),
        "LyCORIS, and no LoRA. Merge it with its own tools.",
    ),
)


def refuse_foreign(file: Path, keys: Iterable[str]) -> None:
    """Raise `UnsupportedError` if a key is of another program's format, saying which and what to do."""
    for key in keys:
        for pattern, whose in _FOREIGN:
            if pattern.match(key):
                raise UnsupportedError(f"{file}: {key!r} is not a key of PEFT, but of {whose}")
