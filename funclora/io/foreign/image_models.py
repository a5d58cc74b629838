"""`load_diffusers` and `save_diffusers`: LoRA files of image models."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor, nn

from funclora._api.arguments import check_path, refuse
from funclora._bind.checks import check_rules
from funclora._config.checks import check_config
from funclora._config.config import LoraConfig
from funclora._files.atomic import replace_files
from funclora._files.safetensors import read_header
from funclora._files.snapshot import OpenFile
from funclora.errors import ConfigError, FormatError, FormatWarning, UnsupportedError
from funclora.io.foreign.factors import Factors, rules_of
from funclora.io.foreign.image_files import Arrived, converted, package
from funclora.io.peft.consistency import check_against_config
from funclora.io.peft.fold import unscaled
from funclora.io.peft.keys import PREFIX
from funclora.io.peft.rules import tensors_of
from funclora.rules.base import Adapters, Rule

WEIGHTS_FILE = "pytorch_lora_weights.safetensors"
_COMPONENT = re.compile(r"(unet|transformer|text_encoder|text_conditioner|connectors)(_[0-9]|_ref)?")
# Parts of keys that are no LoRA, and what diffusers would make of them.
_OTHERS = {
    ".dora_scale": "a magnitude of DoRA, which diffusers leaves out without an error",
    ".hada_": "LoHa of LyCORIS",
    ".lokr_": "LoKr of LyCORIS",
    ".oft_": "OFT",
}


def load_diffusers(path: str | os.PathLike[str], components: Any) -> dict[str, tuple[dict[str, Rule], LoraConfig]]:
    """Read a LoRA file of an image model, as diffusers, kohya's scripts and others write it.

    diffusers' own converters read the file, so every format that `pipe.load_lora_weights` knows is known here, and
    the adapters give the outputs of that pipeline. The pipeline is only read. One exception: where a file of kohya's
    scripts has several α, diffusers takes the most common one for attention layers and text encoders. Here each layer
    gets its own, as in kohya's scripts, and a `FormatWarning` says so.

    Args:
        path: a safetensors file, or the folder with it.
        components: a diffusers pipeline; or its models by their names in the pipeline ("unet" or "transformer",
            "text_encoder", "text_encoder_2").

    Returns:
        Name of the component -> its adapters (full parameter name -> rule) and a configuration with which `save_peft`
        writes them. Components without an adapter in the file are left out.

    Raises:
        FormatError: the file is missing or broken, or does not fit the components.
        UnsupportedError: it is no LoRA, or belongs to a pipeline that cannot have one; or diffusers is not installed.
        NonFiniteError: a tensor contains NaN or infinity.

    Examples:
        >>> import tempfile
        >>> import funclora as fl
        >>> from diffusers import UNet2DConditionModel
        >>> blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
        >>> sizes = {"block_out_channels": (8,), "cross_attention_dim": 8, "attention_head_dim": 4}
        >>> unet = UNet2DConditionModel(**blocks, **sizes, norm_num_groups=4, layers_per_block=1)
        >>> config = fl.LoraConfig(r=2, target_modules=["to_q", "conv1"])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_diffusers(folder, {"unet": (fl.init(unet, config), config)})
        ...     adapters, its_config = load_diffusers(folder, {"unet": unet})["unet"]
        >>> sorted(its_config.target_modules), adapters.keys() == fl.init(unet, config).keys()
        (['conv1', 'to_q'], True)
    """
    check_path(path, order="path, components")
    package()
    return load_parts(Path(path), *_pipeline(components))


def load_parts(
    path: Path, models: Mapping[str, nn.Module], loader: type
) -> dict[str, tuple[dict[str, Rule], LoraConfig]]:
    """As `load_diffusers`, with the models that can have adapters, and diffusers' class that loads files for them."""
    file = weights_file(path)
    _refuse_others(file)
    found = {}
    for name, arrived in converted(file, models, loader).items():
        found[name] = rules_of(file, _factors(file, name, arrived), models[name])
    return found


