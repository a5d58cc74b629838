"""Running a model with rewritten weights: `base_params`, `bind` and `apply`."""

from __future__ import annotations

import warnings
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn

from funclora._api.arguments import check_model
from funclora._bind.checks import batch_of, check_adapters, check_rules, refuse_unbindable, unwritten
from funclora._bind.clone import clone_module
from funclora._bind.compiled import TracedModule
from funclora._bind.params import named_tensors
from funclora._bind.rewrite import rewritten
from funclora._lazy.weight import Placeholders
from funclora._quant.quantize import of_bitsandbytes, read_any_weight, reads_packed_weights
from funclora._torch.functions import in_transform, is_sharded
from funclora._tracking.batch import Batch
from funclora._tracking.crossing import let_cross
from funclora._tracking.entry import Entrance, argument_names
from funclora.distributed._live import gathering
from funclora.errors import DenseFallbackWarning, ParamsError, UnsupportedError, near
from funclora.rules.base import Adapters, Params
from funclora.rules.tokens import untied
from funclora.rules.weights import refuse_division

M = TypeVar("M", bound=nn.Module)


def bind(model: M, params: Params, adapters: Adapters) -> M:
    """The model with the rewritten weights, as a module of the same class.

    The bound module shares the given tensors and copies only buffers, which the model may update. All its methods work
    with the rewritten weights: `bound(x)`, `bound.generate(ids)`, `bound.encoder(x)`. The model
    itself is never changed, and later changes to it do not affect the bound module.

    Args:
        model: the module that defines the computation. Only its structure is used, and its non-persistent
            buffers where `params` does not hold them.
        params: full name -> tensor for every parameter and persistent buffer, as from `base_params`.
        adapters: full name of a parameter -> rule. Names that are absent keep their base weight.

    Returns:
        A module whose parameters are the rewritten ones. They are computed lazily.

    Raises:
        ParamsError: names of `params` or `adapters` do not fit the model, or a rule does not fit its weight.
        UnsupportedError: the model cannot be copied (a ScriptModule, a DataParallel or DistributedDataParallel), or is
            divided over a mesh in a way that an adapter cannot follow.

    Examples:
        >>> from funclora import LoRA
        >>> model = nn.Linear(2, 1, bias=False)
        >>> params = {"weight": torch.zeros(1, 2)}
        >>> adapters = {"weight": LoRA(torch.ones(1, 2), torch.ones(1, 1))}
        >>> bind(model, params, adapters)(torch.ones(3, 2)).flatten().tolist()
        [2.0, 2.0, 2.0]
    """
    return _bind(model, params, adapters, None)


def _bind(model: M, params: Params, adapters: Adapters, uses: dict[str, str] | None) -> M:
    check_model(model)
    refuse_unbindable(model)
    check_adapters(params, adapters, values=True)
    adapters = untied(adapters)
    if torch.compiler.is_compiling():
        return cast(M, TracedModule(model, params, adapters))
    unused = set(params)

    def tensor(name: str, original: Tensor, owner: nn.Module, is_buffer: bool) -> Tensor:
        unused.discard(name)
        value = params.get(name)
        if value is None:
            if not (is_buffer and name.rpartition(".")[2] in owner._non_persistent_buffers_set):
                raise ParamsError(
                    f"params lack {name!r}, which {type(model).__name__} needs. Pass every parameter and persistent "
                    f"buffer, as base_params(model) gives them.{near(name, params)}"
                )
            value = original
        if reads_packed_weights(owner) and not is_buffer:
            read_any_weight(owner, name)
            original = of_bitsandbytes(name, original, owner, model)
        if value.shape != original.shape:
            raise ParamsError(
                f"params[{name!r}] has shape {list(value.shape)}, expected {list(original.shape)} as in the model."
            )
        if is_buffer:
            if name in adapters:
                raise ParamsError(f"adapters rewrite {name!r}, which is a buffer. Only parameters can be rewritten.")
            return value.clone()
        if on_mesh and name in adapters:
            if is_sharded(value):
                refuse_division(name, adapters[name], value)
            elif "forward" in owner.__dict__:
                raise UnsupportedError(
                    f"{name!r} is in a part of the model that is divided over a mesh, but is whole itself: each "
                    "process would get its own share of the gradient. Leave it out of the targets."
                )
        return rewritten(name, value, adapters.get(name), owner, uses, placeholders)

    placeholders: Placeholders = {}
    if on_mesh := _on_mesh(params):
        params = gathering(model, params)
        on_mesh = _on_mesh(params)
    if on_mesh and in_transform():
        raise UnsupportedError(
            "params are divided over a mesh, which torch.func does not follow. value_and_grad, train_step and "
            "population_step outside of torch.func do."
        )
    bound = clone_module(model, tensor)
    batch = batch_of(adapters)
    if batch is not None:
        entrance = Entrance(batch)
        for module in bound.modules():
            entrance.guard(module)
            let_cross(module)
    if unused:
        name = min(unused)
        raise ParamsError(
            f"params hold {name!r}, which {type(model).__name__} does not have."
            f"{near(name, (n for n, *_ in named_tensors(model)))}"
        )
    return bound


