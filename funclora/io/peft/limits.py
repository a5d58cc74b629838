"""Limits of PEFT 0.21, and its deviations from the formula.

An obstacle prevents writing and reading: a folder with it would not have the same meaning in PEFT. The others are
differences that reading can reproduce or must report.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import nn

from funclora._config.config import LoraConfig
from funclora._config.names import inside
from funclora._quant.quantize import reads_packed_weights
from funclora.io.peft.keys import FORMS, PeftTarget
from funclora.rules.base import Rule
from funclora.rules.dense import Full
from funclora.rules.dora import DoRA
from funclora.rules.layouts import Attention, Conv, Conv1D, Embedding, Linear, Parameter
from funclora.rules.tokens import TrainableTokens

Reasons = Iterator[tuple[str, str]]

_UNKNOWN = {
    "ConvTranspose": "PEFT has no adapters for transposed convolutions.",
    "Recurrent": "PEFT has no adapters for recurrent layers.",
    "Parameter": "PEFT finds such a parameter through target_parameters only, and it is not named there.",
}
_TIED = ("embed_tokens", "lm_head")
_ORTHOGONAL = (
    "PEFT knows init_lora_weights='orthogonal' for linear layers only. Use config.replace(init_lora_weights=True): "
    "the field does not change an adapter that is already trained."
)


def unsupported_by_peft(wrapped: Sequence[PeftTarget], saved: Sequence[str], config: LoraConfig) -> Reasons:
    """`(name, why)` for everything that PEFT refuses, or computes in another way.

    Args:
        wrapped: the weights with low-rank rules.
        saved: full names of the modules that are fully fine-tuned.
        config: the configuration that is, or will be, in the folder.
    """
    for w in wrapped:
        why = _of_parameter(w, config) if w.by_parameter else _of_module(w, config)
        if not w.owner:
            why = "PEFT cannot adapt parameters of the model itself, only those of its submodules."
        if why:
            yield w.name, why
    yield from _between(wrapped)
    for module in saved:
        if any(other != module and inside(module, other) for other in saved):
            yield module, "PEFT cannot train a module in full that lies in another such module."
        if any(w.owner != module and inside(module, w.owner) for w in wrapped):
            yield module, "PEFT cannot train a module in full that lies in an adapted module."


def _of_module(w: PeftTarget, config: LoraConfig) -> str | None:
    layout, kind = w.layout, type(w.layout).__name__
    if type(layout) not in FORMS:
        return _UNKNOWN.get(kind, f"PEFT has no form for the layout {kind}.")
    if config.init_lora_weights == "orthogonal" and not isinstance(layout, (Linear, Conv1D, Embedding)):
        return _ORTHOGONAL
    if isinstance(layout, Embedding) and layout.max_norm:
        return "PEFT adds its update after max_norm has acted, not before."
    if config.lora_bias and not isinstance(layout, (Linear, Conv1D, Conv)):
        return f"PEFT's lora_bias has no place for a layout {kind}."
    if isinstance(layout, Attention) and config.use_dora:
        return "PEFT has no DoRA for nn.MultiheadAttention."
    if isinstance(layout, Conv):
        if layout.groups > 1:
            return "PEFT's update of a grouped convolution mixes the groups; no grouped kernel equals it."
        if layout.dilated:
            return "PEFT leaves the dilation out of its update."
        if layout.padding_mode != "zeros":
            return f"PEFT pads the input of its update with zeros, not with padding_mode={layout.padding_mode!r}."
    return None


def _of_parameter(w: PeftTarget, config: LoraConfig) -> str | None:
    if not isinstance(w.layout, (Linear, Conv1D, Embedding, Parameter)):
        return f"PEFT does not adapt a weight of layout {type(w.layout).__name__} through target_parameters."
    if isinstance(w.layout, Embedding) and w.layout.max_norm:
        return "PEFT would let max_norm write into the adapted table."
    if len(w.shape) > 3:
        return f"PEFT adapts parameters of two or three dimensions, this one has {len(w.shape)}."
    if w.shape[0] == 1 and len(w.shape) == 3 and w.stored_as_in_out:
        return "PEFT forgets that a single expert is stored transposed."
    if config.use_dora:
        return "PEFT has no DoRA for target_parameters."
    if config.lora_dropout:
        return "PEFT has no dropout for target_parameters; lora_dropout must be 0."
    if config.init_lora_weights == "orthogonal":
        return _ORTHOGONAL
    return None


_ORDER = (
    "PEFT tells the adapted parameters of one module apart by their order alone, and the layouts of the adapters of "
    "this one's module do not give that order."
)
_OUT_PROJ = "PEFT's adapter on out_proj of nn.MultiheadAttention has no effect until it is merged, and then it has one."


def _between(wrapped: Sequence[PeftTarget]) -> Reasons:
    """Conflicts of `target_parameters` with each other and with other targets."""
    by_parameter = [w for w in wrapped if w.by_parameter]
    for w in by_parameter:
        family = [other.layout for other in by_parameter if other.owner == w.owner]
        layouts = [layout for layout in family if isinstance(layout, Parameter)]
        places = sorted(layout.position for layout in layouts)
        in_order = places == [*range(len(family))] and all(layout.siblings == len(family) for layout in layouts)
        alone = len(family) == 1 and not layouts
        if not in_order and not alone:
            yield w.name, _ORDER
        if any(other.in_out_linear for other in wrapped if not other.by_parameter):
            yield w.name, "PEFT cannot adapt transformers' Conv1D layers and target_parameters together."


def unsupported_ties(followed: Mapping[str, type[Rule]], ties: Mapping[str, str], config: LoraConfig) -> Reasons:
    """`(name, why)` for tied parameters.

    Args:
        followed: full name of a tied parameter -> kind of the rule that it follows.
        ties: full name of a tied parameter -> full name of the one with the rule.
        config: the configuration that is, or will be, in the folder.
    """
    for name, kind in followed.items():
        if kind is TrainableTokens:
            continue  # PEFT needs no field for them
        table = ties[name].rpartition(".")[0]
        entries = config.modules_to_save if kind is Full else config.target_modules
        if isinstance(entries, str):
            seen = any(re.fullmatch(entries, known) for known in _TIED)
        else:
            seen = any(entry.rpartition(".")[2] in _TIED for entry in entries or ())
        if kind is DoRA:
            yield name, "PEFT has no tie between the magnitudes of a table and of an output layer."
        elif not seen:
            yield name, f"PEFT ties {' and '.join(_TIED)} only, and looks for these names in the configuration."
        elif not name.endswith("lm_head.weight"):
            yield name, f"PEFT ties an output layer to {table!r}, and not another table."


def unsupported_in_model(model: nn.Module, wrapped: Iterable[PeftTarget]) -> Reasons:
    """`(name, why)` for obstacles that depend on the model."""
    elsewhere = _held_elsewhere(model)
    for w in wrapped:
        if w.module in elsewhere:
            yield (
                w.name,
                (
                    f"the model holds its module as {elsewhere[w.module]!r} too. PEFT would adapt only the calls of "
                    f"{w.module!r}."
                ),
            )
        if isinstance(w.layout, Attention):
            if w.name.endswith(("q_proj_weight", "k_proj_weight", "v_proj_weight")):
                yield w.name, "PEFT adapts nn.MultiheadAttention only where kdim and vdim are embed_dim."
            if w.name == f"{w.module}.weight":
                yield w.name, _OUT_PROJ


def _held_elsewhere(model: nn.Module) -> dict[str, str]:
    """First name of a module -> a further name, if it is not by the same attribute of the same module."""
    names: dict[int, tuple[str, int]] = {}
    found: dict[str, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        path, _, leaf = name.rpartition(".")
        first, place = names.setdefault(id(module), (name, hash((id(model.get_submodule(path)), leaf))))
        if first != name and place != hash((id(model.get_submodule(path)), leaf)):
            found.setdefault(first, name)
    return found


def differences(model: nn.Module, wrapped: Sequence[PeftTarget], config: LoraConfig, *, by_peft: bool) -> Iterator[str]:
    """The notes for the reader of a folder. `by_peft`: PEFT wrote the configuration, and so sorted it."""
    doubled = [w.name for w in wrapped if counts_twice(w)]
    if doubled:
        yield (
            "PEFT adds the update of nn.MultiheadAttention's out_proj twice. To give the same outputs, twice the "
            f"scaling went to {', '.join(map(repr, doubled))}."
        )
    for name in dict.fromkeys(w.module for w in wrapped if not w.by_parameter):
        module = model.get_submodule(name)
        if own_forward(module):
            yield (
                f"{name!r} is a {type(module).__name__} with a forward of its own. PEFT adds its update to what the "
                "module returns, funclora to its weight: compare the outputs."
            )
    for w in wrapped if by_peft else ():
        if len({config.alpha_pattern[key] for key in config.patterns_of("alpha_pattern", w.key)}) > 1:
            yield (
                f"several keys of alpha_pattern match {w.key!r}, and the first one counts. PEFT sorts them when it "
                "saves: the adapter may have been trained with another scaling."
            )
            return


def counts_twice(w: PeftTarget) -> bool:
    """True for the output projection of an `nn.MultiheadAttention` that PEFT adapts."""
    return isinstance(w.layout, Attention) and w.name == f"{w.module}.out_proj.weight"


_PLAIN = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)


def own_forward(module: nn.Module) -> bool:
    """Whether a layer computes something else than the plain one of its kind."""
    base = next((cls for cls in _PLAIN if isinstance(module, cls)), None)
    # TiedEmbeddings that scale what they return (embed_scale) are known to PEFT, and so are the layers of bitsandbytes.
    return (
        base is not None
        and type(module).forward is not base.forward
        and not hasattr(module, "embed_scale")
        and not reads_packed_weights(module)
    )
