"""`Engine`: requests come from any thread, one thread answers them."""

from __future__ import annotations

import itertools
import os
import threading
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

import torch
from torch import nn

from funclora._api.arguments import check_model, check_params, refuse
from funclora.errors import ClosedError, ConfigError, QueueFullError, TooLongError, shortened
from funclora.io.peft.cache import AdapterCache
from funclora.rules.base import Params
from funclora.serving._batch import Models, Row
from funclora.serving._decoder import Decoder
from funclora.serving._prefixes import Prefixes
from funclora.serving._reader import Reader
from funclora.serving._sampling import Chooser
from funclora.serving._settings import Settings
from funclora.serving._statistics import Counts, Statistics
from funclora.serving._stream import Stream

MEMORY = 1 << 30  # bytes of adapters that are kept if only their folder is given
PIECE = 64  # tokens of prompts that are shared together


class Engine:
    """Answers many requests at a time with one frozen model, each with its own adapter.

    A batch decodes one token of each row at every step. Rows join it as soon as their prompts are read, and leave it
    when their answers end; long prompts are read in pieces, so that the others go on. Each answer has the tokens that
    `bind(model, params, adapter).generate` gives for it alone.

    Args:
        model: a causal language model of transformers, or a module from ids `[rows, tokens]` to logits.
        params: its weights, as from `base_params`.
        cache: the adapters, made with the same dict `params`, or with none, which is slower; or the folder that
            contains their folders.
        max_rows: maximum number of requests that are answered at a time.
        max_queue: maximum number of further requests that wait.
        max_length: maximum number of tokens of a prompt and its answer; by default what the model's configuration
            says, if it says anything.
        prefill_tokens: maximum number of prompt tokens that are read between two steps of the others.
        prefix_memory: bytes of what the model knows of the beginnings of prompts, which later prompts for the same
            version of an adapter that begin in the same way do not read again: whole pieces of 64 tokens, or of
            `prefill_tokens` if these are fewer. 0 keeps nothing.
        eos_ids: tokens that end every answer; by default those of the model's generation configuration.

    Attributes:
        shares_prefixes: whether there is `prefix_memory`, and the model's cache can be cut: it holds keys and values of
            all tokens, so it is none with sliding windows or states.

    Raises:
        ConfigError: a value is out of its range.
        UnsupportedError: rows of this model cannot be decoded together.

    Examples:
        >>> import tempfile
        >>> import funclora as fl
        >>> from funclora.demo.model import load_base
        >>> model = load_base()
        >>> params, config = fl.base_params(model), fl.LoraConfig(r=2, target_modules=["q_proj"])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     fl.save_peft(f"{folder}/customer-17", fl.init(model, config), config)
        ...     with Engine(model, params, folder) as engine:
        ...         streams = [engine.submit(list(b"import "), name) for name in ("customer-17", None)]
        ...         [len(stream.result(timeout=60)) for stream in streams]
        [16, 16]
    """

    def __init__(
        self,
        model: nn.Module,
        params: Params,
        cache: AdapterCache | str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]],
        *,
        max_rows: int = 16,
        max_queue: int = 256,
        max_length: int | None = None,
        prefill_tokens: int = 512,
        prefix_memory: int = 0,
        eos_ids: Collection[int] | None = None,
    ) -> None:
        check_model(model)
        check_params(params)
        numbers = {"max_rows": max_rows, "max_queue": max_queue, "prefill_tokens": prefill_tokens}
        for name, number in numbers.items() if max_length is None else {**numbers, "max_length": max_length}.items():
            if not isinstance(number, int) or isinstance(number, bool) or number < 1:
                raise ConfigError(f"Engine: {name}: expected a positive int, got {number!r}.")
        if not isinstance(prefix_memory, int) or isinstance(prefix_memory, bool) or prefix_memory < 0:
            raise ConfigError(f"Engine: prefix_memory: expected a number of bytes, or 0, got {prefix_memory!r}.")
        if not isinstance(cache, AdapterCache):
            cache = AdapterCache(model, cache, MEMORY, params=params)
        if cache.params is not None and cache.params is not params:
            raise ConfigError(
                "Engine: cache: it was made with other params than these, and what it computed from them may be wrong "
                "here. Pass the same dict to both."
            )
        self.cache = cache
        self.max_length = _context(model) if max_length is None else max_length
        self.eos_ids = frozenset(_ends(model) if eos_ids is None else eos_ids)
        self._max_rows, self._max_queue = max_rows, max_queue

        models = Models(model, params, cache)
        with torch.inference_mode():
            self._reader = Reader(models.bound([None]))
        self._counts = Counts()
        self.shares_prefixes = prefix_memory > 0 and self._reader.cuts
        self._prefixes = Prefixes(min(PIECE, prefill_tokens), prefix_memory) if self.shares_prefixes else None
        self._decoder = Decoder(self._reader, models, self._counts, self.eos_ids, prefill_tokens, self._prefixes)
        self._changed = threading.Condition()
        self._waiting: deque[Row] = deque()
        self._running = 0
        self._closing = self._stopping = False
        self._thread: threading.Thread | None = None
        self._loaders = ThreadPoolExecutor(2, thread_name_prefix="funclora-adapters")

    def __enter__(self) -> Engine:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(drain=kind is None)

    def start(self) -> None:
        """Begin to answer. Requests may come before."""
        with self._changed:
            if self._closing:
                raise ClosedError("Engine: it was closed, and cannot be started again. Make another one.")
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="funclora-engine", daemon=True)
                self._thread.start()

    def close(self, *, drain: bool = True, timeout: float | None = None) -> None:
        """Accept no more requests, and stop when those that are there have ended.

        Args:
            drain: finish them; otherwise they end with what they have, as if they were cancelled.
            timeout: seconds after which they are ended as well.
        """
        with self._changed:
            self._closing = True
            self._stopping = self._stopping or not drain
            self._changed.notify_all()
            thread = self._thread
        if thread is None:
            self._end_all(None)
            return
        thread.join(timeout)
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        thread.join()

    @property
    def alive(self) -> bool:
        """Whether requests are accepted and answered: it was started, was not closed, and has not failed."""
        return self._thread is not None and self._thread.is_alive() and not self._closing

    def submit(self, prompt_ids: Sequence[int], adapter: str | None = None, settings: Settings | None = None) -> Stream:
        """Ask for an answer. It comes through the stream that is returned at once.

        Args:
            prompt_ids: the tokens of the prompt.
            adapter: the id of its adapter; None for the base model. It has the version that its folder has when a row
                becomes free.
            settings: how tokens are chosen; `Settings()` by default.

        Raises:
            ConfigError: the prompt is empty, or holds what is no token of the model.
            TooLongError: prompt and `max_tokens` are longer than `max_length`.
            UnknownAdapterError: there is no such adapter.
            QueueFullError: `max_queue` requests wait already.
            ClosedError: the engine was closed.
        """
        settings = Settings() if settings is None else settings
        if not isinstance(settings, Settings):
            refuse("settings", "Settings", settings)
        prompt = self._checked(prompt_ids, settings.max_tokens)
        if adapter is not None:
            self.cache.check(adapter)
        stream = Stream(self._wake)
        row = Row(prompt, settings, stream, adapter, Chooser(settings, self._reader.device))
        with self._changed:
            if self._closing:
                raise ClosedError("Engine: it was closed and accepts no more requests.")
            if len(self._waiting) >= self._max_queue:
                raise QueueFullError(f"Engine: {self._max_queue} requests wait already. Try again later.")
            self._waiting.append(row)
            self._changed.notify_all()
        self._counts.add(requests=1)
        return stream

    def statistics(self) -> Statistics:
        """Counts of what happened so far."""
        cache, counts, prefixes = self.cache.stats(), self._counts, self._prefixes
        with self._changed:
            waiting = len(self._waiting)
            running = self._running
        with counts.lock:
            return Statistics(
                counts.requests, dict(counts.finished), counts.prompt_tokens, counts.generated_tokens, counts.steps,
                waiting, running, sum(counts.first_tokens), counts.first_token_seconds, counts.buckets(),
                cache.hits, cache.misses, cache.evictions, cache.adapters, cache.bytes,
                counts.prefix_hits, counts.prefix_tokens, prefixes.evictions if prefixes else 0,
                prefixes.bytes if prefixes else 0,
            )  # fmt: skip

    def _checked(self, prompt_ids: Sequence[int], max_tokens: int) -> list[int]:
        if isinstance(prompt_ids, (str, bytes)) or not isinstance(prompt_ids, Sequence):
            refuse("prompt_ids", "a list of token ids", prompt_ids)
        prompt = list(prompt_ids)
        for token in prompt:
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < self._reader.vocabulary:
                most = self._reader.vocabulary - 1
                raise ConfigError(f"prompt_ids: expected token ids from 0 to {most}, got {shortened(token)}.")
        if not prompt:
            raise ConfigError("prompt_ids: expected at least one token, got none.")
        if self.max_length is not None and len(prompt) + max_tokens > self.max_length:
            raise TooLongError(
                f"prompt_ids: {len(prompt)} tokens and max_tokens={max_tokens} are {len(prompt) + max_tokens}, and "
                f"{self.max_length} are possible. Shorten the prompt, or ask for fewer tokens."
            )
        return prompt

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            with torch.inference_mode():
                while self._wait():
                    self._admit()
                    self._decoder.step()
        except BaseException as caught:
            error = ClosedError(f"Engine: its thread has ended: {type(caught).__name__}: {caught}")
            error.__cause__ = caught
            raise
        finally:
            self._end_all(error)

    def _wait(self) -> bool:
        """Wait until there is something to do; false if nothing will be."""
        with self._changed:
            while not self._stopping:
                self._running = len(self._decoder.rows())
                if self._running or any(row.stream.cancelled or row.is_loaded for row in self._waiting):
                    return True
                if any(row.loading is None for row in self._next()):
                    return True
                if self._closing and not self._waiting:
                    return False
                self._changed.wait()
            return False

    def _next(self) -> list[Row]:
        """The waiting rows whose adapters must be loaded now: no more than fill a batch, to bound the memory."""
        return [*itertools.islice(self._waiting, self._max_rows)]

    def _admit(self) -> None:
        """Let waiting requests become rows, in the order in which they came and their adapters are loaded."""
        with self._changed:
            ended = [row for row in self._waiting if row.stream.cancelled]
            ready = [row for row in self._waiting if row.is_loaded and row not in ended]
            ready = ready[: self._max_rows - self._running]
            self._running += len(ready)
            self._waiting = deque(row for row in self._waiting if row not in ended and row not in ready)
            coming = [row for row in self._next() if row.loading is None]
        for row in ended:
            self._decoder.finish(row, "cancelled")
        for row in ready:
            error = None if row.loading is None else row.loading.exception()
            if error is None:
                self._decoder.add(row)
            else:
                self._decoder.finish(row, None, error)
        for row in coming:
            self._load(row)

    def _load(self, row: Row) -> None:
        """Load its adapter, in another thread."""
        if row.name is None:
            row.loading = Future()
            row.loading.set_result(None)
        else:
            row.loading = self._loaders.submit(self.cache.load, row.name)
            row.loading.add_done_callback(lambda _: self._wake())

    def _end_all(self, error: BaseException | None) -> None:
        """End what has not ended, when nothing will go on."""
        with self._changed:
            self._closing = True
            rows = [*self._waiting, *self._decoder.rows()]
            self._waiting.clear()
            self._running = 0
        self._loaders.shutdown(wait=False, cancel_futures=True)
        for row in rows:
            self._decoder.finish(row, None if error else "cancelled", error)


def _context(model: nn.Module) -> int | None:
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = getattr(text, "max_position_embeddings", None) or getattr(text, "context", None)
    return found if isinstance(found, int) else None


def _ends(model: nn.Module) -> list[int]:
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return [ends] if isinstance(ends, int) else [*(ends or ())]
