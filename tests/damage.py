"""Files that are broken in every way: edits of bytes and of JSON, and a limit on what reading them may cost."""

from __future__ import annotations

import contextlib
import json
import resource
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

# --- bytes ---------------------------------------------------------------------------------------------------------

Edit = tuple[str, int, int, bytes]
_SPECIAL = st.sampled_from(
    [b"\x00" * 8, b"\xff" * 8, b"\xff" * 7 + b"\x7f", struct.pack("<Q", 2**40), b'"', b"{", b"["]
)
# What to do, where, with how many bytes, and with which: positions count from the beginning again at the end.
BYTES: st.SearchStrategy[list[Edit]] = st.lists(
    st.tuples(
        st.sampled_from(["put", "cut", "drop", "insert", "copy"]),
        st.integers(0, 10_000),
        st.integers(0, 40),
        st.binary(min_size=1, max_size=4) | _SPECIAL,
    ),
    min_size=1,
    max_size=4,
)


def damaged(content: bytes, edits: list[Edit]) -> bytes:
    """The bytes after the edits."""
    for kind, at, n, new in edits:
        i = at % (len(content) + 1)
        if kind == "put":
            content = content[:i] + new + content[i + len(new) :]
        elif kind == "cut":
            content = content[:i]
        elif kind == "drop":
            content = content[:i] + content[i + n :]
        elif kind == "insert":
            content = content[:i] + new + content[i:]
        else:
            content = content[:i] + content[-n:] + content[i + n :]
    return content


# --- JSON ----------------------------------------------------------------------------------------------------------

_WORDS = [
    "", "q_proj", "0", "all-linear", "(", "[", "*", "(" * 3000 + ")" * 3000, "x{99999999999999999999}", "\x00",
    "\ud800", "(?i)q_proj",
    "../x", "/", ".", "..", "a" * 300, "LORA", "none", "all", "pissa", "F32", "F16", "I64", "F8_E4M3", "F4", "U8", "?",
    "model.safetensors", "SEQ_CLS", "eva", "olora", "orthogonal", "\n", "default", "weight", "é",
]  # fmt: skip
_NUMBERS = [0, -1, 1, 2, 3, 4, 8, 2**31 - 1, 2**31, 2**40, 2**63 - 1, 2**63, 2**64, 10**30, -(10**30), 10**400]
NODES = st.none() | st.booleans() | st.sampled_from(_NUMBERS) | st.floats() | st.sampled_from(_WORDS)
TREES: st.SearchStrategy[Any] = st.recursive(
    NODES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(_WORDS[:3] + _WORDS[-5:]), inner),
    max_leaves=5,
)
# Which node of a tree, counted from the top, becomes what.
JSON: st.SearchStrategy[list[tuple[int, Any]]] = st.lists(
    st.tuples(st.integers(0, 200), TREES | st.just("<deleted>")), min_size=1, max_size=3
)
DELETED = "<deleted>"  # an edit that takes the node away


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    for key, value in [*tree.items()] if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield tree, key
        yield from _places(value)


def edited(tree: Any, edits: list[tuple[int, Any]]) -> Any:
    """A copy of the tree after the edits."""
    tree = json.loads(json.dumps(tree))
    for at, value in edits:
        places = [*_places(tree)]
        if not places:
            return value
        owner, key = places[at % len(places)]
        if value == DELETED:
            del owner[key]
        else:
            owner[key] = value
    return tree


# --- safetensors ---------------------------------------------------------------------------------------------------


def with_header(content: bytes, edits: list[tuple[int, Any]]) -> bytes:
    """A safetensors file whose header is edited as JSON."""
    size = int.from_bytes(content[:8], "little")
    text = json.dumps(edited(json.loads(content[8 : 8 + size]), edits)).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


# --- cost ----------------------------------------------------------------------------------------------------------

ROOM = 256 << 20


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    """Inside the block the process cannot take much more memory than it has, and fails if it has taken a lot."""
    if sys.platform != "linux":
        yield
        return
    status = Path("/proc/self/status")

    def kib(name: str) -> int:
        return int(status.read_text().split(f"{name}:")[1].split()[0])

    before = resource.getrlimit(resource.RLIMIT_AS)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    resident = kib("VmRSS")
    # Threads that start inside get stacks and arenas too.
    resource.setrlimit(resource.RLIMIT_AS, ((kib("VmSize") << 10) + 4 * ROOM, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    if (kib("VmHWM") - resident) << 10 > ROOM:
        pytest.fail(f"{(kib('VmHWM') - resident) >> 10} MiB of memory for a file of some kilobytes")
