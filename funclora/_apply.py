"""Running a model under rewritten weights: `base_params`, `bind` and `apply`."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from funclora._clone import clone_module, refuse_unbindable
from funclora._entrance import Entrance, with_rows
from funclora._layout import Embedding, Layout
from funclora._lazy import Carriers, LazyWeight, requires_grad
from funclora._quantize import of_bitsandbytes, read_any_weight, reads_packed_weights, refuse_repacked
from funclora._quantized import plain_weight
from funclora._routed import Routed
from funclora._rules import LinearMap, Rule
from funclora._tokens import untied
from funclora._tree import pytree_node
from funclora.errors import DenseFallbackWarning, ParamsError, PurityError, UnsupportedError, near

M = TypeVar("M", bound=nn.Module)
Adapters = Mapping[str, Rule]
Params = Mapping[str, Tensor]


def base_params(model: nn.Module) -> dict[str, Tensor]:
    """The model's parameters and persistent buffers as a value: detached, not copied.

    Tied parameters appear under each of their names, as in `state_dict`. What bitsandbytes packed (a transformers model
    that was loaded with `load_in_4bit` or `load_in_8bit`) appears as quantised weights, as `quantize` makes them.

    Args:
        model: any module.

    Returns:
        Full name -> tensor, sharing storage with the model.

    Raises:
        ParamsError: a parameter of a lazy module has not been initialised yet.
        UnsupportedError: bitsandbytes has repacked a weight, with a loss of precision, when the model itself was run.

    Examples:
        >>> sorted(base_params(nn.Linear(2, 3)))
        ['bias', 'weight']
    """
    params = {}
    for name, tensor, _, transient in named_tensors(model):
        if is_lazy(tensor):
            raise ParamsError(f"{name!r} is not initialised yet. Run the model once before asking for its params.")
        refuse_repacked(tensor)
        if not transient:
            params[name] = tensor.detach()
    return params


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor, nn.Module, bool]]:
    """`(name, tensor, owner, is a buffer that is not saved)` for each registered name, tied ones included."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield dot + name, of_bitsandbytes(dot + name, parameter, module, model), module, False
        for name, buffer in module._buffers.items():
            if buffer is not None:
                yield dot + name, buffer, module, name in module._non_persistent_buffers_set


def bind(model: M, params: Params, adapters: Adapters) -> M:
    """The model under the rewritten weights, as a module of the same class.

    The bound module shares the given tensors and copies nothing but buffers, which the model may update. Any of
    its methods works under the rewritten weights: `bound(x)`, `bound.generate(ids)`, `bound.encoder(x)`. The
    model itself is never touched, and later changes of it do not reach the bound module.

    Args:
        model: the module that defines the computation. Only its structure is used, and its non-persistent
            buffers where `params` does not hold them.
        params: full name -> tensor for every parameter and persistent buffer, as from `base_params`.
        adapters: full name of a parameter -> rule. Names that are absent keep their base weight.

    Returns:
        A module whose parameters are the rewritten ones. They are computed lazily.

    Raises:
        ParamsError: names of `params` or `adapters` do not fit the model, or a rule does not fit its weight.
        UnsupportedError: the model cannot be copied (a ScriptModule, a DataParallel or DistributedDataParallel).

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
    refuse_unbindable(model)
    check_adapters(params, adapters)
    adapters = untied(adapters)
    if torch.compiler.is_compiling():
        return cast(M, _TracedModule(model, params, adapters))
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
        return _rewritten(name, value, adapters.get(name), owner, uses, carriers)

    carriers: Carriers = {}
    bound = clone_module(model, tensor)
    n, repeats = rows_of_batch(adapters)
    if n > 1:
        entrance = Entrance(n, repeats)
        for module in bound.modules():
            entrance.guard(module)
    if unused:
        name = min(unused)
        raise ParamsError(
            f"params hold {name!r}, which {type(model).__name__} does not have."
            f"{near(name, (n for n, *_ in named_tensors(model)))}"
        )
    return bound


def apply(model: nn.Module, params: Params, adapters: Adapters, *args: Any, **kwargs: Any) -> Any:
    """The output of the model under the rewritten weights: `bind(model, params, adapters)(*args, **kwargs)`.

    A pure function: it writes to none of its arguments, nor to the model, and is safe to call from many threads
    on one model. It can be differentiated, mapped (`torch.func.vmap` over adapters) and compiled.

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
    if torch.compiler.is_compiling():  # a graph has no versions to compare
        return bound(*args, **kwargs)
    with unwritten(params, adapters):
        return bound(*args, **kwargs)


@contextlib.contextmanager
def unwritten(params: Params, adapters: Adapters) -> Iterator[None]:
    """Raise `PurityError` if the block writes to a tensor that a bound module shares with its maker.

    Those are the weights without an adapter, and the values of `Full`: a lazy weight itself refuses to be written to.
    """
    leaves = [(name, leaf) for name, rule in adapters.items() if rule.dense_is_free for leaf in rule.leaves]
    tensors = [*params.values(), *(getattr(adapters[name], leaf) for name, leaf in leaves)]
    before = versions(tensors)
    yield
    after = versions(tensors)
    if after != before:
        names = [*(f"params[{name!r}]" for name in params), *(f"adapters[{name!r}].{leaf}" for name, leaf in leaves)]
        name = next(name for name, old, new in zip(names, before, after, strict=True) if old != new)
        raise PurityError(
            f"{name} was written to in place while the model ran, and has lost the values that were passed in. Let the "
            "model compute the new value out of place, or keep it in a buffer: a bound model has buffers of its own."
        )


