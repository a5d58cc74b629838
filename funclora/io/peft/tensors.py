"""The tensors of an `adapter_model.safetensors`, and which of them were not read."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set

import torch
from torch import Tensor

from funclora._files.safetensors import DTYPES, Stored, certainly_within, read_header
from funclora.errors import FormatError, NonFiniteError, near
from funclora.io.peft.files import AdapterFiles
from funclora.io.peft.foreign_keys import refuse_foreign
from funclora.io.peft.keys import PREFIX, Keys
from funclora.rules.base import Adapters
from funclora.rules.dense import Full

SAVED_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Keys as PEFT's modules have them in memory, with the name of the adapter in them, load as well.
_IN_MEMORY = (
    (re.compile(r"\.(lora_[AB])\.[^.]+\.weight$"), r".\1.weight"),
    (re.compile(r"\.(lora_embedding_[AB])\.[^.]+$"), r".\1"),
    (re.compile(r"\.(lora_magnitude_vector)(\.[^.]+)?\.weight$"), r".\1"),
    (re.compile(r"\.(lora_B)\.[^.]+\.bias$"), r".\1.bias"),
    (re.compile(r"\.(token_adapter\.trainable_tokens_delta)\.[^.]+$"), r".\1"),
)
# What torch.compile, FSDP, activation checkpointing and DDP call the module that they wrap.
WRAPPERS = frozenset(("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module"))


class StoredTensors:
    """The tensors of a file, by the keys that PEFT would write.

    Args:
        files: the folder. A tensor is read when it is asked for.
        components: the components of the names of the model's modules and parameters; empty if they are not known.

    Attributes:
        file: the path of the file, for messages.
        advice: what to do if the tensors do not match the model.
        vocabulary: the number of rows of the model's input embeddings; 0 if it has none.
        notes: what PEFT would not have read.

    Raises:
        FormatError: the file is missing or broken, or its keys are not those of an adapter.
        UnsupportedError: there is a pickle instead.
    """

    def __init__(self, files: AdapterFiles, *, components: Set[str] = frozenset()) -> None:
        self.file, self.advice, self.vocabulary = files.weights_file, "", 0
        self._opened, file = files.weights, self.file
        self._tensors: dict[str, Stored] = {}
        self._taken: set[str] = set()
        read = read_header(self._opened)
        refuse_foreign(file, [*read])
        keys = [_unwrapped(key, components) for key in read]
        bare = bool(read) and not any(key.startswith(PREFIX) for key in keys)
        for unwrapped, (given, tensor) in zip(keys, read.items(), strict=True):
            key = PREFIX + unwrapped if bare else unwrapped
            if not key.startswith(PREFIX):
                raise FormatError(
                    f"{file}: the key {given!r} does not start with {PREFIX!r}, as others do. PEFT would leave it out "
                    "without a word. Rename the key if you know where it belongs."
                )
            for pattern, short in _IN_MEMORY:
                key = pattern.sub(short, key)
            if key in self._tensors:
                raise FormatError(f"{file}: {given!r} is there twice, under another name for the same thing.")
            if not tensor.is_floating:
                raise FormatError(f"{file}: {given!r} has dtype {tensor.dtype}, expected {', '.join(DTYPES)}.")
            if tensor.shape == (0,) and ".lora_" in key:
                raise FormatError(
                    f"{file}: {given!r} is empty. DeepSpeed's ZeRO-3 leaves such tensors in place of those that are "
                    "divided among processes. Gather them when saving (stage3_gather_16bit_weights_on_model_save), or "
                    "convert the checkpoint (zero_to_fp32.py)."
                )
            self._tensors[key] = tensor
        self.notes: list[str] = []
        if bare:
            self.notes.append(f"no key starts with {PREFIX!r}; they are read as if they did. PEFT would load nothing.")
        left_out = {part for given, key in zip(read, keys, strict=True) for part in _left_out(given, key)}
        if left_out:
            names = ", ".join(map(repr, sorted(left_out)))
            self.notes.append(
                f"keys of a wrapped or compiled model are read without {names}; PEFT would not load them."
            )

    @property
    def _advice(self) -> str:
        return f" {self.advice}".rstrip()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors that were not taken yet, by key."""
        return {key: tensor.shape for key, tensor in self._rest().items()}

    def peek(self, key: str) -> Tensor:
        """A copy of a tensor that is there, which still belongs to the rest."""
        return self._read(self._tensors[key])

    def rename(self, key: str, new: str) -> None:
        """Give a tensor another key."""
        if new in self._tensors:
            raise FormatError(
                f"{self.file}: {key!r} is the older name of {new!r}, which is also there. Remove one of them."
            )
        self._tensors[new] = self._tensors.pop(key)

    def pop(self, key: str, why: str) -> Stored:
        """Take a tensor that must be there out of the file, for `why`."""
        found = self._get(key, why)
        del self._tensors[key]
        return found

    def put(self, tensor: Stored) -> None:
        """Add a tensor that is made of others."""
        self._tensors[tensor.key] = tensor

    def dtype(self, key: str) -> torch.dtype:
        """The dtype in which the file holds a tensor that is there."""
        return DTYPES[self._tensors[key].dtype]

    def rows(self, key: str, why: str) -> int:
        """The length of the first dimension of a tensor that must be there."""
        shape = self._get(key, why).shape
        return shape[0] if shape else 0

    def take(self, key: str, shape: Iterable[int], like: Tensor, dtype: torch.dtype, why: str) -> Tensor:
        """A copy of a tensor that must be there, which then no longer belongs to the rest.

        Args:
            key: its key.
            shape: the shape that it must have.
            like: where to put it: on this tensor's device.
            dtype: the dtype to give it.
            why: what it is for, for messages.
        """
        stored, wanted = self._get(key, why), tuple(shape)
        if stored.shape != wanted:
            raise FormatError(
                f"{self.file}: {key!r} has shape {list(stored.shape)}, expected {list(wanted)} for {why}."
                + (self._of_tokens(stored.shape, wanted) or self._advice)
            )
        self._taken.add(key)
        tensor = self._read(stored).to(device="cpu" if like.is_meta else like.device, dtype=dtype)
        if not certainly_within(tensor, 1e15) and not torch.isfinite(tensor).all():
            raise NonFiniteError(f"{self.file}: {key!r} holds NaN or infinity in {dtype}.")
        return tensor

    def _read(self, stored: Stored) -> Tensor:
        return stored.read(self._opened.descriptor)

    def _get(self, key: str, why: str) -> Stored:
        if key not in self._tensors:
            raise FormatError(
                f"{self.file}: there is no {key!r}, which {why} needs.{near(key, self._tensors, n=3)}{self._advice}"
            )
        return self._tensors[key]

    def _of_tokens(self, got: Sequence[int], expected: Sequence[int]) -> str:
        """The hint if only the number of tokens differs, otherwise ""."""
        differ = [pair for pair in zip(got, expected, strict=False) if pair[0] != pair[1]]
        if len(got) != len(expected) or len(differ) != 1 or differ[0][1] != self.vocabulary:
            return ""
        return (
            f" The adapter was trained with {differ[0][0]} tokens, and the model has {differ[0][1]}. Call "
            f"model.resize_token_embeddings({differ[0][0]}) before you load the adapter. funclora merge needs no such "
            "call if the file contains the embeddings."
        )

    def _rest(self) -> dict[str, Stored]:
        return {key: tensor for key, tensor in self._tensors.items() if key not in self._taken}

    def refuse_rest(self, keys: Keys, weights: Mapping[str, Tensor], adapters: Adapters) -> None:
        """Raise `FormatError` if a tensor that was not taken would mean anything.

        PEFT also writes base weights: adapted embeddings, biases next to fully fine-tuned modules. It overwrites the
        weights of the model with them, so they must be equal.
        """
        rest = self._rest()
        if not rest:
            return
        names = {keys.full(name): name for name in weights}
        for key, stored in rest.items():
            name = names.get(key.replace(".original_module.", "."))
            if name is not None:
                same = weights[name]
            else:  # PEFT 0.21 writes the biases of such modules twice with bias="all"
                name = names.get(key.replace(".modules_to_save.", "."))
                rule = adapters.get(name or "")
                if not isinstance(rule, Full):
                    raise FormatError(f"{self.file}: unexpected key {key!r}. {_hint(key)}{self._advice}")
                same = rule.value
            if stored.shape != tuple(same.shape):
                raise FormatError(
                    f"{self.file}: {key!r} has shape {list(stored.shape)}, expected {list(same.shape)} for {name!r}."
                    + (self._of_tokens(stored.shape, tuple(same.shape)) or self._advice)
                )
            if same.is_meta or not torch.equal(self._read(stored).to(same.device, same.dtype), same):
                raise FormatError(
                    f"{self.file}: {key!r} holds other values than {name!r} has, and PEFT would overwrite it. Load the "
                    "base weights that the adapter was trained on into the model."
                )


def _unwrapped(key: str, components: Set[str]) -> str:
    """The key without the wrappers around modules that the model itself does not have."""
    parts = key.split(".")
    # Of a model that is not known, what is called "module" may be one of its own, unless it is around PEFT's.
    own = components or {"module"}
    outer = next((i for i, part in enumerate(parts) if part not in WRAPPERS), 0)
    around = parts[outer : outer + 2] == PREFIX.split(".")[:2]
    return ".".join(part for part in parts[outer if around else 0 :] if part not in WRAPPERS or part in own)


def _left_out(given: str, key: str) -> set[str]:
    """The wrappers in a key that are not in the one that it is read as."""
    return {part for part in Counter(given.split(".")) - Counter(key.split(".")) if part in WRAPPERS}


def _hint(key: str) -> str:
    if key.startswith(2 * PREFIX):
        return "It comes from an adapter around an adapter; PEFT would not load it."
    if key.endswith(".lora_magnitude_vector"):
        return "It belongs to a DoRA adapter, but use_dora is false in the configuration."
    return "The configuration targets nothing that it belongs to; PEFT would drop it without a word."
