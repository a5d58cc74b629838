"""Initialisations that move a part of the base weights into the adapter: PiSSA, OLoRA and LoftQ."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import cast

import torch
from torch import Generator, Tensor, nn

from funclora._api.arguments import check_function
from funclora._bind.merge import merge
from funclora._bind.params import base_params
from funclora._config.config import LoraConfig
from funclora._config.peft_fields import DECOMPOSITIONS
from funclora._init.fresh import check_setup, draw_root, generator_of, init
from funclora._quant.quantize import quantize as quantize_params
from funclora._quant.tensor import Quantized, plain_weight
from funclora._torch.functions import is_sharded, no_autocast
from funclora._torch.linalg import randomized_svd, svd
from funclora.algebra._terms import positive
from funclora.errors import ConfigError, NonFiniteError, ParamsError, UnsupportedError
from funclora.rules.base import Params, Rule
from funclora.rules.low_rank import LoRA, LowRank
from funclora.rules.tokens import Tied

Quantize = Callable[[Tensor], Tensor]
# U, S and Vᵀ of a matrix, with at least the requested rank.
Svd = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


@torch.no_grad()
def decompose(
    model: nn.Module,
    config: LoraConfig,
    *,
    generator: Generator | None = None,
    params: Params | None = None,
    dtype: torch.dtype | None = None,
    quantize: Callable[[Tensor], Tensor] | None = None,
    iterations: int = 1,
) -> tuple[dict[str, Tensor], dict[str, Rule]]:
    """Split the weights of the targets into an adapter and the rest, by `init_lora_weights` of the configuration.

    | value | A and B | the new base weight |
    |---|---|---|
    | "pissa" | s·B·A: the leading r singular values and vectors (arXiv 2404.02948, equations 2 to 4) | W − s·B·A |
    | "pissa_niter_[k]" | an approximation that is faster: randomized, with k iterations | W − s·B·A |
    | "olora" | B = Q, A = R: the first r of the QR decomposition (arXiv 2406.01775, algorithm 1) | W − s·B·A |
    | "loftq" | s·B·A: the leading singular part of W − q(W) (arXiv 2310.08659, algorithm 1) | q(W), quantised |

    `apply(model, params, adapters)` with the two results equals the base model up to rounding; with "loftq" it is
    closer to the base model than the quantised weights alone. Every supported layer is split along the matrix that its
    adapter updates, including convolutions, embeddings and experts. DoRA's magnitudes are the norms of the original
    weights.

    `relative_to_original` converts the trained adapter to one for the original weights.

    Args:
        model: the module in which the targets are found. It is only read.
        config: what to adapt and how.
        generator: source of randomness; torch's default generator if None. As in `init`, each target has its own.
        params: the base weights, if they are not the model's own.
        dtype: dtype of the adapters' factors and magnitudes, as in `init`. The base weights compensate its rounding.
        quantize: for "loftq": a function from a weight to the quantised weight, as `funclora.quantize` makes it, or to
            a dense tensor of the quantised values. By default 4 bits ("nf4", in blocks of 64).
        iterations: for "loftq": how often to alternate between quantising and decomposing. With 1 the new base is
            the quantised original.

    Returns:
        The new params and the adapters. In the params the targets are new tensors of the same dtypes; all others are
        shared.

    Raises:
        ConfigError: the initialisation is not one of these, an option does not apply to it, or a rank exceeds the rank
            of a weight.
        TargetError: an entry of the configuration matches nothing, or names something that cannot carry a rule.
        ParamsError: `params` do not contain a target, or its weight is quantised, on the meta device, or of a lower
            rank.
        NonFiniteError: a weight holds NaN or infinity.
        UnsupportedError: "loftq" needs bitsandbytes, which is not installed.

    Examples:
        >>> model, x = nn.Sequential(nn.Linear(8, 6), nn.ReLU()), torch.ones(8)
        >>> config = LoraConfig(r=2, target_modules=["0"], init_lora_weights="pissa")
        >>> params, adapters = decompose(model, config)
        >>> from funclora import apply
        >>> torch.allclose(apply(model, params, adapters, x), model(x), atol=1e-5)
        True
    """
    check_setup(model, config, generator, params, dtype)
    if quantize is not None:
        check_function(quantize, "quantize", "quantize(weight)")
    kind = config.decomposition
    if kind is None:
        raise ConfigError(
            f"init_lora_weights={config.init_lora_weights!r} does not change the base weights. decompose supports "
            f"{', '.join(map(repr, DECOMPOSITIONS))} and 'pissa_niter_[k]'; for the others, use init or init_eva."
        )
    if kind != "loftq" and (quantize is not None or iterations != 1):
        raise ConfigError(f"quantize and iterations are for 'loftq' only; {config.init_lora_weights!r} has no options.")
    positive("iterations", iterations)
    params = base_params(model) if params is None else params
    # Only the factors differ from `init`: static values, fully fine-tuned parameters and DoRA's magnitudes do not.
    adapters = init(model, config.replace(init_lora_weights=True), generator=generator, params=params, dtype=dtype)
    root = draw_root(generator) if config.niter is not None else 0
    quantised: dict[str, Tensor] = {}
    for name, rule in adapters.items():
        if not isinstance(rule, LowRank):
            continue
        weight = params[name].detach()
        if is_sharded(weight):
            raise UnsupportedError(
                f"{name!r} is divided over a mesh: decompose it in one process, and divide the new params after that."
            )
        _check(name, rule, weight)
        if kind == "loftq":
            quantised[name], adapters[name] = _loftq(name, rule, weight, quantize or nf4, iterations)
        elif kind == "olora":
            adapters[name] = _olora(rule, weight)
        else:
            adapters[name] = _principal(name, rule, _matrix(rule, weight), _pissa_svd(name, rule, config.niter, root))
    low_rank = {name: rule for name, rule in adapters.items() if isinstance(rule, LowRank)}
    ties = {name: tie for name, tie in adapters.items() if isinstance(tie, Tied) and tie.to in low_rank}
    if kind == "loftq":
        return dict(params) | quantised | {name: quantised[tie.to] for name, tie in ties.items()}, adapters
    subtracted: dict[str, Rule] = {name: _negated(rule) for name, rule in low_rank.items()}
    return merge(params, subtracted | ties), adapters


def _pissa_svd(name: str, rule: LowRank, niter: int | None, root: int) -> Svd:
    if niter is None:
        return lambda matrix: svd(name, matrix)
    return lambda matrix: randomized_svd(name, matrix, rule.r, niter, generator_of(root, name))


def _loftq(name: str, rule: LowRank, weight: Tensor, quantize: Quantize, iterations: int) -> tuple[Tensor, LowRank]:
    """The quantised weight, and the rule that approximates the quantisation error."""
    packed = _quantised(name, weight, quantize)
    for i in range(iterations):
        if i:
            packed = _quantised(name, _negated(rule).dense(weight).to(weight.dtype), quantize)
        lost = _matrix(rule, weight) - _matrix(rule, plain_weight(packed))
        rule = _principal(name, rule, lost, lambda matrix: svd(name, matrix))
    return packed, rule


def _quantised(name: str, weight: Tensor, quantize: Quantize) -> Tensor:
    packed = quantize(weight)
    if packed.shape != weight.shape or packed.dtype != weight.dtype:
        raise ParamsError(
            f"quantize: turned {name!r} ({list(weight.shape)}, {weight.dtype}) into a weight of shape "
            f"{list(packed.shape)} and dtype {packed.dtype}. It must keep the shape and the dtype."
        )
    return packed


def nf4(weight: Tensor) -> Quantized:
    """The weight in 4 bits (NormalFloat in blocks of 64)."""
    return cast(Quantized, quantize_params({"weight": weight}, ["weight"], "nf4")["weight"])


def _olora(rule: LowRank, weight: Tensor) -> LowRank:
    q, r = torch.linalg.qr(_matrix(rule, weight))
    return _with_factors(rule, r[..., : rule.r, :], q[..., : rule.r])


def _principal(name: str, rule: LowRank, matrix: Tensor, decomposed: Svd) -> LowRank:
    """The rule whose s·B·A is the leading singular part of a matrix; each factor contains the square root of S/s."""
    with no_autocast(matrix.device):
        u, s, vh = decomposed(matrix)
    smallest, largest = s[..., rule.r - 1], s[..., 0]
    if (smallest <= largest * torch.finfo(s.dtype).eps * max(matrix.shape[-2:])).any():
        raise ParamsError(
            f"{name!r}: the matrix to split into A and B has a rank below r={rule.r}. Some directions would be zero "
            "in both and never train. Give a lower rank (rank_pattern), or exclude it."
        )
    scaling = float(rule.scaling)
    root = (s[..., : rule.r] / abs(scaling)).sqrt()
    sign = 1.0 if scaling > 0 else -1.0
    return _with_factors(rule, root.unsqueeze(-1) * vh[..., : rule.r, :], sign * u[..., : rule.r] * root.unsqueeze(-2))


def _with_factors(rule: LowRank, a: Tensor, b: Tensor) -> LowRank:
    """The rule with new factors, given as matrices and converted to the shapes and dtypes of the old ones."""
    return replace(
        rule,
        a=a.reshape(rule.a.shape).to(rule.a.dtype, memory_format=torch.contiguous_format),
        b=b.reshape(rule.b.shape).to(rule.b.dtype, memory_format=torch.contiguous_format),
    )


def _negated(rule: LowRank) -> LoRA:
    """W − s·B·A, as a rule."""
    return LoRA(rule.a, rule.b, scaling=-rule.scaling, layout=rule.layout)


def _matrix(rule: LowRank, weight: Tensor) -> Tensor:
    """The matrix in a weight, `[*lead, out, in]`, in at least float32."""
    return rule.layout.to_matrix(weight).to(torch.promote_types(weight.dtype, torch.float32))


def _check(name: str, rule: LowRank, weight: Tensor) -> None:
    if isinstance(weight, Quantized) and not weight.is_exact:
        raise ParamsError(f"{name!r} is quantised. Decompose the original weights, and quantise the resulting params.")
    if weight.is_meta:
        raise ParamsError(f"{name!r} is on the meta device, but its values are needed. Pass params= with real tensors.")
    if not torch.isfinite(weight).all():
        raise NonFiniteError(f"{name!r} holds NaN or infinity and cannot be decomposed.")
    n_out, n_in = rule.layout.to_matrix(weight).shape[-2:]
    if rule.r > min(n_out, n_in):
        raise ConfigError(
            f"r: {name!r} is a matrix of {n_out} x {n_in}, which has fewer than {rule.r} directions to move into the "
            f"adapter. Give it a rank of at most {min(n_out, n_in)} (r or rank_pattern)."
        )
