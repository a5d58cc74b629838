"""What diffusers makes of a LoRA file: its converters know the names of kohya's scripts and of many other trainers.

They are called as `pipe.load_lora_weights` calls them, but for a twin of the pipeline whose components have no
weights: what arrives at the components is recorded, and the pipeline itself does not change.
"""

from __future__ import annotations

import copy
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from funclora.errors import FormatError, FuncloraError, UnsupportedError
from funclora.io.hf.library import first_line, quiet, transformers

_ADAPTER = "default"
_NEEDED = "LoRA files of image models are read by diffusers."
# Names before the leaf: of PEFT, of diffusers, of diffusers before 0.22.
_STEM = re.compile(r"(?:\.lora_A|_lora\.down|\.lora\.down|\.lora_linear_layer\.down)(?:\.weight)?$")
# What goes wrong inside of diffusers has no common class.
_FAILURES = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError,
    ValueError,
)  # fmt: skip


@dataclass
class Arrived:
    """What diffusers hands to one component.

    Attributes:
        tensors: PEFT's key, without a prefix -> tensor.
        config: the `peft.LoraConfig`.
        alphas: full name of a module -> α, where the file says it.
    """

    tensors: dict[str, Tensor]
    config: Any
    alphas: dict[str, float]


def package() -> ModuleType:
    """The `diffusers` package.

    Raises:
        UnsupportedError: it is not installed, or not complete.
    """
    try:
        import diffusers
    except ModuleNotFoundError as error:
        raise UnsupportedError(f"{_NEEDED} Type: pip install 'funclora[diffusers]'") from error
    if not diffusers.utils.USE_PEFT_BACKEND:
        raise UnsupportedError(f"{_NEEDED} It found no PEFT that it can use. Type: pip install --upgrade peft")
    return diffusers  # type: ignore[no-any-return]


def converted(file: Path, components: Mapping[str, nn.Module], loader: type) -> dict[str, Arrived]:
    """What the components get from a file, those left out that get nothing.

    Args:
        file: a safetensors file.
        components: name in the pipeline -> model. They are only read.
        loader: the class in diffusers that knows such files.

    Raises:
        FormatError: diffusers cannot load the file, or it contains a key that belongs to none of the components.
    """
    recorder = _Recorder(file, components, loader)
    with _silent():
        try:
            recorder.twin.load_lora_weights(
                str(file.parent), weight_name=file.name, adapter_name=_ADAPTER, use_safetensors=True,
                local_files_only=True,
            )  # fmt: skip
        except FuncloraError:
            raise
        except _FAILURES as error:
            raise FormatError(
                f"{file}: diffusers cannot load this file for {', '.join(components)}: {first_line(error)}."
            ) from error
    return recorder.arrived()


class _Recorder:
    """A twin of a pipeline, and what its components got."""

    def __init__(self, file: Path, components: Mapping[str, nn.Module], loader: type) -> None:
        self._file, self._keys = file, dict[str, list[str]]()
        self._alphas: dict[str, float] = {}
        self._tensors: dict[str, dict[str, Tensor]] = {}
        self._configs: dict[str, Any] = {}
        twins = {name: self._component(name, model) for name, model in components.items()}
        absent = dict.fromkeys(getattr(loader, "_lora_loadable_modules", ()))
        outer = self

        def lora_state_dict(cls: type, *args: Any, **options: Any) -> Any:
            out = loader.lora_state_dict(*args, **options)  # type: ignore[attr-defined]
            outer._note(out[0], out[1] if len(out) == 3 else None, twins)
            return out

        body = {"lora_state_dict": classmethod(lora_state_dict), "lora_scale": 1.0, "hf_device_map": None}
        self.twin: Any = type("Twin", (loader,), body | {"components": twins} | absent | twins)()

    def _note(self, state: Mapping[str, Any], alphas: Mapping[str, Any] | None, components: Mapping[str, Any]) -> None:
        for key in state:
            component = key.partition(".")[0]
            if "lora" not in key:
                raise UnsupportedError(
                    f"{self._file}: {key!r} is no factor of a low-rank update, but replaces a weight of the model."
                )
            if component not in components:
                raise FormatError(
                    f"{self._file}: {key!r} belongs to none of the components {', '.join(map(repr, components))}. Give "
                    "the pipeline that the file was made for, with all components that it changes."
                )
            self._keys.setdefault(component, []).append(key)
        self._alphas = {key.removesuffix(".alpha"): float(alpha) for key, alpha in (alphas or {}).items()}

    def _component(self, name: str, model: nn.Module) -> nn.Module:
        twin: Any = _without_weights(model)
        if hasattr(twin, "load_lora_adapter"):

            def load_lora_adapter(state: dict[str, Tensor], prefix: str = "transformer", **options: Any) -> None:
                from diffusers.utils import convert_unet_state_dict_to_peft as to_peft

                own = {key.removeprefix(f"{prefix}."): t for key, t in state.items() if key.startswith(f"{prefix}.")}
                if own:
                    self._tensors[name] = own if "lora_A" in next(iter(own)) else to_peft(own)
                    type(twin).load_lora_adapter(twin, state, prefix=prefix, **options)
                    self._configs[name] = twin.peft_config[_ADAPTER]

            twin.load_lora_adapter = load_lora_adapter
        else:

            def load_adapter(*, adapter_state_dict: dict[str, Tensor], peft_config: Any, **options: Any) -> None:
                self._tensors[name], self._configs[name] = adapter_state_dict, peft_config

            twin.load_adapter = load_adapter
        return twin  # type: ignore[no-any-return]

    def arrived(self) -> dict[str, Arrived]:
        found = {}
        for name, keys in self._keys.items():
            tensors = self._tensors.get(name, {})
            if len(tensors) != len(keys):
                raise FormatError(
                    f"{self._file}: diffusers makes {len(tensors)} tensors of the {len(keys)} that the file has for "
                    f"{name!r}, such as {keys[0]!r}: names are there twice, or unknown."
                )
            # Converters rename keys in their order.
            pairs = [(key, to) for key, to in zip(keys, tensors, strict=True) if to.endswith("lora_A.weight")]
            stems = {_STEM.sub("", to): self._alpha(key) for key, to in pairs}
            alphas = {stem: alpha for stem, alpha in stems.items() if alpha is not None}
            found[name] = Arrived(tensors, self._configs[name], alphas)
        if self._alphas:
            raise FormatError(
                f"{self._file}: there is an α for {next(iter(self._alphas))!r}, but no factor that it scales."
            )
        return found

    def _alpha(self, key: str) -> float | None:
        """The α of the module with this key of A, which diffusers names by the whole key or by what is before it."""
        for name in (key, key.partition(".lora.")[0], _STEM.sub("", key)):
            if name in self._alphas:
                return self._alphas.pop(name)
        return None


def _without_weights(model: nn.Module) -> nn.Module:
    """A copy of a model on the meta device."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        bare = torch.empty_like(tensor, device="meta", requires_grad=False)
        memo[id(tensor)] = nn.Parameter(bare, requires_grad=False) if isinstance(tensor, nn.Parameter) else bare
    return copy.deepcopy(model, memo)


@contextmanager
def _silent() -> Iterator[None]:
    """Without the reports of the libraries: what they warn of is an error here."""
    with quiet(transformers()), quiet(package()), warnings.catch_warnings():
        package().utils.logging.set_verbosity(logging.CRITICAL)
        warnings.simplefilter("ignore")
        yield
