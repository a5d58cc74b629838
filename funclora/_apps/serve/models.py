"""/v1/models, and the adapters that are loaded and unloaded by requests."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from funclora._apps.serve.adapters import Names
from funclora._apps.serve.answers import problem_of
from funclora._apps.serve.body import read_json
from funclora._apps.serve.options import Fields
from funclora.errors import FuncloraError
from funclora.io.peft.cache import AdapterCache

BODY = 1 << 16  # bytes


class Models:
    """The base and its adapters.

    Args:
        names: of them.
        cache: the adapters.
        context: the model's, in tokens; None if there is no limit.
        chats: whether /v1/chat/completions can be used.
    """

    def __init__(self, names: Names, cache: AdapterCache, context: int | None, *, chats: bool) -> None:
        self._names, self._cache, self._context, self._chats = names, cache, context, chats

    async def list(self, request: Request) -> Response:
        """GET /v1/models."""
        adapters = await asyncio.to_thread(self._names.all)
        data = [self._model(self._names.base), *(self._model(name) for name in adapters)]
        return JSONResponse({"object": "list", "data": data})

    async def get(self, request: Request) -> Response:
        """GET /v1/models/NAME."""
        name = request.path_params["name"]
        self._names.folder(name)
        return JSONResponse(self._model(name))

    async def load(self, request: Request) -> Response:
        """POST /v1/load_lora_adapter: a folder of the root gets a name, and is read at once."""
        name, path = await _named(request, "lora_path")
        folder = self._names.find(name, path)
        try:
            await asyncio.to_thread(self._cache.load, folder)
        except (FuncloraError, OSError) as error:
            raise problem_of(error, self._names.root) from error
        self._names.add(name, folder)
        return JSONResponse(self._model(name))

    async def unload(self, request: Request) -> Response:
        """POST /v1/unload_lora_adapter: requests that come now do not find it; those that run go on."""
        name, _ = await _named(request)
        folder = self._names.remove(name)
        if not self._names.is_used(folder):
            self._cache.drop(folder)
        return JSONResponse({"id": name, "object": "model", "deleted": True})

    def _model(self, name: str) -> dict[str, Any]:
        base = self._names.base
        return {
            "id": name,
            "object": "model",
            "created": 0,
            "owned_by": "funclora",
            "root": base,
            "parent": None if name == base else base,
            "max_model_len": self._context,
            "chat": self._chats,
        }


async def _named(request: Request, *others: str) -> tuple[str, str]:
    fields = Fields(await read_json(request, BODY), ("lora_name", *others), {})
    return fields.text("lora_name"), fields.text(others[0]) if others else ""
