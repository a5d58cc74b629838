"""PEFT folders whose adapters are relative to decomposed weights (PiSSA, OLoRA)."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from funclora._config.config import LoraConfig
from funclora._init.decompose import decompose
from funclora._init.relative import relative_to_original
from funclora.errors import ConfigError, FormatError, ParamsError, UnsupportedError
from funclora.rules.base import Rule
from funclora.rules.layouts import Conv1D, Linear
from funclora.rules.low_rank import LowRank

ADVICE = (
    "Export it relative to the original weights: save_peft(path, *relative_to_original(adapters, initial, config)), "
    "with the adapters that decompose returned as initial. Or save it with config.replace(init_lora_weights=True), and "
    "with it the params that decompose returned: they are its base then."
)
_QUANTISED = (
    "Save it with config.replace(init_lora_weights=True), and with it the quantised weights that decompose returned: "
    "they are its base."
)


def refuse_decomposed(config: LoraConfig) -> None:
    """Raise `UnsupportedError` where the readers of a folder would decompose their weights again."""
    if config.decomposition:
        raise UnsupportedError(
            f"init_lora_weights={config.init_lora_weights!r}: PEFT decomposes the weights of its model anew when it "
            "loads such a folder, and they need not come out the same. "
            + (_QUANTISED if config.decomposition == "loftq" else ADVICE)
        )


def on_the_original(
    file: Path, model: nn.Module, adapters: dict[str, Rule], config: LoraConfig
) -> tuple[dict[str, Rule], LoraConfig]:
    """A plain adapter of the original model that gives what PEFT computes from such a folder.

    When PEFT loads it, it decomposes the weights again and replaces the initial factors by the trained ones. The exact
    decompositions give the same result each time, so the initial factors are also known here.

    Raises:
        UnsupportedError: they do not come out the same, or PEFT cannot decompose a target.
        FormatError: a rank exceeds a weight's.
    """
    where = f"{file}: init_lora_weights={config.init_lora_weights!r}"
    if config.decomposition == "loftq":
        raise UnsupportedError(
            f"{where}: the adapter belongs to the quantised weights of its training. Load them as the model, and "
            "set the field to true in the file."
        )
    if config.niter is not None:
        raise UnsupportedError(
            f"{where}: PEFT draws another random decomposition whenever it loads the adapter, and does not know its "
            "own base again. Convert it where it was trained: save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...)."
        )
    layouts = (Linear, Conv1D) if config.decomposition == "pissa" else (Linear,)
    for name, rule in adapters.items():
        if isinstance(rule, LowRank) and (not isinstance(rule.layout, layouts) or config.target_parameters):
            raise UnsupportedError(
                f"{where}: PEFT does not decompose {name!r}, a weight of {type(rule.layout).__name__}."
            )
    try:
        _, initial = decompose(model, config)
    except (ConfigError, ParamsError) as error:
        raise FormatError(f"{where}: {error}") from error
    return relative_to_original(adapters, initial, config)
