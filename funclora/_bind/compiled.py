"""`bind` while torch.compile traces."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from funclora._bind.checks import batch_of
from funclora._bind.rewrite import rewritten
from funclora._quant.quantize import reads_packed_weights
from funclora._quant.tensor import plain_weight
from funclora._tracking.batch import Batch
from funclora._tracking.entry import with_rows
from funclora.errors import UnsupportedError
from funclora.rules.base import Adapters, Params


class TracedModule:
    """The result of `bind` while torch.compile traces and cannot make module objects.

    A graph is captured once, by one thread, and holds the weights as its inputs: `functional_call` is safe there.
    """

    def __init__(self, model: nn.Module, params: Params, adapters: Adapters) -> None:
        self._model = model
        self._batch = batch_of(adapters)
        if self._batch is not None and self._batch.tokens is not None:
            raise UnsupportedError(
                "ids or weights for each token are not supported under torch.compile, which cannot compare who the "
                "tokens belong to. Call apply outside the compiled function, or route by row."
            )
        self._tensors = {}
        places: dict[tuple[int, str], str] = {}
        for name, given in params.items():
            # The tracer cannot track a quantised weight inside a lazy one.
            value = plain_weight(given) if name in adapters else given
            path, _, leaf = name.rpartition(".")
            owner = model.get_submodule(path)
            twin = places.setdefault((id(owner), leaf), name)
            if twin != name and (name in adapters or twin in adapters):
                raise UnsupportedError(
                    f"{twin!r} and {name!r} are one parameter of one module under two names. torch.compile cannot give "
                    "it two weights: call apply outside the compiled function, or adapt a model without the sharing."
                )
            is_buffer = leaf in owner._buffers
            if reads_packed_weights(owner):
                raise UnsupportedError(
                    f"{name!r} belongs to a {type(owner).__name__} of bitsandbytes, which torch.compile cannot give "
                    "another weight. Call apply outside the compiled function, or on the model with plain layers."
                )
            self._tensors[name] = (
                value.clone() if is_buffer else rewritten(name, value, adapters.get(name), owner, None, {})
            )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.called("", args, kwargs, None)

    def called(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any], batch: Batch | None) -> Any:
        """The model on inputs that hold the rows as `batch` says; None for the batch of `route`."""
        if path:
            getattr(self, path)

        def call(*args: Any, **kwargs: Any) -> Any:
            return torch.func.functional_call(self._model, self._tensors, args, kwargs, tie_weights=False)

        if self._batch is None:
            return call(*args, **kwargs)
        code = type(self._model).forward.__code__
        names = code.co_varnames[1 : code.co_argcount]
        return with_rows(call, args, kwargs, batch or self._batch, {}, names=names)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._model, name)
        if callable(value):
            raise UnsupportedError(
                f"bound.{name} is called under torch.compile, where only bound(...) itself is supported. Call it "
                "outside the compiled function."
            )
        return value
