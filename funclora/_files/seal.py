"""Files that contain their own checksum, so that damage to them is detected.

The checksum is the SHA-256 of the file with zeros in its place. It is stored in a JSON object, or in the metadata of a
safetensors file.
"""

from __future__ import annotations

import hashlib
import re

CHECKSUM = "sha256"
BLANK = {CHECKSUM: "0" * 64}  # must be part of the content
_PLACE = re.compile(rf'"{CHECKSUM}": ?"([0-9a-f]{{64}})"'.encode())


def sealed(content: bytes) -> bytes:
    """The content with its checksum where `BLANK` is.

    Args:
        content: the bytes of a file. `BLANK` must come before any text from other sources.

    Examples:
        >>> import json
        >>> content = sealed(json.dumps({**BLANK, "step": 3}).encode())
        >>> is_intact(content), is_intact(content.replace(b"3", b"4"))
        (True, False)
    """
    start, end = _place(content)
    return content[:start] + _digest(content, start, end).encode() + content[end:]


def is_intact(content: bytes) -> bool:
    """Whether a file's content is unchanged since it was sealed."""
    try:
        start, end = _place(content)
    except ValueError:
        return False
    return _digest(content, start, end).encode() == content[start:end]


def _place(content: bytes) -> tuple[int, int]:
    match = _PLACE.search(content)
    if match is None:
        raise ValueError("there is no place for a checksum")
    return match.span(1)


def _digest(content: bytes, start: int, end: int) -> str:
    digest = hashlib.sha256(content[:start])
    digest.update(BLANK[CHECKSUM].encode())
    digest.update(memoryview(content)[end:])
    return digest.hexdigest()
