"""Checks before a model is bound, and after it ran."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from funclora._api.arguments import ORDER, check_params, refuse
from funclora._many.stack import Stack
from funclora._torch.functions import is_mapped, plain_tensors
from funclora._tracking.batch import Batch
from funclora._tracking.routed import Routed
from funclora.errors import ParamsError, PurityError, UnsupportedError, near
from funclora.rules.base import Adapters, Params, Rule, kinds_of
from funclora.rules.tokens import untied
from funclora.rules.weights import refuse_elsewhere, refuse_weight


@contextlib.contextmanager
def unwritten(params: Params, adapters: Adapters) -> Iterator[None]:
    """Raise `PurityError` if the block writes to a tensor that a bound module shares with its caller.

    These are the weights without an adapter, and the values of `Full`: a write to a lazy weight raises its own error.
    """
    leaves = [(name, leaf) for name, rule in adapters.items() if rule.bind_dense for leaf in rule.leaf_names]
    tensors = [*params.values(), *(getattr(adapters[name], leaf) for name, leaf in leaves)]
    before = versions(tensors)
    yield
    after = versions(tensors)
    if after != before:
        names = [*(f"params[{name!r}]" for name in params), *(f"adapters[{name!r}].{leaf}" for name, leaf in leaves)]
        name = next(name for name, old, new in zip(names, before, after, strict=True) if old != new)
        raise PurityError(
            f"{name} was written to in place while the model ran, and has lost the values that were passed in. Let the "
            "model compute the new value out of place, or keep it in a buffer: a bound model has its own buffers."
        )


def versions(tensors: list[Tensor]) -> list[int | None]:
    """The number of writes to each tensor, as counted by autograd, which does not count for inference tensors."""
    with plain_tensors():
        try:
            return [tensor._version for tensor in tensors]
        except RuntimeError:  # there are inference tensors
            return [None if tensor.is_inference() else tensor._version for tensor in tensors]


def batch_of(adapters: Adapters) -> Batch | None:
    """How the inputs hold the rows; None if the adapters do not differ by row.

    Raises:
        ParamsError: the rules come from several calls of `route`.
    """
    if not any(issubclass(kind, Routed) for kind in kinds_of(adapters)):
        return None
    routed = {name: rule.batch for name, rule in adapters.items() if isinstance(rule, Routed)}
    first = next(iter(routed))
    for name, batch in routed.items():
        if batch is not routed[first]:
            raise ParamsError(
                f"adapters are routed for different batches: {first!r} for {routed[first].n} rows, {name!r} for "
                f"{batch.n} rows. Use the rules of one call of route."
            )
    return routed[first] if routed[first].n > 1 else None


def check_rules(adapters: object, where: str = "adapters") -> None:
    """Raise `ArgumentError` unless the argument is one adapter: a mapping from names to rules.

    Args:
        adapters: the argument.
        where: its name.
    """
    expected = "one adapter, a dict from full parameter names to rules"
    if isinstance(adapters, Stack):
        refuse(where, expected, adapters, "Take one member, stack[i]; for all of them use route, vmap or unstack.")
    if adapters is None:
        refuse(where, expected, adapters, "For the base model, pass {}.")
    if isinstance(adapters, (list, tuple)):
        remedy = "For several use stack and route, or algebra.add; load_peft returns a pair, (adapters, config)."
        refuse(where, expected, adapters, remedy)
    if not isinstance(adapters, Mapping):
        refuse(where, expected, adapters, f"init and load_peft make one. {ORDER}")
    if all(issubclass(kind, Rule) for kind in kinds_of(adapters)):
        return
    for name, rule in adapters.items():
        if not isinstance(rule, Rule):
            swapped = f"Are params and adapters swapped? {ORDER}" if isinstance(rule, Tensor) else ""
            refuse(f"{where}[{name!r}]", "a rule (LoRA, DoRA, Full, ...)", rule, swapped)


def check_adapters(params: Params, adapters: Adapters, *, values: bool = False) -> None:
    """Raise an error unless these are weights and one adapter whose rules all fit their parameters.

    Args:
        params: full name -> tensor.
        adapters: full name of a parameter -> rule.
        values: the weights' values will be read, not only their shapes.
    """
    eager = not torch.compiler.is_compiling()  # the compiler cannot trace queries about the kind of a packed weight
    check_params(params)
    check_rules(adapters)
    for name, rule in untied(adapters).items():
        weight = params.get(name)
        if weight is None:
            raise ParamsError(f"adapters rewrite {name!r}, which params do not hold.{near(name, params)}")
        if eager:
            refuse_weight(name, weight)
        rule.check(name, weight)
        for frozen in rule.frozen_names:
            tensor = getattr(rule, frozen)
            if not isinstance(tensor, Tensor) or (tensor.requires_grad and not is_mapped(tensor)):
                got = "one that requires gradients" if isinstance(tensor, Tensor) else type(tensor).__name__
                raise ParamsError(
                    f"adapters[{name!r}].{frozen}: expected a frozen tensor, got {got}. Pass tensor.detach(), or make "
                    f"it a leaf of {type(rule).__name__}."
                )
        if values and eager:
            refuse_elsewhere(name, rule, weight)


def refuse_unbindable(module: nn.Module, prefix: str | None = "") -> None:
    """Raise `UnsupportedError` if a module does not run the weights that are registered in it.

    Args:
        module: the module, without its children.
        prefix: its full name with a dot at the end, "" for the model itself, None outside the tree.
    """
    name = repr((prefix or "").rstrip(".") or "the model")
    if isinstance(module, torch.jit.ScriptModule):
        raise UnsupportedError(
            f"{name} is a ScriptModule, whose weights cannot be bound without changing it. "
            "Pass the Python module that it was scripted from."
        )
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        kind = type(module).__name__
        raise UnsupportedError(
            f"{name} is a {kind}, which copies its weights to other devices or averages gradients of its own "
            f"parameters, not of adapters. Pass the module that it wraps ({kind}.module), without the prefix "
            "'module.' in the names of params and adapters."
        )
    if getattr(module, "_is_replica", False):
        raise UnsupportedError(
            f"{name} is a replica that nn.DataParallel made, and has no parameters of its own. Pass the module that "
            "was replicated, with params and adapters moved to the device."
        )
