"""What a run needs before its first step: tokenizer, data, base and adapters that fit each other."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from funclora._apps.train.adapters import Start, adapter_classes, as_adapter, begin
from funclora._apps.train.base import (
    Base,
    Batch,
    context_limit,
    known_classes,
    known_problem,
    load_base,
    load_tokenizer,
    vocabulary,
)
from funclora._apps.train.batches import Batches
from funclora._apps.train.device import resolved
from funclora._apps.train.embedding import embedding, with_pooling
from funclora._apps.train.examples import Data, prepare
from funclora._apps.train.packing import Packed, check_packing
from funclora._apps.train.qlora import forget
from funclora._apps.train.reference import with_preferences
from funclora._apps.train.rows import Example
from funclora._apps.train.settings import EMBEDDING, PREFERENCE, SEQ2SEQ, SEQUENCE, Settings, compares_rows
from funclora._apps.train.stored import Stored
from funclora._bind.apply import bind
from funclora._bind.summary import summary
from funclora._files.atomic import replace_files
from funclora.distributed import _ranks as ranks
from funclora.distributed._ranks import first_alone
from funclora.distributed._shards import shard
from funclora.errors import ConfigError

DOMAIN = "urllib"  # of a size that takes half a minute
DATA_FILE = "data.jsonl"
EVA_STEPS = 64  # at most; the components converge long before


@dataclass(frozen=True, eq=False)
class Ready:
    """A run that is ready to start.

    Attributes:
        settings: with the default data if none was given, with what this machine decides, and with what the starting
            adapter says.
        data: tokenised.
        start: the base and its fresh adapters.
    """

    settings: Settings
    data: Data
    start: Start


def ready(settings: Settings, folder: Path) -> Ready:
    """Load and check everything: first the data, which most likely contains errors, and last the weights.

    Args:
        settings: the run's.
        folder: where the demo's data is written, for a run without data, and the examples of large data.

    Raises:
        FuncloraError: something is missing, broken, or does not fit the rest.
    """
    settings, data, base = load(settings, folder)
    start = begin(base, settings, _first_batches(base, data, settings))
    if settings.shard:
        start = divided(start)
    if compares_rows(settings) and ranks.size() > 1:
        start = replace(start, base=replace(start.base, together=True))
    data.notes.extend(_ranks_beyond_use(start))
    if settings.task == PREFERENCE:
        start = with_preferences(start, settings)
    return Ready(settings, data, start)


def load(settings: Settings, folder: Path) -> tuple[Settings, Data, Base]:
    """The data and the base of a run, and its settings with what was left open: as in `Ready`.

    Args:
        settings: the run's.
        folder: where the demo's data is written, for a run without data.

    Raises:
        FuncloraError: something is missing, broken, or does not fit the rest.
    """
    settings = as_adapter(resolved(settings))
    tokenizer = load_tokenizer(settings)
    if settings.task == EMBEDDING:
        settings = with_pooling(settings, {} if settings.adapter is None else {str(settings.adapter): settings.adapter})
    classes = adapter_classes(settings) or known_classes(settings)
    settings = replace(settings, problem=known_problem(settings))
    with first_alone():
        if not settings.data:
            settings = replace(settings, data=(demo_data(folder),))
        data = prepare(settings, tokenizer, context_limit(settings), classes, folder)
    if settings.task == SEQUENCE:
        settings = replace(settings, problem=data.problem)
    base = load_base(settings, tokenizer, data.classes)
    check_vocabulary(base, data.train, data.validation)
    if settings.task == EMBEDDING:
        base = embedding(base, settings)
        data.notes.append(f"Embeddings are made of tokens: {settings.pooling}. --pooling decides it.")
    if settings.packing:
        bound = bind(base.model, base.params, {})
        check_packing(lambda batch: base.logits(bound, batch), vocabulary(base.model), base.name)
    return settings, data, base


def divided(start: Start) -> Start:
    """The same with the weights of the base divided among the processes; those of the model are freed."""
    base = start.base
    params = shard(base.params)
    forget(base.model, [name for name, weight in base.params.items() if params[name] is not weight])
    return replace(start, base=replace(base, params=params))


def demo_data(folder: Path, domain: str = DOMAIN) -> Path:
    """The source of a package of Python's standard library as JSONL, one text for each file; new to the demo's base.

    Raises:
        ConfigError: this Python has no source files.
        OSError: the file cannot be written.
    """
    from funclora.demo.corpus import domain_files

    try:
        texts = [file.read_text(encoding="utf-8") for file in domain_files(domain)]
    except FileNotFoundError as error:
        raise ConfigError(f"data: no data is given, and {error}. Give --data.") from error
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts if text.strip())

    def fill(draft: Path) -> None:
        draft.write_text(lines, encoding="utf-8")

    file = folder / DATA_FILE
    if not file.is_file() or file.read_bytes() != lines.encode():
        replace_files(folder, {DATA_FILE: fill})
    return file


def check_vocabulary(base: Base, *parts: Sequence[Example]) -> None:
    """Raise `ConfigError` if an example has a token that the model's embedding does not."""
    rows = vocabulary(base.model)
    for part in parts:
        for example in _with_all_ids(part):
            for i in _ids(example, base.task):
                if i >= rows:
                    raise ConfigError(
                        f"{example.source}: token {_token(base.tokenizer, i)} has the id {i}, but the embedding "
                        f"of {base.name} has {rows} rows. Use the tokenizer that the model was trained "
                        "with, or a model whose embedding was resized to the tokenizer."
                    )


def _ranks_beyond_use(start: Start) -> Iterator[str]:
    """A note if a factor has a higher rank than its weight can have."""
    rows = [row for row in summary(start.base.params, start.adapters).rows if row.r and len(row.shape) == 2]
    wide = [row for row in rows if row.r is not None and row.r > min(row.shape)]
    if wide:
        first, size = wide[0], min(wide[0].shape)
        more = f" and {len(wide) - 1} more weights" if len(wide) > 1 else ""
        yield (
            f"The rank {first.r} is more than {first.name} ({first.shape[0]}×{first.shape[1]}){more} can use: every "
            f"change of it has at most rank {size}. A lower --rank saves memory and time."
        )


def _with_all_ids(part: Sequence[Example]) -> Iterable[Example]:
    """Examples among which is the largest id."""
    if isinstance(part, Packed):
        part = part.examples
    return [part.largest()] if isinstance(part, Stored) and part else part


def _ids(example: Example, task: str) -> Iterable[int]:
    return [*example.ids, *example.labels] if task == SEQ2SEQ else example.ids


def _token(tokenizer: Any, i: int) -> str:
    return repr(tokenizer.convert_ids_to_tokens(i)) if hasattr(tokenizer, "convert_ids_to_tokens") else str(i)


def _first_batches(base: Base, data: Data, settings: Settings) -> Iterator[Batch]:
    """The batches of the first steps, made on demand."""
    batches = Batches.of(settings, data.train, base.tokenizer.pad_token_id, data.shares)
    for k in range(min(EVA_STEPS, batches.steps_per_epoch)):
        yield from batches.step(k)
