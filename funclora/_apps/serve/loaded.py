"""What a server loads: a generator with its engine, or an encoder."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from funclora._apps.serve.adapters import Names
from funclora._apps.serve.completions import Completions
from funclora._apps.serve.embeddings import Embeddings, Encoder, pooling_of
from funclora._apps.serve.prompts import Prompts
from funclora._apps.serve.settings import ServeSettings
from funclora._apps.train.base import load_base, load_tokenizer, vocabulary
from funclora._apps.train.device import device_of
from funclora._apps.train.folder import load_config, load_model, longest_context
from funclora._apps.train.settings import Settings
from funclora._bind.params import base_params
from funclora.errors import ConfigError, FuncloraError, UnsupportedError
from funclora.io.hf.origin import check_origin
from funclora.io.peft.cache import AdapterCache
from funclora.io.peft.files import CONFIG_FILE
from funclora.serving import Engine

Endpoint = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True)
class Loaded:
    """A model that is ready.

    Attributes:
        cache: its adapters.
        posts: what answers the requests to each path.
        engine: of a generator.
        context: the most tokens that it reads; None if there is no limit.
        chats: whether it has a chat template.
    """

    cache: AdapterCache
    posts: dict[str, Endpoint]
    engine: Engine | None
    context: int | None
    chats: bool


def load(settings: ServeSettings, names: Names) -> Loaded:
    """Load what is served.

    Args:
        settings: what it is.
        names: of the models.

    Raises:
        FuncloraError: the model or an option cannot be used.
    """
    if settings.base is None or _generates(settings.base):
        if settings.pooling is not None:
            raise ConfigError("--pooling is for encoders, and this model generates texts. Leave it out.")
        return _generator(settings, names)
    return _encoder(settings, settings.base, names)


def _generates(folder: Path) -> bool:
    """Whether a folder's class continues texts; otherwise it encodes them."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = load_config(folder)
    if config.is_encoder_decoder:
        raise UnsupportedError(
            f"{folder}: a sequence-to-sequence model, and only decoders and encoders can be served. "
            "funclora generate runs it."
        )
    return not config.architectures or config.architectures[0] in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def _generator(settings: ServeSettings, names: Names) -> Loaded:
    ours = _ours(settings)
    tokenizer = load_tokenizer(ours)
    base = load_base(ours, tokenizer)
    cache = AdapterCache(base.model, settings.adapters or {}, settings.memory, device=base.device, params=base.params)
    engine = Engine(
        base.model,
        base.params,
        cache,
        max_rows=settings.max_rows,
        max_queue=settings.max_queue,
        max_length=base.limit,
        prefix_memory=settings.prefix_memory,
        eos_ids=end_ids(base.model, tokenizer),
    )
    prompts = Prompts(tokenizer, vocabulary(base.model), base.limit)
    look = Origins(settings.adapters, settings.base).look
    own = Completions(engine, prompts, names, settings.limits, look)
    posts: dict[str, Endpoint] = {"/v1/completions": own.completions, "/v1/chat/completions": own.chat}
    return Loaded(cache, posts, engine, base.limit, bool(getattr(tokenizer, "chat_template", None)))


def _encoder(settings: ServeSettings, folder: Path, names: Names) -> Loaded:
    for option, given in (("--quantize", settings.quantize != "none"), ("--chat-template", settings.chat_template)):
        if given:
            raise ConfigError(f"{option}: {folder} is an encoder, and this is for models that generate. Leave it out.")
    ours = _ours(settings)
    tokenizer = load_tokenizer(ours)
    device = device_of(settings.device)
    whole, _ = load_model(folder, None, dtype=settings.dtype)
    model: Any = whole.base_model  # without its head
    model.to(device)
    params = base_params(model)
    context = longest_context(model)
    cache = AdapterCache(model, settings.adapters or {}, settings.memory, device=device, params=params)
    own = Embeddings(
        Encoder(model, params, cache, settings.pooling or pooling_of(folder), device),
        cache,
        Prompts(tokenizer, vocabulary(model), context),
        names,
        body=settings.limits.body,
        max_rows=settings.max_rows,
        max_queue=settings.max_queue,
        look=Origins(settings.adapters, folder).look,
    )
    return Loaded(cache, {"/v1/embeddings": own.create}, None, context, chats=False)


def _ours(settings: ServeSettings) -> Settings:
    return Settings(
        model=settings.base,
        dtype=settings.dtype,
        quantize=settings.quantize,
        device=settings.device,
        chat_template=settings.chat_template,
    )


class Origins:
    """Warns, once for each state of a folder, of adapters that were made for another base.

    Args:
        root: contains the adapters' folders.
        base: folder of the model; None for one without.
    """

    def __init__(self, root: Path | None, base: Path | None) -> None:
        self._root, self._base = root, base
        self._seen: dict[str, int] = {}

    def look(self, name: str) -> None:
        """Look at the folder of an adapter that is asked for."""
        if self._root is None:
            return
        with contextlib.suppress(FuncloraError, OSError):  # whatever is wrong with it, loading it will say
            written = (self._root / name / CONFIG_FILE).stat().st_mtime_ns
            if self._seen.get(name) != written:
                self._seen[name] = written
                check_origin([self._root / name], self._base)


def end_ids(model: Any, tokenizer: Any) -> set[int]:
    """The ids that end an answer: those that the model's folder names, and the tokenizer's own."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = {named} if isinstance(named, int) else {*(named or ())}
    return found if tokenizer.eos_token_id is None else {*found, tokenizer.eos_token_id}
