"""New adapters: `init` and the initialisers."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from funclora._api.arguments import check_dtype, check_generator, check_model, check_params
from funclora._bind.params import base_params
from funclora._config.checks import check_config
from funclora._config.config import LoraConfig
from funclora._config.experts import as_in_peft
from funclora._config.target import Target
from funclora._config.targets import select
from funclora._quant.quantize import dequantize
from funclora._torch.mesh import same_in_mesh, whole
from funclora.errors import ConfigError, ParamsError, PeftFormatWarning, near
from funclora.rules.base import Params, Rule
from funclora.rules.dense import Delta, Full, refuse_full
from funclora.rules.dora import DoRA, weight_norms
from funclora.rules.layouts import Attention, Embedding
from funclora.rules.low_rank import LoRA
from funclora.rules.tokens import Tied, TrainableTokens
from funclora.rules.weights import refuse_weight


def init(
    model: nn.Module,
    config: LoraConfig,
    *,
    generator: torch.Generator | None = None,
    params: Params | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Rule]:
    """New adapters for the targets of a configuration. The model is only read.

    Each target uses its own generator, derived from one number of `generator` and the target's name, so its values do
    not depend on the order of layers or on other targets. Numbers are drawn on the CPU, so they are the same on every
    device.

    Args:
        model: the module in which the targets are found.
        config: what to adapt and how.
        generator: source of randomness; torch's default generator if None. One number is drawn from it.
        params: the base weights (for shapes, dtypes, DoRA's magnitudes and fully fine-tuned parameters), if they are
            not the model's own.
        dtype: dtype of the adapters' factors and magnitudes. By default the weight's dtype, but at least float32.

    Returns:
        Full parameter name -> rule. With zero B (the default) the adapters do not change the model's output.

    Raises:
        ConfigError: `init_lora_weights` is for `decompose` or `init_eva`.
        TargetError: an entry of the configuration matches nothing, or names something that cannot carry a rule.
        ParamsError: `params` do not contain a target, or its weight is on the meta device and its values are needed.

    Warns:
        PeftFormatWarning: a target is a projection of `nn.MultiheadAttention`; `save_peft` refuses such adapters.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> adapters = init(model, LoraConfig(r=2, target_modules=["0"]), generator=torch.Generator().manual_seed(0))
        >>> {name: (rule.a.shape, rule.b.shape) for name, rule in adapters.items()}
        {'0.weight': (torch.Size([2, 4]), torch.Size([3, 2]))}
    """
    check_setup(model, config, generator, params, dtype)
    _refuse_elsewhere(config)
    if params is None:
        params = base_params(model)
    root = same_in_mesh(draw_root(generator), params.values())
    targets = select(model, as_in_peft(model, config))
    _warn_of_attention(targets)
    adapters = {}
    for name, target in targets.items():
        if name not in params:
            raise ParamsError(f"params lack {name!r}, which the configuration targets.{near(name, params)}")
        adapters[name] = _fresh(name, target, params[name].detach(), config, generator_of(root, name), dtype)
    return adapters


def check_setup(model: object, config: object, generator: object, params: object, dtype: object) -> None:
    """Raise an error unless fresh adapters can be made from these arguments."""
    check_model(model)
    check_config(config)
    check_generator(generator)
    check_dtype(dtype)
    check_params(params, optional=True)


def _refuse_elsewhere(config: LoraConfig) -> None:
    """Raise `ConfigError` for initialisations that need more than a generator."""
    if config.decomposition:
        raise ConfigError(
            f"init_lora_weights={config.init_lora_weights!r} moves a part of the base weights into the adapter, but "
            "init does not change them. Use params, adapters = decompose(model, config)."
        )
    if config.init_lora_weights == "eva":
        raise ConfigError(
            "init_lora_weights='eva' needs data. Use adapters, config = init_eva(model, config, batches)."
        )


def _warn_of_attention(targets: Mapping[str, Target]) -> None:
    """Say before training which adapters no PEFT folder can hold, although PEFT adapts their modules."""
    names = [name for name, target in targets.items() if isinstance(target.layout, Attention)]
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        warnings.warn(
            f"save_peft refuses the adapters of {', '.join(map(repr, names[:3]))}{more}: PEFT counts the update of the "
            "output projection of nn.MultiheadAttention twice. Leave them out (exclude_modules), or keep the trained "
            "adapter as merged weights (funclora.merge).",
            PeftFormatWarning,
            stacklevel=3,
        )


def draw_root(generator: torch.Generator | None) -> int:
    """One number from a generator, from which the generators of all targets are derived."""
    return int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device if generator else None))


def generator_of(root: int, name: str) -> torch.Generator:
    """A target's own generator."""
    digest = hashlib.blake2b(f"{root}:{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def _fresh(
    name: str,
    target: Target,
    weight: Tensor,
    config: LoraConfig,
    generator: torch.Generator,
    dtype: torch.dtype | None,
) -> Rule:
    if target.rule is Tied:
        return Tied(target.tied_to)
    refuse_weight(name, weight)
    if weight.is_meta and (config.use_dora or target.layout is None):
        raise ParamsError(f"{name!r} is on the meta device, but its values are needed. Pass params= with real tensors.")
    if target.rule is Full:
        refuse_full(name, weight)
        # Of one that is divided among processes, the whole.
        return Full(whole(dequantize({name: weight})[name]).clone())
    dtype = dtype or torch.promote_types(weight.dtype, torch.float32)
    if target.rule is TrainableTokens:
        return TrainableTokens(whole(weight)[list(target.tokens)].to(dtype), token_indices=target.tokens)
    if target.rule is Delta:
        bound = 0.0 if config.init_lora_weights else 1 / math.sqrt(target.r)  # as in torch, for r inputs
        drawn = torch.rand(weight.shape, generator=generator, dtype=torch.float64) * 2 - 1
        return Delta((drawn * bound).to(device=weight.device, dtype=dtype), scaling=target.scaling)
    assert target.layout is not None
    a, b = (
        factor.to(device="cpu" if weight.is_meta else weight.device, dtype=dtype)
        for factor in _factors(target, weight, config, generator)
    )
    static = {"scaling": target.scaling, "dropout": float(config.lora_dropout), "layout": target.layout}
    if not config.use_dora:
        return LoRA(a, b, **static)  # type: ignore[arg-type]
    magnitude = weight_norms(target.layout, whole(weight), a, b, target.scaling).to(dtype)
    return DoRA(a, b, magnitude, **static)  # type: ignore[arg-type]


def _factors(target: Target, weight: Tensor, config: LoraConfig, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """a and b in float32 (float64 for a float64 weight), by PEFT's initialisers."""
    assert target.layout is not None
    a_shape, b_shape = target.layout.factor_shapes(weight.shape, target.r)
    kind, r = config.init_lora_weights, target.r
    dtype = torch.promote_types(weight.dtype, torch.float32)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype) * std

    def uniform(*shape: int, bound: float) -> Tensor:
        return (torch.rand(shape, generator=generator, dtype=dtype) * 2 - 1) * bound

    if kind == "orthogonal":  # both factors from disjoint halves of one orthogonal basis: B·A = 0
        lead = target.layout.expert_dims(weight.shape)
        batch = a_shape[:lead]
        n_in, n_out = math.prod(a_shape) // (math.prod(batch) * r), b_shape[lead]
        q = torch.linalg.qr(normal(*batch, r, r)).Q
        a = (normal(*batch, n_in, r // 2) @ q[..., 0::2, :]).mT / 10
        b = (normal(*batch, n_out, r // 2) @ q[..., 1::2, :]) / 10
        return a.reshape(a_shape), b.reshape(b_shape)
    if isinstance(target.layout, Embedding):  # as in PEFT, A is zero and B is random
        return (torch.zeros(a_shape, dtype=dtype) if kind else normal(*a_shape)), normal(*b_shape)
    if kind == "gaussian":
        a = normal(*a_shape, std=1 / r)
    else:  # Kaiming-uniform with a=√5: the bound is 1/√(fan in)
        fan_in = math.prod(a_shape[target.layout.expert_dims(weight.shape) + 1 :])
        a = uniform(*a_shape, bound=1 / math.sqrt(fan_in))
    if kind:
        return a, torch.zeros(b_shape, dtype=dtype)
    n_in = r * math.prod(b_shape[: target.layout.expert_dims(weight.shape)])  # PEFT: one layer of E·r inputs
    return a, uniform(*b_shape, bound=1 / math.sqrt(n_in))
