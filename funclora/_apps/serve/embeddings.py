"""/v1/embeddings: texts as vectors, by an encoder and its adapters."""

from __future__ import annotations

import asyncio
import base64
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from torch import Tensor, nn

from funclora._apps.serve.access import account_of
from funclora._apps.serve.adapters import Names
from funclora._apps.serve.answers import problem_of
from funclora._apps.serve.body import read_json
from funclora._apps.serve.options import Fields
from funclora._apps.serve.problems import Problem, malformed
from funclora._apps.serve.prompts import Prompts
from funclora._bind.apply import bind
from funclora._files.atomic import read_json as read_json_file
from funclora.errors import UnsupportedError
from funclora.io.peft.cache import AdapterCache, LoadedAdapter
from funclora.rules.base import Params

MEAN, FIRST, LAST = POOLINGS = ("mean", "first", "last")
# What sentence-transformers calls them.
_THEIRS = {"pooling_mode_mean_tokens": MEAN, "pooling_mode_cls_token": FIRST, "pooling_mode_lasttoken": LAST}


def pooling_of(folder: Path) -> str:
    """How the vectors of a text's tokens become one: as a folder of sentence-transformers says, otherwise their mean.

    Raises:
        UnsupportedError: the folder asks for another pooling.
    """
    file = folder / "1_Pooling" / "config.json"
    if not file.is_file():
        return MEAN
    chosen = [
        name for name, value in read_json_file(file).items() if name.startswith("pooling_mode_") and value is True
    ]
    if len(chosen) == 1 and chosen[0] in _THEIRS:
        return _THEIRS[chosen[0]]
    raise UnsupportedError(
        f"{file}: the pooling is {' and '.join(chosen)}, and {', '.join(POOLINGS)} are supported. Choose one with "
        "--pooling."
    )


class Encoder:
    """Vectors of rows of tokens, each row with its own adapter.

    Args:
        model: of transformers, without a head.
        params: its weights.
        cache: the adapters.
        pooling: "mean" over the tokens, or the "first" or "last" of them.
        device: where it computes.
    """

    def __init__(self, model: nn.Module, params: Params, cache: AdapterCache, pooling: str, device: Any) -> None:
        self._model, self._params, self._cache = model, params, cache
        self._pooling, self._device = pooling, device

    @torch.no_grad()
    def vectors(self, rows: Sequence[Sequence[int]], adapters: Sequence[LoadedAdapter | None]) -> Tensor:
        """`[rows, dimension]`, float32, of length one."""
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(self._device)
        lengths = torch.tensor([len(row) for row in rows], device=self._device)
        mask = torch.arange(ids.shape[1], device=self._device) < lengths[:, None]
        bound: Any = bind(self._model, self._params, self._cache.route(adapters))
        hidden: Tensor = bound(input_ids=ids, attention_mask=mask.long()).last_hidden_state.float()
        if self._pooling == MEAN:
            pooled = (hidden * mask[..., None]).sum(1) / lengths[:, None]
        else:
            places = lengths - 1 if self._pooling == LAST else torch.zeros_like(lengths)
            pooled = hidden[torch.arange(len(ids), device=self._device), places]
        return F.normalize(pooled, dim=-1)


@dataclass(frozen=True)
class _Text:
    ids: list[int]
    folder: str | None
    done: asyncio.Future[list[float]]


class Embeddings:
    """Answers requests for vectors; texts that wait share a batch, whatever their adapters are.

    Args:
        encoder: computes the vectors.
        cache: the adapters.
        prompts: reads the texts.
        names: of the models.
        body: bytes that a request may have.
        max_rows: texts of a batch.
        max_queue: texts that may wait.
        look: called with the folder of an adapter that is asked for, before it is used.
    """

    def __init__(
        self,
        encoder: Encoder,
        cache: AdapterCache,
        prompts: Prompts,
        names: Names,
        *,
        body: int,
        max_rows: int,
        max_queue: int,
        look: Callable[[str], None],
    ) -> None:
        self._encoder, self._cache, self._prompts, self._names = encoder, cache, prompts, names
        self._body, self._max_rows, self._max_queue, self._look = body, max_rows, max_queue, look
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="funclora-encoder")
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="funclora-texts")
        self._waiting: deque[_Text] = deque()
        self._running: asyncio.Task[None] | None = None

    async def create(self, request: Request) -> Response:
        """POST /v1/embeddings."""
        loop = asyncio.get_running_loop()
        known = ("model", "input", "encoding_format", "user")
        fields = Fields(await read_json(request, self._body), known, {})
        model, form = fields.text("model"), fields.get("encoding_format") or "float"
        if form not in ("float", "base64"):
            raise malformed("encoding_format", "'float' or 'base64'", form)
        folder, texts = await loop.run_in_executor(self._reader, self._read, model, fields.get("input"))
        account = account_of(request)
        account.model, account.prompt_tokens = model, sum(map(len, texts))
        if len(self._waiting) + len(texts) > self._max_queue:
            raise Problem(429, "As many texts wait as may wait. Try again later.", code="queue_full")
        asked = [_Text(ids, folder, loop.create_future()) for ids in texts]
        self._waiting.extend(asked)
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._run())
        try:
            vectors = await asyncio.gather(*(text.done for text in asked))
        finally:
            for text in asked:
                text.done.cancel()
        data = [
            {"object": "embedding", "index": i, "embedding": _written(vector, form)} for i, vector in enumerate(vectors)
        ]
        usage = {"prompt_tokens": account.prompt_tokens, "total_tokens": account.prompt_tokens}
        return JSONResponse({"object": "list", "data": data, "model": model, "usage": usage})

    def _read(self, model: str, value: Any) -> tuple[str | None, list[list[int]]]:
        folder = self._names.folder(model)
        texts = self._prompts.inputs(value)
        if folder is not None:
            self._look(folder)
        return folder, texts

    async def _run(self) -> None:
        """Batches, as long as texts wait."""
        while self._waiting:
            batch: list[_Text] = []
            while self._waiting and len(batch) < self._max_rows:
                text = self._waiting.popleft()
                if not text.done.done():  # whoever asked is still there
                    batch.append(text)
            folders = list(dict.fromkeys(text.folder for text in batch if text.folder is not None))
            found = dict(zip(folders, await self._tried((self._cache.load, folder) for folder in folders), strict=True))
            ready: list[_Text] = []
            for text in batch:
                loaded = found.get(text.folder) if text.folder is not None else None
                if not isinstance(loaded, BaseException):
                    ready.append(text)
                elif not text.done.done():  # a broken adapter concerns its own texts only
                    text.done.set_exception(problem_of(loaded, self._names.root))
            if ready:
                rows = [None if text.folder is None else found[text.folder] for text in ready]
                (vectors,) = await self._tried([(self._encoder.vectors, [text.ids for text in ready], rows)])
                for i, text in enumerate(ready):
                    if text.done.done():
                        continue
                    if isinstance(vectors, BaseException):
                        text.done.set_exception(vectors)
                    else:
                        text.done.set_result(vectors[i].tolist())

    async def _tried(self, calls: Iterable[tuple[Any, ...]]) -> list[Any]:
        """What each call returns or raises, one after the other in the encoder's thread."""
        loop = asyncio.get_running_loop()
        waiting = [loop.run_in_executor(self._thread, *call) for call in calls]
        return await asyncio.gather(*waiting, return_exceptions=True)


def _written(vector: list[float], form: str) -> Any:
    if form == "float":
        return vector
    return base64.b64encode(torch.tensor(vector, dtype=torch.float32).numpy().astype("<f4").tobytes()).decode()
