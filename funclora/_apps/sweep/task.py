"""The task of a search: a frozen causal language model, and text for training and for evaluation."""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from funclora._apps.train import records
from funclora._apps.train.base import Base, ByteTokenizer, load_base, load_tokenizer
from funclora._apps.train.settings import Settings
from funclora._init.fresh import generator_of
from funclora.errors import ConfigError, FormatError, near
from funclora.rules.base import Params

EVERY = 8  # of eight texts the last is held out


@dataclass(frozen=True, eq=False)
class Task:
    """A model and its data.

    Attributes:
        name: for messages.
        model: never changed.
        params: its weights, on the device of the search.
        train: `[n_tokens]`, the training text.
        heldout: `[n_windows, context + 1]` int64.
        context: number of tokens that the model sees.
        keywords: further arguments of the model's call.
        lora: further fields of the adapters' configurations.
    """

    name: str
    model: nn.Module
    params: Params
    train: Tensor
    heldout: Tensor
    context: int
    keywords: dict[str, Any]
    lora: dict[str, Any]

    @property
    def device(self) -> torch.device:
        """The device."""
        return self.heldout.device

    def row_losses(self, bound: Any, windows: Tensor) -> Tensor:
        """Mean loss of each row, nats per token: `[rows, context + 1]` -> `[rows]`."""
        out = bound(windows[:, :-1], **self.keywords)
        logits = (out if isinstance(out, Tensor) else out.logits).float()
        return F.cross_entropy(logits.mT, windows[:, 1:], reduction="none").mean(1)

    def loss(self, bound: Any, windows: Tensor) -> Tensor:
        """The training loss of one member."""
        return self.row_losses(bound, windows).mean()

    def batch(self, seed: int, step: int, rows: int) -> Tensor:
        """The training windows of a step, `[rows, context + 1]`: a function of these numbers only."""
        starts = torch.randint(len(self.train) - self.context, (rows, 1), generator=generator_of(seed, str(step)))
        return self.train[starts + torch.arange(self.context + 1)].long().to(self.device)

    def digests(self) -> dict[str, str]:
        """Short digests of the data and the base, to detect that one was exchanged."""
        data = hashlib.blake2b(digest_size=8)
        for tensor in (self.train, self.heldout):
            data.update(tensor.cpu().contiguous().numpy().tobytes())
        base = hashlib.blake2b(digest_size=8)
        for name, tensor in self.params.items():
            some = tensor.detach().flatten()[:: max(1, tensor.numel() // 64)]  # all of a large base would take minutes
            base.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
            base.update(some.double().cpu().numpy().tobytes() if some.is_floating_point() else b"")
        return {"data": data.hexdigest(), "base": base.hexdigest()}


def demo_task(domain: str, *, context: int, windows: int, device: str = "auto") -> Task:
    """The demo's model, and one of the packages of Python's standard library.

    Raises:
        ConfigError: there is no such domain, or the context is longer than the model's.
    """
    from funclora.demo import corpus

    if domain not in corpus.DOMAINS:
        known = ", ".join(corpus.DOMAINS)
        raise ConfigError(f"--domain: expected one of {known}, got {domain!r}.{near(domain, corpus.DOMAINS, 1)}")
    base = load_base(Settings(device=device), ByteTokenizer())
    _check_context(context, base)
    train, heldout = map(corpus.encode, corpus.split(domain))
    return Task(
        name=f"{domain}, the demo's model",
        model=base.model,
        params=base.params,
        train=train,
        heldout=_spread(heldout, windows, context).to(base.device),
        context=context,
        keywords={},
        lora={},
    )


def folder_task(model: Path, data: Path, *, context: int, windows: int, device: str = "auto") -> Task:
    """A causal language model from a transformers folder, and a text or records with a `text` in each.

    Every eighth text is held out; with fewer than eight texts, the last eighth of all tokens.

    Raises:
        UnsupportedError: transformers is missing.
        FormatError: the data or the model cannot be read.
        ConfigError: there is too little text.
    """
    texts = read_texts(data)
    settings = Settings(model=model, device=device)
    tokenizer = load_tokenizer(settings)
    base = load_base(settings, tokenizer)
    _check_context(context, base)
    ids = [_tokens(tokenizer, text) for text in texts]
    train, heldout = _split(ids)
    for name, part in (("training", train), ("held-out", heldout)):
        if len(part) <= context:
            raise ConfigError(
                f"--data: {data} has {len(part)} {name} tokens, but a window needs {context + 1}. Give more text, or "
                "a shorter --context."
            )
    return Task(
        name=f"{data.name}, {model.name}",
        model=base.model,
        params=base.params,
        train=train,
        heldout=_spread(heldout, windows, context).to(base.device),
        context=context,
        keywords={"use_cache": False},
        lora={"task_type": "CAUSAL_LM", "base_model_name_or_path": str(model)},
    )


def read_texts(file: Path) -> list[str]:
    """The `text` fields of a file of records, or a file that is one text.

    Raises:
        FormatError: a record has none, or there are none at all.
    """
    try:
        return records.texts(file, "text")
    except FormatError as error:
        raise FormatError(f"--data: {error}") from error


def _tokens(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text)["input_ids"]
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def _split(texts: list[list[int]]) -> tuple[Tensor, Tensor]:
    if len(texts) >= EVERY:
        held = [ids for i, ids in enumerate(texts) if i % EVERY == EVERY - 1]
        train = [ids for i, ids in enumerate(texts) if i % EVERY != EVERY - 1]
        return _joined(train), _joined(held)
    everything = _joined(texts)
    cut = len(everything) - len(everything) // EVERY
    return everything[:cut], everything[cut:]


def _joined(texts: list[list[int]]) -> Tensor:
    return torch.tensor(list(itertools.chain.from_iterable(texts)))


def _spread(ids: Tensor, count: int, context: int) -> Tensor:
    """Evenly spaced windows, `[count, context + 1]`."""
    starts = torch.linspace(0, len(ids) - context - 1, count).long()
    return ids[starts[:, None] + torch.arange(context + 1)].long()


def _check_context(context: int, base: Base) -> None:
    if base.limit is not None and context > base.limit:
        raise ConfigError(f"--context: expected at most {base.limit} for {base.name}, got {context}.")
