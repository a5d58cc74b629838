"""EVA: adapters that start with the directions in which the inputs of their layers vary most."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Generator, Tensor, nn

from funclora._api.arguments import check_batches, check_function
from funclora._bind.apply import bind
from funclora._bind.checks import unwritten
from funclora._bind.params import base_params
from funclora._config.config import LoraConfig
from funclora._config.infer import configured
from funclora._init.eva_inputs import Inputs
from funclora._init.fresh import check_setup, draw_root, init
from funclora._torch.functions import is_sharded
from funclora.distributed._live import gathering
from funclora.errors import ConfigError, NonFiniteError, ParamsError, UnsupportedError
from funclora.rules.base import Params, Rule
from funclora.rules.low_rank import LowRank

IGNORED = -100  # the label of tokens that no loss counts


def label_mask(batch: Any) -> Tensor | None:
    """The tokens of a batch that EVA uses by default, as in PEFT: attended to, and with a label if there are labels.

    Args:
        batch: any batch; only a dict with "attention_mask" or "labels" tells which tokens count.

    Returns:
        `[batch, tokens]`, boolean; None for all.
    """
    if not isinstance(batch, Mapping):
        return None
    attended, labels = batch.get("attention_mask"), batch.get("labels")
    masks = [] if attended is None else [attended.bool()]
    if labels is not None and (attended is None or labels.shape == attended.shape):
        masks.append(labels != IGNORED)
    return torch.stack(masks).all(0) if masks else None


@torch.no_grad()
def init_eva(
    model: nn.Module,
    config: LoraConfig,
    batches: Iterable[Any],
    *,
    rho: float = 2.0,
    tau: float = 0.99,
    whiten: bool = False,
    adjust_scaling: bool = True,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    mask: Callable[[Any], Tensor | None] = label_mask,
    max_batches: int = 1000,
    generator: Generator | None = None,
    params: Params | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[dict[str, Rule], LoraConfig]:
    """Fresh adapters by Explained Variance Adaptation (Paischer et al., arXiv 2410.07170).

    The rows of A are the leading principal components of the inputs of a layer, B is zero: the model's output does not
    change. The sum of the ranks that the configuration gives to the targets is a budget. It is spent on the components
    of all layers that explain the largest shares of the variance of their layer's inputs. A layer gets at most rho
    times its rank; a layer without components gets no adapter.

    The model runs under `params` in evaluation mode, batch by batch, until the components of every layer converge.
    No batch is kept: a layer stores only rho·r components. Layers with the same inputs share them.

    The results agree with PEFT (`initialize_lora_eva_weights`), except that PEFT's decompositions are always
    randomized, and small ones are exact here; that PEFT whitens components once more for every layer that shares them;
    and that it does not terminate if components do not converge.

    Args:
        model: the module. It is only read, and its mode does not change.
        config: what to adapt. `init_lora_weights` must be "eva"; targets must be `nn.Linear` or transformers' `Conv1D`.
        batches: a list or a data loader, which is iterated repeatedly. They must be on the model's device.
        rho: the largest factor by which a rank may grow: with 1 no rank exceeds its value in the configuration.
        tau: a component has converged if its cosine with its value before the last batch is at least this.
        whiten: divide components by the square roots of their singular values.
        adjust_scaling: scale α with the rank, so that α/r does not change.
        forward: how to run the model on a batch. By default a dict is passed as keyword arguments, a tuple or list as
            arguments, anything else as the argument.
        mask: a function from a batch to the positions that count, of shape `[batch, tokens]`, as the leading dimensions
            of all inputs. `lambda batch: None` counts all positions.
        max_batches: the number of batches after which the search for components fails.
        generator: source of randomness; torch's default generator if None.
        params: the base weights, if they are not the model's own.
        dtype: dtype of the adapters' factors and magnitudes, as in `init`.

    Returns:
        Full parameter name -> rule, and the configuration with the resulting targets and ranks and with
        `init_lora_weights=True`.

    Raises:
        ConfigError: an option is invalid, or the components do not converge within `max_batches` batches.
        TargetError: an entry of the configuration matches nothing, or names something that cannot carry a rule.
        UnsupportedError: a target is not a linear layer, its weight is not only used as one, or is divided over a mesh.
        ParamsError: there are no batches, a target gets too few inputs, or the mask does not match them.
        NonFiniteError: the inputs of a target contain NaN or infinity.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> config = LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights="eva")
        >>> batches = list(torch.randn(3, 64, 8, generator=torch.Generator().manual_seed(0)))
        >>> adapters, config = init_eva(model, config, batches)
        >>> sum(rule.r for rule in adapters.values())
        4
    """
    check_setup(model, config, generator, params, dtype)
    check_batches(batches, "batches")
    if forward is not None:
        check_function(forward, "forward", "forward(model, batch)")
    check_function(mask, "mask", "mask(batch)")
    _check(config, rho, tau, max_batches)
    params = base_params(model) if params is None else params
    fresh = init(model, config.replace(init_lora_weights=True), generator=generator, params=params, dtype=dtype)
    low_rank = {name: rule for name, rule in fresh.items() if isinstance(rule, LowRank)}
    gathered = gathering(model, params)
    if divided := next((name for name in low_rank if is_sharded(gathered[name])), None):
        raise UnsupportedError(
            f"{divided!r} is divided over a mesh, where a process sees a part of the inputs. Run init_eva in one "
            "process, save_peft there, and load_peft here."
        )
    inputs = Inputs(low_rank, rho, tau, mask, draw_root(generator))
    bound = bind(model, params, inputs.watched()).eval()
    run = forward or _forward
    with unwritten(params, {}):
        for i, batch in enumerate(_endless(batches)):
            if i == 0:
                inputs.compare(batch, lambda batch: run(bound, batch))
            moving = inputs.moving()
            if not moving:
                break
            if i == max_batches:
                raise ConfigError(
                    f"max_batches: after {i} batches the components of the inputs of {moving[0]!r} have not converged "
                    f"to tau={tau:g}. Give larger batches, more of them, or a lower tau."
                )
            inputs.take_in(batch, moving, lambda batch: run(bound, batch))
    return _result(fresh, config, inputs, whiten, adjust_scaling)


def _result(
    fresh: Mapping[str, Rule], config: LoraConfig, inputs: Inputs, whiten: bool, adjust_scaling: bool
) -> tuple[dict[str, Rule], LoraConfig]:
    """The adapters with the resulting ranks, and the configuration with these ranks."""
    without = {name.rpartition(".")[0] for name, rank in inputs.ranks.items() if not rank}
    adapters: dict[str, Rule] = {}
    for name, rule in fresh.items():
        if isinstance(rule, LowRank):
            if rank := inputs.ranks[name]:
                adapters[name] = _with_components(name, rule, rank, config, inputs, whiten, adjust_scaling)
        elif config.bias != "lora_only" or name.rpartition(".")[0] not in without:
            adapters[name] = rule
    return configured(adapters, [_targeting(config, adapters) if without else config])


def _targeting(config: LoraConfig, adapters: Mapping[str, Rule]) -> LoraConfig:
    """The configuration with only the targets that have an adapter."""
    names = [name for name, rule in adapters.items() if isinstance(rule, LowRank)]
    parameters = [name for name in names if config.names("target_parameters", name)]
    modules = [name.rpartition(".")[0] for name in names if name not in parameters]
    return config.replace(
        target_modules="|".join(map(re.escape, modules)) or None,
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        target_parameters=parameters or None,
    )


def _with_components(
    name: str, rule: LowRank, rank: int, config: LoraConfig, inputs: Inputs, whiten: bool, adjust_scaling: bool
) -> LowRank:
    pca = inputs.pcas[inputs.leaders[name]]
    assert pca.components is not None
    a = pca.components[:rank]
    if whiten:
        a = a / pca.singular[:rank].sqrt().unsqueeze(-1)
        if not torch.isfinite(a).all():
            raise NonFiniteError(f"whiten: {name!r} has inputs that do not vary in {rank} directions. Lower r or rho.")
    alpha = float(rule.scaling) / config.scaling(rule.r, 1.0)
    if adjust_scaling:
        alpha *= rank / rule.r
    return replace(
        rule,
        a=a.to(rule.a),
        b=rule.b.new_zeros(*rule.b.shape[:-1], rank),
        scaling=config.scaling(rank, alpha),
    )


def _check(config: LoraConfig, rho: float, tau: float, max_batches: int) -> None:
    if config.init_lora_weights != "eva":
        raise ConfigError(
            f"init_lora_weights: init_eva expected 'eva', got {config.init_lora_weights!r}. Use init or decompose."
        )
    if isinstance(rho, bool) or not isinstance(rho, (int, float)) or not 1 <= rho < float("inf"):
        raise ConfigError(f"rho: expected a number from 1 up, got {rho!r}.")
    if isinstance(tau, bool) or not isinstance(tau, (int, float)) or not 0 <= tau <= 1:
        raise ConfigError(f"tau: expected a cosine between 0 and 1, got {tau!r}.")
    if isinstance(max_batches, bool) or not isinstance(max_batches, int) or max_batches < 2:
        raise ConfigError(f"max_batches: expected an integer from 2 up, got {max_batches!r}.")


def _forward(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def _endless(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches, repeated without end."""
    passes = 0
    while True:
        some = False
        for batch in batches:
            some = True
            yield batch
        passes += 1
        if not some:
            raise ParamsError(
                "batches: there are none." if passes == 1 else
                "batches: they ended before the components converged. Give a list or a data loader, which can be "
                "iterated again."
            )  # fmt: skip
