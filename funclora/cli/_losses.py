"""What `funclora eval` computes: losses of adapters on files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import funclora as fl
from funclora.cli._output import json_text
from funclora.errors import FuncloraError
from funclora.io._files import replace_files
from funclora.io._peft_config import CONFIG_FILE

# Rows that are read at a time; how many of them are computed together is measured.
BATCH = 64
PAD = -1

Encode = Callable[[bytes], list[int]]
Progress = Callable[[str, int], None]


class InputError(FuncloraError):
    """What the user gave does not do; the message says what would."""


@dataclass(frozen=True)
class Losses:
    """Losses in nats per token.

    Attributes:
        adapters: names.
        files: names.
        tokens: how many tokens were predicted in each file.
        base: the base model's, by file.
        losses: `losses[adapter][file]`.
    """

    adapters: list[str]
    files: list[str]
    tokens: list[int]
    base: list[float]
    losses: list[list[float]]

    def tree(self) -> dict[str, Any]:
        """All of it, by name."""

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
        """`eval.json`, and a picture if there are several files."""
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
                title="What each adapter gains over the base model (bold: best of its column)",
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
    progress: Progress,
) -> Losses:
    """Losses of saved adapters on files.

    Args:
        paths: PEFT folders, or folders of them.
        files: texts, or `.jsonl`.
        model: folder of a transformers model; None for the demo's.
        field: where the text is in a line of `.jsonl`.
        context: tokens that the model sees at a time.
        rows: at most so many stretches of each file.
        memory: bytes for `evaluate`.
        device: where to compute.
        progress: called with a description and the number of calls in all, at each step.

    Raises:
        InputError: something of that is missing or of no use.
        FuncloraError: an adapter cannot be loaded or run.
    """
    folders = adapter_folders(paths)
    names = [str(file) if [f.name for f in files].count(file.name) > 1 else file.name for file in files]
    texts = {file: read_texts(file, field) for file in files}  # all are looked at before anything large is loaded
    net, encode, scores, limit = _demo_model() if model is None else _transformers_model(model)
    context = min(context, limit)
    try:
        net = net.to(device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch without CUDA
        raise InputError(f"--device {device}: {_line(error)}. cpu is always there.") from error
    windows = {}
    for file, documents in texts.items():
        windows[file] = cut([encode(text) for text in documents], context)
        if not windows[file]:
            raise InputError(f"{file}: holds no text of two tokens or more, so there is nothing to predict.")
        if rows is not None and len(windows[file]) > rows:
            chosen = torch.linspace(0, len(windows[file]) - 1, rows).round().long().tolist()
            windows[file] = [windows[file][i] for i in chosen]
    ticks = len(folders) + sum(math.ceil(len(some) / BATCH) for some in windows.values())
    params = fl.base_params(net)
    members: list[dict[str, fl.Rule]] = [{}]
    for name, folder in folders.items():
        progress(f"loading {name}", ticks)
        try:
            members.append(fl.load_peft(folder, net)[0])
        except FuncloraError as error:
            raise InputError(
                f"{_line(error)} Is {'the demo model' if model is None else model} its base model? --model takes "
                "another."
            ) from error
    stack = fl.stack(members)

    def nats(bound: Any, ids: Tensor) -> Tensor:
        targets = ids[:, 1:]
        logits = scores(bound, ids[:, :-1].clamp(min=0)).float()
        by_token = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=PAD, reduction="none")
        by_row: Tensor = by_token.unflatten(0, targets.shape).sum(1)
        return by_row

    columns, tokens = [], []
    for file, some in windows.items():
        data = _batches(some, device, lambda file=file: progress(f"evaluating on {file.name}", ticks))  # type: ignore[misc]
        tokens.append(sum(len(window) - 1 for window in some))
        mean = fl.evaluate(net, params, stack, data, nats, memory=memory)
        columns.append((mean.double() * len(some) / tokens[-1]).tolist())
    base, *by_adapter = ([column[i] for column in columns] for i in range(len(members)))
    return Losses(list(folders), names, tokens, base, by_adapter)


def adapter_folders(paths: Sequence[Path]) -> dict[str, Path]:
    """The PEFT folders among the paths and directly inside of them, by a name for each."""
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            raise InputError(f"{path}: there is no such folder. Give PEFT folders, or a folder that holds them.")
        inside = (
            [path] if (path / CONFIG_FILE).is_file() else sorted(file.parent for file in path.glob(f"*/{CONFIG_FILE}"))
        )
        if not inside:
            raise InputError(f"{path}: holds no {CONFIG_FILE}, and neither does any folder in it. Is it a PEFT folder?")
        found += [folder for folder in inside if folder not in found]
    names = [folder.resolve().name for folder in found]
    return {str(folder) if names.count(name) > 1 else name: folder for name, folder in zip(names, found, strict=True)}


def read_texts(file: Path, field: str) -> list[bytes]:
    """The documents of a file."""
    if not file.is_file():
        raise InputError(f"{file}: there is no such file. --data takes a text, or .jsonl with a text in each line.")
    if file.suffix != ".jsonl":
        return [file.read_bytes()]
    texts = []
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise InputError(f"{file}:{number}: expected JSON in each line: {_line(error)}.") from error
        text = record.get(field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            there = f"it has {', '.join(map(repr, record))}" if isinstance(record, dict) else "it is no object"
            raise InputError(f"{file}:{number}: expected a text under {field!r}; {there}. --field names another.")
        texts.append(text.encode())
    return texts


def cut(documents: Sequence[Sequence[int]], context: int) -> list[list[int]]:
    """Stretches of at most context + 1 tokens, in which every token of a document but the first is predicted once.

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
    """`[n, longest]` int64, of similar lengths, filled up with `PAD`."""
    windows = sorted(windows, key=len, reverse=True)
    for start in range(0, len(windows), BATCH):
        some = [torch.tensor(window) for window in windows[start : start + BATCH]]
        yield nn.utils.rnn.pad_sequence(some, batch_first=True, padding_value=PAD).to(device)
        progress()


def _demo_model() -> tuple[nn.Module, Encode, Callable[[Any, Tensor], Tensor], int]:
    """The model, its tokens, how to call it, and its longest context."""
    from funclora.demo.model import load_base

    model = load_base()
    return model, list, lambda bound, ids: bound(ids), model.config.context


def _transformers_model(folder: Path) -> tuple[nn.Module, Encode, Callable[[Any, Tensor], Tensor], int]:
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: holds no config.json. --model takes the folder of a transformers model.")
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ModuleNotFoundError as error:
        raise InputError("--model needs transformers. Type: pip install transformers") from error
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder}: is no causal language model with its tokenizer: {_line(error)}") from error
    model = model.eval().requires_grad_(False)

    def encode(text: bytes) -> list[int]:
        ids: list[int] = tokenizer(text.decode("utf-8", "replace"), verbose=False)["input_ids"]
        return ids

    def scores(bound: Any, ids: Tensor) -> Tensor:
        logits: Tensor = bound(input_ids=ids, use_cache=False).logits
        return logits

    limit = getattr(model.config, "max_position_embeddings", None)
    return model, encode, scores, limit if isinstance(limit, int) else 1 << 30


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
