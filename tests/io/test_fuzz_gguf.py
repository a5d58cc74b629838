"""Any bytes in a GGUF file give an adapter that can be applied, or a funclora error that names the file."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from damage import BYTES, Edit, damaged, little_memory
from gguf_models import build
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import funclora as fl
from funclora.errors import FuncloraError

hostile = settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
Read = Callable[[bytes], "str | None"]


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def field(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: str, dims: list[int], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


FIELDS = [
    field("general.architecture", 8, text("llama")),
    field("general.type", 8, text("adapter")),
    field("adapter.type", 8, text("lora")),
    field("adapter.lora.alpha", 6, struct.pack("<f", 4.0)),
]
A, B = "blk.0.attn_q.weight.lora_a", "blk.0.attn_q.weight.lora_b"
TENSORS = [tensor(A, [16, 2], 0, 0), tensor(B, [2, 16], 0, 128)]  # the innermost dimension first
DATA = np.random.default_rng(0).standard_normal(64).astype("<f4").tobytes()


def container(
    fields: list[bytes] = FIELDS,
    tensors: list[bytes] = TENSORS,
    data: bytes = DATA,
    counts: tuple[int, int] | None = None,
    version: int = 3,
) -> bytes:
    n_tensors, n_fields = counts or (len(tensors), len(fields))
    head = b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_fields) + b"".join(fields) + b"".join(tensors)
    return head + b"\0" * (-len(head) % 32) + data


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """The message of the error that reading these bytes ends in; None if they are an adapter."""
    model, file = build("Llama"), tmp_path / "a.gguf"
    params = fl.base_params(model)

    def reader(content: bytes) -> str | None:
        file.write_bytes(content)
        with little_memory():
            try:
                adapters, _ = fl.load_gguf(file, model)
            except FuncloraError as error:
                str(error).encode()
                assert str(file) in str(error)  # noqa: PT017 (it may also load)
                return str(error)
            assert adapters
            fl.apply(model, params, adapters, torch.tensor([[0, 1]]))
        return None

    return reader


def test_it_is_the_file_that_the_package_would_write(read: Read, tmp_path: Path) -> None:
    assert read(container()) is None
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    assert [t.name for t in reader.tensors] == [A, B]
    loaded, _ = fl.load_gguf(tmp_path / "a.gguf", build("Llama"))
    rule: Any = loaded["model.layers.0.self_attn.q_proj.weight"]
    assert np.array_equal(rule.a.numpy(), reader.tensors[0].data)


LIES: dict[str, tuple[bytes, str]] = {
    "tensors": (container(counts=(2**60, 4)), "1152921504606846976 entries"),
    "fields": (container(counts=(2, 2**63)), "entries, but is too short for them"),
    # The package's own reader is busy with this one for ever.
    "an array": (container([*FIELDS, field("x", 9, struct.pack("<IQ", 4, 2**60))]), "1152921504606846976 entries"),
    "an array of texts": (container([*FIELDS, field("x", 9, struct.pack("<IQ", 8, 2**60))]), "entries, but"),
    "arrays in arrays": (
        container([*FIELDS, field("x", 9, struct.pack("<IQ", 9, 1) * 2000 + b"\0" * 8)]), "no array type 9",
    ),
    "a text": (container([*FIELDS, struct.pack("<Q", 2**62)]), "entries, but"),
    "no text": (container([*FIELDS, field("x", 8, text(b"\xff"))]), "a text is not UTF-8"),
    "a type of metadata": (container([*FIELDS, field("x", 77, b"")]), "no metadata type 77"),
    "a field twice": (container([*FIELDS, FIELDS[0]]), "'general.architecture' appears twice"),
    "a tensor twice": (container(tensors=[TENSORS[0], tensor(A, [2, 16], 0, 128)]), "a tensor appears twice"),
    "dimensions": (container(tensors=[TENSORS[0], tensor(B, [1] * 9, 0, 128)]), "has 9 dimensions, expected 1 to 4"),
    "no dimensions": (container(tensors=[TENSORS[0], tensor(B, [], 0, 128)]), "has 0 dimensions"),
    "a huge shape": (container(tensors=[TENSORS[0], tensor(B, [2**32, 2**32], 0, 128)]), "has the invalid shape"),
    "a large shape": (container(tensors=[TENSORS[0], tensor(B, [2**20, 2**20], 0, 128)]), "after the end of the file"),
    "an empty shape": (container(tensors=[TENSORS[0], tensor(B, [0, 2**63], 0, 128)]), "has the invalid shape"),
    "a type": (container(tensors=[TENSORS[0], tensor(B, [2, 16], 99, 128)]), "has the unknown type 99"),
    "integers": (container(tensors=[TENSORS[0], tensor(B, [2, 16], 26, 128)]), "is stored as I32"),
    "a block": (container(tensors=[TENSORS[0], tensor(B, [2, 16], 8, 128)]), "a multiple of 32 for Q8_0"),
    "an overlap": (container(tensors=[TENSORS[0], tensor(B, [2, 16], 0, 64)]), "begins at 64, expected 128"),
    "a gap": (container(tensors=[TENSORS[0], tensor(B, [2, 16], 0, 2**62)]), "expected 128: they have no gaps"),
    "a name": (container(tensors=[TENSORS[0], tensor("x" * 64, [2, 16], 0, 128)]), "longer than 63 bytes"),
    "alignment": (container([*FIELDS, field("general.alignment", 4, b"\3\0\0\0")]), "expected a power of two, got 3"),
    "version": (container(version=1), "expected version 2 or 3, got 1"),
    "nothing": (b"", "ends too early"),
    "magic": (b"GGML" + container()[4:], "does not begin with 'GGUF'"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_lies(lie: str, read: Read) -> None:
    content, message = LIES[lie]
    said = read(content)
    assert said is not None
    assert message in said


@pytest.mark.parametrize("version", [2, 3])
def test_what_is_sound(version: int, read: Read) -> None:
    more = [field("x", 9, struct.pack("<IQ3I", 4, 3, 1, 2, 3)), field("y", 9, struct.pack("<IQ", 8, 1) + text("z"))]
    assert read(container([*FIELDS, *more], version=version)) is None


@hostile
@given(BYTES)
def test_bytes(read: Read, edits: list[Edit]) -> None:
    read(damaged(container(), edits))


def _array(kind: int, count: int, raw: bytes) -> bytes:
    return struct.pack("<IQ", kind, count) + raw


NUMBERS = st.integers(0, 20) | st.sampled_from([32, 128, 2**16, 2**31, 2**32, 2**40, 2**63, 2**64 - 1])
VALUES = (
    st.tuples(st.sampled_from([0, 4, 5, 6, 7, 8, 9, 10, 12, 13]), st.binary(max_size=24))
    | st.tuples(st.just(9), st.builds(_array, st.integers(0, 13), NUMBERS, st.binary(max_size=16)))
)  # fmt: skip
KEYS = st.sampled_from(["general.alignment", "general.architecture", "adapter.type", "adapter.lora.alpha", "x"])


@hostile
@given(
    st.lists(st.builds(lambda key, value: field(key, *value), KEYS, VALUES), max_size=3),
    st.lists(
        st.builds(
            tensor, st.sampled_from([A, B, "blk.1.attn_v.weight.lora_a", "x"]), st.lists(NUMBERS, max_size=5),
            st.integers(0, 42), NUMBERS,
        ),
        max_size=3,
    ),
    st.integers(0, 4),
    st.tuples(NUMBERS, NUMBERS) | st.none(),
)  # fmt: skip
def test_fields_and_tensors(
    read: Read, fields: list[bytes], tensors: list[bytes], keep: int, counts: tuple[int, int] | None
) -> None:
    read(container([*FIELDS[:keep], *fields], tensors or TENSORS, counts=counts))