def _on_mesh(params: Params) -> bool:
    return any(type(weight) is not Tensor and is_sharded(weight) for weight in params.values())


def apply(model: nn.Module, params: Params, adapters: Adapters, *args: Any, **kwargs: Any) -> Any:
    """The output of the model with the rewritten weights: `bind(model, params, adapters)(*args, **kwargs)`.

    A pure function: it writes neither to its arguments nor to the model, and is safe to call from many threads on one
    model. It can be differentiated, mapped (`torch.func.vmap` over adapters) and compiled.

    Args:
        model: the module that defines the computation.
        params: full name -> tensor for every parameter and persistent buffer, as from `base_params`.
        adapters: full name of a parameter -> rule.
        *args: arguments of the model's `forward`.
        **kwargs: keyword arguments of the model's `forward`.

    Returns:
        Whatever the model returns.

    Raises:
        ParamsError: names of `params` or `adapters` do not fit the model, or a rule does not fit its weight.
        PurityError: the model wrote to one of its weights in place.

    Examples:
        >>> from funclora import LoRA
        >>> model = nn.Linear(2, 1, bias=False)
        >>> params = {"weight": torch.zeros(1, 2)}
        >>> adapters = {"weight": LoRA(torch.ones(1, 2), torch.ones(1, 1), scaling=3.0)}
        >>> apply(model, params, adapters, torch.ones(2)).tolist()
        [6.0]
    """
    bound = bind(model, params, adapters)
    if torch.compiler.is_compiling():  # tensors in a graph have no versions to compare
        return bound(*args, **kwargs)
    with unwritten(params, adapters):
        return bound(*args, **kwargs)


def called(bound: Any, path: str, args: tuple[Any, ...], kwargs: dict[str, Any], batch: Batch | None) -> Any:
    """A call of a bound model with routed adapters, or of its method at a path, on a batch other than that of `route`.

    Args:
        bound: the result of `bind`.
        path: the names of the method, with dots; "" for the model itself.
        args: its arguments.
        kwargs: its keyword arguments.
        batch: how they hold the rows; None for the batch of `route`.

    Returns:
        As `with_rows`. Adapters of one row are not tracked: then the outputs are plain tensors.
    """
    if isinstance(bound, TracedModule):
        return bound.called(path, args, kwargs, batch)
    function = bound
    for name in path.split(".") if path else ():
        function = getattr(function, name)
    entrance = getattr(bound.__dict__.get("forward"), "entrance", None)
    if entrance is None:
        return function(*args, **kwargs)
    return entrance.call(function, args, kwargs, names=argument_names(function), batch=batch)


def trace_targets(
    model: nn.Module, params: Params, adapters: Adapters, *args: Any, **kwargs: Any
) -> dict[str, Literal["fast", "dense", "untouched"]]:
    """Run the model once and report for each target how its rewritten weight was used.

    Args:
        model: the module that defines the computation.
        params: full name -> tensor, as for `apply`.
        adapters: full name of a parameter -> rule.
        *args: arguments of the model's `forward`.
        **kwargs: keyword arguments of the model's `forward`.

    Returns:
        Full name -> "fast" (never built), "dense" (some operation needed the dense weight, see
        `DenseFallbackWarning`) or "untouched" (never read: this adapter has no effect on this call).

    Raises:
        ParamsError: names of `params` or `adapters` do not fit the model, or a rule does not fit its weight.

    Examples:
        >>> from funclora import LoRA, base_params
        >>> model = nn.Linear(2, 1, bias=False)
        >>> adapters = {"weight": LoRA(torch.ones(1, 2), torch.ones(1, 1))}
        >>> trace_targets(model, {"weight": torch.zeros(1, 2)}, adapters, torch.ones(3, 2))
        {'weight': 'fast'}
    """
    check_rules(adapters)
    uses = dict.fromkeys(adapters, "untouched")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DenseFallbackWarning)
        bound = _bind(model, params, adapters, uses)
        with unwritten(params, adapters):
            bound(*args, **kwargs)
    return cast(dict[str, Literal["fast", "dense", "untouched"]], uses)
