"""The computation of `funclora eval`: losses of adapters on files."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import funclora as fl
from funclora._apps.train import records
from funclora._apps.train.base import load_base, load_tokenizer
from funclora._apps.train.settings import Settings
from funclora._files.atomic import replace_files
from funclora.cli._adapters import adapter_folders, for_base
from funclora.cli._output import json_text
from funclora.errors import FormatError
from funclora.io.hf.origin import check_origin

# Rows that are read at a time; the number that is computed together is measured.
BATCH = 64
PAD = -1

OnProgress = Callable[[str, int], None]


@dataclass(frozen=True)
class Losses:
    """Losses in nats per token.

    Attributes:
        adapters: names.
        files: names.
        tokens: number of predicted tokens in each file.
        base: the base model's, by file.
        losses: `losses[adapter][file]`.
    """

    adapters: list[str]
    files: list[str]
    tokens: list[int]
    base: list[float]
    losses: list[list[float]]

    def tree(self) -> dict[str, Any]:
        """All losses, by name."""

        def row(values: Sequence[float], of: Callable[[float], float]) -> dict[str, float]:
            return {file: of(value) for file, value in zip(self.files, values, strict=True)}

        by_adapter = list(zip(self.adapters, self.losses, strict=True))
        return {
            "tokens": dict(zip(self.files, self.tokens, strict=True)),
            "base": {"loss": row(self.base, float), "perplexity": row(self.base, perplexity)},
            "loss": {name: row(losses, float) for name, losses in by_adapter},
            "perplexity": {name: row(losses, perplexity) for name, losses in by_adapter},
        }

    def write(self, folder: Path) -> None:
        """Write `eval.json`, and a heatmap if there are several files."""
        text = json_text(self.tree()) + "\n"

        def write(file: Path) -> None:
            file.write_text(text, encoding="utf-8")

        replace_files(folder, {"eval.json": write})
        if len(self.files) > 1:
            from funclora.demo.plot import heatmap

            gains = [[x - b for x, b in zip(row, self.base, strict=True)] for row in self.losses]
            heatmap(
                {"": gains},
                self.adapters,
                self.files,
                folder / "heatmap.png",
                label="loss minus base loss, nats per token (lower is better)",
                title="Loss of each adapter minus the loss of the base model (bold: best of its column)",
            )


def perplexity(loss: float) -> float:
    """exp(loss), which may be too large for a float."""
    return math.exp(loss) if loss < 700 else math.inf


def losses(
    paths: Sequence[Path],
    files: Sequence[Path],
    *,
    model: Path | None,
    field: str,
    context: int,
    rows: int | None,
    memory: int | None,
    device: str,
    progress: OnProgress,
) -> Losses:
    """Losses of saved adapters on files.

    Args:
        paths: PEFT folders, or folders of them.
        files: texts, or records: see `records.read`.
        model: folder of a transformers model; None for the demo's.
        field: name of the field with the text in a `.jsonl` file.
        context: tokens that the model sees at a time.
        rows: maximum number of passages from each file.
        memory: bytes for `evaluate`.
        device: where to compute.
        progress: called at each step with a description and the total number of calls.

    Raises:
        FuncloraError: an argument is missing or invalid, or an adapter cannot be loaded or run.
    """
    folders = adapter_folders(paths)
    names = [str(file) if [f.name for f in files].count(file.name) > 1 else file.name for file in files]
    texts = {file: read_texts(file, field) for file in files}  # all are read before anything large is loaded
    settings = Settings(model=model, device=device)
    tokenizer = load_tokenizer(settings)
    base = load_base(settings, tokenizer)
    context = min(context, base.limit or context)

    def encode(text: bytes) -> list[int]:
        if model is None:
            return list(text)
        ids: list[int] = tokenizer(text.decode("utf-8", "replace"), verbose=False)["input_ids"]
        return ids

    windows = {}
    for file, documents in texts.items():
        windows[file] = cut([encode(text) for text in documents], context)
        if not windows[file]:
            raise FormatError(f"{file}: contains no text with at least two tokens, so there is nothing to predict.")
        if rows is not None and len(windows[file]) > rows:
            chosen = torch.linspace(0, len(windows[file]) - 1, rows).round().long().tolist()
            windows[file] = [windows[file][i] for i in chosen]
    ticks = len(folders) + sum(math.ceil(len(some) / BATCH) for some in windows.values())
    members: list[dict[str, fl.Rule]] = [{}]
    for name, folder in folders.items():
        progress(f"loading {name}", ticks)
        with for_base(base.name, [folder]):
            members.append(fl.load_peft(folder, base.model)[0])
    check_origin(folders.values(), model)
    stack = fl.stack(members)

    def nats(bound: Any, ids: Tensor) -> Tensor:
        targets = ids[:, 1:]
        logits = base.logits(bound, {"input_ids": ids[:, :-1].clamp(min=0)}).float()
        by_token = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=PAD, reduction="none")
        by_row: Tensor = by_token.unflatten(0, targets.shape).sum(1)
        return by_row

    columns, tokens = [], []
    for file, some in windows.items():
        data = _batches(some, device, lambda file=file: progress(f"evaluating on {file.name}", ticks))  # type: ignore[misc]
        tokens.append(sum(len(window) - 1 for window in some))
        mean = fl.evaluate(base.model, base.params, stack, data, nats, memory=memory)
        columns.append((mean.double() * len(some) / tokens[-1]).tolist())
    alone, *by_adapter = ([column[i] for column in columns] for i in range(len(members)))
    return Losses(list(folders), names, tokens, alone, by_adapter)


def read_texts(file: Path, field: str) -> list[bytes]:
    """The documents of a file."""
    if not file.is_file():
        raise FormatError(
            f"{file}: there is no such file. Give --data a text file, or records (such as .jsonl) with a text in each."
        )
    if records.is_text(file):
        return [file.read_bytes()]
    return [text.encode() for text in records.texts(file, field, " Give another field with --field.")]


def cut(documents: Sequence[Sequence[int]], context: int) -> list[list[int]]:
    """Passages of at most context + 1 tokens, in which every token of a document except the first is predicted once.

    Examples:
        >>> cut([[1, 2, 3, 4], [5]], context=2)
        [[1, 2, 3], [3, 4]]
    """
    return [
        list(document[start : start + context + 1])
        for document in documents
        for start in range(0, len(document) - 1, context)
    ]


def _batches(windows: list[list[int]], device: str, progress: Callable[[], None]) -> Iterator[Tensor]:
    """`[n, longest]` int64, of similar lengths, padded with `PAD`."""
    windows = sorted(windows, key=len, reverse=True)
    for start in range(0, len(windows), BATCH):
        some = [torch.tensor(window) for window in windows[start : start + BATCH]]
        yield nn.utils.rnn.pad_sequence(some, batch_first=True, padding_value=PAD).to(device)
        progress()
