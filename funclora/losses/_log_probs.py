"""Log-probabilities of tokens, without the logits of a whole batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from funclora._api.arguments import kind_of, refuse
from funclora._torch.functions import in_transform
from funclora.errors import ConfigError

IGNORED = -100

Tail = Callable[[Tensor], Tensor]
"""What a model does after its backbone: hidden states `[rows, seq, dim]` -> logits `[rows, seq, vocabulary]`."""


def token_log_probs(
    bound: Any, inputs: Mapping[str, Any] | Tensor, labels: Tensor, *, at_once: int = 1 << 24
) -> Tensor:
    """The log-probability of each labelled token, as a causal language model gives it after the tokens before.

    For transformers' models, logits are computed for the labelled tokens only, some tokens at a time, so that those of
    the whole batch never exist. If the output layer is frozen, the gradient needs one vector for each token, which is
    computed with its logits; otherwise they are computed again in backward. The model's own code runs after the
    backbone, with its scales and caps of the logits. In transforms of `torch.func`, under `torch.compile`, for models
    of other libraries and for the members of a population, the model computes its logits as a whole.

    The loss of SFT is minus their sum over the number of labels; an answer's log-probability is the sum of its row.

    Args:
        bound: the model with adapters, as from `bind`.
        inputs: its keyword arguments (`input_ids`, `attention_mask`, ...), or its only argument.
        labels: `[rows, seq]`, not shifted, as transformers has them: the token at each position of the input, or -100
            where no value is wanted.
        at_once: largest number of logits at a time, at least those of one token.

    Returns:
        `[rows, seq]`, float32 at least: at each label log p(label | tokens before it), and 0 elsewhere. The first
        position has nothing before it and is always 0.

    Raises:
        ConfigError: the labels do not have the shape of the logits, or `at_once` is not positive.

    Examples:
        >>> import funclora as fl
        >>> model = nn.Embedding(3, 3)  # the logits of the token that follows
        >>> params = {"weight": torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8], [1.0, 1.0, 1.0]]))}
        >>> bound = fl.bind(model, params, {})
        >>> token_log_probs(bound, torch.tensor([[0, 1, 2]]), torch.tensor([[-100, 1, 2]])).exp()
        tensor([[1.0000, 0.2500, 0.8000]])
    """
    if not isinstance(labels, Tensor):
        refuse("labels", "a tensor [rows, seq]", labels)
    if not isinstance(at_once, int) or isinstance(at_once, bool) or at_once < 1:
        raise ConfigError(f"at_once: expected a positive number of logits, got {kind_of(at_once)}.")
    shifted = F.pad(labels, (0, 1), value=IGNORED)[:, 1:]  # and not the hidden states, of which it would be a copy
    whole = torch.compiler.is_compiling() or in_transform() or not isinstance(bound, nn.Module)
    name = "" if whole else _backbone(bound)
    if not name:
        logits = _logits(bound(**inputs) if isinstance(inputs, Mapping) else bound(inputs))
        _check_shape(labels, logits)
        found = _of(logits, shifted)
    else:
        hidden, tail = _halves(bound, name, inputs)
        _check_shape(labels, hidden)
        found = _chunked(bound, tail, hidden, shifted, at_once)
    return F.pad(found, (1, 0))[:, :-1]


def _of(logits: Tensor, labels: Tensor) -> Tensor:
    """The log-probability of each label, 0 without; in float32 at least."""
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, -2)
    found = -F.cross_entropy(exact, labels.flatten(), ignore_index=IGNORED, reduction="none")
    return found.view(labels.shape)


def _chunked(bound: nn.Module, tail: Tail, hidden: Tensor, labels: Tensor, at_once: int) -> Tensor:
    """The log-probabilities of labels `[rows, seq]` that are not ignored, some positions at a time."""
    shape = labels.shape
    entrance = getattr(bound.__dict__.get("forward"), "entrance", None)
    if entrance is None:  # nobody asks for rows
        hidden, labels = hidden.flatten(0, 1)[None], labels.flatten()[None]
    has = labels != IGNORED
    # Once at least: other processes may wait for this one, which has a piece of the output layer.
    n = max(1, int(has.sum(1).max())) if has.numel() else 0
    result = torch.zeros(labels.shape, dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
    if not n:
        return result.view(shape)
    # The labelled positions of each row, in their order, and then others, as many as the row has fewer than another.
    places = has.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :n]
    some = hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[-1]))
    wanted = labels.gather(1, places)
    first = tail(some[:, :1].detach())
    size, adapted = max(1, at_once // (first.shape[-1] * len(labels))), first.requires_grad
    if not torch.is_grad_enabled() or not (adapted or some.requires_grad):
        parts = [_of(tail(x), y) for x, y in zip(some.split(size, 1), wanted.split(size, 1), strict=True)]
        values = torch.cat(parts, 1)
    elif adapted:

        def part(x: Tensor, y: Tensor) -> Tensor:
            return _of(tail(x), y)

        parts = [
            checkpoint(part, x, y, use_reentrant=False)
            for x, y in zip(some.split(size, 1), wanted.split(size, 1), strict=True)
        ]
        values = torch.cat(parts, 1)
    else:
        values = _Frozen.apply(some, wanted, tail, size)  # type: ignore[no-untyped-call]
    return result.to(values.dtype).scatter(1, places, values).view(shape)


class _Frozen(torch.autograd.Function):
    """Log-probabilities after an output layer without gradients of its own.

    Each depends on one hidden state alone, so its derivative is one vector, which is computed while its logits exist.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, labels: Tensor, tail: Tail, size: int) -> Tensor:
        values, slopes = [], []
        for x, y in zip(hidden.split(size, 1), labels.split(size, 1), strict=True):
            with torch.enable_grad():
                leaf = x.detach().requires_grad_()
                value = _of(tail(leaf), y)
                (slope,) = torch.autograd.grad(value.sum(), leaf)
            values.append(value.detach())
            slopes.append(slope)
        ctx.save_for_backward(torch.cat(slopes, 1))
        return torch.cat(values, 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (slopes,) = ctx.saved_tensors
        return (grad[..., None] * slopes).to(slopes.dtype), None, None, None


# The two halves of a model of transformers


class _Reached(Exception):  # noqa: N818 -- no error
    """The backbone is done; its output."""


class _Stop(nn.Module):
    """In the place of a backbone: runs it, and ends the call."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.__dict__["run"] = backbone

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise _Reached(self.__dict__["run"](*args, **kwargs))


class _Given(nn.Module):
    """In the place of a backbone: its output."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.output


def _backbone(bound: nn.Module) -> str:
    """The name of the module whose hidden states the output layer reads; "" if the model has no such parts."""
    name: Any = getattr(bound, "base_model_prefix", "")
    head: Any = getattr(bound, "get_output_embeddings", lambda: None)()
    config: Any = getattr(bound, "config", None)
    module = bound._modules.get(name) if isinstance(name, str) else None
    if module is None or head is None or getattr(config, "is_encoder_decoder", False):
        return ""
    while len(module._modules) == 1 and not module._parameters:  # OPT's and BART's model, which only has a decoder
        [(child, inner)] = module._modules.items()
        if inner is None:
            return ""
        name, module = f"{name}.{child}", inner
    return str(name)


def _with(bound: Any, name: str, module: nn.Module) -> Any:
    """The model with another module of that name; it shares all else."""
    child, _, rest = name.partition(".")
    shell = object.__new__(type(bound))
    own = {key: value for key, value in bound.__dict__.items() if key != "forward"}  # which is that of all of it
    inner = _with(bound._modules[child], rest, module) if rest else module
    shell.__dict__.update(own, _modules={**bound._modules, child: inner})
    return shell


def _halves(bound: nn.Module, name: str, inputs: Mapping[str, Any] | Tensor) -> tuple[Tensor, Tail]:
    """The hidden states that the output layer reads, `[rows, seq, dim]`, and what the model does with them."""
    given: dict[str, Any] = dict(inputs) if isinstance(inputs, Mapping) else {"input_ids": inputs}
    if "use_cache" in inspect.signature(type(bound).forward).parameters:
        given.setdefault("use_cache", False)
    output: Any = None
    try:
        _with(bound, name, _Stop(bound.get_submodule(name)))(**given)
    except _Reached as reached:
        output = reached.args[0]
    assert output is not None, f"{type(bound).__name__} does not call its {name}"
    kind = type(output)

    def tail(hidden: Tensor) -> Tensor:
        part = (hidden,) if kind is tuple else kind(last_hidden_state=hidden)
        return _logits(_with(bound, name, _Given(part))(input_ids=None))

    return output[0], tail


def _logits(output: Any) -> Tensor:
    found: Tensor = output if isinstance(output, Tensor) else output[0] if isinstance(output, tuple) else output.logits
    return found


def _check_shape(labels: Tensor, values: Tensor) -> None:
    if labels.shape != values.shape[:-1]:
        raise ConfigError(
            f"labels: expected a label or {IGNORED} for each position, {list(values.shape[:-1])}, got "
            f"{list(labels.shape)}."
        )
