"""The tables of tokens of a model: the input embeddings, what is tied to them, and whose rows are trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from funclora._apply import named_tensors
from funclora._config import LoraConfig
from funclora.errors import TargetError, near


@dataclass(frozen=True)
class Tables:
    """The input embeddings of a model, and the modules that share their weight.

    Attributes:
        input: the full name of the module that turns ids into vectors; "" if the model does not say.
        tied: the full names of the modules that transformers ties to it.
    """

    input: str
    tied: tuple[str, ...]

    @classmethod
    def of(cls, model: nn.Module) -> Tables:
        """Those of a model.

        Weights that are shared without `config.tie_word_embeddings` do not count as tied: to PEFT they are not.
        """
        ask = getattr(model, "get_input_embeddings", None)
        try:
            module = ask() if callable(ask) else None
        except NotImplementedError:  # transformers, for models without a table
            module = None
        modules = dict(model.named_modules())  # each module once, as PEFT lists them
        name = next((name for name, other in modules.items() if other is module), "")
        if not name or not getattr(getattr(model, "config", None), "tie_word_embeddings", False):
            return cls(name, ())
        tensors = {name: tensor for name, tensor, _, _ in named_tensors(model)}
        table = tensors.get(f"{name}.weight")
        tied = [n for n in modules if n != name and table is not None and tensors.get(f"{n}.weight") is table]
        return cls(name, tuple(tied))

    def named(self, modules: Iterable[str]) -> bool:
        """Whether some of these modules have the weight."""
        return any(name in (self.input, *self.tied) for name in modules if name)


def checked_tokens(config: LoraConfig, tables: Tables, modules: Mapping[str, nn.Module]) -> dict[str, tuple[int, ...]]:
    """The tokens of `trainable_token_indices` by the full names of the modules that hold them.

    Raises:
        TargetError: an entry matches no table, or a token is not in it.
    """
    found: dict[str, tuple[int, ...]] = {}
    for key, ids in config.tokens.items():
        entry = key or tables.input or "embed_tokens"
        names = [name for name in modules if name.endswith(entry)]  # so PEFT compares, without regard to dots
        if not names:
            hint = "" if key else " A list is meant for the input embeddings; give a dict from the table's name."
            raise TargetError(f"trainable_token_indices: {entry!r} matches no module.{hint}{near(entry, modules)}")
        for name in names:
            if name != entry and not name.endswith(f".{entry}"):
                raise TargetError(
                    f"trainable_token_indices: {entry!r} names {names[0]!r}, but PEFT would also take {name!r}, whose "
                    "name ends alike. Give the full name of the module."
                )
            if name in found:
                raise TargetError(f"trainable_token_indices: {name!r} is named twice.")
            found[name] = _in_table(name, modules[name], ids)
    return found


def _in_table(name: str, module: nn.Module, ids: tuple[int, ...]) -> tuple[int, ...]:
    where = f"trainable_token_indices: {name!r}"
    if isinstance(module, nn.Embedding):
        n = module.num_embeddings
    elif isinstance(module, nn.Linear):
        if module._parameters.get("bias") is not None:
            raise TargetError(f"{where} has a bias, which PEFT would leave out. Name the input embeddings only.")
        n = module.out_features
    else:
        raise TargetError(
            f"{where} is a {type(module).__name__}; expected an nn.Embedding, or an nn.Linear over tokens."
        )
    if max(ids) >= n:
        raise TargetError(f"{where} has {n} rows, and no token {max(ids)}.")
    return ids