def save_diffusers(
    path: str | os.PathLike[str], components: Mapping[str, tuple[Adapters, LoraConfig]], *, name: str = WEIGHTS_FILE
) -> None:
    """Write adapters as a LoRA file that `pipe.load_lora_weights(path)` of diffusers loads.

    s is multiplied into B, so that every program computes the same, also those that know no α. Dropout is not written.

    Args:
        path: the folder; made if it does not exist.
        components: name in the pipeline ("unet" or "transformer", "text_encoder", "text_encoder_2") -> adapters, and
            the configuration that they were made with.
        name: of the file in the folder. It is replaced atomically.

    Raises:
        ConfigError: there is nothing to write, or adapters and configuration do not agree.
        UnsupportedError: diffusers has no place for a rule.
        NonFiniteError: an adapter contains NaN or infinity.
        OSError: the file cannot be written. An existing file is then unchanged.

    Examples:
        >>> import tempfile
        >>> from funclora import init
        >>> denoiser = nn.ModuleDict({"to_q": nn.Linear(4, 4)})
        >>> config = LoraConfig(r=2, target_modules=["to_q"])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_diffusers(folder, {"unet": (init(denoiser, config), config)})
        ...     [file.name for file in Path(folder).iterdir()]
        ['pytorch_lora_weights.safetensors']
    """
    check_path(path, order="path, components")
    if not isinstance(components, Mapping) or not components:
        raise ConfigError('components: expected a dict such as {"unet": (adapters, config)}, with at least one entry.')
    tensors: dict[str, Tensor] = {}
    for component, (adapters, config) in components.items():
        check_rules(adapters)
        check_config(config)
        tensors |= {f"{component}.{key}": tensor for key, tensor in _written(component, adapters, config).items()}
    copies = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in sorted(tensors.items())}

    def write(draft: Path) -> None:
        draft.write_bytes(save(copies, metadata={"format": "pt"}))

    replace_files(Path(path), {name: write})


def weights_file(path: Path) -> Path:
    """The safetensors file that a path means.

    Raises:
        FormatError: there is none, or several.
        UnsupportedError: there is only a pickle.
    """
    if path.is_file():
        files = [path]
    else:
        files = [path / WEIGHTS_FILE] if (path / WEIGHTS_FILE).is_file() else sorted(path.glob("*.safetensors"))
    if not files and path.is_dir():
        files = sorted(path.glob("*.bin"))
    if len(files) != 1:
        names = ", ".join(file.name for file in files[:5])
        raise FormatError(f"{path}: expected one safetensors file, got {names or 'none'}. Give the file.")
    if files[0].suffix != ".safetensors":
        raise UnsupportedError(
            f"{files[0]}: only safetensors files are read. A pickle can run code: convert it where you trust it."
        )
    return files[0]


def _pipeline(components: Any) -> tuple[dict[str, nn.Module], type]:
    """The models that can have adapters, and diffusers' class that loads files for them."""
    if isinstance(components, Mapping):
        models = {name: model for name, model in components.items() if isinstance(model, nn.Module)}
        if not models.keys() & {"unet", "transformer"}:
            got = ", ".join(map(repr, models)) or "none"
            raise ConfigError(f"components: expected 'unet' or 'transformer' among the models, got {got}.")
        denoiser = type(models.get("transformer")).__name__
        mixins = _mixins()
        fitting = [name for name in mixins if denoiser.startswith(name)]
        loader = mixins["StableDiffusionXL"] if "unet" in models else mixins.get(max(fitting, key=len, default=""))
        if loader is None:
            raise UnsupportedError(
                f"components: diffusers has no loader of LoRA files for {denoiser}. Give the pipeline."
            )
    else:
        parts = getattr(components, "components", None)
        if not isinstance(parts, Mapping):
            refuse("components", "a diffusers pipeline, or a dict of its models", components, "")
        models = {name: model for name, model in parts.items() if isinstance(model, nn.Module)}
        loader = loader_of(type(components))
    loadable = loader._lora_loadable_modules  # type: ignore[attr-defined]
    return {name: model for name, model in models.items() if name in loadable}, loader


def loader_of(pipeline: type) -> type:
    """The base class of a pipeline that loads LoRA files.

    Raises:
        UnsupportedError: diffusers has none for it.
    """
    mixins = _mixins().values()
    found = next((cls for cls in pipeline.__mro__ if cls in mixins), None)
    if found is None:
        raise UnsupportedError(f"components: diffusers has no loader of LoRA files for {pipeline.__name__}.")
    return found