def versions(tensors: list[Tensor]) -> list[int | None]:
    """How often each tensor was written to, as autograd counts; for inference tensors it does not."""
    with torch._C.DisableTorchFunctionSubclass():
        return [None if tensor.is_inference() else tensor._version for tensor in tensors]


def trace_targets(
    model: nn.Module, params: Params, adapters: Adapters, *args: Any, **kwargs: Any
) -> dict[str, Literal["fast", "dense", "untouched"]]:
    """Run the model once and say for each target how its rewritten weight was used.

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
        >>> from funclora import LoRA
        >>> model = nn.Linear(2, 1, bias=False)
        >>> adapters = {"weight": LoRA(torch.ones(1, 2), torch.ones(1, 1))}
        >>> trace_targets(model, base_params(model), adapters, torch.ones(3, 2))
        {'weight': 'fast'}
    """
    uses = dict.fromkeys(adapters, "untouched")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DenseFallbackWarning)
        bound = _bind(model, params, adapters, uses)
        with unwritten(params, adapters):
            bound(*args, **kwargs)
    return cast(dict[str, Literal["fast", "dense", "untouched"]], uses)


def rows_of_batch(adapters: Adapters) -> tuple[int, int]:
    """How many rows a batch has for adapters that differ by row, and their repetitions; 1 if they do not differ."""
    sizes = {(rule.n, rule.repeats): name for name, rule in adapters.items() if isinstance(rule, Routed)}
    if len(sizes) > 1:
        raise ParamsError(
            "adapters are routed for batches of different sizes: "
            + ", ".join(f"{name!r} for {n} rows" for (n, _), name in sizes.items())
            + ". Take the rules of one call of route."
        )
    return next(iter(sizes), (1, 1))


def check_adapters(params: Params, adapters: Adapters) -> None:
    """Raise `ParamsError` unless every adapter is a rule that fits the parameter of its name."""
    for name, rule in untied(adapters).items():
        weight = params.get(name)
        if weight is None:
            raise ParamsError(f"adapters rewrite {name!r}, which params do not hold.{near(name, params)}")
        if not isinstance(rule, Rule):
            raise ParamsError(f"adapters[{name!r}]: expected a rule (LoRA, DoRA, Full), got {type(rule).__name__}.")
        rule.check(name, weight)


class _TracedModule:
    """What `bind` returns while torch.compile traces, where module objects cannot be made.

    A graph is captured once, by one thread, and holds the weights as its inputs: `functional_call` is safe there.
    """

    def __init__(self, model: nn.Module, params: Params, adapters: Adapters) -> None:
        self._model = model
        self._rows = rows_of_batch(adapters)
        self._tensors = {}
        places: dict[tuple[int, str], str] = {}
        for name, given in params.items():
            # The tracer loses track of a quantised weight inside of a lazy one.
            value = plain_weight(given) if name in adapters else given
            path, _, leaf = name.rpartition(".")
            owner = model.get_submodule(path)
            twin = places.setdefault((id(owner), leaf), name)
            if twin != name and (name in adapters or twin in adapters):
                raise UnsupportedError(
                    f"{twin!r} and {name!r} are one parameter of one module under two names. torch.compile cannot give "
                    "it two weights: call apply outside of the compiled function, or adapt a model without the sharing."
                )
            is_buffer = leaf in owner._buffers
            if reads_packed_weights(owner):
                raise UnsupportedError(
                    f"{name!r} belongs to a {type(owner).__name__} of bitsandbytes, which torch.compile cannot give "
                    "another weight. Call apply outside of the compiled function, or on the model with plain layers."
                )
            self._tensors[name] = (
                value.clone() if is_buffer else _rewritten(name, value, adapters.get(name), owner, None, {})
            )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            return torch.func.functional_call(self._model, self._tensors, args, kwargs, tie_weights=False)

        return call(*args, **kwargs) if self._rows[0] == 1 else with_rows(call, args, kwargs, *self._rows, {})

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._model, name)
        if callable(value):
            raise UnsupportedError(
                f"bound.{name} is called under torch.compile, where only bound(...) itself is supported. Call it "
                "outside of the compiled function."
            )
        return value


def _rewritten(
    name: str, weight: Tensor, rule: Rule | None, owner: nn.Module, uses: dict[str, str] | None, carriers: Carriers
) -> Tensor:
    """What takes the place of a parameter of `owner`; `uses` records what becomes of it."""
    if rule is None or (uses is None and rule.dense_is_free):
        plain = weight if rule is None else rule.dense(weight).to(weight.dtype)
        if plain.dim() != 2 or getattr(owner, "max_norm", None) is None:
            return plain
        # torch would renormalise the table in place.
        weight, rule, uses = plain, Unchanged(), None
    elif not (requires_grad(weight) or requires_grad(rule)):
        rule = rule.prepared(weight)  # nothing of it will be differentiated: once is enough for every call
    # The owner holds the weight: a weak reference back lets both die at once. The compiler follows none, needs none.
    held: Any = owner if torch.compiler.is_compiling() else weakref.proxy(owner)
    return LazyWeight.of(name, weight, rule, held, uses, carriers)


@pytree_node
@dataclass(frozen=True, eq=False)
class Unchanged(Rule):
    """The base weight itself, read without the writes of `F.embedding(..., max_norm=...)` to its table."""

    layout: Layout = field(default=Embedding())

    leaves: ClassVar[tuple[str, ...]] = ()
    dense_is_free: ClassVar[bool] = True

    def dense(self, weight: Tensor) -> Tensor:
        return weight

    def read(self, op: LinearMap, weight: Tensor, dropout: float) -> Tensor:
        return op.dense(weight, bias=True)

    def check(self, name: str, weight: Tensor) -> None:
        pass