def _mixins() -> dict[str, type]:
    """diffusers' classes that load LoRA files, by the beginning of the names of their models."""
    from diffusers.loaders import lora_pipeline

    return {
        name.removesuffix("LoraLoaderMixin"): cls
        for name, cls in vars(lora_pipeline).items()
        if name.endswith("LoraLoaderMixin") and name != "LoraLoaderMixin"
    }


def _refuse_others(file: Path) -> None:
    for key, tensor in read_header(OpenFile(file)).items():
        for part, what in _OTHERS.items():
            if part in key:
                raise UnsupportedError(f"{file}: {key!r} is {what}. Merge the file with the program that made it.")
        if not tensor.is_floating:
            raise FormatError(f"{file}: {key!r} has dtype {tensor.dtype}, expected a floating-point one.")


def _factors(file: Path, component: str, arrived: Arrived) -> dict[str, Factors]:
    """The updates of a component by the full names of its modules."""
    config = _config(file, component, arrived)
    pieces: dict[str, dict[str, Tensor]] = {}
    for key, tensor in arrived.tensors.items():
        module, _, leaf = key.partition(".lora_")
        pieces.setdefault(module, {})[leaf.removesuffix(".weight")] = tensor
    found, other = {}, []
    for module, leaves in pieces.items():
        unknown = leaves.keys() - {"A", "B", "B.bias", "magnitude_vector"}
        if unknown or not {"A", "B"} <= leaves.keys():
            raise FormatError(
                f"{file}: expected both factors of {component}.{module!s}, got {', '.join(sorted(leaves))} "
                "(in PEFT's names)."
            )
        if config.use_dora != ("magnitude_vector" in leaves):
            raise FormatError(
                f"{file}: use_dora={config.use_dora} for {component}, but {module} has "
                f"{'no' if config.use_dora else 'a'} magnitude."
            )
        r = leaves["A"].shape[0] if leaves["A"].dim() else 0
        known, scaling = config.rank_of(module) == r, config.scaling(max(r, 1), config.alpha_of(module))
        if module in arrived.alphas:
            if r and known and abs(scaling - arrived.alphas[module] / r) > 1e-6 * abs(scaling):
                other.append(module)
            scaling = arrived.alphas[module] / max(r, 1)
        elif not known:
            raise FormatError(
                f"{file}: {component}.{module} has rank {r}, but diffusers expects {config.rank_of(module)}."
            )
        found[module] = Factors(
            leaves["A"], leaves["B"], scaling, leaves.get("magnitude_vector"), leaves.get("B.bias"),
            dropout=float(config.lora_dropout),
        )  # fmt: skip
    if other:
        warnings.warn(
            f"{file}: {len(other)} layers of {component}, such as {other[0]}, have an α of their own, for which "
            "diffusers takes another one. They are read as the file says.",
            FormatWarning,
            stacklevel=5,
        )
    return found


def _config(file: Path, component: str, arrived: Arrived) -> LoraConfig:
    try:
        config = LoraConfig.from_peft(arrived.config)
    except ConfigError as error:
        raise FormatError(f"{file}: {component}: {error}") from error
    for field, value in {
        "init_lora_weights": config.decomposition, "modules_to_save": config.modules_to_save,
        "bias": "" if config.bias == "none" else config.bias, "target_parameters": config.target_parameters,
        "trainable_token_indices": config.trainable_token_indices,
    }.items():  # fmt: skip
        if value:
            raise UnsupportedError(f"{file}: {component}: {field}={value!r} cannot be read from files of diffusers.")
    return config


def _written(component: str, adapters: Adapters, config: LoraConfig) -> dict[str, Tensor]:
    if not isinstance(component, str) or not _COMPONENT.fullmatch(component):
        raise ConfigError(
            f"components: expected a name such as 'unet', 'transformer' or 'text_encoder_2', got {component!r}. A "
            "pipeline would leave out the adapters of another name."
        )
    if not adapters:
        raise ConfigError(f"components: there is no adapter for {component!r}. Leave it out.")
    wrapped = check_against_config(adapters, config)
    tensors = tensors_of(unscaled(adapters), wrapped)
    for key in tensors:
        if ".lora_A." not in key and ".lora_B." not in key and not key.endswith(".lora_magnitude_vector"):
            raise UnsupportedError(f"{component}: diffusers has no place for {key.removeprefix(PREFIX)!r}.")
    return {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
